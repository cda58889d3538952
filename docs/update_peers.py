"""Writes docs/peers.md from results/peers*.json: `make docs`."""

import json
from pathlib import Path

from smalti.core.discovery import load_benchmark

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "peers.md"
HEAD = """# Beside the peers

Written by `make docs` from what `smalti bench peers` recorded: diffusers' TaylorSeer cache and cache-dit run in the
same process, on twins of the same model, with the same number of full evaluations, and so do plain runs of fewer steps.
On random weights only FLOPs, memory and seconds mean something; how far a run ends from the plain one is measured on
`emoji`. Which comes out ahead is left as it was found.
"""


def page() -> str:
    """All recorded results, as the benchmark prints them."""
    parts = [HEAD]
    table = load_benchmark("peers").table
    for path in sorted((ROOT / "results").glob("peers*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"]
        schedule = (
            f"{settings['steps']} steps, {settings['warmup']} warm-up, one full evaluation in {settings['interval']}"
        )
        parts.append(
            f"## {', '.join(settings['models'])}: {schedule}\n\n"
            f"{result['hardware']}, {result['date']}.\n\n```\n{table(result)}\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
