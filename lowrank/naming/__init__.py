"""Every spelling of a layer's name: in adapter files, diffusers, and the checkpoints of FLUX and SD."""
