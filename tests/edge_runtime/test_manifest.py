"""One manifest, one byte string; everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.formats.errors import PackageError
from edge_runtime.formats.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    AdapterSlots,
    Container,
    FileEntry,
    Manifest,
    check_paths,
    decode_manifest,
    encode_manifest,
)
from tests.edge_runtime.fakes import BOS, EOS, SPEC

ENTRY = FileEntry(3, "0" * 64)
MANIFEST = Manifest(
    name="tiny",
    version="0.1.0",
    counter=3,
    base_digest="ab" * 32,
    decoder=SPEC,
    bos=BOS,
    eos=(EOS,),
    containers={
        "onnx": Container(("onnx/model.onnx", "onnx/weights.bin"), AdapterSlots(("q_proj",))),
        "tflite": Container(("tflite/model.tflite",), AdapterSlots(("q_proj",), 8)),
    },
    files={path: ENTRY for path in ("tokenizer.json", "onnx/model.onnx", "onnx/weights.bin", "tflite/model.tflite")},
    licence="Apache-2.0",
    metrics={"onnx.perplexity": 12.5, "params": 1000},
)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest's bytes after a change to its JSON, still in canonical form."""
    top = json.loads(encode_manifest(MANIFEST))
    change(top)
    return (json.dumps(top, sort_keys=True, indent=2) + "\n").encode()


def test_decoding_returns_what_was_encoded() -> None:
    assert decode_manifest(encode_manifest(MANIFEST)) == MANIFEST


def test_bytes_are_canonical_and_follow_from_the_values_alone() -> None:
    raw = encode_manifest(MANIFEST)
    assert raw == changed(lambda top: None)
    shuffled = replace(MANIFEST, files=dict(reversed(MANIFEST.files.items())))
    assert encode_manifest(shuffled) == raw
    assert json.loads(raw)["files"]["tokenizer.json"] == {"size": 3, "sha256": "0" * 64}
    assert json.loads(raw)["tokens"] == {"bos": BOS, "eos": [EOS]}


