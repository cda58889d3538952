"""Cross-entropy of attention maps by its formula, and what is easy to get wrong with it."""

import math

import pytest
import torch

from smalti.core.errors import UserError
from smalti.ops.attention_maps import attention_cross_entropy, attention_entropy, attention_logits, teacher_maps


def test_logits_are_those_of_the_softmax_that_the_kernel_takes():
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(attention_logits(q, k).softmax(-1) @ v, out, atol=1e-5)
    assert torch.allclose(attention_logits(q, k, scale=0.7), 0.7 * q @ k.mT, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        under = attention_logits(q, k)
    assert under.dtype == torch.float32
    assert torch.equal(under, attention_logits(q, k))


def test_it_is_a_cross_entropy_of_the_first_common_heads():
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)
    maps = teacher_maps(teacher)
    wanted = 0.0
    for sample in range(2):
        for head in range(3):
            for row in range(6):
                p, q = teacher[sample, head, row].softmax(0), student[sample, head, row].softmax(0)
                wanted -= float((p * q.log()).sum()) / (2 * 3 * 6)
    assert attention_cross_entropy(student, maps).item() == pytest.approx(wanted, rel=1e-5)
    assert attention_cross_entropy(student[:, :2], maps).item() == pytest.approx(
        attention_cross_entropy(student[:, :2], maps[:, :2]).item()
    )


def test_it_lies_between_the_teachers_entropy_and_that_of_no_knowledge():
    teacher = 2 * torch.randn(2, 3, 6, 6)
    maps = teacher_maps(teacher)
    assert attention_cross_entropy(teacher, maps).item() == pytest.approx(attention_entropy(maps).item(), rel=1e-5)
    assert attention_cross_entropy(torch.zeros(2, 3, 6, 6), maps).item() == pytest.approx(math.log(6), rel=1e-5)
    assert attention_cross_entropy(torch.randn(2, 3, 6, 6), maps) > attention_entropy(maps)


def test_gradient_reaches_the_student_alone_and_leaves_further_heads_free():
    student = torch.randn(1, 4, 6, 6, requires_grad=True)
    attention_cross_entropy(student, teacher_maps(torch.randn(1, 3, 6, 6))).backward()
    assert student.grad[:, :3].abs().sum() > 0
    assert not student.grad[:, 3:].any()


def test_the_softmax_is_done_again_without_the_class_token():
    logits = torch.randn(2, 3, 7, 7)
    logits[..., 0] = 9.0  # all look at the class token
    maps = teacher_maps(logits, prefix=1)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 6))
    assert torch.allclose(maps, logits[..., 1:, 1:].softmax(-1))
    assert not torch.allclose(maps, logits.softmax(-1)[..., 1:, 1:])


def test_another_grid_is_resized_along_queries_and_keys_and_rows_sum_to_one_again():
    places = torch.arange(64.0)
    rows, columns = (one[:, None] - one for one in (places // 8, places % 8))
    near = -(rows**2 + columns**2)  # each looks at itself
    maps = teacher_maps(near[None, None], grid=(8, 8), new_grid=(4, 4))
    assert maps.shape == (1, 1, 16, 16)
    assert torch.allclose(maps.sum(-1), torch.ones(1, 1, 16))
    assert (maps[0, 0].argmax(-1) == torch.arange(16)).all()
    assert torch.allclose(maps[0, 0], maps[0, 0].T, atol=0.05)
    wide = teacher_maps(near[None, None], grid=(8, 8), new_grid=(4, 16))
    assert (wide[0, 0].argmax(-1) // 16 == torch.arange(64) // 16).all()
    assert torch.equal(teacher_maps(near[None, None], grid=(8, 8), new_grid=(8, 8)), near[None, None].softmax(-1))


def test_a_sharp_student_in_half_precision_stays_finite():
    sharp = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    sharp[..., 0] = 200.0  # exp(-200) underflows: log(softmax) would be -inf
    loss = attention_cross_entropy(sharp, torch.full((1, 1, 2, 2), 0.5))
    assert loss.item() == pytest.approx(100.0)


def test_other_counts_are_named():
    with pytest.raises(UserError, match="must be as many"):
        attention_cross_entropy(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 9, 9), 1 / 9))
