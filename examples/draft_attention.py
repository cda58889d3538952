"""Sparse attention on pictures of 256 tokens: a quarter of the blocks, by a draft, by distance and blindly."""

import smalti
from smalti.acceleration.draft_attention import DraftAttention
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji-1k")
prompts, pictures = ["a green apple", "red heart", "panda"], []
guides = {"full": None, "draft": "head", "window": "row", "random": "row"}
for guide, rule in guides.items():
    settings = {"sparsity": 0.0} if rule is None else {"sparsity": 0.75, "rule": rule, "guide": guide}
    with smalti.apply(pipe, DraftAttention(pool=(1, 2, 2), dense_steps=0, **settings)) as handle:
        pictures += pipe(prompts, num_inference_steps=10, generator=generators_for(range(3))).images
    print(f"{guide}\n{handle.report()}")
sheet(pictures, [f"{prompt}, {guide}" for guide in guides for prompt in prompts], columns=3).save("draft.png")
