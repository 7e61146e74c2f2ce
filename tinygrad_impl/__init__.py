"""GPT-2 in tinygrad: the port of torch_ref, and the programs that train it, sample from it and compare two of it."""

from data.interrupt import expect_interrupts

expect_interrupts()
