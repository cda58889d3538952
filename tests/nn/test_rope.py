"""Rotary factors: equal to an independent implementation, relative, and fast path equal to the formula."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from smalti.nn.norm import RMSNorm
from smalti.nn.rope import _turn_plainly, apply_rope, grid_labels, grid_rope, norm_rope, rope_factors

AXES = (4, 6, 2)


def test_equals_diffusers():
    labels = grid_labels(3, 5, 2)
    x = torch.randn(2, 13, 4, 12)
    expected = apply_rotary_emb(x, FluxPosEmbed(10000, list(AXES))(labels), sequence_dim=1)
    got = apply_rope(x, rope_factors(labels, AXES)[:, None])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_grid_labels():
    labels = grid_labels(2, 2, 3)
    assert labels[:2].abs().max() == 0
    assert labels[2:].tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def test_scores_depend_on_differences_of_any_real_labels():
    q, k = torch.randn(1, 12), torch.randn(1, 12)
    here, there, shift = torch.rand(1, 3) * 9, -torch.rand(1, 3), torch.tensor([[1.5, -20.25, 0.125]])

    def score(a, b):
        return (apply_rope(q, rope_factors(a, AXES)) * apply_rope(k, rope_factors(b, AXES))).sum()

    torch.testing.assert_close(score(here, there), score(here + shift, there + shift), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(here, there), score(here + shift, there))


def test_fast_path_equals_the_formula_with_gradients():
    rope = rope_factors(grid_labels(1, 2, 3), AXES)
    x = torch.randn(2, 3, 7, 12, requires_grad=True)
    fast, plain = apply_rope(x, rope), _turn_plainly(x.unflatten(-1, (-1, 2)), rope).flatten(-2)
    torch.testing.assert_close(fast, plain)
    weights = torch.randn_like(fast)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (fast, plain)]
    torch.testing.assert_close(*gradients)


def test_norm_rope_is_norm_then_rope():
    norm = RMSNorm(12, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    rope = rope_factors(grid_labels(1, 2, 3), AXES)
    x = torch.randn(2, 3, 7, 12)
    torch.testing.assert_close(norm_rope(x, norm.weight, rope, 1e-3), apply_rope(norm(x), rope))
    assert norm_rope(x.bfloat16(), norm.weight, rope, 1e-3).dtype == torch.bfloat16


def test_factors_of_a_grid_are_remembered():
    first = grid_rope(2, 3, 5, AXES, torch.device("cpu"))
    assert grid_rope(2, 3, 5, AXES, torch.device("cpu")) is first
    assert torch.equal(first, rope_factors(grid_labels(2, 3, 5), AXES))


def test_refuses_unfit_axes():
    with pytest.raises(ValueError, match="3 axes"):
        rope_factors(torch.zeros(2, 3), (4, 4))
    with pytest.raises(ValueError, match="even"):
        rope_factors(torch.zeros(2, 1), (3,))


def test_a_larger_base_slows_all_angles_but_the_first():
    """NTK scaling: the fastest pair of an axis keeps its wavelength, the slowest is stretched by nearly the factor."""
    plain, slow = (grid_rope(0, 1, 8, (2, 2, 8), torch.device("cpu"), theta=theta) for theta in (1e4, 1e5))
    angle = [torch.atan2(one[1, 2:, 1], one[1, 2:, 0]) for one in (plain, slow)]  # of the column at place 1
    ratio = angle[0] / angle[1]
    torch.testing.assert_close(ratio, 10 ** (torch.arange(0, 8, 2) / 8), rtol=1e-4, atol=0)
