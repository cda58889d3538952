"""LoRA through PEFT: what learns, what is kept, that several add up, and that merging changes nothing but the form."""

import copy

import pytest
import torch
from torch import nn

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.training.ema import EMA
from smalti.training.lora import (
    LoRASettings,
    adapted_layers,
    adapter_weights,
    add_lora,
    has_lora,
    merge_loras,
    save_lora,
    stack_loras,
)


@pytest.fixture
def model():
    model = MMDiT.tiny().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.3)
    return model


def out(model):
    generator = torch.Generator().manual_seed(3)
    cond = Cond(torch.randn(2, 5, 12, generator=generator), torch.randn(2, 10, generator=generator))
    with torch.no_grad():
        return model(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.3, 0.8]), cond)


def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def test_all_linears_of_attention_and_ffn_are_adapted_and_no_others(model):
    layers = adapted_layers(model, LoRASettings(4))
    linears = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and "blocks." in name]
    assert set(layers) == {name for name in linears if "modulation" not in name}
    few = adapted_layers(model, LoRASettings(4, only=("attention",)))
    assert few
    assert len(few) < len(layers)
    assert not any("ffn" in name for name in few if name.startswith("double"))


def test_a_fresh_adapter_changes_nothing_and_alone_learns(model):
    before, frozen = out(model), {name: one.clone() for name, one in model.named_parameters()}
    weights = add_lora(model, LoRASettings(2))
    assert torch.equal(out(model), before)
    assert {id(one) for one in weights} == {id(one) for one in model.parameters() if one.requires_grad}
    assert sum(one.numel() for one in weights) < 0.5 * sum(one.numel() for one in frozen.values())
    optimizer = torch.optim.SGD(weights, lr=0.1)
    model.train()
    cond = Cond(torch.randn(2, 5, 12), torch.randn(2, 10))
    for _ in range(2):
        model(torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), cond).square().mean().backward()
        optimizer.step()
    now = {name.replace(".base_layer", ""): one for name, one in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(now[name], one) for name, one in frozen.items())
    assert not torch.allclose(out(model.eval()), before, atol=1e-5)


def test_the_average_follows_the_adapter_alone(model):
    add_lora(model, LoRASettings(2))
    ema = EMA(model, 0.99)
    ema.updates = 10_000
    start = {name: one.clone() for name, one in adapter_weights(ema.model).items()}
    fill(model, 1)
    ema.update()
    for name, one in adapter_weights(ema.model).items():
        expected = 0.99 * start[name] + 0.01 * adapter_weights(model)[name]
        assert torch.allclose(one, expected, atol=1e-7)


def test_saved_stacked_and_merged(model, tmp_path):
    plain = copy.deepcopy(model)
    alone = {}
    for seed in (1, 2):
        one = copy.deepcopy(plain)
        add_lora(one, LoRASettings(2, alpha=4.0))
        fill(one, seed)
        save_lora(one, tmp_path / str(seed))
        alone[seed] = (one, {name: weight.clone() for name, weight in adapter_weights(one).items()})
    read = copy.deepcopy(plain)
    stack_loras(read, {"first": (tmp_path / "1", 1.0)})
    assert torch.allclose(out(read), out(alone[1][0]), atol=1e-5)
    assert not torch.allclose(out(read), out(plain), atol=1e-3)

    both = copy.deepcopy(plain)
    stack_loras(both, {"first": (tmp_path / "1", 0.5), "second": (tmp_path / "2", 2.0)})
    by_hand = copy.deepcopy(plain)
    state = dict(by_hand.named_parameters())
    with torch.no_grad():
        for seed, weight in ((1, 0.5), (2, 2.0)):
            found = alone[seed][1]
            for name, down in found.items():
                if "lora_A" in name:
                    up = found[name.replace("lora_A", "lora_B")]
                    state[name.replace("lora_A.weight", "weight")] += weight * 4.0 / 2 * up @ down
    assert torch.allclose(out(both), out(by_hand), atol=1e-4)

    names = [name for name, _ in plain.named_modules()]
    merge_loras(both)
    assert not has_lora(both)
    assert [name for name, _ in both.named_modules()] == names  # the plain form: nothing is left to compute beside W
    assert torch.allclose(out(both), out(by_hand), atol=1e-4)


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(UserError, match="rank from 1"):
        LoRASettings(0)
    with pytest.raises(UserError, match="choose from attention"):
        LoRASettings(only=("norms",))
    with pytest.raises(UserError, match="no adapter in"):
        stack_loras(model, {"one": (tmp_path, 1.0)})
    with pytest.raises(UserError, match="carries no adapter"):
        merge_loras(model)
    with pytest.raises(Refusal, match="takes no PEFT adapters"):
        add_lora(nn.Linear(2, 2), LoRASettings())


def test_other_backbones_and_families_take_it():
    model = DiT(in_channels=4, patch_size=1, depth=2, heads=2, head_dim=8, num_labels=3)
    assert add_lora(model, LoRASettings(2))
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    layers = adapted_layers(flux, LoRASettings(2))
    assert any("add_q_proj" in name for name in layers)
    assert any(name.endswith("proj_out") and name.startswith("single") for name in layers)
    assert not any("norm" in name for name in layers)
    assert add_lora(flux, LoRASettings(2))
