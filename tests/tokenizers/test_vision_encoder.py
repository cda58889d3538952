import pytest
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.tokenizers.vision_encoder import FeatureTeacher, VisionTransformer


class PatchMeans(FeatureTeacher):
    """The mean colour of each patch; what reaches it is kept."""

    def __init__(self, tokens=None):
        super().__init__(3, 4, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), tokens)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.eval().requires_grad_(False)

    def features(self, encoder_input: Tensor) -> Tensor:
        self.seen = encoder_input
        cells = encoder_input.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
        return (cells * self.weight).flatten(2).transpose(1, 2).to(torch.bfloat16)


def tiny(**settings) -> VisionTransformer:
    return VisionTransformer.untrained(**{"depth": 2, "heads": 2, "head_dim": 8, "base_size": 4} | settings)


def test_pixels_are_brought_into_the_range_of_the_encoder():
    teacher = PatchMeans()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    tokens = teacher(pixels)
    assert tokens.shape == (2, 6, 3)
    assert tokens.dtype == torch.float32
    wanted = ((pixels + 1) / 2 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(
        3, 1, 1
    )
    assert torch.allclose(teacher.seen, wanted, atol=1e-6)


@pytest.mark.parametrize(("tokens", "grid"), [(None, (3, 2)), ((5, 7), (5, 7))])
def test_pictures_are_resized_to_the_grid_that_is_wanted(tokens, grid):
    teacher = PatchMeans(tokens)
    assert teacher.grid(11, 9) == grid
    assert teacher(torch.zeros(1, 3, 11, 9)).shape == (1, grid[0] * grid[1], 3)
    assert teacher.seen.shape[-2:] == (grid[0] * 4, grid[1] * 4)


def test_shrinking_is_antialiased():
    grain = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = PatchMeans((2, 2)).preprocess(grain)[0, 0] * 0.1 + 0.5  # 8 x 8, a mean of 64 pixels each
    assert seen.std() < 0.1


def test_a_teacher_stays_frozen_in_a_training():
    teacher = PatchMeans()
    whole = torch.nn.ModuleList([teacher, torch.nn.Dropout()]).train()
    assert whole[1].training
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.zeros(1, 3, 8, 8, requires_grad=True)
    assert not teacher(pixels).requires_grad


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_what_is_no_batch_of_pictures_is_refused(shape):
    with pytest.raises(UserError, match="must be"):
        PatchMeans()(torch.zeros(shape))
    with pytest.raises(UserError, match="rows and columns"):
        PatchMeans((0, 4))


def test_tokens_come_rows_first_and_normed():
    model = tiny()
    tokens = model(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 16, 16)
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5)
    assert torch.allclose(tokens.std(-1, correction=0), torch.ones(2, 16), atol=1e-3)
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 8:16, 24:] = 1  # the patch of row 1, column 3
    changed = (model.embed(pixels) - model.embed(torch.zeros(1, 3, 32, 32))).abs().sum(-1)[0]
    assert changed.nonzero().tolist() == [[1 * 4 + 3]]


def test_twice_the_native_size_gives_twice_the_tokens_a_side():
    model = tiny()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 64, 16)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 32, 16)


def test_resampled_positions_are_those_of_the_same_places():
    model = tiny(base_size=8)
    fine = model.grid_positions(16, 16).unflatten(1, (16, 16))[0, 4:-4, 4:-4]
    coarse = model.positions.unflatten(1, (8, 8))[0, 2:-2, 2:-2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    likeness = torch.nn.functional.cosine_similarity(fine, coarse, dim=-1)
    assert likeness.min() > 0.95
    assert model.grid_positions(8, 8) is model.positions


def test_patches_are_told_apart_by_their_places():
    model = tiny()
    tokens = model(torch.ones(1, 3, 32, 32))[0]
    assert torch.pdist(tokens).min() > 1e-2


def test_a_part_of_the_tokens_can_be_encoded():
    model = tiny()
    embedded = model.embed(torch.randn(1, 3, 32, 32))
    part = model.encode(embedded[:, :5])
    assert part.shape == (1, 5, 16)
    assert not torch.allclose(part, model.encode(embedded)[:, :5])  # the others are not seen


def test_it_is_saved_and_read_back(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = VisionTransformer.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(pixels), again(pixels))


def test_untrained_ones_are_equal_and_leave_the_seed_alone():
    torch.manual_seed(3)
    one = tiny()
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(1))
    assert torch.equal(one.x_embedder.weight, tiny().x_embedder.weight)
    other = VisionTransformer.untrained(1, depth=2, heads=2, head_dim=8, base_size=4)
    assert not torch.equal(one.x_embedder.weight, other.x_embedder.weight)


def test_a_width_without_waves_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        VisionTransformer(heads=1, head_dim=6)
