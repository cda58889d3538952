"""One frozen model, several tasks: teaches `emoji` flags and sport, and draws both in one batch.

python examples/diffscaler.py [steps]
"""

import sys

from smalti.data.emoji import STYLES, load_emoji
from smalti.data.packages import cache_folder
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji import latent_source
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.config import TrainConfig
from smalti.training.diffscaler import DiffScaler
from smalti.training.task_bank import TaskBank
from smalti.training.task_training import train_together
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
cache, pipe = cache_folder() / "examples", load_model("emoji")
encoder = EmbeddingCache(MiniLMEncoder(length=16), cache)
bank, sources = TaskBank.wrap(pipe.transformer, DiffScaler(rank=3)), {}
for task, group in (("flags", "country-flag"), ("sport", "sport")):
    pictures = load_emoji("train", styles=["noto"]).select(subgroups=[group])
    sources[bank.add(task)] = latent_source(pipe.autoencoder, pictures, encoder, STYLES, cache)

config = TrainConfig(steps=steps, batch=16, learning_rate=4e-3, warmup=steps // 10)
print("loss", train_together(bank, sources, FlowMatching(), config, "tasks").loss)
for task in bank.names:
    print(bank.save(task, f"{task}.safetensors"), f"{bank.share(task):.1%} of the model")
with bank.using(["flags", "sport"]):
    for task, picture in zip(bank.names, pipe(["the flag of Norway", "a tennis ball"], style="noto").images):
        picture.save(f"{task}.png")
