"""Teach the shipped model with a PEFT LoRA to draw green hearts for every heart; save it and load it again.

python examples/train_lora.py [steps]
"""

import sys

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import derive_seed, generators_for
from smalti.data.emoji import load_emoji
from smalti.objectives.flow_matching import FlowMatching
from smalti.zoo.loader import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
pipe = load_model("emoji")
transformer = pipe.transformer.requires_grad_(False)
transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_qkv", "to_out"]))

hearts = [item.key for item in load_emoji("all", topics=["hearts"]).items if "green" in item.label]
green = load_emoji("all").select(keys=hearts)
latents = pipe.autoencoder.encode(green.pixels()).tensor
text = pipe.text.encode(["a heart"] * len(green))
styles = torch.tensor([pipe.config["styles"].index(item.style) for item in green.items])
batch = Batch(latents, Cond(text.tokens, text.pooled, text.mask, styles), torch.arange(len(green)))

weights = [weight for weight in transformer.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=3e-3)
for step in range(steps):
    generators = generators_for([derive_seed(step, sample) for sample in range(len(green))])
    loss = FlowMatching().loss(transformer, batch, TrainState(step), generators).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

pipe.save_lora_weights("green_hearts", transformer_lora_layers=get_peft_model_state_dict(transformer))

fresh = load_model("emoji")


def draw():
    return fresh("a heart", style="noto", num_inference_steps=8, generator=torch.Generator().manual_seed(1)).images[0]


before = draw()
fresh.load_lora_weights("green_hearts")
after = draw()
before.save("heart_before.png")
after.save("heart_after.png")
print(f"loss {loss.item():.3f}; the heart changed: {before.tobytes() != after.tobytes()}")
