"""One picture: from the bytes of a file, whatever they are, to uint8 pixels of the size and channels asked for.

In: JPEG, PNG, WebP or anything else that Pillow reads; grey, RGB, palettes, CMYK, 16 bits, with or without alpha. Out:
uint8[height, width, 1 or 3]. Transparent parts show white paper, 16 bits become 8, and a camera's note on how it was
held is heeded. Of several frames or pages, the first is the picture.
"""

from __future__ import annotations

import io
import warnings
from types import ModuleType

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sslx.errors import first_line

# Beyond twice this Pillow refuses; a picture of 600 megapixels is more than any camera makes.
Image.MAX_IMAGE_PIXELS = 300_000_000
# On odd metadata, once for each of millions of files. For good, as what is ignored for a while is so in all threads.
warnings.filterwarnings("ignore", module=r"PIL\b")
_ORIENTATION = 0x0112  # of EXIF
TRIES = 10  # at a random part that the picture has room for
DRAWS = 2 + 2 * TRIES  # numbers that decide one


class BrokenPicture(ValueError):
    """Bytes that are no picture, a cut off or damaged one, or one that cannot be brought to eight bits."""


def open_picture(data: bytes | np.ndarray | Image.Image, channels: int, *, least: int = 0) -> Image.Image:
    """Decodes a picture.

    Args:
      data: A file's bytes, Pillow's picture, or pixels uint8 or uint16[height, width] or [height, width, 1, 3 or 4].
      channels: 1 (grey) or 3 (RGB).
      least: Of a JPEG, it is enough that the shorter side has this many pixels: decoding it smaller is much faster.
        0: all pixels.

    Raises:
      BrokenPicture: it is no picture, or not all of it is there.
    """
    if isinstance(data, np.ndarray):
        picture = _of_pixels(data)
    else:
        picture = _upright(data if isinstance(data, Image.Image) else loaded(data, least=least))
    try:
        return _as(picture, channels)
    except (OSError, ValueError) as error:  # a kind of pixels that Pillow does not convert
        raise BrokenPicture(first_line(error)) from error


def loaded(data: bytes, *, least: int = 0) -> Image.Image:
    """A file's picture as it is there: its kind of pixels, and how it lies. ``least``: see `open_picture`.

    Raises:
      BrokenPicture: it is no picture, or not all of it is there.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        if least and picture.format == "JPEG":
            picture.draft(picture.mode, (least, least))
        picture.load()
    except UnidentifiedImageError as error:
        raise BrokenPicture("no picture of a known format" if data else "an empty file") from error
    except Exception as error:  # damaged bytes make decoders fail in any way: struct.error, IndexError, ...
        raise BrokenPicture(first_line(error)) from error
    return picture


def has_colours(data: bytes | np.ndarray | Image.Image) -> bool:
    """Whether any pixel of a picture is not grey.

    Raises:
      BrokenPicture: as `open_picture`.
    """
    return bool(np.ptp(pixels(open_picture(data, 3)), axis=-1).any())


def check_header(path: str) -> None:
    """Looks at the beginning of a file, which tells what it is; the rest may still be damaged.

    Raises:
      BrokenPicture: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError as error:
        raise BrokenPicture("no picture of a known format") from error
    except OSError as error:
        raise BrokenPicture(error.strerror or first_line(error)) from error


def pixels(picture: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of a decoded picture."""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def middle(picture: Image.Image, size: int, share: float = 1.0) -> Image.Image:
    """The square in the middle whose side is ``share`` of the shorter one, as ``size`` by ``size`` pixels.

    Antialiased bicubic; of what is more than six times as large, whole blocks are averaged first, as Pillow's
    ``reducing_gap`` does.
    """
    if picture.size == (size, size) and share == 1.0:
        return picture
    side = min(picture.size) * share
    left, top = ((extent - side) / 2 for extent in picture.size)
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def random_crop(
    picture: Image.Image,
    size: int,
    uniform: Float[np.ndarray, f" {DRAWS}"],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Image.Image:
    """A `random_part` as ``size`` by ``size`` pixels."""
    left, top, wide, high = random_part(uniform, picture.size[::-1], area, aspect, np).tolist()
    box = (left, top, min(left + wide, picture.width), min(top + high, picture.height))
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def random_part(
    uniform: Float[Array, f" {DRAWS}"],
    shape: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    xp: ModuleType,
) -> Float[Array, " 4"]:
    """Where a random part lies: ``left, top, wide, high`` in pixels (Inception's crop, arXiv 1409.4842).

    As torchvision has it, the first of ten parts that the picture has room for; a part that is too wide or too high
    must not be cut instead, or whole pictures would be far more frequent. If there is room for none, the largest
    middle part whose aspect ratio is allowed.

    Args:
      uniform: Numbers in [0, 1): where the part lies from left and top, then ten of areas and ten of aspect ratios.
      shape: Height and width of the picture.
      area: The least and largest share of the picture's area.
      aspect: The least and largest width over height, drawn evenly in its logarithm.
      xp: numpy, or jax.numpy.
    """
    height, width = shape
    share = area[0] + (area[1] - area[0]) * uniform[2 : 2 + TRIES]
    low, high = np.log(aspect[0]), np.log(aspect[1])
    ratio = xp.exp(low + (high - low) * uniform[2 + TRIES :])
    wides, highs = xp.sqrt(share * height * width * ratio), xp.sqrt(share * height * width / ratio)
    fits = (wides <= width) & (highs <= height)
    first = xp.argmax(fits)
    middle_ratio = min(max(width / height, aspect[0]), aspect[1])
    largest = min(width, height * middle_ratio), min(height, width / middle_ratio)
    wide = xp.where(fits[first], wides[first], largest[0])
    high = xp.where(fits[first], highs[first], largest[1])
    across, down = xp.where(fits[first], uniform[:2], 0.5)
    return xp.stack([(width - wide) * across, (height - high) * down, wide, high])


def _upright(picture: Image.Image) -> Image.Image:
    """The picture as the camera was held, if it says so; a note that cannot be read is none."""
    try:
        turned = picture.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except Exception:
        return picture


def _of_pixels(array: np.ndarray) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array) if array.dtype == np.uint16 else array))


def _eight_bits(array: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Brings 0 to 65,535 to 0 to 255."""
    return ((np.clip(array, 0, 65535).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _as(picture: Image.Image, channels: int) -> Image.Image:
    """The picture in grey or RGB."""
    if picture.mode == "F":
        raise BrokenPicture("its pixels are floating-point numbers, which do not say what is white")
    if picture.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        array, clear = np.asarray(picture), picture.info.get("transparency")
        picture = Image.fromarray(np.where(array == clear, np.uint8(255), _eight_bits(array)))
    if picture.mode == "LAB":  # which convert() makes RGB and not grey
        picture = picture.convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")
