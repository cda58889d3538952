"""Uniformity of latents: even points give even figures, clusters do not, and t-SNE keeps neighbours."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.uniformity import density_figures, latent_uniformity, tsne


def test_clusters_are_less_even_than_a_square():
    even = density_figures(torch.rand(2000, 2))
    rows = torch.randint(5, (2000,))
    uneven = density_figures(torch.randn(5, 2)[rows] * 5 + 0.05 * torch.randn(2000, 2))
    assert even["density variation"] < uneven["density variation"]
    assert even["density Gini"] < uneven["density Gini"]
    assert even["density entropy"] > uneven["density entropy"]
    assert even["density entropy"] > 0.95
    assert 0 <= even["density Gini"] < 0.25


def test_figures_depend_on_no_scale():
    points = torch.randn(300, 2)
    stretched = points * torch.tensor([10.0, 0.1]) + 4
    for name, value in density_figures(points).items():
        assert density_figures(stretched)[name] == pytest.approx(value, rel=1e-6)


def test_tsne_keeps_clusters_together():
    rows = torch.arange(150) % 3
    points = 4 * torch.randn(3, 10)[rows] + 0.5 * torch.randn(150, 10)
    laid = tsne(points, perplexity=15)
    distances = torch.cdist(laid, laid).fill_diagonal_(torch.inf)
    nearest = distances.argmin(1)
    assert float((rows[nearest] == rows).double().mean()) > 0.95
    assert torch.equal(laid, tsne(points, perplexity=15))
    inside = distances[rows[:, None] == rows]
    assert float(inside[inside.isfinite()].mean()) < 0.5 * float(distances[rows[:, None] != rows].mean())


def test_latents_are_read_at_one_place_a_picture():
    even, uneven = torch.rand(200, 2, 4, 4), torch.rand(200, 2, 4, 4).round() + 0.01 * torch.randn(200, 2, 4, 4)
    figures = [latent_uniformity(one) for one in (even, uneven)]
    assert figures[0]["density variation"] < figures[1]["density variation"]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="over three times"):
        tsne(torch.randn(20, 3), perplexity=10)
    with pytest.raises(UserError, match="at least 10"):
        density_figures(torch.randn(5, 2))
