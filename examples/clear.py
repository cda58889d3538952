"""Attention in circles of three tokens: the model as it is, under the circle without training, and the student's."""

import smalti
from smalti.acceleration.clear import CLEAR, distilled
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.ops.circle_cost import circle_cost
from smalti.ops.circle_mask import circle_layout
from smalti.zoo.loader import load_model

pipe = load_model("emoji-1k")
prompts, pictures = ["a green apple", "red heart", "panda"], []


def draw():
    return pipe(prompts, num_inference_steps=10, generator=generators_for(range(3))).images


pictures += draw()
with smalti.apply(pipe, CLEAR(radius=3, pool=4)):
    pictures += draw()
with distilled(pipe, "clear-emoji-1k") as handle:
    pictures += draw()
print(handle.report())
print(f"attention saved at 8192 px: {circle_cost(circle_layout((1, 512, 512), 16, 512)).saved:.1%}")
names = ("full attention", "circle alone", "student")
sheet(pictures, [f"{prompt}, {name}" for name in names for prompt in prompts], columns=3).save("clear.png")
