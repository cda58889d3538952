"""What a transformer is made of, read from its modules: stacks of blocks and the sublayers inside each block.

No model is known by name. A stack is a list of modules, a direct child of the model (or, if there is none, of one of
its children), in which every element holds attention. Inside a block, attention is recognised by its projections or its
class name, a feed-forward layer as a module of two or more linear or convolution layers, or as linear layers of the
block itself of which the last leads back to the width of the others' input (PRX), and a fused sublayer by attention
without an output projection whose output runs into a linear layer of the block itself (FLUX.1's single blocks). A block
may also say it: its `feeders` give, by the name of a child, the children that compute nothing but that one's input.
Refiners of the text that sit inside an embedder are no blocks.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from smalti.core.errors import Refusal
from smalti.core.method import Reading, Site

TIME_NAMES = ("timestep", "timesteps", "t")
TIME_ENDINGS = ("_timestep", "_timesteps", "_time")
PROJECTIONS = ("to_q", "to_qkv", "to_qkv_mlp_proj", "qkv", "q_proj", "q_linear", "wq")
OUT_PROJECTIONS = ("to_out", "out_proj", "o_proj", "proj", "proj_out", "to_out_linear", "wo")
NOT_FFN = re.compile("Norm|Embed|Modul|AdaLN|AdaLayer|Dropout", re.IGNORECASE)
"""In the class or the name of what only conditions a block."""


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a block.

    Args:
        site: its name in the model.
        module: whose output it is.
        feeders: what computes nothing but the input of this sublayer; it need not run if that is skipped.
        is_alone: whether nothing else in the block can stand between feeders and sublayer.
    """

    site: Site
    module: nn.Module
    feeders: tuple["Sublayer", ...] = ()
    is_alone: bool = True


@dataclass(frozen=True)
class Block:
    """One block.

    Args:
        site: its name in the model.
        module: the block.
        sublayers: in the order in which they stand.
        attentions: all attention modules, those that feed another sublayer too.
    """

    site: Site
    module: nn.Module
    sublayers: tuple[Sublayer, ...]
    attentions: tuple[Sublayer, ...]


@dataclass(frozen=True)
class Anatomy:
    """What was read from a model.

    Args:
        model: the transformer.
        blocks: of all stacks, in the order in which they stand.
        sample: name of the forward's argument that holds the noisy sample.
        time: name of the argument that holds the time.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    sample: str
    time: str

    @property
    def reading(self) -> Reading:
        """The sites alone, without modules."""
        sites = [
            site
            for block in self.blocks
            for site in dict.fromkeys([block.site, *(one.site for one in (*block.sublayers, *block.attentions))])
        ]
        return Reading(type(self.model).__name__, tuple(sites))


def read_anatomy(model: nn.Module) -> Anatomy:
    """Reads a transformer.

    Raises:
        Refusal: it takes no time, has no stack of blocks with attention, or a block has no sublayer that can be told.
    """
    name = type(model).__name__
    parameters = list(inspect.signature(model.forward).parameters)
    time = time_argument(model)
    if time is None:
        raise Refusal(
            f"{name} is no denoiser that smalti can read: its forward takes no argument that holds the time "
            f"({', '.join(TIME_NAMES)}, or a name that ends in {', '.join(TIME_ENDINGS)}), "
            f"but {', '.join(parameters[:6])}"
        )
    blocks: list[Block] = []
    for path, stack in find_stacks(model):
        for index, module in enumerate(stack):
            blocks.append(_read_block(name, path, index, len(blocks), module))
    if not blocks:
        raise Refusal(f"{name} has no list of blocks with attention among its children")
    others = [one for one in parameters if one != time]
    # Of `vision_tokens` and `vision_timesteps` each tells the other; a plain `timestep` follows the first argument.
    sample = others[0] if time in TIME_NAMES else max(others, key=lambda one: _alike(one, time))
    return Anatomy(model, tuple(blocks), sample, time)


def _alike(one: str, other: str) -> int:
    """How many letters two names begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def time_argument(model: nn.Module) -> str | None:
    """Name of the argument of a model's forward that holds the time; None if it takes none."""
    parameters = list(inspect.signature(model.forward).parameters)
    exact = [one for one in TIME_NAMES if one in parameters]
    return next(iter([*exact, *(one for one in parameters if one.endswith(TIME_ENDINGS))]), None)


