"""The tokenizer's players: who gets which gradient, adaptive weights, delayed start, normalised latents."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.evaluation.vgg import VGG16
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.rae import RAE
from smalti.tokenizers.vision_backends import load_teacher
from smalti.training.config import TrainConfig
from smalti.training.feature_critic import FeatureCritic
from smalti.training.progress import read_log
from smalti.training.stopping import StopAt
from smalti.training.tokenizer import (
    AUGMENTATION,
    LatentTerm,
    Players,
    PlayersOutput,
    TokenizerObjective,
    TokenizerSettings,
    balance,
    fit_tokenizer,
    last_convolution,
)

SMALL = TokenizerSettings(perceptual=0.0, kl=1e-3, critic=0.5, critic_from=2, critic_width=8, critic_halvings=1)


class Discs:
    """Pictures of 16 pixels with a disc of some colour."""

    def __init__(self, count=24):
        rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        disc = ((rows - 8) ** 2 + (columns - 8) ** 2 < 25).float()
        colours = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        self.table = colours * disc * 2 - 1

    def __len__(self):
        return len(self.table)

    def pixels(self, indices):
        return self.table[list(indices)]


class Pull(LatentTerm):
    """Draws latents to 1."""

    name = "pull"

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.ones(()))

    @property
    def settings(self):
        return {"to": 1}

    @property
    def weight(self):
        return 0.5

    def forward(self, latents, cond):
        return (latents - self.place).square().mean()


def autoencoder():
    torch.manual_seed(0)
    return ConvAutoencoder(4, 4, (8, 8), (1, 1), (1, 1))


def players(**changes):
    terms = changes.pop("terms", ())
    return Players(autoencoder(), replace(SMALL, **changes), terms)


def gradients(model, step):
    model.zero_grad()
    pixels, noise = Discs(6).table, torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    out = model(pixels, noise, Cond(), step)
    out.loss.backward()
    return out, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_before_its_step_the_critic_changes_nothing():
    early, got = gradients(players(), 1)
    plain, expected = gradients(players(critic=0.0), 1)
    assert torch.equal(early.loss, plain.loss)
    assert all(torch.equal(got[name], one) for name, one in expected.items())
    assert all(not one.any() for name, one in got.items() if name.startswith("critic"))
    assert "critic" not in early.metrics


def test_from_its_step_on_each_player_gets_its_own_gradient():
    model = players()
    with torch.no_grad():
        last_convolution(model.autoencoder.decoder).weight.normal_(0, 0.1)  # at zero nothing reaches the layers before
    out, got = gradients(model, 2)
    pixels, noise = Discs(6).table, torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    made = model.autoencoder(pixels, noise).pixels.detach()
    own = 0.5 * ((1 - model.critic(pixels)).relu().mean() + (1 + model.critic(made)).relu().mean())
    for (name, parameter), expected in zip(
        model.critic.named_parameters(), torch.autograd.grad(own, list(model.critic.parameters())), strict=True
    ):
        torch.testing.assert_close(got[f"critic.{name}"], expected, msg=name)
        assert parameter.requires_grad
    torch.testing.assert_close(out.metrics["critic"], own.detach())
    _, without = gradients(replace_critic(model, 0.0), 2)
    assert not torch.allclose(got["autoencoder.decoder.0.weight"], without["autoencoder.decoder.0.weight"])


def replace_critic(model, weight):
    model.chosen = replace(model.chosen, critic=weight)
    return model


def test_the_adversarial_gradient_is_as_large_as_the_others_times_its_weight():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 1)
    x = torch.randn(2, 3, 4, 4)
    one, other = layer(x).square().mean(), 100 * layer(x).mean()
    weight = balance(one, other, layer, 1e4)
    first, second = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (one, other))
    torch.testing.assert_close(weight * second, first, rtol=1e-3, atol=1e-6)
    assert not weight.requires_grad
    assert balance(one, 1e-12 * other, layer, 50.0) == 50.0


def test_terms_are_weighed_at_the_encoder_and_train_their_own_weights():
    model = players(terms=[Pull()], critic=0.0)
    out, got = gradients(model, 0)
    assert got["terms.0.place"].abs() > 0
    pixels, noise = Discs(6).table, torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    made = model.autoencoder(pixels, noise)
    nll = (made.pixels - pixels).abs().mean()
    latents = made.mean + (0.5 * made.logvar).exp() * noise
    term = model.terms[0](latents, Cond())
    expected = balance(nll, term, last_convolution(model.autoencoder.encoder), 1e8)
    torch.testing.assert_close(out.metrics["pull, weight"], expected)


def test_a_training_sharpens_resumes_and_leaves_normalised_latents(tmp_path):
    config = TrainConfig(steps=6, batch=8, learning_rate=2e-3, ema=0.5, log_every=1, save_every=3)
    shared = {"settings": replace(SMALL, perceptual=0.1), "network": VGG16()}
    model, pictures = autoencoder(), Discs()
    report = fit_tokenizer(model, pictures, config, tmp_path / "one", terms=[Pull()], **shared)
    rows = read_log(report.curve)
    assert ["critic" in row for row in rows] == [False, False, True, True, True, True]
    assert {"psnr", "kl", "vgg distance", "pull", "critic, weight"} <= rows[-1].keys()
    latents = model.encode(pictures.pixels(range(24))).tensor
    assert abs(latents.mean()) < 0.1
    assert latents.std() == pytest.approx(1.0, abs=0.15)
    assert not any("critic" in name or "terms" in name for name in model.state_dict())
    again = autoencoder()
    fit_tokenizer(again, pictures, replace(config, minutes=1e-9), tmp_path / "two", terms=[Pull()], **shared)
    fit_tokenizer(again, pictures, config, tmp_path / "two", terms=[Pull()], resume=True, **shared)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_a_term_ends_by_a_rule(tmp_path):
    config, rule = TrainConfig(steps=6, batch=8, ema=0.5, log_every=1), StopAt(("pull",), 4)
    fit_tokenizer(autoencoder(), Discs(), config, tmp_path, SMALL, terms=[Pull()], stops=[rule])
    assert ["pull" in line for line in read_log(tmp_path / "log.jsonl")] == [True] * 4 + [False] * 2


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="kl is -1"):
        TokenizerSettings(kl=-1)
    with pytest.raises(UserError, match="multiple of 8"):
        TokenizerSettings(critic_width=4)
    with pytest.raises(UserError, match="no convolution"):
        last_convolution(nn.Linear(2, 2))


def test_a_critic_may_learn_before_it_counts():
    model = players(critic_learns_from=1, critic_from=3)
    out, got = gradients(model, 1)
    _, expected = gradients(players(critic=0.0), 1)
    assert out.metrics["critic"] > 0
    assert "critic, weight" not in out.metrics
    assert any(one.any() for name, one in got.items() if name.startswith("critic"))
    assert all(torch.equal(got[name], one) for name, one in expected.items())
    assert all(not one.any() for name, one in gradients(model, 0)[1].items() if name.startswith("critic"))


def test_a_critic_may_learn_from_the_first_step():
    _, got = gradients(players(critic_learns_from=0, critic_from=3), 0)
    assert any(one.any() for name, one in got.items() if name.startswith("critic"))


def test_a_critic_of_ones_own_takes_the_place_of_the_patch_critic():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1))
    model = Players(autoencoder(), SMALL, critic=critic)
    _, got = gradients(model, 2)
    assert model.critic is critic
    assert got["critic.1.weight"].any()


def objective_noise(**changes):
    """What the autoencoder is given as noise, and the conditions, for two orders of the same samples."""
    seen = []

    def watch(pixels, noise, cond, step):
        seen.append((noise, cond))
        return PlayersOutput(noise.sum(), {})

    objective = TokenizerObjective(replace(SMALL, **changes), 4, 4, {})
    batch = Batch(Discs(6).table, Cond(), torch.arange(6))
    objective.loss(watch, batch, TrainState(), generators_for(range(6)))
    objective.loss(watch, batch[torch.tensor([5])], TrainState(), generators_for([5]))
    return seen


def test_tau_draws_the_noise_of_each_sample_at_a_level_of_its_own():
    (noise, _), (alone, _) = objective_noise(tau=0.8)
    assert torch.equal(noise[5:], alone)
    (plain, _), _ = objective_noise()
    levels = (noise / plain).flatten(1)
    assert levels.std(1).max() < 1e-5
    assert len(set(levels.mean(1).tolist())) == 6
    assert levels.min() > 0
    assert levels.max() < 0.8
    assert not objective_noise(tau=0.0)[0][0].any()


def test_augmentation_is_drawn_for_each_sample_and_reaches_the_critic_alone():
    (_, cond), (_, alone) = objective_noise(is_augmented=True)
    assert cond.extra[AUGMENTATION].shape == (6, 7)
    assert torch.equal(cond.extra[AUGMENTATION][5:], alone.extra[AUGMENTATION])
    assert not objective_noise()[0][1].extra
    model, pixels, noise = players(), Discs(6).table, torch.zeros(6, 4, 4, 4)
    plain = model(pixels, noise, Cond(), 2)
    seen = model(pixels, noise, Cond(extra={AUGMENTATION: torch.rand(6, 7)}), 2)
    assert seen.metrics["psnr"] == plain.metrics["psnr"]
    assert seen.metrics["critic"] != plain.metrics["critic"]


def test_a_representation_autoencoder_is_trained_by_the_same_trainer(tmp_path):
    torch.manual_seed(0)
    model = RAE("random", depth=1, width=16, heads=2, factor=8)
    pictures = Discs()
    pictures.table = nn.functional.interpolate(pictures.table, scale_factor=4)
    settings = replace(SMALL, tau=0.8, is_augmented=True, kl=0.0, learned_deviation=False)
    critic = FeatureCritic(load_teacher("random", (8, 8)), depths=(2,))
    before = {name: one.clone() for name, one in model.encoder.state_dict().items()}
    config = TrainConfig(steps=4, batch=4, learning_rate=2e-3, ema=0.5, log_every=1, save_every=2)
    fit_tokenizer(model, pictures, config, tmp_path / "one", settings, critic=critic)
    assert all(torch.equal(before[name], one) for name, one in model.encoder.state_dict().items())
    assert abs(model.encode(pictures.pixels(range(24))).tensor.mean()) < 0.05
    rows = read_log(tmp_path / "one" / "log.jsonl")
    assert rows[-1]["critic, weight"] > 0
    torch.manual_seed(0)
    again = RAE("random", depth=1, width=16, heads=2, factor=8)
    critic = FeatureCritic(load_teacher("random", (8, 8)), depths=(2,))
    fit_tokenizer(again, pictures, replace(config, minutes=1e-9), tmp_path / "two", settings, critic=critic)
    torch.manual_seed(0)
    again = RAE("random", depth=1, width=16, heads=2, factor=8)
    critic = FeatureCritic(load_teacher("random", (8, 8)), depths=(2,))
    fit_tokenizer(again, pictures, config, tmp_path / "two", settings, critic=critic, resume=True)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
