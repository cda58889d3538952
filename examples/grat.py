"""Sparse attention on pictures of 256 tokens in groups of 2 x 2: a cross of groups against groups drawn blindly."""

import smalti
from smalti.acceleration.grat import GRAT, region_layout
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji-1k")
prompts, pictures = ["a green apple", "red heart", "panda"], []
for region in ("all", "cross", "random:15"):
    share = region_layout((1, 16, 16), (1, 2, 2), region).attended
    with smalti.apply(pipe, GRAT(group=(1, 2, 2), region=region)) as handle:
        images = pipe(prompts, num_inference_steps=10, generator=generators_for(range(3))).images
    print(f"{region}: {share:.0%} of the keys attended\n{handle.report()}")
    pictures += images
sheet(
    pictures, [f"{prompt}, {region}" for region in ("all", "cross", "random:15") for prompt in prompts], columns=3
).save("grat.png")
