from __future__ import annotations

import gc
import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data.multimodal.seen import open_seen
from pipeline.data.multimodal.tar_shards import ShardPlace, ShardWriter

SAMPLES = {f"{number:09d}": {"jpg": bytes([number]) * (number * 97), "txt": b"text"} for number in range(40)}


def write_all(folder: Path, max_bytes: int = 10_000) -> ShardWriter:
    writer = ShardWriter(folder, "train", max_bytes)
    for key, members in SAMPLES.items():
        writer.append(key, members)
    writer.finish()
    return writer


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_shards_are_what_tarfile_reads_and_hold_no_clock_and_no_owner(tmp_path: Path) -> None:
    write_all(tmp_path)
    found: dict[str, bytes] = {}
    for path in sorted(tmp_path.iterdir()):
        assert path.suffix == ".tar" and path.stat().st_size <= 10_000
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    assert found == {f"{key}.{suffix}": content for key, files in SAMPLES.items() for suffix, content in files.items()}
    assert len(digests(tmp_path)) >= 8


def test_a_sample_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 4_096)
    for key, size in (("a", 10), ("b", 9_000), ("c", 10)):
        writer.append(key, {"bin": bytes(size)})
    writer.finish()
    assert [names(path) for path in sorted(tmp_path.iterdir())] == [["a.bin"], ["b.bin"], ["c.bin"]]


def names(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_nothing_has_its_final_name_before_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 1 << 20)
    writer.append("a", {"txt": b"a"})
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar.partial"]
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize("noted", [0, 1, 7, 13, 26, 39])
@pytest.mark.parametrize("lost", [0, 1, 6, 12])
def test_a_writer_goes_on_from_any_place(tmp_path: Path, noted: int, lost: int) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    write_all(whole)
    killed, place = ShardWriter(folder, "train", 10_000), ShardPlace()
    other = ShardWriter(folder, "held_out", 10_000)
    other.append("z", {"txt": b"other"})
    for number, (key, members) in enumerate(list(SAMPLES.items())[: noted + lost]):
        if number == noted:
            place = killed.flush()
        killed.append(key, members)
    if not lost:
        place = killed.flush()
    killed.flush()
    killed.close()

    writer = ShardWriter(folder, "train", 10_000)
    writer.resume(place)
    for key, members in list(SAMPLES.items())[noted:]:
        writer.append(key, members)
    writer.finish()
    other.close()
    (folder / "held_out-000000.tar.partial").unlink()

    assert digests(folder) == digests(whole)


def test_a_folder_that_lost_a_shard_is_refused(tmp_path: Path) -> None:
    place = write_all(tmp_path).place
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(UserError, match="checkpoint"):
        ShardWriter(tmp_path, "train", 10_000).resume(place)
    with pytest.raises(UserError, match="checkpoint"):
        ShardWriter(tmp_path, "train", 10_000).resume(ShardPlace(0, 3, 10**6))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves closing to the collector
def test_webdataset_reads_the_samples(tmp_path: Path) -> None:
    import webdataset

    write_all(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.iterdir())]
    found = {
        sample["__key__"]: {"jpg": sample["jpg"], "txt": sample["txt"]}
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    }
    gc.collect()
    assert found == SAMPLES


@pytest.mark.parametrize("bits", [0, 3, 4, 15])
def test_similar_hashes_are_found_exactly_when_few_bits_differ(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(bits)
    with open_seen(tmp_path / "seen.sqlite") as seen:
        for _ in range(60):
            known = int.from_bytes(rng.bytes(8), "big")
            seen.add_similar(known, bits)
            for differing in {0, bits, bits + 1}:
                places = rng.choice(64, differing, replace=False)
                assert seen.has_similar(known ^ sum(1 << int(place) for place in places), bits) == (differing <= bits)


def test_only_what_was_committed_is_remembered(tmp_path: Path) -> None:
    with open_seen(tmp_path / "seen.sqlite") as seen:
        assert seen.load() is None
        assert seen.add("key", b"a") and not seen.add("key", b"a") and seen.add("other", b"a")
        seen.commit({"rows": 1})
        seen.add("key", b"b")
        seen.add_similar(5, 4)
    with open_seen(tmp_path / "seen.sqlite") as seen:
        assert seen.load() == {"rows": 1}
        assert seen.has("key", b"a") and not seen.has("key", b"b") and not seen.has_similar(5, 4)
