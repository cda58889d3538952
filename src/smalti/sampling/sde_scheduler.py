"""The SDE solver as a scheduler of diffusers, so that a pipeline can be saved with it.

One step is `solvers.SDE`, Euler-Maruyama of the reverse SDE of the straight path (SiT, arXiv 2401.08740); a sigma is
our t, a timestep 1000 t.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from smalti.core.protocols import Generators, SolverState
from smalti.core.seeds import randn
from smalti.core.time import timestep_from_time
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE


@dataclass
class FlowMatchSDEOutput(BaseOutput):
    """The sample after a step (B, ...)."""

    prev_sample: Tensor


class FlowMatchSDEScheduler(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama for flow models.

    Args:
        num_train_timesteps: scale of the timesteps.
        shift: shift of the schedule towards noise.
        strength: diffusion in units of t, `w(t) = strength * t`; 0 is Euler.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, strength: float = 1.0):
        self.count, self.shift, self.solver = num_train_timesteps, shift, SDE(strength)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Sets the schedule: a number of steps, or the sigmas before each step."""
        if sigmas is None:
            times = uniform_schedule(num_inference_steps or self.count, self.shift)
        else:
            times = [*map(float, sigmas), 0.0]
        self.num_inference_steps = len(times) - 1
        self.sigmas = torch.tensor(times)
        self.timesteps = timestep_from_time(self.sigmas[:-1], self.count).to(device)
        self.step_index = 0

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDEOutput | tuple[Tensor]:
        """One step along the schedule with the velocity `model_output` (B, ...) at `sample` (B, ...)."""
        t, s = float(self.sigmas[self.step_index]), float(self.sigmas[self.step_index + 1])
        noise = randn(sample.shape, generator or torch.default_generator, sample.device)
        moved = self.solver.step(SolverState(sample.float()), lambda x, t: model_output, t, s, noise).x
        self.step_index += 1
        moved = moved.to(model_output.dtype)
        return FlowMatchSDEOutput(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return self.count
