import pytest
import torch
from toy_training import ToyDenoiser

from smalti.training.config import TrainConfig
from smalti.training.optimizers import Optimizers, block_matrices


def make(optimizer="adamw", **settings):
    model = ToyDenoiser()
    return model, Optimizers(model, TrainConfig(steps=10, batch=1, optimizer=optimizer, **settings))


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    model, optimizers = make("muon")
    names = {optimizers.names[p] for p in block_matrices(model)}
    assert names == {f"blocks.{i}.{j}.weight" for i in (0, 1) for j in (1, 4)}
    muon = next(part for part in optimizers.parts if isinstance(part, torch.optim.Muon))
    assert {optimizers.names[p] for group in muon.param_groups for p in group["params"]} == names
    held = [p for part in optimizers.parts for group in part.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))


def test_an_update_of_muon_is_nearly_orthogonal_and_as_large_as_adamw_s():
    model, optimizers = make("muon", weight_decay=0.0, learning_rate=1e-2)
    weight = block_matrices(model)[0]
    before = weight.detach().clone()
    give_gradients(model)
    optimizers.step(0)
    update = (weight.detach() - before) / 1e-2
    singular = torch.linalg.svdvals(update)
    assert singular.max() / singular.median() < 2
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_norms_biases_and_embeddings_do_not_decay():
    _, optimizers = make(weight_decay=0.5)
    decayed = {
        optimizers.names[p]
        for part in optimizers.parts
        for group in part.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert "blocks.0.1.weight" in decayed
    assert "enter.weight" in decayed
    assert not {"label.weight", "enter.bias", "blocks.0.0.weight"} & decayed


def test_rates_follow_the_step():
    model, optimizers = make("muon", warmup=4, muon_rate=0.5, learning_rate=0.1)
    give_gradients(model)
    optimizers.step(1)
    assert sorted(part.param_groups[0]["lr"] for part in optimizers.parts) == [0.05, 0.25]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_state_goes_on_bit_for_bit(optimizer):
    model, optimizers = make(optimizer)
    for step in range(3):
        give_gradients(model, step)
        optimizers.step(step)
    twin, others = make(optimizer)
    twin.load_state_dict(model.state_dict())
    tensors, plain = optimizers.flat_state()
    others.load_flat_state({key: value.clone() for key, value in tensors.items()}, plain)
    for one, its in ((model, optimizers), (twin, others)):
        give_gradients(one, 9)
        its.step(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    fresh, empty = make(optimizer)
    fresh.load_state_dict(twin.state_dict())
    assert not empty.flat_state()[0]
