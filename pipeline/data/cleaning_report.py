"""What cleaning did: counts by reason with examples, as values and as a page to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.data.judging import Outcome

_EXAMPLES = 3  # for each reason


@dataclass(slots=True)
class CleaningReport:
    """Counts of a corpus, or of as much of it as was read.

    Attributes:
        documents: Read.
        kept: Of these; ``held_out`` of the kept ones are on that side of the split.
        rows: Kind of row to number of rows.
        dropped: Reason to number of documents.
        examples: Reason to the first few: source, the text's start without personal data, and what it copies.
        languages: Language to kept documents, where languages were identified.
        personal_data: Kind to number of places replaced.
        near_duplicates: Number of clusters and the largest ones; None: not looked for.
        evaluation: Texts and n-grams looked for, and texts too short to be found; None: not looked for.
    """

    documents: int = 0
    kept: int = 0
    held_out: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    personal_data: dict[str, int] = field(default_factory=dict)
    near_duplicates: dict[str, object] | None = None
    evaluation: dict[str, int] | None = None


def count_kept(report: CleaningReport, outcome: Outcome) -> None:
    """Count a document that stays."""
    report.documents += 1
    report.kept += 1
    report.held_out += outcome.held_out
    _add(report.rows, ((kind, 1) for kind in outcome.kinds))
    _add(report.personal_data, outcome.personal_data.items())
    if outcome.language is not None:
        _add(report.languages, [(outcome.language, 1)])


def count_dropped(report: CleaningReport, outcome: Outcome, reason: str, copy_of: str | None = None) -> None:
    """Count a document that goes, and show it when it is among the first of its reason."""
    report.documents += 1
    reason = str(reason)  # a plain key, also of an enumeration
    _add(report.dropped, [(reason, 1)])
    examples = report.examples.setdefault(reason, [])
    if len(examples) < _EXAMPLES:
        example = {"source": outcome.source, "text": outcome.sample}
        examples.append(example if copy_of is None else example | {"copy_of": copy_of})


def render_page(report: CleaningReport) -> str:
    """The report in Markdown: what went in, what came out, and for every reason what it looks like."""
    side = f"{report.kept - report.held_out} for training, {report.held_out} held out"
    lines = ["# Cleaning", "", f"{report.documents} documents read, {report.kept} kept: {side}.", ""]
    lines += _table("dropped because", report.dropped, report.documents)
    lines += _table("language of what is kept", report.languages, report.kept)
    lines += _table("personal data replaced", report.personal_data, None)
    if report.evaluation is not None:
        values = report.evaluation
        lines += [
            f"{values['grams']} n-grams of {values['texts']} evaluation texts were looked for; "
            f"{values['too_short']} texts are too short to be found.",
            "",
        ]
    if report.near_duplicates is not None:
        lines += [f"{report.near_duplicates['clusters']} kept documents have near copies that were dropped.", ""]
    for reason, examples in sorted(report.examples.items()):
        lines += [f"## {reason}", ""]
        for example in examples:
            copied = f" (a copy of {_code(example['copy_of'])})" if "copy_of" in example else ""
            lines.append(f"- {_code(example['source'])}{copied}: {_code(example['text'])}")
        lines.append("")
    return "\n".join(lines)


def _add(counts: dict[str, int], more: Iterable[tuple[str, int]]) -> None:
    for key, count in more:
        counts[key] = counts.get(key, 0) + count


def _table(title: str, counts: Mapping[str, int], total: int | None) -> list[str]:
    if not counts:
        return []
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    share = "" if total is None else " share |"
    lines = [f"| {title} | number |{share}", "|---|---|" + ("" if total is None else "---|")]
    for name, count in rows:
        lines.append(f"| {name} | {count} |" + ("" if total is None else f" {count / total:.1%} |"))
    return [*lines, ""]


def _code(text: str) -> str:
    """One line of text that Markdown leaves as it is."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
