"""Features to operators: neighbours, diffusion, audit, cache."""
