"""Progress on stderr, for those who do not look at a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline import progress as module
from pipeline.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    return now_s


def test_a_line_now_and_then_with_the_time_left(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress("distill tiny", 100) as report:
        for done in range(1, 41):
            clock[0] += 0.5
            report(done, "loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["distill tiny: 20/100 loss 1.5 (40 s left)", "distill tiny: 40/100 loss 1.5 (30 s left)"]


def test_an_unknown_end_has_no_time_left(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress("clean", None) as report:
        clock[0] += 11
        report(7, "documents")
    assert capsys.readouterr().err.splitlines() == ["clean: 7 documents"]


def test_without_a_label_nothing_is_shown(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress(None, 10) as report:
        clock[0] += 60
        report(5, "loss 1.5")
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "CONSOLE", Console(file=screen, force_terminal=True, width=120))
    with progress("distill tiny", 8) as report:
        report(8, "loss 1.5, 41.2k tokens/s")
    assert "distill tiny" in screen.getvalue() and "8/8" in screen.getvalue() and "41.2k tokens/s" in screen.getvalue()
