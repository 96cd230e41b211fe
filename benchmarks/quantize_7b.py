"""A 7B quantized on a small machine: codes, the ONNX package, GGUF and safetensors beside it, and a first token.

The checkpoint has the shape of Qwen2.5-7B and random bf16 weights in shards; it is made once and kept in the folder
given (15 GB; codes and containers take 4 GB each). Every step runs in a process of its own, whose wall time, CPU
seconds of all threads and peak memory (imports included) are printed as soon as it ends. Rows "rtn" and "mse" are end
to end: shards, codes, the ONNX package and its reading back. "first_token" runs the package written last.

    python benchmarks/quantize_7b.py FOLDER --threads 2
    taskset -c 0,1 python benchmarks/quantize_7b.py FOLDER --threads 2 --limit-s 570     two cores of a larger machine
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edge_runtime.formats.int4 import load_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
CONTEXT_TOKENS = 4096
SHARD_BYTES = 4_000_000_000
POOL_WEIGHTS = 16_777_259  # a prime: rows of no width repeat
PROMPT_TOKENS, NEW_TOKENS = 16, 8
COLUMNS = ("step", "wall s", "CPU s", "peak RSS GB", "read GB", "written GB", "MB/s", "of it")


@dataclass(frozen=True, slots=True)
class Task:
    """What a step works on."""

    folder: Path
    shape: Mapping[str, Any]
    group: int
    threads: int

    @property
    def checkpoint(self) -> Path:
        """The bf16 shards."""
        return self.folder / "checkpoint"

    def codes(self, rounding: str = "mse") -> Path:
        """What containers are written from."""
        return self.folder / f"{rounding}.safetensors"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step has read and written, and how its time divides."""

    read_bytes: int = 0
    written_bytes: int = 0
    parts_s: Mapping[str, float] | None = None
    note: str = ""


def main() -> int:
    """Print the table, a line as soon as its step has ended."""
    options = _options()
    shape = SHAPE | {key: int(value) for key, _, value in (item.partition("=") for item in options.shape)}
    task = Task(options.folder, shape, options.group, options.threads)
    if options.run:
        print(json.dumps(_measured(task, STEPS[options.run])))
        return 0
    deadline_s = time.monotonic() + options.limit_s
    task.folder.mkdir(parents=True, exist_ok=True)
    if not (task.checkpoint / "config.json").exists():
        options.steps.insert(0, "checkpoint")
    print(_heading(task), flush=True)
    for name in options.steps:
        print(_row(name, _run_apart(name, deadline_s)), flush=True)
    return 0


