"""The autoencoder of the folder recipe: the one that ships, trained where it falls short, or one's own."""

from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.data.folder import FolderSet
from smalti.evaluation.emoji_metrics import spread
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.diffusers_autoencoder import DiffusersAutoencoder
from smalti.training.autoencoder import fit_autoencoder, reconstruction_psnr
from smalti.training.config import TrainConfig
from smalti.training.messages import say
from smalti.training.processes import join_processes
from smalti.zoo.loader import ZOO, load_part, save_part

SHIPPED = ZOO / "emoji" / "autoencoder"
MEASURED = 64

Autoencoder = ConvAutoencoder | DiffusersAutoencoder


def base_autoencoder(tokenizer: str | None) -> Autoencoder:
    """The autoencoder that ships, or the one in a folder: of diffusers, or of an earlier training.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = SHIPPED if tokenizer is None else Path(tokenizer)
    if not (folder / "config.json").is_file():
        if tokenizer is None:
            raise UserError("the autoencoder of model 'emoji' does not ship with this installation; use --tokenizer")
        raise UserError(
            f"no autoencoder in {folder}: config.json is missing; give the folder that its save_pretrained wrote"
        )
    config = read_json(folder / "config.json")
    for kind in (ConvAutoencoder, DiffusersAutoencoder):
        if isinstance(config, dict) and config.get("_class_name") == kind.__name__:
            return load_part(folder, kind)
    return DiffusersAutoencoder.from_folder(folder)


def fitted_autoencoder(
    base: Autoencoder,
    pictures: FolderSet,
    groups: Sequence[Tensor],
    out: Path,
    *,
    enough: float | None,
    config: TrainConfig,
    resume: bool,
) -> Autoencoder:
    """The autoencoder for these pictures with statistics of its own, in `out / "autoencoder"`.

    Args:
        base: where it begins.
        pictures: what it is measured on.
        groups: indices of the pictures of each shape that it may be trained on.
        out: folder of the training; what a run before has finished there is taken.
        enough: PSNR in dB below which it is trained; None leaves it as it is.
        config: of its training.
        resume: go on with an unfinished training.
    """
    folder, processes = out / "autoencoder", join_processes()
    is_short = False
    if processes.is_main_process and not (folder / "config.json").is_file():
        quality = reconstruction_psnr(base, pictures, spread(len(pictures), MEASURED))
        is_short = enough is not None and quality < enough
        wanted = f" (wanted: {enough:g}); it is trained on them" if is_short else ""
        say(f"the autoencoder reaches {quality:.1f} dB on these pictures{wanted}")
    [is_short] = broadcast_object_list([is_short])  # one process decides for all
    if is_short:
        assert isinstance(base, ConvAutoencoder)
        fit_autoencoder(
            base, pictures, config, out / "autoencoder-training", from_patches=False, resume=resume, groups=groups
        )
    if processes.is_main_process and not (folder / "config.json").is_file():
        some = spread(len(pictures), MEASURED)
        if is_short:
            say(f"the autoencoder reaches {reconstruction_psnr(base, pictures, some):.1f} dB on these pictures now")
        else:
            base.measure_statistics(pictures.pixels([index]) for index in some)
        save_part(base, folder)
    processes.wait_for_everyone()
    return load_part(folder, type(base)).to(base.device)  # type: ignore[arg-type]  # diffusers wraps `to`
