"""Bugs in the proof, the gate and the certificates."""

from parity_tests.catalogue import Row

PLANTED: list[Row] = []
