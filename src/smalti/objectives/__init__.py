"""What is learned: losses of denoisers and other models."""
