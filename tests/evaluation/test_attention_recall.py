import pytest
import torch

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.evaluation.attention_recall import attention_recall, guided, record_attention

GROUP = (1, 2, 2)


def model_and_run():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, cond = torch.randn(2, 4, 16, 16), Cond(text=torch.randn(2, 5, 12), pooled=torch.randn(2, 10))

    @torch.no_grad()
    def run():
        return torch.cat([model(x, torch.full((2,), 1 - step / 4), cond) for step in range(4)])

    return model, run


def test_what_is_recorded_and_that_nothing_changes():
    model, run = model_and_run()
    plain = run()
    seen = record_attention(model, run, steps=(0, 2), heads=(1,), depths=(0, 2))
    assert torch.equal(run(), plain)
    assert [(one.step, one.depth) for one in seen] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert all(one.q.shape[:3] == (2, 1, 69) and one.grid == (1, 8, 8) for one in seen)
    with pytest.raises(UserError, match="ask for others"):
        record_attention(model, run, steps=(9,))


def test_recall_of_all_is_one_and_no_table_beats_the_best_blocks():
    model, run = model_and_run()
    seen = record_attention(model, run, steps=(1,))
    everything = attention_recall(seen, GROUP, lambda one, order: torch.ones(1, 1, 16, 16, dtype=torch.bool))
    assert everything.recall == pytest.approx(1)
    assert everything.density == 1
    best = attention_recall(seen, GROUP, guided("oracle", 0.75))
    assert len(best.by_head) == len(seen) * 2 * seen[0].q.shape[1]
    assert best.density == pytest.approx(0.25)

    for guide, rule in (("draft", "head"), ("window", "row"), ("random", "row"), ("frame-or-place", "row")):
        found = attention_recall(seen, GROUP, guided(guide, 0.75, rule))
        assert found.density == pytest.approx(0.25)
        assert found.recall > 0.2
        assert all(one <= other + 1e-6 for one, other in zip(found.by_head, best.by_head, strict=True))


def test_recall_is_the_share_of_attention_token_by_token():
    model, run = model_and_run()
    one = record_attention(model, run, steps=(0,), heads=(0,), depths=(1,))[0]
    shares = ((one.q @ one.k.transpose(-1, -2)) * (one.scale or one.q.shape[-1] ** -0.5)).softmax(-1)
    shares = shares[:, 0, one.image, one.image].reshape(2, 8, 8, 8, 8)
    own = sum(shares[:, r : r + 2, c : c + 2, r : r + 2, c : c + 2].sum((1, 2, 3, 4))
              for r in range(0, 8, 2) for c in range(0, 8, 2))  # fmt: skip
    found = attention_recall([one], GROUP, lambda one, order: torch.eye(16, dtype=torch.bool)[None, None])
    assert torch.allclose(torch.tensor(found.by_head), own / shares.sum((1, 2, 3, 4)), atol=1e-5)
