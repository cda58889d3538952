"""The models on which ours is measured beside its peers, all classes of diffusers, so that every peer can be attached.

Flux, Wan and DiT have random weights: what they cost is real, where they end means nothing. `emoji` is the model that
ships, its weights carried over into diffusers' Flux without loss; its text mask goes in as an attention mask, and its
label as a guidance, because Flux has no place for labels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.flux_weights import mmdit_to_flux
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond
from smalti.core.seeds import generators_for, randn
from smalti.core.time import timestep_from_time
from smalti.evaluation.held_out_prompts import held_out_prompts
from smalti.evaluation.same_cost import relative_distances
from smalti.nn.embeddings import sinusoidal
from smalti.nn.patchify import patchify, unpatchify
from smalti.nn.rope import grid_labels
from smalti.sampling.conditions import expand_request, text_conditions
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import Euler
from smalti.zoo.loader import load_model

LABEL_STEP = 0.01
"""Guidance of one label more; sinusoids of larger angles would lose digits."""
SAME = 1e-4
"""Relative distance within which the carried-over model must end where the pipeline ends."""
GUIDANCE = 3.5


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Args:
        model: arguments of the class that differ from its defaults.
        grid: tokens (frames, rows, columns).
        text: text tokens.
    """

    model: Mapping[str, Any]
    grid: tuple[int, int, int]
    text: int = 0


