"""What a picture's file says about itself, read from its bytes before any decoder sees them."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from pipeline.data.multimodal.pairs import PairDrop, Refused

_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG and DAC
_JPEG_LONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"eXIf"}
_PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt"}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format as Pillow names it, size in pixels, and the bytes a decoder may see."""

    format: str
    width: int
    height: int
    content: bytes


def read_image_header(content: bytes, *, max_metadata_bytes: int, max_scans: int) -> ImageHeader | Refused:
    """Size and format of a JPEG, PNG, WebP or GIF file.

    A PNG comes back without its text and other side chunks: compressed texts are the cheapest bombs there are.

    Args:
        content: The whole file.
        max_metadata_bytes: Of a PNG's texts and colour profile together, decompressed; other formats do not compress.
        max_scans: Of a progressive JPEG; each costs a pass over the whole picture.
    """
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg(content, max_scans)
    if content.startswith(_PNG_SIGNATURE):
        return _png(content, max_metadata_bytes)
    if content[:6] in (b"GIF87a", b"GIF89a"):
        width, height = _unpacked("<HH", content, 6)
        return _header("GIF", width, height, content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _webp(content)
    return Refused(PairDrop.UNSUPPORTED_FORMAT)


def _header(name: str, width: int, height: int, content: bytes) -> ImageHeader | Refused:
    return ImageHeader(name, width, height, content) if width and height else Refused(PairDrop.UNDECODABLE)


def _unpacked(layout: str, content: bytes, offset: int) -> tuple[int, ...]:
    """Numbers at ``offset``; zeros where the file is too short, which no size may be."""
    if offset + struct.calcsize(layout) > len(content):
        return (0,) * len(struct.unpack(layout, bytes(struct.calcsize(layout))))
    return struct.unpack_from(layout, content, offset)


def _jpeg(content: bytes, max_scans: int) -> ImageHeader | Refused:
    width = height = 0
    offset = 2
    while offset + 4 <= len(content):
        if content[offset] != 0xFF:
            return Refused(PairDrop.UNDECODABLE)
        marker = content[offset + 1]
        if marker == 0xFF or marker in _JPEG_LONE:  # fill bytes; markers without content
            offset += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:
            break
        (length,) = struct.unpack_from(">H", content, offset + 2)
        if marker in _JPEG_SIZES and not width:
            height, width = _unpacked(">HH", content, offset + 5)
        offset += 2 + length
    # In compressed data 0xFF is always followed by 0x00 or a restart marker, so this counts scans.
    if content.count(b"\xff\xda", offset) > max_scans:
        return Refused(PairDrop.TOO_MANY_SCANS)
    return _header("JPEG", width, height, content)


def _png(content: bytes, max_metadata_bytes: int) -> ImageHeader | Refused:
    kept = [_PNG_SIGNATURE]
    offset, left_bytes = len(_PNG_SIGNATURE), max_metadata_bytes
    while offset + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, offset)
        name = content[offset + 4 : offset + 8]
        end = offset + 12 + length
        if end > len(content):
            return Refused(PairDrop.UNDECODABLE)
        if name == b"acTL":
            return Refused(PairDrop.ANIMATED)
        if name in _PNG_TEXT or name in (b"iCCP", b"eXIf"):
            left_bytes -= _png_text_bytes(name, content[offset + 8 : end - 4], left_bytes)
            if left_bytes < 0:
                return Refused(PairDrop.METADATA_TOO_LARGE)
        if name in _PNG_KEPT:
            kept.append(content[offset:end])
        offset = end
        if name == b"IEND":
            break
    else:
        return Refused(PairDrop.UNDECODABLE)
    width, height = _unpacked(">II", content, 16)
    return _header("PNG", width, height, b"".join(kept))


def _png_text_bytes(name: bytes, data: bytes, limit_bytes: int) -> int:
    """Size of a text or profile once decompressed; decompression stops just past ``limit_bytes``."""
    keyword, separator, rest = data.partition(b"\0")
    compressed = rest[1:]  # after the method
    if name == b"iTXt" and rest[:1] == b"\x01":
        compressed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # after language and translated keyword
    elif name in (b"tEXt", b"iTXt", b"eXIf") or not separator:
        return len(data)
    try:
        plain = zlib.decompressobj().decompress(compressed, max(1, limit_bytes + 1))
    except zlib.error:
        return len(data)
    return len(keyword) + len(plain)


def _webp(content: bytes) -> ImageHeader | Refused:
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = (value & 0x3FFF for value in _unpacked("<HH", content, 26))
    elif kind == b"VP8L":
        (bits,) = _unpacked("<I", content, 21)
        width, height = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1) if bits else (0, 0)
    elif kind == b"VP8X":
        if content[20:21] and content[20] & 0x02:
            return Refused(PairDrop.ANIMATED)
        low, high = _unpacked("<IH", content, 24)
        width, height = ((low & 0xFFFFFF) + 1, ((low >> 24) | (high << 8)) + 1) if len(content) >= 30 else (0, 0)
    else:
        return Refused(PairDrop.UNDECODABLE)
    return _header("WEBP", width, height, content)
