"""What is taken for the sample, the time and a sublayer; whole families are read in tests/families."""

import pytest
import torch
from small_models import ReuseOdd
from torch import nn

import smalti
from smalti.core.errors import Refusal
from smalti.seams.anatomy import read_anatomy, time_argument


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.to_out(nn.functional.scaled_dot_product_attention(*[self.to_q(x)[:, None]] * 3)[:, 0])


class Block(nn.Module):
    """Attention, a feed-forward layer whose parts the block holds itself, and a condition."""

    def __init__(self):
        super().__init__()
        self.attn, self.up, self.act, self.down = Attention(), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)
        self.to_time_embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))

    def forward(self, x, t):
        x = x + self.attn(x) + self.to_time_embed(t[:, None, None])
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, words, noisy_tokens, noisy_time):
        for block in self.blocks:
            noisy_tokens = block(noisy_tokens, noisy_time)
        return noisy_tokens + words


def model_with(*parameters):
    namespace = {}
    exec(f"def forward(self, {', '.join(parameters)}): pass", namespace)
    return type("Named", (Model,), {"forward": namespace["forward"]})()


@pytest.mark.parametrize(
    ("parameters", "sample", "time"),
    [
        (["hidden_states", "timestep"], "hidden_states", "timestep"),
        (["x", "t", "cond"], "x", "t"),
        (["hidden_states", "r_timestep", "timestep"], "hidden_states", "timestep"),
        (
            ["input_ids", "vision_tokens", "vision_token_shapes", "vision_timesteps"],
            "vision_tokens",
            "vision_timesteps",
        ),
        (["places", "latents", "latents_time", "places_time"], "latents", "latents_time"),
    ],
)
def test_sample_and_time_are_told_by_their_names(parameters, sample, time):
    anatomy = read_anatomy(model_with(*parameters))
    assert (anatomy.sample, anatomy.time) == (sample, time)


@pytest.mark.parametrize("parameters", [["inputs_embeds"], ["x", "num_timesteps_seen"], ["x", "timeline"]])
def test_a_model_without_time_is_refused(parameters):
    model = model_with(*parameters)
    assert time_argument(model) is None
    with pytest.raises(Refusal, match="takes no argument that holds the time"):
        read_anatomy(model)


@torch.no_grad()
def test_a_feed_forward_layer_without_a_module_of_its_own_is_skipped_with_what_leads_to_it():
    torch.manual_seed(0)
    model, ran = Model().eval().requires_grad_(False), []
    anatomy = read_anatomy(model)
    for block in anatomy.blocks:
        assert [(one.site.name, one.site.kind) for one in block.sublayers] == [("attn", "attention"), ("down", "ffn")]
        assert [one.site.name for one in block.sublayers[1].feeders] == ["up", "act"]
    inner = nn.Linear.forward
    x = torch.randn(2, 5, 8)

    def run(evaluations):
        for index in range(evaluations):
            x_t = model(1.0, x, torch.full((2,), 1 - index / 10))
        return x_t

    before = run(2)
    with smalti.apply(model, ReuseOdd()) as handle:
        model.blocks[0].up.register_forward_hook(lambda *_: ran.append(inner))
        after = run(2)
    assert len(ran) == 2  # called, but on the second time without a product
    assert handle.report().methods[0].events == {"reused": 4}
    assert not torch.equal(after, before)


class Noted(nn.Linear):
    """Writes down that it ran; with two inputs, it takes their sum."""

    def __init__(self):
        super().__init__(8, 8)
        self.runs = 0

    def forward(self, *inputs):
        self.runs += 1
        return super().forward(sum(inputs))


class ParallelBlock(nn.Module):
    """Attention and a feed-forward layer side by side from one norm; the block says what need not run."""

    feeders = {"join": ("norm", "attn", "up")}

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.up, self.join = Noted(), Attention(), Noted(), Noted()

    def forward(self, x, t):
        normed = self.norm(x)
        return x + self.join(self.attn(normed), self.up(normed))


@torch.no_grad()
def test_a_block_may_say_what_feeds_what():
    model, x = Model(), torch.randn(2, 3, 8)
    block = ParallelBlock()
    model.blocks = nn.ModuleList([block, ParallelBlock()])
    (sublayer,) = read_anatomy(model).blocks[0].sublayers
    kinds = {one.site.name: one.site.kind for one in (sublayer, *sublayer.feeders)}
    assert kinds == {"join": "fused", "norm": "ffn", "attn": "attention", "up": "ffn"}
    with smalti.apply(model, ReuseOdd()):
        for evaluations, t in ((1, 0.9), (1, 0.5), (2, 0.1)):
            model(1.0, x, torch.full((2,), t))
            assert [one.runs for one in (block.norm, block.up, block.join)] == [evaluations] * 3
