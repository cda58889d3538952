"""Small random models with a plain loop around each, and methods that show what a seam offers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import nn

from smalti.backbones.mmdit import MMDiT
from smalti.core.method import BlockMethod, CoreMethod, StepMethod, SublayerMethod
from smalti.core.protocols import Cond


@dataclass
class Small:
    """A model, a random sample for it, and its call as `velocity(x, t, text)`."""

    model: nn.Module
    sample: torch.Tensor
    call: Callable[..., torch.Tensor]
    texts: tuple[torch.Tensor, ...]

    @torch.no_grad()
    def loop(self, steps: int = 9, x: torch.Tensor | None = None, texts=None, guidance: float = 3.0) -> torch.Tensor:
        """Euler from noise to data; two texts are two branches, called one after the other."""
        x = self.sample if x is None else x
        texts = self.texts[:1] if texts is None else texts
        times = torch.linspace(1, 0, steps + 1).tolist()
        for t, s in pairwise(times):
            velocities = [self.call(x, t, text) for text in texts]
            velocity = velocities[-1]
            if len(velocities) == 2:
                velocity = velocities[1] + guidance * (velocities[0] - velocities[1])
            x = x + (s - t) * velocity
        return x

    @torch.no_grad()
    def heun(self, steps: int = 9) -> torch.Tensor:
        """Heun's method: two evaluations in each step but the last."""
        x, times = self.sample, torch.linspace(1, 0, steps + 1).tolist()
        for t, s in pairwise(times):
            first = self.call(x, t, self.texts[0])
            guess = x + (s - t) * first
            x = x + (s - t) * (first + self.call(guess, s, self.texts[0])) / 2 if s > 0 else guess
        return x


def fill(model: nn.Module) -> nn.Module:
    """Every weight random: gates and outputs that start at zero would hide everything."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def flux(grid: tuple[int, int] = (4, 6)) -> Small:
    model = fill(
        FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    rows, columns = grid
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1], ids[:, 2] = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    pooled = torch.randn(1, 8)

    def call(x, t, text):
        return model(
            hidden_states=x, timestep=torch.full((len(x),), t), encoder_hidden_states=text.expand(len(x), -1, -1),
            pooled_projections=pooled.expand(len(x), -1), txt_ids=torch.zeros(5, 3), img_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    return Small(model, torch.randn(1, rows * columns, 4), call, (torch.randn(1, 5, 12), torch.randn(1, 5, 12)))


def wan() -> Small:
    model = fill(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=12, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        )
    )  # fmt: skip

    def call(x, t, text):
        time = torch.full((len(x),), 1000 * t)
        return model(hidden_states=x, timestep=time, encoder_hidden_states=text.expand(len(x), -1, -1)).sample

    return Small(model, torch.randn(1, 4, 3, 8, 12), call, (torch.randn(1, 5, 12), torch.randn(1, 5, 12)))


def ours() -> Small:
    model = fill(MMDiT.tiny())

    def call(x, t, text):
        return model(x, torch.full((len(x),), t), Cond(text=text, pooled=pooled))

    pooled = torch.randn(1, 10)
    return Small(model, torch.randn(1, 4, 8, 12), call, (torch.randn(1, 5, 12), torch.randn(1, 5, 12)))


SMALL = {"flux": flux, "wan": wan, "ours": ours}


@dataclass(frozen=True)
class Toy:
    """What all toys share: a list of what they saw, and whether they do something."""

    acts: bool = True
    seen: list[Any] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def neutral(cls):
        return cls(acts=False)

    @classmethod
    def active(cls):
        return cls()

    @property
    def is_neutral(self):
        return not self.acts


@dataclass(frozen=True)
class WatchSteps(Toy, StepMethod):
    """Sees every call's place in the run."""

    def at_step(self, state, call):
        self.seen.append(call.moment)
        call.note("seen")
        return call.run()


@dataclass(frozen=True)
class WatchCores(Toy, CoreMethod):
    """Sees every attention, changes nothing."""

    def at_core(self, state, call):
        self.seen.append(call)
        call.note("seen")
        return call.attend(call.q, call.k, call.v, call.mask)


@dataclass(frozen=True)
class MeanValues(Toy, CoreMethod):
    """Every image query gets the mean of all values."""

    def at_core(self, state, call):
        out = call.attend(call.q, call.k, call.v, call.mask)
        if not self.acts:
            return out
        call.note("mean")
        out = out.clone()
        out[:, :, call.layout.span("image")] = call.v.mean(2, keepdim=True)
        return out


@dataclass(frozen=True)
class SkipBlock(Toy, BlockMethod):
    """Skips the second block of every stack."""

    def at_block(self, state, call):
        self.seen.append((str(call.site), {kind: tuple(one.shape) for kind, one in call.streams.items()}))
        if self.acts and call.site.index == 1:
            call.note("skipped")
            return call.streams
        return call.run(call.streams)


@dataclass(frozen=True)
class ReuseOdd(Toy, StepMethod, SublayerMethod):
    """Every other evaluation reuses all sublayers of the one before."""

    owns = frozenset({"sublayer outputs"})
    work = "less"

    def init(self):
        return {}

    def at_step(self, state, call):
        state["skip"] = self.acts and call.moment.evaluation % 2 == 1
        return call.run()

    def skips(self, state, call):
        return state["skip"]

    def forecast(self, state, call):
        call.note("reused")
        return tuple(None if one is None else one.clone() for one in state[call.site])

    def observe(self, state, call, outputs):
        state[call.site] = outputs
        return outputs
