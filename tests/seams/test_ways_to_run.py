"""The ways in which people run a pipeline, on a tiny Flux and a tiny Wan: each works, or is refused by name."""

import threading

import pytest
import torch
from small_models import MeanValues, SkipBlock, WatchCores, WatchSteps
from small_pipelines import PIPELINES, flux_pipeline, flux_transformer, numbers, wan_pipeline, wan_transformer

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import Refusal
from smalti.seams.anatomy import read_anatomy

SEER = TaylorSeer(3, warmup=2)


@pytest.fixture(params=PIPELINES)
def small(request):
    return PIPELINES[request.param]()


def check(draw, target, tolerance=0.0):
    """Exact at interval 1, something else at 3, the same again, and nothing left behind."""
    plain = draw()
    with smalti.apply(target, TaylorSeer(1)):
        assert torch.equal(draw(), plain)
    with smalti.apply(target, SEER) as handle:
        fast = draw()
        assert torch.equal(draw(), fast)
    assert torch.isfinite(fast).all()
    assert (fast - plain).abs().max() > 1e-4
    assert (draw() - plain).abs().max() <= tolerance
    report = handle.report()
    assert report.runs == 2
    assert not report.methods[0].left_off
    return fast


def test_plain_pipelines(small):
    check(small.draw, small.pipe)


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_attention_backends(small, backend):
    native = check(small.draw, small.pipe)
    with smalti.apply(small.pipe, MeanValues()):
        mean = small.draw(2)
    small.model.set_attention_backend(backend)
    assert torch.allclose(check(small.draw, small.pipe), native, atol=1e-3)
    if backend == "flex":  # calls another function
        with smalti.apply(small.pipe, MeanValues()), pytest.raises(Refusal, match=r"set_attention_backend\('native'\)"):
            small.draw(2)
        small.model.set_attention_backend("native")
    with smalti.apply(small.pipe, MeanValues()):
        assert torch.allclose(small.draw(2), mean, atol=1e-3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections(small, when):
    apart = check(small.draw, small.pipe)
    if when == "before":
        small.model.fuse_qkv_projections()
        assert torch.allclose(check(small.draw, small.pipe), apart, atol=1e-4)
        with smalti.apply(small.pipe, MeanValues()) as handle:
            small.draw(2)
        assert handle.report().methods[0].events["mean"] > 0
    else:
        with smalti.apply(small.pipe, SEER):
            assert torch.equal(small.draw(), apart)
            small.model.fuse_qkv_projections()
            assert torch.allclose(small.draw(), apart, atol=1e-4)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_weights(small, config):
    quantization = pytest.importorskip("torchao.quantization")
    before = check(small.draw, small.pipe)
    quantization.quantize_(small.model, getattr(quantization, config)())
    assert (check(small.draw, small.pipe) - before).abs().max() > 1e-6
    with smalti.apply(small.pipe, MeanValues()) as handle:
        small.draw(2)
    assert handle.report().methods[0].events["mean"] > 0


def test_gguf_linears(small):
    """Linear layers of another class, as a GGUF file gives."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    before = check(small.draw, small.pipe)
    for module in [one for block in read_anatomy(small.model).blocks for one in block.module.modules()]:
        for name, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear and linear.in_features % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q8_0
                packed = torch.from_numpy(gguf.quants.quantize(linear.weight.numpy(), kind))
                other = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
                other.weight, other.bias = GGUFParameter(packed, quant_type=kind), linear.bias
                setattr(module, name, other)
    after = check(small.draw, small.pipe)
    assert 1e-6 < (after - before).abs().max() < 0.5


def test_lora_swaps(small):
    from peft import LoraConfig

    model, plain = small.model, small.draw()
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
    results = {}
    with smalti.apply(small.pipe, SEER):
        for name in ("one", "two", "one"):
            model.set_adapters(name)
            drawn = small.draw()
            assert torch.equal(results.setdefault(name, drawn), drawn)
        model.disable_adapters()
        without = small.draw()
    assert not torch.equal(results["one"], results["two"])
    with smalti.apply(small.pipe, SEER):
        model.delete_adapters(["one", "two"])  # taken off and put on while methods are there
        assert torch.equal(small.draw(), without)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        model.enable_adapters()
        assert not torch.equal(small.draw(), without)
    model.delete_adapters("default")
    assert torch.equal(small.draw(), plain)


@pytest.mark.parametrize("target", ["proj_mlp", "proj_out"])
def test_lora_on_a_sublayer_itself_comes_before_the_methods(target):
    from peft import LoraConfig

    small = flux_pipeline()
    config = LoraConfig(r=2, lora_alpha=0.1, target_modules=[target], init_lora_weights=False)
    with smalti.apply(small.pipe, SEER):
        small.model.add_adapter(config)
        with pytest.raises(Refusal, match=rf"{target} was replaced .* apply them after loading adapters"):
            small.draw()
    check(small.draw, small.pipe)


def test_controlnet():
    from diffusers import FluxControlNetModel, FluxControlNetPipeline
    from small_models import fill

    controlnet = fill(
        FluxControlNetModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    small = flux_pipeline(FluxControlNetPipeline, controlnet=controlnet)
    picture = numbers(1, 3, 64, 96).clamp(-1, 1)

    def draw(steps=9, **further):
        return small.draw(steps, control_image=picture, **further)

    def ended(steps=9):
        return draw(steps, control_guidance_end=0.4)

    assert not torch.equal(draw(), draw(controlnet_conditioning_scale=0.1))
    for way in (draw, ended):
        check(way, small.pipe)
    with smalti.apply(small.pipe, SEER) as handle:
        draw()
    assert handle.report().model == "FluxTransformer2DModel, FluxControlNetModel"
    assert handle.report().methods[0].events == {"forecast": 5 * (3 * 2 + 2 + 3 * 2 + 1)}  # 5 of 9 steps of both


def test_control_residuals_that_change_at_every_step_make_no_branches():
    from small_models import flux

    small, watch = flux(), WatchSteps()
    call = small.model.forward

    def controlled(**arguments):
        residual = arguments["hidden_states"].mean() + torch.zeros(1, 24, 32)
        return call(**arguments, controlnet_block_samples=[residual], controlnet_single_block_samples=[residual])

    small.model.forward = controlled
    plain = small.loop()
    del small.model.forward
    with smalti.apply(small.model, TaylorSeer(1), watch):
        inner = small.model.forward

        def again(**arguments):
            residual = arguments["hidden_states"].mean() + torch.zeros(1, 24, 32)
            return inner(**arguments, controlnet_block_samples=[residual], controlnet_single_block_samples=[residual])

        small.model.forward = again
        assert torch.equal(small.loop(), plain)
    assert {one.branch for one in watch.seen} == {"0"}


def test_control_of_wan():
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    transformer = wan_transformer(WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=4 * 2 + 64)
    small = wan_pipeline(WanVACEPipeline, transformer=transformer)
    assert not torch.equal(small.draw(), small.draw(conditioning_scale=0.2))
    check(small.draw, small.pipe)


def ip_adapter(small):
    """An image prompt on a Flux pipeline, from a state dict."""
    projection = {"proj.weight": numbers(4 * 32, 8), "proj.bias": numbers(4 * 32), "norm.weight": torch.ones(32),
                  "norm.bias": torch.zeros(32)}  # fmt: skip
    keys = {}
    for block in range(4):
        for name in ("to_k_ip", "to_v_ip"):
            keys[f"{block}.{name}.weight"] = numbers(32, 32, seed=block)
            keys[f"{block}.{name}.bias"] = numbers(32, seed=block)
    small.pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": keys}, weight_name="none",
                               image_encoder_pretrained_model_name_or_path=None)  # fmt: skip


def test_ip_adapter():
    small = flux_pipeline()
    ip_adapter(small)
    picture = {
        "ip_adapter_image_embeds": [numbers(1, 1, 8)],
        "negative_ip_adapter_image_embeds": [numbers(1, 1, 8) * 0],
    }

    def draw(steps=9):
        return small.draw(steps, **picture)

    small.pipe.set_ip_adapter_scale(0.5)
    half = check(draw, small.pipe)
    watch = WatchCores()
    with smalti.apply(small.pipe, SEER, watch):
        assert torch.equal(draw(), half)
        small.pipe.set_ip_adapter_scale(1.0)
        assert not torch.equal(draw(), half)
    pieces = [call for call in watch.seen if call.site.occurrence == 1]
    assert pieces  # image queries look at the picture's tokens in a call of their own
    assert {(call.layout.segments[0].kind, len(call.key_layout)) for call in pieces} == {("image", 4)}


def test_image_prompt_of_wan():
    from small_models import SMALL

    model = wan_transformer(image_dim=8, added_kv_proj_dim=32)
    call, wan = model.forward, SMALL["wan"]()
    pictures = numbers(1, 3, 8)

    def draw(steps=9):
        return wan.loop(steps, x=numbers(1, 4, 3, 8, 12), texts=(numbers(1, 512, 32),))

    def velocity(x, t, text):
        time = torch.full((len(x),), 1000 * t)
        return model(x, time, text, encoder_hidden_states_image=pictures).sample

    assert call is not None
    wan.call = velocity
    check(draw, model)


def test_from_a_picture_takes_fewer_steps_and_says_so():
    from diffusers import FluxImg2ImgPipeline

    small, watch = flux_pipeline(FluxImg2ImgPipeline), WatchSteps()

    def draw(steps=12):
        return small.draw(steps, image=numbers(1, 3, 64, 96).clamp(-1, 1), strength=0.75)

    check(draw, small.pipe)
    with smalti.apply(small.pipe, watch, TaylorSeer(3, warmup=2, last_full=2)) as handle:
        draw()
    assert {one.steps for one in watch.seen} == {9}
    assert [one.step for one in watch.seen] == list(range(9))
    assert handle.report().methods[1].events == {"forecast": 4 * 8}  # evaluations 2, 3, 5, 6; the last two are full


def test_from_a_clip_takes_fewer_steps_and_says_so():
    from diffusers import WanVideoToVideoPipeline

    small, watch = wan_pipeline(WanVideoToVideoPipeline), WatchSteps()
    clip = [numbers(64, 96, 3, seed=i).clamp(-1, 1).numpy() / 2 + 0.5 for i in range(5)]

    def draw(steps=12):
        return small.draw(steps, video=clip, strength=0.75)

    check(draw, small.pipe)
    with smalti.apply(small.pipe, watch, TaylorSeer(3, warmup=2, last_full=2)):
        draw()
    assert {one.steps for one in watch.seen} == {9}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(small, kind, when):
    from diffusers.hooks import apply_group_offloading

    expected = check(small.draw, small.pipe)
    settings = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def offload():
        apply_group_offloading(small.model, torch.device("cpu"), offload_type=kind, **settings)

    if when == "before":
        offload()
        assert torch.equal(check(small.draw, small.pipe), expected)
    else:
        with smalti.apply(small.pipe, SEER):
            offload()
            assert torch.equal(small.draw(), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_model_and_sequential_offload(small, kind, when):
    """What enable_model_cpu_offload and enable_sequential_cpu_offload put on, with the CPU as the device."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    expected = check(small.draw, small.pipe)

    def offload():
        for part in (small.model, small.pipe.vae):
            if kind == "model":
                cpu_offload_with_hook(part, "cpu")
            else:
                cpu_offload(part, torch.device("cpu"), offload_buffers=True)
                assert {one.device.type for one in part.parameters()} == {"meta"}

    if when == "before":
        offload()
        assert torch.equal(check(small.draw, small.pipe), expected)
    else:
        with smalti.apply(small.pipe, SEER):
            offload()
            assert torch.equal(small.draw(), expected)


def test_compiled_blocks_in_full_graphs(small, monkeypatch):
    """Traced whole, run eagerly: what compiles the graphs does not matter here (test_compiled.py does compile)."""
    compile_plainly = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_plainly(*args, **kwargs, backend="eager"))

    def compiled():
        return [one._compiled_call_impl for one in small.model.modules() if one._compiled_call_impl is not None]

    methods, plain, expected = (SEER, MeanValues(), SkipBlock()), small.draw(), []
    for method in methods:
        with smalti.apply(small.pipe, method):
            expected.append(small.draw())
    small.model.compile_repeated_blocks(fullgraph=True)
    calls = compiled()
    assert len(calls) in (2, 4)
    for method, eager in zip(methods, expected, strict=True):
        with smalti.apply(small.pipe, method) as handle:
            assert torch.allclose(small.draw(), eager, atol=1e-4)
        assert handle.report().methods[0].events
    assert compiled() == calls
    assert torch.allclose(small.draw(), plain, atol=1e-4)


@pytest.mark.parametrize("way", ["function", "method"])
def test_a_model_that_is_compiled_as_a_whole_is_refused(small, way):
    if way == "function":
        small.pipe.transformer = torch.compile(small.model, fullgraph=True)
    else:
        small.model.compile(fullgraph=True)
    for target in (small.pipe, small.pipe.transformer):
        with pytest.raises(Refusal, match=r"Transformer.*compiled as a whole.*compile_repeated_blocks\(\)"):
            smalti.apply(target, SEER)


def test_two_threads_draw_with_pipelines_of_one_transformer():
    """A pipeline has a scheduler of its own; what is shared is the model and the methods on it."""
    for make, shared in ((flux_pipeline, flux_transformer()), (wan_pipeline, wan_transformer())):
        pipelines = [make(transformer=shared) for _ in range(2)]
        lengths, expected, found = (9, 12), {}, {}
        with smalti.apply(shared, SEER, MeanValues()):
            for index, one in enumerate(pipelines):
                expected[index] = one.draw(lengths[index])

            def work(index, pipelines=pipelines, found=found, lengths=lengths):
                found[index] = pipelines[index].draw(lengths[index])

            threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
        assert all(torch.equal(expected[index], found[index]) for index in range(2))
