"""A bank of tasks: they come and go, are merged and saved; the model itself never changes."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from task_toys import bank_of, close, dit, fill, inputs, velocity
from torch import nn

from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.training.config import TrainConfig
from smalti.training.diffscaler import DiffScaler
from smalti.training.optimizers import Optimizers
from smalti.training.task_bank import TaskBank
from smalti.training.task_set import Spatial


def test_without_a_task_the_model_is_what_it_was():
    model, given = dit(), inputs()
    before = model(*given)
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    bank = bank_of("one", "two", model=model)
    assert torch.equal(bank(*given), before)
    assert not torch.equal(velocity(bank, given, "one"), before)
    assert torch.equal(bank(*given), before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], one) for name, one in model.state_dict().items())
    bank.detach()
    assert torch.equal(model(*given), before)
    assert all(one.requires_grad for one in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_new_task_computes_what_the_model_does():
    bank, given = bank_of("one", filled=False), inputs()
    assert torch.equal(velocity(bank, given, "one"), bank(*given))


def test_tasks_come_and_go():
    bank, given = bank_of("one", "two"), inputs()
    before = {name: velocity(bank, given, name) for name in bank.names}
    bank.add("three")
    fill(bank, "three")
    third = velocity(bank, given, "three")
    bank.remove("one")
    assert bank.names == ["two", "three"]
    assert torch.equal(velocity(bank, given, "two"), before["two"])
    assert torch.equal(velocity(bank, given, "three"), third)
    with pytest.raises(UserError, match="unknown task 'one'"):
        bank(*given, task="one")
    with pytest.raises(UserError, match="'two' is in the bank already"):
        bank.add("two")
    trained = bank_of("one").train()
    for refused in (lambda: bank.put(trained), lambda: bank.save("one", "one"), lambda: bank.share("one")):
        with pytest.raises(UserError, match="unknown task 'one'"):
            refused()


def test_merging_puts_scale_and_shift_into_the_weights():
    bank, given = bank_of("one", "two"), inputs()
    before, wanted, other = bank(*given), velocity(bank, given, "one"), velocity(bank, given, "two")
    kept = copy.deepcopy(bank.model.state_dict())
    bank.merge("one")
    layer = bank.tasks.layers["/blocks/0/attn/to_qkv"]
    close(
        bank.model.blocks[0].attn.to_qkv.weight,
        (1 + layer.scale[0])[:, None] * kept["blocks.0.attn.to_qkv.weight"],
    )
    close(velocity(bank, given, "one"), wanted, 1e-4)
    for refused in (lambda: bank(*given), lambda: bank(*given, task="two"), lambda: bank.train("one"),
                    lambda: bank.merge("two"), lambda: bank.add("three")):  # fmt: skip
        with pytest.raises(Refusal, match="merged"):
            refused()
    bank.unmerge()
    assert all(torch.equal(kept[name], one) for name, one in bank.model.state_dict().items())
    assert torch.equal(bank(*given), before)
    assert torch.equal(velocity(bank, given, "two"), other)


def test_one_file_a_task(tmp_path):
    bank, given = bank_of("one"), inputs()
    bank.add("faces", classes=5, spatial=Spatial(1, 8))
    fill(bank, "faces")
    path = bank.save("faces", tmp_path / "faces.safetensors")
    other = bank_of("zero")
    assert other.load(path) == "faces"
    assert other.load(path, "again") == "again"
    assert torch.equal(velocity(other, given, "faces"), velocity(bank, given, "faces"))
    assert torch.equal(velocity(other, given, "again"), velocity(bank, given, "faces"))
    with pytest.raises(UserError, match="of another model"):
        bank_of(model=dit(seed=1)).load(path)
    with pytest.raises(UserError, match="do not fit the task"):
        rank = bank_of(method=DiffScaler(rank=3))
        rank.load(path)
    assert rank.names == []
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read"):
        other.load(path, "torn")
    save_file({"x": torch.zeros(1)}, path, {"task": json.dumps(None)})
    with pytest.raises(UserError, match="another model"):
        other.load(path, "foreign")


def test_scales_and_shifts_are_not_decayed():
    bank = bank_of("one", "two")
    bank.add("faces", classes=4)
    config = TrainConfig(steps=1, batch=1, weight_decay=0.1)
    for tasks in (bank.train(), bank.train("two")):
        optimizers = Optimizers(tasks, config, bank.factors())
        for groups in (optimizers.parts[0].param_groups, bank.groups(tasks, 1e-3, 0.1)):
            decay = {one: group["weight_decay"] for group in groups for one in group["params"]}
            for name, one in tasks.named_parameters():
                assert decay[one] == (0.1 if name.endswith((".down", ".up")) else 0.0), name


def test_refusals():
    bank, given = bank_of("one"), inputs()
    with pytest.raises(Refusal, match="has a bank of tasks already"):
        TaskBank.wrap(bank.model, DiffScaler())
    with bank.using("one"), pytest.raises(Refusal, match="serving other tasks"):
        bank(*given, task="one")
    with pytest.raises(UserError, match="3 tasks for 4 rows"):
        bank(*given, task=["one"] * 3)
    with pytest.raises(Refusal, match="adapts none"):
        TaskBank.wrap(dit(), DiffScaler(layers="nowhere"))
    with pytest.raises(Refusal, match="no label embedder of ours"):
        bank_of(model=nn.Sequential(nn.Linear(2, 2))).add("faces", classes=3)
    with pytest.raises(Refusal, match="no patch embedder"):
        bank_of(model=nn.Sequential(nn.Linear(2, 2))).add("depth", spatial=Spatial(1, 8))
    tasks = bank_of("one", "two").train()
    with pytest.raises(UserError, match="one index a sample"):
        tasks(*given)


def test_a_task_that_never_engaged_is_told():
    bank = bank_of("one", method=DiffScaler(layers="blocks"))
    bank.model.blocks = nn.ModuleList()
    with pytest.raises(NeverEngaged):
        bank(*inputs(), task="one")


def test_a_quantised_model_is_adapted_and_never_merged():
    """A refused merge has changed nothing."""
    model = dit()
    layer = model.blocks[1].ffn.proj_in
    layer.weight = nn.Parameter(layer.weight.detach().mul(50).round().to(torch.int8), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight / 50, layer.bias)
    bank, given = bank_of("one", model=model), inputs()
    kept = copy.deepcopy(model.state_dict())
    assert not torch.allclose(velocity(bank, given, "one"), bank(*given), atol=1e-3)
    with pytest.raises(Refusal, match="quantised"):
        bank.merge("one")
    assert bank.base.merged is None
    assert all(torch.equal(kept[name], one) for name, one in model.state_dict().items())
