"""Bugs to plant in the source files: a table for each part of the repository.

Each row: the bug, its file, words that stand there once, the words in their place, and the test of `make test` that has
to fail.
"""

Row = tuple[str, str, str, str, str]
