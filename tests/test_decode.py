"""One way to open an image: turned upright, of known range, within limits, by an allow-list of decoders."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.images import UnusableImageError, decode_rgb, decode_sample
from engine.data.images.decode import FORMATS, MAX_SAMPLE_PIXELS

# Two corners of colour on black: every turn of it is another image.
CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :12], CORNERS[8:, :12] = (250, 0, 0), (0, 0, 250)
TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}  # fmt: skip
LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100},
}


def saved(image: PIL.Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["exif", "xmp"])
@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("turn", TURNS)
def test_images_are_turned_upright(form, turn, how):
    """By every orientation of EXIF and of XMP, in every format that has one."""
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{turn}"></x:xmpmeta>'
    exif = PIL.Image.Exif()
    exif[274] = turn
    if how == "xmp" and form in ("TIFF", "MPO"):
        pytest.skip("Pillow reads it of PNG, JPEG and WebP")
    if how == "xmp" and form == "PNG":
        text = PIL.PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp)
        options: dict[str, object] = {"pnginfo": text}
    else:
        options = {"exif": exif} if how == "exif" else {"xmp": xmp.encode()}
    data = saved(PIL.Image.fromarray(CORNERS), form, **options, **LOSSLESS[form])
    wanted = TURNS[turn](CORNERS).astype(int)
    seen = np.asarray(decode_rgb(data)).astype(int)
    assert seen.shape == wanted.shape and np.abs(seen - wanted).mean() < 8


@pytest.mark.parametrize("turn", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(turn):
    exif = PIL.Image.Exif()
    exif[274] = turn
    assert np.array_equal(np.asarray(decode_rgb(saved(PIL.Image.fromarray(CORNERS), "PNG", exif=exif))), CORNERS)


def png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit pixels [H, W] or [H, W, channels], which Pillow writes of one channel alone."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = values.astype(">u2")
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, bits: int, *tags: tuple[int, int], signed: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of one channel, of 12 or 16 bits, with more short tags."""
    flat = values.astype("<u2")
    if bits == 12:
        pairs = flat.reshape(-1, 2).astype(int)
        data = bytes(one for a, b in pairs for one in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    else:
        data = flat.tobytes()
    height, width = values.shape
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries |= {339: signed} | dict(tags)
    directory = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        directory += struct.pack("<HHII", tag, 3 if value < 65536 and tag not in (273, 279) else 4, 1, value)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4)


def ramp(peak: int, channels: int = 0) -> np.ndarray:
    """Values from 0 to a peak."""
    values = np.linspace(0, peak, 64).round().astype(np.uint16).reshape(8, 8)
    return values if not channels else np.repeat(values[..., None], channels, axis=2)


@pytest.mark.parametrize("channels", [0, 2, 3, 4])
@pytest.mark.parametrize("bits", range(8, 17))
def test_sixteen_bits_that_hold_fewer_are_reported_and_whole_ones_scaled(bits, channels):
    """Of grey and colour, with alpha or without: 15 bits and more are taken for what they are, 14 and fewer are not."""
    values = ramp(2**bits - 1, channels)
    if channels in (2, 4):
        values[..., -1] = 65535
    if bits <= 14:
        with pytest.raises(UnusableImageError, match="14 bits or fewer"):
            decode_rgb(png(values))
        return
    seen = np.asarray(decode_rgb(png(values)))[..., 0].astype(float)
    # With more than one channel Pillow keeps the upper 8 bits; grey is rounded here.
    assert np.abs(seen - ramp(2**bits - 1) / 65535 * 255).max() <= (1 if channels else 0.51)


def test_black_is_black():
    assert np.asarray(decode_rgb(png(ramp(0)))).max() == 0


def test_what_a_tiff_states_of_its_range_is_used():
    """12 bits that are packed, or whose greatest value is stated (SMaxSampleValue); nothing stated is named."""
    wanted = np.linspace(0, 255, 64).reshape(8, 8)
    for data in (tiff(ramp(4095), 12), tiff(ramp(4095), 16, (341, 4095)), tiff(ramp(65535), 16)):
        assert np.abs(np.asarray(decode_rgb(data))[..., 0] - wanted).max() <= 1
    for data in (tiff(ramp(4095), 16), tiff(ramp(4095), 16, (341, 65535)), tiff(ramp(4095), 16, (341, 255)),
                 tiff(ramp(4095), 16, (281, 4095))):  # fmt: skip
        with pytest.raises(UnusableImageError, match="14 bits or fewer"):
            decode_rgb(data)
    with pytest.raises(UnusableImageError, match="0 is white"):
        decode_rgb(tiff(ramp(65535), 16, (262, 0)))
    with pytest.raises(UnusableImageError, match="range is not known"):
        decode_rgb(tiff(ramp(32767), 16, signed=2))


