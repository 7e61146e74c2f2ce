"""A training run, whichever implementation computes it: options, start, loop, its folder, and the report of it."""
