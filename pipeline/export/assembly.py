"""Folders that become packages: the files of a submodel, sealed for trial or for shipping."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec
from edge_runtime.formats.errors import UserError
from edge_runtime.formats.manifest import AdapterSlots, Manifest
from edge_runtime.formats.package import seal_package
from edge_runtime.formats.signing import signing_key
from pipeline.artifacts import PROJECT, file_digest, link_or_copy, read_json
from pipeline.settings import RUN_CONTAINERS, Config

EXPORT_FILE = "export.json"
WEIGHTS_FILE, LEGACY_FILE = "weights.safetensors", "legacy.safetensors"
MODEL_CARD = "README.md"


def legacy_python(config: Config) -> Path:
    """The interpreter of the numpy<2 environment; a relative path counts from the project."""
    return PROJECT / config.export.legacy_python


def require_legacy_python(config: Config) -> None:
    """Refuse early what could not be verified at the end.

    Raises:
        UserError: The legacy container is wanted and its environment is missing.
    """
    if "tflite_legacy" in config.export.containers and not legacy_python(config).exists():
        raise UserError(
            "export.legacy_python",
            str(config.export.legacy_python),
            "a Python with tflite-runtime 2.14",
            "make setup, or export.containers=[onnx,tflite]",
        )


def training_containers(config: Config) -> list[str]:
    """Containers that only trainers open: LiteRT's graphs (ONNX's lie beside the decoder), and codes for torch."""
    export = config.export
    graphs = ["tflite_train"] if export.train_buckets and "tflite" in export.containers else []
    return graphs + (["torch"] if export.torch_base else [])


def adapter_slots(config: Config, container: str) -> AdapterSlots:
    """What a container takes: any rank in ONNX, up to a fixed one in TFLite, anything in torch."""
    export = config.export
    if container == "torch":
        return AdapterSlots(PROJECTIONS)
    if not export.lora_targets or container not in (*RUN_CONTAINERS, "tflite_train"):
        return AdapterSlots()
    return AdapterSlots(tuple(export.lora_targets), None if container == "onnx" else export.lora_rank)


def seal(
    directory: Path, config: Config, *, exports: Path, weights: Path, metrics: Mapping[str, float] | None = None
) -> Manifest:
    """Sign ``directory`` with this machine's key (made at first use)."""
    exported = read_json(exports / EXPORT_FILE)
    return seal_package(
        directory,
        name=config.submodel.name,
        version=config.export.version,
        counter=config.export.counter,
        base_digest=file_digest(weights),
        decoder=DecoderSpec.from_dict(exported["decoder"]),
        bos=exported["bos"],
        eos=exported["eos"],
        containers={
            name: adapter_slots(config, name) for name in [*config.export.containers, *training_containers(config)]
        },
        licence=config.export.licence,
        key=signing_key(),
        metrics=metrics,
    )


@contextmanager
def trial_package(config: Config, *, exports: Path, weights: Path) -> Iterator[Path]:
    """A sealed copy of exported files (hard links where the disk allows), gone when the block ends.

    Measurements run on it, so that they take the same path as a shipped package.
    """
    with TemporaryDirectory(prefix="sevenfold-trial-", dir=exports.parent) as folder:
        package = Path(folder) / "package"
        copy_exports(exports, package, link=True)
        seal(package, config, exports=exports, weights=weights)
        yield package


def copy_exports(exports: Path, package: Path, *, link: bool) -> None:
    """Copy what ships; the stage's own notes stay behind."""
    shutil.copytree(
        exports,
        package,
        ignore=shutil.ignore_patterns(EXPORT_FILE),
        copy_function=link_or_copy if link else shutil.copy2,
    )
