"""The shipped model at 50 steps, plain and with TaylorSeer: seconds, and how far the pictures are apart."""

import time

import numpy as np

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.seeds import generators_for
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
print(f"{seconds:.1f} s -> {less:.1f} s, PSNR {psnr:.1f} dB")