def make_checkpoint(task: Task) -> Outcome:
    """Shards with weights from a pool of normal numbers, begun elsewhere in every tensor."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from pipeline.distillation.checkpoint_files import NewTensor, write_tensors

    config = Qwen2Config(**task.shape, dtype=torch.bfloat16, architectures=["Qwen2ForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Qwen2ForCausalLM(config).state_dict().items()}
    pool = (torch.randn(POOL_WEIGHTS, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    pool = torch.cat([pool, pool])

    def blocks(name: str) -> Iterator[torch.Tensor]:
        start, left = zlib.crc32(name.encode()), int(torch.Size(shapes[name]).numel())
        while left:
            start, count = start % POOL_WEIGHTS, min(left, POOL_WEIGHTS)
            yield pool[start : start + count] + (1.0 if name.endswith("norm.weight") else 0.0)
            start, left = start + count, left - count

    task.checkpoint.mkdir(exist_ok=True)
    tensors = [NewTensor(name, shape, partial(blocks, name)) for name, shape in shapes.items()]
    write_tensors(task.checkpoint, tensors, torch.bfloat16, SHARD_BYTES)
    config.save_pretrained(task.checkpoint)
    params = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    return Outcome(0, 2 * params, note=f"{params / 1e9:.2f} G weights")


def quantize(task: Task, rounding: str) -> Outcome:
    """Codes, then the ONNX package from them, read back bit for bit."""
    from pipeline.export.onnx_graph import MODEL_FILE, write_onnx
    from pipeline.export.onnx_reader import read_onnx_weights
    from pipeline.export.parity import require_same_weights
    from pipeline.quantization.grid import Grid
    from pipeline.quantization.source import open_checkpoint
    from pipeline.quantization.streaming import quantize_checkpoint

    clock = _Clock()
    source = open_checkpoint(task.checkpoint, min(CONTEXT_TOKENS, task.shape["max_position_embeddings"]), task.group)
    grids = source.grids(Grid(4, task.group, positive_scales=False))
    clock.lap("open")
    figures = quantize_checkpoint(
        source, grids, rounding, task.codes(rounding), task.folder / "work", workers=task.threads
    )
    clock.lap("codes")
    onnx = task.folder / "onnx"
    shutil.rmtree(onnx, ignore_errors=True)
    onnx.mkdir()
    spec, weights = load_weights(task.codes(rounding))
    write_onnx(onnx, spec, weights, lora=None, accuracy_level=4)
    clock.lap("ONNX")
    require_same_weights("onnx", weights, read_onnx_weights(onnx / MODEL_FILE))
    clock.lap("read back")
    error = sum(f.squared_error for f in figures.values()) / sum(f.squared_norm for f in figures.values())
    codes_bytes = task.codes(rounding).stat().st_size
    return Outcome(
        2 * source.params + 3 * codes_bytes,
        codes_bytes + _size(onnx),
        clock.laps_s,
        f"relative squared error {error:.5f}",
    )


def write_gguf_file(task: Task) -> Outcome:
    """The same codes as GGUF, without a tokenizer: the shape has none."""
    from transformers import AutoConfig

    clock = _Clock()
    spec, weights = load_weights(task.codes())
    path, config = task.folder / "model.gguf", AutoConfig.from_pretrained(task.checkpoint, local_files_only=True)
    import_module("pipeline.export.gguf").write_gguf(path, spec, weights, config=config, vocabulary=None, name="7b")
    clock.lap("written")
    return Outcome(task.codes().stat().st_size, path.stat().st_size, clock.laps_s)


def write_safetensors(task: Task) -> Outcome:
    """The same codes as compressed-tensors."""
    clock, folder = _Clock(), task.folder / "safetensors"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    spec, weights = load_weights(task.codes())
    write = import_module("pipeline.export.compressed_tensors").write_compressed_tensors
    write(folder, spec, weights, config=task.checkpoint / "config.json", linear_only=False)
    clock.lap("written")
    return Outcome(task.codes().stat().st_size, _size(folder), clock.laps_s)


def first_token(task: Task) -> Outcome:
    """The ONNX files in ONNX Runtime, as ``edge_runtime generate`` runs them."""
    import numpy as np

    from edge_runtime.backends.onnx import OnnxBackend

    clock = _Clock()
    spec, _ = load_weights(task.codes())
    backend = OnnxBackend.open(task.folder / "onnx", spec, threads=task.threads)
    clock.lap("load")
    loaded_gb = _resident_gb()
    cache = backend.allocate(PROMPT_TOKENS + NEW_TOKENS)
    prompt = [(7919 * n) % spec.vocab_size for n in range(PROMPT_TOKENS)]
    tokens = [int(backend.prefill(prompt, cache).argmax())]
    clock.lap("first token")
    while len(tokens) < NEW_TOKENS:
        tokens.append(int(backend.decode(tokens[-1], cache).argmax()))
    clock.lap(f"{NEW_TOKENS - 1} more")
    usable = np.isfinite(backend.decode(tokens[-1], cache)).all()
    return Outcome(_size(task.folder / "onnx"), 0, clock.laps_s, f"{loaded_gb:.2f} GB after loading, usable {usable}")


STEPS: dict[str, Callable[[Task], Outcome]] = {
    "checkpoint": make_checkpoint,
    "rtn": partial(quantize, rounding="rtn"),
    "mse": partial(quantize, rounding="mse"),
    "gguf": write_gguf_file,
    "safetensors": write_safetensors,
    "first_token": first_token,
}
_NEEDS = {
    "rtn": "numba",
    "mse": "numba",
    "gguf": "pipeline.export.gguf",
    "safetensors": "pipeline.export.compressed_tensors",
}


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._last_s = time.monotonic()

    def lap(self, name: str) -> None:
        now_s = time.monotonic()
        self.laps_s[name], self._last_s = now_s - self._last_s, now_s


def _measured(task: Task, step: Callable[[Task], Outcome]) -> dict[str, Any]:
    """A step in this process: what it took, imports included."""
    outcome = asdict(step(task))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return outcome | {
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in used),
        "peak_bytes": max(usage.ru_maxrss for usage in used) * 1024,
    }


def _run_apart(name: str, deadline_s: float) -> dict[str, Any] | str:
    """A step in a process of its own; why it gave no figures otherwise."""
    if name in _NEEDS and find_spec(_NEEDS[name]) is None:
        return f"{_NEEDS[name]} is not installed here"
    left_s = deadline_s - time.monotonic()
    if left_s < 1:
        return "no time left"
    start_s = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left_s, check=False)
    except subprocess.TimeoutExpired:
        return "cut by --limit-s; codes go on from here when it is run again"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values | {"wall_s": time.monotonic() - start_s}


def _row(name: str, values: dict[str, Any] | str) -> str:
    if isinstance(values, str):
        return f"| {name} | {values} |" + " |" * (len(COLUMNS) - 2)
    moved = values["read_bytes"] + values["written_bytes"]
    parts = [f"{part} {seconds:.1f} s" for part, seconds in (values["parts_s"] or {}).items()]
    cells = [
        name, f"{values['wall_s']:.1f}", f"{values['cpu_s']:.1f}", f"{values['peak_bytes'] / 1e9:.2f}",
        f"{values['read_bytes'] / 1e9:.1f}", f"{values['written_bytes'] / 1e9:.1f}",
        f"{moved / 1e6 / values['wall_s']:.0f}", ", ".join([*parts, values["note"]]).strip(", "),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _heading(task: Task) -> str:
    cores = len(os.sched_getaffinity(0))
    title = f"{task.shape['num_hidden_layers']} layers of {task.shape['hidden_size']}, group {task.group}"
    return (
        f"{title}; {cores} cores, --threads {task.threads}; numpy {version('numpy')}\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _resident_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is kept and files are written; 30 GB")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS)[1:])
    parser.add_argument("--shape", nargs="*", default=[], metavar="SIZE=N", help="num_hidden_layers=2 and the like")
    parser.add_argument("--group", type=int, default=128, choices=[32, 64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="a step that has not ended then is cut")
    parser.add_argument("--run", choices=list(STEPS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
