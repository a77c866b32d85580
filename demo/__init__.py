"""Miniature corpora to try the pipeline on: `python -m demo`."""
