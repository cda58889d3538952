"""Which tasks a call is for: routing by sample and branch, labels, conditions, compiled models, other models."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from task_toys import bank_of, close, dit, fill, inputs, velocity
from torch import nn

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.sampling.guidance import Guidance, bind
from smalti.training.ema import EMA
from smalti.training.shared_base import key_of
from smalti.training.task_set import Spatial


def test_every_linear_layer_is_adapted_those_of_adaln_too():
    bank = bank_of("one")
    wanted = {path for path, layer in bank.model.named_modules() if isinstance(layer, nn.Linear)}
    assert set(bank.base.layers) == wanted
    assert "blocks.0.modulation.linear" in wanted
    given = inputs()
    for path in wanted:  # each of them acts
        before = velocity(bank, given, "one")
        affiner = bank.tasks.layers[key_of(path)]
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
    close(seen[0] - seen[1], bank.tasks.spatials["/depth"](patches), 1e-4)


def test_spatial_conditions_that_do_not_fit():
    bank, (x, t, cond) = bank_of(), inputs()
    bank.add("depth", spatial=Spatial(channels=1, patch=8))
    for picture, match in ((torch.randn(4, 3, 32, 32), "of 3 channels"), (torch.randn(4, 1, 64, 64), "of the image")):
        with pytest.raises(UserError, match=match):
            bank(x, t, Cond(label=cond.label, pooled=cond.pooled, extra={"spatial": picture}), task="depth")
    assert bank.base.route is None  # an error leaves no task behind


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


def test_spatial_conditions_of_a_diffusers_model():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, norm_num_groups=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    bank = bank_of(model=model)
    bank.add("edges", spatial=Spatial(channels=2, patch=4))
    fill(bank)
    given = torch.randn(2, 4, 8, 8), torch.tensor([1, 300]), torch.tensor([1, 2])
    with torch.no_grad():
        outs = []
        for seed in (0, 1, 0):
            picture = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
            with bank.using("edges", picture):
                outs.append(model(*given).sample)
    assert torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)


def test_another_thread_is_refused():
    bank, given = bank_of("one"), inputs()
    with ThreadPoolExecutor(1) as pool, bank.using("one"), pytest.raises(Refusal, match="another thread"):
        pool.submit(bank.model, *given).result()


def test_a_set_in_training_can_be_compiled():
    torch._dynamo.reset()
    bank, given = bank_of("one", "two"), inputs(task=torch.tensor([0, 1, 1, 0]))
    tasks, plain = bank.train(), bank.train()
    tasks.compile(backend="eager")
    for learner in (tasks, plain):
        learner(*given).square().mean().backward()
    for one, other in zip(tasks.parameters(), plain.parameters(), strict=True):
        close(one.grad, other.grad)
    torch._dynamo.reset()


def test_names_that_methods_have_too():
    bank, given = bank_of("values"), inputs()
    bank.add("items", classes=2)
    bank.add("a.b", classes=3)
    for name in bank.names:
        assert velocity(bank, given, name).shape == given[0].shape
