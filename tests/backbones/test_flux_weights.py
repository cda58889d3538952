"""Our MMDiT equals diffusers' Flux given the same weights, and the weights go both ways without loss."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from smalti.backbones.flux_weights import flux_to_mmdit, mmdit_to_flux
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.patchify import patchify
from smalti.nn.rope import grid_labels

TINY = {"heads": 2, "head_dim": 8, "axes": (2, 2, 4), "layers": 1, "singles": 2, "channels": 8}
MID = {"heads": 6, "head_dim": 32, "axes": (8, 12, 12), "layers": 2, "singles": 4, "channels": 32}


def flux_of(shape, guidance_embeds=False):
    flux = FluxTransformer2DModel(
        in_channels=shape["channels"],
        num_layers=shape["layers"],
        num_single_layers=shape["singles"],
        attention_head_dim=shape["head_dim"],
        num_attention_heads=shape["heads"],
        joint_attention_dim=20,
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=shape["axes"],
    )
    for name, parameter in flux.named_parameters():  # also the norm weights and biases, which start at 1 and 0
        torch.nn.init.normal_(parameter, mean=1.0 if "norm_" in name and "attn" in name else 0.0, std=0.1)
    return flux.eval()


def run_flux(flux, x, t, cond, patch):
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    labels = grid_labels(cond.text.shape[1], rows, columns)
    length = cond.text.shape[1]
    return flux(
        hidden_states=patchify(x, patch),
        encoder_hidden_states=cond.text,
        pooled_projections=cond.pooled,
        timestep=t,
        guidance=cond.guidance,
        txt_ids=labels[:length],
        img_ids=labels[length:],
        return_dict=False,
    )[0]


def inputs(channels, height, width, guidance_embeds):
    cond = Cond(
        text=torch.randn(3, 7, 20),
        pooled=torch.randn(3, 12),
        guidance=torch.tensor([1.0, 3.5, 7.0]) if guidance_embeds else None,
    )
    return torch.randn(3, channels, height, width), torch.tensor([0.02, 0.5, 1.0]), cond


@pytest.mark.parametrize("shape", [TINY, MID], ids=["tiny", "mid"])
@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize(("patch", "height", "width"), [(1, 5, 7), (2, 10, 6)])
def test_equals_flux(shape, guidance_embeds, patch, height, width):
    flux = flux_of(shape, guidance_embeds)
    model = flux_to_mmdit(flux, patch_size=patch)
    x, t, cond = inputs(shape["channels"] // patch**2, height, width, guidance_embeds)
    with torch.no_grad():
        expected = run_flux(flux, x, t, cond, patch)
        got = patchify(model(x, t, cond), patch)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5


def test_gradients_equal_flux():
    flux = flux_of(TINY)
    model = flux_to_mmdit(flux)
    x, t, cond = inputs(8, 3, 5, False)
    patchify(model(x, t, cond), 1).square().mean().backward()
    run_flux(flux, x, t, cond, 1).square().mean().backward()
    theirs = flux.single_transformer_blocks[0].attn
    fused = torch.cat([theirs.to_q.weight.grad, theirs.to_k.weight.grad, theirs.to_v.weight.grad])
    torch.testing.assert_close(model.single_blocks[0].attn.to_qkv.weight.grad, fused, rtol=1e-4, atol=1e-6)
    ours = model.double_blocks[0].attn_text.norm_k.weight.grad
    torch.testing.assert_close(ours, flux.transformer_blocks[0].attn.norm_added_k.weight.grad, rtol=1e-4, atol=1e-6)


def test_round_trip_is_exact():
    flux = flux_of(TINY, guidance_embeds=True)
    back = mmdit_to_flux(flux_to_mmdit(flux))
    assert dict(back.config)["axes_dims_rope"] == tuple(flux.config.axes_dims_rope)
    for name, tensor in flux.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_state_dict_is_a_source():
    flux = flux_of(TINY)
    from_weights = flux_to_mmdit(flux.state_dict(), axes_dims_rope=(2, 2, 4))
    for name, tensor in flux_to_mmdit(flux).state_dict().items():
        assert torch.equal(from_weights.state_dict()[name], tensor), name


def test_refuses_by_name():
    with pytest.raises(UserError, match="labels"):
        mmdit_to_flux(MMDiT.tiny())
    with pytest.raises(UserError, match="macaron"):
        mmdit_to_flux(MMDiT(num_single=1, block_order="macaron"))
    with pytest.raises(UserError, match="ffn_ratio"):
        mmdit_to_flux(MMDiT(num_single=1, num_double=0, ffn_ratio=2.0))
    weights = flux_of(TINY).state_dict()
    with pytest.raises(UserError, match="patches of 3"):
        flux_to_mmdit(weights, patch_size=3, axes_dims_rope=(2, 2, 4))
    with pytest.raises(UserError, match="foreign"):
        flux_to_mmdit(weights | {"encoder_hid_proj.weight": torch.zeros(1)}, axes_dims_rope=(2, 2, 4))
    del weights["transformer_blocks.0.norm1.linear.bias"]
    with pytest.raises(UserError, match=r"norm1\.linear\.bias"):
        flux_to_mmdit(weights, axes_dims_rope=(2, 2, 4))
    with pytest.raises(UserError, match="no Flux weights"):
        flux_to_mmdit({})
