"""The small trained models that ship with the package, and their loader."""
