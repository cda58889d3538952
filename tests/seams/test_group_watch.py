"""Two groups of tokens do not see each other."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal
from smalti.core.protocols import Cond
from smalti.seams.group_watch import GroupWatch


def drawn(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(groups=None):
    torch.manual_seed(1)
    extra = {} if groups is None else {"groups": groups}
    return (
        torch.randn(2, 4, 8, 8),
        torch.rand(2),
        Cond(label=torch.tensor([0, 1]), pooled=torch.zeros(2, 10), extra=extra),
    )


def test_what_changes_in_one_group_does_not_reach_the_other():
    model, groups = drawn(DiT.tiny()), (torch.arange(16) % 4 < 2).expand(2, -1)  # the left half
    watch = GroupWatch(model, "groups")
    x, t, cond = inputs(groups)
    changed = x.clone()
    changed[..., 4:] += 1
    one, other = model(x, t, cond), model(changed, t, cond)
    assert torch.equal(one[..., :4], other[..., :4])
    assert not torch.allclose(one[..., 4:], other[..., 4:])
    bare = cond.extra.pop("groups")
    assert not torch.allclose(model(x, t, cond)[..., :4], model(changed, t, cond)[..., :4])
    whole = Cond(cond.text, cond.pooled, label=cond.label, extra={"groups": torch.ones_like(bare)})
    assert torch.allclose(model(x, t, whole), model(x, t, cond), atol=1e-5)
    watch.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_what_it_cannot_do_is_refused():
    model = drawn(MMDiT.tiny())
    watch = GroupWatch(model, "groups")
    cond = Cond(text=torch.zeros(2, 5, 12), pooled=torch.zeros(2, 10), extra={"groups": torch.ones(2, 16).bool()})
    with pytest.raises(Refusal, match="image tokens alone"):
        model(torch.zeros(2, 4, 8, 8), torch.rand(2), cond)
    watch.remove()
    other = DiT.tiny()
    other.enable_gradient_checkpointing()
    with pytest.raises(Refusal, match="gradient_checkpointing"):
        GroupWatch(other, "groups")
