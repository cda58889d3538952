"""Our DiT equals diffusers' DiT given the same weights, and the weights go both ways without loss."""

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from smalti.backbones.dit import DiT
from smalti.backbones.dit_weights import diffusers_to_dit, dit_to_diffusers
from smalti.core.errors import UserError
from smalti.core.protocols import Cond

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
MID = {"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 4}


def diffusers_dit(shape, out_channels=4, **changes):
    model = DiTTransformer2DModel(
        in_channels=4, out_channels=out_channels, sample_size=8, patch_size=2, num_embeds_ada_norm=5, **shape, **changes
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in model.transformer_blocks:  # one embedder for all, as in the paper
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


@pytest.mark.parametrize("shape", [TINY, MID], ids=["tiny", "mid"])
@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("side", [8, 12])
def test_equals_diffusers(shape, out_channels, side):
    theirs = diffusers_dit(shape, out_channels)
    ours = diffusers_to_dit(theirs)
    x, timestep, label = torch.randn(3, 4, side, side), torch.tensor([3, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        expected = theirs(x, timestep, label, return_dict=False)[0]
        got = ours(x, timestep / 1000, Cond(label=label))
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5


def test_round_trip_is_exact():
    theirs = diffusers_dit(TINY, out_channels=8)
    back = dit_to_diffusers(diffusers_to_dit(theirs))
    assert back.config["norm_eps"] == theirs.config["norm_eps"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(("name", "value"), [("block_order", "macaron"), ("modulation", "shared")])
def test_other_blocks_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name}.*{value}"):
        dit_to_diffusers(DiT(depth=1, heads=1, head_dim=8, num_labels=3, **{name: value}))


def test_refuses_by_name():
    with pytest.raises(UserError, match="pooled"):
        dit_to_diffusers(DiT.tiny())
    with pytest.raises(UserError, match="needs labels"):
        dit_to_diffusers(DiT(depth=1, heads=1, head_dim=8))
    with pytest.raises(UserError, match="ffn_ratio"):
        dit_to_diffusers(DiT(depth=1, heads=1, head_dim=8, num_labels=2, ffn_ratio=2.0))
    with pytest.raises(UserError, match="attention_bias"):
        diffusers_to_dit(diffusers_dit(TINY, attention_bias=False))
    differing = diffusers_dit(TINY)
    torch.nn.init.normal_(differing.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight)
    with pytest.raises(UserError, match="embedding_table"):
        diffusers_to_dit(differing)
