"""Probes find what is there and nothing else; CKNNA is one for the same features and small for strangers."""

import pytest
import torch
from torch import nn

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond
from smalti.evaluation.probe import cknna, hidden_states, linear_probe


def clusters(seed, count=120, width=8):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 3
    centers = torch.randn(3, width, generator=torch.Generator().manual_seed(9)) * 3
    return centers[classes] + torch.randn(count, width, generator=generator), classes


def test_the_probe_reads_classes_off_and_chance_off_noise():
    features, classes = clusters(0)
    unseen, unseen_classes = clusters(1)
    assert linear_probe(features, classes, torch.arange(120), unseen, unseen_classes) > 0.95
    noise = torch.randn(240, 8, generator=torch.Generator().manual_seed(2))
    assert linear_probe(noise[:120], classes, torch.arange(120), noise[120:], unseen_classes) < 0.55


def test_the_probe_does_not_depend_on_scale_and_shift():
    features, classes = clusters(0)
    unseen, unseen_classes = clusters(1)
    plain = linear_probe(features, classes, torch.arange(120), unseen, unseen_classes)
    assert linear_probe(features * 100 + 7, classes, torch.arange(120), unseen * 100 + 7, unseen_classes) == plain


def test_the_penalty_is_chosen_on_groups_that_were_not_fitted():
    """Near duplicates on both sides would let the weakest penalty win by remembering."""
    generator = torch.Generator().manual_seed(3)

    def draw(classes, copies):
        """A weak hint of the class, much that tells a group from the others and nothing else, and little noise."""
        hint = nn.functional.one_hot(classes, 2).float() * 2 + torch.randn(len(classes), 2, generator=generator)
        private = torch.randn(len(classes), 80, generator=generator)
        features = torch.cat([hint, private], 1).repeat_interleave(copies, 0)
        return features + 0.1 * torch.randn(features.shape, generator=generator)

    groups = torch.arange(80).repeat_interleave(4)
    classes, unseen_classes = (torch.randint(2, (count,), generator=generator) for count in (80, 400))
    features, unseen = draw(classes, 4), draw(unseen_classes, 1)
    whole = linear_probe(features, classes[groups], groups, unseen, unseen_classes)
    apart = linear_probe(features, classes[groups], torch.arange(320), unseen, unseen_classes)
    assert whole > apart + 0.05


def test_cknna():
    features, _ = clusters(0)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    other = torch.randn(120, 16, generator=torch.Generator().manual_seed(3))
    assert cknna(features, features @ rotation) == pytest.approx(1.0)
    assert abs(cknna(features, other)) < 0.2
    assert cknna(features, features + 0.3 * torch.randn_like(features)) > cknna(features, other) + 0.2


def test_cknna_equals_a_plain_loop():
    one, other = torch.randn(12, 4).double(), torch.randn(12, 5).double()
    units = [part / part.norm(dim=1, keepdim=True) for part in (one, other)]
    kernels = [unit @ unit.T for unit in units]
    near = [
        [set(sorted((j for j in range(12) if j != i), key=lambda j: -kernel[i, j])[:3]) for i in range(12)]
        for kernel in kernels
    ]
    centred = [kernel - kernel.mean(1, keepdim=True) for kernel in kernels]

    def align(a, b):
        return sum(centred[a][i, j] * centred[b][i, j] for i in range(12) for j in near[a][i] & near[b][i])

    expected = align(0, 1) / (align(0, 0) * align(1, 1)) ** 0.5
    assert cknna(one, other, neighbours=3) == pytest.approx(float(expected))


def test_hidden_states_are_means_of_tokens_with_noise_by_id():
    torch.manual_seed(0)
    model = DiT.tiny().eval()
    torch.nn.init.normal_(model.blocks[0].modulation.linear.weight)
    cond = Cond(pooled=torch.randn(4, 10), label=torch.zeros(4, dtype=torch.long))
    batch = Batch(torch.randn(4, 4, 6, 8), cond, torch.arange(4))
    whole = hidden_states(model, [batch], 0.3, [1, 2])
    halves = hidden_states(model, [batch[:2], batch[2:]], 0.3, [1, 2])
    assert whole[1].shape == (4, 16)
    assert torch.allclose(whole[2], halves[2], atol=1e-6)
    assert not torch.allclose(whole[1], hidden_states(model, [batch], 0.9, [1])[1])


def test_bad_counts_are_refused():
    four, three = torch.zeros(4, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UserError, match="one of each a sample"):
        linear_probe(four, three, torch.arange(4), torch.zeros(1, 2), torch.zeros(1).long())
    with pytest.raises(UserError, match="2 groups"):
        linear_probe(four, torch.arange(4), torch.zeros(4), torch.zeros(1, 2), torch.zeros(1).long())
    with pytest.raises(UserError, match="more than k"):
        cknna(torch.zeros(4, 2), torch.zeros(4, 2), neighbours=4)
