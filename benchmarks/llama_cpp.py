"""The demo's GGUF in llama.cpp, built from source: tokens, perplexity and greedy text against ours.

llama.cpp's source comes inside the source package of llama-cpp-python. Both runtimes round what goes into a matrix to 8
bits in blocks of 32, so that texts part where two tokens are nearly as likely. How often they must, the second table
shows: each runtime against itself with one thing changed, float with and without that rounding against itself moved by
a millionth, and (--blas) both runtimes without it. Toys of the other architectures are compared on their logits: a
wrong rotation, scale or row order would give 0.3 and more of the spread.

pip download --no-binary llama-cpp-python --no-deps llama-cpp-python
pip download --no-deps scipy-openblas32 && unzip -d openblas scipy_openblas32-*.whl         # for --blas
python benchmarks/llama_cpp.py --source llama_cpp_python-*.tar.gz --blas openblas/scipy_openblas32

Needs cmake, a C++ compiler and make demo; each of the two builds takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.llama_cpp_toys import TOYS, build_toy
from benchmarks.machine import heading
from edge_runtime.backends import open_backend
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, load_weights
from pipeline.artifacts import PROJECT, Layout
from pipeline.distillation.recording import model_logits
from pipeline.export.checkpoint import load_student
from pipeline.export.gguf import write_gguf
from pipeline.export.parity import compare_logits, load_dequantized

RUNNER = Path(__file__).with_name("llama_cpp_runner.cpp")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, SEQUENCES, THREADS = 50, 24, 32, 48, 1
NEAR_TIE = 0.02  # of the logits' spread: likelier by less than this
MOVED = 1e-6

OURS, LLAMA, FLOAT, ROUNDED = "ours", "llama.cpp", "float", "float, inputs of matrices in 8 bits"
STEPWISE, FLOAT_INPUTS = "ours, prompt token by token", "ours, inputs of matrices in float"
FP32_CACHE, NO_REPACK = "llama.cpp, fp32 cache", "llama.cpp, weights not repacked"
BLAS = "llama.cpp, inputs of matrices in float"
FLOAT_MOVED, ROUNDED_MOVED = (f"{label}, moved by {MOVED:g}" for label in (FLOAT, ROUNDED))
PAIRS = (
    (OURS, LLAMA), (OURS, FLOAT), (LLAMA, FLOAT), (OURS, ROUNDED), (OURS, STEPWISE), (LLAMA, FP32_CACHE),
    (LLAMA, NO_REPACK), (ROUNDED, ROUNDED_MOVED), (FLOAT, FLOAT_MOVED), (FLOAT_INPUTS, BLAS),
)  # fmt: skip

Floats, Ids = NDArray[np.float32], NDArray[np.int32]


def main() -> int:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="llama_cpp_python-*.tar.gz, unpacked and built below --work")
    parser.add_argument("--blas", type=Path, help="folder of an unpacked scipy-openblas32, for llama.cpp in float")
    parser.add_argument("--work", type=Path, default=PROJECT / ".cache" / "llama.cpp")
    parser.add_argument("--project", type=Path, default=PROJECT, help="whose artifacts/ are measured")
    parser.add_argument("--submodels", nargs="*", help="all of them when left out")
    options = parser.parse_args()
    if options.source is None and not list(options.work.glob("*/vendor/llama.cpp")):
        print("llama.cpp is not built: give --source (see --help)", file=sys.stderr)
        return 0
    llama = Llama(build(options.source, options.work, None))
    blas = None if options.blas is None else Llama(build(options.source, options.work, options.blas.resolve()))
    layout = Layout(options.project)
    names = options.submodels or sorted(path.name for path in layout.root.glob("artifacts/weights/*"))
    title = f"GGUF in llama.cpp: {SEQUENCES} held-out sequences, {NEW_TOKENS} greedy tokens after {PROMPTS} prompts"
    print(heading(title))
    print("| submodel | tokens equal | perplexity fp32 | ours | llama.cpp | difference |\n|---|---|---|---|---|---|")
    lines: list[str] = []
    for name in names:
        lines += _measure(llama, blas, layout, name)
    print(f"\nNear-tie: float's two logits lie less than {NEAR_TIE:g} of the spread apart where the texts part.\n")
    print(
        f"| submodel | one | other | all {NEW_TOKENS} tokens equal | equal, or parting at a near-tie "
        "| same first choice on held-out text | logits apart (RMS / spread) |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))
    print("\nLogits against transformers, RMS of the difference over their spread:\n")
    print("| toy | weights dequantized in the file | codes |\n|---|---|---|")
    for toy in TOYS:
        print(_toy_row(llama, toy), flush=True)
    return 0


def build(source: Path | None, work: Path, blas: Path | None) -> Path:
    """The runner's path: unpack, build llama.cpp's library and link the runner, unless all of it is there.

    With ``blas`` and weights that are not repacked, matrices times 32 and more tokens at once are computed in float.
    """
    runner = work / ("runner" if blas is None else "runner_blas")
    if runner.exists() and runner.stat().st_mtime > RUNNER.stat().st_mtime:
        return runner
    work.mkdir(parents=True, exist_ok=True)
    if source is not None and not list(work.glob("*/vendor/llama.cpp")):
        with tarfile.open(source) as archive:
            archive.extractall(work, filter="data")
    (tree,) = work.glob("*/vendor/llama.cpp")
    output = work / ("build" if blas is None else "build_blas")
    switches = [f"-DLLAMA_{name}=OFF" for name in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_SERVER")]
    flags = ["-w"]
    parts: list[str] = ["libggml", "libggml-cpu"]
    linked: list[str | Path] = ["-fopenmp", "-lpthread", "-ldl"]
    if blas is not None:
        library = blas / "lib" / "libscipy_openblas.so"
        flags += [f"-D{name}=scipy_{name}" for name in ("cblas_sgemm", "openblas_set_num_threads")]
        switches += ["-DGGML_BLAS=ON", f"-DBLAS_LIBRARIES={library}", f"-DBLAS_INCLUDE_DIRS={blas / 'include'}"]
        parts.append("ggml-blas/libggml-blas")
        linked += [library, f"-Wl,-rpath,{library.parent}"]
    if not (output / "src" / "libllama.a").exists():
        line = ["cmake", "-S", tree, "-B", output, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF",
                f"-DCMAKE_CXX_FLAGS={' '.join(flags)}", *switches]  # fmt: skip
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", output, "--target", "llama", "-j2"], check=True, stdout=subprocess.DEVNULL)
    libraries = [output / "src/libllama.a", *(output / f"ggml/src/{part}.a" for part in (*parts, "libggml-base"))]
    subprocess.run(
        ["g++", "-O2", "-std=c++17", RUNNER, f"-I{tree}/include", f"-I{tree}/ggml/include", "-o", runner,
         *libraries, *linked],
        check=True,
    )  # fmt: skip
    return runner


@dataclass(frozen=True, slots=True)
class Answers:
    """What one way of computing says: logits (S, T, V) of given tokens, greedy ids (P, NEW_TOKENS) after prompts."""

    logits: Floats
    greedy: Ids


@dataclass(frozen=True, slots=True)
class Llama:
    """llama.cpp through the runner."""

    runner: Path

    def tokenize(self, model: Path, text: str) -> Ids:
        """Ids of a text, no special ones."""
        return self._run("tokenize", model, text.encode(), []).view(np.int32)

    def logits(self, model: Path, tokens: Ids, how: str = "default") -> Floats:
        """(S, T, V) of tokens (S, T)."""
        found = self._run("logits", model, _numbers(tokens), [str(THREADS), how]).view(np.float32)
        return found.reshape(*tokens.shape, -1)

    def answers(self, model: Path, tokens: Ids, prompts: Ids, how: str = "default", side: int = 1) -> Answers:
        """Logits and greedy ids; ``side`` prompts are decoded side by side, as a server does."""
        words = [str(THREADS), how, str(NEW_TOKENS), str(side)]
        greedy = self._run("greedy", model, _numbers(prompts), words).view(np.int32)
        return Answers(self.logits(model, tokens, how), greedy.reshape(len(prompts), NEW_TOKENS))

    def _run(self, mode: str, model: Path, content: bytes, words: list[str]) -> NDArray[np.uint8]:
        with tempfile.TemporaryDirectory() as folder:
            (given, out) = (Path(folder) / "in", Path(folder) / "out")
            given.write_bytes(content)
            subprocess.run([self.runner, mode, model, given, out, *words], check=True)
            return np.fromfile(out, np.uint8)


def _measure(llama: Llama, blas: Llama | None, layout: Layout, name: str) -> list[str]:
    """Print a row of the first table; the rows of the second."""
    spec, weights = load_weights(layout.weights(name) / "weights.safetensors")
    exports = layout.exports(name)
    model = exports / "gguf" / "model.gguf"
    tokenizer, texts = Tokenizer.from_file(str(exports / "tokenizer.json")), list(_held_out(layout))
    tokens = np.load(layout.sequences(name) / "held_out.npy")[:SEQUENCES, : spec.context_tokens].astype(np.int32)
    prompts = _prompts(tokenizer, texts, json.loads((exports / "export.json").read_text(encoding="utf-8"))["bos"])
    reference = load_dequantized(load_student(layout.student(name)), weights)
    onnx_answers = partial(_onnx_answers, spec=spec, tokens=tokens, prompts=prompts)
    torch_answers = partial(_torch_answers, reference, tokens, prompts)
    answers = {
        OURS: onnx_answers(exports / "onnx"),
        LLAMA: llama.answers(model, tokens, prompts),
        FLOAT: torch_answers(),
        STEPWISE: onnx_answers(exports / "onnx", stepwise=True),
        FP32_CACHE: llama.answers(model, tokens, prompts, "f32-cache"),
        NO_REPACK: llama.answers(model, tokens, prompts, "no-repack"),
        ROUNDED: torch_answers(rounded=True),
        ROUNDED_MOVED: torch_answers(rounded=True, moved=MOVED),
        FLOAT_MOVED: torch_answers(moved=MOVED),
    }
    if blas is not None:
        answers[BLAS] = blas.answers(model, tokens, prompts, "no-repack", side=len(prompts))
        with tempfile.TemporaryDirectory() as folder:
            answers[FLOAT_INPUTS] = onnx_answers(_with_float_inputs(exports / "onnx", Path(folder)))
    equal, total = _same_tokens(llama, model, tokenizer, texts)
    exact, ours, theirs = (_perplexity(answers[label].logits, tokens) for label in (FLOAT, OURS, LLAMA))
    figures = f"{exact:.4f} | {ours:.4f} | {theirs:.4f} | {100 * (theirs / ours - 1):+.3f} %"
    print(f"| {name} | {equal:,} of {total:,} | {figures} |", flush=True)
    pairs = [pair for pair in PAIRS if set(pair) <= answers.keys()]
    return [f"| {name} | {one} | {other} | {_compared(reference, prompts, answers[one], answers[other])} |"
            for one, other in pairs]  # fmt: skip


def _compared(reference: Any, prompts: Ids, one: Answers, other: Answers) -> str:
    gaps = [_gap(reference, *row) for row in zip(prompts, one.greedy, other.greedy, strict=True)]
    equal, near = sum(gap is None for gap in gaps), sum(gap is not None and gap < NEAR_TIE for gap in gaps)
    shape = (-1, one.logits.shape[-1])
    apart = compare_logits(one.logits.reshape(shape), other.logits.reshape(shape))
    shares = f"{equal} of {len(gaps)} | {equal + near} of {len(gaps)} | {100 * apart.top1:.2f} %"
    return f"{shares} | {apart.rms_ratio:.3g}"


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


def _onnx_answers(directory: Path, *, spec: DecoderSpec, tokens: Ids, prompts: Ids, stepwise: bool = False) -> Answers:
    """Stepwise: every token of a prompt is a step of its own."""
    with closing(open_backend("onnx", directory, spec, threads=THREADS)) as backend:
        cache = backend.allocate(spec.context_tokens)

        def prefill(row: Ids) -> Floats:
            cache.truncate(0)
            if stepwise:
                return np.stack([backend.decode(token, cache) for token in row.tolist()])
            return backend.prefill(row.tolist(), cache, all_logits=True).copy()

        def greedy(prompt: Ids) -> list[int]:
            found = [int(prefill(prompt)[-1].argmax())]
            while len(found) < NEW_TOKENS:
                found.append(int(backend.decode(found[-1], cache).argmax()))
            return found

        return Answers(np.stack([prefill(row) for row in tokens]), np.array([greedy(row) for row in prompts], np.int32))


def _with_float_inputs(directory: Path, folder: Path) -> Path:
    """The same model, its matrices multiplied without rounding what goes into them."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, folder / "model.onnx")
    shutil.copy(directory / "weights.bin", folder)
    return folder


