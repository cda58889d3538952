"""The student `clear-emoji-1k`: attention of `emoji-1k` distilled into circles of three tokens and pooled cells.

The teacher draws the training pictures itself, from captions that it was trained on; the student learns to predict and
attend as it does. What is kept is the difference of the attention projections and the pooling weights. `cpu`: 16 x 16
tokens, under half an hour on one core; `gpu`: for the preset of 32 x 32 tokens.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smalti.acceleration.clear import CLEAR, PoolWeights
from smalti.core.files import check_writable
from smalti.data.emoji import load_emoji
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.held_out_prompts import held_out_prompts
from smalti.seams.core_taps import CoreTaps
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.attention_deltas import deltas_of, save_deltas
from smalti.training.config import TrainConfig
from smalti.training.distill import distill, make_student, prediction_errors
from smalti.training.latent_source import LatentSource
from smalti.training.messages import say
from smalti.training.self_generated import self_generated
from smalti.zoo.loader import load_model, model_card, settings_hash, weights_hash

HELD_OUT = 64
HELD_OUT_SEED = 50_000


@dataclass(frozen=True)
class ClearRecipe:
    """Everything that decides the student.

    Args:
        training: of the student.
        model: the teacher, of the zoo or a folder.
        radius: of the circle in tokens.
        pool: side of the pooled cells; none = without.
        samples: pictures that the teacher draws.
        draw_steps: of their sampling.
        taps: attentions whose outputs are compared.
        fm, pred, attn: weights of the losses.
    """

    training: TrainConfig
    model: str = "emoji-1k"
    radius: float = 3
    pool: int | None = 4
    samples: int = 640
    draw_steps: int = 8
    taps: str = "single_blocks[::2]"
    fm: float = 1.0
    pred: float = 0.5
    attn: float = 0.5


PRESETS = {
    "cpu": ClearRecipe(
        TrainConfig(
            steps=300, batch=12, learning_rate=5e-4, warmup=15, decay="linear-cooldown", ema=0.98, weight_decay=0.0,
            save_every=100, eval_every=100, eval_samples=HELD_OUT,
        )
    ),
    "gpu": ClearRecipe(
        TrainConfig(
            steps=1000, batch=64, learning_rate=3e-4, warmup=50, decay="linear-cooldown", ema=0.99, weight_decay=0.0,
            save_every=500, eval_every=250, eval_samples=HELD_OUT,
        ),
        samples=4000,
        draw_steps=20,
        radius=4,
        taps="single_blocks[::3]",
    ),
}  # fmt: skip


def train(recipe: ClearRecipe, out: Path, resume: bool = False) -> Path:
    """Draws the samples, distils the student and writes its deltas.

    Args:
        recipe: one of `PRESETS`, or one's own.
        out: folder for everything: `cache`, `student` (log, checkpoints), `deltas` (the result).
        resume: go on where an earlier call in `out` was stopped.

    Returns:
        The folder of the deltas.
    """
    check_writable(out)
    pipe = load_model(recipe.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(EmbeddingCache(MiniLMEncoder(length=pipe.config["text_length"]), out / "cache" / "text"))
    source, unseen = samples(recipe, pipe, out / "cache")
    settings = {"radius": recipe.radius, "pool": recipe.pool}
    teacher = pipe.transformer
    weights = PoolWeights.of(teacher, recipe.pool) if recipe.pool else None
    # So few tokens are attended to faster under a mask; what is learned does not depend on how it is computed.
    method = CLEAR(**settings, weights=weights, backend="dense")
    untrained = CoreTaps(teacher, [CLEAR(**settings, backend="dense")])
    before = prediction_errors(untrained, teacher, unseen)
    trainer = distill(
        make_student(teacher, [method], recipe.taps), teacher, source, recipe.training, out / "student",
        losses={"fm": recipe.fm, "pred": recipe.pred, "attn": recipe.attn}, taps=recipe.taps, held_out=unseen,
        description={"recipe": "clear-emoji-1k", "samples": recipe.samples, "draw_steps": recipe.draw_steps},
    )  # fmt: skip
    report = trainer.fit(resume=resume)
    student: Any = trainer.ema_model.eval()
    after = prediction_errors(student, teacher, unseen)
    found = {"velocity error before": sum(before) / len(before), "velocity error after": sum(after) / len(after)}
    say(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    (learned,) = student.methods
    card = {
        "recipe": "clear-emoji-1k", "model": recipe.model, "teacher": weights_hash(teacher), "method": settings,
        "settings": asdict(recipe), "settings_hash": settings_hash(asdict(recipe)), "steps": report.steps,
        "seconds": round(report.seconds), "held_out_loss": report.held_out_loss, "metrics": found,
    }  # fmt: skip
    extra = {} if learned.weights is None else learned.weights.tensors()
    return save_deltas(deltas_of(student.denoiser, teacher, extra, card), out / "deltas")


def samples(recipe: ClearRecipe, pipe, cache: Path) -> tuple[LatentSource, LatentSource]:
    """Pictures of the teacher from captions that it knows, and from held-out ones."""
    settings = model_card(recipe.model).get("settings", {})
    known = load_emoji("train", settings.get("styles"), settings.get("topics"))
    items = [known.items[index % len(known)] for index in spread(max(len(known), recipe.samples), recipe.samples)]
    unseen = held_out_prompts(recipe.model, HELD_OUT)
    with torch.no_grad():
        train = self_generated(
            pipe, [item.label for item in items], [item.style for item in items], cache, recipe.draw_steps
        )
        return train, self_generated(
            pipe, unseen.texts, unseen.styles, cache, recipe.draw_steps, first_seed=HELD_OUT_SEED, text_dropout=0.0
        )
