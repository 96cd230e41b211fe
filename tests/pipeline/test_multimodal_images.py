from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from edge_runtime.formats.errors import UserError
from pipeline.data.multimodal.image_header import ImageHeader, read_image_header
from pipeline.data.multimodal.images import ImageSettings, Picture, fit, perceptual_hash, prepare_image
from pipeline.data.multimodal.pairs import PairDrop, Refused
from pipeline.data.multimodal.processors import ImageNeed, read_processor_need
from tests.pipeline.media_cases import (
    png_bomb,
    png_chunk,
    png_with_chunk,
    saved,
    scene,
    text_bomb,
    with_metadata,
)

PNG = ImageSettings(format="png")
AS_IS = ImageNeed()


def pixels(prepared: Picture | Refused) -> Any:
    assert isinstance(prepared, Picture), prepared
    return np.asarray(Image.open(io.BytesIO(prepared.content)))


def reason(content: bytes, settings: ImageSettings = PNG, need: ImageNeed = AS_IS) -> str:
    prepared = prepare_image(content, need, settings)
    assert isinstance(prepared, Refused), "kept"
    return prepared.reason


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("written", ["jpg", "png"])
def test_no_metadata_survives(format_: str, written: Any) -> None:
    content = with_metadata(scene(1), format_)
    assert b"SECRET-CAMERA" in content

    prepared = prepare_image(content, AS_IS, ImageSettings(format=written))
    assert isinstance(prepared, Picture)

    assert b"SECRET" not in prepared.content
    with Image.open(io.BytesIO(prepared.content)) as image:
        image.load()
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert markers(prepared.content) <= ALLOWED[written]


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_texts_of_a_picture_without_a_profile_do_not_survive(format_: str) -> None:
    info = PngInfo()
    info.add_text("Author", "SECRET")
    content = saved(scene(1), format_, **({"comment": b"SECRET"} if format_ == "JPEG" else {"pnginfo": info}))
    assert b"SECRET" in content
    for written in ("jpg", "png"):
        prepared = prepare_image(content, AS_IS, ImageSettings(format=written))  # type: ignore[arg-type]
        assert isinstance(prepared, Picture) and b"SECRET" not in prepared.content


ALLOWED: dict[str, set[Any]] = {"jpg": {0xE0, 0xDB, 0xC0, 0xC4}, "png": {b"IHDR", b"IDAT", b"IEND"}}


def markers(content: bytes) -> set[Any]:
    """The kinds of segment in a file, walked by hand."""
    found: set[Any] = set()
    if content.startswith(b"\x89PNG"):
        offset = 8
        while offset < len(content):
            found.add(content[offset + 4 : offset + 8])
            offset += 12 + struct.unpack_from(">I", content, offset)[0]
        return found
    offset = 2
    while content[offset + 1] != 0xDA:
        found.add(content[offset + 1])
        offset += 2 + struct.unpack_from(">H", content, offset + 2)[0]
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_orientation_is_applied(orientation: int, format_: str) -> None:
    image = scene(2)
    upright = {
        1: image, 2: ImageOps.mirror(image), 3: image.rotate(180), 4: ImageOps.flip(image),
        5: image.transpose(Image.Transpose.TRANSPOSE), 6: image.rotate(-90, expand=True),
        7: image.transpose(Image.Transpose.TRANSVERSE), 8: image.rotate(90, expand=True),
    }[orientation]  # fmt: skip

    found = pixels(prepare_image(with_metadata(image, format_, orientation), AS_IS, PNG))

    assert found.shape == np.asarray(upright).shape
    assert np.abs(found.astype(int) - np.asarray(upright)).max() <= (1 if format_ == "PNG" else 24)


def test_bombs_are_refused_without_decoding() -> None:
    bombs = {
        png_bomb(): PairDrop.TOO_MANY_PIXELS,
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(20): PairDrop.TOO_MANY_PIXELS,
        b"RIFF" + bytes(4) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\x3f\xff\xff\x3f":
            PairDrop.TOO_MANY_PIXELS,
        text_bomb(scene(1)): PairDrop.METADATA_TOO_LARGE,
        png_with_chunk(scene(1), b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(8 << 20))): PairDrop.METADATA_TOO_LARGE,
        png_with_chunk(scene(1), b"iCCP", b"k\0\0" + zlib.compress(bytes(8 << 20))): PairDrop.METADATA_TOO_LARGE,
        png_with_chunk(scene(1), b"tEXt", b"k\0" + b"a" * (2 << 20)): PairDrop.METADATA_TOO_LARGE,
    }  # fmt: skip
    tracemalloc.start()
    for content, expected in bombs.items():
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert reason(content) == expected
        assert tracemalloc.get_traced_memory()[1] - before < 8 << 20
    tracemalloc.stop()


