"""A package opens only when every byte is what its trusted signer sealed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.formats import package as package_module
from edge_runtime.formats.errors import PackageError, SignatureError
from edge_runtime.formats.manifest import MAX_MANIFEST_BYTES, AdapterSlots
from edge_runtime.formats.package import open_package, read_bounded
from edge_runtime.formats.signing import TrustStore, fingerprint, sign
from tests.edge_runtime.fakes import SPEC


def test_a_sealed_package_opens(package_dir: Path, trusted: TrustStore, key: Ed25519PrivateKey) -> None:
    package = open_package(package_dir, trusted)
    assert package.manifest.decoder == SPEC
    assert package.available == ("onnx", "tflite", "tflite_legacy")
    assert package.signer == fingerprint(key.public_key())
    assert package.digest == hashlib.sha256((package_dir / "manifest.json").read_bytes()).hexdigest()
    assert package.path("onnx/weights.bin").read_bytes() == (package_dir / "onnx/weights.bin").read_bytes()
    assert package.container_directory("tflite") == package_dir.resolve() / "tflite"
    assert package.manifest.containers["tflite"].adapters == AdapterSlots(("q_proj", "v_proj"), 8)


def test_the_manifest_states_sizes_and_digests_of_all_files(package_dir: Path) -> None:
    listed = json.loads((package_dir / "manifest.json").read_bytes())["files"]
    found = {path.relative_to(package_dir).as_posix(): path for path in package_dir.rglob("*") if path.is_file()}
    assert set(listed) | {"manifest.json", "manifest.sig"} == set(found)
    for relative, entry in listed.items():
        content = found[relative].read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_sealing_again_gives_the_same_bytes(seal: Callable[..., Path]) -> None:
    first = seal()
    before = [(first / name).read_bytes() for name in ("manifest.json", "manifest.sig")]
    shutil.rmtree(first)
    again = seal()
    assert [(again / name).read_bytes() for name in ("manifest.json", "manifest.sig")] == before


def test_sealing_replaces_an_earlier_seal_and_leaves_nothing_else(
    seal: Callable[..., Path], trusted: TrustStore, unsealed: Path
) -> None:
    seal()
    directory = seal(version="0.2.0", counter=2)
    assert open_package(directory, trusted).manifest.version == "0.2.0"
    made = {path.name for path in directory.iterdir()} - {path.name for path in unsealed.iterdir()}
    assert made == {"manifest.json", "manifest.sig"}


@pytest.mark.parametrize(
    "fields", [{"version": "one"}, {"metrics": {"load_s": 1.0}}, {"containers": {"onnx": AdapterSlots()}}]
)
def test_fields_that_do_not_open_are_not_sealed(
    seal: Callable[..., Path], tmp_path: Path, fields: dict[str, object]
) -> None:
    with pytest.raises(PackageError):
        seal(**fields)
    assert not (tmp_path / "package/manifest.json").exists()


def test_any_flipped_byte_is_found(package_dir: Path, trusted: TrustStore) -> None:
    for path in sorted(path for path in package_dir.rglob("*") if path.is_file()):
        original = path.read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
            with pytest.raises(PackageError, match=path.name.replace("sig", "(sig|json)")):
                open_package(package_dir, trusted)
        path.write_bytes(original)
    open_package(package_dir, trusted)


def test_cut_and_grown_files_are_refused_by_size(package_dir: Path, trusted: TrustStore) -> None:
    path = package_dir / "onnx/weights.bin"
    original = path.read_bytes()
    for content, says in ((original[:-1], "has 2047 bytes"), (b"", "has 0 bytes"), (original * 2, "more than 2048")):
        path.write_bytes(content)
        with pytest.raises(PackageError, match=says):
            open_package(package_dir, trusted)


def test_a_missing_file_outside_containers_is_refused(package_dir: Path, trusted: TrustStore) -> None:
    (package_dir / "README.md").unlink()
    with pytest.raises(PackageError, match=r"README\.md: No such file"):
        open_package(package_dir, trusted)


def test_an_unsigned_package_is_refused(package_dir: Path, trusted: TrustStore) -> None:
    (package_dir / "manifest.sig").unlink()
    with pytest.raises(SignatureError, match="unsigned"):
        open_package(package_dir, trusted)


def test_a_foreign_signer_is_refused_even_with_its_key_inside(seal: Callable[..., Path], trusted: TrustStore) -> None:
    directory = seal(key=Ed25519PrivateKey.generate())
    with pytest.raises(SignatureError, match="not trusted on this machine"):
        open_package(directory, trusted)
    with pytest.raises(SignatureError):
        open_package(directory, TrustStore({}))


def test_a_manifest_is_not_parsed_before_its_signature_holds(
    package_dir: Path, trusted: TrustStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_module, "decode_manifest", lambda raw: pytest.fail("parsed unverified bytes"))
    path = package_dir / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"counter": 1', b'"counter": 2'))
    with pytest.raises(SignatureError, match="changed after it was signed"):
        open_package(package_dir, trusted)


def test_a_signed_manifest_is_still_checked(package_dir: Path, trusted: TrustStore, key: Ed25519PrivateKey) -> None:
    path = package_dir / "manifest.json"
    raw = path.read_bytes().replace(b"README.md", b"../E.md")
    path.write_bytes(raw)
    (package_dir / "manifest.sig").write_bytes(sign(raw, key))
    with pytest.raises(PackageError, match="plain relative paths"):
        open_package(package_dir, trusted)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_oversized_signed_files_are_not_read_to_the_end(package_dir: Path, trusted: TrustStore, name: str) -> None:
    with (package_dir / name).open("r+b") as file:
        file.truncate(8 * MAX_MANIFEST_BYTES << 10)  # sparse: gigabytes that cost no disk
    with pytest.raises(PackageError, match=f"{name}: longer than"):
        open_package(package_dir, trusted)


@pytest.mark.parametrize("extra", ["notes.txt", "onnx/extra.bin", "other/model.gguf", ".hidden"])
def test_an_unlisted_file_is_refused(package_dir: Path, trusted: TrustStore, extra: str) -> None:
    (package_dir / extra).parent.mkdir(exist_ok=True)
    (package_dir / extra).write_bytes(b"")
    with pytest.raises(PackageError, match="not listed in the manifest"):
        open_package(package_dir, trusted)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX file kinds")
@pytest.mark.parametrize("relative", ["README.md", "onnx/weights.bin", "manifest.json", "manifest.sig", "tflite"])
def test_links_and_devices_are_refused(package_dir: Path, trusted: TrustStore, tmp_path: Path, relative: str) -> None:
    target = tmp_path / "elsewhere"
    (package_dir / relative).rename(target)
    (package_dir / relative).symlink_to(target)
    with pytest.raises(PackageError, match="a link"):
        open_package(package_dir, trusted)
    (package_dir / relative).unlink()
    os.mkfifo(package_dir / relative)
    with pytest.raises(PackageError, match=r"link or device|not a plain file"):
        open_package(package_dir, trusted)


def test_the_package_directory_itself_may_be_a_link(package_dir: Path, trusted: TrustStore, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(package_dir)
    assert open_package(tmp_path / "current", trusted).directory == package_dir.resolve()


def test_links_are_not_sealed(package_dir: Path, seal: Callable[..., Path]) -> None:
    (package_dir / "linked.md").symlink_to(package_dir / "README.md")
    with pytest.raises(PackageError, match=r"linked\.md: a link"):
        seal()


def test_a_device_may_hold_only_some_containers(package_dir: Path, trusted: TrustStore) -> None:
    shutil.rmtree(package_dir / "onnx")
    package = open_package(package_dir, trusted)
    assert package.available == ("tflite", "tflite_legacy")
    with pytest.raises(PackageError, match=r"container onnx is not here \(here: tflite tflite_legacy\)"):
        package.container_directory("onnx")
    with pytest.raises(PackageError, match="not a verified file"):
        package.path("onnx/model.onnx")


def test_a_container_that_is_here_in_part_is_refused(package_dir: Path, trusted: TrustStore) -> None:
    (package_dir / "onnx/weights.bin").unlink()
    with pytest.raises(PackageError, match=r"weights\.bin: missing, container onnx is here in part"):
        open_package(package_dir, trusted)


def test_only_the_asked_containers_are_verified_and_offered(package_dir: Path, trusted: TrustStore) -> None:
    (package_dir / "onnx/weights.bin").write_bytes(b"damaged")
    package = open_package(package_dir, trusted, containers=("tflite",))
    assert package.available == ("tflite",)
    with pytest.raises(PackageError, match="not a verified file"):
        package.path("onnx/weights.bin")


def test_a_place_without_a_package_says_so(tmp_path: Path, trusted: TrustStore) -> None:
    with pytest.raises(PackageError, match="no package here"):
        open_package(tmp_path / "absent", trusted)


def test_reading_stops_at_the_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(PackageError, match="longer than 4 bytes"):
        read_bounded(tmp_path / "file", 4)
