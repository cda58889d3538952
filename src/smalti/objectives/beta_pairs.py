"""A noisy sample of a discrete process once more, with less noise: the same data and noise, an earlier timestep.

    z_j = alpha_j x0 + sigma_j noise with noise = (z_i - alpha_i x0) / sigma_i,   j = max(1, i - d) <= i

with d whole and uniform on 0 to `largest` times T - 1, for each sample its own.

Source: SRA (arXiv 2505.02831), section 3.2, and its code for DiT (vvvvvjdy/SRA).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Generators
from smalti.core.seeds import rand
from smalti.objectives.beta_process import BetaProcess, take
from smalti.objectives.paired_noise import Earlier


@dataclass(frozen=True)
class BetaPairs:
    """Pairs of a process; beside the objective `DDPM` what `StraightPairs` is beside flow matching.

    Args:
        process: of the objective.
        largest: how much earlier at most, as a share of all timesteps, in (0, 1].
    """

    process: BetaProcess = field(default_factory=BetaProcess)
    largest: float = 0.2

    def __post_init__(self):
        if not 0 < self.largest <= 1:
            raise UserError(f"largest is {self.largest}; timesteps differ by at most so much, above 0 and up to 1")

    def draw(self, x0: Tensor, x: Tensor, t: Tensor, generator: Generators) -> Earlier:
        """Draws an earlier timestep for each sample and gives the sample there.

        Args:
            x0: data (B, ...).
            x: z of the process (B, ...).
            t: timesteps over T (B,), as `DDPM` gives them to its network.
            generator: gives each sample its d.
        """
        process = self.process
        index = (t.double() * process.count).round().long()
        drop = (rand((len(t),), generator).to(t.device).double() * self.largest * process.count).long()
        earlier = torch.minimum(index, (index - drop).clamp(min=1))
        noise = (x - take(process.alphas, index, x) * x0) / take(process.sigmas, index, x)
        z = take(process.alphas, earlier, x) * x0 + take(process.sigmas, earlier, x) * noise
        return Earlier(z, earlier / process.count)