def test_many_texts_count_together() -> None:
    texts = b"".join(png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(300_000))) for _ in range(4))
    content = saved(scene(1), "PNG")
    assert reason(content[:33] + texts + content[33:]) == PairDrop.METADATA_TOO_LARGE


def test_small_texts_of_a_png_are_removed_before_decoding() -> None:
    header = read_image_header(with_metadata(scene(1), "PNG"), max_metadata_bytes=1 << 20, max_scans=10)
    assert isinstance(header, ImageHeader)
    assert b"SECRET-AUTHOR" not in header.content
    assert (header.width, header.height) == (160, 120)


def test_a_progressive_jpeg_has_a_bounded_number_of_scans() -> None:
    content = saved(scene(1), "JPEG", progressive=True)
    assert reason(content, ImageSettings(max_scans=5)) == PairDrop.TOO_MANY_SCANS
    assert isinstance(prepare_image(content, AS_IS, ImageSettings(max_scans=10)), Picture)


@pytest.mark.parametrize("format_", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(format_: str) -> None:
    frames = [scene(number) for number in range(3)]
    content = saved(frames[0], format_, save_all=True, append_images=frames[1:])
    assert reason(content) == PairDrop.ANIMATED
    assert isinstance(prepare_image(saved(frames[0], format_), AS_IS, PNG), Picture)


def test_a_gif_frame_larger_than_its_screen_is_refused() -> None:
    content = bytearray(saved(scene(1).quantize(16), "GIF"))
    frame = content.index(b"\x2c\x00\x00\x00\x00")
    for side, limit in ((60_000, 64_000_000), (1_000, 999_999)):
        content[frame + 5 : frame + 9] = struct.pack("<HH", side, side)
        assert reason(bytes(content), ImageSettings(max_pixels=limit)) == PairDrop.TOO_MANY_PIXELS


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_files_are_refused_wherever_they_are_cut(format_: str) -> None:
    content = saved(scene(1), format_)
    for length in range(0, len(content) - len(content) // 10, max(1, len(content) // 40)):
        assert reason(content[:length]) in (PairDrop.UNDECODABLE, PairDrop.UNSUPPORTED_FORMAT)


def test_random_damage_never_raises() -> None:
    rng = np.random.default_rng(0)
    for format_ in ("JPEG", "PNG", "WEBP", "GIF"):
        content = saved(scene(1, 96, 80), format_, **({"exif": Image.Exif()} if format_ == "JPEG" else {}))
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, len(damaged), 8):
                damaged[place] = rng.integers(0, 256)
            prepare_image(bytes(damaged), AS_IS, PNG)


@pytest.mark.parametrize(
    "content", [b"", b"II*\0" + bytes(64), b"%PDF-1.7", b"<svg></svg>", b"\xff\xd8\xff", b"RIFFxxxxWEBP"]
)
def test_other_formats_are_refused(content: bytes) -> None:
    assert reason(content) in (PairDrop.UNSUPPORTED_FORMAT, PairDrop.UNDECODABLE)


def test_sixteen_bits_keep_their_brightness() -> None:
    ramp = np.linspace(0, 65_535, 96 * 96).reshape(96, 96).astype(np.uint16)
    found = pixels(prepare_image(saved(Image.fromarray(ramp), "PNG"), AS_IS, PNG))
    np.testing.assert_array_equal(found, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_cmyk_becomes_rgb() -> None:
    ink = scene(3).convert("CMYK")
    found = pixels(prepare_image(saved(ink, "JPEG", quality=95), AS_IS, PNG))
    assert np.abs(found.astype(int) - np.asarray(scene(3))).mean() < 3


def test_transparency_becomes_white() -> None:
    palette = scene(4).quantize(32)
    index = int(np.asarray(palette)[0, 0])
    found = pixels(prepare_image(saved(palette, "PNG", transparency=index), AS_IS, PNG))
    inside = np.asarray(palette) == index
    assert (found[inside] == 255).all()
    np.testing.assert_array_equal(found[~inside], np.asarray(palette.convert("RGB"))[~inside])
    half = scene(4).convert("RGBA")
    half.putalpha(128)
    mixed = pixels(prepare_image(saved(half, "PNG"), AS_IS, PNG)).astype(float)
    np.testing.assert_allclose(mixed, np.asarray(scene(4)) * (128 / 255) + 255 * (127 / 255), atol=1)


def test_a_colour_profile_is_applied_then_gone() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert reason(saved(scene(1), "JPEG", icc_profile=lab)) == PairDrop.COLOUR_PROFILE
    assert reason(saved(scene(1), "JPEG", icc_profile=b"no profile" * 20)) == PairDrop.COLOUR_PROFILE
    grey = scene(1).convert("L")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = pixels(prepare_image(saved(grey, "PNG", icc_profile=profile), AS_IS, PNG))
    assert np.abs(found.astype(int) - np.asarray(grey)[..., None]).max() <= 1
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    found = pixels(prepare_image(saved(scene(1), "PNG", icc_profile=bytes(swapped)), AS_IS, PNG))
    assert np.abs(found.astype(int) - np.asarray(scene(1))[..., ::-1]).max() <= 3


def test_shape_limits() -> None:
    assert reason(saved(scene(1, 63, 80), "PNG")) == PairDrop.TOO_SMALL
    assert reason(saved(scene(1, 64, 193), "PNG")) == PairDrop.EXTREME_ASPECT
    assert isinstance(prepare_image(saved(scene(1, 64, 192), "PNG"), AS_IS, PNG), Picture)
    assert reason(saved(scene(1, 100, 100), "PNG"), ImageSettings(max_pixels=9_999)) == PairDrop.TOO_MANY_PIXELS


def test_similar_pictures_share_most_bits_and_others_do_not() -> None:
    hashes = [perceptual_hash(scene(seed)) for seed in range(40)]
    between = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(between) >= 12 and 28 <= np.mean(between) <= 34
    for seed, hash_ in enumerate(hashes[:10]):
        variants = [
            Image.open(io.BytesIO(saved(scene(seed), "JPEG", quality=40))),
            scene(seed).resize((97, 71)),
            Image.eval(scene(seed), lambda value: min(255, value + 12)),
        ]
        assert max((perceptual_hash(variant) ^ hash_).bit_count() for variant in variants) <= 4


@pytest.mark.parametrize(("width", "height"), [(160, 120), (121, 160), (97, 250), (64, 64), (65, 64), (300, 101)])
@pytest.mark.parametrize(
    "config",
    [
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 32, "width": 40}},
        {"size": {"height": 40, "width": 60}, "do_center_crop": False},
        {"size": {"shortest_edge": 48, "longest_edge": 64}, "do_center_crop": False},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}, "do_center_crop": False},
    ],
)
def test_a_processor_sees_the_same_pixels_in_the_shard_as_in_the_source(
    tmp_path: Path, config: dict[str, Any], width: int, height: int
) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**config)
    processor.save_pretrained(tmp_path)
    need = read_processor_need(tmp_path).image
    image = scene(5, width, height)

    prepared = prepare_image(saved(image, "PNG"), need, PNG)
    assert isinstance(prepared, Picture)

    assert prepared.width * prepared.height < width * height
    stored = Image.open(io.BytesIO(prepared.content))
    np.testing.assert_array_equal(processor(stored)["pixel_values"][0], processor(image)["pixel_values"][0])


