"""One pair from its row to what a shard holds, or the reason why not: what each worker process does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.data.language import identify
from pipeline.data.multimodal.audio import AudioSettings, prepare_audio
from pipeline.data.multimodal.images import ImageSettings, prepare_image
from pipeline.data.multimodal.pairs import BadRow, Pair, PairDrop, Refused, read_inside
from pipeline.data.multimodal.processors import ProcessorNeed
from pipeline.data.normalize import normalize
from pipeline.data.pii import scrub
from pipeline.data.rules import Drop, apply_rules, basic_rules, web_rules


@dataclass(frozen=True, slots=True)
class CaptionSettings:
    """What a caption or transcript must be.

    Attributes:
        min_chars: After normalising.
        max_chars: After normalising.
        rules: ``basic`` or ``web`` (Gopher and C4; hard on short texts).
        pii: Personal data: ``replace`` by a placeholder, ``drop`` the pair, or ``off``.
    """

    min_chars: int = 3
    max_chars: int = 10_000
    rules: Literal["basic", "web"] = "basic"
    pii: Literal["off", "replace", "drop"] = "replace"


@dataclass(frozen=True, slots=True)
class Preparation:
    """Everything that the result of a pair depends on besides its row and its file."""

    root: Path
    need: ProcessorNeed
    caption: CaptionSettings
    image: ImageSettings
    audio: AudioSettings


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pair that is kept unless an earlier one is its duplicate.

    Attributes:
        suffix: Of the medium's file.
        content: The medium's file.
        text: Clean caption.
        facts: Sizes, for the sample's JSON.
        pii: Replacements by kind.
        perceptual_hash: 64 bits of a picture, None for a sound.
    """

    suffix: str
    content: bytes
    text: str
    facts: dict[str, int | float | str]
    pii: dict[str, int] = field(default_factory=dict)
    perceptual_hash: int | None = None

    @property
    def text_digest(self) -> bytes:
        """sha256 of the clean text, by which the held-out split is made."""
        return hashlib.sha256(self.text.encode()).digest()


def prepare(row: Pair | BadRow, preparation: Preparation) -> Prepared | Refused:
    """Clean a row's text, then read and rewrite its medium; the cheap half comes first."""
    if isinstance(row, BadRow):
        return Refused(PairDrop.BAD_ROW)
    caption = clean_caption(row.text, preparation.caption)
    if isinstance(caption, Refused):
        return caption
    text, pii = caption
    limit = preparation.image.max_file_bytes if row.medium == "image" else preparation.audio.max_file_bytes
    content = read_inside(preparation.root, row.path, limit)
    if isinstance(content, Refused):
        return content
    if row.medium == "image":
        picture = prepare_image(content, preparation.need.image, preparation.image)
        if isinstance(picture, Refused):
            return picture
        facts: dict[str, int | float | str] = {"width": picture.width, "height": picture.height}
        return Prepared(preparation.image.format, picture.content, text, facts, pii, picture.perceptual_hash)
    sound = prepare_audio(content, preparation.need.sampling_rate_hz, preparation.audio)
    if isinstance(sound, Refused):
        return sound
    facts = {"sampling_rate_hz": sound.sampling_rate_hz, "duration_s": sound.frames / sound.sampling_rate_hz}
    return Prepared(preparation.audio.format, sound.content, text, facts, pii)


def clean_caption(text: str, settings: CaptionSettings) -> tuple[str, dict[str, int]] | Refused:
    """The text normalised, judged by the same rules as documents, and scrubbed; replacements by kind."""
    text = normalize(text)
    web = settings.rules == "web"
    rules = (web_rules if web else basic_rules)(settings.min_chars, settings.max_chars)
    verdict = apply_rules(text, identify(text).code if web else "", rules)
    if isinstance(verdict, Drop):
        return Refused(f"caption_{verdict.reason}")
    if settings.pii == "off":
        return verdict.text, {}
    scrubbed = scrub(verdict.text)
    if scrubbed.counts and settings.pii == "drop":
        return Refused(PairDrop.PERSONAL_DATA)
    return scrubbed.text, scrubbed.counts
