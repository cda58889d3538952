import warnings

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Latents
from smalti.core.seeds import generators_for
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import SOLVERS, make_scheduler
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder

STYLES = ["noto", "twemoji", "fluent"]


def waken(model):
    """Small random weights where training starts from zero, so that every input matters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def autoencoder():
    torch.manual_seed(5)
    model = ConvAutoencoder(
        factor=4, latent_channels=4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)
    ).eval()
    model.start_from_patches(torch.rand(4, 3, 32, 32) * 2 - 1)
    return model


def build(transformer, **config):
    pipe = TextToImagePipeline(waken(transformer), autoencoder(), make_scheduler("euler"), size=16, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    shape = {"in_channels": 4, "patch_size": 2, "num_single": 1, "heads": 2, "head_dim": 8, "axes_dims_rope": (2, 2, 4)}
    transformer = MMDiT(**shape, text_dim=384, pooled_dim=384, num_labels=3)
    return build(transformer, text_length=8, styles=STYLES, default_guidance=2.0)


def draw(pipe, prompt="a green apple", seeds=(7,), **options):
    options = {"num_inference_steps": 4, "output_type": "pt"} | options
    return pipe(prompt, generator=generators_for(seeds), **options).images


def test_a_picture_does_not_depend_on_its_batch(pipe):
    prompts = ["red heart", "a green apple", "", "a dog on a boat"]
    batch = draw(pipe, prompts, (1, 7, 3, 4), style=["noto", "twemoji", None, "fluent"])
    alone = draw(pipe, "a green apple", style="twemoji")
    assert batch.shape == (4, 3, 16, 16)
    assert (batch[1] - alone[0]).abs().max() < 1 / 255
    assert torch.equal(alone, draw(pipe, "a green apple", style="twemoji"))


@pytest.mark.parametrize(
    "change", [{"prompt": "red heart"}, {"seeds": (8,)}, {"style": "noto"}, {"guidance_scale": 4.0}, {"shift": 3.0}]
)
def test_everything_asked_for_matters(pipe, change):
    plain = draw(pipe, output_type="latent")
    assert (draw(pipe, **{"output_type": "latent"} | change) - plain).abs().max() > 1e-4


def test_styles_by_index_and_pictures_per_prompt(pipe):
    assert torch.equal(draw(pipe, style="twemoji"), draw(pipe, style=1))
    many = draw(pipe, ["a green apple", "red heart"], (7, 8, 7, 8), num_images_per_prompt=2)
    assert torch.allclose(many[0], draw(pipe)[0], atol=1e-4)
    assert torch.allclose(many[3], draw(pipe, "red heart", (8,))[0], atol=1e-4)


def test_output_types(pipe):
    pixels = draw(pipe)
    array = draw(pipe, output_type="np")
    image = draw(pipe, output_type="pil")[0]
    assert array.shape == (1, 16, 16, 3)
    assert np.allclose(array[0], pixels[0].permute(1, 2, 0).numpy())
    assert image.size == (16, 16)
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.51 / 255
    assert draw(pipe, output_type="latent").shape == (1, 4, 4, 4)
    assert draw(pipe, height=24, width=32).shape == (1, 3, 24, 32)
    assert torch.equal(draw(pipe, return_dict=True), pixels)


def test_defaults_latents_and_torch_seed(pipe):
    torch.manual_seed(3)
    first = pipe("red heart", output_type="pt").images
    torch.manual_seed(3)
    again = pipe("red heart", num_inference_steps=28, guidance_scale=2.0, output_type="pt", return_dict=False)[0]
    assert torch.equal(first, again)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw(pipe, latents=noise), draw(pipe))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_scheduler_draws(pipe, name):
    other = TextToImagePipeline(
        **{**pipe.components, "scheduler": make_scheduler(name)}, text_length=8, styles=STYLES, size=16
    )
    other.set_progress_bar_config(disable=True)
    pixels = draw(other, num_inference_steps=20, guidance_scale=1.0)
    assert pixels.isfinite().all()
    assert torch.equal(pixels, draw(other, num_inference_steps=20, guidance_scale=1.0))
    euler = draw(pipe, num_inference_steps=20, guidance_scale=1.0)
    assert (pixels - euler).abs().mean() < 0.2
    if name != "euler":
        assert not torch.equal(pixels, euler)


def test_callback_of_diffusers(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, float(timestep), sorted(tensors)))
        pipeline._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    end = draw(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
        output_type="latent",
    )
    assert seen == [(step, 1000.0 - 250 * step, ["denoised", "latents"]) for step in range(3)]
    assert not end.any()
    assert draw(pipe, output_type="latent").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "empty list of prompts"),
        ({"prompt": None}, "draws from prompts"),
        ({"style": "notto"}, "did you mean 'noto'"),
        ({"num_inference_steps": 0}, "0 steps"),
        ({"height": 20}, "height of 20 px.*multiple of 8, such as 16 or 24"),
        ({"guidance_scale": -1.0}, "guidance scale"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance interval"),
        ({"seeds": (1, 2)}, "2 generators for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "need"),
        ({"output_type": "gif"}, "unknown output type 'gif'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "unknown callback tensor"),
        ({"shift": 0.0}, "shift"),
    ],
)
def test_refuses(pipe, options, message):
    with pytest.raises(UserError, match=message):
        draw(pipe, **options)


def test_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="these words were cut: 'apple on the table in the kitchen'"):
        draw(pipe, "a very large and ripe green apple on the table in the kitchen")


def test_saved_pipeline_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "text_encoder").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.styles == STYLES
    assert again.config.text_length == 8
    assert torch.equal(draw(again, style="fluent"), draw(pipe, style="fluent"))
    swapped = TextToImagePipeline.from_pretrained(tmp_path, scheduler=make_scheduler("heun"))
    swapped.scheduler = DPMSolverMultistepScheduler.from_config(
        swapped.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    assert draw(swapped).isfinite().all()


def test_lora_is_saved_and_loaded_by_the_calls_of_the_ecosystem(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    tuned, fresh = (TextToImagePipeline.from_pretrained(tmp_path / "base") for _ in range(2))
    plain = draw(fresh, output_type="latent")
    names = [name for name, module in tuned.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    tuned.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    changed = draw(tuned, output_type="latent")
    assert (changed - plain).abs().max() > 1e-3
    tuned.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(tuned.transformer))
    fresh.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    assert torch.allclose(draw(fresh, output_type="latent"), changed, atol=1e-5)
    fresh.set_adapters("mine", 0.0)
    assert torch.allclose(draw(fresh, output_type="latent"), plain, atol=1e-5)
    fresh.set_adapters("mine", 1.0)
    fresh.unload_lora_weights()
    assert torch.equal(draw(fresh, output_type="latent"), plain)


def test_models_of_labels_and_of_nothing():
    labelled = build(
        DiT(in_channels=4, depth=1, heads=2, head_dim=8, num_labels=3, base_size=4), text_encoder=None, styles=STYLES
    )
    assert torch.equal(draw(labelled, "twemoji"), draw(labelled, "", style=1))
    assert not torch.equal(draw(labelled, "twemoji"), draw(labelled, "noto"))
    with pytest.raises(UserError, match="did you mean 'noto'"):
        draw(labelled, "nooto")
    free = build(DiT(in_channels=4, depth=1, heads=2, head_dim=8, base_size=4), text_encoder=None)
    assert draw(free, None, (1, 2), num_images_per_prompt=2).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="takes no style or label, got 'a cat'"):
        draw(free, "a cat")
    with pytest.raises(UserError, match="takes no condition"):
        draw(free, None, guidance_scale=2.0)


def test_bad_configurations():
    with pytest.raises(UserError, match="unknown text encoder"):
        build(MMDiT.tiny(), text_encoder="minilmm")
    with pytest.raises(UserError, match="2 styles for a transformer of 3 labels"):
        build(MMDiT.tiny(), styles=STYLES[:2])


def test_a_model_of_clips_draws_frames_and_each_is_decoded_alone(pipe, tmp_path):
    clips = build(pipe.transformer, text_length=8, styles=STYLES, frames=3)
    ask = {"num_inference_steps": 2, "generator": generators_for((7,))}
    latents = clips("a dog", output_type="latent", **ask).frames
    assert latents.shape == (1, 4, 3, 4, 4)
    ask["generator"] = generators_for((7,))
    pixels = clips("a dog", output_type="pt", **ask).frames
    assert pixels.shape == (1, 3, 3, 16, 16)
    alone = clips.autoencoder.decode(Latents(latents[:, :, 1])) / 2 + 0.5
    assert torch.allclose(pixels[:, 1], alone, atol=1e-5)
    ask["generator"] = generators_for((7,))
    (film,) = clips("a dog", **ask).frames
    assert [frame.size for frame in film] == [(16, 16)] * 3
    ask["generator"] = generators_for((7,))
    assert clips("a dog", output_type="np", **ask).frames.shape == (1, 3, 16, 16, 3)
    clips.save_pretrained(tmp_path)
    assert TextToImagePipeline.from_pretrained(tmp_path).config["frames"] == 3
