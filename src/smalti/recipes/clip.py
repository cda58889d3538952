"""The model `clip`: text to animated emoji, a full 3-D joint-attention transformer on the frames of an autoencoder.

It begins with the weights of `emoji`, whose rotary positions have a channel group for frames that pictures leave at
zero: every frame starts as the picture that the model knows. `cpu`: 8 frames of 8 x 8 tokens, some topics, half an hour
on one core; `gpu`: 8 frames of the 16 x 16 tokens of `emoji` in that preset, all 734 clips. The data come by
`smalti data get clips`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smalti.backbones.mmdit import MMDiT
from smalti.core.files import check_writable
from smalti.data.clips import FRAMES, STYLE, load_clips
from smalti.data.emoji import EmojiSet, captions
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.evaluation.clip_metrics import clip_metrics, film
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import SHIFTS
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.autoencoder import shift_picture
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource, embed_captions
from smalti.training.processes import join_processes
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model, save_model, settings_hash, weights_hash

SHEET_PROMPTS = (
    "cat face",
    "face with tears of joy",
    "three o'clock",
    "dog",
    "winking face",
    "sun",
    "octopus",
    "crying face",
)


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides the model.

    Args:
        topics: named subsets of the concepts; none = all.
        frames: of a clip; it divides 16.
        training: of the transformer.
        start: model of pictures that gives autoencoder, text length and transformer: a name of the zoo or a folder.
        styles: the one style that is animated.
        objective: path, times and weights of the loss.
        guidance: default guidance scale of the pipeline.
        measured: held-out clips that are drawn and measured at the end.
    """

    topics: tuple[str, ...] | None
    training: TrainConfig
    frames: int = 8
    start: str = "emoji"
    styles: tuple[str, ...] = (STYLE,)
    objective: FlowMatching = field(default_factory=FlowMatching)
    guidance: float = 3.0
    measured: int = 32


PRESETS = {
    "cpu": ClipRecipe(
        topics=("smileys", "animals", "clocks", "weather"),
        training=TrainConfig(
            steps=1200, batch=8, learning_rate=5e-4, warmup=50, decay="linear-cooldown", ema=0.99,
            sample_every=300, eval_every=300, save_every=25,
        ),
    ),
    "gpu": ClipRecipe(
        topics=None,
        start="emoji",
        training=TrainConfig(
            steps=20000, batch=64, learning_rate=5e-4, optimizer="muon", warmup=200, decay="linear-cooldown", ema=0.999,
            precision="bf16", compile=True, sample_every=1000, eval_every=500, patience=10,
        ),
    ),
}  # fmt: skip


def train(recipe: ClipRecipe, out: Path, resume: bool = False) -> Path:
    """Trains the transformer and writes the pipeline.

    Args:
        recipe: one of `PRESETS`, or one's own.
        out: folder for everything: `transformer` (log, checkpoints, samples), `model` (the result).
        resume: go on where an earlier call in `out` was stopped.

    Returns:
        The folder of the model.
    """
    check_writable(out)
    processes = join_processes()
    start = load_model(recipe.start)
    clips, held_out = (load_clips(split, recipe.topics) for split in ("train", "held-out"))
    with processes.main_process_first():  # the others find the caches
        encoder = EmbeddingCache(MiniLMEncoder(length=start.config["text_length"]), out / "cache" / "text")
        source = clip_source(start.autoencoder, clips, recipe.frames, encoder, out / "cache", SHIFTS)
        unseen = clip_source(start.autoencoder, held_out, recipe.frames, encoder, out / "cache")
    torch.manual_seed(recipe.training.seed)
    pipe = TextToImagePipeline(
        transformer=one_style(start.transformer, list(start.config["styles"]).index(STYLE)),
        autoencoder=start.autoencoder,
        scheduler=make_scheduler("euler"),
        text_length=start.config["text_length"],
        styles=list(recipe.styles),
        size=start.config["size"],
        frames=recipe.frames,
        default_guidance=recipe.guidance,
    )

    def draw(ema_model: torch.nn.Module, step: int, folder: Path) -> None:
        pipe.register_modules(transformer=ema_model)
        draw_films(pipe).save(folder / f"step-{step:06d}.png")

    card: dict[str, Any] = {"recipe": "clip", "start": recipe.start, "data_hash": clips.hash}
    card |= {"autoencoder": weights_hash(start.autoencoder)}
    trainer = Trainer(
        pipe.transformer, recipe.objective, source, recipe.training, out / "transformer",
        held_out=unseen, on_sample=draw, description=card,
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    if processes.is_main_process:
        pipe.register_modules(transformer=trainer.ema_model.eval())
        settings = asdict(recipe)
        card |= {"settings": settings, "settings_hash": settings_hash(settings)}
        card |= {"clips_seen": report.steps * recipe.training.batch}
        card |= {"held_out_loss": report.held_out_loss, "ended": report.ended}
        card |= {"metrics": clip_metrics(pipe, held_out, recipe.measured)}
        save_model(pipe, out / "model", card, torch.bfloat16)
    processes.wait_for_everyone()
    return out / "model"


def one_style(transformer: Any, label: int) -> MMDiT:
    """The transformer with one of its styles left, and "none"."""
    model: Any = MMDiT.from_config({**transformer.config, "num_labels": 1})
    weights = transformer.state_dict()
    rows = torch.tensor([label, transformer.config["num_labels"]])
    name = "label_embedder.table.weight"
    model.load_state_dict({**weights, name: weights[name][rows]})
    return model


def clip_source(
    autoencoder: ConvAutoencoder,
    clips: EmojiSet,
    frames: int,
    encoder: EmbeddingCache,
    cache: Path,
    shifts: tuple[tuple[int, int], ...] = ((0, 0),),
) -> LatentSource:
    """Latents (C, F, h, w) of the clips: every so many frames, from each possible first one, once for each shift."""
    every = FRAMES // frames

    def table(first: int, down: int, right: int) -> LatentCache:
        def encode(indices: Tensor) -> Tensor:
            pixels = clips.pixels(indices)[:, :, first::every].transpose(1, 2).flatten(0, 1)  # (B*F, 3, S, S)
            shifted = torch.stack([shift_picture(picture, down, right) for picture in pixels])
            return autoencoder.encode(shifted).tensor.unflatten(0, (-1, frames)).transpose(1, 2)

        keys = [item.key for item in clips.items]
        key = cache_key(clips.hash, weights_hash(autoencoder), frames, first, down, right, *keys)
        return build_cache(cache, key, len(clips), encode, batch=16, progress=True)

    return LatentSource(
        views=[table(first, *shift) for first in range(every) for shift in shifts],
        captions=embed_captions([captions(item) for item in clips.items], encoder),
        labels=torch.zeros(len(clips), dtype=torch.long),
        dropped_label=1,
    )


def draw_films(pipe: TextToImagePipeline) -> Image.Image:
    """A sheet with the frames of each prompt in a row, always from the same seeds."""
    styles = [STYLE] * len(SHEET_PROMPTS)
    return film(draw_pictures(pipe, SHEET_PROMPTS, styles, range(len(SHEET_PROMPTS))), SHEET_PROMPTS)
