"""Pictures larger than a model was trained for: its own picture, enlarged, noised again, and finished at full size.

The base picture has the composition; its enlargement is noised to the time `strength` and carried back to data at the
larger size, where attention may be made local, because nothing but detail is left to draw. So many tokens need help:
slower rotary angles (NTK: the base theta times a factor), a schedule shifted towards noise, stronger guidance, and a
sharper softmax (`sampling.proportional_attention`).

Source: SDEdit (arXiv 2108.01073), section 3; CLEAR (arXiv 2412.16112), section 4.1 and its settings at 2K and beyond.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate as resize

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.method import Method
from smalti.core.protocols import Latents
from smalti.core.seeds import derive_seed, generators_for, randn
from smalti.core.time import interpolate
from smalti.sampling.conditions import check_size, expand_request, label_conditions, text_conditions
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.proportional_attention import ProportionalAttention
from smalti.sampling.schedulers import solver_for
from smalti.sampling.shift import uniform_schedule
from smalti.seams.apply import apply

Stage = Callable[..., AbstractContextManager[Any]]
"""Called with methods: puts them, and whatever else the larger size wants, on the pipeline for as long as it lasts."""


@dataclass(frozen=True)
class FineSettings:
    """How the larger picture is drawn; the defaults are the paper's for FLUX.1-dev.

    The shift moves the start, too: 0.7 becomes 0.96 under a shift of 10, which leaves little of the base picture. A
    small model keeps its composition at a strength of 0.4 and a shift of 1.

    Args:
        strength: time to which the enlarged picture is noised, before the shift, in (0, 1).
        steps: from there to the picture.
        shift: of their schedule.
        guidance: scale.
        ntk: factor on the base of the rotary angles.
        is_proportional: whether scores are scaled by the length of the sequence.

    Raises:
        UserError: a setting out of range.
    """

    strength: float = 0.7
    steps: int = 20
    shift: float = 10.0
    guidance: float = 7.5
    ntk: float = 10.0
    is_proportional: bool = True

    def __post_init__(self):
        if not 0 < self.strength < 1 or not self.ntk > 0:
            raise UserError(
                f"got strength={self.strength}, ntk={self.ntk}; give a time within (0, 1), a factor above 0"
            )


def coarse_to_fine(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    styles: Sequence[str] | None,
    seeds: Sequence[int],
    size: int,
    settings: FineSettings | None = None,
    stage: Stage | None = None,
    **base: Any,
) -> list[Image.Image]:
    """Draws pictures at the model's own size and then at a larger one.

    Args:
        pipe: of pictures.
        prompts: one a picture.
        styles: one a picture, or None.
        seeds: one a picture.
        size: side of the pictures in pixels.
        settings: of the second stage.
        stage: enters the second stage; None = `apply` on this pipeline. A student's: `partial(distilled, pipe, name)`.
        base: of the first stage, as for the pipeline.

    Raises:
        UserError: a size that the model cannot draw.
        Refusal: a pipeline of clips, or rotary angles asked of a model that has none.

    Example:
        >>> with_circle = lambda *methods: apply(pipe, CLEAR(radius=8), *methods)
        >>> pictures = coarse_to_fine(pipe, ["a red apple"], ["noto"], [0], size=256, stage=with_circle)
    """
    if pipe.config["frames"]:
        raise Refusal("this pipeline draws clips; coarse_to_fine draws pictures")
    settings = settings or FineSettings()
    check_size({"size": size}, pipe.autoencoder.config["factor"] * pipe.transformer.config.get("patch_size", 1))
    style: Any = None if styles is None else list(styles)
    generators = generators_for(seeds)
    pictures: Any = pipe(
        list(prompts), style=style, generator=generators, output_type="pt", return_dict=False, **base
    )[0]  # fmt: skip
    with torch.no_grad():
        return _refine(pipe, pictures, list(prompts), style, seeds, size, settings, stage)


def _refine(
    pipe: TextToImagePipeline,
    pictures: Tensor,
    prompts: list[str],
    style: Any,
    seeds: Sequence[int],
    size: int,
    settings: FineSettings,
    stage: Stage | None,
) -> list[Image.Image]:
    device = pictures.device
    large = resize(pictures, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    x0 = pipe.autoencoder.encode(large * 2 - 1).tensor
    schedule = uniform_schedule(settings.steps, settings.shift, start=settings.strength)
    noise = randn(x0.shape, generators_for([derive_seed("coarse-to-fine", seed) for seed in seeds]), device)
    request = expand_request(prompts, style, 1)
    if pipe.text is None:
        conditions = label_conditions(request, pipe.config["styles"], pipe.num_labels)
    else:
        conditions = text_conditions(request, pipe.text, pipe.config["styles"], pipe.num_labels)
    text = 0 if conditions.cond.text is None else conditions.cond.text.shape[1]
    trained = _tokens(pipe, pipe.config["size"])
    is_scaled = settings.is_proportional and trained != _tokens(pipe, size)
    methods = (ProportionalAttention(trained + text),) if is_scaled else ()
    with scaled_rope(pipe.transformer, settings.ntk), _entered(pipe, stage, methods, settings.steps):
        final = sample(
            pipe.transformer,
            interpolate(x0, noise, torch.full((len(x0),), schedule[0], device=device)),
            schedule,
            solver_for(pipe.scheduler, schedule),
            cond=conditions.cond.to(device),
            uncond=None if conditions.uncond is None else conditions.uncond.to(device),
            guidance=Guidance(settings.guidance if conditions.uncond is not None else 1.0),
            progress=None,
        )
    pixels = pipe.autoencoder.decode(Latents(final.x)).float().clamp(-1, 1) * 127.5 + 127.5
    return [Image.fromarray(one) for one in pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()]


@contextmanager
def scaled_rope(transformer: Any, factor: float) -> Iterator[None]:
    """NTK scaling: slower rotary angles, with theta times the factor, for as long as the context lasts.

    Raises:
        Refusal: the model has no rotary angles of ours.
    """
    if factor == 1:
        yield
        return
    if not isinstance(transformer, MMDiT):
        raise Refusal(f"{type(transformer).__name__} has no rotary angles that could be slowed down; set ntk=1")
    before = transformer.rope_theta
    transformer.rope_theta = before * factor
    try:
        yield
    finally:
        transformer.rope_theta = before


def _tokens(pipe: TextToImagePipeline, size: int) -> int:
    return (size // (pipe.autoencoder.config["factor"] * pipe.transformer.config.get("patch_size", 1))) ** 2


@contextmanager
def _entered(pipe: TextToImagePipeline, stage: Stage | None, methods: tuple[Method, ...], steps: int) -> Iterator[None]:
    """The second stage: methods on the pipeline, and its steps as one run."""
    if stage is None and not methods:
        yield
        return
    with (partial(apply, pipe) if stage is None else stage)(*methods) as handle, handle.run(steps=steps):
        yield
