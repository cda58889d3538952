"""muP by its table, on our backbones and on one of diffusers, and what is easy to get wrong."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig
from torch import nn

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.training.config import TrainConfig
from smalti.training.mup import MuP, MuReadout, Scaled
from smalti.training.optimizers import Factors, Optimizers


def dit(width):
    return DiT(heads=width // 8, head_dim=8, depth=2, num_labels=3, pooled_dim=5, text_dim=6, modulation="shared")


def mmdit(width):
    return MMDiT(
        in_channels=4, heads=width // 8, head_dim=8, num_double=1, num_single=1, text_dim=6, pooled_dim=5,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def pixart(width):
    return PixArtTransformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=width // 8, in_channels=4,
        out_channels=4, cross_attention_dim=width, caption_channels=6, norm_num_groups=1,
        use_additional_conditions=False,
    )  # fmt: skip


class LongSkip(nn.Module):
    """A U-ViT's long skip: two widths come in, one goes out."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.skip, self.leave = nn.Linear(3, width), nn.Linear(2 * width, width), nn.Linear(width, 3)

    def forward(self, x):
        h = self.enter(x)
        return self.leave(self.skip(torch.cat([h, h.tanh()], -1)))


def kinds(build, base=16, width=64):
    mu = MuP(build, base)
    model = mu.model(width)
    return {name: (one.kind, one.ratio) for name, one in mu.scaled(model).items()}


def test_kinds_of_a_dit():
    found = kinds(dit)
    for name, kind in {
        "x_embedder.weight": "input", "x_embedder.bias": "input", "time_embedder.mlp.linear_1.weight": "input",
        "time_embedder.mlp.linear_2.weight": "hidden", "label_embedder.table.weight": "input",
        "text_embedder.0.weight": "input", "text_embedder.2.weight": "hidden", "blocks.0.attn.to_qkv.weight": "hidden",
        "blocks.1.cross.to_kv.weight": "hidden", "blocks.0.ffn.proj_in.weight": "hidden",
        "shared_modulation.linear.weight": "hidden", "blocks.0.modulation.table": "input",
        "final_norm.linear.weight": "hidden", "proj_out.weight": "output", "proj_out.bias": "finite",
    }.items():  # fmt: skip
        assert found[name] == (kind, 1.0 if kind == "finite" else 4.0), name


def test_kinds_of_other_families():
    found = kinds(mmdit)
    assert found["double_blocks.0.ffn_text.proj_in.weight"] == ("hidden", 4.0)
    assert found["text_embedder.weight"] == ("input", 4.0)
    assert {name for name, (kind, _) in found.items() if kind == "output"} == {"proj_out.weight"}
    assert all("norm" in name for name, (kind, _) in found.items() if kind == "finite" and name != "proj_out.bias")
    found = kinds(pixart)
    assert found["transformer_blocks.0.attn2.to_k.weight"][0] == "hidden"
    assert found["adaln_single.linear.weight"][0] == "hidden"
    assert found["adaln_single.emb.timestep_embedder.linear_1.weight"][0] == "input"
    assert found["transformer_blocks.0.scale_shift_table"] == ("input", 4.0)
    assert found["proj_out.weight"] == ("output", 4.0)
    found = kinds(LongSkip)
    assert found["skip.weight"] == ("hidden", 4.0)
    assert found["leave.weight"] == ("output", 4.0)


def test_rates_and_decays_follow_the_table():
    mu = MuP(dit, 16)
    model = mu.model(64)
    found = mu.factors(model)
    assert found["blocks.0.attn.to_qkv.weight"] == Factors(0.25, 4.0)
    for name in ("x_embedder.weight", "blocks.0.attn.to_qkv.bias", "label_embedder.table.weight", "proj_out.weight",
                 "blocks.0.modulation.table"):  # fmt: skip
        assert found[name] == Factors(), name
    assert mu.factors(model, "muon")["blocks.0.attn.to_qkv.weight"] == Factors(0.5, 2.0)
    assert mu.factors(model, "muon")["time_embedder.mlp.linear_2.weight"] == Factors(0.25, 4.0)  # AdamW has it
    sgd = mu.factors(model, "sgd")
    assert (sgd["blocks.0.attn.to_qkv.weight"].rate, sgd["x_embedder.weight"].rate) == (1.0, 4.0)
    assert set(mu.factors(mu.model(16)).values()) == {Factors()}
    with pytest.raises(UserError, match="sgd"):
        mu.factors(model, "adagrad")


def test_weights_start_by_their_fan_in_and_the_readout_at_zero():
    mu = MuP(dit, 16)
    model = mu.model(256, seed=0)
    assert model.blocks[0].attn.to_qkv.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert model.blocks[0].ffn.proj_out.weight.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert model.x_embedder.weight.std().item() == pytest.approx(16**-0.5, rel=0.03)  # 4 channels in patches of 2 x 2
    assert model.shared_modulation.linear.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)  # not zero
    assert model.label_embedder.table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].modulation.table.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.proj_out.weight.any()
    assert not model.blocks[0].attn.to_qkv.bias.any()


