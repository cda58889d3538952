import torch

from smalti.core.seeds import generators_for
from smalti.data.emoji import load_emoji
from smalti.training.view_source import ViewSource, move_and_zoom


def spot(row, column, side=32) -> torch.Tensor:
    """A white picture with one black square of 4 pixels, whose middle is (row, column)."""
    pixels = torch.ones(1, 3, side, side)
    pixels[..., row - 2 : row + 2, column - 2 : column + 2] = -1
    return pixels


def middle(pixels) -> list[float]:
    weight = (1 - pixels[0, 0]) / (1 - pixels[0, 0]).sum()
    places = torch.arange(len(weight)) + 0.5
    return [(weight.sum(1) @ places).item(), (weight.sum(0) @ places).item()]


def test_nothing_changes_without_shift_and_zoom():
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(move_and_zoom(pixels, torch.zeros(2, 2), torch.ones(2)), pixels, atol=1e-5)


def test_shift_goes_down_and_right():
    moved = move_and_zoom(spot(16, 16), torch.tensor([[0.25, -0.125]]), torch.ones(1))
    assert torch.allclose(torch.tensor(middle(moved)), torch.tensor([24.0, 12.0]), atol=1e-3)


def test_zoom_enlarges_about_the_middle_before_the_shift():
    moved = move_and_zoom(spot(16, 20), torch.tensor([[0.0, 0.0]]), torch.tensor([2.0]))
    assert torch.allclose(torch.tensor(middle(moved)), torch.tensor([16.0, 24.0]), atol=0.1)
    assert ((1 - moved).sum() / (1 - spot(16, 20)).sum() - 4).abs() < 0.2
    both = move_and_zoom(spot(16, 16), torch.tensor([[0.25, 0.0]]), torch.tensor([0.5]))
    assert torch.allclose(torch.tensor(middle(both)), torch.tensor([24.0, 16.0]), atol=0.1)


def test_what_enters_is_white():
    moved = move_and_zoom(-torch.ones(1, 3, 16, 16), torch.zeros(1, 2), torch.tensor([0.5]))
    assert torch.equal(moved[..., :3, :], torch.ones(1, 3, 3, 16))


def test_a_view_depends_on_its_generator_alone():
    pictures = load_emoji("held-out", styles=["noto"], topics=["animals"])
    count = len(pictures)
    rows = torch.tensor([[2 * i, 2 * i + 2] for i in range(count)])
    text = torch.arange(2.0 * count)[:, None]
    source = ViewSource(pictures, torch.arange(count) + 100, text, rows)
    one = source.batch(torch.tensor([3, 5]), generators_for([1, 2]))
    other = source.batch(torch.tensor([5, 3]), generators_for([2, 1]))
    assert torch.equal(one.x0, other.x0.flip(0))
    assert one.cond.label.tolist() == [103, 105]
    assert not torch.allclose(one.x0, source.batch(torch.tensor([3, 5]), generators_for([3, 4])).x0)
    phrasings = {source.batch(torch.tensor([3]), generators_for([seed])).cond.pooled.item() for seed in range(20)}
    assert phrasings == {6.0, 7.0}


def test_without_shift_and_zoom_pictures_come_as_they_are():
    pictures = load_emoji("held-out", styles=["noto"], topics=["clocks"])
    source = ViewSource(pictures, torch.arange(len(pictures)), shift=0.0, zoom=(1.0, 1.0))
    batch = source.batch(torch.tensor([0]), generators_for([1]))
    assert torch.allclose(batch.x0, pictures.pixels([0]), atol=1e-5)
    assert batch.cond.pooled is None
