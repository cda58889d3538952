"""Tasks on one frozen model: routing, labels, conditions, merging, files; the model itself never changes."""

import copy
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from safetensors.torch import save_file
from task_toys import bank_of, dit, fill, inputs
from torch import nn

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.protocols import Cond
from smalti.sampling.guidance import Guidance, bind
from smalti.training.config import TrainConfig
from smalti.training.diffscaler import DiffScaler
from smalti.training.ema import EMA
from smalti.training.optimizers import Optimizers
from smalti.training.task_bank import TaskBank
from smalti.training.task_set import Spatial


def velocity(bank, given, task):
    with torch.no_grad():
        return bank(*given, task=task)


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


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


def test_every_linear_layer_is_adapted_those_of_adaln_too():
    bank = bank_of("one")
    wanted = {path for path, layer in bank.model.named_modules() if isinstance(layer, nn.Linear)}
    assert set(bank.base.layers) == wanted
    assert "blocks.0.modulation.linear" in wanted
    given = inputs()
    for path in wanted:  # each of them acts
        before = velocity(bank, given, "one")
        affiner = bank.tasks.layers[path.replace(".", "/")]
        with torch.no_grad():
            affiner.shift.add_(1.0)
        assert not torch.equal(velocity(bank, given, "one"), before), path
        with torch.no_grad():
            affiner.shift.sub_(1.0)


def test_two_tasks_in_one_batch_are_as_each_alone():
    bank, given = bank_of("one", "two", "three"), inputs(batch=6)
    names = ["two", "one", "three", "two", "one", "two"]
    mixed = velocity(bank, given, names)
    for row, name in enumerate(names):
        x, t, cond = given
        alone = velocity(bank, (x[row : row + 1], t[row : row + 1], cond[row : row + 1]), name)
        close(mixed[row : row + 1], alone)
    assert not torch.allclose(mixed, velocity(bank, given, "two"), atol=1e-3)


def test_samples_of_a_mixed_batch_are_as_each_alone():
    bank, (x, _, cond) = bank_of("one", "two"), inputs(batch=2)

    def draw(task, rows):
        state = x[rows]
        with bank.using(task) as model:
            step = bind(model, cond[rows])
            for t in (1.0, 0.75, 0.5, 0.25):
                state = state - 0.25 * step(state, t)
        return state

    with torch.no_grad():
        mixed = draw(["one", "two"], slice(None))
        close(mixed, torch.cat([draw("one", slice(0, 1)), draw("two", slice(1, 2))]))


@pytest.mark.parametrize("is_batched", [True, False])
def test_both_branches_of_guidance_get_the_same_task(is_batched):
    bank, (x, _, cond) = bank_of("one", "two"), inputs(batch=2)
    uncond = Cond(label=torch.full_like(cond.label, 3), pooled=torch.zeros_like(cond.pooled))
    guided = bind(bank.model, cond, uncond, Guidance(3.0, is_batched=is_batched))
    with torch.no_grad():
        with bank.using(["one", "two"]):
            mixed = guided(x, 0.5)
        for row, name in enumerate(("one", "two")):
            rows = slice(row, row + 1)
            with bank.using(name):
                alone = bind(bank.model, cond[rows], uncond[rows], Guidance(3.0, is_batched=False))(x[rows], 0.5)
            close(mixed[rows], alone)
        named = [Cond(c.text, c.pooled, None, c.label, extra={"task": torch.tensor([0, 1])}) for c in (cond, uncond)]
        tasks = bank.train("one", "two")  # the index may travel with the condition as well
        close(bind(tasks, *named, Guidance(3.0, is_batched=is_batched))(x, 0.5), mixed)


def test_switching_compiles_nothing_anew():
    """Three tasks and all mixtures of them run what was compiled for the first; only a task more is new."""
    torch._dynamo.reset()
    bank, given, compiled = bank_of("one", "two", "three"), inputs(), []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    bank.model.compile(backend=backend, fullgraph=True)
    for task in ("one", ["one", "two", "one", "one"]):
        velocity(bank, given, task)
    first = len(compiled)
    assert first
    for task in ("two", "three", "one", ["three", "two", "one", "one"], ["two"] * 4):
        ours = velocity(bank, given, task)
        model = bank.model
        model._compiled_call_impl, kept = None, model._compiled_call_impl
        close(ours, velocity(bank, given, task))
        model._compiled_call_impl = kept
    assert len(compiled) == first
    torch._dynamo.reset()


def test_blocks_that_were_compiled_before():
    """What was compiled without hooks is compiled anew with them."""
    model, given = dit(), inputs()
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        before = model(*given)
    bank = bank_of("one", model=model)
    ours = velocity(bank, given, "one")
    close(velocity(bank, given, None), before)
    for block in model.blocks:
        block._compiled_call_impl = None
    close(ours, velocity(bank, given, "one"))
    torch._dynamo.reset()


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


def test_labels_of_a_task():
    bank, (x, t, cond) = bank_of("base"), inputs()
    bank.add("faces", classes=10)
    fill(bank, "faces")

    def at(label, task="faces"):
        return velocity(bank, (x, t, Cond(label=label, pooled=cond.pooled)), task)

    nine, none = torch.full((4,), 9), torch.full((4,), 10)  # the base knows 3
    assert not torch.allclose(at(nine), at(none), atol=1e-3)
    assert torch.equal(at(None), at(none))
    mixed = at(torch.tensor([9, 2, 9, 1]), ["faces", "base", "faces", "base"])
    close(mixed[:1], at(nine)[:1])
    close(mixed[1:2], at(torch.full((4,), 2), "base")[1:2])
    with pytest.raises(IndexError):
        at(nine, "base")


