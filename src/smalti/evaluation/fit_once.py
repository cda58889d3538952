"""Small networks that judge pictures: trained at the first call, kept in the cache, the same on every machine."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.files import atomic_file

BATCH, SEED, REACH = 64, 0, 2


def fit_once(model: nn.Module, path: Path, pixels: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The model with the weights of `path`, which are learned and written first if it is missing; frozen.

    Args:
        model: pixels (B, C, H, W) -> logits (B, K), or (B, K, H, W) for every pixel.
        path: of a safetensors file.
        pixels: all that is learned from (N, C, H, W).
        labels: classes (N,), or (N, H, W), long.
        epochs: passes over them, each batch moved by up to 2 pixels.
    """
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        _train(model, pixels, labels, epochs)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            save_file(model.state_dict(), temporary)
    return model.eval().requires_grad_(False)


@torch.enable_grad()  # the first to ask may be measuring
def _train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        steps = epochs * len(labels) // BATCH
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(labels), (BATCH,))
            shift = torch.randint(-REACH, REACH + 1, (2,)).tolist()
            wanted = labels[rows] if labels.ndim == 1 else labels[rows].roll(shift, (1, 2))
            F.cross_entropy(model(pixels[rows].roll(shift, (2, 3))), wanted).backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