SMALL = {
    "flux": Shape(
        {"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 64, "num_attention_heads": 4,
         "joint_attention_dim": 256, "pooled_projection_dim": 64, "axes_dims_rope": (8, 28, 28)},
        (1, 8, 8), 64,
    ),
    "wan": Shape(
        {"num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 256, "ffn_dim": 1024, "num_layers": 12},
        (1, 8, 8), 64,
    ),
    "dit": Shape({"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 12}, (1, 8, 8)),
}  # fmt: skip
LARGE = {
    "flux": Shape({}, (1, 64, 64), 512),
    "wan": Shape({}, (21, 30, 52), 512),
    "dit": Shape({}, (1, 32, 32)),
}
"""The defaults of the classes: FLUX.1-dev at 1024 px, Wan2.1 14B at 81 frames of 480p, DiT-XL/2 at 512 px."""
EMOJI = "emoji"
NAMES = (*SMALL, EMOJI)


@dataclass(frozen=True)
class Host:
    """A model with everything that a run needs.

    Args:
        name: of `NAMES`.
        model: nothing is attached to it.
        call: `(model, x (B, ...), t (B,), cond) -> velocity (B, ...)`.
        noise: where a run begins (B, ...).
        cond: conditioning.
        uncond: of the unconditional branch.
        guidance: of both branches.
        is_trained: whether distances mean anything.
        timed: samples of the batch that are timed.
    """

    name: str
    model: nn.Module
    call: Callable[[Callable[..., Any], Tensor, Tensor, Cond], Tensor]
    noise: Tensor
    cond: Cond
    uncond: Cond | None = None
    guidance: Guidance | None = None
    is_trained: bool = False
    timed: int = 1

    @torch.no_grad()
    def draw(self, model: Callable[..., Any], steps: int) -> Tensor:
        """The final latents (B, ...) of so many Euler steps."""
        dtype = next(self.model.parameters()).dtype
        return sample(
            lambda x, t, cond: self.call(model, x.to(dtype), t, cond).to(x.dtype), self.noise,
            uniform_schedule(steps), Euler(), cond=self.cond, uncond=self.uncond, guidance=self.guidance,
            progress=False,
        ).x  # fmt: skip

    def first(self, count: int) -> "Host":
        """The same with the first samples alone."""
        uncond = None if self.uncond is None else self.uncond[:count]
        return replace(self, noise=self.noise[:count], cond=self.cond[:count], uncond=uncond)


def random_host(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Host:
    """Flux, Wan or DiT with random weights and inputs of one sample.

    Args:
        name: flux, wan or dit.
        shape: of the model and its inputs.
        device: where the model is made.
        dtype: of its weights.
    """
    frames, rows, columns = shape.grid
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made where and as it is used: in float32 first, a large model would not fit
    try:
        with device:
            if name == "flux":
                model: Any = FluxTransformer2DModel(guidance_embeds=True, **shape.model)
                text, pooled = model.config.joint_attention_dim, model.config.pooled_projection_dim
                call, latents = flux_call, (64, rows, columns)
                cond = Cond(_text(shape, text), torch.randn(1, pooled), guidance=torch.full((1,), GUIDANCE))
            elif name == "wan":
                model = WanTransformer3DModel(**shape.model)
                call, latents = _wan_call, (16, frames, 2 * rows, 2 * columns)
                cond = Cond(_text(shape, model.config.text_dim))
            else:
                model = DiTTransformer2DModel(sample_size=2 * rows, **shape.model)
                call, latents = _dit_call, (4, 2 * rows, 2 * columns)
                cond = Cond(label=torch.tensor([3]))
    finally:
        torch.set_default_dtype(default)
    return Host(name, model.eval(), call, torch.randn(1, *latents).to(device), cond)


def emoji_host(count: int, device: torch.device, steps: int, timed: int = 2) -> Host:
    """The model that ships, as diffusers' Flux, with its guidance and as many held-out prompts.

    Args:
        count: prompts, each with its style and seed.
        device: where the model runs, in float32.
        steps: of the run in which both must end alike.
        timed: prompts that are timed.

    Raises:
        RuntimeError: the carried-over model ends elsewhere than the pipeline.
    """
    pipe = load_model(EMOJI, device)
    pipe.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(EMOJI, count)
    assert pipe.text is not None
    request = expand_request(list(prompts.texts), list(prompts.styles), 1)
    cond, uncond = text_conditions(request, pipe.text, pipe.config["styles"], pipe.num_labels)
    assert uncond is not None
    assert isinstance(pipe.transformer, MMDiT)
    side = pipe.config["size"] // pipe.autoencoder.config["factor"]
    noise = randn(
        (count, pipe.autoencoder.config["latent_channels"], side, side), generators_for(prompts.seeds), device
    )
    model = mmdit_to_flux(without_labels(pipe.transformer)).eval()
    host = Host(
        EMOJI, model, flux_call, noise, _label_as_guidance(cond.to(device)), _label_as_guidance(uncond.to(device)),
        Guidance(pipe.config["default_guidance"]), is_trained=True, timed=timed,
    )  # fmt: skip
    few = prompts.first(timed)
    drawn: Any = pipe(
        list(few.texts), style=list(few.styles), generator=generators_for(few.seeds), num_inference_steps=steps,
        output_type="latent",
    )  # fmt: skip
    difference = max(relative_distances(host.first(timed).draw(model, steps), drawn.images))
    if not difference <= SAME:
        raise RuntimeError(f"emoji as diffusers' Flux ends {difference:.1e} from the pipeline; {SAME:.0e} is allowed")
    return host


def without_labels(model: MMDiT) -> MMDiT:
    """The same function for classes that have no place for labels: label i goes in as a guidance of `i * LABEL_STEP`.

    The embedder of guidance is an MLP over sinusoids, `W2 silu(W1 s(guidance))`. W1 turns the sinusoids of label i into
    1 at place i and 0 elsewhere, W2 holds the rows of the label's table over silu(1).
    """
    embedder: Any = model.label_embedder
    assert embedder is not None, "a model without labels needs no change"
    settings = {name: one for name, one in model.config.items() if not name.startswith("_")}
    result: Any = MMDiT(**{**settings, "num_labels": 0, "guidance_embeds": True}).to(embedder.table.weight)
    mlp = result.guidance_embedder.mlp
    table = embedder.table.weight.detach().double()  # (K, D)
    features = sinusoidal(torch.arange(len(table)) * LABEL_STEP, mlp.linear_1.in_features).to(table)  # (K, 256)
    one_hot = torch.eye(*table.shape).to(table)  # (K, D)
    second = torch.zeros_like(mlp.linear_2.weight)
    second[:, : len(table)] = (table.T * (1 + math.exp(-1))).to(second)
    weights = {name: one for name, one in model.state_dict().items() if not name.startswith("label_embedder.")}
    for layer, weight in (("linear_1", (torch.linalg.pinv(features) @ one_hot).T), ("linear_2", second)):
        weights[f"guidance_embedder.mlp.{layer}.weight"] = weight.to(second)
        weights[f"guidance_embedder.mlp.{layer}.bias"] = torch.zeros_like(second[0])
    result.load_state_dict(weights)
    return result.eval()


def flux_call(model: Callable[..., Any], x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """diffusers' Flux on x (B, C, H, W); the mask of the text becomes one of the joint sequence."""
    height, width = x.shape[-2:]
    assert cond.text is not None
    length = cond.text.shape[1]
    labels = grid_labels(length, height, width, x.device)
    options = {}
    if cond.mask is not None:
        mask = F.pad(cond.mask, (0, height * width), value=True)[:, None, None]  # (B, 1, 1, M + N)
        options = {"joint_attention_kwargs": {"attention_mask": mask}}
    velocity = model(
        hidden_states=patchify(x, 1), timestep=t, guidance=cond.guidance,
        encoder_hidden_states=cond.text, pooled_projections=cond.pooled, txt_ids=labels[:length],
        img_ids=labels[length:], return_dict=False, **options,
    )[0]  # fmt: skip
    return unpatchify(velocity, (height, width), 1)


def _wan_call(model: Callable[..., Any], x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return model(x, timestep_from_time(t), cond.text, return_dict=False)[0]


def _dit_call(model: Callable[..., Any], x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return model(x, timestep_from_time(t).long(), cond.label, return_dict=False)[0]


def _text(shape: Shape, width: int) -> Tensor:
    return torch.randn(1, shape.text, width)


def _label_as_guidance(cond: Cond) -> Cond:
    assert cond.label is not None
    return replace(cond, label=None, guidance=cond.label * LABEL_STEP)
