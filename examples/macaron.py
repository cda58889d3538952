"""Train a DiT of Macaron blocks on clock faces, from nothing, and draw some; then turn a standard DiT into one.

python examples/macaron.py [steps]
"""

import sys

from smalti.backbones.block_order import build_equal, count_parameters
from smalti.backbones.dit import DiT
from smalti.backbones.macaron import to_macaron
from smalti.data.emoji import load_emoji
from smalti.evaluation.sheet import sheet
from smalti.objectives.flow_matching import FlowMatching
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.training.config import TrainConfig
from smalti.training.latent_source import LatentSource
from smalti.training.trainer import Trainer
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
autoencoder = load_model("emoji").autoencoder
clocks = load_emoji("all", styles=["noto"], topics=["clocks"])
source = LatentSource([autoencoder.encode(clocks.pixels()).tensor])


def build(ffn_ratio, order):
    shape = {"in_channels": 16, "patch_size": 1, "depth": 4, "heads": 3, "head_dim": 32, "base_size": 8}
    return DiT(**shape, ffn_ratio=ffn_ratio, block_order=order, modulation="shared")


standard, model = (build_equal(build, width=96, order=order) for order in ("standard", "macaron"))
print(f"parameters: {count_parameters(model)}, standard {count_parameters(standard)}")

config = TrainConfig(steps=steps, batch=32, learning_rate=2e-3, warmup=steps // 10, ema=0.95, save_every=steps)
trainer = Trainer(model, FlowMatching(), source, config, "macaron")
report = trainer.fit(resume=True)
print(f"loss {report.loss:.3f}, {report.images_per_second:.0f} pictures a second")

pipe = TextToImagePipeline(trainer.ema_model.eval(), autoencoder, make_scheduler("euler"), None, default_guidance=1.0)
pictures = draw_pictures(pipe, [""] * 8, None, range(8), num_inference_steps=20)
sheet(pictures, [f"seed {seed}" for seed in range(8)], columns=4).save("macaron.png")

converted = to_macaron(standard)  # a start for fine-tuning: halves of the old neurons, one before attention
print(f"{type(converted).__name__} in the order {converted.config['block_order']}")
