"""The paper's schedule, and a short run of it through all four stages."""

import torch

from smalti.backbones.microdit import MicroDiT
from smalti.core.protocols import Batch, Cond
from smalti.core.seeds import rand
from smalti.training.microdit import paper_stages
from smalti.training.stages import train_stages


class Squares:
    """Latents of one colour each, of a size."""

    def __init__(self, side):
        self.side = side

    def __len__(self):
        return 8

    def batch(self, indices, generators):
        rand((len(indices), 1), generators)
        x0 = indices[:, None, None, None].float().expand(-1, 4, self.side, self.side) / 8
        return Batch(x0, Cond(text=torch.zeros(len(indices), 3, 12)), indices)


def test_the_numbers_are_the_paper_s():
    small, large = Squares(8), Squares(16)
    stages = paper_stages(small, large)
    assert [one.objective.mask.ratio for one in stages] == [0.75, 0.0, 0.75, 0.0]
    assert [one.config.steps for one in stages] == [250_000, 30_000, 50_000, 5_000]
    assert [one.config.learning_rate for one in stages] == [2.4e-4, 8e-5, 8e-5, 8e-5]
    assert [(one.objective.mean, one.objective.std) for one in stages] == [(-0.6, 1.2)] * 2 + [(0.0, 0.6)] * 2
    assert [one.config.ema for one in stages] == [0, 0, 0.99975, 0.9975]
    assert [one.config.clip for one in stages] == [0.25, 0.25, 0.5, 0.5]
    assert [one.source for one in stages] == [small, small, large, large]
    assert [one.moments for one in stages][1:] == ["kept", "fresh", "kept"]
    assert {(one.config.batch, one.config.weight_decay, one.objective.sigma_data) for one in stages} == {
        (2048, 0.1, 0.9)
    }
    assert stages[0].config.decay == "cosine"
    assert stages[0].config.warmup == 2500


def test_four_stages_train_one_model(tmp_path):
    model = MicroDiT(
        in_channels=4, depth=2, width=16, head_dim=8, text_dim=12, mixer_depth=1, mixer_width=8, ffn_multiple=8,
        experts=0, base_size=4, sigma_data=0.9,
    )  # fmt: skip
    stages = paper_stages(Squares(8), Squares(16), scale=4e-5, batch=4)
    report = train_stages(model, stages, tmp_path)
    assert [one.steps for one in report.reports] == [10, 1, 2, 1]
    each = [one.flops / one.samples for one in report.costs]
    assert each[0] < 0.7 * each[1]
    assert each[2] < 0.7 * each[3]
    assert each[3] > 3 * each[1]
