import pytest
import torch

from smalti.core.seeds import generators_for
from smalti.data.folder import load_folder
from smalti.recipes.folder_source import latent_sources, split_pictures
from smalti.training.autoencoder import shift_picture
from smalti.training.data_order import DataOrder
from smalti.zoo.loader import load_part


@pytest.fixture
def pictures(make_pictures, tmp_path):
    for start, label in enumerate(("flat", "round")):
        make_pictures(tmp_path / "data" / label, 4, sizes=((64, 64), (48, 96)), start=10 * start)
    return load_folder(tmp_path / "data", 64, 8)


def test_every_twentieth_is_held_out_from_200_on(pictures):
    class Many:
        shapes = [(64, 64)] * 150 + [(48, 80)] * 50

        def __init__(self, count):
            self.shapes = self.shapes[:count]

        def __len__(self):
            return len(self.shapes)

    few, many = split_pictures(Many(199)), split_pictures(Many(200))
    assert (len(few.train), few.held_out_groups) == (199, [])
    held_out = torch.cat(many.held_out_groups).tolist()
    assert len(held_out) == 10
    assert sorted(many.train + held_out) == list(range(200))
    assert sorted(torch.cat(many.train_groups).tolist()) == many.train
    assert [len(group) for group in many.held_out_groups] == [2, 8]


def test_sources_never_mix_what_is_held_out(pictures, tiny_autoencoder, tmp_path):
    from smalti.recipes.folder_autoencoder import ConvAutoencoder

    autoencoder = load_part(tiny_autoencoder, ConvAutoencoder)
    split = split_pictures(pictures)
    split.held_out_groups.append(split.train_groups[0][:1])
    split.train_groups[0] = split.train_groups[0][1:]
    source, held_out = latent_sources(autoencoder, pictures, split, 16, tmp_path / "cache")
    seen = torch.cat([DataOrder(source, 4, 0).indices(step) for step in range(40)])
    assert set(seen.tolist()) == set(torch.cat(split.train_groups).tolist())
    assert held_out is not None
    moved, still = latent_sources(autoencoder, pictures, split, 16, tmp_path / "cache", shift=2)
    assert len(moved.views) == 5
    assert still is not None
    assert len(still.views) == 1
    one = split.train_groups[0][:1]
    views = torch.cat([view[one] for view in moved.views])
    assert len(views.unique(dim=0)) == 5
    up = autoencoder.encode(shift_picture(pictures.pixels(one)[0], 2, 0)[None]).tensor
    torch.testing.assert_close(views[1:2], up, atol=2e-3, rtol=2e-3)
    indices = split.train_groups[1]
    batch = source.batch(indices, generators_for(range(len(indices))))
    expected = autoencoder.encode(pictures.pixels(indices)).tensor
    torch.testing.assert_close(batch.x0, expected, atol=2e-3, rtol=2e-3)
    kept = batch.cond.label != 2
    assert torch.equal(batch.cond.label[kept], torch.tensor(pictures.labels)[indices][kept])
