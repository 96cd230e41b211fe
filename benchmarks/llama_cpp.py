"""The demo's GGUF in llama.cpp, built from source: tokens, perplexity and greedy text against ours.

llama.cpp's source comes inside the source package of llama-cpp-python. Both runtimes quantize activations to 8 bits, so
that near-ties fall either way; the same codes dequantized to fp32 (transformers) stand beside them. Toys of the other
architectures are compared on their logits: a wrong rotation, scale or row order would give 0.3 and more of the spread.

pip download --no-binary llama-cpp-python --no-deps llama-cpp-python
python benchmarks/llama_cpp.py --source llama_cpp_python-*.tar.gz     # needs cmake, a C++ compiler and make demo
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoConfig

from benchmarks.llama_cpp_toys import TOYS, build_toy
from benchmarks.machine import heading
from edge_runtime.backends import open_backend
from edge_runtime.backends.base import Backend, KVCache
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, load_weights
from pipeline.artifacts import PROJECT, Layout
from pipeline.distillation.recording import model_logits
from pipeline.export.checkpoint import load_student
from pipeline.export.gguf import write_gguf
from pipeline.export.gguf_vocabulary import read_vocabulary
from pipeline.export.parity import compare_logits, load_dequantized

RUNNER = Path(__file__).with_name("llama_cpp_runner.cpp")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, SEQUENCES, THREADS = 50, 24, 32, 48, 2

Floats, Ids = NDArray[np.float32], NDArray[np.int32]


def main() -> int:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="llama_cpp_python-*.tar.gz, unpacked and built below --work")
    parser.add_argument("--work", type=Path, default=PROJECT / ".cache" / "llama.cpp")
    parser.add_argument("--project", type=Path, default=PROJECT, help="whose artifacts/ are measured")
    parser.add_argument("--submodels", nargs="*", help="all of them when left out")
    options = parser.parse_args()
    if options.source is None and not list(options.work.glob("*/vendor/llama.cpp")):
        print("llama.cpp is not built: give --source (see --help)", file=sys.stderr)
        return 0
    llama = Llama(build(options.source, options.work))
    layout = Layout(options.project)
    names = options.submodels or sorted(path.parent.name for path in layout.root.glob("artifacts/weights/*/*"))
    title = f"GGUF in llama.cpp: {SEQUENCES} held-out sequences, {NEW_TOKENS} greedy tokens after {PROMPTS} prompts"
    print(heading(title))
    print(
        "| submodel | tokens equal | perplexity fp32 | ours | llama.cpp | difference | greedy: ours = llama.cpp "
        "| ours = fp32 | llama.cpp = fp32 | logits apart (RMS / spread) | gap where they part: median, largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        print(_row(llama, layout, name), flush=True)
    print("\nLogits against transformers, RMS of the difference over their spread:\n")
    print("| toy | weights dequantized in the file | codes |\n|---|---|---|")
    for toy in TOYS:
        print(_toy_row(llama, toy), flush=True)
    return 0


def build(source: Path | None, work: Path) -> Path:
    """The runner's path: unpack, build llama.cpp's library and link the runner, unless all of it is there."""
    runner = work / "runner"
    if runner.exists() and runner.stat().st_mtime > RUNNER.stat().st_mtime:
        return runner
    work.mkdir(parents=True, exist_ok=True)
    if source is not None and not list(work.glob("*/vendor/llama.cpp")):
        with tarfile.open(source) as archive:
            archive.extractall(work, filter="data")
    (tree,) = work.glob("*/vendor/llama.cpp")
    output = work / "build"
    switches = [f"-DLLAMA_{name}=OFF" for name in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_SERVER")]
    if not (output / "src" / "libllama.a").exists():
        line = ["cmake", "-S", tree, "-B", output, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", *switches]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", output, "--target", "llama", "-j2"], check=True, stdout=subprocess.DEVNULL)
    libraries = [output / "src/libllama.a", *(output / f"ggml/src/libggml{part}.a" for part in ("", "-cpu", "-base"))]
    subprocess.run(
        ["g++", "-O2", "-std=c++17", RUNNER, f"-I{tree}/include", f"-I{tree}/ggml/include", "-o", runner,
         *libraries, "-fopenmp", "-lpthread", "-ldl"],
        check=True,
    )  # fmt: skip
    return runner


@dataclass(frozen=True, slots=True)
class Llama:
    """llama.cpp through the runner."""

    runner: Path

    def tokenize(self, model: Path, text: str) -> Ids:
        """Ids of a text, no special ones."""
        return self._run("tokenize", model, text.encode(), []).view(np.int32)

    def logits(self, model: Path, tokens: Ids) -> Floats:
        """(S, T, V) of tokens (S, T)."""
        found = self._run("logits", model, _numbers(tokens), [str(THREADS)]).view(np.float32)
        return found.reshape(*tokens.shape, -1)

    def greedy(self, model: Path, prompts: Ids) -> Ids:
        """(S, NEW_TOKENS) after prompts (S, T)."""
        found = self._run("greedy", model, _numbers(prompts), [str(THREADS), str(NEW_TOKENS)]).view(np.int32)
        return found.reshape(len(prompts), NEW_TOKENS)

    def _run(self, mode: str, model: Path, content: bytes, words: list[str]) -> NDArray[np.uint8]:
        with tempfile.TemporaryDirectory() as folder:
            (given, out) = (Path(folder) / "in", Path(folder) / "out")
            given.write_bytes(content)
            subprocess.run([self.runner, mode, model, given, out, *words], check=True)
            return np.fromfile(out, np.uint8)


def _row(llama: Llama, layout: Layout, name: str) -> str:
    spec, weights = load_weights(layout.weights(name) / "weights.safetensors")
    exported = json.loads((layout.exports(name) / "export.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        vocabulary = read_vocabulary(layout.exports(name), spec.vocab_size, bos=exported["bos"], eos=exported["eos"])
        config = AutoConfig.from_pretrained(layout.student(name), local_files_only=True)
        write_gguf(model, spec, weights, config=config, vocabulary=vocabulary, name=name)
        tokenizer = Tokenizer.from_file(str(layout.exports(name) / "tokenizer.json"))
        texts = list(_held_out(layout))
        equal, total = _same_tokens(llama, model, tokenizer, texts)
        tokens = np.load(layout.sequences(name) / "held_out.npy")[:SEQUENCES, : spec.context_tokens].astype(np.int32)
        reference = load_dequantized(load_student(layout.student(name)), weights)
        prompts = _prompts(tokenizer, texts, exported["bos"])
        exact = np.stack(list(model_logits(reference, tokens)))
        exact_greedy = _torch_greedy(reference, prompts)
        with closing(open_backend("onnx", layout.exports(name) / "onnx", spec, threads=THREADS)) as backend:
            cache = backend.allocate(spec.context_tokens)
            ours = np.stack([_prefill(backend, cache, row) for row in tokens])
            ours_greedy = np.array([_greedy(backend, cache, prompt) for prompt in prompts], np.int32)
            theirs, theirs_greedy = llama.logits(model, tokens), llama.greedy(model, prompts)
            rows = zip(prompts, ours_greedy, theirs_greedy, strict=True)
            parting = [_gap(backend, cache, *row) for row in rows if (row[1] != row[2]).any()]
    perplexities = [_perplexity(logits, tokens) for logits in (exact, ours, theirs)]
    shape = (-1, spec.vocab_size)
    apart = compare_logits(ours.reshape(shape), theirs.reshape(shape)).rms_ratio
    pairs = ((ours_greedy, theirs_greedy), (ours_greedy, exact_greedy), (theirs_greedy, exact_greedy))
    same = " | ".join(f"{int((one == other).all(axis=1).sum())} of {len(prompts)}" for one, other in pairs)
    figures = " | ".join(f"{value:.4f}" for value in perplexities)
    difference = perplexities[2] / perplexities[1] - 1
    gaps = ", ".join(f"{gap:.3f}" for gap in np.quantile(parting, (0.5, 1.0))) if parting else "-"
    return (
        f"| {name} | {equal:,} of {total:,} | {figures} | {100 * difference:+.3f} % | {same} | {apart:.4f} | {gaps} |"
    )


def _toy_row(llama: Llama, toy: str) -> str:
    """With floats in the file only fp16 keys and values differ; with codes activations are rounded to 8 bits too."""
    model, spec, weights = build_toy(toy)
    floats = {name: dequantize(w) if isinstance(w, QuantizedTensor) else w for name, w in weights.items()}
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (4, 96)).astype(np.int32)
    expected = np.concatenate(list(model_logits(load_dequantized(model, weights), tokens)))
    figures = []
    for held in (floats, weights):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "toy.gguf"
            write_gguf(path, spec, held, config=model.config, vocabulary=None, name=toy)
            figures.append(compare_logits(expected, llama.logits(path, tokens).reshape(expected.shape)).rms_ratio)
    return f"| {toy} | {figures[0]:.5f} | {figures[1]:.4f} |"


def _held_out(layout: Layout) -> Iterator[str]:
    with (layout.root / "artifacts" / "corpus" / "held_out.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _same_tokens(llama: Llama, model: Path, tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int]:
    """Tokens of all texts that both cut alike, from the start of each, and tokens in all."""
    joined = "\n".join(texts)
    ours, theirs = np.array(tokenizer.encode(joined, add_special_tokens=False).ids), llama.tokenize(model, joined)
    if np.array_equal(ours, theirs):
        return len(ours), len(ours)
    shorter = min(len(ours), len(theirs))
    return int(np.argmax(ours[:shorter] != theirs[:shorter])), len(ours)


def _prompts(tokenizer: Tokenizer, texts: list[str], bos: int | None) -> Ids:
    """(PROMPTS, T): how the held-out texts begin."""
    begun = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    rows = [([] if bos is None else [bos]) + ids for ids in begun if len(ids) >= PROMPT_TOKENS + NEW_TOKENS]
    step = max(1, len(rows) // PROMPTS)
    return np.array([row[:PROMPT_TOKENS] for row in rows[::step][:PROMPTS]], np.int32)


def _prefill(backend: Backend, cache: KVCache, row: Ids) -> Floats:
    """(T, V)."""
    cache.truncate(0)
    return backend.prefill(row.tolist(), cache, all_logits=True).copy()


def _greedy(backend: Backend, cache: KVCache, prompt: Ids) -> list[int]:
    found = [int(_prefill(backend, cache, prompt)[-1].argmax())]
    while len(found) < NEW_TOKENS:
        found.append(int(backend.decode(found[-1], cache).argmax()))
    return found


def _gap(backend: Backend, cache: KVCache, prompt: Ids, ours: Ids, theirs: Ids) -> float:
    """How much likelier our token is than theirs where they part: a difference of logits over their spread."""
    place = int((ours != theirs).argmax())
    last = _prefill(backend, cache, np.concatenate([prompt, ours[:place]]))[-1]
    return float((last[ours[place]] - last[theirs[place]]) / last.std())


def _torch_greedy(model: Any, prompts: Ids) -> Ids:
    """All prompts at once."""
    found, past, given = [], None, torch.from_numpy(prompts).long()
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            output = model(given, past_key_values=past, use_cache=True)
            past, given = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
            found.append(given)
    return torch.cat(found, dim=1).numpy().astype(np.int32)


def _perplexity(logits: Floats, tokens: Ids) -> float:
    scores = torch.log_softmax(torch.from_numpy(logits[:, :-1]).double(), dim=-1)
    chosen = scores.gather(-1, torch.from_numpy(tokens[:, 1:]).long()[..., None])
    return float(torch.exp(-chosen.mean()))


def _numbers(tokens: Ids) -> bytes:
    return np.array(tokens.shape, np.int32).tobytes() + np.ascontiguousarray(tokens, np.int32).tobytes()


if __name__ == "__main__":
    raise SystemExit(main())
