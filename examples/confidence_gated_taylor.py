"""Calibrates the gate to skip half of the steps, then draws with it: which steps were full, and why."""

import smalti
from smalti.acceleration.confidence_gated_taylor import ConfidenceGatedTaylor
from smalti.core.seeds import generators_for
from smalti.evaluation.calibration import calibrate
from smalti.evaluation.sheet import sheet
from smalti.zoo.loader import load_model

pipe = load_model("emoji")
pipe.set_progress_bar_config(disable=True)
found = calibrate(pipe, ConfidenceGatedTaylor, ["black heart", "worm", "shortcake"], skip=0.5, num_inference_steps=30)
print(f"tau {found.threshold:.3g} skips {found.value:.0%} of the steps, found in {len(found.tried)} trials")

gate = ConfidenceGatedTaylor(found.threshold)
prompts = ["a green apple", "red heart", "panda"]
with smalti.apply(pipe, gate) as handle:
    pictures = pipe(prompts, num_inference_steps=30, generator=generators_for(range(3))).images
trace = gate.traces[-1]
print(handle.report())
print("".join("F" if is_full else "." for is_full in trace.full), f"{trace.speedup:.1f} times fewer blocks")
print("probe errors:", " ".join("-" if error is None else f"{error:.3f}" for error in trace.errors))
sheet(pictures, prompts, columns=3).save("confidence_gated_taylor.png")
