"""One arm of a claim on tokenizers: an autoencoder trained for a while, and how well a denoiser learns on its latents.

Autoencoders of 8 x 8 latents differ in channels and in whether their latents were aligned with a vision model; each is
trained once from the same seed and kept. The denoiser is the same LightningDiT with the same steps on all of them;
latents are normalised channel by channel. All pictures of emoji, split by concept.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from smalti.backbones.lightning_dit import LightningDiT
from smalti.core.catalogue import entry, fingerprint
from smalti.core.files import atomic_folder
from smalti.core.protocols import Batch, Cond
from smalti.data.emoji import STYLES
from smalti.data.latent_cache import LatentCache
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.reconstruction import reconstruction_report
from smalti.evaluation.uniformity import latent_uniformity
from smalti.objectives.cosine_velocity import CosineFlowMatching
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.time_sampling import Uniform
from smalti.recipes.emoji_arm import GRID, TEXT_WIDTH, Trained, feature_tables, stock, stock_of, train_emoji_arm
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.training.autoencoder import CHUNK, MEASURED, Pictures, chunks
from smalti.training.config import TrainConfig
from smalti.training.latent_extraction import measure_channels
from smalti.training.tokenizer import TokenizerSettings, fit_tokenizer
from smalti.training.va_vae_lightningdit import VFLoss, paper_phases

FACTOR, WIDTHS, BATCH, RATE = 8, (32, 64, 96), 16, 1e-3
DEPTH, WIDTH, HEAD, DRAWN, STEPS = 6, 96, 32, 400, 20
LOSSES = TokenizerSettings(perceptual=0.0, critic=0.0)
"""Neither VGG nor a critic: they cost more than all the rest on a CPU, and no arm would have them alone."""


@dataclass(frozen=True)
class VAEArm:
    """An autoencoder.

    Args:
        channels: of its latents.
        teacher: that they are aligned with, a name that `load_teacher` knows; "" = none.
    """

    channels: int
    teacher: str = ""


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder from DiT to LightningDiT.

    Args:
        flags: of the model that are on.
        logit_normal: whether times are, else uniform.
        cosine: weight of the direction term.
    """

    flags: tuple[str, ...] = ("has_rms_norm", "has_swiglu", "has_rope")
    logit_normal: bool = True
    cosine: float = 1.0

    def model(self, channels: int) -> LightningDiT:
        """Fresh weights for latents of so many channels."""
        off = dict.fromkeys(("has_rms_norm", "has_swiglu", "has_rope"), False)
        return LightningDiT(
            in_channels=channels, depth=DEPTH, heads=WIDTH // HEAD, head_dim=HEAD, num_labels=len(STYLES),
            pooled_dim=TEXT_WIDTH, base_size=GRID[0], **off | dict.fromkeys(self.flags, True),
        )  # fmt: skip

    def objective(self) -> CosineFlowMatching:
        """Flow matching with this rung's times and direction term."""
        return CosineFlowMatching(FlowMatching() if self.logit_normal else FlowMatching(Uniform()), self.cosine)


@dataclass(frozen=True)
class TaughtPictures:
    """A `SampleSource` of pictures with a teacher's features of them; they are not shifted, so that places agree.

    Args:
        pictures: where the pixels come from.
        features: (N, T, Dz) of the same pictures by name.
    """

    pictures: Pictures
    features: dict[str, LatentCache] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """Pictures `indices` (B,) as x0 (B, 3, H, W), features in `cond.extra`."""
        extra = {name: table[indices] for name, table in self.features.items()}
        return Batch(self.pictures.pixels(indices.tolist()), Cond(extra=extra), indices)


def shelf(scratch: Path, slug: str) -> Path:
    """A folder for the autoencoders of a claim, another one as soon as anything that it rests on changes."""
    content = json.dumps(fingerprint(entry(slug)), sort_keys=True)
    return scratch / f"autoencoders-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def autoencoder(name: str, arm: VAEArm, steps: int, folder: Path) -> ConvAutoencoder:
    """The trained autoencoder of an arm; trains it if it is not there yet.

    Args:
        name: of the arm.
        arm: channels and teacher.
        steps: of its training, in the paper's three phases if it has a teacher.
        folder: where autoencoders are kept.
    """
    place = folder / f"{name} {steps}".replace(" ", "-")
    if not (place / "config.json").is_file():
        with atomic_folder(place) as temporary:
            _train(arm, steps).save_pretrained(temporary)
    return ConvAutoencoder.from_pretrained(place, torch_dtype=torch.float32).eval()


def _train(arm: VAEArm, steps: int) -> ConvAutoencoder:
    shared = stock()
    pictures = shared.train_pictures
    torch.manual_seed(0)
    model = ConvAutoencoder(FACTOR, arm.channels, WIDTHS, (1, 1, 1), (1, 1, 1))
    some = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:MEASURED].tolist()
    model.start_from_patches(pictures.pixels(some))
    terms, features = [], {}
    if arm.teacher:
        features["teacher"] = feature_tables(arm.teacher)[0]
        first, *later = paper_phases(steps).items()
        terms.append(VFLoss(arm.channels, features["teacher"].shape(0)[-1], first[1], later=dict(later)))
    config = TrainConfig(
        steps=steps, batch=BATCH, learning_rate=RATE, warmup=min(50, steps), ema=0.99, save_every=10**6, log_every=50
    )
    source = TaughtPictures(pictures, features)
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as out:
        fit_tokenizer(model, pictures, config, Path(out), LOSSES, terms=terms, source=source)
    measure_channels(model, (pictures.pixels(chunk) for chunk in chunks(some, CHUNK)))
    return model


def judge(model: ConvAutoencoder, count: int = 256) -> dict[str, float]:
    """How well an autoencoder keeps held-out pictures, and how evenly its latents lie."""
    pictures = stock().held_out_pictures
    rows = spread(len(pictures), count)
    latents = torch.cat([model.encode(pictures.pixels(chunk)).tensor for chunk in chunks(rows, CHUNK)])
    return reconstruction_report(model, pictures, rows) | latent_uniformity(latents)


def train_on(model: ConvAutoencoder, rung: Rung, steps: int, seed: int) -> Trained:
    """Trains the small denoiser on the latents of an autoencoder."""
    torch.manual_seed(seed)
    config = TrainConfig(
        steps=steps, batch=32, learning_rate=2e-3, warmup=min(50, steps), decay="linear-cooldown", ema=0.99, seed=seed,
        betas=(0.9, 0.95), eval_every=steps, eval_samples=698, save_every=10**6,
    )  # fmt: skip
    return train_emoji_arm(
        rung.model(model.latent_channels), config, objective=rung.objective(), shared=stock_of(model)
    )
