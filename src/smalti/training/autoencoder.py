"""Training and measuring an autoencoder on pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from smalti.core.protocols import Batch, Cond
from smalti.core.seeds import rand
from smalti.objectives.reconstruction import AutoencoderReconstruction, psnr
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.diffusers_autoencoder import DiffusersAutoencoder
from smalti.training.config import TrainConfig
from smalti.training.trainer import Trainer, TrainReport

CHUNK = 32
MEASURED = 2048


class Pictures(Protocol):
    """Pictures by index: `pixels(indices)` gives (B, 3, H, W) in [-1, 1]."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class PixelSource:
    """A `SampleSource` of pictures, each shifted by up to `shift` pixels with its edge repeated.

    Args:
        pictures: where the pixels come from.
        shift: largest shift along each side in pixels.
        groups: indices of the pictures of each shape; a batch never mixes them. None = all have one shape.
    """

    pictures: Pictures
    shift: int = 4
    groups: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """Pictures `indices` (B,) as x0 (B, 3, H, W) without conditions."""
        pixels = self.pictures.pixels(indices.tolist())
        offsets = (rand((len(indices), 2), generators) * (2 * self.shift + 1)).long() - self.shift
        shifted = torch.stack([shift_picture(p, *map(int, o)) for p, o in zip(pixels, offsets, strict=True)])
        return Batch(shifted, Cond(), indices)


def shift_picture(picture: Tensor, down: int, right: int) -> Tensor:
    """A picture (3, H, W) moved by whole pixels; what enters repeats the edge."""
    reach = max(abs(down), abs(right))
    if reach == 0:
        return picture
    padded = functional.pad(picture[None], (reach,) * 4, mode="replicate")[0]
    height, width = picture.shape[-2:]
    return padded[:, reach - down : reach - down + height, reach - right : reach - right + width]


def fit_autoencoder(
    model: ConvAutoencoder,
    pictures: Pictures,
    config: TrainConfig,
    out: Path,
    *,
    from_patches: bool = True,
    resume: bool = False,
    groups: Sequence[Tensor] | None = None,
) -> TrainReport:
    """Trains the autoencoder in place and measures its normalisation on the training pictures.

    Args:
        model: trained in place; ends with its averaged weights.
        pictures: the training pictures.
        config: steps, batch and rates.
        out: folder of log and checkpoints.
        from_patches: begin at the principal components of 2,048 pictures instead of the model's own weights.
        resume: go on from the last checkpoint in `out`.
        groups: see `PixelSource`; pictures in none of them are left out.
    """
    used = torch.arange(len(pictures)) if groups is None else torch.cat(list(groups))
    order = torch.randperm(len(used), generator=torch.Generator().manual_seed(config.seed))
    some = used[order[:MEASURED]].tolist()
    if from_patches:
        model.start_from_patches(torch.cat(list(_same_size_patches(pictures, some, model.factor))))
    objective = AutoencoderReconstruction(model.factor, model.latent_channels)
    trainer = Trainer(model, objective, PixelSource(pictures, groups=groups), config, out)
    report = trainer.fit(resume=resume)
    model.load_state_dict(trainer.ema_model.state_dict())
    model.eval()
    model.measure_statistics(pictures.pixels(chunk) for chunk in chunks(some, 1 if groups else CHUNK))
    return report


def _same_size_patches(pictures: Pictures, indices: Sequence[int], factor: int) -> Iterator[Tensor]:
    """Pictures cut into columns one patch wide, so that pictures of several shapes stack."""
    for index in indices:
        pixels = pictures.pixels([index])[0]  # (3, H, W)
        yield pixels.unfold(1, factor, factor).unfold(2, factor, factor).permute(1, 2, 0, 3, 4).flatten(0, 1)


@torch.no_grad()
def reconstruction_psnr(
    model: ConvAutoencoder | DiffusersAutoencoder, pictures: Pictures, indices: Sequence[int] | None = None
) -> float:
    """Mean PSNR in dB of the pictures after encode and decode; all pictures if no indices are given."""
    values = []
    for chunk in chunks(range(len(pictures)) if indices is None else indices, 1):
        pixels = pictures.pixels(chunk).to(model.device)
        values.append(psnr(model.decode(model.encode(pixels)), pixels))
    return torch.cat(values).mean().item()


def chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive pieces of at most `size`."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
