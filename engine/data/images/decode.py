"""The only way to open an image file: an allow-list of formats, limits on bytes and pixels, errors with their reason.

Every image is turned upright by its orientation tag (EXIF, or XMP's), loses its alpha channel and colour profile, and
is the first frame of its file.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

from engine.errors import CorruptShardError, first_line
from engine.terminal import printable

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 89_478_485
# Of the samples of a run, which are read from foreign runs too: a side of 4096 is more than any pipeline makes.
MAX_SAMPLE_PIXELS = 2**24
MIN_SIDE = 4
MAX_ASPECT = 50
# Cameras and scanners put 10, 12 or 14 bits into files of 16; brightest values below this leave the range open.
MIN_PEAK_16_BITS = 2**14

# Decoders of plain pictures. Others start foreign programs (EPS) or are seldom well tested. MPO counts as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Extensions of these formats; they find images among the members of a tar, and decide nothing else.
EXTENSIONS = frozenset(
    (
        "png", "apng", "jpg", "jpeg", "jpe", "jfif", "mpo", "webp", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm",
        "pbm", "pnm",
    )
)  # fmt: skip

# The mark of IPTC and C2PA for images made by a trained model, in plain text of their XMP.
SYNTHETIC_MARK = b"digitalsourcetype/trainedAlgorithmicMedia"

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_MAXIMUM = 258, 262, 341
_MIN_IS_WHITE = 0
_MAX_NAME_CHARS = 300
_MAX_REASON_CHARS = 200
# What a file begins with, and what it is then called.
_OTHER_FORMATS = (
    (re.compile(rb"version https://git-lfs"), "is a Git LFS pointer; fetch the file with `git lfs pull`"),
    (re.compile(rb".{4}ftyp(avif|avis)", re.DOTALL), "is an AVIF file"),
    (re.compile(rb".{4}ftyp(hei[cfmsvx]|hev[cmsx]|mif1|msf1)", re.DOTALL), "is a HEIF file (.heic)"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "is a JPEG 2000 file"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "is a JPEG XL file"),
    (re.compile(rb"8BPS"), "is a Photoshop file"),
    (re.compile(rb"%PDF"), "is a PDF file"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf"), "is an archive; unpack it"),
    (re.compile(rb"ARROW1|\xff{4}.{3}\0|\x89HDF", re.DOTALL), "is a table; store it as parquet"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "is an EPS or PostScript file"),
    (re.compile(rb"\s*(<\?xml.{0,500}|<!--.{0,500})?<svg", re.DOTALL), "is an SVG file"),
)


class UnusableImageError(Exception):
    """The bytes are not an image that can be used; the text says why."""


@contextmanager
def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[PIL.ImageFile.ImageFile]:
    """An image file, opened and not decoded yet; what decoding raises in the block is a reason too.

    Raises:
        UnusableImageError: not an image of `FORMATS`, damaged, or larger than the limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise UnusableImageError(_too_many_pixels(max_pixels))
                yield image
    except UnusableImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise UnusableImageError(_what_it_is(data)) from None
    except PIL.Image.DecompressionBombError:
        raise UnusableImageError(_too_many_pixels(max_pixels)) from None
    except Exception as error:  # Decoders raise anything on foreign bytes.
        raise UnusableImageError(f"is damaged ({brief(error)})") from None


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """The image in the bytes of a file as 8-bit RGB, upright: first frame, alpha and colour profile dropped.

    Raises:
        UnusableImageError: not an image, damaged, of a size that no classifier is made for, or of pixels whose range
            is not known.
    """
    with open_image(data, max_pixels=max_pixels) as image:
        _check_shape(*image.size)
        is_deep = _is_deep(image)
        image.load()
        # In place: a copy of a large image is hundreds of megabytes. TIFF files are turned already by loading.
        PIL.ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image, is_deep)


def decode_sample(data: bytes) -> PIL.Image.Image:
    """The image of a sample of a run, as `decode_rgb`, within the limit for samples.

    Raises:
        UnusableImageError: as `decode_rgb`.
    """
    return decode_rgb(data, max_pixels=MAX_SAMPLE_PIXELS)


def decode_stored(data: bytes, what: str) -> PIL.Image.Image:
    """As `decode_sample`, of an image that a run holds.

    Args:
        what: which image, for the message.

    Raises:
        CorruptShardError: it cannot be used.
    """
    try:
        return decode_sample(data)
    except UnusableImageError as error:
        raise CorruptShardError(f"{what} {error}; `riskforge verify` reports what is damaged") from None


