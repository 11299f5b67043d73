"""Layer names in every dialect: adapter files, diffusers, and the checkpoints of FLUX and SD."""
