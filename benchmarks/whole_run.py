"""One whole run: a teacher of a 7B's shape through targets, pruning, distillation and quantization to a package.

Each stage is the command that a user types, in a process of its own; time, peak memory of the process and of the GPU,
and cost at a price an hour. Weights are random: figures of quality mean nothing here, figures of time and memory do.

    python benchmarks/whole_run.py --steps 60          # one GPU of 80 GB, 16 GB of disk for the teacher
    python benchmarks/whole_run.py --tiny              # any machine: does it run
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROJECT = Path(__file__).resolve().parent.parent
STAGES = ("clean", "teacher", "targets", "distill", "quantize", "export", "evaluate", "package")
QWEN_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
TINY = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MEASURE = """import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[2:], check=False)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
open(sys.argv[1], "w").write(json.dumps([time.monotonic() - start, usage.ru_maxrss * 1024, done.returncode]))
"""


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--target-tokens", type=int, default=1_048_576)
    options.add_argument("--price", type=float, default=3.0, help="of the machine, a unit of money an hour")
    options.add_argument("--work", type=Path, default=None)
    chosen = options.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="whole-run-"))
    teacher = work / "teacher"
    start_s = time.monotonic()
    write_teacher(teacher, TINY if chosen.tiny else QWEN_7B)
    print(f"teacher of random weights written in {time.monotonic() - start_s:.0f} s", flush=True)
    overrides = settings(teacher, chosen)
    rows = [run_stage(stage, overrides, work) for stage in STAGES]
    print_table(rows, chosen.price)
    return 0 if all(row["exit"] == 0 for row in rows) and len(rows) == len(STAGES) else 1


def write_teacher(folder: Path, sizes: dict[str, int]) -> None:
    """A Qwen2 checkpoint in shards with a tokenizer trained on Python's documentation."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from pipeline.data.packing import train_tokenizer
    from pipeline.data.sources import python_documents

    torch.manual_seed(0)
    config = Qwen2Config(
        **sizes, tie_word_embeddings=False, max_position_embeddings=32_768, rope_parameters={
            "rope_type": "default", "rope_theta": 1e6}, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    texts = [document.text for document in python_documents()]
    train_tokenizer(texts, 4096).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def settings(teacher: Path, chosen: argparse.Namespace) -> list[str]:
    common = [
        "experiment=qwen2_5_7b", "teacher=local", f"teacher.path={teacher}", "teacher.name=null", "data=python_docs",
        "submodel=0_5b", f"distill.steps={chosen.steps}", "distill.checkpoint_every_steps=1000",
        "distill.draws=32", "runtime.evaluation_sequences=2", "export.containers=[onnx]", "export.train_buckets=[]",
        "export.torch_base=false", "gate.containers=[onnx]", "quantize.rounding=rtn", "runtime.threads=8", "threads=16",
        "export.context_tokens=1024", "export.prefill_tokens=64", "export.parity_positions=8",
        "runtime.bench_tokens=16", "runtime.max_tokens=8",
    ]  # fmt: skip
    if chosen.tiny:
        small = ["teacher.load=fp32", "distill.sequence_tokens=64", "distill.target_tokens=8192", "threads=1",
                 "distill.importance_sequences=4", "distill.batch_sequences=4", "distill.compile=false",
                 "export.context_tokens=96", "export.prefill_tokens=16", "distill.steps=5"]  # fmt: skip
        return [*common, *small]
    return [*common, f"distill.target_tokens={chosen.target_tokens}", "distill.importance_sequences=64",
            "distill.micro_sequences=16", "distill.chunk_tokens=8192"]  # fmt: skip


def run_stage(stage: str, overrides: list[str], work: Path) -> dict[str, float]:
    """One command, watched; its output goes on to ours."""
    result = work / "measured.json"
    command = [sys.executable, "-m", "pipeline", *overrides, f"stage={stage}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    peak, ended = [0], threading.Event()
    watcher = threading.Thread(target=watch_gpu, args=(peak, ended))
    watcher.start()
    subprocess.run([sys.executable, "-c", MEASURE, str(result), *command], cwd=PROJECT, env=environment, check=True)
    ended.set()
    watcher.join()
    seconds, rss_bytes, code = json.loads(result.read_text())
    print(f"{stage}: {seconds:.0f} s, exit {code}", flush=True)
    return {"stage": stage, "seconds": seconds, "rss": rss_bytes, "gpu": peak[0], "exit": code}


def watch_gpu(peak: list[int], ended: threading.Event) -> None:
    """Largest memory in use, as the driver says."""
    while not ended.wait(0.5):
        try:
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            return
        peak[0] = max(peak[0], int(found[0]) * 2**20)


def print_table(rows: list[dict[str, float]], price: float) -> None:
    print(f"\n| stage | time | peak memory | peak GPU memory | cost at {price:g} an hour |\n|---|---|---|---|---|")
    for row in rows:
        cost = row["seconds"] / 3600 * price
        failed = "" if row["exit"] == 0 else f" (exit {row['exit']:.0f})"
        print(
            f"| {row['stage']}{failed} | {row['seconds']:.0f} s | {row['rss'] / 1e9:.1f} GB "
            f"| {row['gpu'] / 1e9:.1f} GB | {cost:.3f} |"
        )
    total = sum(row["seconds"] for row in rows)
    print(f"| all | {total:.0f} s | | | {total / 3600 * price:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
