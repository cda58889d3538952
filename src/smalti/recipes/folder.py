"""A model of one's own from a folder of pictures: captions, labels of sub-folders, or neither.

The autoencoder that ships is measured on the pictures first and fine-tuned on them only where it falls short. Captions
train a joint-attention transformer, labels (or nothing) a plain diffusion transformer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.files import check_writable
from smalti.core.seeds import generators_for
from smalti.data.folder import FolderSet, load_folder
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.evaluation.copies import copy_report
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.sheet import from_images, sheet
from smalti.objectives.flow_matching import FlowMatching
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.diffusers_autoencoder import DiffusersAutoencoder
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.autoencoder import fit_autoencoder, reconstruction_psnr
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource, embed_captions
from smalti.training.messages import say
from smalti.training.trainer import Trainer
from smalti.zoo.loader import model_folder, save_model, settings_hash, weights_hash

MEASURED = 64
GRID = 16
FEW = 1000


@dataclass(frozen=True)
class FolderRecipe:
    """Everything that decides the model.

    Args:
        data: the folder.
        size: side of the square pictures, 64 to 512; others go to buckets of about this area.
        tokenizer: folder of any diffusers autoencoder; none = the one that ships.
        enough: PSNR in dB from which the shipped autoencoder is used as it is.
        autoencoder_training: its fine-tuning where it falls short.
        transformer: arguments of `MMDiT` (captions) or `DiT` (labels, nothing); the two share these names.
        training: the transformer's training.
        text_length: tokens of a prompt.
        objective: path, times and weights of the loss.
        guidance: default guidance scale of the pipeline.
    """

    training: TrainConfig
    transformer: dict[str, Any]
    data: str = ""
    size: int = 64
    tokenizer: str | None = None
    enough: float = 28.0
    autoencoder_training: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=600, batch=8, learning_rate=5e-4, warmup=20, decay="linear-cooldown", ema=0.98
        )
    )
    text_length: int = 32
    objective: FlowMatching = field(default_factory=FlowMatching)
    guidance: float = 2.0


PRESETS = {
    "cpu": FolderRecipe(
        transformer={"heads": 6, "head_dim": 32},
        training=TrainConfig(
            steps=1200, batch=32, learning_rate=1.5e-3, warmup=50, decay="linear-cooldown",
            ema=0.99, save_every=200, sample_every=300,
        ),
    ),
    "gpu": FolderRecipe(
        transformer={"heads": 8, "head_dim": 32},
        training=TrainConfig(
            steps=20000, batch=256, learning_rate=1.5e-3, optimizer="muon", warmup=500, decay="linear-cooldown",
            ema=0.999, precision="bf16", compile=True, save_every=1000, sample_every=1000,
        ),
    ),
}  # fmt: skip


def train(recipe: FolderRecipe, out: Path, resume: bool = False) -> Path:
    """Trains on the folder and writes the pipeline to `out / "model"`, whose path it returns.

    Raises:
        UserError: a folder that cannot be used, a place that cannot be written, a checkpoint of another training.
    """
    check_writable(out)
    if (out / "model").exists() and not resume:
        raise UserError(f"{out} already holds a model; go on with --resume, or choose another --out")
    base, factor = _base_autoencoder(recipe)
    pictures = load_folder(recipe.data, recipe.size, factor, progress=True)
    for one in pictures.skipped:
        say(f"skipped {one.file}: {one.reason}")
    if len(pictures) < FEW:
        say(f"{len(pictures)} pictures are few: the model will draw these again rather than new ones of their kind")
    autoencoder = fitted_autoencoder(recipe, base, pictures, out, resume)
    source = latent_source(recipe, autoencoder, pictures, out / "cache")
    pipe = build_pipeline(recipe, autoencoder, pictures)

    def draw(ema_model: torch.nn.Module, step: int, folder: Path) -> None:
        pipe.register_modules(transformer=ema_model)
        sheet(draw_like(pipe, pictures, spread(len(pictures), GRID)), columns=8).save(folder / f"step-{step:06d}.png")

    settings = asdict(recipe)
    training = replace(recipe.training, batch=min(recipe.training.batch, max(2, len(pictures) // 2 * 2)))
    trainer = Trainer(
        pipe.transformer, recipe.objective, source, training, out / "transformer", on_sample=draw,
        description={"recipe": "folder", "data_hash": pictures.hash},
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    pipe.register_modules(transformer=trainer.ema_model.eval())
    metrics = memorising(pipe, pictures)
    card = {
        "recipe": "folder",
        "settings": settings,
        "settings_hash": settings_hash(settings),
        "data_hash": pictures.hash,
    }
    card |= {"images_seen": report.steps * training.batch, "loss": report.loss, "metrics": metrics}
    return save_model(pipe, out / "model", card)


def _base_autoencoder(recipe: FolderRecipe) -> tuple[ConvAutoencoder | DiffusersAutoencoder, int]:
    if recipe.tokenizer is None:
        base = ConvAutoencoder.from_pretrained(model_folder("emoji") / "autoencoder", torch_dtype=torch.float32)
    else:
        base = DiffusersAutoencoder.from_folder(recipe.tokenizer)
    return base.eval(), base.factor


def fitted_autoencoder(
    recipe: FolderRecipe,
    base: ConvAutoencoder | DiffusersAutoencoder,
    pictures: FolderSet,
    out: Path,
    resume: bool,
) -> ConvAutoencoder | DiffusersAutoencoder:
    """The autoencoder for these pictures, with statistics of its own: as given, or fine-tuned where it falls short."""
    folder = out / "autoencoder"
    if resume and (folder / "config.json").is_file():
        return type(base).from_pretrained(folder, torch_dtype=torch.float32).eval()
    some = spread(len(pictures), MEASURED)
    quality = reconstruction_psnr(base, pictures, some)
    if isinstance(base, ConvAutoencoder) and quality < recipe.enough:
        say(f"the autoencoder reaches {quality:.1f} dB on these pictures (enough: {recipe.enough:g}); fine-tuning it")
        groups = shape_groups(pictures)
        fit_autoencoder(
            base, pictures, recipe.autoencoder_training, out / "autoencoder-training",
            from_patches=False, resume=resume, groups=groups,
        )  # fmt: skip
        quality = reconstruction_psnr(base, pictures, some)
    else:
        base.measure_statistics(pictures.pixels([index]) for index in some)
    say(f"the autoencoder reaches {quality:.1f} dB on these pictures")
    base.save_pretrained(folder)
    return base


def shape_groups(pictures: FolderSet) -> list[Tensor]:
    """Indices of the pictures of each bucket."""
    shapes = sorted(set(pictures.shapes))
    return [torch.tensor([i for i, other in enumerate(pictures.shapes) if other == shape]) for shape in shapes]


def latent_source(
    recipe: FolderRecipe, autoencoder: ConvAutoencoder | DiffusersAutoencoder, pictures: FolderSet, cache: Path
) -> LatentSource:
    """Latents of all pictures with their captions or labels."""

    def encode(indices: Tensor) -> Tensor:
        return autoencoder.encode(pictures.pixels(indices)).tensor

    key = cache_key(pictures.hash, weights_hash(autoencoder))
    latents: LatentCache = build_cache(
        cache, key, len(pictures), encode, groups=pictures.shapes, batch=16, progress=True
    )
    captions = None
    if pictures.captions is not None:
        encoder = EmbeddingCache(MiniLMEncoder(length=recipe.text_length), cache / "text")
        captions = embed_captions([[caption] for caption in pictures.captions], encoder)
    labels = None if pictures.labels is None else torch.tensor(pictures.labels)
    return LatentSource([latents], captions, labels, len(pictures.label_names), shape_groups(pictures))


def build_pipeline(
    recipe: FolderRecipe, autoencoder: ConvAutoencoder | DiffusersAutoencoder, pictures: FolderSet
) -> TextToImagePipeline:
    """The untrained pipeline for what the pictures are conditioned on."""
    torch.manual_seed(recipe.training.seed)
    has_text = pictures.captions is not None
    if has_text:
        width = MiniLMEncoder(length=recipe.text_length).width
        transformer = MMDiT(
            in_channels=autoencoder.latent_channels, text_dim=width, pooled_dim=width, **recipe.transformer
        )
    else:
        transformer = DiT(
            in_channels=autoencoder.latent_channels, num_labels=len(pictures.label_names), **recipe.transformer
        )
    return TextToImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        scheduler=make_scheduler("euler"),
        text_encoder="minilm" if has_text else None,
        text_length=recipe.text_length,
        styles=list(pictures.label_names),
        size=recipe.size,
        default_guidance=recipe.guidance if has_text or pictures.label_names else 1.0,
    )


def draw_like(pipe: TextToImagePipeline, pictures: FolderSet, indices: Sequence[int]) -> list:
    """Pictures drawn from the captions or labels of these training pictures, always from the same seeds."""
    pipe.set_progress_bar_config(disable=True)
    prompts = [pictures.captions[index] for index in indices] if pictures.captions else [""] * len(indices)
    styles = [pictures.label_names[pictures.labels[index]] for index in indices] if pictures.labels else None
    images = pipe(prompts, style=styles, generator=generators_for(list(range(len(indices))))).images
    pipe.set_progress_bar_config(disable=None)
    return images


def memorising(pipe: TextToImagePipeline, pictures: FolderSet) -> dict[str, Any]:
    """How near the model's pictures lie to their training pictures; says so if nearer than these to each other."""
    try:
        extract = EfficientNetLite0()
        indices = spread(len(pictures), 2 * GRID)
        drawn = extract(from_images(draw_like(pipe, pictures, indices)))
    except UserError as error:
        say(f"not checked for memorising: {error}")
        return {}
    train_features = extract.of_batches(pictures.pixels([index]) for index in spread(len(pictures), FEW))
    if len(train_features) < 2:
        return {}
    report = copy_report(drawn, train_features)
    if report.is_memorised:
        say(
            f"the model memorises: its pictures lie {report.median_to_train:.2f} from the nearest training picture "
            f"(median), training pictures {report.median_between_train:.2f} from each other; more pictures would help"
        )
    return {
        "to nearest training picture": round(report.median_to_train, 3),
        "between training pictures": round(report.median_between_train, 3),
        "copied": round(report.share, 4),
    }
