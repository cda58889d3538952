import numpy as np
import torch
from PIL import Image

from smalti.evaluation.sheet import MARGIN, from_images, sheet, to_images


def test_pixels_and_pictures_are_inverse():
    pixels = (torch.randint(0, 256, (3, 3, 5, 7)).float() / 127.5) - 1
    assert torch.allclose(from_images(to_images(pixels)), pixels, atol=1e-6)


def test_every_picture_stands_where_it_belongs():
    colors = [(10 * i, 255 - 10 * i, 7 * i) for i in range(11)]
    canvas = sheet(
        [Image.new("RGB", (8, 6), color) for color in colors], ["a long label to wrap"] * 11, columns=4, scale=2
    )
    found = np.asarray(canvas)
    cell_height = (canvas.height - MARGIN) // 3
    for index, color in enumerate(colors):
        x, y = MARGIN + index % 4 * (16 + MARGIN) + 8, MARGIN + index // 4 * cell_height + 6
        assert tuple(found[y, x]) == color


def test_labels_are_drawn():
    pictures = [Image.new("RGB", (64, 64), "white")] * 2
    plain, labelled = sheet(pictures), sheet(pictures, ["red apple", "cat"])
    assert labelled.height > plain.height
    assert (np.asarray(labelled)[plain.height :] < 128).any()
