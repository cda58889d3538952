"""Errors that a user can cause: one line that says what was got, what is allowed and what to do.

The command line prints a `UserError` without a trace and ends with status 2; every other exception is a defect of ours.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The user's input is at fault."""


def unknown_name(kind: str, got: str, allowed: Iterable[str]) -> UserError:
    """An error for a name that is not known, with the nearest known ones.

    Args:
        kind: what the name stands for, such as "model".
        got: the name that was given.
        allowed: every name that would have been accepted.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> str(unknown_name("style", "notto", ["noto", "twemoji"]))
        "unknown style 'notto'; did you mean 'noto'? Known: noto, twemoji"
    """
    names = sorted(allowed)
    near = get_close_matches(got, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"unknown {kind} {got!r}{hint} Known: {shown or 'none'}")


class Refusal(UserError):
    """A method cannot act on this model, in this mode or beside that other method; the message names the reason."""


class NeverEngaged(Refusal):
    """A method was applied and a run ended, but it changed nothing: the setting, the steps or the model do not fit."""
