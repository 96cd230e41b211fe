"""The peer's half of cleaning.py, run by a Python that has datatrove: rules and MinHash on one JSON lines file.

``cleaning_datatrove.py CORPUS FOLDER clean|verdicts spaces|spacy`` prints one line of JSON: CPU seconds without imports
and documents kept; or nothing much, and writes FOLDER/verdicts.jsonl: why each document is dropped. Words are split at
spaces and sentences as our rules do, so that both sides count the same things; or by spaCy, datatrove's default.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]* (?=\S)")  # as pipeline.data.rule_limits has it


def main(arguments: list[str]) -> int:
    """Clean ``arguments[0]`` into the folder ``arguments[1]``, or only judge its documents."""
    from loguru import logger

    logger.remove()
    corpus, folder, wanted = Path(arguments[0]), Path(arguments[1]), arguments[2]
    language = _spaces() if arguments[3] == "spaces" else "en"
    if wanted == "verdicts":
        _judge(corpus, folder, language)
        print("{}")
    else:
        print(json.dumps(_clean(corpus, folder, language)))
    return 0


def _clean(corpus: Path, folder: Path, language: Any) -> dict[str, float]:
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    rules = _rules(language)
    start_s = _cpu_s()
    source = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    passed = _run([source, *rules, PIIFormatter(), JsonlWriter(str(folder / "rules"), compression=None)])
    rules_s = _cpu_s() - start_s
    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=9, hashes_per_bucket=13)
    inside = JsonlReader(str(folder / "rules"))
    _run([inside, MinhashDedupSignature(str(folder / "signatures"), config=config, language=language)])
    for bucket in range(config.num_buckets):
        buckets = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)
        buckets.run(None, bucket, config.num_buckets)
    MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config).run(None, 0, 1)
    writer = JsonlWriter(str(folder / "kept"), compression=None)
    kept = _run([inside, MinhashDedupFilter(str(folder / "remove")), writer])
    return {"rules_s": rules_s, "all_s": _cpu_s() - start_s, "passed": passed, "kept": kept}


def _judge(corpus: Path, folder: Path, language: Any) -> None:
    """One line a document: null, or the name of the first rule that drops it."""
    from datatrove.data import Document

    rules = _rules(language)
    folder.mkdir(parents=True)
    with corpus.open(encoding="utf-8") as lines, (folder / "verdicts.jsonl").open("w", encoding="utf-8") as verdicts:
        for line in lines:
            row = json.loads(line)
            document = Document(text=row["text"], id=row["id"])
            results = (rule.filter(document) for rule in rules)
            reason = next((result[1] for result in results if isinstance(result, tuple)), None)
            verdicts.write(json.dumps(reason) + "\n")


def _rules(language: Any) -> list[Any]:
    """Gopher's and C4's with datatrove's defaults; lines without a terminal mark stay, as in FineWeb and in ours."""
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter

    return [
        GopherQualityFilter(language=language),
        GopherRepetitionFilter(language=language),
        C4QualityFilter(filter_no_terminal_punct=False, language=language),
    ]


def _spaces() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Spaces(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end] for start, end in self.span_tokenize(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [end.end() for end in _SENTENCE_END.finditer(text)]
            return list(zip([0, *ends], [*ends, len(text)], strict=True))

    return Spaces()


def _run(steps: list[Any]) -> int:
    """Documents that come out of steps, one feeding the next."""
    data = None
    for step in steps:
        data = step.run(data, 0, 1)
    return sum(1 for _ in data) if data is not None else 0


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
