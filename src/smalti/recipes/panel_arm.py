"""One arm of a claim on sets: `emoji` learns by a small LoRA to draw pairs of concepts in one vendor's style.

The canvas has two panels of 64 px side by side; its caption names both concepts and no style. A pair of the training
shows two training concepts of one vendor (or, mixed up, of any two); prompts are pairs of held-out concepts. What a
pair shares is read off the drawn panels by a classifier of vendors that was fitted on real pictures.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import smalti
from smalti.control.known_panels import KnownPanels, given_panels
from smalti.core.protocols import Latents
from smalti.core.seeds import generators_for
from smalti.data.emoji import load_emoji
from smalti.data.joint_captions import JointCaptioner
from smalti.data.latent_cache import build_cache, cache_key
from smalti.data.packages import cache_folder
from smalti.data.panels import PanelSet, mixed_up, style_sets
from smalti.evaluation.emoji_metrics import concept_numbers, judge_text, load_judge
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.panel_metrics import SharedReader, agreement, panel_match, set_distance, spread_within
from smalti.evaluation.style_features import style_features
from smalti.evaluation.vgg import VGG16
from smalti.objectives.flow_matching import FlowMatching
from smalti.ops.canvas import PanelLayout
from smalti.recipes.emoji import TOPICS_CPU
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.shift import shift_for_tokens
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.marked_text import MarkedTextEncoder
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.config import TrainConfig
from smalti.training.lora import LoRASettings, add_lora
from smalti.training.panel_source import panel_source
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model, weights_hash

LAYOUT, PREFIX = PanelLayout(1, 2), "[PAIR]"
TEXT_LENGTH, SPECIAL = 24, 4
SIDE, STEPS, GUIDANCE = 64, 20, 3.0
BATCH, DRAWN_AT_ONCE = 8, 16


@cache
def encoder() -> MarkedTextEncoder:
    """The model's text encoder, which reads the two panels' captions apart."""
    cached = EmbeddingCache(MiniLMEncoder(length=TEXT_LENGTH // LAYOUT.count), cache_folder() / "text")
    return MarkedTextEncoder(cached, JointCaptioner.for_layout(LAYOUT).markers, TEXT_LENGTH)


@cache
def captioner() -> JointCaptioner:
    """Of all canvases, in training and use."""
    tokenizer = MiniLMEncoder(length=TEXT_LENGTH).tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return JointCaptioner.for_layout(LAYOUT, PREFIX, length=TEXT_LENGTH - SPECIAL, count=count)


def pipeline() -> TextToImagePipeline:
    """The shipped model, which reads longer captions here."""
    pipe = load_model("emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.use_text_encoder(encoder())
    return pipe


def training_sets(count: int, seed: int, mixed: bool = False) -> list[PanelSet]:
    """Pairs of training concepts, of one vendor each; mixed up: of any."""
    sets = style_sets(load_emoji("train", topics=TOPICS_CPU), count, LAYOUT.count, seed)
    return mixed_up(sets, seed) if mixed else sets


def prompt_sets(count: int, seed: int) -> list[PanelSet]:
    """Pairs of held-out concepts: their captions are drawn, their pictures stand beside what was drawn."""
    return style_sets(load_emoji("held-out", topics=TOPICS_CPU), count, LAYOUT.count, 10_000 + seed)


@cache
def reader() -> SharedReader:
    """Tells the vendor of a picture; fitted on the real training pictures as the autoencoder gives them back."""
    pictures = load_emoji("train", topics=TOPICS_CPU)
    autoencoder = load_model("emoji").autoencoder
    table = build_cache(
        cache_folder() / "arms", cache_key("panel reader", pictures.hash, len(pictures), weights_hash(autoencoder)),
        len(pictures), lambda rows: looks(given_back(autoencoder, pictures.pixels(rows))),
    )  # fmt: skip
    features = table[torch.arange(len(pictures))]
    return SharedReader.fit(features, [item.style for item in pictures.items], concept_numbers(pictures))


def looks(pixels: Tensor) -> Tensor:
    """What the reader sees of pixels (B, 3, H, W)."""
    return style_features(network(), pixels)


@cache
def network() -> VGG16:
    """Whose first stages the reader looks through."""
    return VGG16.pretrained()


def given_back(autoencoder: ConvAutoencoder, pixels: Tensor) -> Tensor:
    """Pictures as the autoencoder gives them back: what is drawn comes from it too."""
    return autoencoder.decode(autoencoder.encode(pixels))


def real_accuracy() -> float:
    """Share of real held-out pictures, given back, whose vendor is read rightly."""
    pictures = load_emoji("held-out", topics=TOPICS_CPU)
    read = reader()(looks(given_back(load_model("emoji").autoencoder, pictures.pixels())))
    return sum(reader().classes[one] == item.style for one, item in zip(read.tolist(), pictures.items)) / len(pictures)


@dataclass(frozen=True)
class PanelArm:
    """How an arm learns.

    Args:
        sets: pairs that it sees.
        mixed: whether what a pair shares is mixed up.
        rank: of the adapter.
        rate: peak learning rate.
    """

    sets: int = 100
    mixed: bool = False
    rank: int = 8
    rate: float = 2e-3


def train_panel_arm(pipe: TextToImagePipeline, one: PanelArm, steps: int, seed: int) -> float:
    """Teaches the pipeline's transformer; it ends with the averaged adapter. Returns images per second."""
    source = panel_source(
        training_sets(one.sets, seed, one.mixed), LAYOUT, captioner(), pipe.autoencoder, encoder(),
        cache_folder() / "arms", num_labels=pipe.num_labels,
    )  # fmt: skip
    torch.manual_seed(seed)
    add_lora(pipe.transformer, LoRASettings(one.rank))
    config = TrainConfig(
        steps=steps, batch=BATCH, learning_rate=one.rate, warmup=steps // 20, decay="linear-cooldown", ema=0.99,
        weight_decay=0.0, seed=seed,
    )  # fmt: skip
    factor = pipe.autoencoder.config["factor"]
    tokens = (SIDE // factor) ** 2
    objective = FlowMatching(shift=shift_for_tokens(LAYOUT.count * tokens, tokens))
    with tempfile.TemporaryDirectory(prefix="smalti-arm-") as folder:
        trainer = Trainer(pipe.transformer, objective, source, config, Path(folder))
        report = trainer.fit()
    pipe.register_modules(transformer=trainer.ema_model.eval())
    return report.images_per_second


@torch.no_grad()
def draw_sets(pipe: TextToImagePipeline, sets: Sequence[PanelSet], seed: int, known: bool = False) -> Tensor:
    """Panels (S, P, 3, h, w) in [-1, 1] drawn as canvases; with `known` the first panel of each is given."""
    prompts, drawn = [captioner()(one.captions) for one in sets], []
    height, width = LAYOUT.size(SIDE, SIDE)
    for start in range(0, len(sets), DRAWN_AT_ONCE):
        some = sets[start : start + DRAWN_AT_ONCE]

        def canvases(start=start, some=some) -> Tensor:
            return pipe(
                prompts[start : start + DRAWN_AT_ONCE], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                height=height, width=width, output_type="latent", return_dict=False,
                generator=generators_for(range(seed + start, seed + start + len(some))),
            )[0]  # fmt: skip

        if known:
            first = pipe.autoencoder.encode(torch.stack([one.panels[0] for one in some])).tensor
            with smalti.apply(pipe, KnownPanels(given_panels(LAYOUT, {0: first}))):
                latents = canvases()
        else:
            latents = canvases()
        panels = torch.stack(LAYOUT.split(latents), 1).flatten(0, 1)
        drawn.append(pipe.autoencoder.decode(Latents(panels)).unflatten(0, (-1, LAYOUT.count)))
    return torch.cat(drawn)


@torch.no_grad()
def draw_apart(pipe: TextToImagePipeline, sets: Sequence[PanelSet], seed: int) -> Tensor:
    """Panels (S, P, 3, h, w), each drawn as a picture of its own from its own caption."""
    prompts, drawn = [caption for one in sets for caption in one.captions], []
    for start in range(0, len(prompts), 2 * DRAWN_AT_ONCE):
        some = prompts[start : start + 2 * DRAWN_AT_ONCE]
        pictures = pipe(
            some, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt", return_dict=False,
            generator=generators_for(range(seed + start, seed + start + len(some))),
        )[0]  # fmt: skip
        drawn.append(pictures * 2 - 1)
    return torch.cat(drawn).unflatten(0, (-1, LAYOUT.count))


def measure(drawn: Tensor, sets: Sequence[PanelSet]) -> dict[str, float]:
    """Figures of drawn panels (S, P, 3, h, w) beside the sets whose captions they were drawn from."""
    extract = EfficientNetLite0()
    features, real = (
        extract(some.flatten(0, 1)).unflatten(0, (-1, LAYOUT.count))
        for some in (drawn, torch.stack([one.panels for one in sets]))
    )
    agreed = agreement(reader()(looks(drawn.flatten(0, 1)).unflatten(0, (-1, LAYOUT.count))))
    text = judge_text([caption for one in sets for caption in one.captions]).unflatten(0, (-1, LAYOUT.count))
    return {
        "agreement": float(agreed.mean()),
        "spread": spread_within(features),
        "match": float(panel_match(load_judge(), features, text).double().mean()),
        "set distance": set_distance(features, real),
        **{f"pair {number}": float(one) for number, one in enumerate(agreed)},
    }


def given_agreement(drawn: Tensor, sets: Sequence[PanelSet]) -> float:
    """Share of drawn last panels in the style that the given first panel really has."""
    read = reader()(looks(drawn[:, -1]))
    return sum(reader().classes[one] == some.shared[0] for one, some in zip(read.tolist(), sets)) / len(sets)
