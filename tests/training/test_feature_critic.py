import pytest
import torch

from smalti.core.errors import UserError
from smalti.tokenizers.vision_backends import OwnTeacher, load_teacher
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.feature_critic import FeatureCritic, even_depths


def critic(**changes):
    torch.manual_seed(0)
    teacher = OwnTeacher(VisionTransformer(patch_size=4, depth=3, heads=2, head_dim=8, base_size=4), (4, 4))
    return FeatureCritic(teacher, **changes)


def test_one_score_a_token_and_head_from_the_blocks_asked_for():
    model, pixels = critic(depths=(1, 3)), torch.rand(2, 3, 16, 16)
    assert model(pixels).shape == (2, 2 * 16)
    first, last = model.tokens(pixels)
    encoder = model._teacher[0].encoder
    torch.testing.assert_close(first, encoder.blocks[0](encoder.embed(model._teacher[0].preprocess(pixels))))
    torch.testing.assert_close(encoder.final_norm(last), model._teacher[0](pixels))
    assert critic().depths == even_depths(3) == (1, 2, 3)


def test_gradients_reach_the_pixels_and_the_heads_alone_learn():
    model, pixels = critic(), torch.rand(2, 3, 16, 16, requires_grad=True)
    model(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(name.startswith("heads.") for name, _ in model.named_parameters())
    assert all(one.grad is None for one in model._teacher[0].parameters())


def test_it_learns_to_tell_discs_from_noise():
    model = critic().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    disc = ((rows - 8) ** 2 + (columns - 8) ** 2 < 25).float()
    for _ in range(40):
        real, made = disc * torch.rand(8, 3, 1, 1), torch.rand(8, 3, 16, 16)
        loss = (1 - model(real)).relu().mean() + (1 + model(made)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(disc * torch.rand(8, 3, 1, 1)).mean() > model(torch.rand(8, 3, 16, 16)).mean() + 0.5


def test_what_is_not_there_is_refused():
    with pytest.raises(UserError, match="3 blocks"):
        critic(depths=(4,))
    assert FeatureCritic(load_teacher("random", (8, 8)))(torch.zeros(1, 3, 64, 64)).shape == (1, 4 * 64)
