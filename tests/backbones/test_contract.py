"""What every backbone keeps; backbones are the classes with `tiny` presets in the modules of the folder."""

import doctest
import inspect

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin

from smalti.core.discovery import load_member, members
from smalti.core.protocols import Cond, Denoiser


def backbones():
    for name in members("backbones"):
        module = load_member("backbones", name)
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__:
                yield value


def presets():
    for backbone in backbones():
        yield from (getattr(backbone, name) for name in dir(backbone) if name.startswith("tiny"))


@pytest.fixture(params=list(presets()), ids=lambda preset: preset.__qualname__)
def model(request):
    """A tiny model with random weights everywhere: fresh ones predict zero."""
    model = request.param().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model, batch=3):
    """Inputs by what the configuration says the model takes."""
    config = model.config
    text, pooled, labels = config.get("text_dim"), config.get("pooled_dim"), config.get("num_labels")
    side = 4 * config["patch_size"]
    cond = Cond(
        text=torch.randn(batch, 5, text) if text else None,
        pooled=torch.randn(batch, pooled) if pooled else None,
        label=torch.arange(batch) % labels if labels else None,
    )
    return torch.randn(batch, config["in_channels"], side, side + config["patch_size"]), torch.rand(batch), cond


def settings(model):
    # json turns tuples into lists
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")}


def test_there_are_backbones():
    assert {"MMDiT", "DiT"} <= {backbone.__name__ for backbone in backbones()}


def test_shape_and_protocol(model):
    x, t, cond = inputs(model)
    assert isinstance(model, Denoiser)
    out = model(x, t, cond)
    assert out.shape == x.shape
    assert out.std() > 0
    assert out.isfinite().all()


def test_every_weight_and_the_input_have_a_gradient(model):
    x, t, cond = inputs(model)
    x.requires_grad_()
    model(x, t, cond).square().mean().backward()
    assert x.grad.abs().max() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_saves_and_loads_bit_exactly(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert settings(loaded) == settings(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x, t, cond = inputs(model)
    assert torch.equal(loaded(x, t, cond), model(x, t, cond))


def test_a_sample_does_not_depend_on_its_batch(model):
    x, t, cond = inputs(model)
    together = model(x, t, cond)
    limit = 1e-5 * together.abs().max().clamp(min=1)
    for index in range(len(x)):
        one = slice(index, index + 1)
        assert (model(x[one], t[one], cond[one]) - together[one]).abs().max() <= limit


def test_bfloat16(model):
    x, t, cond = inputs(model)
    expected = model(x, t, cond)
    got = model.to(torch.bfloat16)(x.bfloat16(), t, cond.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


def test_block_names_exist(model):
    classes = {type(module).__name__ for module in model.modules()}
    assert model._supports_gradient_checkpointing
    assert set(model._no_split_modules) <= classes
    assert set(model._repeated_blocks) <= classes


@pytest.mark.parametrize("name", members("backbones"))
def test_examples_run(name):
    assert doctest.testmod(load_member("backbones", name)).failed == 0
