"""Learn which fifth of a model can go, cut it out, save the smaller model and load it again.

python examples/ecodiff.py [updates]
"""

import sys

from smalti.acceleration.ecodiff import Learning, learn_masks, prune
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model, save_model

updates = int(sys.argv[1]) if len(sys.argv) > 1 else 100
pipe = load_model("emoji")
prompts = ["a green apple", "red heart", "panda", "a yellow star"]
learning = Learning(updates=updates, batch=4, weight=10.0, rates={"heads": 0.3, "ffn": 0.2, "mod": 0.3})
plan = learn_masks(pipe, prompts, ratio=0.2, style="noto", scope="local", guidance=1.0, learning=learning)
print(plan.table())

pictures = pipe(prompts, style="noto", num_inference_steps=8, generator=generators_for(range(4))).images
pipe.transformer = prune(pipe.transformer, plan)
save_model(pipe, "smaller", {"recipe": "ecodiff"})
pictures += load_model("smaller")(
    prompts, style="noto", num_inference_steps=8, generator=generators_for(range(4))
).images
sheet(pictures, [*prompts, *(f"{one}, a fifth smaller" for one in prompts)], columns=4).save("ecodiff.png")
