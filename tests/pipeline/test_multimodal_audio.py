from __future__ import annotations

import io
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from edge_runtime.formats.errors import UserError
from pipeline.data.multimodal.audio import AudioSettings, Sound, prepare_audio
from pipeline.data.multimodal.pairs import PairDrop, Refused
from pipeline.data.multimodal.processors import read_processor_need
from pipeline.data.multimodal.resampling import low_pass, resample, resamples
from tests.pipeline.media_cases import lying_wave, tone, wave

SETTINGS = AudioSettings()


def decoded(prepared: Sound | Refused) -> tuple[Any, int]:
    assert isinstance(prepared, Sound), prepared
    samples, rate_hz = soundfile.read(io.BytesIO(prepared.content), dtype="float64")
    assert (len(samples), rate_hz) == (prepared.frames, prepared.sampling_rate_hz)
    return samples, rate_hz


def reason(content: bytes, settings: AudioSettings = SETTINGS, rate_hz: int | None = None) -> str:
    prepared = prepare_audio(content, rate_hz, settings)
    assert isinstance(prepared, Refused), "kept"
    return prepared.reason


@pytest.mark.parametrize(
    ("source_hz", "target_hz"),
    [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (16_000, 44_100), (11_025, 16_000), (16_001, 16_000)],
)
def test_resampling_equals_scipys_polyphase_filter(source_hz: int, target_hz: int) -> None:
    samples = np.random.default_rng(0).standard_normal(4_801).astype(np.float32)
    common = math.gcd(source_hz, target_hz)
    up, down = target_hz // common, source_hz // common
    expected = resample_poly(samples.astype(np.float64), up, down, window=low_pass(up, down) / up)

    found = resample(samples, source_hz, target_hz)

    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 4e-7  # float32's rounding of numbers up to 4


def test_resampling_keeps_what_is_heard_and_stops_what_would_fold() -> None:
    inside = slice(400, -400)
    for hertz in (50, 1_000, 7_100):
        found = resample(tone(1, 44_100, hertz).astype(np.float32), 44_100, 16_000)
        assert np.abs(found - tone(1, 16_000, hertz))[inside].max() < 1e-5
    for hertz in (8_050, 9_000, 20_000):
        found = resample(tone(1, 44_100, hertz).astype(np.float32), 44_100, 16_000)
        assert np.abs(found[inside]).max() < 1e-5


