"""Caches, sparse attention, token skipping, pruning: the same model with less work."""
