import torch
from small_models import ours

import smalti
from smalti.acceleration.taylorseer import TaylorSeer


def test_methods_act_on_compiled_blocks_and_leave_them_compiled():
    """With the real compiler; tracing alone is tested with other methods and models in test_ways_to_run.py."""
    small, method = ours(), TaylorSeer(interval=3, warmup=2)
    plain = small.loop()
    with smalti.apply(small.model, method):
        expected = small.loop()
    for block in (*small.model.double_blocks, *small.model.single_blocks):
        block.compile(fullgraph=True)
    small.loop()  # the first calls compile
    compiled, calls = small.loop(), [block._compiled_call_impl for block in small.model.single_blocks]
    assert torch.allclose(compiled, plain, atol=1e-5)
    with smalti.apply(small.model, method) as handle:
        assert torch.allclose(small.loop(), expected, atol=1e-5)
    assert sum(handle.report().methods[0].events.values()) > 0
    assert [block._compiled_call_impl for block in small.model.single_blocks] == calls
    # Once more compiled, a block may get other kernels; without a compiler nothing is left behind to the last bit.
    assert torch.allclose(small.loop(), compiled, atol=1e-6)
