"""Weights between `DiT` and diffusers' `DiTTransformer2DModel`, both ways and without loss.

Diffusers keeps a copy of the time and label embedders in every block; ours has one. Its patch layer is a convolution
and its output channels lie innermost in a patch, ours outermost.
"""

from collections.abc import Iterator

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError

EMBEDDERS = {
    "time_embedder.mlp.linear_1.weight": "timestep_embedder.linear_1.weight",
    "time_embedder.mlp.linear_1.bias": "timestep_embedder.linear_1.bias",
    "time_embedder.mlp.linear_2.weight": "timestep_embedder.linear_2.weight",
    "time_embedder.mlp.linear_2.bias": "timestep_embedder.linear_2.bias",
    "label_embedder.table.weight": "class_embedder.embedding_table.weight",
}
LAYERS = {
    "modulation.linear": "norm1.linear",
    "attn.to_out": "attn1.to_out.0",
    "ffn.proj_in": "ff.net.0.proj",
    "ffn.proj_out": "ff.net.2",
}
FIXED = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False, "dropout": 0.0}
FFN_RATIO = 4


def diffusers_to_dit(source: DiTTransformer2DModel) -> DiT:
    """A `DiT` that computes what the diffusers model computes in evaluation mode, at `t = timestep / 1000`.

    Raises:
        UserError: the model has something that ours has no place for.
    """
    config = dict(source.config)
    out_channels = config["out_channels"] or config["in_channels"]
    unlike = {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "dropout": 0.0,
    }
    for name, value in unlike.items():
        if config[name] != value:
            raise UserError(f"DiT has {name} = {value!r}, the diffusers model {config[name]!r}; it cannot be converted")
    if out_channels not in (config["in_channels"], 2 * config["in_channels"]):
        raise UserError(f"DiT predicts C or 2 C channels, the model {out_channels} from {config['in_channels']}")
    with torch.device("meta"):
        model = DiT(
            in_channels=config["in_channels"],
            patch_size=config["patch_size"],
            depth=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            num_labels=config["num_embeds_ada_norm"],
            base_size=config["sample_size"] // config["patch_size"],
            ffn_norm_eps=config["norm_eps"],
            learn_sigma=out_channels != config["in_channels"],
        )
    theirs = source.state_dict()
    weights = {ours: theirs[name] for ours, name in _same(config["num_layers"])}
    for ours, name in EMBEDDERS.items():
        copies = [theirs[f"transformer_blocks.{i}.norm1.emb.{name}"] for i in range(config["num_layers"])]
        if any(not torch.equal(copy, copies[0]) for copy in copies[1:]):
            raise UserError(f"the blocks of the model differ in {name!r}; DiT has one embedder for all of them")
        weights[ours] = copies[0]
    for index in range(config["num_layers"]):
        for kind in ("weight", "bias"):
            parts = [theirs[f"transformer_blocks.{index}.attn1.to_{part}.{kind}"] for part in "qkv"]
            weights[f"blocks.{index}.attn.to_qkv.{kind}"] = torch.cat(parts)
    weights["x_embedder.weight"] = theirs["pos_embed.proj.weight"].flatten(1)
    for kind in ("weight", "bias"):
        rows = theirs[f"proj_out_2.{kind}"].unflatten(0, (config["patch_size"] ** 2, out_channels))
        weights[f"proj_out.{kind}"] = rows.transpose(0, 1).flatten(0, 1)
    model.load_state_dict(_own(weights), assign=True)
    return model


def dit_to_diffusers(model: DiT) -> DiTTransformer2DModel:
    """The diffusers model that computes what ours computes; give it `timestep = 1000 * t` and square pictures.

    Raises:
        UserError: the model has something that diffusers' class has no place for.
    """
    config = dict(model.config)
    for name in ("pooled", "text"):
        if config[f"{name}_dim"]:
            raise UserError(f"DiTTransformer2DModel has no place for a {name} condition; its {name}_dim must be 0")
    if not config["num_labels"]:
        raise UserError("DiTTransformer2DModel needs labels; convert a DiT with num_labels > 0")
    if config["ffn_ratio"] != FFN_RATIO:
        raise UserError(f"DiTTransformer2DModel has ffn_ratio {FFN_RATIO}, this model {config['ffn_ratio']}")
    for name, value in (("block_order", "standard"), ("modulation", "own")):
        if config[name] != value:
            raise UserError(f"DiTTransformer2DModel has {name} {value}, this model {config[name]!r}")
    channels, patch = config["in_channels"] * (1 + config["learn_sigma"]), config["patch_size"]
    theirs = DiTTransformer2DModel(
        num_attention_heads=config["heads"],
        attention_head_dim=config["head_dim"],
        in_channels=config["in_channels"],
        out_channels=channels,
        num_layers=config["depth"],
        sample_size=config["base_size"] * patch,
        patch_size=patch,
        num_embeds_ada_norm=config["num_labels"],
        norm_eps=config["ffn_norm_eps"],
    )
    ours = model.state_dict()
    weights = {name: ours[mine] for mine, name in _same(config["depth"])}
    for index in range(config["depth"]):
        for mine, name in EMBEDDERS.items():
            weights[f"transformer_blocks.{index}.norm1.emb.{name}"] = ours[mine]
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", ours[f"blocks.{index}.attn.to_qkv.{kind}"].chunk(3)):
                weights[f"transformer_blocks.{index}.attn1.to_{part}.{kind}"] = tensor
    weights["pos_embed.proj.weight"] = ours["x_embedder.weight"].unflatten(1, (-1, patch, patch))
    for kind in ("weight", "bias"):
        rows = ours[f"proj_out.{kind}"].unflatten(0, (channels, patch**2))
        weights[f"proj_out_2.{kind}"] = rows.transpose(0, 1).flatten(0, 1)
    theirs.load_state_dict(_own(weights), assign=True)
    return theirs.eval()  # in training mode it would drop labels at random


def _same(depth: int) -> Iterator[tuple[str, str]]:
    """Names of tensors that are equal on both sides: (ours, theirs)."""
    yield "x_embedder.bias", "pos_embed.proj.bias"
    for kind in ("weight", "bias"):
        yield f"final_norm.linear.{kind}", f"proj_out_1.{kind}"
        for index in range(depth):
            for ours, theirs in LAYERS.items():
                yield f"blocks.{index}.{ours}.{kind}", f"transformer_blocks.{index}.{theirs}.{kind}"


def _own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, so that the two models share no memory."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