def test_an_own_start_is_the_models_at_the_base_and_keeps_its_zeros_elsewhere():
    mu = MuP(dit, 16, start="own")
    torch.manual_seed(0)
    plain = dit(16)
    ours = mu.model(16, seed=0)
    for name, one in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], one), name
    wide, base = mu.model(256, seed=0), mu.model(16, seed=0)

    def spread(name):
        return wide.get_parameter(name).std().item() / base.get_parameter(name).std().item()

    assert spread("blocks.0.attn.to_qkv.weight") == pytest.approx(1 / 4, rel=0.1)  # one drawn base, so not to the digit
    assert spread("x_embedder.weight") == pytest.approx(1, rel=0.2)
    assert spread("label_embedder.table.weight") == pytest.approx(1, rel=0.3)
    assert not wide.shared_modulation.linear.weight.any()
    assert not wide.proj_out.weight.any()
    with pytest.raises(UserError, match="fan-in"):
        MuP(dit, 16, start="kaiming")


def test_the_readout_divides_by_the_ratio_and_folds_away():
    mu = MuP(dit, 16, output_mult=2.0)
    model = mu.model(64, seed=0)
    assert isinstance(model.proj_out, MuReadout)
    assert model.proj_out.factor == 0.5
    nn.init.normal_(model.proj_out.weight)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    cond = Cond(text=torch.randn(2, 3, 6), pooled=torch.randn(2, 5), label=torch.tensor([0, 2]))
    plain = mu.fold(model)
    assert type(plain.proj_out) is nn.Linear
    torch.testing.assert_close(plain(x, t, cond), model(x, t, cond))
    assert torch.equal(plain.proj_out.weight, model.proj_out.weight * 0.5)


def test_loaded_weights_are_not_drawn_anew():
    mu = MuP(dit, 16)
    model = dit(64)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    mu.set_readouts(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_at_the_base_width_all_is_as_without():
    mu = MuP(dit, 16)
    ours = mu.model(16, seed=0)
    plain = dit(16)
    plain.load_state_dict(ours.state_dict())
    config = TrainConfig(steps=5, batch=1, weight_decay=0.1)
    cond = Cond(text=torch.randn(2, 3, 6), pooled=torch.randn(2, 5), label=torch.tensor([0, 2]))
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    for model, factors in ((ours, mu.factors(ours)), (plain, None)):
        optimizers = Optimizers(model, config, factors)
        for step in range(3):
            (model(x, t, cond) - x).square().mean().backward()
            optimizers.step(step)
            optimizers.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), plain.parameters(), strict=True))


def test_the_trainers_optimizers_take_the_factors():
    mu = MuP(dit, 16)
    model = mu.model(64)
    optimizers = Optimizers(
        model, TrainConfig(steps=5, batch=1, learning_rate=1e-2, weight_decay=0.1), mu.factors(model)
    )
    optimizers.zero_grad()
    optimizers.step(0)
    seen = {optimizers.names[one]: (group["lr"], group["weight_decay"]) for part in optimizers.parts
            for group in part.param_groups for one in group["params"]}  # fmt: skip
    assert seen["blocks.0.attn.to_qkv.weight"] == pytest.approx((2.5e-3, 0.4))  # rate * decay stays
    assert seen["proj_out.weight"] == pytest.approx((1e-2, 0.1))
    assert seen["blocks.0.attn.to_qkv.bias"] == (1e-2, 0.0)
    groups = mu.groups(model, 1e-2, 0.1)
    assert {(group["lr"], round(group["weight_decay"], 6)) for group in groups} == {
        (2.5e-3, 0.4), (1e-2, 0.1), (1e-2, 0.0)
    }  # fmt: skip


def test_of_lora_the_first_matrix_moves_as_its_layer_and_the_table_names_all():
    mu = MuP(dit, 16)
    model = mu.model(64)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_out", "x_embedder"]))
    found = mu.factors(model)
    assert found["blocks.0.attn.to_out.lora_A.default.weight"] == Factors(0.25, 4.0)
    assert found["blocks.0.attn.to_out.lora_B.default.weight"] == Factors()
    assert found["x_embedder.lora_A.default.weight"] == Factors()  # it sums over channels
    table = mu.table(mu.model(64))
    assert table["base"] == 16
    assert table["parameters"]["proj_out.weight"] == {"kind": "output", "ratio": 4.0}


class Experts(nn.Module):
    """Two experts in one parameter (E, in, out)."""

    def __init__(self, width):
        super().__init__()
        self.enter = nn.Linear(3, width)
        self.weights = nn.Parameter(torch.zeros(2, width, 2 * width))


def test_stacked_experts_are_hidden_and_drawn_by_their_owner():
    mu = MuP(Experts, 16)
    assert mu.scaled(Experts(64))["weights"] == Scaled("hidden", 4.0)
    assert mu.factors(Experts(64))["weights"] == Factors(0.25, 4.0)
    with pytest.raises(Refusal, match="weights is a table of matrices of Experts"):
        mu.model(64)


def test_what_grows_otherwise_is_refused():
    with pytest.raises(Refusal, match="head_dim grows from 8 to 16"):
        MuP(lambda width: DiT(heads=2, head_dim=width // 2), 16)
    with pytest.raises(Refusal, match="more than width"):
        MuP(lambda width: DiT(heads=width // 8, head_dim=8, depth=width // 8), 16)
