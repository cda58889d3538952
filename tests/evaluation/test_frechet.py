import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.frechet import frechet_distance, frechet_floor


def exact(features, mean, covariance):
    """Features moved and stretched so that their sample moments are exactly these."""
    centred = features.double() - features.double().mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T.cov()).mT)
    return whitened @ torch.linalg.cholesky(covariance).mT + mean


@pytest.mark.parametrize("shape", [(50, 7), (6, 40), (33, 33)])
def test_equal_sets_have_no_distance(shape):
    features = torch.randn(shape) * 5 + 3
    assert frechet_distance(features, features) < 1e-9
    assert frechet_distance(features, features.flip(0)) < 1e-9


def test_gaussian_closed_form():
    generator = torch.Generator().manual_seed(1)
    roots = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.1 * torch.eye(6)
    means = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    sets = [exact(torch.randn(64, 6, generator=generator), m, c) for m, c in zip(means, covariances)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ values.sqrt().diag() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + covariances.diagonal(dim1=1, dim2=2).sum() - 2 * cross
    assert frechet_distance(*sets) == pytest.approx(float(expected), rel=1e-9)


def test_a_shift_costs_its_square():
    features = torch.randn(40, 9)
    assert frechet_distance(features, features + 2.0) == pytest.approx(9 * 4.0, rel=1e-5)


def test_symmetric_and_above_the_floor():
    features = torch.randn(80, 9)
    other = torch.randn(80, 9) * 1.5 + 1
    assert frechet_distance(features, other) == pytest.approx(frechet_distance(other, features))
    assert 0 < frechet_floor(features) < frechet_distance(features, other)
    assert frechet_floor(features, seed=1) == frechet_floor(features, seed=1)


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 3), "equal counts"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "equal counts"),
        (torch.zeros(1, 3), torch.zeros(1, 3), "at least 2"),
        (torch.full((4, 3), torch.nan), torch.zeros(4, 3), "not finite"),
    ],
)
def test_refuses(features, reference, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(features, reference)
