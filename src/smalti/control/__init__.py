"""What steers a diffusion transformer that is already trained."""
