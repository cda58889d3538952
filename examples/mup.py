"""What is tuned on a narrow denoiser serves a wide one: check the parametrisation, then export a plain model."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from smalti.backbones.dit import DiT
from smalti.core.protocols import Cond
from smalti.training.coordinate_check import coordinate_check
from smalti.training.mup import MuP

WIDTHS = (32, 64, 128)
mu = MuP(lambda width: DiT(heads=width // 16, head_dim=16, depth=2, num_labels=3, base_size=8), base=32)


def ready(width):
    model = mu.model(width)
    return model, torch.optim.AdamW(mu.groups(model, rate=2e-3))


def loss(model, step):
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(step))
    return (model(x, torch.full((8,), 0.5), Cond(label=torch.arange(8) % 3)) - x).square().mean()


found = coordinate_check(ready, loss, WIDTHS, steps=2)
layer, slope = found.steepest()
print(f"steepest: {layer}, slope {slope:+.2f}")
axes = (figure := Figure()).add_subplot()
for steps in found.sizes.values():
    axes.loglog(WIDTHS, [steps[-1][width] for width in WIDTHS])
Path("out").mkdir(exist_ok=True)
figure.savefig("out/coordinates.png")
mu.fold(mu.model(128, seed=0)).save_pretrained("out/wide")