def test_nothing_is_enlarged() -> None:
    image = scene(1, 80, 64)
    assert fit(image, ImageNeed(shortest_edge=224, crop=(224, 224))).size == (80, 64)
    assert fit(image, ImageNeed(size=(40, 300))).size == (80, 64)


def test_pixel_budgets_keep_the_aspect(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 10}, "max_pixels": 5_000}))
    sized = fit(scene(1, 200, 100), read_processor_need(tmp_path).image)
    assert sized.size == (100, 50)


def test_a_large_jpeg_is_decoded_small_with_the_same_result() -> None:
    grains = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    content = saved(grains.resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG", quality=95)
    need = ImageNeed(shortest_edge=120)
    found = pixels(prepare_image(content, need, PNG)).astype(int)
    expected = np.asarray(fit(Image.open(io.BytesIO(content)), need), int)
    assert found.shape == expected.shape == (120, 160, 3)
    assert np.abs(found - expected).mean() < 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "JSON object"),
        ({"do_normalize": True}, "a size, a crop_size or a sampling_rate"),
        ({"size": {"shortest_edge": 0}}, "1 to 16384"),
        ({"size": {"depth": 3}}, "shortest_edge"),
        ({"size": "large"}, "a number or an object"),
        ({"sampling_rate": 1}, "4000 to 192000"),
        ({"size": 224, "resample": 9}, "0 to 5"),
        ({"do_center_crop": True, "crop_size": {"height": 3}}, "height and width"),
    ],
)
def test_processors_that_cannot_be_followed_are_refused(tmp_path: Path, values: object, words: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        read_processor_need(tmp_path)


def test_a_missing_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        read_processor_need(tmp_path)
