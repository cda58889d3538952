"""Training samples that a model draws itself: prompts to its pictures, cached as latents, with text embeddings.

A student that shall do what its teacher does needs no other data than the teacher's. Every picture is drawn once from
its prompt, style and seed, encoded by the autoencoder, and kept as mean and deviation of the posterior, from which a
sample is drawn each time it is seen.

Source: CLEAR (arXiv 2412.16112), section 3.4: 10,000 pictures of the teacher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.data.latent_cache import build_cache, cache_key
from smalti.sampling.pictures import BATCH
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.training.latent_source import LatentSource, embed_captions
from smalti.zoo.loader import weights_hash


def self_generated(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    styles: Sequence[str] | None,
    cache: Path,
    steps: int,
    guidance: float | None = None,
    first_seed: int = 0,
    text_dropout: float = 0.1,
) -> LatentSource:
    """Draws one picture for each prompt, or finds them in the cache.

    Args:
        pipe: the teacher.
        prompts: one a sample.
        styles: one a sample, or None.
        cache: folder of the latents.
        steps: of sampling.
        guidance: None = the pipeline's.
        first_seed: of the first sample; the others follow.
        text_dropout: how often prompt, and style, are dropped when a sample is seen.
    """
    known = {"steps": steps, "guidance": guidance, "seed": first_seed, "size": pipe.config["size"]}
    teacher, tokenizer = weights_hash(pipe.transformer), weights_hash(pipe.autoencoder)
    key = cache_key("self-generated", teacher, tokenizer, *map(str, known.values()), *prompts, *(styles or ()))
    channels = pipe.autoencoder.config["latent_channels"]

    def encode(indices: Tensor) -> Tensor:
        chosen = indices.tolist()
        style: Any = None if styles is None else [styles[i] for i in chosen]
        drawn: Any = pipe(
            [prompts[i] for i in chosen], style=style,
            generator=generators_for([first_seed + i for i in chosen]), num_inference_steps=steps,
            guidance_scale=guidance, output_type="pt", return_dict=False,
        )[0]  # fmt: skip
        latents = pipe.autoencoder.encode(drawn * 2 - 1)
        deviation = (0.5 * latents.statistics["logvar"]).exp() / pipe.autoencoder.latents_std[:, None, None]
        return torch.cat([latents.tensor, deviation], dim=1)

    table = build_cache(cache, key, len(prompts), encode, batch=BATCH, progress=len(prompts) > 4 * BATCH)
    both: Any = table[torch.arange(len(prompts))]  # (S, 2 C, h, w)
    names, text = list(pipe.config["styles"]), pipe.text
    if text is None:
        raise UserError("this pipeline has no text encoder, so it draws nothing from prompts; give one that has")
    return LatentSource(
        views=[both[:, :channels]],
        deviations=[both[:, channels:]],
        captions=embed_captions([[one] for one in prompts], text),
        labels=None if styles is None else torch.tensor([names.index(one) for one in styles]),
        dropped_label=len(names),
        text_dropout=text_dropout,
        label_dropout=text_dropout,
    )