@pytest.mark.parametrize("packing", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_of_every_tiff_are_seen(mode, packing):
    """In either order of bytes, packed or not; they leave Pillow in modes of their own."""
    for peak in (4095, 65535):
        pixels = ramp(peak).astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        data = saved(PIL.Image.frombytes(mode, (8, 8), pixels), "TIFF", compression=packing)
        if peak == 65535:
            assert np.asarray(decode_rgb(data)).max() == 255
        else:
            with pytest.raises(UnusableImageError, match="14 bits or fewer"):
                decode_rgb(data)


@pytest.mark.parametrize("peak", [1, 100, 255, 256, 1023, 4095, 65535])
def test_a_pgm_states_its_range(peak):
    """Its header has the greatest value."""
    values = ramp(peak)
    data = f"P5 8 8 {peak}\n".encode() + values.astype(">u2" if peak > 255 else np.uint8).tobytes()
    # Of 8 bits Pillow itself scales the values.
    assert np.abs(np.asarray(decode_rgb(data))[..., 0] - values / peak * 255).max() <= (0.51 if peak > 255 else 1)


@pytest.mark.parametrize(
    ("mode", "form"),
    [(mode, form) for form, modes in {
        "PNG": "1 L LA P RGB RGBA", "TIFF": "1 L LA P RGB RGBA CMYK YCbCr LAB I F", "JPEG": "L RGB CMYK YCbCr",
        "WEBP": "RGB RGBA", "GIF": "1 L P RGB RGBA", "BMP": "1 L P RGB RGBA", "PPM": "1 L RGB RGBA I F",
    }.items() for mode in modes.split()],
)  # fmt: skip
def test_every_mode_is_rgb_or_reported(mode, form):
    """Alpha is dropped and leaves the colours under it; what has no range or no RGB is named."""
    source = PIL.Image.new("RGB", (8, 8), (200, 100, 50))
    image = PIL.Image.new("LAB", (8, 8), (90, 3, 4)) if mode == "LAB" else source.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(0 if form not in ("GIF", "WEBP") else 255)
    try:
        seen = decode_rgb(saved(image, form, **({"lossless": True} if form == "WEBP" else {})))
    except UnusableImageError as error:
        assert mode in ("LAB", "I", "F") and ("range is not known" in str(error) or "LAB" in str(error))
        return
    assert seen.mode == "RGB" and seen.size == (8, 8)
    if mode in ("RGB", "RGBA", "P", "YCbCr"):
        assert np.abs(np.asarray(seen)[0, 0].astype(int) - (200, 100, 50)).max() < 12


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_the_first_frame_is_the_image(form):
    """Of animations, of files with pages, of pairs of a camera."""
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = saved(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert np.abs(np.asarray(decode_rgb(data))[0, 0].astype(int) - (250, 0, 0)).max() < 12


@pytest.mark.parametrize("form", sorted(PIL.Image.SAVE))
def test_only_decoders_of_the_list_are_started(form, monkeypatch):
    """Whatever a file is: no decoder beside them sees it, and nothing starts a program."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("os.system", refuse)
    try:
        data = saved(PIL.Image.new("L", (32, 32), 60).convert("RGB"), form)
    except (KeyError, OSError, ValueError, AssertionError):
        pytest.skip("Pillow has no writer for it here")
    try:
        decode_rgb(data)
    except UnusableImageError as error:
        assert form not in FORMATS and "is not an image" in str(error).replace("and not an image", "is not an image")


def test_large_images_are_refused_before_they_are_unpacked():
    """178 megapixels, and of a sample of a run more than a side of 4096; a file of a few kB takes no memory."""
    bomb = saved(PIL.Image.new("1", (13_400, 13_300)), "PNG")
    sample = saved(PIL.Image.new("1", (4097, 4096)), "PNG")
    tracemalloc.start()
    for decode, data in ((decode_rgb, bomb), (decode_sample, bomb), (decode_sample, sample)):
        with pytest.raises(UnusableImageError, match="million pixels"):
            decode(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert decode_rgb(sample).size == (4097, 4096) and MAX_SAMPLE_PIXELS == 4096**2


SOUND = [saved(PIL.Image.fromarray(CORNERS), form) for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SOUND),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_damaged_files_give_an_image_or_a_reason(data, changes, end):
    """No other error, whatever bytes are changed or missing."""
    bent = bytearray(data)
    for place, value in changes:
        bent[int(place * (len(bent) - 1))] = value
    try:
        assert decode_rgb(bytes(bent[: 1 + int(end * len(bent))])).mode == "RGB"
    except UnusableImageError as error:
        assert str(error)
