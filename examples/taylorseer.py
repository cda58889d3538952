"""The shipped model at 50 steps, plain and with TaylorSeer: seconds, the pictures, and how far they are apart."""

import time

import numpy as np
import torch

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.seeds import generators_for
from smalti.evaluation.sheet import sheet, to_images
from smalti.zoo.loader import load_model

pipe = load_model("emoji")
prompts = ["a green apple", "red heart", "panda", "three o'clock"]


def draw():
    started = time.perf_counter()
    pictures = pipe(prompts, num_inference_steps=50, generator=generators_for(range(4)), output_type="np").images
    return pictures, time.perf_counter() - started


draw()  # the first call builds the text encoder
plain, seconds = draw()
with smalti.apply(pipe, TaylorSeer(interval=4, order=2)) as handle:
    pictures, less = draw()
print(handle.report())
psnr = -10 * np.log10(np.mean((pictures - plain) ** 2))
both = torch.from_numpy(np.concatenate([plain, pictures])).permute(0, 3, 1, 2)
sheet(to_images(both * 2 - 1), [f"{p}, {how}" for how in ("plain", "TaylorSeer") for p in prompts], columns=4).save(
    "both.png"
)
print(f"{seconds:.1f} s -> {less:.1f} s, PSNR {psnr:.1f} dB")
