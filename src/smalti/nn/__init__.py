"""Layers: norms, positions, embeddings, modulation, feed-forward, patches, joint blocks."""
