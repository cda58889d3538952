"""The folder of a training: a new one, or one that the same training has left to be resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smalti.core.errors import UserError
from smalti.core.files import check_creatable, read_json, write_json
from smalti.training.messages import say
from smalti.training.run_state import check_identity, plain

MARKER = "training.json"


def check_run(out: Path, resume: bool) -> None:
    """Refuses a folder that cannot become, or is not, the folder of a training; writes nothing.

    Called by the main process alone: the others might come when it has become one.

    Raises:
        UserError: it holds a training and `resume` is off, or things of another kind.
    """
    if (out / MARKER).is_file():
        if not resume:
            raise UserError(f"{out} already holds a training; go on with --resume, or choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no training that can be resumed; choose another --out")
    else:
        check_creatable(out / MARKER)


def open_run(out: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Makes the folder of a training, or checks that it is this one's; called by the main process alone.

    Args:
        out: the folder.
        identity: whatever makes it another training, as `run_state.plain` makes json of it.
        resume: whether a training that is there may go on.

    Raises:
        UserError: as `check_run`, or it holds another training.
    """
    check_run(out, resume)
    if (out / MARKER).is_file():
        check_identity(read_json(out / MARKER), plain(identity))
        return
    if resume:
        say(f"there is nothing to resume in {out}; starting from the beginning")
    write_json(out / MARKER, plain(identity))
