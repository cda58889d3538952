"""One arm of the claim on tokenizers, small: autoencoders are kept, and every rung is another training."""

import math
from itertools import pairwise

import pytest
import torch

from smalti.core.protocols import Cond
from smalti.recipes.vae_arm import LOSSES, Rung, TaughtPictures, VAEArm, shelf
from smalti.systems.va_vae_lightningdit import ARMS, LADDER


class Flat:
    """Pictures of one colour each."""

    def __len__(self):
        return 6

    def pixels(self, indices):
        return torch.tensor(list(indices), dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 64) / 6


def test_features_belong_to_their_pictures():
    table = torch.arange(6.0).reshape(6, 1, 1)
    batch = TaughtPictures(Flat(), {"teacher": table}).batch(torch.tensor([4, 1]), [])
    assert (batch.x0[:, 0, 0, 0] * 6).tolist() == [4, 1]
    assert batch.cond.extra["teacher"].flatten().tolist() == [4, 1]


def test_the_ladder_goes_from_a_plain_dit_one_part_at_a_time():
    rungs = list(LADDER.values())
    assert rungs[0] == Rung((), logit_normal=False, cosine=0.0)
    assert rungs[-1] == Rung()
    for one, other in pairwise(rungs):
        changed = [
            set(one.flags) != set(other.flags), one.logit_normal != other.logit_normal, one.cosine != other.cosine
        ]  # fmt: skip
        assert sum(changed) == 1
        assert len(set(other.flags) - set(one.flags)) <= 1
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), Cond(pooled=torch.randn(2, 384), label=torch.tensor([0, 4]))
    sizes = {}
    for name, rung in LADDER.items():
        model = rung.model(4)
        assert model(x, t, cond).shape == x.shape
        sizes[name] = sum(one.numel() for one in model.parameters())
    assert max(sizes.values()) < 1.05 * min(sizes.values())  # no rung wins by size


def test_arms_differ_in_channels_and_teacher_alone():
    assert ARMS["many channels"].channels == ARMS["aligned"].channels == ARMS["random teacher"].channels
    assert ARMS["few channels"].channels < ARMS["many channels"].channels
    assert LOSSES.perceptual == LOSSES.critic == 0


def test_a_shelf_is_named_by_what_the_claim_rests_on(tmp_path):
    assert shelf(tmp_path, "va-vae-lightningdit") != shelf(tmp_path, "repa")


@pytest.mark.slow
def test_an_autoencoder_is_trained_once_and_a_denoiser_learns_on_it(tmp_path, monkeypatch):
    from smalti.recipes import vae_arm

    arm = VAEArm(8, "random")
    model = vae_arm.autoencoder("one", arm, 30, tmp_path)
    monkeypatch.setattr(vae_arm, "_train", None)  # a second call must not train
    again = vae_arm.autoencoder("one", arm, 30, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert all(math.isfinite(one) for one in vae_arm.judge(again, 64).values())
    trained = vae_arm.train_on(again, Rung(), 4, 0)
    assert math.isfinite(trained.distance(count=32, steps=2, guidance=1.0))
