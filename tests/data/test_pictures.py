import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from smalti.data.pictures import UnreadablePicture, read_picture


def test_transparent_parts_become_white(tmp_path):
    Image.new("RGBA", (2, 1), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").getpixel((0, 0)) == (204, 204, 204)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    picture = read_picture(tmp_path / "p.png")
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 255, 0)]


@pytest.mark.parametrize(
    ("mode", "colour", "suffix"), [("L", 128, "png"), ("L", 128, "jpg"), ("1", 1, "png"), ("LA", (128, 255), "png")]
)
def test_grey_pictures_become_rgb(tmp_path, mode, colour, suffix):
    Image.new(mode, (16, 16), colour).save(tmp_path / f"a.{suffix}")
    red, green, blue = read_picture(tmp_path / f"a.{suffix}").getpixel((8, 8))
    assert red == green == blue == (255 if mode == "1" else 128)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)


def test_cmyk_jpegs_become_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read_picture(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_the_camera_s_orientation_is_honoured(tmp_path):
    picture = Image.new("RGB", (32, 16), "red")
    picture.paste("blue", (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_picture(tmp_path / "a.jpg")
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[0] > 200  # red on top
    assert upright.getpixel((8, 28))[2] > 200


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(tmp_path / "a.webp").getpixel((0, 0)) == (255, 0, 0)


def png_of(width, height):
    """A PNG whose header promises this size, with next to no content."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def damaged_files(folder):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for suffix in ("png", "jpg", "webp"):
        whole = folder / f"whole.{suffix}"
        picture.save(whole)
        (folder / f"torn.{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        whole.unlink()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "bomb.png").write_bytes(png_of(40_000, 40_000))
    (folder / "large.png").write_bytes(png_of(11_000, 11_000))
    Image.new("RGB", (8, 8)).save(folder / "other.png", "GIF")
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return sorted(file.name for file in folder.iterdir())


def test_damaged_files_are_refused_with_a_reason(tmp_path):
    reasons = {}
    for name in damaged_files(tmp_path):
        with pytest.raises(UnreadablePicture) as caught:
            read_picture(tmp_path / name)
        reasons[name] = str(caught.value)
    assert len(reasons) == 10
    assert all(reasons.values())
    assert reasons["empty.png"] == "the file is empty"
    assert reasons["text.jpg"] == reasons["other.png"] == "no PNG, JPEG or WebP picture"
    assert reasons["bomb.png"].startswith("too large")
    assert reasons["large.png"] == "too large: 11000 x 11000 pixels"
    assert reasons["pipe.png"] == "it is no regular file"
    assert reasons["dangling.png"] == "the file is missing"
