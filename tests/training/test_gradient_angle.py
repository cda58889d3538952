"""The angle between two losses' gradients."""

import pytest
import torch

from smalti.training.gradient_angle import gradient_cosine


def test_it_is_the_cosine_over_all_parameters_together_and_leaves_the_graph():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    one, other = (a * torch.tensor([1.0, 0.0])).sum() + 2 * b.sum(), (a * torch.tensor([0.0, 4.0])).sum() - b.sum()
    x, y = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 4.0, -1.0])
    assert gradient_cosine(one, other, [a, b]).item() == pytest.approx(float(x @ y / (x.norm() * y.norm())))
    (one + other).backward()
    assert a.grad is not None


def test_a_parameter_that_a_loss_does_not_reach_counts_as_zero():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    frozen = torch.ones(1)
    assert gradient_cosine(a.sum(), a.sum() + b.sum(), [a, b, frozen]).item() == pytest.approx(2 / 8**0.5)
    assert gradient_cosine(a.sum(), b.sum(), [a, b]).item() == 0
