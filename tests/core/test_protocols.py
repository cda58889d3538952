"""Bundles move, index and stack whole, also those that lie in one another."""

import torch

from smalti.core.protocols import Batch, Cond


def batch(count=4):
    cond = Cond(text=torch.randn(count, 3, 2), label=torch.arange(count), extra={"teacher": torch.randn(count, 5)})
    return Batch(torch.randn(count, 1, 2, 2), cond, torch.arange(count))


def test_a_bundle_inside_a_bundle_goes_along():
    whole = batch()
    part = whole[1:3]
    assert (len(part.x0), len(part.cond.text), len(part.cond.extra["teacher"])) == (2, 2, 2)
    assert torch.equal(Batch.cat([whole[:1], whole[1:]]).cond.extra["teacher"], whole.cond.extra["teacher"])
    moved = whole.to("meta")
    assert all(one.device.type == "meta" for one in (moved.x0, moved.ids, moved.cond.text, moved.cond.extra["teacher"]))
    assert whole.to(torch.float64).cond.text.dtype == torch.float64
    assert whole.to(torch.float64).cond.label.dtype == torch.long
