"""Draw one prompt in every style of the shipped model, and watch x0 appear while it is drawn."""

from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji")
styles = pipe.config["styles"]


def preview(pipe, step, timestep, tensors):
    print(f"step {step:2}: estimate of x0 spreads {tensors['denoised'].std():.2f}")
    return {}


pictures = pipe(
    ["a green apple"] * len(styles),
    style=styles,
    num_inference_steps=8,
    generator=generators_for([7] * len(styles)),
    callback_on_step_end=preview,
    callback_on_step_end_tensor_inputs=["denoised"],
).images
sheet(pictures, styles).save("styles.png")
