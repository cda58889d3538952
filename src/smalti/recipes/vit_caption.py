"""The teacher `vit-caption`: a small vision transformer that learned emoji pictures from their captions.

The mean of its patch tokens is contrasted with the MiniLM vectors of the captions of training concepts; all styles, all
topics. It plays the part that CLIP has for large models.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from smalti.core.files import check_writable
from smalti.data.emoji import EmojiSet, captions, load_emoji
from smalti.evaluation.emoji_metrics import concept_numbers
from smalti.evaluation.judges import distractors
from smalti.objectives.caption_contrast import CaptionContrast, CaptionContrastModel
from smalti.recipes.vit_teacher import write_teacher
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.config import TrainConfig
from smalti.training.latent_source import embed_captions
from smalti.training.messages import is_main
from smalti.training.processes import join_processes
from smalti.training.trainer import Trainer
from smalti.training.view_source import ViewSource

TEXT_LENGTH = 32
CANDIDATES = 20


@dataclass(frozen=True)
class VitCaptionRecipe:
    """Everything that decides the teacher.

    Args:
        training: steps, batch and rates.
        encoder: arguments of `VisionTransformer` that differ from its defaults.
        keep: share of the patches that a training step sees, but for the last ones.
        whole: share of the steps, the last ones, that see all patches.
    """

    training: TrainConfig
    encoder: dict[str, Any] = field(default_factory=dict)
    keep: float = 0.5
    whole: float = 0.1


PRESETS = {
    "cpu": VitCaptionRecipe(
        training=TrainConfig(
            steps=2000, batch=128, learning_rate=1e-3, warmup=100, decay="linear-cooldown", optimizer="muon",
            weight_decay=0.1, ema=0.998, save_every=100, eval_every=250, eval_samples=698,
        ),
    ),
    "gpu": VitCaptionRecipe(
        training=TrainConfig(
            steps=6000, batch=512, learning_rate=1e-3, warmup=200, decay="linear-cooldown", optimizer="muon",
            weight_decay=0.1, ema=0.998, precision="bf16", save_every=500, eval_every=250, eval_samples=698,
        ),
    ),
}  # fmt: skip


def train(recipe: VitCaptionRecipe, out: Path, resume: bool = False) -> Path:
    """Trains the encoder and writes it.

    Args:
        recipe: one of `PRESETS`, or one's own.
        out: folder for everything: `cache`, `training` (log, checkpoints), `model` (the result).
        resume: go on where an earlier call in `out` was stopped.

    Returns:
        The folder of the model.
    """
    check_writable(out)
    pictures, held_out = load_emoji("train"), load_emoji("held-out")
    with join_processes().main_process_first():  # the others find the cache
        text = EmbeddingCache(MiniLMEncoder(length=TEXT_LENGTH), out / "cache" / "text")
        source, unseen = captioned(pictures, text), captioned(held_out, text, shift=0.0, zoom=(1.0, 1.0))
    torch.manual_seed(recipe.training.seed)
    encoder = VisionTransformer(**recipe.encoder)
    model = CaptionContrastModel(encoder, encoder.width, text.width)
    whole_from = round(recipe.training.steps * (1 - recipe.whole))
    objective = CaptionContrast(encoder.base_size**2, recipe.keep, whole_from)
    trainer = Trainer(
        model, objective, source, recipe.training, out / "training", held_out=unseen,
        description={"recipe": "vit-caption", "data_hash": pictures.hash, "encoder": recipe.encoder},
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    if is_main():
        trained: Any = trainer.ema_model.eval()
        found = {"first of 20 captions": round(retrieval(trained, held_out, unseen), 4)}
        write_teacher(trained.encoder, recipe, "vit-caption", pictures.hash, report, out, **found)
    join_processes().wait_for_everyone()
    return out / "model"


def captioned(pictures: EmojiSet, text: EmbeddingCache, **views: Any) -> ViewSource:
    """Views of the pictures with the sentence vectors of all their captions."""
    embedded = embed_captions([captions(item) for item in pictures.items], text)
    return ViewSource(pictures, concept_numbers(pictures), embedded.text.pooled, embedded.rows, **views)


@torch.no_grad()
def retrieval(model: CaptionContrastModel, pictures: EmojiSet, source: ViewSource) -> float:
    """Share of pictures whose own label comes first among 20, the others drawn as for the judge of emoji."""
    assert source.text is not None
    assert source.rows is not None
    starts = range(0, len(pictures), 64)
    parts = [model(pictures.pixels(range(i, min(i + 64, len(pictures))))).vectors for i in starts]
    vectors = functional.normalize(torch.cat(parts), dim=-1)
    plain = source.text[source.rows[:, 0]].float()  # the plain labels stand first
    labels: Tensor = functional.normalize(plain, dim=-1)
    wrong = distractors([item.label for item in pictures.items], CANDIDATES - 1, seed=0)
    candidates = torch.cat([labels[:, None], labels[wrong]], 1)  # (N, 20, T)
    scores = torch.einsum("nd,nkd->nk", vectors, candidates)
    return float((scores[:, 1:] < scores[:, :1]).all(1).float().mean())
