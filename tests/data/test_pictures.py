"""Pictures from files of every kind, written by Pillow here: the pixels are those written, or the file is broken."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from sslx.data.pictures import DRAWS, BrokenPicture, middle, open_picture, pixels, random_crop, random_part


def smooth(height, width, channels=3):
    """Colours that change slowly, so that lossy formats keep them."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), 255 - x * 200 / max(width - 1, 1)]
    return np.stack(planes[:channels], axis=-1).round().astype(np.uint8)


def encoded(picture, kind, **options):
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def read(data, channels=3, **options):
    return pixels(open_picture(data, channels, **options))


def luma(rgb):
    """ITU-R 601, as television had it."""
    return rgb @ np.array([0.299, 0.587, 0.114])


RGB = smooth(30, 40)
GREY = RGB[..., 0]


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 98, "subsampling": 0}, 6),
        ("JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 6),
    ],
)
def test_formats_give_the_pixels_that_were_written(kind, options, tolerance):
    data = encoded(Image.fromarray(RGB), kind, **options)
    found = read(data)
    assert found.dtype == np.uint8
    assert found.shape == (30, 40, 3)
    assert np.abs(found.astype(int) - RGB).max() <= tolerance
    grey = read(data, 1)
    assert grey.shape == (30, 40, 1)
    assert np.abs(grey[..., 0] - luma(RGB)).max() <= tolerance + 1


def test_grey_becomes_colour_and_stays_grey():
    data = encoded(Image.fromarray(GREY), "PNG")
    np.testing.assert_array_equal(read(data, 1)[..., 0], GREY)
    np.testing.assert_array_equal(read(data, 3), np.repeat(GREY[..., None], 3, axis=-1))
    one_bit = encoded(Image.fromarray(GREY > 100), "PNG")
    np.testing.assert_array_equal(read(one_bit, 1)[..., 0], (GREY > 100) * 255)


def test_transparent_parts_are_white_paper():
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    share = alpha[..., None] / 255
    expected = share * RGB + (1 - share) * 255
    rgba = encoded(Image.fromarray(np.dstack([RGB, alpha])), "PNG")
    assert np.abs(read(rgba) - expected).max() <= 1
    grey_alpha = encoded(Image.fromarray(np.dstack([GREY, alpha])), "PNG")
    assert np.abs(read(grey_alpha, 1) - (share * GREY[..., None] + (1 - share) * 255)).max() <= 1


def test_palettes_with_and_without_a_transparent_colour():
    places = np.tile(np.arange(4, dtype=np.uint8), (5, 2))
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [250, 240, 230]], np.uint8)
    picture = Image.fromarray(places, "P")
    picture.putpalette(palette.tobytes())
    np.testing.assert_array_equal(read(encoded(picture, "PNG")), palette[places])
    np.testing.assert_array_equal(read(encoded(picture, "GIF")), palette[places])
    expected = np.where((places == 1)[..., None], 255, palette[places])
    np.testing.assert_array_equal(read(encoded(picture, "PNG", transparency=1)), expected)


def test_sixteen_bits_become_eight_even_where_all_is_dark():
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).round().astype(np.uint16)
    expected = np.rint(values / 257)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(values), "PNG"), 1)[..., 0], expected)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(values), "TIFF"), 1)[..., 0], expected)
    np.testing.assert_array_equal(read(values, 1)[..., 0], expected)
    np.testing.assert_array_equal(read(np.dstack([values] * 3)), np.dstack([expected] * 3))
    clear = encoded(Image.fromarray(values), "PNG", transparency=int(values[3, 4]))  # white paper, as with eight
    assert np.argwhere(read(clear, 1)[..., 0] != expected).tolist() == [[3, 4]]
    assert read(clear, 1)[3, 4, 0] == 255
    dark = np.full((5, 5), 200, np.uint16)  # nearly black, and no 200 of 255
    assert read(encoded(Image.fromarray(dark), "PNG"), 1).max() == 1


def test_pixels_in_memory_are_read_too():
    np.testing.assert_array_equal(read(RGB), RGB)
    np.testing.assert_array_equal(read(GREY, 1)[..., 0], GREY)
    np.testing.assert_array_equal(read(GREY[..., None], 3), np.repeat(GREY[..., None], 3, axis=-1))


def test_ink_of_four_colours():
    cmyk = np.dstack([255 - RGB, np.zeros((30, 40), np.uint8)])  # without black, CMY is what RGB is not
    data = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=98, subsampling=0)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(read(data).astype(int) - RGB).max() <= 8


def test_lightness_and_two_opponent_colours_become_grey_too():
    data = encoded(Image.fromarray(RGB, "LAB"), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "LAB"
    np.testing.assert_allclose(read(data, 1)[..., 0], luma(read(data, 3)), atol=1)


# What EXIF says of the first row and column, and how the picture is to be turned.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_stand_as_the_camera_was_held(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), kind, exif=exif, **({"quality": 98} if kind == "JPEG" else {}))
    expected = TURNS[orientation](RGB)
    found = read(data)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (0 if kind == "PNG" else 10)


ODD_NOTE = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense", quality=98)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest has filters of its own
def test_a_note_of_the_camera_that_cannot_be_read_is_none():
    assert np.abs(read(ODD_NOTE).astype(int) - RGB).max() <= 10


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (3, 2000), (2000, 3)])
def test_every_shape_can_be_cut(height, width):
    picture = open_picture(encoded(Image.fromarray(smooth(height, width)), "PNG"), 3)
    assert pixels(middle(picture, 8)).shape == (8, 8, 3)
    for draws in ([0.0] * DRAWS, [1 - 2**-53] * DRAWS, np.linspace(0, 1 - 2**-53, DRAWS)):
        for area in ((0.01, 0.02), (1.0, 1.0)):
            assert pixels(random_crop(picture, 8, np.array(draws), area, (1 / 3, 3.0))).shape == (8, 8, 3)


