"""Weights between `MMDiT` and diffusers' `FluxTransformer2DModel`, both ways and without loss.

Ours are fused (queries, keys and values in one matrix) or split (the output of a single block into attention and
feed-forward), and our final modulation has the shift before the scale; every other tensor only changes its name.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError

FLUX_FFN_RATIO = 4
FLUX_AXES = (16, 56, 56)


class Pair(NamedTuple):
    """One rule: `ours` equals `theirs`, joined along `dim` if there are several on a side."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    dim: int = 0
    swap_halves: bool = False


def flux_to_mmdit(
    source: Mapping[str, Tensor] | FluxTransformer2DModel,
    patch_size: int = 1,
    axes_dims_rope: tuple[int, ...] | None = None,
) -> MMDiT:
    """An `MMDiT` that computes what the Flux transformer computes.

    Args:
        source: the diffusers model, or its state dict.
        patch_size: side of the patches that the caller packed for Flux; 2 for FLUX.1, whose 64 channels are 16 * 2 * 2.
        axes_dims_rope: rotary axes; read from the model, and (16, 56, 56) for a state dict, where they are not stored.

    Returns:
        The model, in the dtype of the weights, on the CPU or where they were.

    Raises:
        UserError: keys are missing or foreign, or the channels do not fit the patch.
    """
    if isinstance(source, FluxTransformer2DModel):
        axes_dims_rope = axes_dims_rope or tuple(source.config.axes_dims_rope)  # type: ignore[attr-defined]
        source = source.state_dict()
    config = _config_of(source, patch_size, axes_dims_rope or FLUX_AXES)
    with torch.device("meta"):
        model = MMDiT(**config)
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for pair in _pairs(config["num_double"], config["num_single"], config["guidance_embeds"]):
        missing = [name for name in pair.theirs if name not in source]
        if missing:
            raise UserError(f"the Flux weights lack {missing[0]!r}; give the whole state dict of the transformer")
        weights |= _carry(source, pair.theirs, pair.ours, pair, [model.get_parameter(n).shape for n in pair.ours])
        used |= set(pair.theirs)
    foreign = sorted(set(source) - used)
    if foreign:
        raise UserError(f"the Flux weights hold {len(foreign)} foreign keys, as {foreign[0]!r}; merge adapters first")
    model.load_state_dict(weights, assign=True)
    return model


def mmdit_to_flux(model: MMDiT) -> FluxTransformer2DModel:
    """The diffusers model that computes what ours computes; its tokens are `patchify(x, patch_size)`.

    Raises:
        UserError: the model has something that Flux has no place for.
    """
    config = model.config
    if config["num_labels"]:
        raise UserError(f"Flux has no place for the {config['num_labels']} labels of this model; convert one without")
    if config["block_order"] != "standard":
        raise UserError(f"Flux has blocks in the standard order, this model {config['block_order']!r}")
    if config["ffn_ratio"] != FLUX_FFN_RATIO:
        raise UserError(
            f"Flux has ffn_ratio {FLUX_FFN_RATIO}, this model {config['ffn_ratio']}; train one with the former"
        )
    with torch.device("meta"):
        flux = FluxTransformer2DModel(
            in_channels=config["in_channels"] * config["patch_size"] ** 2,
            num_layers=config["num_double"],
            num_single_layers=config["num_single"],
            attention_head_dim=config["head_dim"],
            num_attention_heads=config["heads"],
            joint_attention_dim=config["text_dim"],
            pooled_projection_dim=config["pooled_dim"],
            guidance_embeds=config["guidance_embeds"],
            axes_dims_rope=tuple(config["axes_dims_rope"]),
        )
    ours, weights = model.state_dict(), {}
    for pair in _pairs(config["num_double"], config["num_single"], config["guidance_embeds"]):
        missing = [name for name in pair.ours if name not in ours]
        if missing:
            raise UserError(f"this MMDiT lacks {missing[0]!r}; merge or unload its adapters before converting")
        weights |= _carry(ours, pair.ours, pair.theirs, pair, [flux.get_parameter(n).shape for n in pair.theirs])
    flux.load_state_dict(weights, assign=True)
    return flux


def _carry(source: Mapping[str, Tensor], take, give, pair: Pair, shapes) -> dict[str, Tensor]:
    """Joins the tensors `take`, then splits them into `give` by their shapes along the rule's dim."""
    joined = torch.cat([source[name].detach() for name in take], dim=pair.dim)
    if pair.swap_halves:
        joined = torch.cat(joined.chunk(2)[::-1])
    pieces = joined.split([shape[pair.dim] for shape in shapes], dim=pair.dim)
    return {name: piece.clone() for name, piece in zip(give, pieces, strict=True)}


