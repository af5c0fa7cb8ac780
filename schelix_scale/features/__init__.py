"""Cells to stream features: projection, correction, one pass."""
