"""A plan of sparse heads for clips: searched on two prompts, kept in a file, and used for others."""

import smalti
from smalti.acceleration.sparse_vdit import SparseVDiT, search_sparse_plan
from smalti.core.seeds import generators_for
from smalti.evaluation.clip_metrics import film
from smalti.ops.head_patterns import Patterns
from smalti.zoo.loader import load_model

pipe, settings = load_model("clip"), {"num_inference_steps": 8, "guidance_scale": 1.0}
widths = Patterns(diagonal=0.375, multi_diagonal=0.375, stripes=0.375)
plan = search_sparse_plan(pipe, ["cat", "sun"], target=0.5, patterns=widths, starts=(0.15, 0.4), **settings)
plan.save("plan.json")
print(f"{plan.table()}\n{plan.density():.0%} of dense attention")

prompts = ["dog", "crying face"]
dense = pipe(prompts, generator=generators_for(range(2)), **settings).frames
with smalti.apply(pipe, SparseVDiT("plan.json")) as handle:
    sparse = pipe(prompts, generator=generators_for(range(2)), **settings).frames
print(handle.report())
film([*dense, *sparse], [*prompts, *(f"{prompt}, sparse" for prompt in prompts)]).save("sparse_vdit.png")