def check_bytes(num_bytes: int) -> None:
    """Refuse files that are too big to be read whole.

    Raises:
        UnusableImageError: it is one.
    """
    if num_bytes > MAX_FILE_BYTES:
        raise UnusableImageError(f"is a file of {num_bytes} bytes; up to {MAX_FILE_BYTES // 2**20} MB are read")


def brief(error: Exception) -> str:
    """The first line of an error; equal for equal bytes, so without addresses of memory."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = first_line(text, type(error).__name__)
    return plain(re.sub(r"0x[0-9a-f]{6,}", "0x", line))[:_MAX_REASON_CHARS]


def plain(text: str) -> str:
    """A text from outside that can be printed and stored: no control characters, no broken Unicode, not too long."""
    shown = printable(text)
    return shown if len(shown) <= _MAX_NAME_CHARS else shown[: _MAX_NAME_CHARS - 3] + "..."


def _too_many_pixels(limit: int) -> str:
    return f"has more than {limit // 10**6} million pixels"


def _what_it_is(data: bytes) -> str:
    known = "PNG, JPEG, WebP, BMP, GIF, TIFF or PPM"
    for pattern, text in _OTHER_FORMATS:
        if pattern.match(data):
            return text if ";" in text else f"{text}, and not an image in {known}; convert it"
    return f"is not an image in {known}"


def _check_shape(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise UnusableImageError(f"is {width} x {height} pixels; both sides must have {MIN_SIDE} or more")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnusableImageError(f"is {width} x {height} pixels; it is too long for any classifier")


def _is_deep(image: PIL.ImageFile.ImageFile) -> bool:
    """Whether a file that is not loaded yet has 16 bits a channel; in colour, Pillow keeps the upper 8."""
    arguments = [tile.args for tile in image.tile if tile.args or isinstance(tile.args, str)]
    modes = [argument if isinstance(argument, str) else argument[0] for argument in arguments]
    return any(";16" in str(mode) for mode in modes)


def _rgb(image: PIL.Image.Image, is_deep: bool) -> PIL.Image.Image:
    if image.mode == "I" and image.format == "PPM":
        # Pillow has already scaled it by the maximum that the file states.
        return _scaled(np.asarray(image), 65535)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image)
        return _scaled(values, _white_level(image, int(values.max())))
    if image.mode in ("I", "F"):
        raise UnusableImageError(f"has {image.mode} pixels, whose range is not known; store 8 or 16 bits")
    if image.mode == "LAB":
        raise UnusableImageError("has LAB pixels; store it as RGB")
    rgb = image.convert("RGB")
    if is_deep and image.format != "PPM":
        # The upper 8 bits are what is left; an alpha channel has a range of its own.
        _check_peak(256 * int(np.asarray(image if image.mode == "CMYK" else rgb).max()) + 255)
    return rgb


def _scaled(values: np.ndarray, white: int) -> PIL.Image.Image:
    values = values.astype(np.int64).clip(0, white)
    return PIL.Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")


def _white_level(image: PIL.Image.Image, peak: int) -> int:
    """The value of white in a grey image of up to 16 bits: what a TIFF file states, else that of all 16 bits.

    Args:
        peak: the greatest value.

    Raises:
        UnusableImageError: the file states nothing, and no pixel is as bright as 16 bits suggest.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_PHOTOMETRIC) == _MIN_IS_WHITE:
        raise UnusableImageError("has 16-bit pixels of which 0 is white; store it with 0 as black, or in 8 bits")
    bits = tags.get(_TIFF_BITS, (16,))[0]
    if bits < 16:
        return int(2**bits - 1)
    stated = tags.get(_TIFF_MAXIMUM)
    level = stated[0] if isinstance(stated, tuple) and stated else stated
    if isinstance(level, int) and peak <= level < 65535:
        return level
    if peak:
        _check_peak(peak)
    return 65535


def _check_peak(peak: int) -> None:
    """Refuse 16-bit pixels that seem to hold fewer bits."""
    if peak < MIN_PEAK_16_BITS:
        raise UnusableImageError(
            f"has 16-bit pixels, none above {peak}: they may hold 14 bits or fewer, and would come out dark; scale them"
            " to 16 bits or store 8"
        )
