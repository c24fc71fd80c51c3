"""Systems beyond the denoiser that is trained by an objective: a leaf each, imported by the command line alone."""
