"""New batches onto a finished run, without training: projection, correction, neighbours, diffusion, model."""
