"""A finished run and new batches -> the next version of the run, with the new cells after its own."""
