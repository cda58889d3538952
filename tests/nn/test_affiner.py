import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smalti.core.errors import Refusal
from smalti.nn.affiner import Affiner, Form, channels_of, merged_weights

K, B = 3, 4
FORM = Form(rank=2)
LAYERS = {
    "linear": (nn.Linear(5, 7), (B, 6, 5)),
    "vector": (nn.Linear(5, 7), (B, 5)),
    "no bias": (nn.Linear(5, 7, bias=False), (B, 6, 5)),
    "conv": (nn.Conv2d(3, 6, 3, stride=2, padding=1), (B, 3, 8, 6)),
    "clips": (nn.Conv3d(3, 4, (1, 2, 2), stride=(1, 2, 2)), (B, 3, 2, 4, 4)),
    "layer norm": (nn.LayerNorm(7), (B, 6, 7)),
    "group norm": (nn.GroupNorm(2, 6), (B, 6, 3, 3)),
    "embedding": (nn.Embedding(9, 5), (B, 6)),
}
BRANCHES = ("linear", "vector", "no bias", "conv", "clips")


def ready(kind: str, form: Form = FORM, filled: bool = True):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    affiner = Affiner(layer, form, K)
    if filled:
        for parameter in affiner.parameters():
            nn.init.normal_(parameter, std=0.5)
    x = torch.randint(9, shape) if kind == "embedding" else torch.randn(shape)
    return layer, affiner, x


def plain(layer, affiner, x, task: int):
    """The formula, straight from the paper, for one task."""
    a, b = affiner.scale[task], affiner.shift[task]
    bias = getattr(layer, "bias", None)
    if isinstance(layer, nn.Linear):
        product, spread = F.linear(x, layer.weight), lambda one: one
    elif isinstance(layer, nn.Embedding):
        product, spread = layer(x), lambda one: one
    elif isinstance(layer, nn.LayerNorm):
        product, spread = F.layer_norm(x, layer.normalized_shape, layer.weight, None, layer.eps), lambda one: one
    else:
        spread = lambda one: one.reshape(1, -1, *(1,) * (x.ndim - 2))  # noqa: E731
        if isinstance(layer, nn.GroupNorm):
            product = F.group_norm(x, layer.num_groups, layer.weight, None, layer.eps)
        else:
            product = layer._conv_forward(x, layer.weight, None)
    y = (1 + spread(a)) * product + spread(b)
    if bias is not None:
        y = y + spread(bias)
    if affiner.down is None:
        return y
    s, down, up = affiner.strength[task], affiner.down[task], affiner.up[task]
    if isinstance(layer, nn.Linear):
        return y + s * F.relu(x @ down.T) @ up.T
    hidden = F.relu(layer._conv_forward(x, down, None))
    return y + s * torch.einsum("or,br...->bo...", up, hidden)


@pytest.mark.parametrize("kind", LAYERS)
def test_new_task_is_the_layer(kind):
    """a is added to 1 and starts at 0; W_up starts at 0: bit for bit the layer."""
    layer, affiner, x = ready(kind, filled=False)
    for index in (torch.tensor(1), torch.tensor([2, 0, 1, 1])):
        out = layer(x)
        assert torch.equal(affiner(x, out, getattr(layer, "bias", None), index), out)


@pytest.mark.parametrize("kind", LAYERS)
def test_formula(kind):
    """Against the formula, and the scale leaves the layer's own bias alone."""
    layer, affiner, x = ready(kind)
    for task in range(K):
        out = affiner(x, layer(x), getattr(layer, "bias", None), torch.tensor(task))
        torch.testing.assert_close(out, plain(layer, affiner, x, task), atol=1e-5, rtol=1e-5)


def test_scale_spares_the_bias():
    layer, affiner, _ = ready("linear")
    nn.init.constant_(affiner.scale, -1.0)
    nn.init.zeros_(affiner.shift)
    nn.init.zeros_(affiner.up)
    x = torch.randn(B, 6, 5)
    out = affiner(x, layer(x), layer.bias, torch.tensor(0))
    torch.testing.assert_close(out, layer.bias.expand_as(out), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_a_batch_go_their_own_ways(kind):
    """Values and gradients of mixed rows are those of each task alone."""
    layer, affiner, x = ready(kind)
    tasks = [2, 0, 1, 2]
    bias = getattr(layer, "bias", None)
    mixed = affiner(x, layer(x), bias, torch.tensor(tasks))
    alone = torch.cat([affiner(x[i : i + 1], layer(x[i : i + 1]), bias, torch.tensor(k)) for i, k in enumerate(tasks)])
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(mixed)
    parameters = list(affiner.parameters())
    one = torch.autograd.grad((mixed * weights).sum(), parameters, retain_graph=True)
    other = torch.autograd.grad((alone * weights).sum(), parameters)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_parts_of_a_form(kind):
    _, affiner, _ = ready(kind, Form(scale="scalar", shift=False, rank=3, strength=None))
    assert affiner.scale.shape == (K, 1)
    assert affiner.shift is None
    assert affiner.strength is None
    assert (affiner.down is not None) == (kind in BRANCHES)


def test_without_relu_the_branch_is_linear():
    _, relu, x = ready("linear", Form(scale=None, shift=False, rank=2))
    layer, lora, _ = ready("linear", Form(scale=None, shift=False, rank=2, relu=False))
    out, index = layer(x), torch.tensor(0)
    odd = [one(x, out, None, index) + one(-x, out, None, index) - 2 * out for one in (relu, lora)]
    assert odd[1].abs().max() < 1e-5 < odd[0].abs().max()


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weights(kind):
    """Scale and shift in the weights give what they give beside them; the branch stays beside."""
    layer, affiner, x = ready(kind)
    bias, index = getattr(layer, "bias", None), torch.tensor(1)
    wanted = affiner(x, layer(x), bias, index)
    values, inside = merged_weights(layer, affiner.scale[1], affiner.shift[1])
    assert inside == (True, kind != "no bias")
    out = torch.func.functional_call(layer, values, (x,))
    torch.testing.assert_close(affiner(x, out, bias, index, inside), wanted, atol=1e-5, rtol=1e-5)


def test_quantised_layer_keeps_its_output_form():
    """The scale acts behind the product, so a layer of whole numbers will do; merging refuses it."""

    class Eights(nn.Linear):
        def __init__(self, layer):
            super().__init__(layer.in_features, layer.out_features)
            self.step = float(layer.weight.detach().abs().max()) / 127
            whole = (layer.weight / self.step).round().to(torch.int8)
            self.weight, self.bias = nn.Parameter(whole, requires_grad=False), layer.bias

        def forward(self, input):
            return F.linear(input, self.weight.float() * self.step, self.bias)

    layer, affiner, x = ready("linear")
    eights = Eights(layer)
    ours = affiner(x, eights(x), eights.bias, torch.tensor(0))
    torch.testing.assert_close(ours, plain(layer, affiner, x, 0), atol=0.05, rtol=0)
    with pytest.raises(Refusal, match="quantised"):
        merged_weights(eights, affiner.scale[0], affiner.shift[0])


def test_refusals():
    with pytest.raises(Refusal, match="cannot be adapted"):
        channels_of(nn.ReLU())
    with pytest.raises(Refusal, match="pads with circular"):
        Affiner(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), Form(rank=2))
    layer, affiner, x = ready("linear")
    with pytest.raises(Refusal, match="4 rows where 2 samples"):
        affiner(x, layer(x), layer.bias, torch.tensor([0, 1]))
