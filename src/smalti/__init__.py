"""smalti: the toolkit for diffusion transformers."""

from typing import Any

__version__ = "0.1.0"


def apply(target: Any, *methods: Any) -> Any:
    """Lets training-free methods act on a pipeline or a model; see `smalti.seams.apply.apply`."""
    from smalti.seams.apply import apply as attach  # torch and diffusers are loaded on first use alone

    return attach(target, *methods)


def plan(pipe: Any, prompts: Any, **target: Any) -> Any:
    """Chooses methods that make a pipeline so many times faster or keep it so near; see `acceleration.planner.plan`."""
    from smalti.acceleration.planner import plan as choose

    return choose(pipe, prompts, **target)
