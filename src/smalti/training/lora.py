"""LoRA adapters through PEFT: put on, trained, averaged, kept, stacked, merged.

Every linear layer W of the attentions and feed-forward layers gets a branch `W x + (alpha / rank) B A x` with A
(rank, in) drawn and B (out, rank) zero, so that a fresh adapter changes nothing. An averaged adapter comes from the
trainer, whose average follows what learns. Several adapters on one model add their branches, each with its weight;
merging adds them to W itself, after which the model has its old form and its old speed.

Source: LoRA (arXiv 2106.09685), section 4.1; layers as in In-Context LoRA (arXiv 2410.23775, section 4.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError
from smalti.seams.anatomy import NOT_FFN, read_anatomy

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoRASettings:
    """An adapter.

    Args:
        rank: of the branches, at least 1.
        alpha: their strength is alpha / rank; None = rank, strength 1.
        only: kinds of layers: "attention", "ffn".

    Raises:
        UserError: the rank is below 1, or a kind is unknown.
    """

    rank: int = 16
    alpha: float | None = None
    only: tuple[str, ...] = ("attention", "ffn")

    def __post_init__(self):
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise UserError(f"got rank {self.rank} and alpha {self.alpha}; choose a rank from 1 and an alpha above 0")
        if not self.only or not set(self.only) <= {"attention", "ffn"}:
            raise UserError(f"got {self.only} as kinds of layers; choose from attention, ffn")


def adapted_layers(model: nn.Module, settings: LoRASettings) -> list[str]:
    """Paths of the linear layers in the blocks that get a branch; what only conditions a block gets none.

    Raises:
        Refusal: the model cannot be read, or has no such layer.
    """
    names = {module: path for path, module in model.named_modules()}
    found: dict[str, None] = {}
    for block in read_anatomy(model).blocks:
        fed_forward = {id(one) for part in block.sublayers if part.site.kind == "ffn" for one in part.module.modules()}
        closes_both = {id(part.module) for part in block.sublayers if part.site.kind == "fused"}
        for path, one in block.module.named_modules():
            is_condition = any(NOT_FFN.search(name) for name in path.split("."))
            if isinstance(one, nn.Linear) and not is_condition:
                kind = "ffn" if id(one) in fed_forward else "attention"
                if kind in settings.only or id(one) in closes_both:
                    found[names[one]] = None
    if not found:
        raise Refusal(f"{type(model).__name__} has no linear layer in its {' or '.join(settings.only)}")
    return list(found)


def add_lora(model: Any, settings: LoRASettings, name: str = "default") -> list[nn.Parameter]:
    """Freezes a model and puts a fresh adapter on it.

    Args:
        model: one of ours or diffusers', changed in place.
        settings: of the adapter.
        name: of the adapter.

    Returns:
        What learns: the adapter's matrices.

    Raises:
        Refusal: the model takes no adapters.
    """
    if not isinstance(model, PeftAdapterMixin):
        raise Refusal(f"{type(model).__name__} takes no PEFT adapters; give a model of smalti or diffusers")
    targets = adapted_layers(denoiser := cast(Any, model), settings)
    denoiser.requires_grad_(False)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]  # a float
    denoiser.add_adapter(config, adapter_name=name)
    return [one for one in denoiser.parameters() if one.requires_grad]


def adapter_weights(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's matrices by name, as PEFT and diffusers keep them."""
    return get_peft_model_state_dict(model, adapter_name=name)


def save_lora(model: Any, folder: Path | str, name: str = "default") -> Path:
    """Writes an adapter in the form that diffusers reads, its strength included."""
    model.save_lora_adapter(str(folder), adapter_name=name, weight_name=WEIGHTS)
    return Path(folder) / WEIGHTS


def stack_loras(model: Any, adapters: Mapping[str, tuple[Path | str, float]]) -> None:
    """Puts saved adapters on a model side by side.

    Args:
        model: a model without adapters, changed in place.
        adapters: folder and weight of each by name; the names are those by which weights can be changed later.

    Raises:
        UserError: there is none, or a folder holds no adapter.
    """
    if not adapters:
        raise UserError("got no adapter to put on; give at least one")
    for name, (folder, _) in adapters.items():
        if not (Path(folder) / WEIGHTS).is_file():
            raise UserError(f"no adapter in {folder}: {WEIGHTS} is missing; give a folder that save_lora wrote")
        model.load_lora_adapter(str(folder), adapter_name=name, weight_name=WEIGHTS, prefix=None)
    model.set_adapters(list(adapters), [weight for _, weight in adapters.values()])


def merge_loras(model: Any) -> Any:
    """Adds all active adapters to the weights and takes them off; the model has its plain form again.

    Raises:
        UserError: there is no adapter on it.
    """
    if not has_lora(model):
        raise UserError(f"this {type(model).__name__} carries no adapter; put one on first")
    model.fuse_lora(adapter_names=model.active_adapters())
    model.unload_lora()
    return model


def has_lora(model: nn.Module) -> bool:
    """Whether a model carries an adapter."""
    return any(isinstance(one, BaseTunerLayer) for one in model.modules())
