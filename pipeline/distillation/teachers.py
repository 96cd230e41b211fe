"""The teacher: trained here from scratch, or a Hugging Face checkpoint from a folder or the hub."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import PROJECT, located, read_json, write_json
from pipeline.settings_training import CheckpointTeacher, FromScratchTeacher

QUESTION_TEMPLATE = "Question: {{ messages[-1]['content'] }}\nAnswer:"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Where the checkpoint is, as later stages find it in teacher.json."""

    path: str
    load: str
    device_map: str | None
    origin: str


def build_teacher(config: FromScratchTeacher, seed: int) -> Any:
    """A Llama with random weights.

    Args:
        config: Sizes.
        seed: Of the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, tie_word_embeddings=True, max_position_embeddings=2048,
            bos_token_id=1, eos_token_id=1,  # in training every text follows the end of another
        )
    )  # fmt: skip


def resolve_checkpoint(config: CheckpointTeacher) -> Path:
    """The checkpoint's folder; a hub checkpoint is downloaded first (safetensors only, never a pickle).

    Raises:
        UserError: The folder has no config.json or no safetensors, or the hub cannot be reached.
    """
    if config.kind == "hub":
        return _download(config)
    path = located(Path(str(config.path)))
    if not (path / "config.json").is_file():
        raise UserError("teacher.path", str(config.path), "a folder with config.json and *.safetensors")
    if not list(path.glob("*.safetensors")):
        raise UserError("teacher.path", str(config.path), "weights as *.safetensors", "convert .bin files first")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = _indexed_shards(index)
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise UserError("teacher.path", f"missing {', '.join(missing)}", "every shard that the index names")
    return path


def write_source(folder: Path, checkpoint: Path, teacher: CheckpointTeacher) -> TeacherSource:
    """Note in teacher.json where a checkpoint is; one that belongs to the project keeps its name in every clone."""
    source = source_of(checkpoint, teacher)
    shown = checkpoint.relative_to(PROJECT) if checkpoint.is_relative_to(PROJECT) else checkpoint
    write_json(folder / "teacher.json", asdict(replace(source, path=shown.as_posix())))
    return source


def source_of(checkpoint: Path, teacher: CheckpointTeacher) -> TeacherSource:
    """A checkpoint as the settings say to load it."""
    return TeacherSource(str(checkpoint), teacher.load, teacher.device_map, teacher.name or checkpoint.name)


def read_source(folder: Path) -> TeacherSource:
    """What the teacher stage wrote; the path of a teacher trained here (``.``) is the folder of teacher.json."""
    source = TeacherSource(**read_json(folder / "teacher.json"))
    return replace(source, path=str(folder if source.path == "." else PROJECT / source.path))


def load_checkpoint(source: TeacherSource, load: str | None = None) -> Any:
    """Load a checkpoint for inference, on the GPU if there is one.

    fp32, bf16, bf16 with float8 layers (``float8_teacher``), or 8 and 4 bits through bitsandbytes.

    Args:
        source: Where it is and how to load it.
        load: Instead of ``source.load`` (pruning needs float weights).

    Raises:
        UserError: The architecture is not one we take, or 8 and 4 bits do not work on this machine.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from pipeline.distillation.float8_teacher import quantize_teacher
    from pipeline.distillation.parallel import join_processes

    load, several = load or source.load, join_processes().count > 1
    if several and source.device_map is not None:
        raise UserError("teacher.device_map", source.device_map, "null under torchrun: each process has a device")
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    if source.device_map is not None:
        options["device_map"] = source.device_map
    if load in ("int8", "int4"):
        options["quantization_config"] = _bits_config(load)
        options.setdefault("device_map", _one_device() if several or not torch.cuda.is_available() else "auto")
    options["dtype"] = torch.float32 if load == "fp32" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(source.path, **options).eval()
        if "device_map" not in options and torch.cuda.is_available():
            model.to("cuda")
        if load == "float8":
            quantize_teacher(model)
        if "quantization_config" in options:  # kernels that are missing, or refuse a size, show only when they run
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
        return model
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError("teacher.load", load, f"what this machine can load ({message})", "try bf16") from error


def _one_device() -> dict[str, Any]:
    import torch

    return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}


def save_tokenizer(path: Path, output: Path) -> None:
    """Copy a checkpoint's tokenizer as tokenizer.json and chat_template.jinja.

    Raises:
        UserError: The tokenizer has no fast form.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("teacher", type(tokenizer).__name__, "a tokenizer with tokenizer.json", "convert it first")
    backend.save(str(output / "tokenizer.json"))
    if isinstance(tokenizer.chat_template, str):
        (output / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def eos_ids(model_config: Any) -> list[int]:
    """End-of-text ids of a transformers config.

    Raises:
        UserError: It names none.
    """
    eos = model_config.eos_token_id
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    if not ids:
        raise UserError("teacher", "no eos_token_id", "a config.json that names one", "add eos_token_id to it")
    return ids


def _indexed_shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError("teacher.path", str(index), "an index with a weight_map", "download it again") from None


def _bits_config(load: str) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "teacher.load", load, "fp32 or bf16 without bitsandbytes", "pip install bitsandbytes"
        ) from error
    import torch

    if load == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _download(config: CheckpointTeacher) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    os.environ["HF_HUB_OFFLINE"] = "0"
    try:
        return Path(snapshot_download(str(config.name), revision=config.revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(
            "teacher.name", config.name, f"a checkpoint that the hub serves ({message})",
            "check the name and the network, or use teacher=local teacher.path=DIR",
        ) from error  # fmt: skip
