"""What a process that is alone can see of a model in pieces; the rest is in `test_trainer_processes`."""

import pytest
import torch
from toy_training import ToyDenoiser, ToySource

from smalti.core.errors import UserError
from smalti.objectives.flow_matching import FlowMatching
from smalti.training.config import TrainConfig
from smalti.training.sharding import like, local, shard, total_norm, whole
from smalti.training.trainer import Trainer


def test_whole_tensors_pass_as_they_are():
    one = torch.randn(3, 2)
    assert whole(one) is one
    assert local(one) is one
    assert like(one, torch.zeros(3, 2)) is one
    assert total_norm([one, 2 * one]) == pytest.approx(float(5**0.5 * one.norm()))
    assert total_norm([]) == 0


def test_one_process_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="accelerate launch"):
        shard(ToyDenoiser())
    with pytest.raises(UserError, match="accelerate launch"):
        Trainer(ToyDenoiser(), FlowMatching(), ToySource(), TrainConfig(steps=1, batch=2, shard=True), tmp_path)


@pytest.mark.parametrize(
    ("other", "message"), [({"optimizer": "muon"}, "whole matrices"), ({"compile": True}, "compiled")]
)
def test_what_needs_a_whole_model_is_refused(other, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(steps=1, batch=1, shard=True, **other)
