"""Where a method may act on any diffusion transformer, ours or diffusers'."""
