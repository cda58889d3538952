"""The other methods: which parameters each learns, and how a copied control path steers."""

import copy

import pytest
import torch
from task_toys import bank_of, dit, inputs
from torch import nn

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal
from smalti.core.protocols import Cond
from smalti.training.adapters import ControlCopy, bias_norm_scale, bias_only, full_copy, lora, scale_shift
from smalti.training.ema import EMA
from smalti.training.task_set import Spatial


class Normed(nn.Module):
    """Layers of every kind."""

    def __init__(self):
        super().__init__()
        self.norm, self.proj_in, self.attn = nn.LayerNorm(4), nn.Linear(4, 6), nn.Module()
        self.attn.to_out = nn.Linear(6, 4)
        self.bare = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.bare(self.attn.to_out(self.proj_in(self.norm(x))))


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        (bias_only, {"/norm": {"shift": 4}, "/proj_in": {"shift": 6}, "/attn/to_out": {"shift": 4}}),
        (scale_shift, {name: {"scale": o, "shift": o} for name, o in
                       (("/norm", 4), ("/proj_in", 6), ("/attn/to_out", 4), ("/bare", 4))}),
        (lora(2), {"/proj_in": {"down": 8, "up": 12}, "/attn/to_out": {"down": 12, "up": 8},
                   "/bare": {"down": 8, "up": 8}}),
        (bias_norm_scale, {"/norm": {"scale": 4, "shift": 4}, "/proj_in": {"shift": 6},
                           "/attn/to_out": {"scale": 1, "shift": 4}}),
    ],
)  # fmt: skip
def test_what_each_method_learns(method, shapes):
    model, x = Normed(), torch.randn(3, 4)
    before = model(x)
    bank = bank_of("one", model=model, method=method, filled=False)
    found = {path: {name: one[0].numel() for name, one in layer.named_parameters()}
             for path, layer in bank.tasks.layers.items()}  # fmt: skip
    assert found == shapes
    assert torch.equal(bank(x, task="one"), before)
    total = sum(sum(one.values()) for one in shapes.values())
    assert bank.tasks.count("one") == total
    assert bank.share("one") == total / sum(one.numel() for one in model.parameters())


def test_a_full_copy_leaves_the_model_alone():
    model = dit().requires_grad_(False)
    copied = full_copy(model)
    assert all(one.requires_grad for one in copied.parameters())
    assert not any(one.requires_grad for one in model.parameters())
    assert not {*copied.parameters()} & {*model.parameters()}


def control(filled=True):
    model = dit()
    before = copy.deepcopy(model.state_dict())
    made = ControlCopy(model, spatial=Spatial(1, 8))
    if filled:
        for one in (*made.joins.parameters(), *made.embedder.parameters()):
            nn.init.normal_(one, std=0.3)
    return model, made, before


def with_picture(seed: int):
    x, t, cond = inputs()
    picture = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x, t, Cond(label=cond.label, pooled=cond.pooled, extra={"spatial": picture})


def test_a_fresh_control_path_changes_nothing():
    model, made, _ = control(filled=False)
    given = with_picture(0)
    assert torch.equal(made(*given), model(*given))
    assert len(made.copies) == 1  # half of two blocks


def test_a_control_path_follows_its_condition():
    model, made, before = control()
    one, other = made(*with_picture(0)), made(*with_picture(1))
    assert not torch.allclose(one, other, atol=1e-3)
    one.square().mean().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_the_control_path_shares_its_model():
    model, made, _ = control()
    average = EMA(made, 0.9)
    assert average.model.shared.model is model
    assert not {*made.parameters()} & {*model.parameters()}
    torch.testing.assert_close(average.model(*with_picture(0)), made(*with_picture(0)))


def test_a_model_without_one_list_of_blocks_is_refused():
    with pytest.raises(Refusal, match="use a DiT"):
        ControlCopy(MMDiT.tiny())
