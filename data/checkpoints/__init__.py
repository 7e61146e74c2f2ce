"""The model's sizes and weights as files: configuration, Hugging Face's format, initialisation."""
