"""What the two implementations share, in three rooms:

    text/         from text to batches of tokens and back: sources, tokenizer, shards, loader, sampling
    checkpoints/  the model's sizes and weights as files: configuration, Hugging Face's format, initialisation
    runs/         a training run: options, start, loop, the folder it leaves, and the report of it

Nothing here imports torch or tinygrad: every array that leaves this package is numpy's.
"""

from data.interrupt import expect_interrupts

expect_interrupts()
