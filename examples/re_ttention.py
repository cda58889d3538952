"""Attention to 7 % of the keys: plainly, and put right with the statistics of one full step in five."""

import smalti
from smalti.acceleration.re_ttention import ReTtention
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji-1k")
prompts, pictures = ["a green apple", "red heart", "panda"], []
for correction in ("none", "both"):
    with smalti.apply(pipe, ReTtention(density=0.07, correction=correction)) as handle:
        pictures += pipe(prompts, num_inference_steps=15, generator=generators_for(range(3))).images
    print(f"correction={correction}\n{handle.report()}")
labels = [f"{prompt}, {correction}" for correction in ("sparse", "Re-ttention") for prompt in prompts]
sheet(pictures, labels, columns=3).save("re_ttention.png")
