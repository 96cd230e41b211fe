"""Under torchrun: one process decides and writes, the others follow it; the first that fails speaks for all.

Processes talk through the store that torchrun keeps for them: text under keys, without torch's groups, so that it
also works before they are joined and after one of them is gone. Alone, every function answers at once.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edge_runtime.formats.errors import UserError

if TYPE_CHECKING:
    from pipeline.settings import Config

TRAINING_STAGES = ("teacher", "distill")
_LONGEST_WAIT = timedelta(hours=4)
_FIRST_ANSWER = timedelta(seconds=20)


def process_count() -> int:
    """Processes that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process decides, writes and shows."""
    return int(os.environ.get("RANK", "0")) == 0


def require_training(config: Config) -> None:
    """Refuse several processes for what is not training.

    Raises:
        UserError: The whole pipeline, a plan, or a stage that does not train.
    """
    if process_count() == 1:
        return
    if config.stage not in TRAINING_STAGES or config.dry_run:
        asked = "a plan" if config.dry_run else f"stage={config.stage}" if config.stage else "the whole pipeline"
        raise UserError(
            "torchrun", asked, "stage=teacher or stage=distill submodel=NAME",
            "run everything else with python -m pipeline",
        )  # fmt: skip
    if config.stage == "teacher" and not config.teacher.trains:
        raise UserError(
            "torchrun", f"stage=teacher with teacher.kind={config.teacher.kind}", "a teacher that is trained here",
            "set teacher.correction_steps, or run this stage with python -m pipeline",
        )  # fmt: skip


def follow_first(key: str, value: str | None = None) -> str:
    """The first process's ``value`` in all of them; the others wait for it and give none.

    Args:
        key: Named once in the life of a process.
        value: What the first process decided.
    """
    if process_count() == 1:
        return value or ""
    store = _store(_LONGEST_WAIT)
    if is_first():
        store.set(_named(key), value or "")
    found: bytes = store.get(_named(key))
    return found.decode()


def is_first_to_end() -> bool:
    """Whether no other process failed before this one: one line is enough."""
    if process_count() == 1:
        return True
    try:
        return int(_store(_FIRST_ANSWER).add(_named("failed"), 1)) == 1
    except RuntimeError:  # torchrun is gone, and its store with it
        return is_first()


def lost_process(error: Exception) -> str | None:
    """A line for people where the error is that another process is gone, for example killed; else None."""
    if process_count() == 1:
        return None
    from torch.distributed import DistError

    if not isinstance(error, DistError) and "gloo/transport" not in str(error):
        return None
    message = " ".join(str(error).split())[:200]
    return str(UserError("torchrun", message, "every process alive to the end", "the same command goes on from here"))


def _store(timeout: timedelta) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def _named(key: str) -> str:
    """Torchrun may start all processes again; what an earlier set said does not count."""
    return f"sevenfold/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
