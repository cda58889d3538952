"""Calls of a pipeline from a file of prompts: one a line, or objects of further arguments in a .jsonl."""

import inspect
import json
from pathlib import Path
from typing import Any

from smalti.core.errors import UserError, unknown_name
from smalti.core.seeds import check_seed


def read_calls(prompts: str | Path, size: str = "", seed: int = 0) -> list[dict[str, Any]]:
    """The arguments of the pipeline's call for each prompt, and its `seed`.

    Args:
        prompts: the file.
        size: pixels, one number or HEIGHTxWIDTH; the pipeline's own if empty.
        seed: of the first prompt; the next ones count up. A line's own seed wins.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a size or seed is no number in range.
    """
    file = Path(prompts)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {error}") from error
    is_json = file.suffix.lower() == ".jsonl"
    calls = [_arguments(file, number, line, is_json) for number, line in enumerate(lines, start=1) if line]
    if not calls:
        raise UserError(f"{file} holds no prompt; write one a line")
    sides = read_size(size)
    seeded = [{**sides, "seed": seed + index, **call} for index, call in enumerate(calls)]
    for call in seeded:
        check_seed(call["seed"])
    return seeded


def check_arguments(pipe: Any, calls: list[dict[str, Any]]) -> None:
    """Raises `UserError` for an argument that the pipeline's call does not take."""
    parameters = inspect.signature(pipe.__call__).parameters
    for name in {"num_inference_steps", "generator", *(name for call in calls for name in call)} - {"seed"}:
        if name not in parameters:
            raise unknown_name(f"argument of {type(pipe).__name__}", name, parameters)


def read_size(text: str) -> dict[str, int]:
    """`64` or `64x96` (height x width) as arguments of a pipeline; nothing if empty."""
    if not text:
        return {}
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"size {text!r} is not understood; write pixels such as 64, or height x width such as 64x96")
    return {"height": int(parts[0]), "width": int(parts[-1])}


def _arguments(file: Path, number: int, line: str, is_json: bool) -> dict[str, Any]:
    if not is_json:
        return {"prompt": line}
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"line {number} of {file} is no json: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f'line {number} of {file} is no object; write {{"prompt": "...", ...}}')
    return content
