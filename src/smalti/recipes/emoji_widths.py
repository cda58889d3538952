"""Emoji denoisers of many widths, each with muP or without: what is trained, checked and compared.

As in `emoji_arm`, latents are those of `emoji`; heads keep their size, the number of heads is the width. muP carries
over the model's own start, so modulations begin at zero with and without it.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti.backbones.dit import DiT
from smalti.core.protocols import TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji_arm import CHANNELS, GRID, TEXT_WIDTH, stock
from smalti.training.config import TrainConfig
from smalti.training.mup import MuP
from smalti.training.trainer import Trainer

NARROW, DEPTH, HEAD, BATCH = 32, 4, 16, 32


def build(width: int) -> DiT:
    """The denoiser of a width, a multiple of 16."""
    return DiT(
        in_channels=CHANNELS, patch_size=1, depth=DEPTH, heads=width // HEAD, head_dim=HEAD, num_labels=4,
        pooled_dim=TEXT_WIDTH, base_size=GRID[0],
    )  # fmt: skip


def parametrisation() -> MuP:
    """muP with the base width of 32."""
    return MuP(build, NARROW, start="own")


def train_width(kind: str, width: int, rate: float, seed: int, steps: int) -> float:
    """Held-out loss after so many steps at a peak rate.

    Args:
        kind: mup, with the base width of 32, or standard.
        width: of the denoiser.
        rate: peak rate; it warms up for a fifth of the steps and falls to 0 over the last one.
        seed: of weights, order, noise and times.
        steps: of 32 samples; gradients are not clipped, because their norm grows with the width.
    """
    config = TrainConfig(
        steps=steps, batch=BATCH, learning_rate=rate, warmup=steps // 5, decay="linear-cooldown", ema=0.98,
        betas=(0.9, 0.95), clip=None, weight_decay=0.0, seed=seed, eval_every=steps, eval_samples=698,
    )  # fmt: skip
    mu, shared = parametrisation(), stock()
    torch.manual_seed(seed)
    model = mu.model(width) if kind == "mup" else build(width)
    factors = mu.factors(model) if kind == "mup" else None
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(
            model, FlowMatching(), shared.train, config, Path(folder), held_out=shared.held_out, factors=factors
        )
        loss = trainer.fit().held_out_loss
    assert loss is not None
    return loss


def ready(kind: str, width: int, rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh denoiser with its AdamW."""
    mu = parametrisation()
    model = mu.model(width) if kind == "mup" else build(width)
    groups = mu.groups(model, rate) if kind == "mup" else [{"params": list(model.parameters()), "lr": rate}]
    return model, torch.optim.AdamW(groups, weight_decay=0.0)


def fixed_loss(model: nn.Module, step: int) -> Tensor:
    """Flow matching on samples, times and noise that only the step decides."""
    rows = torch.arange(BATCH * step, BATCH * (step + 1))
    batch = stock().train.batch(rows, generators_for(rows.tolist()))
    return FlowMatching().loss(model, batch, TrainState(step), generators_for(rows.tolist())).loss


def is_plain_at_base() -> bool:
    """Whether three updates at the base width are those of the plain model from the same weights, bit for bit."""
    torch.manual_seed(0)
    ours, optimizer = ready("mup", NARROW, 1e-3)
    plain, other = ready("standard", NARROW, 1e-3)
    plain.load_state_dict(ours.state_dict())
    for model, one in ((ours, optimizer), (plain, other)):
        for step in range(3):
            fixed_loss(model, step).backward()
            one.step()
            one.zero_grad()
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)
