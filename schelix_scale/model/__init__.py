"""The dual-stream model and its losses, in pure torch."""
