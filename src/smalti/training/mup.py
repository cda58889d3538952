"""muP: a parametrisation under which the best learning rate does not change with the width.

Which axes of a weight grow with the width is read from two models that differ in nothing else. With r = width / base
width, for Adam-like optimizers:

    kind    axes that grow            start                    forward            rate       decay
    input   outputs (or a vector)     std 1 / sqrt(fan_in)     as it is           eta        lambda
    hidden  both                      std 1 / sqrt(fan_in)     as it is           eta / r    lambda * r
    output  inputs                    0                        input * mult / r   eta        lambda

Embeddings, tables, biases and gains are of the input kind and start at std 0.02, 0 and 1. So modulations are no zeros
any more; `start="own"` takes what the model itself draws at the base width instead, zeros too, and carries it to other
widths: hidden weights by 1 / sqrt(r), all others as they are. The head dimension stays and
heads are added, so attention keeps its 1 / sqrt(d). SGD has other factors, r for one growing axis and 1 for two, and
Muon's hidden matrices take eta / sqrt(r): all entries of its update are as large as Adam's, but its spectral norm
grows by sqrt(r) only. At the base width everything is what it is without muP.

Source: Tensor Programs V (arXiv 2203.03466), tables 3 and 8; for diffusion transformers arXiv 2505.15270, section 3.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.training.optimizers import Factors, block_matrices

Build = Callable[[int], nn.Module]
Kind = Literal["input", "hidden", "output", "finite"]
STARTS = ("fan-in", "own")
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TABLE_STD = 0.02
HEAD_SIZES = ("head_dim", "attention_head_dim")


@dataclass(frozen=True)
class Scaled:
    """How one parameter depends on the width.

    Args:
        kind: input, hidden, output, or finite (nothing of it grows).
        ratio: r of the axis that a sum runs over where it grows, else of the one that grows.
    """

    kind: Kind
    ratio: float


class MuReadout(nn.Linear):
    """A linear layer out of the width: its input is multiplied by `factor`, mult / r."""

    factor: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * self.factor, self.weight, self.bias)


class MuP:
    """The parametrisation of one family of models.

    Args:
        build: makes a model of a width; nothing but the width may change.
        base: width at which it is the plain model.
        delta: another width that tells which axes grow; twice the base by default.
        output_mult: factor on what the readout gets, tuned at the base width.
        start: fan-in, weights as in the table; or own, as the model draws them at the base width, carried over.

    Raises:
        UserError: an unknown start.
        Refusal: models of two widths differ in their parameters' names, or in the size of a head.

    Example:
        >>> mu = MuP(lambda width: DiT(heads=width // 32, head_dim=32, depth=4), base=64)
        >>> model = mu.model(256)
        >>> Trainer(model, objective, source, config, out, factors=mu.factors(model, config.optimizer)).fit()
        >>> plain = mu.fold(model)
    """

    def __init__(
        self, build: Build, base: int, delta: int | None = None, output_mult: float = 1.0, start: str = "fan-in"
    ):
        if start not in STARTS:
            raise unknown_name("start", start, STARTS)
        self.build, self.base, self.output_mult, self.start = build, base, output_mult, start
        with torch.device("meta"):
            small, other = build(base), build(2 * base if delta is None else delta)
        for name in HEAD_SIZES:
            sizes = [getattr(getattr(one, "config", None), name, None) for one in (small, other)]
            if sizes[0] != sizes[1]:
                raise Refusal(f"{name} grows from {sizes[0]} to {sizes[1]}; keep the size of a head and add heads")
        self.shapes = {name: tuple(one.shape) for name, one in small.named_parameters()}
        grown = {name: tuple(one.shape) for name, one in other.named_parameters()}
        _check_names(self.shapes, grown)
        self.grows = {
            name: tuple(one != two for one, two in zip(shape, grown[name], strict=True))
            for name, shape in self.shapes.items()
        }

    def model(self, width: int, seed: int | None = None) -> nn.Module:
        """A model of this width with its readouts and fresh weights.

        The readouts' factors are not saved with the weights: `fold` the trained model before it is.
        """
        if seed is not None:
            torch.manual_seed(seed)
        return self.initialise(self.set_readouts(self.build(width)))

    def scaled(self, model: nn.Module) -> dict[str, Scaled]:
        """Every parameter's kind and ratio; what the base has not counts as finite.

        LoRA's first matrices are the exception: they sum over the width as the layers do that they belong to.
        """
        owners = {f"{path}.{name}".lstrip("."): module for path, module in model.named_modules()
                  for name, _ in module.named_parameters(recurse=False)}  # fmt: skip
        found = {}
        for name, parameter in model.named_parameters():
            grows = self.grows.get(name, ())
            ratios = [size / base for size, base in zip(parameter.shape, self.shapes.get(name, ()))]
            is_matrix = isinstance(owners[name], MATRICES) and parameter.ndim > 1
            found[name] = _scaled(grows, ratios, is_matrix)
            owner, _, adapter = name.partition(".lora_A.")
            if adapter and self.grows.get(f"{owner}.weight", ())[1:2] == (True,):
                found[name] = Scaled("hidden", parameter.shape[1] / self.shapes[f"{owner}.weight"][1])
        return found

    @torch.no_grad()
    def initialise(self, model: nn.Module) -> nn.Module:
        """Draws weights whose size follows the table; gains of norms are left as they are.

        Raises:
            Refusal: a parameter grows along two axes and belongs to no layer that says over which of them it sums.
        """
        if self.start == "own":
            return self._carry_over(model)
        owners = dict(model.named_modules())
        for name, one in self.scaled(model).items():
            path, _, leaf = name.rpartition(".")
            parameter, owner = model.get_parameter(name), owners[path]
            if one.kind == "output" or leaf == "bias":
                parameter.zero_()
            elif one.kind == "hidden" and not isinstance(owner, MATRICES):
                raise Refusal(f"{name} is a table of matrices of {type(owner).__name__}: draw it by its own fan-in")
            elif isinstance(owner, MATRICES):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif isinstance(owner, nn.Embedding) or (parameter.ndim > 1 or leaf == "table"):
                nn.init.normal_(parameter, std=TABLE_STD)
        return model

    def _carry_over(self, model: nn.Module) -> nn.Module:
        """Sets what the model drew at its width to the sizes that the base draws, times what the table asks for."""
        with torch.random.fork_rng(devices=[]):
            base = dict(self.build(self.base).named_parameters())
        for name, one in self.scaled(model).items():
            parameter = model.get_parameter(name)
            if one.ratio == 1 or name not in base or parameter.ndim < 2:
                continue
            wanted = base[name].std() * (one.ratio**-0.5 if one.kind == "hidden" else 1.0)
            parameter.mul_(wanted / parameter.std().clamp_min(1e-12))
        return model

    def set_readouts(self, model: nn.Module) -> nn.Module:
        """Makes the layers out of the width readouts, in place; loaded weights are not touched.

        Raises:
            Refusal: such a layer is no linear one.
        """
        for name, one in self.scaled(model).items():
            if one.kind != "output" or name.endswith(".bias"):
                continue
            layer = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(layer, nn.Linear):
                raise Refusal(f"{name} leads out of the width and is no Linear but {type(layer).__name__}")
            layer.__class__ = MuReadout
            layer.factor = self.output_mult / one.ratio  # type: ignore[assignment]
        return model

    def factors(self, model: nn.Module, optimizer: str = "adamw") -> dict[str, Factors]:
        """Factors on rate and decay by parameter name; `Trainer` takes them.

        Args:
            model: of any width.
            optimizer: adamw (adam and lion too), muon (hybrid, see `training.optimizers`) or sgd.
        """
        if optimizer not in ("adamw", "adam", "lion", "muon", "sgd"):
            raise UserError(f"got optimizer {optimizer!r}; muP knows adamw, adam, lion, muon and sgd")
        found, by_muon = {}, set(block_matrices(model)) if optimizer == "muon" else set()
        for name, one in self.scaled(model).items():
            if optimizer == "sgd":
                found[name] = Factors(one.ratio if one.kind in ("input", "output") else 1.0)
            elif one.kind == "hidden":
                power = 0.5 if model.get_parameter(name) in by_muon else 1.0
                found[name] = Factors(one.ratio**-power, one.ratio**power)
            else:
                found[name] = Factors()
        return found

    def groups(self, model: nn.Module, rate: float, decay: float = 0.0, optimizer: str = "adamw") -> list[dict]:
        """Parameter groups for any optimizer of torch; parameters of one dimension are not decayed."""
        factors = self.factors(model, optimizer)
        grouped: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                wanted = rate * factors[name].rate, decay * factors[name].decay if parameter.ndim > 1 else 0.0
                grouped.setdefault(wanted, []).append(parameter)
        return [{"params": some, "lr": lr, "weight_decay": wd} for (lr, wd), some in grouped.items()]

    def table(self, model: nn.Module) -> dict[str, Any]:
        """What identifies the parametrisation of a model, as json: base, multiplier, and every parameter's kind."""
        kinds = {name: asdict(one) for name, one in self.scaled(model).items()}
        return {"base": self.base, "output_mult": self.output_mult, "start": self.start, "parameters": kinds}

    def fold(self, model: nn.Module) -> nn.Module:
        """A plain copy that computes the same: factors of readouts go into their weights."""
        plain = copy.deepcopy(model)
        for layer in plain.modules():
            if isinstance(layer, MuReadout):
                with torch.no_grad():
                    layer.weight.mul_(layer.factor)
                layer.__class__ = nn.Linear  # type: ignore[assignment]
                del layer.factor
        return plain


def _scaled(grows: tuple[bool, ...], ratios: list[float], is_matrix: bool) -> Scaled:
    growing = [ratio for ratio, one in zip(ratios, grows) if one]
    if not growing:
        return Scaled("finite", 1.0)
    if is_matrix and grows[1]:  # a matrix sums over its second axis
        return Scaled("hidden" if grows[0] else "output", ratios[1])
    return Scaled("hidden" if len(growing) > 1 else "input", growing[0])  # stacked experts grow along two axes


def _check_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    unlike = sorted(one.keys() ^ other.keys())
    if unlike:
        raise Refusal(f"models of two widths differ in more than width: {', '.join(unlike[:3])}; keep depth and parts")
