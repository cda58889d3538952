"""From prompts to pictures or clips: a diffusers pipeline around any of our backbones.

Saved are transformer, autoencoder and scheduler; the text encoder is named in the configuration and built when a prompt
comes, so a saved model stays small. Noise is drawn on the CPU, with one generator for each picture if so given: a
picture depends on its seed, not on its batch or device. The schedule is even in t and shifted towards noise by
`default_shift`, more for more tokens than the default size has (`sampling.shift`). A clip is drawn whole, its frames as
one more axis of the latents; the autoencoder of pictures decodes them one by one.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_pipeline import Mochi1LoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Generators, Latents, SolverState, TextEncoder
from smalti.core.seeds import randn
from smalti.core.time import timestep_from_time
from smalti.sampling.conditions import (
    Conditions,
    Label,
    check_size,
    expand_request,
    label_conditions,
    text_conditions,
)
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import SampleStep, sample
from smalti.sampling.schedulers import solver_for
from smalti.sampling.shift import shift_for_tokens, uniform_schedule
from smalti.tokenizers.text_encoder import MiniLMEncoder

TEXT_ENCODERS = {"minilm": MiniLMEncoder}
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


@dataclass
class ClipPipelineOutput(BaseOutput):
    """Clips: lists of pictures, or tensors and arrays as asked for."""

    frames: Any


# The mixin is diffusers' only LoRA loader that assumes nothing but a component named `transformer`.
class TextToImagePipeline(DiffusionPipeline, Mochi1LoraLoaderMixin):
    """Draws pictures from prompts, labels or nothing, as the transformer was trained.

    Args:
        transformer: one of our backbones, `(x, t, Cond) -> velocity`.
        autoencoder: pixels <-> latents, with `factor` and `latent_channels` in its configuration.
        scheduler: a flow scheduler, see `sampling.schedulers.make_scheduler`.
        text_encoder: "minilm", or None for a model without text.
        text_length: tokens a prompt is padded or cut to.
        styles: names of the model's labels by index.
        size: default height and width in pixels.
        frames: of a clip; 0 = the model draws pictures.
        default_steps, default_guidance: used where a call does not say.
        default_shift: shift of the schedule at the default size.

    Raises:
        UserError: the text encoder is unknown, or the styles do not fit the transformer.
    """

    model_cpu_offload_seq = "transformer->autoencoder"
    _callback_tensor_inputs = ["latents", "denoised"]

    def __init__(
        self,
        transformer: ModelMixin,
        autoencoder: ModelMixin,
        scheduler: Any,
        text_encoder: str | None = "minilm",
        text_length: int = 20,
        styles: list[str] | None = None,
        size: int = 64,
        frames: int = 0,
        default_steps: int = 28,
        default_guidance: float = 3.0,
        default_shift: float = 1.0,
    ):
        super().__init__()
        styles = list(styles or [])
        if text_encoder is not None and text_encoder not in TEXT_ENCODERS:
            raise unknown_name("text encoder", text_encoder, TEXT_ENCODERS)
        if styles and len(styles) != transformer.config.get("num_labels", 0):
            raise UserError(
                f"got {len(styles)} styles for a transformer of {transformer.config.get('num_labels', 0)} labels; "
                "give one name for each"
            )
        self.register_modules(transformer=transformer, autoencoder=autoencoder, scheduler=scheduler)
        self.register_to_config(
            text_encoder=text_encoder,
            text_length=text_length,
            styles=styles,
            size=size,
            frames=frames,
            default_steps=default_steps,
            default_guidance=default_guidance,
            default_shift=default_shift,
        )
        self._text: TextEncoder | None = None
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As `DiffusionPipeline.from_pretrained`; imports the smalti classes that the model index names."""
        known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
        given = {key: kwargs[key] for key in known if kwargs.get(key) is not None}
        index: Any = cls.load_config(pretrained_model_name_or_path, **given)
        for value in index.values():  # diffusers resolves foreign classes among imported modules only
            if isinstance(value, list | tuple) and len(value) == 2 and str(value[0]).startswith("smalti."):
                importlib.import_module(value[0])
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether the running call has been asked to stop; set `pipe._interrupt = True` in a callback to ask."""
        return self._interrupt

    @property
    def num_labels(self) -> int:
        """Labels that the transformer knows; 0 = it takes none."""
        return self.transformer.config.get("num_labels", 0)

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder, built when it is first needed; None for a model without text."""
        if self._text is None and self.config["text_encoder"] is not None:
            self._text = TEXT_ENCODERS[self.config["text_encoder"]](length=self.config["text_length"])
        if isinstance(self._text, MiniLMEncoder):
            self._text.to(self._execution_device)
        return self._text

    def use_text_encoder(self, encoder: TextEncoder) -> None:
        """Encodes prompts by another encoder, or a cached one, of the same width."""
        self._text = encoder

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | list | None = None,
        style: Label | list[Label] = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        shift: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | ClipPipelineOutput | tuple:
        """Draws pictures, or clips with a model of clips.

        Args:
            prompt: one or many prompts, each a string or a list of segments; for a model of labels a name or index.
            style: one for all or one for each prompt, by name or index; None = any.
            num_inference_steps: sampling steps; None = the model's default.
            guidance_scale: scale of classifier-free guidance, 1 = off; None = the model's default.
            guidance_interval: (low, high), the times within [0, 1] at which guidance acts.
            guidance_channels: first channels of the latents on which it acts; None = all.
            height, width: in pixels, multiples of factor * patch; None = the default size.
            num_images_per_prompt: pictures of each prompt.
            generator: one, or one for each picture, on the CPU; None = torch's default one.
            latents: noise (B, C, h, w), of clips (B, C, F, h, w), to begin with instead of a draw.
            shift: shift of the schedule; None = the default, scaled to the number of tokens.
            output_type: "pil", "pt" (B, 3, H, W) or "np" (B, H, W, 3) in [0, 1], or "latent" (B, C, h, w); of clips
                lists of pictures, (B, F, 3, H, W), (B, F, H, W, 3) or (B, C, F, h, w).
            callback_on_step_end: called as `(pipe, step, timestep, tensors)`; "latents" in what it returns go on.
            callback_on_step_end_tensor_inputs: names of tensors it wants: "latents", "denoised".
            return_dict: whether to return `ImagePipelineOutput` (`ClipPipelineOutput`) or a tuple.

        Raises:
            UserError: something asked for is not possible; the message says what is.
        """
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output type", output_type, OUTPUT_TYPES)
        steps = self.config["default_steps"] if num_inference_steps is None else num_inference_steps
        grid = self._grid(height, width)
        schedule = uniform_schedule(steps, self._shift(grid) if shift is None else shift)
        solver = solver_for(self.scheduler, schedule)
        request = expand_request(prompt, style, num_images_per_prompt)
        if self.config["text_encoder"] is None and self._text is None:
            conditions = label_conditions(request, self.config["styles"], self.num_labels)
        else:
            assert self.text is not None
            conditions = text_conditions(request, self.text, self.config["styles"], self.num_labels)
        guidance = self._guidance(guidance_scale, guidance_interval, guidance_channels, conditions)
        generator = _check_generators(generator, len(request.prompts))
        device = self._execution_device
        self._interrupt = False
        final = sample(
            self.transformer,
            self._noise(latents, (len(request.prompts), *self._sample_shape(grid)), generator),
            schedule,
            solver,
            cond=conditions.cond.to(device),
            uncond=None if conditions.uncond is None else conditions.uncond.to(device),
            guidance=guidance,
            generator=generator,
            callback=self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs),
            is_interrupted=lambda: self.interrupt,
            progress=self._shows_progress(),
        )
        images = self._output(final, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ClipPipelineOutput(frames=images) if self.config["frames"] else ImagePipelineOutput(images=images)

    def _sample_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w), or (C, F, h, w) of a model of clips."""
        frames = self.config["frames"]
        return (self.autoencoder.config["latent_channels"], *((frames,) if frames else ()), *grid)

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in latents."""
        factor = self.autoencoder.config["factor"]
        sides = {
            "height": self.config["size"] if height is None else height,
            "width": self.config["size"] if width is None else width,
        }
        check_size(sides, factor * self.transformer.config.get("patch_size", 1))
        return sides["height"] // factor, sides["width"] // factor

    def _shift(self, grid: tuple[int, int]) -> float:
        base = (self.config["size"] // self.autoencoder.config["factor"]) ** 2
        return shift_for_tokens(grid[0] * grid[1], base, self.config["default_shift"])

    def _guidance(
        self, scale: float | None, interval: tuple[float, float], channels: int | None, conditions: Conditions
    ) -> Guidance:
        if conditions.uncond is None:
            if scale not in (None, 1):
                raise UserError(
                    f"got a guidance of {scale}, but this model takes no condition to guide by; leave it out"
                )
            scale = 1.0
        default = self.config["default_guidance"]
        return Guidance(default if scale is None else float(scale), interval, channels=channels)

    def _noise(self, latents: Tensor | None, shape: tuple[int, ...], generator: Generators) -> Tensor:
        if latents is None:
            return randn(shape, generator, self._execution_device)
        if latents.shape != shape:
            raise UserError(f"got latents of shape {tuple(latents.shape)}; these pictures need {shape}")
        return latents.to(self._execution_device, torch.float32)

    def _callback(self, callback: Callable | None, wanted: list[str] | None) -> Callable | None:
        """The callback of diffusers as one of our loop."""
        wanted = ["latents"] if wanted is None else wanted
        for name in wanted:
            if name not in self._callback_tensor_inputs:
                raise unknown_name("callback tensor", name, self._callback_tensor_inputs)
        if callback is None:
            return None

        def after(step: SampleStep) -> Tensor | None:
            tensors = {"latents": step.x, "denoised": step.denoised}
            timestep = timestep_from_time(torch.tensor(step.t))
            returned = callback(self, step.step, timestep, {name: tensors[name] for name in wanted}) or {}
            return returned.get("latents")

        return after

    def _shows_progress(self) -> bool | None:
        disable = getattr(self, "_progress_bar_config", {}).get("disable", False)
        return None if disable is None else not disable

    def _output(self, state: SolverState, output_type: str) -> Any:
        if output_type == "latent":
            return state.x
        latents, frames = state.x.to(self.autoencoder.dtype), self.config["frames"]
        if frames:
            latents = latents.transpose(1, 2).flatten(0, 1)  # (B*F, C, h, w)
        pixels = (self.autoencoder.decode(Latents(latents)).float() / 2 + 0.5).clamp(0, 1)
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        if output_type == "pil":
            pictures = [Image.fromarray(picture) for picture in (array * 255).round().astype("uint8")]
            return [pictures[i : i + frames] for i in range(0, len(pictures), frames)] if frames else pictures
        if output_type == "np":
            return array.reshape(-1, frames, *array.shape[1:]) if frames else array
        return pixels.unflatten(0, (-1, frames)) if frames else pixels


def _check_generators(generator: Generators | None, pictures: int) -> Generators:
    """The generator, or the list of one for each picture; torch's default one if there is none."""
    if generator is None:
        return torch.default_generator
    many = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if not isinstance(generator, torch.Generator) and len(many) != pictures:
        raise UserError(f"got {len(many)} generators for {pictures} pictures; give one for each")
    if any(one.device.type != "cpu" for one in many):
        raise UserError("a generator lies on a device; make it on the CPU, where a seed means the same everywhere")
    return generator if isinstance(generator, torch.Generator) else many
