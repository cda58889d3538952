import pytest
import torch

from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.training.autoencoder import PixelSource, fit_autoencoder, reconstruction_psnr, shift_picture
from smalti.training.config import TrainConfig

TINY = {"factor": 4, "latent_channels": 6, "widths": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}


class Smooth:
    """Smooth random pictures; those of odd index are wide."""

    def __init__(self, count=24, is_mixed=False):
        self.is_mixed, self.asked = is_mixed, []
        coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
        self.images = torch.nn.functional.interpolate(coarse, (24, 32), mode="bicubic").clamp(-1, 1)

    def __len__(self):
        return len(self.images)

    def pixels(self, indices):
        self.asked += list(indices)
        width = 32 if self.is_mixed and indices[0] % 2 else 24
        return self.images[list(indices)][..., :width]


def test_a_shift_repeats_the_edge():
    picture = torch.arange(48.0).reshape(3, 4, 4)
    down = shift_picture(picture, 1, -2)
    assert torch.equal(down[:, 1:, :2], picture[:, :3, 2:])
    assert torch.equal(down[:, 0], down[:, 1])
    assert torch.equal(down[:, :, 3], down[:, :, 2])
    assert shift_picture(picture, 0, 0) is picture


def test_shifts_depend_on_the_sample_alone():
    source = PixelSource(Smooth(), shift=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    batch = source.batch(torch.tensor([5, 5, 6]), generators)
    alone = source.batch(torch.tensor([5]), [torch.Generator().manual_seed(2)])
    assert torch.equal(batch.x0[1], alone.x0[0])
    many = source.batch(torch.full((30,), 5), [torch.Generator().manual_seed(seed) for seed in range(30)])
    assert len({picture.sum().item() for picture in many.x0}) > 10


def test_training_improves_on_components_and_measures_statistics(tmp_path):
    pictures = Smooth()
    model = ConvAutoencoder(**TINY)
    linear = ConvAutoencoder(**TINY)
    linear.start_from_patches(pictures.images[..., :24])
    before = reconstruction_psnr(linear, pictures)
    report = fit_autoencoder(model, pictures, TrainConfig(steps=40, batch=8, learning_rate=3e-3, ema=0.9), tmp_path)
    assert report.steps == 40
    assert not model.training
    assert reconstruction_psnr(model, pictures) > before + 0.3
    assert reconstruction_psnr(model, pictures, [0]) != reconstruction_psnr(model, pictures, [1])
    latents = model.encode(pictures.pixels(range(24))).tensor
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert float(latents.std()) == pytest.approx(1, abs=0.05)


def test_going_on_from_given_weights_and_from_a_checkpoint(tmp_path):
    pictures = Smooth()
    start = ConvAutoencoder(**TINY)
    start.start_from_patches(pictures.images)
    states = []
    for name, stops in (("whole", (6,)), ("cut", (3, 6))):
        for steps in stops:
            model = ConvAutoencoder(**TINY)
            model.load_state_dict(start.state_dict())
            config = TrainConfig(steps=steps, batch=4)
            fit_autoencoder(model, pictures, config, tmp_path / name, from_patches=False, resume=True)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.allclose(states[0]["to_latent.weight"], start.to_latent.weight, atol=0.05)


def test_groups_keep_shapes_apart_and_pictures_out(tmp_path):
    pictures = Smooth(is_mixed=True)
    groups = [torch.arange(0, 20, 2), torch.arange(1, 20, 2)]
    fit_autoencoder(ConvAutoencoder(**TINY), pictures, TrainConfig(steps=4, batch=4), tmp_path, groups=groups)
    assert max(pictures.asked) == 19
