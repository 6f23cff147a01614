"""Bytes of an image to pixels, within limits, as vLLM's server makes them."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from vllm_qoq.caption.errors import Uncaptioned
from vllm_qoq.errors import reason

MOST_PIXELS = 89_478_485
"""The largest image that is decoded; Pillow's own limit."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded, of several frames the first; no others are tried."""

_ALPHA = ("RGBA", "LA", "PA")
_WHITE = (255, 255, 255)


def decode(content: bytes) -> Image.Image:
    """Decode an image to RGB, upright, on white where it is transparent.

    Raises Uncaptioned for what is no image of FORMATS, has too many pixels or is damaged.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise Uncaptioned("not_an_image", f"none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise Uncaptioned("too_large", reason(error)) from None
    except MemoryError:  # of this machine: the next run may have more
        raise
    except Exception as error:  # The bytes may be anything.
        raise Uncaptioned("damaged", reason(error)) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Uncaptioned("too_large", f"{width} x {height} pixels; {MOST_PIXELS} are decoded")
    try:
        image.load()
        return _rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:
        raise Uncaptioned("damaged", reason(error)) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image  # Where its orientation cannot be read, it stays as it lies.


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    transparent = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, _WHITE)
    opaque.paste(transparent, mask=transparent.getchannel("A"))
    return opaque
