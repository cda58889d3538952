"""Lines for the person who waits; of processes that were launched together only the first one talks."""

import os
import sys

from tqdm import tqdm


def is_main() -> bool:
    """Whether this is the first, or the only, of the processes that were launched together."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line on the error stream that does not tear a progress bar."""
    if is_main():
        tqdm.write(f"smalti: {message}", file=sys.stderr)
