"""Methods on pipelines: a call is a run, branches come from the pipeline, transformers may be two."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    WanPipeline,
)
from small_models import WatchSteps, fill, wan  # fmt: skip

import smalti
from smalti.acceleration.grat import GRAT
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import NeverEngaged, Refusal
from smalti.core.seeds import generators_for
from smalti.zoo.loader import load_model


@pytest.fixture(scope="module")
def pipe(tiny_models):
    loaded = load_model(tiny_models["text"])
    fill(loaded.transformer)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe, steps=9, prompts=("a", "b"), **settings):
    generator = generators_for(range(len(prompts)))
    return pipe(list(prompts), num_inference_steps=steps, generator=generator, output_type="latent", **settings).images


def test_our_pipeline_is_exact_before_and_after_and_keeps_its_class(pipe, tmp_path):
    plain, kind = draw(pipe), type(pipe)
    with smalti.apply(pipe, TaylorSeer(3, warmup=2)) as handle:
        fast = draw(pipe)
        assert torch.equal(draw(pipe), fast)
        assert isinstance(pipe, kind)
        assert type(pipe).__name__ == kind.__name__
        pipe.save_pretrained(tmp_path / "model")
    assert type(pipe) is kind
    assert handle.report().runs == 2
    assert not torch.equal(fast, plain)
    assert torch.equal(draw(pipe), plain)
    again = load_model(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), plain)


def test_guidance_in_one_batch_and_in_two_calls_agree(pipe, monkeypatch):
    from smalti.sampling import guidance

    with smalti.apply(pipe, TaylorSeer(3, warmup=2), GRAT((1, 2, 2), "cross")):
        batched = draw(pipe)
    plain = guidance.Guidance.__init__

    def in_turn(self, *args, **kwargs):
        plain(self, *args, **{**kwargs, "is_batched": False})

    monkeypatch.setattr(guidance.Guidance, "__init__", in_turn)
    with smalti.apply(pipe, TaylorSeer(3, warmup=2), GRAT((1, 2, 2), "cross")) as handle:
        apart = draw(pipe)
    assert handle.report().calls == 18
    assert torch.allclose(batched, apart, atol=1e-4)


def test_a_pipeline_says_how_many_steps_it_takes(pipe):
    watch = WatchSteps()
    with smalti.apply(pipe, watch, TaylorSeer(4, warmup=2, last_full=2)):
        draw(pipe, 7)
    assert {one.steps for one in watch.seen} == {7}


def test_a_run_in_which_nothing_engaged_raises_at_its_end(pipe):
    with smalti.apply(pipe, TaylorSeer(4, warmup=3)) as handle:
        with pytest.raises(NeverEngaged, match="of 3 evaluations the first 3 are warm-up"):
            draw(pipe, 3)
        draw(pipe, 9)
    assert handle.report().runs == 2


@pytest.mark.parametrize("solver", ["heun", "dpm++"])
def test_other_solvers(pipe, solver):
    from smalti.sampling.schedulers import make_scheduler

    before = pipe.scheduler
    pipe.register_modules(scheduler=make_scheduler(solver))
    plain, watch = draw(pipe, 6), WatchSteps()
    with smalti.apply(pipe, TaylorSeer(1)):
        assert torch.equal(draw(pipe, 6), plain)
    with smalti.apply(pipe, TaylorSeer(3, warmup=2), watch):
        assert torch.isfinite(draw(pipe, 6)).all()
    evaluations = [one.evaluation for one in watch.seen]
    assert evaluations == list(range(11 if solver == "heun" else 6))
    pipe.register_modules(scheduler=before)


def wan_pipeline(scheduler=FlowMatchEulerDiscreteScheduler, second=True):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(shift=5.0), transformer=wan().model,
        transformer_2=wan().model if second else None, boundary_ratio=0.8 if second else None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_clip(pipe, steps=12):
    generator = torch.Generator().manual_seed(0)
    texts = {"prompt_embeds": torch.ones(1, 5, 12), "negative_prompt_embeds": torch.zeros(1, 5, 12)}
    return pipe(
        **texts, height=32, width=48, num_frames=5, num_inference_steps=steps, guidance_scale=3.0,
        generator=generator, output_type="latent",
    ).frames  # fmt: skip


def test_two_transformers_share_the_run_and_forecast_from_their_own_past():
    pipe, watch = wan_pipeline(), WatchSteps()
    plain = draw_clip(pipe)
    with smalti.apply(pipe, TaylorSeer(1)):
        assert torch.equal(draw_clip(pipe), plain)
    with smalti.apply(pipe, TaylorSeer(3, warmup=2), watch) as handle:
        fast = draw_clip(pipe)
        assert torch.equal(draw_clip(pipe), fast)
    assert torch.isfinite(fast).all()
    assert not torch.equal(fast, plain)
    assert torch.equal(draw_clip(pipe), plain)
    assert {one.branch for one in watch.seen} == {"cond", "uncond"}  # the pipeline names them
    assert handle.report().model == "WanTransformer3DModel, WanTransformer3DModel"
    assert [one.evaluation for one in watch.seen][: 2 * 12] == [i for i in range(12) for _ in (0, 1)]


def test_heun_in_a_pipeline_of_diffusers():
    pipe, watch = wan_pipeline(FlowMatchHeunDiscreteScheduler, second=False), WatchSteps()
    plain = draw_clip(pipe, 6)
    with smalti.apply(pipe, TaylorSeer(1)):
        assert torch.equal(draw_clip(pipe, 6), plain)
    with smalti.apply(pipe, watch, TaylorSeer(3, warmup=2)):
        draw_clip(pipe, 6)
    assert watch.seen[-1].evaluation == 10


def test_lora_changes_between_runs_and_a_replaced_site_is_refused(pipe):
    from peft import LoraConfig

    plain = draw(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False))
    try:
        with smalti.apply(pipe, TaylorSeer(3, warmup=2)):
            tuned = draw(pipe)
            pipe.transformer.disable_adapters()
            assert not torch.equal(draw(pipe), tuned)
            pipe.transformer.enable_adapters()
            assert torch.equal(draw(pipe), tuned)
            ffn = pipe.transformer.single_blocks[0].ffn
            pipe.transformer.single_blocks[0].ffn = torch.nn.Identity()
            with pytest.raises(Refusal, match=r"single_blocks\.0\.ffn was replaced"):
                draw(pipe)
            pipe.transformer.single_blocks[0].ffn = ffn
    finally:
        pipe.transformer.delete_adapters("default")
    assert torch.equal(draw(pipe), plain)


def test_offload_hooks_before_and_after(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    plain = draw(pipe)
    with smalti.apply(pipe, TaylorSeer(3, warmup=2)):
        expected = draw(pipe)
    add_hook_to_module(pipe.transformer, ModelHook())
    with smalti.apply(pipe, TaylorSeer(3, warmup=2)):
        assert torch.equal(draw(pipe), expected)
    remove_hook_from_module(pipe.transformer)
    handle = smalti.apply(pipe, TaylorSeer(3, warmup=2))
    add_hook_to_module(pipe.transformer, ModelHook())
    assert torch.equal(draw(pipe), expected)
    handle.remove(check=False)
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(draw(pipe), plain)


def test_a_pipeline_without_a_transformer_is_refused():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(Refusal, match="has no transformer that takes a time"):
        smalti.apply(DDPMPipeline(unet, DDPMScheduler()), TaylorSeer())
