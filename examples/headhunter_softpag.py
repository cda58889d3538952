"""Finds heads whose perturbation darkens pictures, keeps them, and draws with them at half and full strength."""

import smalti
from smalti.control.head_hunt import hunt_heads
from smalti.control.head_sets import HeadSet
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.core.seeds import generators_for
from smalti.evaluation.held_out_prompts import held_out_prompts
from smalti.evaluation.rewards import darkness
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji")
pipe.set_progress_bar_config(disable=True)
hunt = hunt_heads(pipe, darkness, held_out_prompts("emoji", 4, first_seed=9), k=3, steps=6)
hunt.heads.save("dark.json")
print(f"{hunt.heads}: darkness {hunt.plain:.3f} without, {hunt.reached:.3f} with these heads")
prompts = ["a green apple", "red heart", "panda"]
pictures = pipe(prompts, num_inference_steps=10, generator=generators_for(range(3))).images
for strength in (0.5, 1.0):
    heads = HeadSet.load("dark.json").weighted(strength)
    with smalti.apply(pipe, PerturbedHeads(heads, scale=3.0, guidance=3.0)):  # 3 is the pipeline's own guidance
        pictures += pipe(prompts, num_inference_steps=10, generator=generators_for(range(3))).images
sheet(pictures, [f"{prompt}, u = {u}" for u in (0, 0.5, 1) for prompt in prompts], columns=3).save("dark.png")
