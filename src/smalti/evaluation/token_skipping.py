"""What claims about leaving tokens out measure: how a sample moves token by token, and what leaving out saves."""

import copy

import torch
from torch import Tensor

from smalti.backbones.mmdit import MMDiT
from smalti.core.method import Method
from smalti.core.protocols import Cond
from smalti.evaluation.held_out_prompts import Prompts, draw_latents
from smalti.evaluation.timing import Ratio, paired_ratio
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.seams.apply import apply


def token_path(pipe: TextToImagePipeline, prompts: Prompts, steps: int) -> Tensor:
    """The latents after every dense step, by tokens of one latent each (S, B, N, 1, C)."""
    path: list[Tensor] = []

    def after(pipe, step, t, tensors):
        path.append(tensors["latents"].flatten(2).mT[:, :, None])
        return {}

    draw_latents(pipe, prompts, steps, guidance_scale=1.0, callback_on_step_end=after)
    return torch.stack(path)


def skipping_ratio(method: Method, side: int, steps: int, repeats: int = 4) -> Ratio:
    """Seconds of Euler steps of a random MMDiT on side x side tokens, without the method over with it.

    The method stays on its copy of the model: tokens are read once for a shape, before what counts.
    """
    torch.manual_seed(0)
    dense, cond = MMDiT(in_channels=16).eval(), Cond(text=torch.randn(1, 16, 384), pooled=torch.randn(1, 384))
    thinned, noise = copy.deepcopy(dense), torch.randn(1, 16, side, side)

    @torch.no_grad()
    def run(model: MMDiT) -> Tensor:
        x = noise
        for step in range(steps):
            x = x - model(x, torch.full((1,), 1 - step / steps), cond) / steps
        return x

    with apply(thinned, method):
        return paired_ratio(lambda: run(dense), lambda: run(thinned), repeats, warmup=1)