def _torch_answers(model: Any, tokens: Ids, prompts: Ids, *, rounded: bool = False, moved: float = 0.0) -> Answers:
    """Rounded: inputs of all matrices to 8 bits as both runtimes do. Moved: embeddings by this share, at random."""

    def move(_module: Any, _given: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0))
        return output * (1 + moved * noise)

    hooks = [model.get_input_embeddings().register_forward_hook(move)] if moved else []
    if rounded:
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        hooks += [module.register_forward_pre_hook(lambda _module, given: _rounded(given[0])) for module in linears]
    answers = Answers(np.stack(list(model_logits(model, tokens))), _torch_greedy(model, prompts))
    for hook in hooks:
        hook.remove()
    return answers


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Each 32 neighbours to whole multiples of the largest one's 127th."""
    blocks = values.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return (torch.round(blocks / step) * step).flatten(-2)


def _torch_greedy(model: Any, prompts: Ids) -> Ids:
    """All prompts at once."""
    found, past, given = [], None, torch.from_numpy(prompts).long()
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            output = model(given, past_key_values=past, use_cache=True)
            past, given = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
            found.append(given)
    return torch.cat(found, dim=1).numpy().astype(np.int32)


def _gap(reference: Any, prompt: Ids, one: Ids, other: Ids) -> float | None:
    """How far apart float's logits of the two tokens are where texts part, over their spread; None: nowhere."""
    if np.array_equal(one, other):
        return None
    place = int((one != other).argmax())
    with torch.no_grad():
        last = reference(torch.from_numpy(np.concatenate([prompt, one[:place]])).long()[None]).logits[0, -1]
    return float((last[one[place]] - last[other[place]]).abs() / last.std())


def _perplexity(logits: Floats, tokens: Ids) -> float:
    scores = torch.log_softmax(torch.from_numpy(logits[:, :-1]).double(), dim=-1)
    chosen = scores.gather(-1, torch.from_numpy(tokens[:, 1:]).long()[..., None])
    return float(torch.exp(-chosen.mean()))


def _numbers(tokens: Ids) -> bytes:
    return np.array(tokens.shape, np.int32).tobytes() + np.ascontiguousarray(tokens, np.int32).tobytes()


if __name__ == "__main__":
    raise SystemExit(main())
