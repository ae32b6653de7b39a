"""Pairs on disk, which pairs make a batch, and the packed batch."""
