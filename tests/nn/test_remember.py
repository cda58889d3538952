"""What is remembered serves every later mode: gradients, forward derivatives, fake tensors."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from smalti.nn.remember import remember


def make_ramp():
    calls = []

    @remember
    def ramp(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.arange(size).float() + 1

    return ramp, calls


def test_made_once():
    ramp, calls = make_ramp()
    assert ramp(3) is ramp(3)
    assert ramp(4).shape == (4,)
    assert calls == [3, 4]


def test_made_in_inference_mode_serves_a_backward():
    ramp, calls = make_ramp()
    x = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        ramp(3)
    (x * ramp(3)).sum().backward()
    assert calls == [3]
    assert x.grad.tolist() == [1, 2, 3]


def test_nothing_is_kept_from_a_transform_or_a_fake_mode():
    ramp, calls = make_ramp()
    x = torch.ones(3)
    torch.func.jvp(lambda a: a * ramp(3), (x,), (x,))
    with FakeTensorMode():
        assert isinstance(ramp(3), FakeTensor)
    kept = ramp(3)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)
    assert kept.tolist() == [1, 2, 3]
    with FakeTensorMode():
        assert isinstance(ramp(3), FakeTensor)
    assert calls == [3, 3, 3, 3]
