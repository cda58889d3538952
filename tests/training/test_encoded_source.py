import pytest
import torch

from smalti.core.seeds import generators_for
from smalti.data.masks import hide
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.training.encoded_source import EncodedSource
from smalti.training.inpaint_source import InpaintSource, inpaint_extra


class Pictures:
    """Six smooth pictures of 16 x 16."""

    def __init__(self):
        coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.all = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")

    def __len__(self):
        return 6

    def pixels(self, indices):
        return self.all[list(indices)]


@pytest.fixture
def source():
    model = ConvAutoencoder(4, 4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    pictures = Pictures()
    model.start_from_patches(pictures.all)
    for part in model.encoder[-1:]:
        torch.nn.init.normal_(part.weight, std=0.2)  # so that it sees beyond a patch
    model.measure_statistics([pictures.all])
    return EncodedSource(pictures, model.eval(), torch.arange(6), dropped_label=9)


ROWS = torch.tensor([4, 1, 1])


def test_every_draw_is_a_new_one_from_the_posterior(source):
    one = source.batch(ROWS, generators_for([0, 1, 2]))
    assert one.x0.shape == (3, 4, 4, 4)
    assert not torch.equal(one.x0[1], one.x0[2])  # the same picture, drawn twice
    assert torch.equal(one.x0, source.batch(ROWS, generators_for([0, 1, 2])).x0)
    alone = source.batch(ROWS[:1], generators_for([0]))
    torch.testing.assert_close(alone.x0, one.x0[:1])
    mean = source.tokenizer.encode(source.pictures.pixels(ROWS.tolist())).tensor
    drawn = torch.stack([source.batch(ROWS, generators_for(range(3 * k, 3 * k + 3))).x0 for k in range(200)])
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)


def test_labels_are_dropped_by_the_draw(source):
    labels = [int(source.batch(ROWS[:1], generators_for([seed])).cond.label) for seed in range(300)]
    assert set(labels) == {4, 9}
    assert 0.04 < labels.count(9) / 300 < 0.18


def test_masks_are_drawn_anew_and_what_is_hidden_stays_hidden(source):
    """The trap: latents cut out of a whole picture's would tell what is behind the border."""
    inpaint = InpaintSource(source)
    batch = inpaint.batch(ROWS, generators_for([0, 1, 2]))
    masks = batch.cond.extra["edit_mask"]
    assert masks.shape == (3, 1, 4, 4)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(batch.x0, source.batch(ROWS, generators_for([0, 1, 2])).x0)
    assert len({inpaint.batch(ROWS[:1], generators_for([s])).cond.extra["edit_mask"].numpy().tobytes()
                for s in range(20)}) > 10  # fmt: skip

    pixels, mask = source.pictures.all[:1], torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    other = pixels.clone()
    other[..., 8:] = -other[..., 8:]  # another secret
    one, two = (inpaint_extra(source.tokenizer, some, mask) for some in (pixels, other))
    assert torch.equal(one["masked"], two["masked"])
    late = [source.tokenizer.encode(some).tensor * (1 - one["edit_mask"]) for some in (pixels, other)]
    assert not torch.equal(*late)  # masked after encoding, it leaks
    assert torch.equal(one["masked"], source.tokenizer.encode(hide(pixels, mask)).tensor)
