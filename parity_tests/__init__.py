"""The proof that both implementations compute the same, and what tests the tests."""

from data.interrupt import expect_interrupts

expect_interrupts()
