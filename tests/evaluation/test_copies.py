import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.copies import copy_report, nearest


def test_copies_are_counted_and_located():
    train = torch.randn(300, 16)
    samples = torch.cat([train[[5, 9, 200]] + 1e-3, torch.randn(3, 16)])
    report = copy_report(samples, train)
    assert report.share == 0.5
    assert report.nearest[:3] == (5, 9, 200)
    assert 0 < report.threshold < report.median_between_train < report.median_train_pair


def test_fresh_samples_are_no_copies():
    train = torch.randn(300, 16)
    fresh = copy_report(torch.randn(300, 16), train)
    assert fresh.share < 0.05
    assert copy_report(train + 1e-3 * torch.randn(300, 16), train).is_memorised
    assert not copy_report(torch.randn(300, 16) * 1.5, train).is_memorised


def test_nearest_equals_the_plain_search_across_chunks(monkeypatch):
    monkeypatch.setattr("smalti.evaluation.copies.CHUNK", 7)
    train = torch.randn(30, 4)
    distance, index = nearest(train, train, (torch.arange(30), torch.arange(30)))
    table = (train[:, None] - train).norm(dim=-1) + torch.eye(30) * 1e9
    assert torch.allclose(distance, table.min(1).values.double(), atol=1e-5)
    assert torch.equal(index, table.argmin(1))


def test_pictures_of_one_concept_are_no_neighbours():
    train = torch.randn(100, 8).repeat(2, 1)
    samples = train[:10] + 1e-3
    assert copy_report(samples, train).share == 0
    report = copy_report(samples, train, torch.arange(100).repeat(2))
    assert report.share == 1
    assert report.threshold > 0.1


@pytest.mark.parametrize(("samples", "train"), [((0, 4), (5, 4)), ((3, 4), (1, 4)), ((3, 4), (5, 3))])
def test_refuses(samples, train):
    with pytest.raises(UserError, match="at least 1 sample"):
        copy_report(torch.zeros(samples), torch.zeros(train))