def test_the_middle_is_what_pillow_makes_of_it():
    for height, width in ((40, 60), (60, 40), (50, 50)):
        picture = Image.fromarray(smooth(height, width))
        expected = ImageOps.fit(picture, (16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels(middle(picture, 16)), np.asarray(expected))
    same = Image.fromarray(smooth(16, 16))
    np.testing.assert_array_equal(pixels(middle(same, 16)), np.asarray(same))
    large = Image.fromarray(smooth(600, 700))
    share = middle(large, 16, 0.5)
    left, top = (700 - 300) / 2, (600 - 300) / 2
    expected = large.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + 300, top + 300))
    assert np.abs(pixels(share).astype(int) - np.asarray(expected)).max() <= 2  # blocks are averaged first
    assert np.abs(pixels(share).astype(int) - pixels(middle(large, 16))).max() > 20  # of another part it is far


def torchvisions_part(u, width, height, area, aspect):
    """left, top, wide, high by the loop of torchvision's RandomResizedCrop, without its rounding to whole pixels."""
    for k in range(10):
        pixels = width * height * (area[0] + (area[1] - area[0]) * u[2 + k])
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[12 + k])
        wide, high = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if wide <= width and high <= height:
            return (width - wide) * u[0], (height - high) * u[1], wide, high
    if width / height < aspect[0]:
        wide, high = width, width / aspect[0]
    elif width / height > aspect[1]:
        wide, high = height * aspect[1], height
    else:
        wide, high = width, height
    return (width - wide) / 2, (height - high) / 2, wide, high


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("shape", "area", "aspect"),
    [
        ((40, 60), (0.2, 0.5), (3 / 4, 4 / 3)),  # there is always room
        ((32, 32), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((10, 50), (0.9, 1.0), (0.5, 1.0)),  # never
        ((50, 10), (0.9, 1.0), (0.5, 1.0)),
        ((20, 18), (1.0, 1.0), (0.5, 2.0)),
    ],
)
def test_random_parts_are_torchvisions(shape, area, aspect, xp):
    draw = np.random.default_rng(0)
    for u in draw.random((100, DRAWS)):
        u = np.float32(u)
        expected = torchvisions_part(u.tolist(), *shape[::-1], area, aspect)
        np.testing.assert_allclose(random_part(xp.asarray(u), shape, area, aspect, xp), expected, atol=1e-3)


def test_random_crops_are_the_random_parts():
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:200, :300]
    picture = Image.fromarray(np.dstack([x * 255 / 299, y * 255 / 199, x * 0]).round().astype(np.uint8))
    for u in draw.random((200, DRAWS)):
        found = pixels(random_crop(picture, 64, u, (0.2, 0.6), (3 / 4, 4 / 3))).astype(float)
        # Ramps tell from where to where the part went: its outermost pixels are half of one of the 64 inside it.
        right, left = (found[32, place, 0] * 299 / 255 for place in (-1, 0))
        bottom, top = (found[place, 32, 1] * 199 / 255 for place in (-1, 0))
        wide, high = (right - left) * 64 / 63, (bottom - top) * 64 / 63
        expected = torchvisions_part(u, 300, 200, (0.2, 0.6), (3 / 4, 4 / 3))
        assert (left - wide / 128, top - high / 128, wide, high) == pytest.approx(expected, abs=4)


def test_a_large_jpeg_is_decoded_smaller_where_that_is_enough():
    data = encoded(Image.fromarray(smooth(800, 1000)), "JPEG", quality=95)
    assert open_picture(data, 3).size == (1000, 800)
    assert open_picture(data, 3, least=100).size == (125, 100)
    assert open_picture(data, 3, least=101).size == (250, 200)
    small, full = (middle(open_picture(data, 3, least=least), 32) for least in (64, 0))
    assert np.abs(pixels(small).astype(int) - pixels(full)).max() <= 4


def png_header(width, height):
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


DAMAGED = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "zeros.png": bytes(1000),
    "header.png": encoded(Image.fromarray(RGB), "PNG")[:8],
    # So many pixels in so few bytes that reading them would take all memory.
    "bomb.png": png_header(40_000, 40_000) + bytes(100),
    "floats.tiff": encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
} | {
    f"cut-{kind}-{share}": (lambda whole, share=share: whole[: int(len(whole) * share)])(
        encoded(Image.fromarray(smooth(100, 100)), kind)
    )
    for kind in ("JPEG", "PNG", "WEBP")
    for share in (0.3, 0.9)
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("least", [0, 1])
def test_what_is_no_whole_picture_is_broken(name, least):
    with pytest.raises(BrokenPicture) as caught:
        open_picture(DAMAGED[name], 3, least=least)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_is_broken_or_read_and_never_anything_else():
    draw = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(Image.fromarray(smooth(20, 20)), kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[draw.integers(0, len(data), 4)] = draw.integers(0, 256, 4)
            with contextlib.suppress(BrokenPicture):
                assert read(data.tobytes()).shape[-1] == 3


def test_nothing_is_said_of_odd_metadata(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(ODD_NOTE)
    script = "import sys; from sslx.data.pictures import open_picture; open_picture(open(sys.argv[1], 'rb').read(), 3)"
    ended = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
