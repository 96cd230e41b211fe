"""Cleaning: MB/s a core beside datatrove with the same rules, the same verdicts, and memory against the corpus.

``python benchmarks/cleaning.py --text DIR --datatrove-python PYTHON`` repeats and perturbs the text files below DIR, in
normal form. ``--tables`` picks among ``speed`` (in turn, each in a process of its own; CPU seconds without imports),
``verdicts`` (documents on which both agree) and ``memory`` (peak of a whole run's process). Ours includes naming the
language, which the peer leaves to a model that it downloads; that Python needs datatrove, spacy and xxhash.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cleaning_agreement import print_agreement, print_near_duplicates
from benchmarks.machine import heading
from pipeline.data.normalize import normalize

_PEER = Path(__file__).with_name("cleaning_datatrove.py")
_DOCUMENT_CHARS = 3000
_TEXT_SUFFIXES = {".txt", ".rst", ".md"}
_TABLES = ("speed", "verdicts", "memory")
Run = dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of real text (.txt .rst .md)")
    parser.add_argument("--datatrove-python", type=Path, help="a Python that has datatrove 0.10.1; none: ours alone")
    parser.add_argument("--tables", nargs="+", choices=_TABLES, default=_TABLES)
    parser.add_argument("--megabytes", type=int, default=100, help="of the corpus of the speed table")
    parser.add_argument("--runs", type=int, default=2, help="of each, alternating")
    parser.add_argument(
        "--spacy-megabytes", type=int, default=4, help="for datatrove with spaCy's words, which is slow"
    )
    parser.add_argument("--verdict-megabytes", type=int, default=25, help="of the corpus of the verdicts")
    parser.add_argument("--memory", type=int, nargs="*", default=[25, 100, 400], help="megabytes of corpora")
    parser.add_argument("--clean", nargs=3, metavar=("CORPUS", "FOLDER", "KIND"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.clean:
        return _clean(Path(given.clean[0]), Path(given.clean[1]), given.clean[2])
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in given.tables:
            _compare_speed(given, Path(folder))
        if "verdicts" in given.tables and given.datatrove_python is not None:
            _compare_verdicts(given, Path(folder))
        if "memory" in given.tables:
            _measure_memory(given, Path(folder))
    return 0


def _compare_speed(given: argparse.Namespace, folder: Path) -> None:
    corpus, small = folder / "corpus.jsonl", folder / "small.jsonl"
    size_mb = write_corpus(given.text, corpus, given.megabytes * 1_000_000) / 1e6
    ours: dict[str, list[Run]] = {"rules": [], "duplicates": []}
    peer: list[Run] = []
    for run in range(given.runs):
        for kind, runs in ours.items():
            runs.append(_ours(given.text, corpus, folder / f"{kind} {run}", kind))
        if given.datatrove_python is not None:
            peer.append(_peer(given, corpus, folder / f"peer {run}", "clean", "spaces"))
    print(heading(f"cleaning {size_mb:.0f} MB: text a CPU second of one core; median of {given.runs} [least, most]"))
    print("| | rules MB/s | kept | rules and near duplicates MB/s | kept |\n|---|---|---|---|---|")
    rules, whole = _rates(ours["rules"], "cpu_s", size_mb), _rates(ours["duplicates"], "cpu_s", size_mb)
    print(f"| Sevenfold | {rules} | {ours['rules'][0]['kept']} | {whole} | {ours['duplicates'][0]['kept']} |")
    if peer:
        rules, whole = _rates(peer, "rules_s", size_mb), _rates(peer, "all_s", size_mb)
        print(
            f"| datatrove, words by spaces | {rules} | {peer[0]['passed']} | {whole} | {peer[0]['kept']} |", flush=True
        )
        size_mb = write_corpus(given.text, small, given.spacy_megabytes * 1_000_000) / 1e6
        one = [_peer(given, small, folder / "spacy", "clean", "spacy")]
        rules, whole = _rates(one, "rules_s", size_mb), _rates(one, "all_s", size_mb)
        print(f"| datatrove, its default (spaCy; first {size_mb:.0f} MB, once) | {rules} | - | {whole} | - |")
    print(flush=True)


def _compare_verdicts(given: argparse.Namespace, folder: Path) -> None:
    corpus = folder / "verdicts.jsonl"
    size_mb = write_corpus(given.text, corpus, given.verdict_megabytes * 1_000_000) / 1e6
    print(heading(f"cleaning {size_mb:.0f} MB: verdicts on the same documents"))
    _peer(given, corpus, folder / "by spaces", "verdicts", "spaces")
    print_agreement(corpus, folder / "by spaces" / "verdicts.jsonl", "by spaces")
    write_corpus(given.text, corpus, given.spacy_megabytes * 1_000_000)
    _peer(given, corpus, folder / "by spacy", "verdicts", "spacy")
    print_agreement(corpus, folder / "by spacy" / "verdicts.jsonl", f"by spaCy (first {given.spacy_megabytes} MB)")
    write_corpus(given.text, corpus, given.verdict_megabytes * 1_000_000)
    _ours(given.text, corpus, folder / "near", "duplicates")
    _peer(given, corpus, folder / "near peer", "clean", "spaces")
    print_near_duplicates(corpus, folder / "near" / "output", folder / "near peer")


def _measure_memory(given: argparse.Namespace, folder: Path) -> None:
    print(heading("cleaning: peak memory of a whole run's process (rules, exact and near duplicates, personal data)"))
    print("| corpus MB | documents kept | peak MB | of it before the first document | database on disk MB |")
    print("|---|---|---|---|---|")
    for megabytes in given.memory:
        corpus = folder / "memory.jsonl"
        write_corpus(given.text, corpus, megabytes * 1_000_000)
        done = _ours(given.text, corpus, folder / f"memory {megabytes}", "duplicates")
        peak, start = done["peak_bytes"] / 1e6, done["start_bytes"] / 1e6
        print(
            f"| {megabytes} | {done['kept']} | {peak:.0f} | {start:.0f} | {done['disk_bytes'] / 1e6:.0f} |", flush=True
        )


def write_corpus(text: Path, corpus: Path, size_bytes: int) -> int:
    """Documents of about 3,000 characters out of the files below ``text``, repeated with changed words."""
    rng, written = random.Random(11), 0
    with corpus.open("w", encoding="utf-8") as file:
        for number, document in enumerate(_documents(text, rng)):
            written += file.write(json.dumps({"text": normalize(document), "id": str(number)}) + "\n")
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
        chars = 0
        for line in lines:
            words = line.split(" ")
            document.append(" ".join(rng.choice(vocabulary) if rng.random() < changed_ratio else w for w in words))
            chars += len(document[-1])
            if chars >= _DOCUMENT_CHARS:
                yield "\n".join(document)
                document, chars = [], 0
        changed_ratio = min(0.5, changed_ratio + 0.01)


def _ours(text: Path, corpus: Path, folder: Path, kind: str) -> Run:
    return _last_line([sys.executable, __file__, "--text", text, "--clean", corpus, folder, kind])


def _peer(given: argparse.Namespace, corpus: Path, folder: Path, wanted: str, words: str) -> Run:
    return _last_line([given.datatrove_python, _PEER, corpus, folder, wanted, words])


def _last_line(command: list[object]) -> Run:
    """What a process printed last, and its peak memory as the system gives it to its parent."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read())
        output.seek(0)
        values: Run = json.loads(output.read().splitlines()[-1])
    return values | {"peak_bytes": used.ru_maxrss * 1024}


def _clean(corpus: Path, folder: Path, kind: str) -> int:
    """In a process of its own: clean, and print CPU seconds, documents kept, memory before and the size on disk."""
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
    values = {
        "cpu_s": end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime,
        "kept": report.kept,
        "start_bytes": start.ru_maxrss * 1024,
        "disk_bytes": (folder / "checkpoint" / "journal.sqlite").stat().st_size,
    }
    print(json.dumps(values))
    return 0


def _rates(runs: list[Run], seconds: str, size_mb: float) -> str:
    rates = sorted(size_mb / run[seconds] for run in runs)
    spread = f" [{rates[0]:.2f}, {rates[-1]:.2f}]" if len(rates) > 1 else ""
    return f"{statistics.median(rates):.2f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
