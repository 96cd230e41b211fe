"""Under torchrun: what is refused, who decides, and who speaks when something fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistBackendError, TCPStore  # type: ignore[attr-defined]

from edge_runtime.formats.errors import UserError
from pipeline import __main__, flow, torchrun
from pipeline.artifacts import Layout, StageRun
from pipeline.config import load_configs
from pipeline.flow import STAGES, execute
from pipeline.settings import Config
from pipeline.torchrun import follow_first, is_first, is_first_to_end, lost_process, process_count, require_training

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:52883."


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process as the first of two; torchrun's store is here."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torchrun, "_LONGEST_WAIT", timedelta(seconds=20))
    yield monkeypatch


@pytest.fixture(scope="module")
def corrected() -> Config:
    """The reference teacher, corrected."""
    return load_configs(["submodel=tiny", "teacher.correction_steps=1"])["tiny"]


def test_alone_nothing_is_asked_of_anybody() -> None:
    assert process_count() == 1 and is_first() and is_first_to_end() and is_first_to_end()
    assert follow_first("teacher", "digest") == "digest" and lost_process(RuntimeError(GLOO)) is None


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, "the whole pipeline"), ({"stage": "clean"}, "stage=clean"), ({"stage": "ship"}, "stage=ship"),
        ({"stage": "gate"}, "stage=gate"), ({"stage": "distill", "dry_run": True}, "a plan"),
        ({"stage": "teacher"}, "stage=teacher with teacher.kind=local"),
    ],
)  # fmt: skip
def test_what_does_not_train_is_refused(
    two: pytest.MonkeyPatch, corrected: Config, values: dict[str, object], refused: str
) -> None:
    as_it_is = corrected.model_copy(update={"teacher": corrected.teacher.model_copy(update={"correction_steps": 0})})
    with pytest.raises(UserError, match=f"^torchrun: got '{refused}', allowed: .*python -m pipeline$"):
        require_training(as_it_is.model_copy(update=values))


def test_what_trains_may_have_several_processes(
    two: pytest.MonkeyPatch, corrected: Config, ci_configs: dict[str, Config]
) -> None:
    for config in (corrected, ci_configs["ci_small"]):
        for stage in ("teacher", "distill"):
            require_training(config.model_copy(update={"stage": stage}))


def test_it_is_refused_before_anything_is_done(two: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["experiment=ci"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("torchrun: got 'the whole pipeline'") and printed.err.count("\n") == 1
    assert not printed.out


def test_the_second_waits_for_what_the_first_decides(two: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    first = threading.current_thread()
    two.setattr(torchrun, "is_first", lambda: threading.current_thread() is first)
    waiting = threading.Thread(target=lambda: found.append(follow_first("distill tiny")))
    waiting.start()
    assert not found
    assert follow_first("distill tiny", "digest") == "digest"
    waiting.join(20)
    assert found == ["digest"]


def test_one_that_follows_runs_what_the_first_says_and_locks_and_writes_nothing(
    two: pytest.MonkeyPatch, tmp_path: Path, ci_configs: dict[str, Config]
) -> None:
    layout, runs = Layout(tmp_path), list[StageRun]()
    module = type("Module", (), {"run": staticmethod(runs.append)})
    two.setattr(flow, "import_module", lambda _name: module)
    two.setattr(flow, "prepare_process", lambda _stage, _config: None)
    two.setattr(flow, "process_count", lambda: 1)  # nobody is there to be joined
    two.setattr(flow.CONSOLE, "quiet", False)
    for label, decided in (("teacher", flow._CURRENT), ("distill ci_small", "ab" * 32)):
        follow_first(label, decided)
    two.setenv("RANK", "1")
    assert not execute(STAGES["teacher"], ci_configs["ci_small"], layout) and not runs
    assert execute(STAGES["distill"], ci_configs["ci_small"], layout) and flow.CONSOLE.quiet
    assert [run.checkpoint for run in runs] == [layout.checkpoint("distill", "ab" * 32)]
    assert runs[0].output.name == "ci_small.partial" and not list(tmp_path.iterdir())


def test_the_first_says_that_an_output_is_current(
    two: pytest.MonkeyPatch, tmp_path: Path, ci_configs: dict[str, Config]
) -> None:
    two.setattr(flow, "why_run", lambda *_: None)
    two.setattr(flow, "_require_input", lambda *_: None)
    assert not execute(STAGES["teacher"], ci_configs["ci_small"], Layout(tmp_path))
    two.setenv("RANK", "1")
    assert follow_first("teacher") == flow._CURRENT


@pytest.mark.parametrize("fault", [UserError("disk", "full", "some"), KeyboardInterrupt(), FloatingPointError("nan")])
def test_of_two_that_fail_one_speaks(
    two: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: BaseException
) -> None:
    def fails(_arguments: list[str]) -> int:
        raise fault

    two.setattr(__main__, "_run", fails)
    codes = [__main__.main(["stage=distill"]) for _ in range(2)]
    assert codes[0] == codes[1] and codes[0] in (2, 130) and capsys.readouterr().err.count("\n") == 1
    two.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    __main__.main(["stage=distill"])
    assert capsys.readouterr().err.count("\n") == 1, "started again by torchrun, they speak again"


@pytest.mark.parametrize("fault", [RuntimeError(GLOO), DistBackendError("NCCL error: remote process exited")])
def test_a_process_that_is_gone_is_one_line(
    two: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: RuntimeError
) -> None:
    def fails(_arguments: list[str]) -> int:
        raise fault

    two.setattr(__main__, "_run", fails)
    assert __main__.main(["stage=distill"]) == 2
    assert "allowed: every process alive to the end; the same command goes on from here" in capsys.readouterr().err


def test_a_fault_of_ours_is_told_once_and_in_full(two: pytest.MonkeyPatch) -> None:
    def fails(_arguments: list[str]) -> int:
        raise LookupError("a mistake")

    two.setattr(__main__, "_run", fails)
    with pytest.raises(LookupError):
        __main__.main(["stage=distill"])
    assert __main__.main(["stage=distill"]) == 2