@pytest.mark.parametrize(
    "respell",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\n",
        lambda raw: raw.replace(b'"counter": 3', b'"counter":  3'),
        lambda raw: json.dumps(json.loads(raw), sort_keys=True).encode(),
        lambda raw: raw.replace(b'"counter": 3', b'"counter": 3,\n  "counter": 3'),
        lambda raw: raw.replace(b"tiny", b"t\\u0069ny"),
        lambda raw: raw.replace(b"12.5", b"12.50"),
        lambda raw: raw.replace(b"12.5", b"NaN"),
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw[:100],
        lambda raw: b"[" * 200_000,
        lambda raw: b"",
    ],
)
def test_a_second_spelling_is_refused(respell: Callable[[bytes], bytes]) -> None:
    with pytest.raises(PackageError, match=r"manifest\.json"):
        decode_manifest(respell(encode_manifest(MANIFEST)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda top: top.update(format=2), "has format 2"),
        (lambda top: top.update(surprise=1), "unknown or missing keys in the manifest: surprise"),
        (lambda top: top.pop("licence"), "unknown or missing keys in the manifest: licence"),
        (lambda top: top.update(name="../tiny"), "name"),
        (lambda top: top.update(version="1.0"), "version"),
        (lambda top: top.update(version="01.0.0"), "version"),
        (lambda top: top.update(counter=-1), "counter"),
        (lambda top: top.update(counter=True), "counter"),
        (lambda top: top.update(counter=1.0), "counter"),
        (lambda top: top.update(base_digest="AB" * 32), "base_digest"),
        (lambda top: top["decoder"].update(num_layers=0), "decoder"),
        (lambda top: top["decoder"].pop("head_dim"), "decoder"),
        (lambda top: top["tokens"].update(bos=258), "tokens.bos"),
        (lambda top: top["tokens"].update(eos=[-1]), "tokens.eos"),
        (lambda top: top["tokens"].update(eos=5), "tokens.eos"),
        (lambda top: top["files"]["tokenizer.json"].update(size=-1), "size of tokenizer.json"),
        (lambda top: top["files"]["tokenizer.json"].update(size=2**40), "size of tokenizer.json"),
        (lambda top: top["files"]["tokenizer.json"].update(sha256="0"), "sha256 of tokenizer.json"),
        (lambda top: top["files"]["tokenizer.json"].update(mtime=0), "mtime"),
        (lambda top: top["files"].pop("tokenizer.json"), "no tokenizer.json"),
        (lambda top: top["files"].pop("onnx/weights.bin"), "container onnx"),
        (lambda top: top["containers"]["onnx"]["files"].append("tokenizer.json"), "container onnx"),
        (lambda top: top["containers"].pop("tflite"), "belongs to no container"),
        (lambda top: top["containers"].update(empty=top["containers"]["onnx"]), "container empty"),
        (lambda top: top["containers"]["onnx"].update(lora_targets=["k"]), "lora_targets"),
        (lambda top: top["containers"]["onnx"].update(lora_targets=["q_proj"] * 2), "lora_targets"),
        (lambda top: top["containers"]["onnx"].update(lora_max_rank=0), "lora_max_rank"),
        (lambda top: top["metrics"].update(load_s=0.1), "load_s"),
        (lambda top: top["metrics"].update({"onnx.tokens_per_s": 1}), "tokens_per_s"),
        (lambda top: top["metrics"].update(kl="low"), "kl"),
        (lambda top: top["metrics"].update(kl=True), "kl"),
        (lambda top: top.update(licence="Apache\n2"), "licence"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(change: Callable[[dict[str, Any]], object], says: str) -> None:
    with pytest.raises(PackageError, match=says.replace(".", r"\.")) as caught:
        decode_manifest(changed(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.txt",
        "../tokenizer.json",
        "onnx/../tokenizer.json",
        "./tokenizer.json",
        "onnx//model.onnx",
        "onnx/",
        "",
        "onnx\\model.onnx",
        "C:tokenizer.json",
        ".hidden.json",
        "onnx/.model.onnx",
        "nul.txt",
        "onnx/COM1.bin",
        "trailing.json.",
        "onnx./model.onnx",
        "spaced name.json",
        "tökenizer.json",
        "model.pkl",
        "adapter.pt",
        "run.sh",
        "no_suffix",
        "manifest.json",
        "a/b/c/d/e.json",
        "x" * 101 + ".json",
        "tokenizer.json\n",
    ],
)
def test_a_path_that_could_mean_something_else_is_refused(path: str) -> None:
    with pytest.raises(PackageError, match="names the file"):
        check_paths(["tokenizer.json", path])


@pytest.mark.parametrize(
    "paths",
    [
        ["a.json", "A.json"],
        ["onnx/a.bin", "Onnx/b.bin"],
        ["a.json/b.json", "a.json"],
        ["a.json", "A.json/b.json"],
    ],
)
def test_paths_that_some_file_systems_merge_are_refused(paths: list[str]) -> None:
    with pytest.raises(PackageError, match="cannot tell them apart"):
        check_paths(paths)


def test_sizes_are_bounded() -> None:
    with pytest.raises(PackageError, match=f"at most {MAX_MANIFEST_BYTES}"):
        decode_manifest(encode_manifest(MANIFEST) + b" " * MAX_MANIFEST_BYTES)
    many = {f"card{index}.md": ENTRY for index in range(MAX_FILES)}
    with pytest.raises(PackageError, match=f"at most {MAX_FILES} are allowed"):
        encode_manifest(replace(MANIFEST, files={**MANIFEST.files, **many}))
    huge = {path: replace(ENTRY, size_bytes=32 << 30) for path in MANIFEST.files}
    with pytest.raises(PackageError, match="adds up to more"):
        encode_manifest(replace(MANIFEST, files=huge))