def test_resampling_of_few_samples_and_long_sounds() -> None:
    for length in (0, 1, 2, 159, 160):
        assert len(resample(np.ones(length, np.float32), 44_100, 16_000)) == math.ceil(length * 160 / 441)
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(700_001).astype(np.float32)  # more windows than are multiplied at once
    tracemalloc.start()
    found = resample(samples, 48_000, 16_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = resample_poly(samples.astype(np.float64), 1, 3, window=low_pass(1, 3))
    assert np.abs(found - expected).max() < 4e-7
    assert peak_bytes < 40 << 20


def test_rates_without_a_small_ratio_are_refused() -> None:
    assert resamples(44_101, 16_000) and not resamples(96_001, 16_000) and not resamples(0, 16_000)
    with pytest.raises(ValueError, match="96001"):
        resample(np.ones(9, np.float32), 96_001, 16_000)
    assert reason(wave(tone(1, 96_001), 96_001)) == PairDrop.SAMPLE_RATE


@pytest.mark.parametrize(
    ("format_", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize("written", ["flac", "wav"])
def test_every_format_becomes_mono_of_one_rate(format_: str, subtype: str, written: Any) -> None:
    left, right = tone(1, 44_100, 500), tone(1, 44_100, 900, 0.3)
    content = wave(np.stack([left, right], axis=1), 44_100, format_, subtype)

    samples, rate_hz = decoded(prepare_audio(content, None, AudioSettings(format=written)))

    assert rate_hz == 16_000 and samples.ndim == 1 and abs(len(samples) - 16_000) <= 2_000  # MP3 adds silence
    if format_ in ("WAV", "FLAC"):
        expected = (tone(1, 16_000, 500) + tone(1, 16_000, 900, 0.3)) / 2
        assert np.abs(samples - expected)[400:-400].max() < 6e-5  # 16 bits in, 16 bits out


def test_tags_do_not_survive() -> None:
    for format_ in ("FLAC", "WAV"):
        buffer = io.BytesIO()
        with soundfile.SoundFile(buffer, "w", 16_000, 1, format=format_) as file:
            file.title, file.artist, file.comment = "SECRET-TITLE", "SECRET-ARTIST", "SECRET-COMMENT"
            file.write(tone())
        assert b"SECRET" in buffer.getvalue()
        for written in ("flac", "wav"):
            prepared = prepare_audio(buffer.getvalue(), None, AudioSettings(format=written))  # type: ignore[arg-type]
            assert isinstance(prepared, Sound) and b"SECRET" not in prepared.content


def test_headers_that_lie_cost_nothing() -> None:
    cut = wave(tone(2), format_="FLAC")
    streamed = lying_wave(0xFFFFFFFF)
    tracemalloc.start()
    assert reason(lying_wave()) == PairDrop.HEADER_LIES
    assert reason(lying_wave(32_002)) == PairDrop.HEADER_LIES
    assert reason(cut[: len(cut) // 2]) in (PairDrop.HEADER_LIES, PairDrop.UNDECODABLE)
    assert reason(with_flac_length(wave(tone(), format_="FLAC"), 2**36 - 1)) == PairDrop.TOO_MANY_SAMPLES
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert isinstance(prepare_audio(streamed, None, SETTINGS), Sound)  # a pipe could not know better


def with_flac_length(content: bytes, frames: int) -> bytes:
    """A FLAC whose STREAMINFO claims another number of frames (36 bits)."""
    header = bytearray(content)
    header[21] = header[21] & 0xF0 | frames >> 32
    header[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(header)


def test_a_header_that_says_less_is_believed() -> None:
    samples, _ = decoded(prepare_audio(with_flac_length(wave(tone(2), format_="FLAC"), 16_000), None, SETTINGS))
    assert len(samples) == 16_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", PairDrop.UNDECODABLE),
        (b"RIFF" + bytes(4) + b"WAVE", PairDrop.HEADER_LIES),
        (b"not a sound at all", PairDrop.UNDECODABLE),
        (wave(tone(), 16_000, "AIFF"), PairDrop.UNSUPPORTED_FORMAT),
        (wave(np.full(16_000, np.nan), 16_000, "WAV", "FLOAT"), PairDrop.NOT_FINITE),
        (wave(np.full(16_000, np.inf), 16_000, "WAV", "FLOAT"), PairDrop.NOT_FINITE),
        (wave(tone(0.49)), PairDrop.TOO_SHORT),
        (wave(tone(31)), PairDrop.TOO_LONG),
        (wave(tone(1, 2_000), 2_000), PairDrop.SAMPLE_RATE),
        (wave(tone(1) * 1e-3), PairDrop.SILENT),
        (wave(np.zeros(16_000)), PairDrop.SILENT),
        (wave(np.clip(tone(1, amplitude=3.0), -1, 1)), PairDrop.CLIPPED),
        (wave(tone(1) * 40, 16_000, "WAV", "FLOAT"), PairDrop.CLIPPED),
    ],
)
def test_bad_sounds_have_a_reason(content: bytes, expected: PairDrop) -> None:
    assert reason(content) == expected


def test_silence_is_a_share_of_the_frames() -> None:
    mostly = np.concatenate([np.zeros(16_000 * 9), tone(1.1)])
    assert isinstance(prepare_audio(wave(mostly), None, SETTINGS), Sound)
    assert reason(wave(np.concatenate([np.zeros(16_000 * 9), tone(0.9)]))) == PairDrop.SILENT


def test_channels_count_against_the_limit() -> None:
    content = wave(np.stack([tone()] * 4, axis=1))
    assert reason(content, AudioSettings(max_samples=63_999)) == PairDrop.TOO_MANY_SAMPLES
    assert isinstance(prepare_audio(content, None, AudioSettings(max_samples=64_000)), Sound)


def test_random_damage_never_raises() -> None:
    rng = np.random.default_rng(0)
    for format_ in ("WAV", "FLAC", "OGG", "MP3"):
        subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(format_, "PCM_16")
        content = wave(tone(0.6), 16_000, format_, subtype)
        for _ in range(40):
            damaged = bytearray(content)
            for place in rng.integers(0, min(len(damaged), 400), 6):
                damaged[place] = rng.integers(0, 256)
            prepare_audio(bytes(damaged), None, SETTINGS)


def test_a_feature_extractor_gets_its_rate(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=16)
    extractor.save_pretrained(tmp_path)
    need = read_processor_need(tmp_path)
    assert need.sampling_rate_hz == 16_000

    samples, rate_hz = decoded(prepare_audio(wave(tone(1, 48_000), 48_000), need.sampling_rate_hz, SETTINGS))

    found = extractor(samples, sampling_rate=rate_hz, return_tensors="np")["input_features"]
    expected = extractor(tone(1, 16_000), sampling_rate=16_000, return_tensors="np")["input_features"]
    loud = expected > expected.max() - 0.5
    assert np.abs(found - expected)[loud].max() < 1e-3


def test_extractors_with_strange_rates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": true}')
    with pytest.raises(UserError, match="sampling_rate"):
        read_processor_need(tmp_path)
