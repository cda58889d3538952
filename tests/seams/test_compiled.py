import pytest
import torch
from small_models import MeanValues, SkipBlock, ours

import smalti
from smalti.acceleration.taylorseer import TaylorSeer


@pytest.mark.parametrize("fullgraph", [False, True])
def test_methods_act_on_compiled_blocks_and_leave_them_compiled(fullgraph):
    small = ours()
    methods = (TaylorSeer(interval=3, warmup=2), MeanValues(), SkipBlock())
    plain = small.loop()
    expected = []
    for method in methods:
        with smalti.apply(small.model, method):
            expected.append(small.loop())
    for block in (*small.model.double_blocks, *small.model.single_blocks):
        block.compile(fullgraph=fullgraph)
    small.loop()  # the first calls compile
    compiled, calls = small.loop(), [block._compiled_call_impl for block in small.model.single_blocks]
    assert torch.allclose(compiled, plain, atol=1e-5)
    for method, eager in zip(methods, expected, strict=True):
        with smalti.apply(small.model, method) as handle:
            assert torch.allclose(small.loop(), eager, atol=1e-5)
        assert sum(handle.report().methods[0].events.values()) > 0
    assert [block._compiled_call_impl for block in small.model.single_blocks] == calls
    assert torch.equal(small.loop(), compiled)
