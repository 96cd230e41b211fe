"""Small signed packages and keys of a test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.formats.manifest import AdapterSlots
from edge_runtime.formats.package import seal_package
from edge_runtime.formats.signing import TrustStore, fingerprint, signing_key
from tests.edge_runtime.fakes import BOS, EOS, SPEC, byte_tokenizer

BASE_DIGEST = "ab" * 32
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTAINERS = {
    "onnx": AdapterSlots(("q_proj", "v_proj")),
    "tflite": AdapterSlots(("q_proj", "v_proj"), 8),
    "tflite_legacy": AdapterSlots(),
}
FILES = {
    "README.md": b"# tiny\n",
    "chat_template.jinja": TEMPLATE.encode(),
    "onnx/model.onnx": b"graph",
    "onnx/model_lora.onnx": b"graph with slots",
    "onnx/weights.bin": bytes(range(256)) * 8,
    "tflite/model.tflite": b"flat" * 100,
    "tflite_legacy/model.tflite": b"old" * 100,
}


@pytest.fixture
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's keys, fresh for one test."""
    directory = tmp_path / "config"
    monkeypatch.setenv("SEVENFOLD_CONFIG_DIR", str(directory))
    return directory


@pytest.fixture
def key(config_dir: Path) -> Ed25519PrivateKey:
    return signing_key(config_dir)


@pytest.fixture
def trusted(key: Ed25519PrivateKey) -> TrustStore:
    return TrustStore({fingerprint(key.public_key()): key.public_key()})


@pytest.fixture(scope="session")
def unsealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package's files before they are sealed."""
    directory = tmp_path_factory.mktemp("unsealed")
    for relative, content in FILES.items():
        (directory / relative).parent.mkdir(exist_ok=True)
        (directory / relative).write_bytes(content)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def seal(unsealed: Path, tmp_path: Path, key: Ed25519PrivateKey) -> Callable[..., Path]:
    """Make a package; arguments replace the fields of ``seal_package``."""

    def make(**fields: object) -> Path:
        directory = tmp_path / "package"
        shutil.copytree(unsealed, directory, dirs_exist_ok=True)
        values: dict[str, object] = {
            "name": "tiny",
            "version": "0.1.0",
            "counter": 1,
            "base_digest": BASE_DIGEST,
            "decoder": SPEC,
            "bos": BOS,
            "eos": (EOS,),
            "containers": CONTAINERS,
            "licence": "Apache-2.0",
            "metrics": {"onnx.perplexity": 12.5},
            "key": key,
        }
        seal_package(directory, **(values | fields))  # type: ignore[arg-type]
        return directory

    return make


@pytest.fixture
def package_dir(seal: Callable[..., Path]) -> Path:
    return seal()
