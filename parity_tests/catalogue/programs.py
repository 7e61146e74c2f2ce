"""Bugs in generate, compare, report and bench."""

from parity_tests.catalogue import Row

PLANTED: list[Row] = []
