"""The peer's half of cleaning.py, run by a Python that has datatrove: rules and MinHash on one JSON lines file.

Prints one line of JSON: CPU seconds of each half without imports, and documents kept.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Clean ``arguments[0]`` into the folder ``arguments[1]``; ``arguments[2]`` is ``rules`` or ``duplicates``."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    from loguru import logger

    logger.remove()
    start_s = _cpu_s()
    corpus, folder, wanted = Path(arguments[0]), Path(arguments[1]), arguments[2]
    rules = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        PIIFormatter(),
    ]
    kept = _run([_reader(JsonlReader, corpus), *rules, JsonlWriter(str(folder / "rules"), compression=None)])
    rules_s = _cpu_s() - start_s
    if wanted == "duplicates":
        config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=9, hashes_per_bucket=13)
        inside = JsonlReader(str(folder / "rules"))
        _run([inside, MinhashDedupSignature(str(folder / "signatures"), config=config)])
        for bucket in range(config.num_buckets):
            buckets = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)
            buckets.run(None, bucket, config.num_buckets)
        cluster = MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config)
        cluster.run(None, 0, 1)
        writer = JsonlWriter(str(folder / "kept"), compression=None)
        kept = _run([inside, MinhashDedupFilter(str(folder / "remove")), writer])
    print(json.dumps({"cpu_s": _cpu_s() - start_s, "rules_s": rules_s, "kept": kept}))
    return 0


def _reader(reader: type, corpus: Path) -> object:
    return reader(str(corpus.parent), glob_pattern=corpus.name)


def _run(steps: list[object]) -> int:
    """Documents that come out of steps, one feeding the next."""
    data = None
    for step in steps:
        data = step.run(data, 0, 1)  # type: ignore[attr-defined]
    return sum(1 for _ in data) if data is not None else 0


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
