"""Complete trainings, each a module with `PRESETS` and `train`."""
