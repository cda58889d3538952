"""Tensor operations: pure functions, each fast path with a plain reference beside it."""
