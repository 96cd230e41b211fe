from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from edge_runtime.formats.errors import UserError
from pipeline.data.multimodal import cleaning
from pipeline.data.multimodal.audio import AudioSettings
from pipeline.data.multimodal.cleaning import PairSettings, PairsReport, clean_pairs
from pipeline.data.multimodal.images import ImageSettings
from pipeline.data.multimodal.preparing import CaptionSettings
from pipeline.data.multimodal.tar_shards import ShardWriter
from tests.pipeline.media_cases import (
    lying_wave,
    png_bomb,
    saved,
    scene,
    text_bomb,
    wave,
    with_metadata,
    write_corpus,
    write_rows,
)

SETTINGS = PairSettings(held_out_modulus=4, image=ImageSettings(format="png"), shard_bytes=1 << 18)


def run(folder: Path, settings: PairSettings = SETTINGS, output: str = "out") -> PairsReport:
    return clean_pairs(folder / "in", folder / output, settings, folder / f"{output}-checkpoint")


def samples(folder: Path) -> list[dict[str, Any]]:
    """What webdataset reads, train before held-out."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"), key=lambda path: (path.name[0] != "t", path.name))]
    read = [dict(sample) for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]
    gc.collect()
    return read


def tree(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# webdataset leaves closing to the collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_good_pairs_arrive_with_their_texts(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=20, sounds=6)

    report = run(tmp_path)

    assert (report.pairs, report.kept, report.dropped) == (26, 26, {})
    assert report.media == {"image": 20, "audio": 6}
    read = samples(tmp_path / "out")
    assert len(read) == 26 and len({sample["__key__"] for sample in read}) == 26
    held_out = [sample for sample in read if "held_out" in sample["__url__"]]
    assert len(held_out) == report.held_out and 0 < report.held_out < 26
    for sample in read:
        text = sample["txt"].decode()
        row = int(sample["__key__"])
        assert (f"number {row}," in text) if row < 20 else (f"{300 + 40 * (row - 20)} hertz" in text)
        digest = hashlib.sha256(sample["txt"]).digest()
        assert (int.from_bytes(digest, "big") % 4 == 0) == (sample in held_out)
        facts = json.loads(sample["json"])
        assert facts["row"] == row and facts["document"] == digest.hex()[:16]
        if "png" in sample:
            assert Image.open(io.BytesIO(sample["png"])).size == (facts["width"], facts["height"]) == (160, 120)
        else:
            decoded, rate_hz = soundfile.read(io.BytesIO(sample["flac"]))
            assert rate_hz == facts["sampling_rate_hz"] == 16_000 and len(decoded) == 16_000 * facts["duration_s"]
    shards = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert shards == report.shards
    assert sum(shard["samples"] for shard in shards.values()) == 26
    assert {name: shard["sha256"] for name, shard in shards.items()} == {
        name: digest for name, digest in tree(tmp_path / "out").items() if name.endswith(".tar")
    }


def test_hugging_face_processors_take_what_the_shards_hold(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    write_corpus(tmp_path / "in", pictures=3, sounds=2)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    extractor = WhisperFeatureExtractor(feature_size=16)
    (tmp_path / "processor").mkdir()
    both = {**extractor.to_dict(), **processor.to_dict(), "mel_filters": None}
    (tmp_path / "processor" / "preprocessor_config.json").write_text(json.dumps(both, default=int))

    slow = AudioSettings(sampling_rate_hz=8_000)  # the processor's rate counts
    run(tmp_path, replace(SETTINGS, processor=tmp_path / "processor", audio=slow))

    for sample in samples(tmp_path / "out"):
        if "png" in sample:
            stored = Image.open(io.BytesIO(sample["png"]))
            original = Image.open(tmp_path / "in" / f"{int(sample['__key__'])}.jpg")
            assert stored.size == (64, 64)
            found, expected = (processor(image)["pixel_values"][0] for image in (stored, original))
            assert np.abs(found - expected).max() < 0.2  # a JPEG is decoded at a fraction of its size
        else:
            decoded, rate_hz = soundfile.read(io.BytesIO(sample["flac"]))
            assert extractor(decoded, sampling_rate=rate_hz)["input_features"].shape == (1, 16, 3_000)


def test_every_bad_pair_is_counted_by_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_corpus(folder, pictures=4)
    (tmp_path / "outside.jpg").write_bytes(saved(scene(50)))
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    os.mkfifo(folder / "device.jpg")
    animated = saved(scene(51), "GIF", save_all=True, append_images=[scene(52)])
    files = {
        "cut.jpg": saved(scene(53))[:900], "bomb.png": png_bomb(), "text.png": text_bomb(scene(54)),
        "moving.gif": animated, "lies.wav": lying_wave(), "quiet.wav": wave(np.zeros(16_000)),
        "nan.wav": wave(np.full(16_000, np.nan), subtype="FLOAT"), "again.jpg": saved(scene(0), quality=92),
        "similar.jpg": saved(scene(1), quality=60), "large.png": saved(noise(300), "PNG"),
        "é 图.jpg": saved(scene(55)),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows: list[Any] = [
        {"image": "../outside.jpg", "text": "Outside by dots."},
        {"image": str(tmp_path / "outside.jpg"), "text": "Absolute."},
        {"image": "link.jpg", "text": "A link to the outside."}, {"image": "device.jpg", "text": "A named pipe."},
        {"image": "nothing.jpg", "text": "Not there."}, {"image": "0.jpg", "audio": "lies.wav", "text": "Both."},
        {"image": "é 图.jpg", "text": "A name in Unicode.", "key": "ключ"}, {"image": "large.png", "text": "x"},
        {"image": "3.jpg", "text": "A key again, other picture.", "key": "ключ"},
        *({"audio" if name.endswith("wav") else "image": name, "text": f"A file called {name}."}
          for name in files if name[0] != "é"),
    ]  # fmt: skip
    write_rows(folder, rows, "zzz.jsonl")

    report = run(tmp_path, replace(SETTINGS, image=replace(SETTINGS.image, max_file_bytes=100_000)))

    assert report.dropped == {
        "path_outside": 2, "symlink": 1, "not_a_file": 1, "missing_file": 1, "bad_row": 1, "caption_too_short": 1,
        "duplicate_key": 1, "undecodable": 1, "too_many_pixels": 1, "metadata_too_large": 1, "animated": 1,
        "header_lies": 1, "not_finite": 1, "duplicate": 1, "near_duplicate": 1, "file_too_large": 1, "silent": 1,
    }  # fmt: skip
    assert report.kept == 5 and report.pairs == report.kept + sum(report.dropped.values())
    assert report.examples["path_outside"] == ["zzz.jsonl:1", "zzz.jsonl:2"]
    assert all(len(examples) <= 3 for examples in report.examples.values())
    assert {int(sample["__key__"]) for sample in samples(tmp_path / "out")} == {0, 1, 2, 3, 10}


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_personal_data_leaves_neither_by_text_nor_by_metadata_nor_by_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "john.smith.jpg").write_bytes(with_metadata(scene(1), "JPEG"))
    write_rows(tmp_path / "in", [{"image": "john.smith.jpg", "text": "Portrait: ask john.smith@post.uio.no for it."}])

    report = run(tmp_path)

    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.tar"))
    for secret in (b"SECRET", b"john.smith", b"uio.no", b"Exif"):
        assert secret not in stored
    assert sum(report.pii.values()) == 1
    with pytest.raises(UserError, match="caption_personal_data 1"):
        run(tmp_path, replace(SETTINGS, caption=CaptionSettings(pii="drop")), "dropped")
    run(tmp_path, replace(SETTINGS, caption=CaptionSettings(pii="off")), "off")
    assert b"john.smith@post.uio.no" in samples(tmp_path / "off")[0]["txt"]


def test_the_first_of_duplicates_wins_and_sounds_have_them_too(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=2, sounds=2)
    write_rows(
        tmp_path / "in", [{"audio": "1.wav", "text": "Heard before."}, {"image": "0.jpg", "text": "Seen."}], "z.jsonl"
    )
    report = run(tmp_path)
    assert report.dropped == {"duplicate": 2} and report.examples["duplicate"] == ["z.jsonl:1", "z.jsonl:2"]
    (tmp_path / "in" / "z.jsonl").rename(tmp_path / "in" / "a.jsonl")
    report = run(tmp_path, output="reversed")
    assert report.examples["duplicate"] == ["pairs.jsonl:1", "pairs.jsonl:4"]


def test_near_duplicates_can_be_kept(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=1)
    (tmp_path / "in" / "similar.jpg").write_bytes(saved(scene(0), quality=60))
    write_rows(tmp_path / "in", [{"image": "similar.jpg", "text": "The same again."}], "z.jsonl")
    assert run(tmp_path).dropped == {"near_duplicate": 1}
    assert run(tmp_path, replace(SETTINGS, near_duplicate_bits=None), "all").kept == 2


class Killed(BaseException):
    """What a test ends a run with, wherever it is."""


@pytest.mark.parametrize("rows", [1, 5, 9, 16, 29])
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(cleaning, "_COMMIT_ROWS", 8)
    settings = replace(SETTINGS, shard_bytes=1 << 16, image=ImageSettings(format="jpg"))
    write_corpus(tmp_path / "in", pictures=24, sounds=6)
    run(tmp_path, settings, "whole")

    def stop(done: int, text: str = "") -> None:
        if done == rows:
            raise Killed

    with pytest.raises(Killed):
        clean_pairs(tmp_path / "in", tmp_path / "out", settings, tmp_path / "out-checkpoint", stop)
    assert not (tmp_path / "out").exists()
    first: list[int] = []
    report = clean_pairs(
        tmp_path / "in",
        tmp_path / "out",
        settings,
        tmp_path / "out-checkpoint",
        lambda done, text="": first.append(done),
    )

    assert first[0] == rows // 8 * 8 + 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole") and len(tree(tmp_path / "out")) > 4
    assert report == run(tmp_path, settings, "whole")  # nothing is left to do: the report is read from the checkpoint


def test_a_run_killed_while_shards_are_named_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "in", pictures=12)
    run(tmp_path, output="whole")
    commit = cleaning._commit

    def stop(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(cleaning, "_commit", stop)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.setattr(cleaning, "_commit", commit)
    run(tmp_path)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "_COMMIT_ROWS", 4)
    write_corpus(tmp_path / "in", pictures=12)
    run(tmp_path, output="whole")
    append = ShardWriter.append

    def full(self: ShardWriter, key: str, members: Any) -> None:
        if key == "000000009":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, key, members)

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    monkeypatch.setattr(ShardWriter, "append", append)
    run(tmp_path)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=2)
    (tmp_path / "out-checkpoint").mkdir()
    (tmp_path / "out-checkpoint" / "seen.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="checkpoint"):
        run(tmp_path)


def test_several_workers_write_the_same_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=9, sounds=3)
    alone = run(tmp_path, output="alone")
    together = run(tmp_path, replace(SETTINGS, workers=2), "together")
    assert alone == together and tree(tmp_path / "alone") == tree(tmp_path / "together")


def crash_at_three(row: Any, preparation: Any) -> Any:
    """A decoder that takes its process with it."""
    if row.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return cleaning.prepare(row, preparation)


def test_a_crashing_decoder_costs_its_pair_and_no_other(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=5)
    rows = iter(cleaning.read_pairs(tmp_path / "in"))
    preparation = cleaning.Preparation(
        tmp_path / "in", cleaning.ProcessorNeed(), CaptionSettings(), ImageSettings(), AudioSettings()
    )
    results = list(cleaning._map(partial(crash_at_three, preparation=preparation), rows, 2))
    assert [row.number for row, _ in results] == list(range(5))
    refused = [(row.number, result.reason) for row, result in results if isinstance(result, cleaning.Refused)]
    assert refused == [(3, "decoder_crashed")]


def test_a_checkpoint_of_other_work_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", pictures=2)
    run(tmp_path)
    run(tmp_path, replace(SETTINGS, workers=2))
    with pytest.raises(UserError, match="checkpoint"):
        run(tmp_path, replace(SETTINGS, near_duplicate_bits=None))
    write_rows(tmp_path / "in", [{"image": "0.jpg", "text": "One more row."}], "z.jsonl")
    with pytest.raises(UserError, match="checkpoint"):
        run(tmp_path)


def test_nothing_kept_is_a_user_error_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in", [{"image": "1.jpg", "text": "There is no file."}, {"picture": 1}])
    with pytest.raises(UserError, match="2 rows, none kept") as caught:
        run(tmp_path)
    assert "missing_file 1" in str(caught.value) and "bad_row 1" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"held_out_modulus": 1}, {"near_duplicate_bits": 16}, {"shard_bytes": 10}, {"workers": 0}]
)
def test_settings_outside_their_range_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(change))}"):
        run(tmp_path, replace(SETTINGS, **change))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = [peak_bytes(tmp_path / str(pictures), pictures) for pictures in (50, 500)]
    assert peaks[1] - peaks[0] < 4 << 20


def peak_bytes(folder: Path, pictures: int) -> int:
    (folder / "in").mkdir(parents=True)
    for number in range(pictures):
        (folder / "in" / f"{number}.png").write_bytes(saved(noise(64, number), "PNG"))
    write_rows(
        folder / "in", ({"image": f"{number}.png", "text": f"Noise number {number}."} for number in range(pictures))
    )
    code = (
        "import resource, sys; from pathlib import Path; from pipeline.data.multimodal.cleaning import *;"
        "report = clean_pairs(Path('in'), Path('out'), PairSettings(), Path('checkpoint'));"
        "print(report.kept, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, peak = done.stdout.split()
    assert int(kept) == pictures
    return int(peak)
