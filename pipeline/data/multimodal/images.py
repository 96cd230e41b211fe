"""One picture: header checked, decoded, turned upright, converted to sRGB, sized, written without any metadata."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from pipeline.data.multimodal.image_header import ImageHeader, read_image_header
from pipeline.data.multimodal.pairs import PairDrop, Refused
from pipeline.data.multimodal.processors import ImageNeed

_HASH_SIDE, _HASH_INPUT = 8, 32  # 64 bits out of a 32 x 32 cosine transform
_DRAFT_RESERVE = 2  # a JPEG decoded at a fraction of its size keeps at least twice what is needed
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError)


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What a picture must be and what it becomes.

    Attributes:
        max_file_bytes: Larger files are not read.
        max_pixels: Width times height as the header says, before decoding; 1 to 178,956,970.
        max_metadata_bytes: Texts and colour profile, decompressed.
        max_scans: Of a progressive JPEG.
        min_side: Shorter side, in pixels.
        max_aspect: Longer side through shorter side, at least 1.
        format: ``jpg`` or ``png`` (no loss).
        jpg_quality: 1 to 95.
    """

    max_file_bytes: int = 32 << 20
    max_pixels: int = 64_000_000
    max_metadata_bytes: int = 1 << 20
    max_scans: int = 64
    min_side: int = 64
    max_aspect: float = 3.0
    format: Literal["jpg", "png"] = "jpg"
    jpg_quality: int = 90


@dataclass(frozen=True, slots=True)
class Picture:
    """A prepared picture: file content, size in pixels, and 64 bits that similar pictures share."""

    content: bytes
    width: int
    height: int
    perceptual_hash: int


