"""Main directions of tokens as colours, and probes over blocks and noise."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond
from smalti.evaluation.feature_map import feature_pictures, feature_sheet, main_directions, probe_map


def drawn_model():
    model = DiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(labels):
    """Latents that are bright on the left or on the right, by their label."""
    x0 = 0.1 * torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(len(labels)))
    for row, label in enumerate(labels):
        x0[row, :, :, 4 * label : 4 * label + 4] += 2
    cond = Cond(label=torch.full((len(labels),), 3), pooled=torch.zeros(len(labels), 10))
    return Batch(x0, cond, torch.arange(len(labels)))


def test_what_differs_most_is_the_first_colour():
    tokens = 0.01 * torch.randn(2, 12, 8)
    place = torch.arange(12) % 4 < 2
    tokens[:, place, 5] += 3.0
    colours = main_directions(tokens, (3, 4))
    assert colours.shape == (2, 3, 3, 4)
    assert colours.amin() == -1
    assert colours.amax() == 1
    first = colours[:, 0].flatten(1)
    assert (first[:, place].mean() - first[:, ~place].mean()).abs() > 1.8
    assert torch.allclose(main_directions(tokens @ torch.linalg.qr(torch.randn(8, 8)).Q, (3, 4))[:, 0].abs(),
                          colours[:, 0].abs(), atol=1e-3)  # fmt: skip


def test_each_block_and_time_has_a_picture_and_nothing_is_left_on_the_model():
    model = drawn_model()
    found = feature_pictures(model, batch([0, 1]), [1, 2], [0.1, 0.8], side=16)
    assert set(found) == {(1, 0.1), (1, 0.8), (2, 0.1), (2, 0.8)}
    assert all(one.shape == (2, 3, 16, 16) for one in found.values())
    assert not torch.equal(found[1, 0.1], found[1, 0.8])
    assert feature_sheet(found).size[0] > 2 * 16
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_little_noise_leaves_more_to_read():
    labels = [0, 1] * 40
    classes = torch.tensor(labels)

    def give():
        yield batch(labels)

    found = probe_map(drawn_model(), give, give, (classes, classes), torch.arange(80), [1], [0.05, 0.999])
    assert found[1, 0.05] > 0.95
    assert found[1, 0.05] >= found[1, 0.999]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="rows"):
        main_directions(torch.zeros(1, 5, 8), (2, 2))
