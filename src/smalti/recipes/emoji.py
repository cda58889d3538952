"""The model `emoji`: text to 64-pixel pictures in four drawing styles, from nothing.

An autoencoder learns the pictures, all of them are encoded once, all captions are embedded once, and a joint-attention
transformer learns flow matching on the latents. `cpu`: 8 x 8 tokens and the concepts of six topics, for two
cores; `gpu`: 16 x 16 tokens, all concepts, skin tones too.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import unknown_name
from smalti.core.files import atomic_folder, check_writable
from smalti.core.protocols import Latents
from smalti.data.emoji import STYLES, EmojiSet, captions, load_emoji
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.evaluation.emoji_metrics import emoji_metrics
from smalti.evaluation.sheet import sheet
from smalti.objectives.flow_matching import FlowMatching
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.autoencoder import fit_autoencoder, reconstruction_psnr, shift_picture
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource, embed_captions
from smalti.training.processes import join_processes
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model, save_model, settings_hash, weights_hash

BACKBONES = {"mmdit": MMDiT, "dit": DiT}
SHIFTS = ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2))
TOPICS_CPU = ("smileys", "animals", "food", "hearts", "clocks", "weather")
GRID_PROMPTS = (
    "red apple", "green apple", "red heart", "blue heart", "cat face", "dog face", "slice of pizza", "three o'clock",
    "grinning face", "crying face", "angry face", "sun", "cloud with rain", "banana", "fish", "a purple heart",
)  # fmt: skip


@dataclass(frozen=True)
class EmojiRecipe:
    """Everything that decides the model.

    Args:
        topics: named subsets of the concepts that the transformer learns; none = all. The autoencoder learns all.
        styles: drawing styles.
        variant: of the data set: none = the one that ships, emoji-tones = with skin tones.
        text_length: tokens of a prompt.
        autoencoder: arguments of `ConvAutoencoder`.
        autoencoder_training: its training.
        transformer: arguments of the backbone; channels, text widths and labels follow from the rest.
        training: the transformer's training.
        objective: path, times and weights of the transformer's loss.
        guidance: default guidance scale of the pipeline.
        size: of the pictures in pixels; the data set's variant has it.
        start: model of the zoo whose autoencoder is kept and whose transformer is trained on; none = from nothing.
        backbone: mmdit, or dit with cross-attention to the text.
        autoencoder_of: model of the zoo whose autoencoder is kept; none = that of `start`, or a new one.
        measured: held-out (concept, style) pairs that are drawn and judged at the end.
    """

    topics: tuple[str, ...] | None
    autoencoder: dict[str, Any]
    autoencoder_training: TrainConfig
    transformer: dict[str, Any]
    training: TrainConfig
    styles: tuple[str, ...] = STYLES
    variant: str | None = None
    text_length: int = 16
    objective: FlowMatching = field(default_factory=FlowMatching)
    guidance: float = 3.0
    size: int = 64
    start: str | None = None
    measured: int = 400
    backbone: Literal["mmdit", "dit"] = "mmdit"
    autoencoder_of: str | None = None

    def __post_init__(self):
        if self.backbone not in BACKBONES:
            raise unknown_name("backbone", self.backbone, BACKBONES)


PRESETS = {
    "cpu": EmojiRecipe(
        topics=TOPICS_CPU,
        autoencoder={"factor": 8, "latent_channels": 16},
        autoencoder_training=TrainConfig(
            steps=2000, batch=16, learning_rate=2e-3, warmup=50, decay="linear-cooldown", ema=0.99
        ),
        transformer={"num_double": 1, "num_single": 4, "heads": 6, "head_dim": 32, "axes_dims_rope": (8, 12, 12)},
        training=TrainConfig(
            steps=5000, batch=64, learning_rate=1.5e-3, warmup=100, decay="linear-cooldown",
            ema=0.998, sample_every=500, eval_every=250, save_every=100,
        ),
    ),
    "gpu": EmojiRecipe(
        topics=None,
        variant="emoji-tones",
        autoencoder={
            "factor": 4, "latent_channels": 8,
            "widths": (48, 128), "encoder_blocks": (1, 1), "decoder_blocks": (2, 2),
        },
        autoencoder_training=TrainConfig(
            steps=3000, batch=16, learning_rate=2e-3, warmup=50, decay="linear-cooldown", ema=0.99
        ),
        transformer={"num_double": 1, "num_single": 5, "heads": 8, "head_dim": 32, "axes_dims_rope": (8, 12, 12)},
        training=TrainConfig(
            steps=30000, batch=512, learning_rate=1.5e-3, optimizer="muon", warmup=500, decay="linear-cooldown",
            ema=0.9995, precision="bf16", compile=True, sample_every=1000, eval_every=500, patience=10,
        ),
    ),
}  # fmt: skip


def train(recipe: EmojiRecipe, out: Path, resume: bool = False, name: str = "emoji") -> Path:
    """Trains autoencoder and transformer and writes the pipeline.

    Args:
        recipe: one of `PRESETS`, or one's own.
        name: of the recipe.
        out: folder for everything: `autoencoder`, `transformer` (log, checkpoints, samples), `model` (the result).
        resume: go on where an earlier call in `out` was stopped.

    Returns:
        The folder of the model.
    """
    check_writable(out)
    processes = join_processes()
    autoencoder = train_autoencoder(recipe, out, resume)
    pictures = load_emoji("train", styles=recipe.styles, topics=recipe.topics, variant=recipe.variant)
    held_out = load_emoji("held-out", styles=recipe.styles, topics=recipe.topics, variant=recipe.variant)
    with processes.main_process_first():  # the others find the caches
        encoder = EmbeddingCache(MiniLMEncoder(length=recipe.text_length), out / "cache" / "text")
        source = latent_source(autoencoder, pictures, encoder, recipe.styles, out / "cache", SHIFTS)
        unseen = latent_source(autoencoder, held_out, encoder, recipe.styles, out / "cache")
    torch.manual_seed(recipe.training.seed)
    pipe = TextToImagePipeline(
        transformer=build_transformer(recipe, encoder.width, autoencoder.latent_channels),
        autoencoder=autoencoder,
        scheduler=make_scheduler("euler"),
        text_encoder="minilm",
        text_length=recipe.text_length,
        styles=list(recipe.styles),
        size=recipe.size,
        default_guidance=recipe.guidance,
    )

    def draw(ema_model: torch.nn.Module, step: int, folder: Path) -> None:
        pipe.register_modules(transformer=ema_model)
        draw_grid(pipe, recipe.styles).save(folder / f"step-{step:06d}.png")

    card = {"recipe": name, "start": recipe.start, "data_hash": pictures.hash, "autoencoder": weights_hash(autoencoder)}
    trainer = Trainer(
        pipe.transformer, recipe.objective, source, recipe.training, out / "transformer",
        held_out=unseen, on_sample=draw, description=card,
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    if processes.is_main_process:
        pipe.register_modules(transformer=trainer.ema_model.eval())
        settings = asdict(recipe)
        card |= {"settings": settings, "settings_hash": settings_hash(settings)}
        card |= {"images_seen": report.steps * recipe.training.batch}
        card |= {"held_out_loss": report.held_out_loss, "ended": report.ended}
        card |= {
            "metrics": emoji_metrics(pipe, recipe.topics, recipe.measured, variant=recipe.variant),
            "autoencoder_psnr": held_out_psnr(autoencoder, recipe),
        }
        save_model(pipe, out / "model", card, torch.bfloat16)
    processes.wait_for_everyone()
    return out / "model"


def train_autoencoder(recipe: EmojiRecipe, out: Path, resume: bool = False) -> ConvAutoencoder:
    """The trained autoencoder of `out / "autoencoder"`; trains it on all concepts if it is not there yet.

    A recipe that starts from a model, or names one, has that model's.
    """
    kept = recipe.autoencoder_of or recipe.start
    if kept is not None:
        return load_model(kept).autoencoder.eval()
    folder = out / "autoencoder"
    if not (folder / "config.json").is_file():
        torch.manual_seed(recipe.autoencoder_training.seed)
        model = ConvAutoencoder(**recipe.autoencoder)
        pictures = load_emoji("train", styles=recipe.styles)
        fit_autoencoder(model, pictures, recipe.autoencoder_training, out / "autoencoder-training", resume=resume)
        with join_processes().main_process_first():
            if join_processes().is_main_process:
                with atomic_folder(folder) as temporary:
                    model.save_pretrained(temporary)
    return ConvAutoencoder.from_pretrained(folder, torch_dtype=torch.float32).eval()


def held_out_psnr(autoencoder: ConvAutoencoder, recipe: EmojiRecipe) -> float:
    """Mean PSNR in dB on the held-out concepts of all topics."""
    pictures = load_emoji("held-out", styles=recipe.styles, variant=recipe.variant)
    return round(reconstruction_psnr(autoencoder, pictures), 2)


def build_transformer(recipe: EmojiRecipe, text_width: int, channels: int) -> MMDiT | DiT:
    """The untrained transformer for latents of so many channels, or the one that the recipe starts from."""
    if recipe.start is not None:
        return load_model(recipe.start).transformer
    return BACKBONES[recipe.backbone](
        in_channels=channels,
        text_dim=text_width,
        pooled_dim=text_width,
        num_labels=len(recipe.styles),
        **recipe.transformer,
    )


def latent_source(
    autoencoder: Any,
    pictures: EmojiSet,
    encoder: EmbeddingCache,
    styles: Sequence[str],
    cache: Path,
    shifts: Sequence[tuple[int, int]] = ((0, 0),),
    is_drawn: bool = False,
) -> LatentSource:
    """Latents of the pictures (once for each shift), embeddings of all their captions, styles as labels.

    With `is_drawn` a sample is drawn from its posterior each time it is seen; otherwise it is the mean.
    """

    def table(down: int, right: int, read: Callable[[Latents], Tensor], *name: str) -> LatentCache:
        def encode(indices: Tensor) -> Tensor:
            shifted = [shift_picture(picture, down, right) for picture in pictures.pixels(indices)]
            return read(autoencoder.encode(torch.stack(shifted)))

        keys = [f"{item.key}:{item.style}" for item in pictures.items]
        key = cache_key(pictures.hash, weights_hash(autoencoder), down, right, *keys, *name)
        return build_cache(cache, key, len(pictures), encode, progress=True)

    def deviation(latents: Latents) -> Tensor:
        return (0.5 * latents.statistics["logvar"]).exp() / autoencoder.latents_std[:, None, None]

    return LatentSource(
        views=[table(*shift, lambda latents: latents.tensor) for shift in shifts],
        deviations=[table(*shift, deviation, "deviation") for shift in shifts] if is_drawn else None,
        captions=embed_captions([captions(item) for item in pictures.items], encoder),
        labels=torch.tensor([list(styles).index(item.style) for item in pictures.items]),
        dropped_label=len(styles),
    )


def draw_grid(pipe: TextToImagePipeline, styles: Sequence[str], prompts: Sequence[str] = GRID_PROMPTS) -> Image.Image:
    """A sheet of all prompts, the styles taking turns, always from the same seeds."""
    chosen = [styles[index % len(styles)] for index in range(len(prompts))]
    pictures = draw_pictures(pipe, prompts, chosen, range(len(prompts)))
    return sheet(pictures, [f"{prompt}, {style}" for prompt, style in zip(prompts, chosen, strict=True)])
