"""From tensors to the stored file and back: rounding to 8 bits, deterministic encoding."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import torch
from torch import Tensor

from engine.data.images.decode import decode_rgb

# PNG and WebP are lossless; JPEG at the quality that moves classifier scores least.
_OPTIONS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG", "compress_level": 6},
    "webp": {"format": "WEBP", "lossless": True, "method": 4},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
LOSSLESS = ("png", "webp")

# What IPTC and C2PA name for images that a trained model made; newscodes and schema of IPTC, https://cv.iptc.org.
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Nothing in it depends on the version or the run: equal pixels give equal bytes.
XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" \
xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<xmp:CreatorTool>Riskforge</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
# Of a text chunk that holds XMP (XMP specification, part 3).
_PNG_KEYWORD = "XML:com.adobe.xmp"


def quantise(images: Tensor) -> np.ndarray:
    """8-bit pixels [B, H, W, 3] of images [B, 3, H, W] in [0, 1]: rounded, not truncated."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def encode(pixels: np.ndarray, image_format: str, *, provenance: bool = False) -> bytes:
    """The image file of 8-bit pixels [H, W, 3]; equal pixels give equal bytes.

    Args:
        provenance: mark the file as synthetic.
    """
    buffer = io.BytesIO()
    options = _OPTIONS[image_format] | (_provenance(image_format) if provenance else {})
    PIL.Image.fromarray(pixels).save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _provenance(image_format: str) -> dict[str, object]:
    """Options of Pillow that put the XMP packet into a file."""
    if image_format != "png":
        return {"xmp": XMP.encode()}
    text = PIL.PngImagePlugin.PngInfo()
    text.add_itxt(_PNG_KEYWORD, XMP)
    return {"pnginfo": text}


def stored(
    pixels: np.ndarray, image_format: str, *, provenance: bool | Sequence[bool] = False
) -> tuple[list[Callable[[], bytes]], list[PIL.Image.Image]]:
    """Encoders of the files of 8-bit pixels [B, H, W, 3], and the images as a reader of these files will see them.

    A lossless format preserves its pixels, so that encoding can wait; JPEG must be encoded first.

    Args:
        provenance: whether the files say that they are synthetic, of all or of each.
    """
    marks = [provenance] * len(pixels) if isinstance(provenance, bool) else provenance
    waiting: list[Callable[[], bytes]] = [
        partial(encode, image, image_format, provenance=mark) for image, mark in zip(pixels, marks, strict=True)
    ]
    if image_format in LOSSLESS:
        return waiting, [PIL.Image.fromarray(image) for image in pixels]
    files = [encode_one() for encode_one in waiting]
    return [partial(bytes, file) for file in files], [decode_rgb(file) for file in files]
