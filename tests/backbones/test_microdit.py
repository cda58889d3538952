"""MicroDiT: what masking may and may not change, how its blocks grow, and the size of the paper's model."""

import pytest
import torch

from smalti.backbones.block_order import count_parameters
from smalti.backbones.microdit import SHAPES, MicroDiT, growing
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.evaluation.flops import count_flops
from smalti.nn.experts import ExpertChoice
from smalti.nn.patchify import patchify
from smalti.nn.positions import grid_positions
from smalti.nn.swiglu import SwiGLU
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.masked_loss import MaskedFlowMatching
from smalti.ops.token_masks import RandomMask

SMALL = {
    "in_channels": 4, "depth": 4, "width": 16, "head_dim": 8, "text_dim": 12, "mixer_depth": 1, "mixer_width": 8,
    "ffn_multiple": 8, "experts": 4, "base_size": 4,
}  # fmt: skip


def make(**settings):
    model = MicroDiT(**{**SMALL, **settings}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def cond(batch=2, **extra):
    return Cond(text=torch.randn(batch, 5, 12), extra=extra)


def test_dropped_places_of_the_output_are_zero():
    keep = torch.tensor([[0, 3, 9], [2, 5, 15]])
    out = patchify(make()(torch.randn(2, 4, 8, 8), torch.rand(2), cond(keep=keep)), 2)
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(out.abs().sum(-1) > 0, mask)


@pytest.mark.parametrize("positions", ["absolute", "rope"])
def test_positions_stay_with_the_kept_tokens(positions):
    """Without experts and mixer a masked run is the whole run of a model whose attention sees the kept tokens alone."""
    model = make(positions=positions, experts=0, mixer_depth=0)
    x, t, given = torch.randn(1, 4, 8, 8), torch.rand(1), cond(1)
    all_kept = Cond(given.text, extra={"keep": torch.arange(16)[None]})
    torch.testing.assert_close(model(x, t, all_kept), model(x, t, given), atol=1e-5, rtol=1e-4)
    one = [patchify(model(x, t, Cond(given.text, extra={"keep": torch.tensor([[k]])})), 2)[0, k] for k in (3, 12)]
    moved = x.clone()
    moved[..., 6:8, 0:2] = x[..., 0:2, 6:8]  # the content of place 3 at place 12
    other = patchify(model(moved, t, Cond(given.text, extra={"keep": torch.tensor([[12]])})), 2)[0, 12]
    same = torch.allclose(one[0], other, atol=1e-5)
    assert same == (positions == "rope")  # alone in the sequence, a token's rotation cancels; an added position stays


def test_relative_rotations_of_kept_tokens_count():
    model = make(positions="rope", experts=0, mixer_depth=0)
    x, t, given = torch.randn(1, 4, 8, 8), torch.rand(1), cond(1)
    moved = x.clone()
    moved[..., 6:8, 6:8] = x[..., 0:2, 2:4]  # the content of place 1 at place 15
    outs = [
        patchify(model(one, t, Cond(given.text, extra={"keep": torch.tensor([keep])})), 2)[0, 0]
        for one, keep in ((x, [0, 1]), (moved, [0, 15]))
    ]
    assert not torch.allclose(*outs, atol=1e-4)


def test_the_mixer_carries_what_was_dropped():
    """Deferred masking in one line; without the mixer, naive masking, the kept places know nothing of the others."""
    x, keep = torch.randn(1, 4, 8, 8), torch.tensor([[0, 1, 2]])
    changed = x.clone()
    changed[..., 6:, 6:] += 1
    for depth, differs in ((1, True), (0, False)):
        model, t, given = make(mixer_depth=depth), torch.rand(1), cond(1, keep=keep)
        assert (model(x, t, given) - model(changed, t, given)).abs().max().gt(1e-4) == differs


def test_without_a_mask_the_loss_is_that_of_flow_matching_bit_for_bit():
    model = make()
    batch = Batch(torch.randn(3, 4, 8, 8), cond(3), torch.arange(3))
    losses = [
        objective.loss(model, batch, TrainState(), generators_for([0, 1, 2])).loss
        for objective in (FlowMatching(), MaskedFlowMatching(RandomMask(0.0), 2))
    ]
    assert torch.equal(*losses)


def test_experts_load_follows_the_mask():
    """A quarter of the tokens is a quarter of the experts' work: capacity is that of the tokens that are there."""
    layer = make().blocks[1].ffn
    assert isinstance(layer, ExpertChoice)
    work = [count_flops(lambda n=n: layer(torch.randn(1, n, 16))).total for n in (64, 16)]
    assert work[0] == 4 * work[1]


def test_masking_saves_what_it_should():
    """Backbone blocks run on a quarter of the tokens, the mixer on all."""
    model = make(depth=8, experts=0)
    x, keep = torch.randn(1, 4, 32, 32), torch.arange(0, 256, 4)[None]
    flops = [
        count_flops(lambda given=given: model(x, torch.rand(1), given)).total for given in (cond(1), cond(1, keep=keep))
    ]
    assert flops[0] > 2.5 * flops[1]


def test_blocks_grow_and_alternate():
    model = MicroDiT(
        in_channels=4, depth=6, width=128, head_dim=16, text_dim=12, mixer_depth=1, mixer_width=32, ffn_multiple=32
    )
    assert [block.attn.heads for block in model.blocks] == [4, 6, 6, 8, 8, 8]
    assert [isinstance(block.ffn, ExpertChoice) for block in model.blocks] == [False, True, False, True, False, False]
    dense = [block.ffn for block in model.blocks if isinstance(block.ffn, SwiGLU)]
    assert [layer.proj_out.in_features for layer in dense] == [64, 192, 288, 352]
    assert growing((0.5, 4.0), 8) == [0.5 + 0.5 * index for index in range(8)]


def test_the_paper_s_models_have_their_size():
    """1.16 G parameters, of which experts are most (abstract)."""
    with torch.device("meta"):
        large = MicroDiT(**SHAPES["xl"])
    assert count_parameters(large) == pytest.approx(1.16e9, rel=0.02)


def test_nothing_in_the_blocks_has_a_bias_but_modulation():
    for name, _ in MicroDiT.tiny().blocks.named_parameters():
        assert not name.endswith("bias") or "modulation" in name, name


def test_zeros_are_no_caption():
    """The null of guidance: nothing of a caption of zeros reaches the blocks."""
    model = MicroDiT.tiny()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tokens = model.caption_embedder(torch.zeros(1, 5, 12)).tokens
    block = model.blocks[0].cross
    context_less = block.to_kv(tokens).chunk(2, -1)[1]
    assert not context_less.any()


def test_a_padded_caption_is_the_short_one():
    model, x, t = make(), torch.randn(1, 4, 8, 8), torch.rand(1)
    text = torch.randn(1, 3, 12)
    padded = Cond(torch.cat([text, torch.ones(1, 2, 12)], 1), mask=torch.tensor([[True] * 3 + [False] * 2]))
    torch.testing.assert_close(model(x, t, padded), model(x, t, Cond(text)), atol=1e-5, rtol=1e-4)


def test_positions_are_interpolated_for_a_larger_picture():
    """Positions run over the same range: the tokens of a picture doubled in size stand where those of the small did."""

    small, large = (
        grid_positions(side, side, 16, 16, torch.device("cpu")).unflatten(0, (side, side)) for side in (16, 32)
    )
    torch.testing.assert_close(large[::2, ::2], small)
    assert make()(torch.randn(1, 4, 16, 16), torch.rand(1), cond(1)).shape == (1, 4, 16, 16)


def test_maskdit_fills_dropped_places():
    model = make(mixer_depth=0, decoder_depth=1)
    out = model(torch.randn(2, 4, 8, 8), torch.rand(2), cond(keep=torch.tensor([[0, 3], [2, 5]])))
    assert (patchify(out, 2).abs().sum(-1) > 0).all()
    out.square().mean().backward()
    assert model.mask_token.grad.abs().max() > 0


def test_gradient_checkpointing_changes_nothing():
    model, x, t, given = (
        make().train(),
        torch.randn(2, 4, 8, 8),
        torch.rand(2),
        cond(keep=torch.tensor([[0, 3], [2, 5]])),
    )
    gradients = []
    for on in (False, True):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        model.zero_grad()
        model(x, t, given).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"cond": Cond()}, "text"),
        ({"cond": Cond(text=torch.zeros(1, 2, 12), label=torch.tensor([0]))}, "num_labels"),
        ({"t": torch.rand(1, 16)}, "one time"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(given, match):
    call = {"x": torch.zeros(1, 4, 8, 8), "t": torch.rand(1), "cond": cond(1), **given}
    with pytest.raises(UserError, match=match):
        make()(**call)


@pytest.mark.parametrize("settings", [{"width": 20}, {"head_dim": 2, "width": 16}, {"positions": "learned"}])
def test_shapes_that_do_not_fit_are_refused(settings):
    with pytest.raises(UserError):
        make(**settings)
