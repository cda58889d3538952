import pytest
import torch

from smalti.ops.token_subset import gather, is_in, scatter, whole_index, write_rows

SHARED = torch.tensor([1, 4, 6])
OWN = torch.tensor([[1, 4, 6], [0, 2, 5]])


def rows_of(index, batch=2):
    return index.tolist() if index.ndim == 2 else [index.tolist()] * batch


def plain_gather(x, index, axis):
    parts = [one.unbind(axis - 1) for one in x.expand(2, *x.shape[1:])]
    return torch.stack([torch.stack([part[i] for i in row], axis - 1) for part, row in zip(parts, rows_of(index))])


@pytest.mark.parametrize("index", [SHARED, OWN])
@pytest.mark.parametrize(("shape", "axis"), [((2, 7, 3), 1), ((2, 2, 7, 5), 2), ((1, 7, 1, 4), 1), ((2, 1, 7, 9), 2)])
def test_gather_and_its_gradient(index, shape, axis):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = gather(x, index, axis), plain_gather(x, index, axis)
    assert torch.equal(found.expand_as(expected), expected)
    weight = torch.randn_like(found)
    one = torch.autograd.grad((found * weight).sum(), x)[0]
    other = torch.autograd.grad((plain_gather(x, index, axis)[: len(found)] * weight).sum(), x)[0]
    assert torch.allclose(one, other)


@pytest.mark.parametrize("index", [SHARED, OWN])
@pytest.mark.parametrize("axis", [1, 2])
def test_scatter_and_its_gradient(index, axis):
    shape = [2, 4, 4]
    shape[axis] = 7
    base = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = torch.randn_like(gather(base, index, axis)).requires_grad_()
    found = scatter(rows, index, base, axis)
    expected = [list(one.unbind(axis - 1)) for one in base]
    for sample, row in enumerate(rows_of(index)):
        for place, i in enumerate(row):
            expected[sample][i] = rows[sample].select(axis - 1, place)
    expected = torch.stack([torch.stack(one, axis - 1) for one in expected])
    assert torch.equal(found, expected)
    assert torch.equal(gather(found, index, axis), rows)
    weight = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), (rows, base)) for y in (found, expected))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("index", [SHARED, OWN])
def test_rows_are_written_in_place(index):
    kept, rows = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 3, 4)
    expected, address = scatter(rows, index, kept, 2), kept.data_ptr()
    write_rows(kept, rows, index)
    assert torch.equal(kept, expected)
    assert kept.data_ptr() == address


def test_rows_of_some_samples():
    kept = torch.zeros(4, 2, 7, 3)
    write_rows(kept, torch.ones(2, 2, 3, 3), SHARED, samples=torch.tensor([1, 3]))
    assert kept[[1, 3]].sum() == 2 * 2 * 3 * 3
    assert kept[:, :, SHARED].sum() == kept.sum()
    assert not kept[[0, 2]].any()


@pytest.mark.parametrize(("start", "length"), [(0, 9), (2, 9), (0, 7)])
def test_everything_but_left_out_image_tokens_is_kept(start, length):
    kept = whole_index(OWN, start, 7, length)
    assert torch.equal(kept[0], whole_index(OWN[0], start, 7, length))
    for row, active in zip(kept.tolist(), OWN.tolist(), strict=True):
        outside = [one for one in range(length) if not start <= one < start + 7]
        assert row == sorted(outside + [start + one for one in active])


def test_membership():
    assert is_in(SHARED, 8).tolist() == [[False, True, False, False, True, False, True, False]]
    assert is_in(OWN, 7).sum(1).tolist() == [3, 3]
    assert not is_in(torch.zeros(1, 0, dtype=torch.long), 4).any()
