"""Denoisers assembled from layers, found by listing this folder."""
