"""Cleaning: MB/s a core beside datatrove with the same rules, and peak memory against the size of the corpus.

``python benchmarks/cleaning.py --text DIR --datatrove-python PYTHON`` repeats and perturbs the text files below DIR.
The two run in turn, each in a process of its own; CPU seconds count, without imports. Ours includes naming the
language, which the peer leaves to a model that it downloads; that Python needs datatrove, spacy and xxhash.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import heading

_PEER = Path(__file__).with_name("cleaning_datatrove.py")
_DOCUMENT_CHARS = 3000
_TEXT_SUFFIXES = {".txt", ".rst", ".md"}
_KINDS = ("rules", "duplicates")


def main(arguments: list[str] | None = None) -> int:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of real text (.txt .rst .md)")
    parser.add_argument("--datatrove-python", type=Path, help="a Python that has datatrove 0.10.1; none: ours alone")
    parser.add_argument("--megabytes", type=int, default=100, help="of the corpus of the comparison")
    parser.add_argument("--runs", type=int, default=3, help="of each, alternating")
    parser.add_argument("--memory", type=int, nargs="*", default=[25, 100, 400], help="megabytes of corpora")
    parser.add_argument("--clean", nargs=3, metavar=("CORPUS", "FOLDER", "KIND"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.clean:
        return _clean(Path(given.clean[0]), Path(given.clean[1]), given.clean[2])
    with tempfile.TemporaryDirectory() as folder:
        _compare(given, Path(folder))
        _measure_memory(given, Path(folder))
    return 0


def _compare(given: argparse.Namespace, folder: Path) -> None:
    corpus = folder / "corpus.jsonl"
    size_bytes = write_corpus(given.text, corpus, given.megabytes * 1_000_000)
    print(heading(f"cleaning {size_bytes / 1e6:.0f} MB: text a CPU second, one core; median of {given.runs}"))
    print("| steps | ours MB/s | kept | datatrove MB/s | kept | ratio |\n|---|---|---|---|---|---|")
    for kind in _KINDS:
        ours, peer = [], []
        for run in range(given.runs):
            ours.append(_ours(given.text, corpus, folder / f"ours {kind} {run}", kind))
            if given.datatrove_python is not None:
                command = [given.datatrove_python, _PEER, corpus, folder / f"peer {kind} {run}", kind]
                peer.append(_last_line(command))
        mine = _median(ours)
        row = f"| {kind} | {size_bytes / 1e6 / mine['cpu_s']:.2f} | {mine['kept']} |"
        if peer:
            theirs = _median(peer)
            ratio = theirs["cpu_s"] / mine["cpu_s"]
            row += f" {size_bytes / 1e6 / theirs['cpu_s']:.2f} | {theirs['kept']} | {ratio:.1f} |"
        print(row + ("" if peer else " - | - | - |"), flush=True)
    print()


def _measure_memory(given: argparse.Namespace, folder: Path) -> None:
    print(heading("cleaning: peak memory of the process against the size of the corpus, near duplicates included"))
    print("| corpus MB | peak MB | MB/s |\n|---|---|---|")
    for megabytes in given.memory:
        corpus = folder / "memory.jsonl"
        size_bytes = write_corpus(given.text, corpus, megabytes * 1_000_000)
        done = _ours(given.text, corpus, folder / f"memory {megabytes}", "duplicates")
        print(f"| {megabytes} | {done['peak_bytes'] / 1e6:.0f} | {size_bytes / 1e6 / done['cpu_s']:.2f} |", flush=True)


def write_corpus(text: Path, corpus: Path, size_bytes: int) -> int:
    """Documents of about 3,000 characters out of the files below ``text``, repeated with changed words."""
    rng, written = random.Random(11), 0
    with corpus.open("w", encoding="utf-8") as file:
        for number, document in enumerate(_documents(text, rng)):
            written += file.write(json.dumps({"text": document, "id": str(number)}) + "\n")
            if written >= size_bytes:
                return written
    raise AssertionError("documents never end")


def _documents(text: Path, rng: random.Random) -> Iterator[str]:
    files = sorted(path for path in text.rglob("*") if path.suffix in _TEXT_SUFFIXES)
    if not files:
        sys.exit(f"{text}: no .txt, .rst or .md files below it")
    lines = [line for path in files for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    vocabulary = sorted({word for line in lines[:20_000] for word in line.split() if word.isalpha()})
    changed_ratio = 0.0
    while True:
        document: list[str] = []
        for line in lines:
            words = line.split(" ")
            document.append(" ".join(rng.choice(vocabulary) if rng.random() < changed_ratio else w for w in words))
            if sum(map(len, document)) >= _DOCUMENT_CHARS:
                yield "\n".join(document)
                document = []
        changed_ratio = min(0.5, changed_ratio + 0.01)


def _ours(text: Path, corpus: Path, folder: Path, kind: str) -> dict[str, float]:
    return _last_line([sys.executable, __file__, "--text", text, "--clean", corpus, folder, kind])


def _last_line(command: list[object]) -> dict[str, float]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def _clean(corpus: Path, folder: Path, kind: str) -> int:
    """In a process of its own: clean, and print CPU seconds, documents kept and peak memory."""
    from pipeline.data.cleaning import CleaningSettings, clean_corpus
    from pipeline.data.duplicates import choose_bands
    from pipeline.data.sources import file_documents

    near_duplicates = 0.8 if kind == "duplicates" else None
    if near_duplicates is not None:
        choose_bands(near_duplicates)  # imports scipy
    (folder / "output").mkdir(parents=True)
    settings = CleaningSettings(max_chars=100_000, rules="web", near_duplicates=near_duplicates)
    start = resource.getrusage(resource.RUSAGE_SELF)
    report = clean_corpus(file_documents(corpus), folder / "output", settings, folder / "checkpoint")
    end = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    print(json.dumps({"cpu_s": cpu_s, "kept": report.kept, "peak_bytes": end.ru_maxrss * 1024}))
    return 0


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return sorted(runs, key=lambda run: run["cpu_s"])[len(runs) // 2]


if __name__ == "__main__":
    sys.exit(main())