def test_a_fresh_table_is_the_model_without_a_label():
    bank, (x, t, cond) = bank_of(filled=False), inputs()
    bank.add("faces", classes=10)
    fresh = velocity(bank, (x, t, Cond(label=torch.full((4,), 7), pooled=cond.pooled)), "faces")
    assert torch.equal(fresh, bank(x, t, Cond(pooled=cond.pooled)))


def test_an_unconditional_task_has_one_token():
    bank, (x, t, cond) = bank_of(), inputs()
    bank.add("clouds", classes=0)
    assert bank.tasks.task_state("clouds")["label"].shape == (1, 16)
    fill(bank)
    one, other = (velocity(bank, (x, t, Cond(label=some, pooled=cond.pooled)), "clouds") for some in (cond.label, None))
    assert torch.equal(one, other)


def test_spatial_conditions_become_tokens():
    """Each task has its embedder; a task without is not touched, and a fresh one adds nothing."""
    bank, given = bank_of("plain"), inputs()
    for name in ("depth", "edges"):
        bank.add(name, spatial=Spatial(channels=1, patch=8))
    picture = torch.randn(4, 1, 32, 32)
    x, t, cond = given
    with_picture = (x, t, Cond(label=cond.label, pooled=cond.pooled, extra={"spatial": picture}))
    assert torch.equal(velocity(bank, with_picture, "depth"), bank(*given))
    fill(bank, "depth", "edges")
    assert not torch.allclose(velocity(bank, with_picture, "depth"), velocity(bank, given, "depth"), atol=1e-3)
    names = ["plain", "depth", "edges", "depth"]
    mixed = velocity(bank, with_picture, names)
    for row, name in enumerate(names):
        close(mixed[row], velocity(bank, with_picture if name != "plain" else given, name)[row])
    # what is added behind the patch embedder is the patches' linear image
    seen = []
    hook = bank.model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    velocity(bank, with_picture, "depth"), velocity(bank, given, "depth")
    hook.remove()
    patches = picture.unfold(2, 8, 8).unfold(3, 8, 8).flatten(1, 3).flatten(2)
    close(seen[0] - seen[1], bank.tasks.spatials["depth"](patches), 1e-4)


def test_spatial_conditions_that_do_not_fit():
    bank, (x, t, cond) = bank_of(), inputs()
    bank.add("depth", spatial=Spatial(channels=1, patch=8))
    for picture, match in ((torch.randn(4, 3, 32, 32), "of 3 channels"), (torch.randn(4, 1, 64, 64), "of the image")):
        with pytest.raises(UserError, match=match):
            bank(x, t, Cond(label=cond.label, pooled=cond.pooled, extra={"spatial": picture}), task="depth")
    assert bank.base.route is None  # an error leaves no task behind


def test_merging_puts_scale_and_shift_into_the_weights():
    bank, given = bank_of("one", "two"), inputs()
    before, wanted, other = bank(*given), velocity(bank, given, "one"), velocity(bank, given, "two")
    kept = copy.deepcopy(bank.model.state_dict())
    bank.merge("one")
    layer = bank.tasks.layers["blocks/0/attn/to_qkv"]
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


def test_only_tasks_are_trained_averaged_and_saved():
    """The base is shared by reference: it is no parameter of a set, and an average does not copy it."""
    bank = bank_of("one", "two")
    tasks = bank.train("one")
    base = set(bank.model.parameters())
    assert not any(one in base for one in tasks.parameters())
    assert not any(one.requires_grad for one in base)
    assert sum(one.numel() for one in tasks.parameters()) == bank.tasks.count("one")
    average = EMA(tasks, 0.9)
    assert average.model.base is tasks.base
    assert len(list(average.model.parameters())) == len(list(tasks.parameters()))
    with torch.no_grad():
        for one in tasks.parameters():
            one.add_(1.0)
    average.update()
    assert not torch.equal(next(average.model.parameters()), next(tasks.parameters()))


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


@pytest.mark.parametrize("kind", ["mmdit", "diffusers", "unet"])
def test_other_models(kind):
    torch.manual_seed(0)
    if kind == "mmdit":
        model, given = MMDiT.tiny(), None
        text = Cond(text=torch.randn(4, 3, 12), pooled=torch.randn(4, 10), label=torch.tensor([0, 1, 2, 3]))
        given = (torch.randn(4, 4, 8, 8), torch.rand(4), text)
    elif kind == "diffusers":
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
            norm_num_groups=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
        given = (torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 5, 9]), torch.tensor([1, 2, 3, 4]))
    else:
        model = UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        given = (torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 5, 9]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    bank = bank_of("one", "two", model=model.eval(), filled=False)

    def call(task, rows=slice(None)):
        with torch.no_grad():
            out = bank(*(one[rows] for one in given), task=task)
        return out if isinstance(out, torch.Tensor) else out[0]

    before = call(None)
    assert torch.equal(call("one"), before)
    for value in bank.tasks.parameters():
        nn.init.normal_(value, std=0.05)
    mixed = call(["one", "two", "two", "one"])
    assert not torch.allclose(mixed, before, atol=1e-3)
    for row, name in enumerate(["one", "two", "two", "one"]):
        close(mixed[row : row + 1], call(name, slice(row, row + 1)), 1e-4)
    bank.merge("one")
    close(call("one", slice(0, 1)), mixed[:1], 1e-4)
    bank.unmerge()
    assert torch.equal(call(None), before)


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
