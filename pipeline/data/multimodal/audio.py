"""One sound: header checked, decoded in pieces, mixed to one channel, resampled, written without any metadata."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.multimodal.pairs import PairDrop, Refused
from pipeline.data.multimodal.resampling import resample, resamples

_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG")  # libsndfile's names; it reads some 20 more that nobody needs
_BLOCK_FRAMES = 65_536
_SILENCE_FRAME_S = 0.025
_FULL_SCALE = 0.999
_STREAMED = (0, 0xFFFFFFFF)  # sizes of a WAV that was written to a pipe


@dataclass(frozen=True, slots=True)
class AudioSettings:
    """What a sound must be and what it becomes.

    Attributes:
        max_file_bytes: Larger files are not read.
        max_samples: Frames times channels as the header says, before decoding.
        min_rate_hz: Sampling rate of the source, from.
        max_rate_hz: Sampling rate of the source, to.
        min_s: Shortest, in seconds.
        max_s: Longest, in seconds.
        silence_dbfs: A frame of 25 ms whose root mean square is below this is silent; full scale is 0.
        max_silence_ratio: Of all frames, 0 to 1.
        max_clipped_ratio: Of all samples, 0 to 1; clipped is 0.999 of full scale and above.
        sampling_rate_hz: Of the result, unless a processor says another.
        format: ``flac`` (no loss, 16 bits) or ``wav`` (16 bits).
    """

    max_file_bytes: int = 64 << 20
    max_samples: int = 60_000_000
    min_rate_hz: int = 4_000
    max_rate_hz: int = 192_000
    min_s: float = 0.5
    max_s: float = 30.0
    silence_dbfs: float = -50.0
    max_silence_ratio: float = 0.9
    max_clipped_ratio: float = 0.01
    sampling_rate_hz: int = 16_000
    format: Literal["flac", "wav"] = "flac"


@dataclass(frozen=True, slots=True)
class Sound:
    """A prepared sound: file content, length in frames and rate."""

    content: bytes
    frames: int
    sampling_rate_hz: int


def prepare_audio(content: bytes, sampling_rate_hz: int | None, settings: AudioSettings) -> Sound | Refused:
    """Check and rewrite one sound: one channel, 16 bits, at the rate a processor wants, no tags, no pictures.

    Duration, channels and rate are checked on the header; decoding then stops at what the header said,
    so that a header which lies costs nothing.

    Args:
        content: A WAV, FLAC, Ogg (Vorbis, Opus) or MP3 file.
        sampling_rate_hz: A processor's; None: as the settings say.
        settings: Limits and the format written.
    """
    import soundfile

    if _wav_is_cut(content):
        return Refused(PairDrop.HEADER_LIES)
    target_hz = sampling_rate_hz if sampling_rate_hz is not None else settings.sampling_rate_hz
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            reason = _header_reason(file, target_hz, settings)
            if reason is not None:
                return Refused(reason)
            rate_hz = int(file.samplerate)
            decoded = _decode_mono(file, file.frames)
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        return Refused(PairDrop.UNDECODABLE)
    if isinstance(decoded, Refused):
        return decoded
    reason = _content_reason(decoded, rate_hz, settings)
    if reason is not None:
        return Refused(reason)
    samples = resample(decoded.samples, rate_hz, target_hz)
    return Sound(encode(samples, target_hz, settings), len(samples), target_hz)


def encode(samples: NDArray[np.float32], rate_hz: int, settings: AudioSettings) -> bytes:
    """A mono file of 16 bits; what resampling raised above full scale is limited to it."""
    import soundfile

    whole = np.rint(samples * 32_767.0).clip(-32_768, 32_767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, whole, rate_hz, subtype="PCM_16", format=settings.format.upper())
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class _Decoded:
    samples: NDArray[np.float32]
    clipped: int
    values: int


def _header_reason(file: Any, target_hz: int, settings: AudioSettings) -> PairDrop | None:
    if file.format not in _FORMATS:
        return PairDrop.UNSUPPORTED_FORMAT
    rate_hz = file.samplerate
    if not (settings.min_rate_hz <= rate_hz <= settings.max_rate_hz and resamples(rate_hz, target_hz)):
        return PairDrop.SAMPLE_RATE
    if file.frames * file.channels > settings.max_samples:
        return PairDrop.TOO_MANY_SAMPLES
    if file.frames > settings.max_s * rate_hz:
        return PairDrop.TOO_LONG
    if file.frames < settings.min_s * rate_hz:
        return PairDrop.TOO_SHORT
    return None


def _decode_mono(file: Any, frames: int) -> _Decoded | Refused:
    """The mean of the channels, block by block."""
    blocks: list[NDArray[np.float32]] = []
    clipped = values = read = 0
    while read < frames:
        block = file.read(min(_BLOCK_FRAMES, frames - read), dtype="float32", always_2d=True)
        if not len(block):
            return Refused(PairDrop.HEADER_LIES)
        if not np.isfinite(block).all():
            return Refused(PairDrop.NOT_FINITE)
        clipped += int((np.abs(block) >= _FULL_SCALE).sum())
        values += block.size
        read += len(block)
        blocks.append(block.mean(axis=1, dtype=np.float64).astype(np.float32))
    return _Decoded(np.concatenate(blocks), clipped, values)


def _content_reason(decoded: _Decoded, rate_hz: int, settings: AudioSettings) -> PairDrop | None:
    if decoded.clipped > settings.max_clipped_ratio * decoded.values:
        return PairDrop.CLIPPED
    frame = max(1, round(rate_hz * _SILENCE_FRAME_S))
    whole = decoded.samples[: len(decoded.samples) // frame * frame].reshape(-1, frame)
    power = np.square(whole, dtype=np.float64).mean(axis=1)
    silent = power < 10.0 ** (settings.silence_dbfs / 10)
    if len(silent) and silent.mean() > settings.max_silence_ratio:
        return PairDrop.SILENT
    return None


def _wav_is_cut(content: bytes) -> bool:
    """Whether a WAV's header promises more than the file holds; libsndfile would quietly shorten it."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return False
    offset = 12
    while offset + 8 <= len(content):
        (size,) = struct.unpack_from("<I", content, offset + 4)
        if content[offset : offset + 4] == b"data":
            return size not in _STREAMED and offset + 8 + size > len(content)
        offset += 8 + size + (size & 1)
    return True  # no samples at all
