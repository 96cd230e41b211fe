"""The table, the page and the cards say what the family's figures say, and nothing else."""

from __future__ import annotations

import copy
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.report import pareto
from pipeline.report.card import write_card
from pipeline.report.page import write_page
from pipeline.report.table import family_table, package_rows


@pytest.fixture
def family() -> dict[str, Any]:
    def package(size: int, perplexity: float, speed: float) -> dict[str, float]:
        return {
            "file_bytes": size,
            "weight_bytes": size - 100_000,
            "kl_to_fp": 0.0121,
            "top1_to_fp": 0.972,
            "perplexity": perplexity,
            "tokens_per_s": speed,
            "load_s": 0.2137,
            "peak_rss_bytes": 123_456_789,
        }

    def submodel(params: int, perplexity: float) -> dict[str, Any]:
        return {
            "params": params,
            "fp16_weight_bytes": 2 * params,
            "kl_to_teacher": 0.4127,
            "kl_to_teacher_from_scratch": 0.7019,
            "perplexity_fp": perplexity,
            "gate": {"passed": True, "reasons": []},
            "samples": {"onnx": "same text", "tflite": "same text", "tflite_legacy": "other text"},
            "packages": {
                "onnx": package(int(params * 0.58), perplexity * 1.01, 3e9 / params),
                "tflite": package(int(params * 0.59), perplexity * 1.01, 4e9 / params),
                "tflite_legacy": package(int(params * 1.1), perplexity * 1.04, 9e8 / params),
            },
        }

    return {
        "submodels": {"large": submodel(24_000_000, 14.2), "small": submodel(3_600_000, 27.4)},
        "teacher": {"params": 61_000_000, "perplexity": 11.8},
        "dataset": {"documents": 5321, "dropped_duplicate": 221},
        "pipeline_run": "a1b2c3",
        "prompt": "list.append(x)",
    }


def test_front_holds_exactly_the_points_that_none_beats() -> None:
    points = [(3, 1), (1, 3), (2, 2), (2, 3), (3, 3), (1, 3), (4, 1)]
    assert pareto.pareto_front(points) == [1, 5, 2, 0]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_front_agrees_with_the_definition_on_a_grid(dimensions: int) -> None:
    points = [p for p in itertools.product(range(4), repeat=dimensions) if sum(p) >= 4]
    front = {points[i] for i in pareto.pareto_front(points)}
    assert front == {p for p in points if sum(p) == 4}


def test_front_of_nothing_is_empty() -> None:
    assert pareto.pareto_front([]) == []


def test_rows_follow_the_family_and_compute_the_share_of_fp16(family: dict[str, Any]) -> None:
    rows = package_rows(family)
    assert [(row.submodel, row.container) for row in rows[:4]] == [
        *(("large", "onnx"), ("large", "tflite"), ("large", "tflite_legacy")),
        ("small", "onnx"),
    ]
    assert rows[3].weight_ratio == pytest.approx((3_600_000 * 0.58 - 100_000) / 7_200_000, rel=1e-6)


def test_table_fits_92_columns_and_loses_nothing_when_narrower(family: dict[str, Any]) -> None:
    family["submodels"]["small"]["gate"] = {"passed": False, "reasons": ["KL"]}
    wide = rendered(family, 92)
    assert re.search(r"large +24 M +0\.4127 +0\.7019 +ok +onnx +13\.9 +28\.8 +14\.3 +0\.0121 +97\.2 +125", wide)
    assert re.search(r"small +3\.6 M .* FAIL +onnx", wide)
    assert "…" not in rendered(family, 60)


