"""MMDiT: what its conditions do, its modes, adapters and compilation."""

import pytest
import torch
from peft import LoraConfig

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond


def awake(**changes):
    """A tiny model whose weights are all random, so that everything has an effect."""
    config = {name: value for name, value in MMDiT.tiny().config.items() if not name.startswith("_")}
    model = MMDiT(**config | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def conditions(batch=2, length=5, **more):
    return Cond(text=torch.randn(batch, length, 12), pooled=torch.randn(batch, 10), **more)


X = (2, 4, 6, 8)


def test_masked_text_is_as_if_it_were_not_there():
    model, cond, x, t = awake(), conditions(), torch.randn(X), torch.rand(2)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    masked = model(x, t, Cond(text=cond.text, pooled=cond.pooled, mask=mask))
    torch.testing.assert_close(
        masked, model(x, t, Cond(text=cond.text[:, :3], pooled=cond.pooled)), rtol=1e-4, atol=1e-5
    )
    changed = torch.where(mask[..., None], cond.text, cond.text + 9)
    torch.testing.assert_close(masked, model(x, t, Cond(text=changed, pooled=cond.pooled, mask=mask)))
    assert not torch.allclose(masked, model(x, t, cond), atol=1e-3)


def test_every_condition_matters():
    model, x, t = awake(guidance_embeds=True), torch.randn(X), torch.rand(2)
    given = {"text": torch.randn(2, 5, 12), "pooled": torch.randn(2, 10), "label": torch.tensor([0, 1])}
    given["guidance"] = torch.tensor([1.0, 2.0])
    base = model(x, t, Cond(**given))
    for name, tensor in given.items():
        assert not torch.allclose(model(x, t, Cond(**{**given, name: tensor + 1})), base, atol=1e-3), name
    assert not torch.allclose(model(x, t / 2, Cond(**given)), base, atol=1e-3)


def test_no_label_is_the_none_row():
    model, x, t = awake(), torch.randn(X), torch.rand(2)
    cond = conditions()
    none = Cond(text=cond.text, pooled=cond.pooled, label=torch.tensor([3, 3]))
    assert torch.equal(model(x, t, cond), model(x, t, none))


def test_double_blocks_in_another_order_are_another_model_that_is_saved_as_such(tmp_path):
    model, cond, x, t = awake(block_order="macaron"), conditions(), torch.randn(X), torch.rand(2)
    assert {name for name, _ in model.double_blocks[0].named_children()} >= {"ffn_a", "ffn_b_text"}
    model.save_pretrained(tmp_path)
    again = MMDiT.from_pretrained(tmp_path)
    assert torch.equal(again(x, t, cond), model.eval()(x, t, cond))


def test_the_place_of_a_token_matters():
    model, t, cond = awake(), torch.rand(1), conditions(1)
    x = torch.randn(1, 4, 6, 8)
    turned = model(x.transpose(2, 3), t, cond).transpose(2, 3)
    assert not torch.allclose(turned, model(x, t, cond), atol=1e-3)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, cond, x, t = awake(), conditions(), torch.randn(X), torch.rand(2)
    gradients = []
    for on in (False, True):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        runs = []
        handle = model.single_blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        loss = model(x, t, cond).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())[4:20]))
        handle.remove()
        assert len(runs) == (2 if on else 1)
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_forward_derivative_with_the_math_backend():
    model, cond = awake(), conditions()
    model.attention_backend = "math"
    x, t, step = torch.randn(X), torch.tensor([0.3, 0.6]), torch.randn(X)
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda a: model(a, t, cond), (x,), (step,))
        near = (model(x + 1e-2 * step, t, cond) - model(x - 1e-2 * step, t, cond)) / 2e-2
    assert (tangent - near).norm() < 0.02 * near.norm()


def test_inference_mode_then_training():
    model, cond, t = awake(), conditions(), torch.rand(2)
    with torch.inference_mode():
        model(torch.randn(2, 4, 10, 2), t, cond)
    model(torch.randn(2, 4, 10, 2), t, cond).sum().backward()


def test_float32_state_with_a_bfloat16_model():
    model, cond, x, t = awake(), conditions(), torch.randn(X), torch.rand(2)
    expected = model(x, t, cond)
    got = model.to(torch.bfloat16)(x, t, cond)
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("targets", [["to_qkv", "to_out"], ["proj_in", "proj_out", "x_embedder"]])
def test_lora_changes_the_output_and_round_trips(tmp_path, targets):
    model, cond, x, t = awake(), conditions(), torch.randn(X), torch.rand(2)
    plain = model(x, t, cond)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = model(x, t, cond)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    model.save_lora_adapter(tmp_path)
    fresh = MMDiT.from_config(model.config)
    fresh.load_state_dict(weights)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(fresh(x, t, cond), adapted)
    fresh.disable_adapters()
    assert torch.equal(fresh(x, t, cond), plain)


def test_compiles_without_graph_breaks():
    model, x, t = awake(num_single=1, num_labels=0), torch.randn(X), torch.rand(2)
    cond = conditions(mask=torch.tensor([[True] * 5, [True, False, False, False, False]]))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, cond), model(x, t, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager_with_gradients():
    model, x, t, cond = awake(num_single=1), torch.randn(X), torch.rand(2), conditions(label=torch.tensor([0, 3]))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        out = call(x, t, cond)
        out.square().mean().backward()
        results.append((out, model.single_blocks[0].attn.to_qkv.weight.grad.clone()))
    for eager, fused in zip(*results):
        torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-4)


def test_refuses_what_does_not_fit():
    model, x, t, cond = MMDiT.tiny(), torch.randn(X), torch.rand(2), conditions()
    with pytest.raises(UserError, match=r"needs cond\.text"):
        model(x, t, Cond(pooled=cond.pooled))
    with pytest.raises(UserError, match=r"needs cond\.pooled"):
        model(x, t, Cond(text=cond.text))
    with pytest.raises(UserError, match="guidance"):
        model(x, t, conditions(guidance=torch.ones(2)))
    with pytest.raises(UserError, match="one time a sample"):
        model(x, torch.rand(2, 12), cond)
    with pytest.raises(UserError, match="multiples of 2"):
        model(x[..., :3], t, cond)
    with pytest.raises(UserError, match="label"):
        awake(num_labels=0)(x, t, conditions(label=torch.tensor([0, 0])))
    with pytest.raises(UserError, match="guidance"):
        awake(guidance_embeds=True)(x, t, cond)
    with pytest.raises(UserError, match="head_dim = 8"):
        MMDiT(heads=2, head_dim=8)


def test_a_clip_of_one_frame_is_a_picture_and_frames_have_a_place():
    model, cond, x, t = awake(), conditions(), torch.randn(X), torch.rand(2)
    torch.testing.assert_close(model(x[:, :, None], t, cond)[:, :, 0], model(x, t, cond))
    clip = torch.randn(2, 4, 3, 4, 6)
    forward, backward = model(clip, t, cond), model(clip.flip(2), t, cond).flip(2)
    assert forward.shape == clip.shape
    assert not torch.allclose(forward, backward, atol=1e-4)
    still = model(clip[:, :, :1].expand(-1, -1, 3, -1, -1), t, cond)
    assert not torch.allclose(still[:, :, 0], still[:, :, 1], atol=1e-4)
