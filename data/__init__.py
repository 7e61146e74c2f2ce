"""What the two implementations share: tokenizer, text sources, token shards, loader, configuration, checkpoints.

Nothing here imports torch or tinygrad: every array that leaves this package is numpy's.
"""
