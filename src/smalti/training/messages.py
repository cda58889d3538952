"""Lines for the person who waits."""

import sys

from tqdm import tqdm


def say(message: str) -> None:
    """One line on the error stream that does not tear a progress bar."""
    tqdm.write(f"smalti: {message}", file=sys.stderr)
