"""Patches go back to the picture; a token's channels lie as Flux packs them."""

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from smalti.core.errors import UserError
from smalti.nn.patchify import patchify, unpatchify


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_inverse(patch):
    x = torch.randn(2, 5, 6, 12)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 72 // patch**2, 5 * patch**2)
    assert torch.equal(unpatchify(tokens, (6, 12), patch), x)


@pytest.mark.parametrize("patch", [1, 2])
def test_clips_are_cut_frame_by_frame(patch):
    x = torch.randn(2, 5, 3, 4, 6)
    tokens = patchify(x, patch)
    assert torch.equal(tokens, torch.cat([patchify(frame, patch) for frame in x.unbind(2)], 1))
    assert torch.equal(unpatchify(tokens, (3, 4, 6), patch), x)


def test_order_is_that_of_flux():
    x = torch.randn(2, 5, 6, 12)
    assert torch.equal(patchify(x, 2), FluxPipeline._pack_latents(x, 2, 5, 6, 12))


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="6 x 7 does not fit patches of 2"):
        patchify(torch.zeros(1, 1, 6, 7), 2)