def _pairs(num_double: int, num_single: int, guidance_embeds: bool) -> Iterator[Pair]:
    yield from _linear("x_embedder", "x_embedder")
    yield from _linear("text_embedder", "context_embedder")
    embedders = {"time_embedder.mlp": "timestep_embedder", "pooled_embedder": "text_embedder"}
    if guidance_embeds:
        embedders["guidance_embedder.mlp"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        for layer in ("linear_1", "linear_2"):
            yield from _linear(f"{ours}.{layer}", f"time_text_embed.{theirs}.{layer}")
    for index in range(num_double):
        yield from _double(f"double_blocks.{index}", f"transformer_blocks.{index}")
    for index in range(num_single):
        yield from _single(f"single_blocks.{index}", f"single_transformer_blocks.{index}")
    for kind in ("weight", "bias"):
        yield Pair((f"final_norm.linear.{kind}",), (f"norm_out.linear.{kind}",), swap_halves=True)
    yield from _linear("proj_out", "proj_out")


def _double(ours: str, theirs: str) -> Iterator[Pair]:
    names = {
        "": ("norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        "_text": (
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "ff_context",
        ),
    }
    for stream, (norm, projections, norms, out, ffn) in names.items():
        yield from _linear(f"{ours}.modulation{stream}.linear", f"{theirs}.{norm}.linear")
        yield from _attention(f"{ours}.attn{stream}", f"{theirs}.attn", projections, norms)
        yield from _linear(f"{ours}.attn{stream}.to_out", f"{theirs}.attn.{out}")
        yield from _linear(f"{ours}.ffn{stream}.proj_in", f"{theirs}.{ffn}.net.0.proj")
        yield from _linear(f"{ours}.ffn{stream}.proj_out", f"{theirs}.{ffn}.net.2")


def _single(ours: str, theirs: str) -> Iterator[Pair]:
    yield from _linear(f"{ours}.modulation.linear", f"{theirs}.norm.linear")
    yield from _attention(f"{ours}.attn", f"{theirs}.attn", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    yield from _linear(f"{ours}.ffn.proj_in", f"{theirs}.proj_mlp")
    yield Pair((f"{ours}.attn.to_out.weight", f"{ours}.ffn.proj_out.weight"), (f"{theirs}.proj_out.weight",), dim=1)
    yield Pair((f"{ours}.attn.to_out.bias",), (f"{theirs}.proj_out.bias",))


def _attention(ours: str, theirs: str, projections: tuple[str, ...], norms: tuple[str, str]) -> Iterator[Pair]:
    for kind in ("weight", "bias"):
        yield Pair((f"{ours}.to_qkv.{kind}",), tuple(f"{theirs}.{name}.{kind}" for name in projections))
    yield Pair((f"{ours}.norm_q.weight",), (f"{theirs}.{norms[0]}.weight",))
    yield Pair((f"{ours}.norm_k.weight",), (f"{theirs}.{norms[1]}.weight",))


def _linear(ours: str, theirs: str) -> Iterator[Pair]:
    for kind in ("weight", "bias"):
        yield Pair((f"{ours}.{kind}",), (f"{theirs}.{kind}",))


def _config_of(weights: Mapping[str, Tensor], patch_size: int, axes_dims_rope: tuple[int, ...]) -> dict:
    try:
        width, channels = weights["x_embedder.weight"].shape
        head_dim = weights["single_transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text_dim = weights["context_embedder.weight"].shape[1]
        pooled_dim = weights["time_text_embed.text_embedder.linear_1.weight"].shape[1]
    except KeyError as error:
        raise UserError(f"these are no Flux weights: {error} is missing; give the transformer's state dict") from error
    if channels % patch_size**2:
        raise UserError(f"{channels} token channels do not fit patches of {patch_size}; choose another patch_size")
    return {
        "in_channels": channels // patch_size**2,
        "patch_size": patch_size,
        "num_double": _count(weights, "transformer_blocks."),
        "num_single": _count(weights, "single_transformer_blocks."),
        "heads": width // head_dim,
        "head_dim": head_dim,
        "text_dim": text_dim,
        "pooled_dim": pooled_dim,
        "guidance_embeds": any(name.startswith("time_text_embed.guidance_embedder.") for name in weights),
        "axes_dims_rope": axes_dims_rope,
        "ffn_ratio": FLUX_FFN_RATIO,
    }


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
