"""The prompts on which claims about drawing are measured: captions of held-out emoji, never shown to the model."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smalti.core.seeds import generators_for
from smalti.data.emoji import load_emoji
from smalti.data.packages import cache_folder
from smalti.evaluation.emoji_metrics import spread
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.zoo.loader import model_card


@dataclass(frozen=True)
class Prompts:
    """Prompts with their drawing styles and seeds, one picture each."""

    texts: tuple[str, ...]
    styles: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int) -> "Prompts":
        """The first so many."""
        return Prompts(self.texts[:count], self.styles[:count], self.seeds[:count])


def held_out_prompts(model: str, count: int, first_seed: int = 0) -> Prompts:
    """Evenly spread captions of held-out concepts of the topics that a model of the zoo was trained on."""
    settings = model_card(model).get("settings", {})
    held_out = load_emoji("held-out", settings.get("styles"), settings.get("topics"))
    items = [held_out.items[index] for index in spread(len(held_out), count)]
    seeds = tuple(range(first_seed, first_seed + len(items)))
    return Prompts(tuple(item.label for item in items), tuple(item.style for item in items), seeds)


def draw_latents(pipe: TextToImagePipeline, prompts: Prompts, steps: int, **settings: Any) -> Tensor:
    """Final latents (B, C, h, w), of clips (B, C, F, h, w), of all prompts in one batch; embeddings are cached, so that
    only drawing costs."""
    if pipe.config["text_encoder"] == "minilm" and not isinstance(pipe.text, EmbeddingCache):
        encoder = MiniLMEncoder(length=pipe.config["text_length"])
        pipe.use_text_encoder(EmbeddingCache(encoder, cache_folder() / "text"))
    generator = generators_for(prompts.seeds)
    result: Any = pipe(
        list(prompts.texts), style=list(prompts.styles), generator=generator, num_inference_steps=steps,
        output_type="latent", return_dict=False, **settings,
    )  # fmt: skip
    return result[0]
