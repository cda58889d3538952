"""Half of the tokens in most steps: the same prompts dense, with tokens in focus and with tokens drawn blindly."""

import smalti
from smalti.acceleration.ras import RAS
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji-1k")
prompts, pictures, names = ["a green apple", "red heart", "panda"], [], ("dense", "focus", "random")
for name in names:
    method = RAS(ratio=1.0) if name == "dense" else RAS(start=6, resets=(10,), selection=name)
    with smalti.apply(pipe, method) as handle:
        pictures += pipe(prompts, num_inference_steps=14, generator=generators_for(range(3))).images
    print(f"{name}: {handle.report()}")
sheet(pictures, [f"{prompt}, {name}" for name in names for prompt in prompts], columns=3).save("ras.png")
