"""Pictures and sounds for tests: good ones, and one of each bad kind."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

ORIENTATION, MAKE, GPS = 0x0112, 0x010F, 0x8825


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A smooth picture with structure of its own: its hash is far from that of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def with_metadata(image: Image.Image, format_: str, orientation: int = 1) -> bytes:
    """Camera, place, comment, XMP and colour profile in one file."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE] = orientation, "SECRET-CAMERA"
    exif[GPS] = {1: "N", 2: tuple(TiffImagePlugin.IFDRational(value) for value in (52, 31, 12))}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options: dict[str, Any] = {"exif": exif, "icc_profile": profile}
    if format_ == "JPEG":
        options |= {"comment": b"SECRET-COMMENT", "xmp": b"<x:xmpmeta>SECRET-XMP</x:xmpmeta>"}
    elif format_ == "PNG":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = info = PngInfo()
        info.add_text("Author", "SECRET-AUTHOR")
    return saved(image, format_, **options)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A kilobyte that claims 900 million pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(100_000), 9))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


def png_with_chunk(image: Image.Image, name: bytes, data: bytes) -> bytes:
    """A whole PNG with one more chunk behind its header."""
    content = saved(image, "PNG")
    return content[:33] + png_chunk(name, data) + content[33:]


def text_bomb(image: Image.Image) -> bytes:
    """A compressed text of 50 MB in 50 kB."""
    return png_with_chunk(image, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50 << 20), 9))


def tone(
    seconds: float = 1.0, rate_hz: int = 16_000, hertz: float = 440.0, amplitude: float = 0.5
) -> NDArray[np.float64]:
    return np.asarray(amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate_hz)) / rate_hz))


def wave(samples: NDArray[Any], rate_hz: int = 16_000, format_: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=format_, subtype=subtype)
    return buffer.getvalue()


def lying_wave(claimed_bytes: int = 4_000_000_000) -> bytes:
    """One second that claims to be hours."""
    content = wave(tone())
    place = content.index(b"data") + 4
    return content[:place] + struct.pack("<I", claimed_bytes) + content[place + 4 :]


def write_rows(folder: Path, rows: Iterable[dict[str, Any]], name: str = "pairs.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_corpus(folder: Path, pictures: int, sounds: int = 0) -> None:
    """A folder of good pairs, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(pictures):
        (folder / f"{number}.jpg").write_bytes(saved(scene(number), quality=92))
        rows.append({"image": f"{number}.jpg", "text": f"A picture of scene number {number}, painted in oil."})
    for number in range(sounds):
        samples = tone(hertz=300 + 40 * number, rate_hz=22_050)
        (folder / f"{number}.wav").write_bytes(wave(samples, 22_050))
        rows.append({"audio": f"{number}.wav", "text": f"A tone of {300 + 40 * number} hertz is heard."})
    write_rows(folder, rows)
