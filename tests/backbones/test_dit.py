"""DiT: its conditions, times by token, sizes."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig

from smalti.backbones.block import TransformerBlock
from smalti.backbones.block_order import with_cross
from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext

X = (2, 4, 6, 8)


TEXT = {"text_dim": 12, "modulation": "shared"}
"""What makes a DiT look at text."""


def awake(**changes):
    config = {name: value for name, value in DiT.tiny().config.items() if not name.startswith("_")}
    model = DiT(**config | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_every_condition_matters():
    model, x, t = awake(), torch.randn(X), torch.rand(2)
    given = {"pooled": torch.randn(2, 10), "label": torch.tensor([0, 1])}
    base = model(x, t, Cond(**given))
    for name, tensor in given.items():
        assert not torch.allclose(model(x, t, Cond(**{**given, name: tensor + 1})), base, atol=1e-3), name
    none = model(x, t, Cond(pooled=given["pooled"]))
    assert torch.equal(none, model(x, t, Cond(pooled=given["pooled"], label=torch.tensor([3, 3]))))


def test_times_by_token():
    model, x, t, cond = awake(), torch.randn(X), torch.rand(2), Cond(pooled=torch.randn(2, 10))
    same = t[:, None].expand(2, 12)
    torch.testing.assert_close(model(x, same, cond), model(x, t, cond), rtol=1e-4, atol=1e-5)
    changed = same.clone()
    changed[:, 5] = 0.99
    assert not torch.allclose(model(x, changed, cond), model(x, t, cond), atol=1e-3)


def test_unconditional_and_sigma():
    model = awake(num_labels=0, pooled_dim=0, learn_sigma=True)
    assert model(torch.randn(X), torch.rand(2), Cond()).shape == (2, 8, 6, 8)


def conditions():
    return Cond(text=torch.randn(2, 5, 12), pooled=torch.randn(2, 10), label=torch.tensor([0, 2]))


@pytest.mark.parametrize(("changes", "cond"), [({}, Cond(pooled=torch.ones(2, 10))), (TEXT, conditions())])
def test_gradient_checkpointing_gives_the_same_gradient(changes, cond):
    model, t = awake(**changes), torch.rand(2)
    x = torch.randn(X, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    model.enable_gradient_checkpointing()
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    (checkpointed,) = torch.autograd.grad(model(x, t, cond).square().sum(), x)
    torch.testing.assert_close(checkpointed, plain)
    assert len(runs) == 2


def test_lora_on_all_attentions_round_trips(tmp_path):
    model, cond, x, t = awake(**TEXT), conditions(), torch.randn(X), torch.rand(2)
    plain, weights = model(x, t, cond), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=2, target_modules=["to_qkv", "to_q", "to_kv", "to_out"], init_lora_weights=False))
    adapted = model(x, t, cond)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora" in name for name in trained)
    assert any("cross" in name for name in trained)
    model.save_lora_adapter(tmp_path)
    fresh = awake(**TEXT)
    fresh.load_state_dict(weights)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(fresh(x, t, cond), adapted)
    fresh.disable_adapters()
    assert torch.equal(fresh(x, t, cond), plain)


def test_compiles_without_graph_breaks():
    model, x, t, cond = awake(), torch.randn(X), torch.rand(2), Cond(pooled=torch.randn(2, 10))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, cond), model(x, t, cond), rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit():
    model, x, t = DiT.tiny(), torch.randn(X), torch.rand(2)
    with pytest.raises(UserError, match=r"needs cond\.pooled"):
        model(x, t, Cond())
    with pytest.raises(UserError, match=r"takes no cond\.pooled"):
        awake(pooled_dim=0)(x, t, Cond(pooled=torch.zeros(2, 10)))
    with pytest.raises(UserError, match="label"):
        awake(num_labels=0)(x, t, Cond(pooled=torch.zeros(2, 10), label=torch.zeros(2).long()))
    with pytest.raises(UserError, match=r"\(2, 12\)"):
        model(x, torch.rand(2, 5), Cond(pooled=torch.zeros(2, 10)))
    with pytest.raises(UserError, match="multiple of 4"):
        DiT(heads=1, head_dim=6)


def text_model():
    model = DiT.tiny_text()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_text_matters_and_padded_tokens_do_not():
    model, x, t = text_model(), torch.randn(X), torch.rand(2)
    text, pooled = torch.randn(2, 5, 12), torch.randn(2, 10)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    base = model(x, t, Cond(text=text, pooled=pooled, mask=mask))
    padded = text.clone()
    padded[0, 3:] = 9.0
    torch.testing.assert_close(model(x, t, Cond(text=padded, pooled=pooled, mask=mask)), base)
    real = text.clone()
    real[0, 0] += 1.0
    changed = model(x, t, Cond(text=real, pooled=pooled, mask=mask))
    assert not torch.allclose(changed[0], base[0], atol=1e-3)
    torch.testing.assert_close(changed[1], base[1])
    with pytest.raises(UserError, match=r"needs cond\.text"):
        model(x, t, Cond(pooled=pooled))


def test_every_block_begins_as_the_identity_with_text_too():
    model = DiT.tiny_text()
    tokens = torch.randn(2, 6, 16)
    context = BlockContext(torch.zeros(2, 96), memory=torch.randn(2, 5, 16))
    torch.testing.assert_close(model.blocks[0](tokens, context), tokens)


def test_a_block_with_text_is_pixarts():
    ours = TransformerBlock(16, 2, order=with_cross("standard"), modulation="shared", bare_cross=True)
    theirs = BasicTransformerBlock(
        16, 2, 8, cross_attention_dim=16, activation_fn="gelu-approximate", attention_bias=True,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    mine = {"modulation.table": weights["scale_shift_table"].flatten()}
    for kind in ("weight", "bias"):
        mine[f"attn.to_qkv.{kind}"] = torch.cat([weights[f"attn1.to_{part}.{kind}"] for part in "qkv"])
        mine[f"cross.to_q.{kind}"] = weights[f"attn2.to_q.{kind}"]
        mine[f"cross.to_kv.{kind}"] = torch.cat([weights[f"attn2.to_{part}.{kind}"] for part in "kv"])
        for name, layer in (("attn.to_out", "attn1.to_out.0"), ("cross.to_out", "attn2.to_out.0")):
            mine[f"{name}.{kind}"] = weights[f"{layer}.{kind}"]
        for name, layer in (("ffn.proj_in", "ff.net.0.proj"), ("ffn.proj_out", "ff.net.2")):
            mine[f"{name}.{kind}"] = weights[f"{layer}.{kind}"]
    ours.load_state_dict(mine)
    tokens, memory, shared = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.randn(2, 96)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    bias = (~mask)[:, None].float() * -10000.0
    expected = theirs(tokens, encoder_hidden_states=memory, encoder_attention_mask=bias, timestep=shared)
    found = ours(tokens, BlockContext(shared, memory=memory, memory_mask=mask))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
