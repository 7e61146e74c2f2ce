"""From text to batches of tokens and back: sources, tokenizer, shards, loader, sampling."""
