"""What a Hugging Face processor will do to a picture or a sound, from its ``preprocessor_config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError

_FILE = "preprocessor_config.json"
_FILE_MAX_BYTES = 1 << 20
_SIDE_MAX = 16_384
_RATES_HZ = (4_000, 192_000)
_RESAMPLE_FILTERS = range(6)  # PIL.Image.Resampling
_BICUBIC = 3


@dataclass(frozen=True, slots=True)
class ImageNeed:
    """The size that a processor works with; everything None: pictures keep their size.

    Attributes:
        shortest_edge: Pixels of the shorter side after resizing; the other keeps the aspect.
        longest_edge: At most so many pixels of the longer side.
        size: (height, width) after resizing, whatever the aspect.
        crop: (height, width) cut out of the middle afterwards.
        max_pixels: At most so many pixels altogether (Qwen2-VL and the like), aspect kept.
        resample: Filter, by Pillow's number (3: bicubic).
    """

    shortest_edge: int | None = None
    longest_edge: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    max_pixels: int | None = None
    resample: int = _BICUBIC


@dataclass(frozen=True, slots=True)
class ProcessorNeed:
    """What to prepare for: an image processor's sizes, a feature extractor's sampling rate, or both."""

    image: ImageNeed = ImageNeed()
    sampling_rate_hz: int | None = None


def read_processor_need(path: Path) -> ProcessorNeed:
    """Read a processor's folder, or its ``preprocessor_config.json`` itself; nothing is downloaded or executed.

    Raises:
        UserError: It is missing, or says something that this cannot follow.
    """
    file = path / _FILE if path.is_dir() else path
    values = _read_json(file)
    rate = values.get("sampling_rate")
    if rate is not None and not (_is_whole(rate) and _RATES_HZ[0] <= rate <= _RATES_HZ[1]):
        raise _refusal(file, "sampling_rate", rate, f"{_RATES_HZ[0]} to {_RATES_HZ[1]} Hz")
    need = ProcessorNeed(_image_need(file, values), rate)
    if need == ProcessorNeed():
        raise _refusal(file, "keys", sorted(values), "a size, a crop_size or a sampling_rate")
    return need


def _image_need(file: Path, values: dict[str, Any]) -> ImageNeed:
    shortest_edge = longest_edge = size = crop = max_pixels = None
    given = values.get("size")
    if values.get("do_resize", True) and given is not None:
        given = {"shortest_edge": given} if _is_whole(given) else given
        if not isinstance(given, dict):
            raise _refusal(file, "size", given, "a number or an object")
        if "max_pixels" in values or ("patch_size" in values and "merge_size" in values):
            # Here shortest_edge and longest_edge of size count pixels of the whole picture.
            max_pixels = _side(file, "max_pixels", values.get("max_pixels") or given.get("longest_edge"), _SIDE_MAX**2)
        elif {"height", "width"} <= set(given):
            size = _side(file, "size", given["height"]), _side(file, "size", given["width"])
        elif {"shortest_edge", "longest_edge"} & set(given):
            edges = (given.get("shortest_edge"), given.get("longest_edge"))
            shortest_edge, longest_edge = (None if edge is None else _side(file, "size", edge) for edge in edges)
        else:
            raise _refusal(file, "size", given, "shortest_edge, longest_edge, or height and width")
    if values.get("do_center_crop") and (given := values.get("crop_size")) is not None:
        given = {"height": given, "width": given} if _is_whole(given) else given
        if not isinstance(given, dict) or not {"height", "width"} <= set(given):
            raise _refusal(file, "crop_size", given, "a number, or height and width")
        crop = _side(file, "crop_size", given["height"]), _side(file, "crop_size", given["width"])
    resample = values.get("resample", _BICUBIC)
    if resample not in _RESAMPLE_FILTERS:
        raise _refusal(file, "resample", resample, "0 to 5, as Pillow numbers its filters")
    return ImageNeed(shortest_edge, longest_edge, size, crop, max_pixels, int(resample))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _FILE_MAX_BYTES:
            raise UserError("data.processor", str(file), f"at most {_FILE_MAX_BYTES} bytes", "check the file")
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("data.processor", str(file), f"a folder with {_FILE}", "check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("data.processor", str(file), f"JSON ({error})", "write it again") from None
    if isinstance(values, dict) and isinstance(values.get("image_processor"), dict | None):  # processor_config.json
        values = {**(values.get("feature_extractor") or {}), **(values.get("image_processor") or {}), **values}
    if not isinstance(values, dict):
        raise UserError("data.processor", str(file), "a JSON object", "write it again")
    return values


def _side(file: Path, key: str, value: object, largest: int = _SIDE_MAX) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise _refusal(file, key, value, f"1 to {largest} pixels")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refusal(file: Path, key: str, value: object, allowed: str) -> UserError:
    return UserError(f"data.processor {file.name} {key}", value, allowed, "use another processor's file")
