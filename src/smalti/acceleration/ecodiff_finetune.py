"""Training after pruning, if its loss matters: all weights of the smaller model, or a LoRA beside them.

A tenth or a fifth of the units out needs none; with half of them out it does not bring all back (arXiv 2412.02852).
"""

from pathlib import Path

from diffusers import ModelMixin
from peft import LoraConfig

from smalti.core.protocols import Objective
from smalti.nn.pruned import ScatteredLinear
from smalti.seams.anatomy import is_linear, read_anatomy
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.trainer import Trainer


def fine_tune(
    model: ModelMixin,
    objective: Objective,
    source: SampleSource,
    config: TrainConfig,
    out: Path | str,
    rank: int | None = None,
) -> Trainer:
    """The trainer of a pruned model, ready for `fit()`.

    Args:
        model: the pruned model; its weights, or its adapter's, are changed in place.
        objective: what is learned, such as `FlowMatching`.
        source: training samples.
        config: how long and how fast.
        out: folder of checkpoints and log.
        rank: of a LoRA on all linear layers of the blocks; None trains all weights.

    Example:
        >>> trainer = fine_tune(prune(pipe.transformer, plan), FlowMatching(), source, TrainConfig(200, 64), "out", 8)
        >>> report = trainer.fit()
    """
    if rank is None:
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=block_linears(model))
        model.add_adapter(adapter)  # type: ignore[operator]  # of diffusers' PeftAdapterMixin
    return Trainer(model, objective, source, config, out)


def block_linears(model: ModelMixin) -> list[str]:
    """Paths of the linear layers in the blocks; those that make some of their outputs only are left as they are."""
    return [
        f"{block.site}.{name}"
        for block in read_anatomy(model).blocks
        for name, layer in block.module.named_modules()
        if is_linear(layer) and not isinstance(layer, ScatteredLinear)
    ]
