"""Bugs in the data pipeline: tokenizer, text sources, shards, loader, sampling, configuration, checkpoints."""

from parity_tests.catalogue import Row

PLANTED: list[Row] = []
