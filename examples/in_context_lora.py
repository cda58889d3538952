"""Teaches `emoji` to draw pairs in one style on one canvas, then draws one beside a picture that is given.

python examples/in_context_lora.py [steps]
"""

import sys

import torch

import smalti
from smalti.control.known_panels import KnownPanels, given_panels
from smalti.data.emoji import load_emoji
from smalti.data.joint_captions import JointCaptioner
from smalti.data.packages import cache_folder
from smalti.data.panels import style_sets
from smalti.objectives.flow_matching import FlowMatching
from smalti.ops.canvas import PanelLayout
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.config import TrainConfig
from smalti.training.lora import LoRASettings, add_lora, merge_loras, save_lora
from smalti.training.panel_source import panel_source
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
pipe, layout, cache = load_model("emoji"), PanelLayout.named("1x2"), cache_folder() / "examples"
encoder = EmbeddingCache(MiniLMEncoder(length=40), cache)
pipe.use_text_encoder(encoder)

joint = JointCaptioner.for_layout(layout, "[PAIR]", length=30)
sets = style_sets(load_emoji("train", topics=["hearts", "clocks", "animals"]), count=50)
source = panel_source(sets, layout, joint, pipe.autoencoder, encoder, cache, num_labels=pipe.num_labels)

add_lora(pipe.transformer, LoRASettings(rank=8))
config = TrainConfig(steps=steps, batch=8, learning_rate=2e-3, warmup=steps // 10, ema=0.99)
trainer = Trainer(pipe.transformer, FlowMatching(shift=1.4), source, config, "in-context-lora")
print("loss", trainer.fit().loss)
print(save_lora(trainer.ema_model, "pair-lora"))
pipe.register_modules(transformer=merge_loras(trainer.ema_model))

prompt, size = joint(["a red heart", "a dog"]), dict(zip(("height", "width"), layout.size(64, 64)))
pipe(prompt, generator=torch.Generator().manual_seed(0), **size).images[0].save("pair.png")
left = load_emoji("all", styles=["noto"]).select(keys=["2764"]).pixels()
with smalti.apply(pipe, KnownPanels(given_panels(layout, {0: pipe.autoencoder.encode(left).tensor}))):
    pipe(prompt, generator=torch.Generator().manual_seed(0), **size).images[0].save("beside.png")
