"""Calls that run some tokens: on every family the active ones come out as in the dense call, or it is refused."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import GRIDS, build, call, readable_families

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal
from smalti.core.protocols import Cond
from smalti.core.tokens import TokenMemory, TokensMethod
from smalti.ops.token_subset import is_in

FAMILIES = readable_families()
ENGAGED = ("mmdit", "our-dit", "flux", "flux2", "sd3", "pixart", "dit", "wan", "ltx", "ltx2", "lumina2", "lumina-next",
           "cogvideox", "qwen-image", "hunyuan-dit", "hunyuan-video", "auraflow", "z-image", "prx",
           "stable-audio")  # fmt: skip
REFUSED = {
    "sana": "attn1 .* calls no scaled_dot_product_attention",
    "sana-video": "calls no scaled_dot_product_attention",
    "latte": "hold 3 and 24 image tokens",
    "ernie-image": "along the first axis",
    "nucleus-moe": "another result when only some tokens run",
    "allegro": "cannot run some of its tokens",
}


@dataclass(frozen=True)
class Probe(TokensMethod):
    """A dense call, then one of a third of the tokens on the same inputs: nothing has moved, so nothing may change."""

    is_own: bool = True
    found: list = field(default_factory=list)

    @classmethod
    def neutral(cls):
        return cls()

    @classmethod
    def active(cls):
        return cls()

    @property
    def is_neutral(self):
        return True

    def at_tokens(self, state, call):
        memory, batch = TokenMemory(), len(call.sample)
        dense = call.run(None, memory)
        generator = torch.Generator().manual_seed(5)
        orders = [torch.randperm(call.count, generator=generator) for _ in range(batch if self.is_own else 1)]
        active = torch.stack(orders)[:, : max(1, call.count // 3)].sort().values
        some = call.run(active if self.is_own else active[0], memory)
        change = (call.to_tokens(dense) - call.to_tokens(some)).abs() / dense.abs().max()
        runs = is_in(active, call.count)[:, :, None, None]
        self.found.append(((change * runs).max().item(), (change * ~runs).max().item(), len(memory.handed_on)))
        return dense


def probe(name, is_own, batch=2):
    """Largest change at active and other places, and how many blocks hand their stream on."""
    model, method = build(FAMILIES[name]), Probe(is_own)
    with smalti.apply(model, method), torch.no_grad():
        call(model, FAMILIES[name], FAMILIES[name].inputs(0, batch, GRIDS["small"]), 0.5)
    return method.found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_active_tokens_are_exact_while_nothing_moves(name):
    reason = None
    try:
        at_active, elsewhere, _ = probe(name, is_own=True)
    except Refusal as refusal:
        reason = str(refusal)
    if reason is not None:
        assert name not in ENGAGED, reason
        assert len(reason) > 20
        assert "\n" not in reason
        pytest.skip(reason)
    assert name not in REFUSED
    assert at_active < 1e-5
    assert elsewhere > 1e-3  # those did not run
    assert probe(name, is_own=False)[0] < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name):
    with pytest.raises(Refusal, match=REFUSED[name]):
        probe(name, is_own=True)


@pytest.mark.parametrize(
    ("name", "handed"), [("flux", 3), ("sd3", 2), ("mmdit", 1), ("our-dit", 1), ("hunyuan-dit", 3)]
)
def test_streams_stay_short_from_block_to_block(name, handed):
    assert probe(name, is_own=False)[2] == handed


def test_a_batch_as_large_as_its_tokens_is_refused_where_an_axis_could_be_either():
    with pytest.raises(Refusal, match="cannot be told which axis holds tokens"):
        probe("mmdit", is_own=True, batch=24)


def test_methods_inside_of_blocks_are_refused_beside_it():
    with pytest.raises(Refusal, match="changes how many tokens blocks see"):
        smalti.apply(build(FAMILIES["mmdit"]), Probe(), TaylorSeer())
    with pytest.raises(Refusal, match="both decide which tokens run"):
        smalti.apply(build(FAMILIES["mmdit"]), Probe(), Probe())


@dataclass(frozen=True)
class Half(Probe):
    """After a dense first call the even tokens run; the prediction of the others is zero."""

    def init(self):
        return TokenMemory()

    def at_tokens(self, state, call):
        if call.moment.step == 0:
            return call.run(None, state)
        kept = {name: one.k.clone() for name, one in state.kept.items()}
        active = torch.arange(0, call.count, 2)
        out = call.run(active, state)
        for name, one in state.kept.items():
            moved = (one.k != kept[name]).any(-1).any(1)[0].nonzero().flatten().tolist()
            self.found.append(moved)
        return out


def test_rows_of_active_tokens_and_text_alone_are_written():
    model, method = build(FAMILIES["mmdit"]), Half()
    cond = Cond(text=torch.randn(1, 5, 12), pooled=torch.randn(1, 10))
    with smalti.apply(model, method), torch.no_grad():
        for t in (0.9, 0.5):
            model(torch.randn(1, 4, 8, 12), torch.tensor([t]), cond)
    assert method.found == [[0, 1, 2, 3, 4, *range(5, 29, 2)]] * 3


@pytest.mark.parametrize("padded", [0, 2])
def test_a_mask_of_keys_holds_for_kept_keys(padded):
    """Padding of the text is looked at by nobody, also where only some tokens run."""
    torch.manual_seed(0)
    model = build(FAMILIES["mmdit"])
    assert isinstance(model, MMDiT)
    mask = torch.tensor([[True] * (5 - padded) + [False] * padded])
    text, x, outputs = torch.randn(1, 5, 12), torch.randn(2, 1, 4, 8, 12), []
    for noise in (0.0, 10.0):
        other = text.clone()
        other[:, 5 - padded :] += noise
        with smalti.apply(model, Half()), torch.no_grad():
            for t, sample in zip((0.9, 0.5), x, strict=True):
                cond = Cond(text=other, pooled=torch.zeros(1, 10), mask=mask)
                outputs.append(model(sample, torch.tensor([t]), cond))
    even = torch.arange(24).reshape(1, 1, 4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3) % 2 == 0
    assert torch.allclose(outputs[1] * even, outputs[3] * even, atol=1e-5)