def prepare_image(content: bytes, need: ImageNeed, settings: ImageSettings) -> Picture | Refused:
    """Check and rewrite one picture.

    Size, frames and metadata are checked on the header; only then is a pixel decoded. The result has
    three 8-bit channels, sRGB, transparency over white, the EXIF orientation applied, and not one byte
    of EXIF, GPS, XMP, comments or a colour profile. Nothing is enlarged: that is the processor's part.

    Args:
        content: A JPEG, PNG, WebP or GIF file.
        need: What a processor will do; done here in the same way and with the same rounding.
        settings: Limits and the format written.
    """
    header = read_image_header(content, max_metadata_bytes=settings.max_metadata_bytes, max_scans=settings.max_scans)
    if isinstance(header, Refused):
        return header
    reason = _shape_reason(header.width, header.height, settings)
    if reason is not None:
        return Refused(reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken EXIF, odd palettes; the pixels decide
            decoded = _decode(header, need, settings)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Refused(PairDrop.TOO_MANY_PIXELS)
    except _UNDECODABLE:
        return Refused(PairDrop.UNDECODABLE)
    if isinstance(decoded, Refused):
        return decoded
    sized = fit(decoded, need)
    return Picture(encode(sized, settings), *sized.size, perceptual_hash(sized))


def fit(image: Image.Image, need: ImageNeed) -> Image.Image:
    """Resize and crop as the processor does; a picture that it would enlarge stays as it is."""
    width, height = image.size
    target = _target_size(width, height, need)
    if target != (width, height):
        if target[0] > width or target[1] > height:
            return image
        image = image.resize(target, Image.Resampling(need.resample))
    if need.crop is None or need.crop[0] > image.height or need.crop[1] > image.width:
        return image
    if _target_size(need.crop[1], need.crop[0], need) != (need.crop[1], need.crop[0]):
        return image  # the processor, which resizes first, would enlarge the middle that was left
    top, left = (image.height - need.crop[0]) // 2, (image.width - need.crop[1]) // 2
    return image.crop((left, top, left + need.crop[1], top + need.crop[0]))


def encode(image: Image.Image, settings: ImageSettings) -> bytes:
    """The file of an RGB picture; a copy of its pixels alone, because Pillow writes what ``info`` holds."""
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    if settings.format == "jpg":
        bare.save(buffer, "JPEG", quality=settings.jpg_quality, subsampling="4:2:0", optimize=True)
    else:
        bare.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of a 32 x 32 grey picture lie above their median.

    C. Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010.
    """
    grey = image.convert("L").resize((_HASH_INPUT, _HASH_INPUT), Image.Resampling.LANCZOS)
    basis = _cosines()
    low = (basis @ np.asarray(grey, np.float64) @ basis.T).round(6).ravel()
    above = low > np.median(low[1:])  # the mean brightness decides nothing
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def _shape_reason(width: int, height: int, settings: ImageSettings) -> PairDrop | None:
    if width * height > settings.max_pixels:
        return PairDrop.TOO_MANY_PIXELS
    if min(width, height) < settings.min_side:
        return PairDrop.TOO_SMALL
    if max(width, height) > settings.max_aspect * min(width, height):
        return PairDrop.EXTREME_ASPECT
    return None


def _decode(header: ImageHeader, need: ImageNeed, settings: ImageSettings) -> Image.Image | Refused:
    """Upright RGB pixels in sRGB."""
    with Image.open(io.BytesIO(header.content), formats=(header.format,)) as image:
        # A JPEG with more pictures behind it (depth, previews: MPO) is its first one.
        if header.format != "JPEG" and getattr(image, "is_animated", False):
            return Refused(PairDrop.ANIMATED)
        if image.width * image.height > settings.max_pixels:  # a GIF's frame may be larger than its header says
            return Refused(PairDrop.TOO_MANY_PIXELS)
        if header.format == "JPEG" and (edge := _needed_edge(need)) is not None:
            image.draft(None, (edge * _DRAFT_RESERVE, edge * _DRAFT_RESERVE))
        profile = image.info.get("icc_profile")
        if profile and len(profile) > settings.max_metadata_bytes:
            return Refused(PairDrop.METADATA_TOO_LARGE)
        upright = ImageOps.exif_transpose(image)
    return _to_srgb(upright, profile)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | Refused:
    """Three channels of 8 bits; a colour profile is applied, transparency becomes white."""
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a sample; Pillow would clip them
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65_535) >> 8).astype(np.uint8))
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"):
        return Refused(PairDrop.UNSUPPORTED_FORMAT)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        alpha = pixels.getchannel("A")
        converted = _apply_profile(pixels.convert("RGB"), profile)
        if isinstance(converted, Refused):
            return converted
        white = Image.new("RGB", image.size, "white")
        white.paste(converted, mask=alpha)
        return white
    if image.mode in ("1", "P", "RGBX", "YCbCr", "LAB"):
        image = image.convert("RGB")
    return _apply_profile(image, profile)


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image | Refused:
    """L, RGB or CMYK to sRGB by the file's own profile."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":  # many cameras' grey pictures
            image = image.convert("RGB")
        converted: Any = ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return Refused(PairDrop.COLOUR_PROFILE)
    return Image.frombytes("RGB", converted.size, converted.tobytes())


def _needed_edge(need: ImageNeed) -> int | None:
    """Pixels below which no side may fall while decoding, or None when every pixel may be needed."""
    if need.longest_edge is not None or need.max_pixels is not None:
        return None
    if need.size is not None:
        return max(need.size)
    return need.shortest_edge


def _target_size(width: int, height: int, need: ImageNeed) -> tuple[int, int]:
    """(width, height) with the rounding of transformers' image_transforms."""
    if need.size is not None:
        return need.size[1], need.size[0]
    if need.max_pixels is not None:
        scale = min(1.0, math.sqrt(need.max_pixels / (width * height)))
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    short, long = min(width, height), max(width, height)
    new_short = need.shortest_edge if need.shortest_edge is not None else short
    new_long = int(new_short * long / short)
    if need.longest_edge is not None and new_long > need.longest_edge:
        raw = need.longest_edge * short / long
        new_short, new_long = round(raw), int(raw * long / short)
    return (new_short, new_long) if width <= height else (new_long, new_short)


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float64]:
    """(8, 32) rows of the cosine transform, orthonormal."""
    place = (np.arange(_HASH_INPUT) + 0.5) * math.pi / _HASH_INPUT
    rows = np.cos(np.arange(_HASH_SIDE)[:, None] * place[None, :]) * math.sqrt(2 / _HASH_INPUT)
    rows[0] /= math.sqrt(2)
    return np.asarray(rows)


@lru_cache(maxsize=1)
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")