def test_files_that_are_not_run_stand_in_the_table_and_not_in_the_picture(
    family: dict[str, Any], tmp_path: Path
) -> None:
    measured = family["submodels"]["small"]["packages"]["onnx"]
    files = {"file_bytes": 9_000, "weight_bytes": 8_000}  # the smallest, had it been measured
    family["submodels"]["small"]["packages"]["gguf"] = {**dict.fromkeys(measured), **files}
    assert re.search(r"gguf +0\.01 +0\.1 +– +– +– +–", rendered(family, 92))
    write_page(family, tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    assert "6" in page.texts and not any(
        text.startswith(("small gguf: ", "smallest: small gguf")) for text in page.texts
    )


def test_a_figure_that_was_not_measured_stays_visible(family: dict[str, Any], tmp_path: Path) -> None:
    del family["submodels"]["small"]["packages"]["onnx"]["perplexity"]
    family["submodels"]["small"]["packages"]["tflite"]["tokens_per_s"] = None
    assert re.search(r"onnx +2\.09 +27\.6 +– +0\.0121", rendered(family, 92))
    write_page(family, tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    assert not any(text.startswith("small onnx: ") for text in page.texts)
    assert any(text.startswith("small tflite: ") for text in page.texts)
    assert page.texts.count("–") >= 2


def test_page_needs_nothing_outside_itself(family: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "reports" / "index.html"
    write_page(family, path)
    page = Page(path)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not page.attributes & {"src", "href", "srcset", "onload", "onerror"}
    assert not re.search(r"url\(|@import|https?://", path.read_text())
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]


def test_page_draws_every_package_student_and_verdict(family: dict[str, Any], tmp_path: Path) -> None:
    family["submodels"]["small"]["gate"] = {"passed": False, "reasons": ["KL 0.99 is above 0.9"]}
    write_page(family, tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    for name, container in itertools.product(("large", "small"), ("onnx", "tflite", "tflite_legacy")):
        assert any(text.startswith(f"{name} {container}: ") for text in page.texts), (name, container)
    assert {"large fp16", "small fp16", "passed", "failed", "KL 0.99 is above 0.9", "teacher 11.80"} <= set(page.texts)
    assert "onnx, tflite" in page.texts and page.texts.count("same text") == 2


def test_page_shows_hostile_text_as_text(family: dict[str, Any], tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>&\"'"
    submodel = family["submodels"].pop("small")
    submodel["samples"] = {"onnx": attack}
    submodel["gate"] = {"passed": False, "reasons": [attack]}
    family["submodels"][attack] = submodel
    family |= {"prompt": attack, "pipeline_run": attack, "dataset": {attack: attack}}
    write_page(family, tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    assert "script" not in page.tags
    assert page.texts.count(attack) >= 6


def test_labels_cover_neither_each_other_nor_the_markers() -> None:
    points = [pareto.Point("tier", "onnx", 1e6 * (1 + i % 3 / 50), 20 + i % 2 / 10, 100.0 + i) for i in range(9)]
    svg = pareto.draw(points)
    boxes = [
        pareto.Box(float(x), float(y) + 4 - pareto.LINE_HEIGHT, len(text) * pareto.CHARACTER_WIDTH, pareto.LINE_HEIGHT)
        for x, y, text in re.findall(r'<text class="label onnx" x="([\d.-]+)" y="([\d.-]+)">(.*?)</text>', svg)
    ]
    circles = re.findall(r'class="marker onnx" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
    assert len(boxes) == len(circles) == 9
    markers = [pareto.Box(float(x) - float(r), float(y) - float(r), 2 * float(r), 2 * float(r)) for x, y, r in circles]
    # Coordinates are printed with one decimal: touching boxes may share a tenth of a pixel.
    assert max(a.overlap(b) for a, b in itertools.combinations(boxes, 2)) < 10
    assert max(a.overlap(b) for a in boxes for b in markers) < 10


def test_faster_packages_are_drawn_larger() -> None:
    points = [pareto.Point("a", "onnx", 1e6, 20, 100.0), pareto.Point("b", "onnx", 2e6, 10, 400.0)]
    radii = {float(r) for r in re.findall(r'class="marker onnx"[^>]* r="([\d.]+)"', pareto.draw(points))}
    assert max(radii) / min(radii) == pytest.approx(2.0, rel=0.02)


def test_card_states_quality_and_no_timing(family: dict[str, Any], tmp_path: Path) -> None:
    fields = {"name": "small", "version": "1.2.0", "containers": ["onnx", "tflite"], "base_digest": None}
    write_card("small", family, fields, tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert "| onnx | 2.09 | 1.99 | 27.6 | 27.7 | 0.0121 | 97.2 |" in card
    assert "| KL to the teacher, nats a token | 0.4127 |" in card
    assert "| containers | onnx, tflite |" in card and "| version | 1.2.0 |" in card
    assert "other text" in card and "`small`" in card and "`large`" not in card

    slower = copy.deepcopy(family)
    for package in slower["submodels"]["small"]["packages"].values():
        package.update(tokens_per_s=1.0, load_s=99.0, peak_rss_bytes=1)
    write_card("small", slower, fields, tmp_path / "again.md")
    assert (tmp_path / "again.md").read_bytes() == (tmp_path / "card.md").read_bytes()


def test_card_keeps_samples_inside_their_fence_and_cells_inside_their_table(
    family: dict[str, Any], tmp_path: Path
) -> None:
    family["submodels"]["small"]["samples"] = {"onnx": "before\n````\n# after"}
    write_card("small", family, {"name": "a|b\n# c"}, tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert "`````text\nbefore\n````\n# after\n`````" in card
    assert "| name | a\\|b # c |" in card


def test_card_of_an_unknown_submodel_is_refused(family: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="huge"):
        write_card("huge", family, {}, tmp_path / "card.md")
    assert not list(tmp_path.iterdir())


def rendered(family: dict[str, Any], width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(family_table(family))
    return capture.get()


class Page(HTMLParser):
    """Tags, attributes and texts of a page, read by the standard library's parser."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self._open = ""
        self.feed(path.read_text())
        self.close()
        self.texts = [text.strip() for text in self.texts]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(self.texts.pop() + data if self.texts else data)


@pytest.fixture
def proven(family: dict[str, Any]) -> dict[str, Any]:
    """A family in which ``small`` was asked one task, in two containers that changed an answer in common."""

    def entry(verdict: str, low: float | None) -> dict[str, Any]:
        return {
            "accuracy": 0.5512, "recovery": 0.9713, "low": low, "high": 0.9921, "lost": 41, "gained": 17,
            "mcnemar_p": 0.00214, "decidable": True, "verdict": verdict, "to_teacher": {"recovery": 0.6612},
        }  # fmt: skip

    flip = {"task": "cloze", "prompt": "Return a copy of the", "answer": " string", "fp": " string", "found": " list"}
    family["submodels"]["small"]["recovery"] = {
        "confidence": 0.95, "needed": 0.93, "tokens": 32768, "flips": {"onnx": [flip], "tflite": [flip]},
        "tasks": {"cloze": {
            "items": 4321, "documents": 321, "chance": 0.25, "accuracy_fp": 0.5621, "accuracy_teacher": 0.7114,
            "containers": {"onnx": entry("passed", 0.9514), "tflite": entry("not decidable", None)},
        }},
    }  # fmt: skip
    return family


def test_page_shows_what_was_kept_and_which_answers_changed(proven: dict[str, Any], tmp_path: Path) -> None:
    write_page(proven, tmp_path / "index.html")
    texts = [text for text in Page(tmp_path / "index.html").texts if text]
    start = texts.index("4,321 (321)") - 3
    assert texts[start : start + 13] == [
        "small", "cloze", "onnx", "4,321 (321)", "25.0", "56.2", "55.1", "97.1 (95.1 to 99.2)", "passed", "−41 +17",
        "0.002", "71.1", "66.1",
    ]  # fmt: skip
    assert "97.1 (– to 99.2)" in texts and "not decidable" in texts
    assert "cloze, onnx, tflite" in texts, "the same change of two containers is shown once"
    assert texts.count("…Return a copy of the") == 1 and "list" in texts
    assert any("must reach 93.0 %" in " ".join(text.split()) for text in texts)


def test_page_of_a_family_that_was_not_asked_says_nothing_of_it(family: dict[str, Any], tmp_path: Path) -> None:
    write_page(family, tmp_path / "index.html")
    assert "What 4 bits keep" not in Page(tmp_path / "index.html").texts


def test_card_says_what_was_kept_of_its_own_submodel_alone(proven: dict[str, Any], tmp_path: Path) -> None:
    for name in ("small", "large"):
        write_card(name, proven, {"name": name}, tmp_path / f"{name}.md")
    card = (tmp_path / "small.md").read_text()
    assert "| cloze | onnx | 4321 | 25.0 | 56.2 | 55.1 | 97.1 | 95.1 to 99.2 | passed |" in card
    assert "begins at 93.0 % or above" in card and "What 4 bits keep" not in (tmp_path / "large.md").read_text()
