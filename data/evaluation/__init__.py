"""What a model can do, in numbers: losses of tokens, and the tasks of lm-evaluation-harness."""