def find_stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of blocks among a model's children, by path; of a model that only wraps others, those of its children.

    Lists of lists and dicts of lists are entered.
    """
    found = list(_own_stacks(model))
    if not found:
        found = [(f"{name}.{path}", stack) for name, child in model.named_children()
                 for path, stack in _own_stacks(child)]  # fmt: skip
    yield from found


def _own_stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            elements = list(child.children())
            if isinstance(child, nn.ModuleList) and elements and all(_is_block(one) for one in elements):
                yield name, child
            else:
                for path, stack in _own_stacks(child):
                    yield f"{name}.{path}", stack


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention: it projects to queries, or its class says so."""
    if re.search("Norm|Block|Layer$|Processor", type(module).__name__) or not _is_callable(module):
        return False
    has_projection = any(isinstance(getattr(module, one, None), nn.Module) for one in PROJECTIONS)
    return has_projection or re.search("Attention|Attn", type(module).__name__) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer or stands for one (quantised, with adapters)."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _is_callable(module: nn.Module) -> bool:
    """Whether a module has a forward; some only hold weights."""
    return type(module).forward is not nn.Module.forward


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return not is_attention(module) and any(is_attention(one) for one in module.modules())


def _read_block(model: str, stack: str, index: int, depth: int, module: nn.Module) -> Block:
    def site(name: str, kind: str) -> Site:
        return Site(stack, index, name, kind, depth)  # type: ignore[arg-type]

    sublayers = [Sublayer(site(name, kind), one) for name, kind, one in _sublayers(module)]
    attentions = tuple(one for one in sublayers if one.site.kind == "attention")
    closing = _closing_projection(module)
    if closing is not None:
        name, projection = closing
        before = [(path, one) for path, one in module.named_children() if _feeds(one) and one is not projection]
        open_ended = [one for one in attentions if not _has_output(one.module)]
        if open_ended:
            feeders = [*open_ended, *(Sublayer(site(path, "ffn"), one) for path, one in before)]
            sublayers = [one for one in sublayers if one not in open_ended]
            sublayers.append(Sublayer(site(name, "fused"), projection, tuple(feeders), is_alone=not sublayers))
        elif any(_widens(one, projection) for _, one in before):
            kept = [(path, one) for path, one in before if not is_linear(one) or _widens(one, projection)]
            feeders = [Sublayer(site(path, "ffn"), one) for path, one in kept]
            sublayers.append(Sublayer(site(name, "ffn"), projection, tuple(feeders)))
    known = {one.site.name: one for one in sublayers}
    for name, names in getattr(module, "feeders", {}).items():
        feeders = tuple(known.pop(one, Sublayer(site(one, "ffn"), module.get_submodule(one))) for one in names)
        known[name] = Sublayer(site(name, "fused"), module.get_submodule(name), feeders, is_alone=not known)
    sublayers = list(known.values())
    if not sublayers:
        raise Refusal(f"{model}.{stack}.{index} ({type(module).__name__}) has no attention or feed-forward of its own")
    return Block(site("", "block"), module, tuple(sublayers), attentions)


def _sublayers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Path, kind and module of attention and feed-forward layers; wrappers and lists of sublayers are entered."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if is_attention(child):
            yield path, "attention", child
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)) or any(is_attention(one) for one in child.modules()):
            yield from _sublayers(child, f"{path}.")
        elif is_linear(child) or not _is_callable(child) or _conditions(name, child):
            continue  # a linear layer with an adapter holds several products and is none the less one layer
        elif _count_products(child) >= 2:
            yield path, "ffn", child


def _conditions(name: str, module: nn.Module) -> bool:
    """Whether a module norms, modulates or embeds: by its class, or by its name if it is a plain sequence."""
    return NOT_FFN.search(name if isinstance(module, nn.Sequential) else type(module).__name__) is not None


def _count_products(module: nn.Module) -> int:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sum(is_linear(one) or isinstance(one, convolutions) for one in module.modules())


def _closing_projection(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The last linear layer that the block itself holds."""
    linear = [(name, child) for name, child in block.named_children() if is_linear(child)]
    return linear[-1] if linear else None


def _has_output(attention: nn.Module) -> bool:
    return any(isinstance(getattr(attention, one, None), nn.Module) for one in OUT_PROJECTIONS)


def _widens(linear: Any, closing: Any) -> bool:
    """Whether a linear layer leads from the width of a block to what the closing one takes, alone or with its gate."""
    if not is_linear(linear) or not linear.in_features == closing.out_features < closing.in_features:
        return False
    return linear.out_features in (closing.in_features, 2 * closing.in_features)


def _feeds(child: nn.Module) -> bool:
    """A linear layer or an activation of the block itself, between its norm and its closing projection."""
    return is_linear(child) or (not list(child.parameters()) and not NOT_FFN.search(type(child).__name__))
