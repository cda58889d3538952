import math

import pytest
import torch


class Gaussian:
    """Exact velocity of data N(mean, deviation^2): marginals are N((1 - t) mean, (1 - t)^2 deviation^2 + t^2)."""

    mean, deviation = 2.0, 0.5

    def spread(self, t):
        return math.sqrt((1 - t) ** 2 * self.deviation**2 + t**2)

    def __call__(self, x, t):
        slope = (t - (1 - t) * self.deviation**2) / self.spread(t) ** 2
        return slope * (x - (1 - t) * self.mean) - self.mean

    def solution(self, x, t, s):
        """Where the ODE takes x from t to s."""
        return (1 - s) * self.mean + (x - (1 - t) * self.mean) * self.spread(s) / self.spread(t)


@pytest.fixture
def gaussian():
    return Gaussian()


@pytest.fixture
def start():
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
