"""Figures of sets: each tells sets that belong together from those that do not."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.panel_metrics import SharedReader, agreement, panel_match, set_distance, spread_within


def test_agreement_is_the_share_of_equal_pairs():
    assert agreement(torch.tensor([[0, 0], [0, 1]])).tolist() == [1.0, 0.0]
    assert agreement(torch.tensor([[2, 2, 1]])).tolist() == [pytest.approx(1 / 3)]


def test_the_reader_names_classes_of_unseen_groups():
    centres = torch.randn(3, 16)
    rows = torch.arange(300) % 3
    features = centres[rows] + 0.3 * torch.randn(300, 16)
    reader = SharedReader.fit(features, [f"c{i}" for i in rows.tolist()], torch.arange(300) // 3)
    assert reader.accuracy > 0.95
    assert reader.classes == ("c0", "c1", "c2")
    unseen = centres[torch.tensor([[0, 2], [1, 1]])] + 0.1 * torch.randn(2, 2, 16)
    assert reader(unseen).tolist() == [[0, 2], [1, 1]]
    noise = SharedReader.fit(torch.randn(300, 16), [f"c{i}" for i in rows.tolist()], torch.arange(300) // 3)
    assert noise.accuracy < 0.6
    assert torch.equal(
        reader(unseen), SharedReader.fit(features, [f"c{i}" for i in rows.tolist()], torch.arange(300) // 3)(unseen)
    )
    with pytest.raises(UserError, match="at least 2 names"):
        SharedReader.fit(features, ["a"] * 300, torch.arange(300))


def test_the_spread_is_1_for_sets_that_mean_nothing():
    assert spread_within(torch.randn(60, 2, 8)) == pytest.approx(1, abs=0.1)
    together = torch.randn(60, 1, 8) + 0.1 * torch.randn(60, 2, 8)
    assert spread_within(together) < 0.05
    with pytest.raises(UserError, match="at least 2"):
        spread_within(torch.randn(1, 2, 8))
    with pytest.raises(UserError, match="at least 2 panels"):
        spread_within(torch.randn(4, 1, 8))


class Alike:
    """A judge whose score is the dot product."""

    def rank(self, features, candidates):
        scores = torch.einsum("nd,nkd->nk", features, candidates)
        return (scores[:, 1:] >= scores[:, :1]).sum(1)


def test_a_panel_must_fit_its_own_caption_best():
    text = torch.eye(4)[:2].expand(3, 2, 4)
    right, swapped = text.clone(), text.flip(1)
    assert panel_match(Alike(), right, text).all()
    assert not panel_match(Alike(), swapped, text).any()
    both = text.sum(1, keepdim=True).expand(3, 2, 4)  # a model that draws both captions everywhere fits neither
    assert not panel_match(Alike(), both, text).any()


def test_the_set_distance_sees_what_single_panels_do_not():
    styles = torch.randn(200, 1, 4)
    real = styles + 0.1 * torch.randn(200, 2, 4)
    again = torch.randn(200, 1, 4) + 0.1 * torch.randn(200, 2, 4)
    apart = torch.randn(200, 2, 4)  # every panel alone is as the real ones
    assert set_distance(again, real) < 0.2 * set_distance(apart, real)
