"""Any image autoencoder of diffusers under the protocol of a smalti tokenizer, with statistics of its own.

Works for AutoencoderKL, AutoencoderDC, AutoencoderTiny and others whose `encode` gives a posterior or latents and whose
`decode` gives pixels. The published scaling factor is not used: mean and deviation are measured on the pictures at hand
and stored with the weights.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.core.protocols import Generators, Latents
from smalti.tokenizers.latent_statistics import channel_moments

TRIAL_SIDE = 256


class DiffusersAutoencoder(ModelMixin, ConfigMixin):
    """A wrapped autoencoder.

    Args:
        class_name: class of diffusers, such as AutoencoderKL.
        autoencoder: its configuration.
        factor: pixels a latent along each side.
        latent_channels: C of the latents.

    Raises:
        UserError: diffusers has no such autoencoder.
    """

    @register_to_config
    def __init__(self, class_name: str, autoencoder: dict[str, Any], factor: int, latent_channels: int):
        super().__init__()
        self.factor, self.latent_channels = factor, latent_channels
        self.model = _class(class_name).from_config(dict(autoencoder))
        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))

    @classmethod
    def from_folder(cls, folder: Path | str) -> "DiffusersAutoencoder":
        """Wraps what `save_pretrained` of a diffusers autoencoder wrote; factor and channels are read from a trial.

        Raises:
            UserError: there is no autoencoder of pictures in the folder.
        """
        config = read_json(Path(folder) / "config.json")
        name = str(config.get("_class_name") if isinstance(config, dict) else None)
        model = _read(Path(folder), _class(name))
        try:
            with torch.no_grad():
                trial = _mean(model.encode(torch.zeros(1, 3, TRIAL_SIDE, TRIAL_SIDE)))
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"{name} in {folder} does not encode pictures of 3 channels: {error}") from error
        if trial.ndim != 4:
            raise UserError(f"{name} in {folder} gives latents of shape {tuple(trial.shape)}; (B, C, h, w) is needed")
        settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
        wrapped = cls(name, settings, TRIAL_SIDE // trial.shape[-1], trial.shape[1])
        wrapped.model = model
        return wrapped.eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, generator: Generators | None = None) -> Latents:
        """Normalised latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]: the posterior mean."""
        if pixels.shape[-1] % self.factor or pixels.shape[-2] % self.factor:
            raise UserError(
                f"picture of {tuple(pixels.shape[-2:])} pixels: both sides must be multiples of {self.factor}"
            )
        z = _mean(self.model.encode(pixels))
        return Latents((z - self.latents_mean[:, None, None]) / self.latents_std[:, None, None])

    @torch.no_grad()
    def decode(self, latents: Latents, *, generator: Generators | None = None, **context) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of normalised latents."""
        z = latents.tensor * self.latents_std[:, None, None] + self.latents_mean[:, None, None]
        return self.model.decode(z).sample.clamp(-1, 1)

    @torch.no_grad()
    def measure_statistics(self, batches) -> None:
        """Sets mean and deviation of each channel from an iterable of pixel batches (B, 3, H, W)."""
        mean, variance = channel_moments(_mean(self.model.encode(pixels.to(self.device))) for pixels in batches)
        self.latents_mean.copy_(mean)
        self.latents_std.copy_(variance.clamp_min(1e-8).sqrt())


def _read(folder: Path, kind: Any) -> Any:
    """The autoencoder, if its safetensors hold all of its weights and no others."""
    try:
        model, loading = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot read the autoencoder in {folder}: {error}") from error
    faults = {
        fault: loading[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[fault]
    }
    if faults:
        named = ", ".join(f"{len(keys)} {fault.replace('_', ' ')}" for fault, keys in faults.items())
        raise UserError(f"the weights of the autoencoder in {folder} do not fit its config: {named}")
    return model.eval()


def _class(name: str) -> Any:
    kind = getattr(diffusers, name, None)
    if not name.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel")) or kind is None:
        raise UserError(
            f"{name!r} is no autoencoder of diffusers; give the folder of an AutoencoderKL, AutoencoderDC or the like"
        )
    return kind


def _mean(encoded: Any) -> Tensor:
    """The latents of any encoder's result: the posterior's mode, or the tensor itself."""
    for name in ("latent_dist", "latents", "latent"):
        value = getattr(encoded, name, None)
        if value is not None:
            return value.mode() if name == "latent_dist" else value
    raise UserError(f"the autoencoder returned {type(encoded).__name__}, which holds no latents")
