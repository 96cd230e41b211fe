"""A person asks for text while the device trains: the text waits for one step at most, and training for the text."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from edge_runtime.formats.envelope import unseal
from edge_runtime.formats.messages import Decline, Reason
from edge_runtime.scheduler.lease import WANTED_FILE, training_lease
from tests.edge_runtime.federated.device import Device, greet, make_plan, small_layout
from tests.flows.conftest import FinishedRun

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("run")]

STEP_S, NEW_TOKENS = 0.2, 64


@dataclass
class Watch:
    """Looks at the lease from outside when a step begins and when it ends, and starts ``generate`` in the second step.

    Attributes:
        wanted: (when the step began, when it ended) for each step: whether somebody wanted to generate.
        times: The moments.
    """

    device: Device
    lease: Path
    command: list[str]
    wanted: list[tuple[bool, bool]] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    generation: subprocess.Popen[str] | None = None

    def step(self) -> None:
        began_s, at_begin = time.monotonic(), self._is_wanted()
        if len(self.wanted) == 1:
            environment = {**os.environ, "SEVENFOLD_STATE_DIR": str(self.lease.parent)}
            self.generation = subprocess.Popen(
                self.command, cwd="/", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        threading.Event().wait(STEP_S)  # the step's work
        self.wanted.append((at_begin, self._is_wanted()))
        self.times.append((began_s, time.monotonic()))
        self.device.stopping = self.generation is not None and self.generation.poll() is not None

    def _is_wanted(self) -> bool:
        handle = os.open(self.lease / WANTED_FILE, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False


@pytest.fixture
def watch(finished: FinishedRun, edge_python: Path, tmp_path: Path) -> Iterator[Watch]:
    package = finished.layout.package("ci_small")
    words = ["generate", "--package", package, "--prompt", "The function", "--max-tokens", NEW_TOKENS]
    command = [str(word) for word in (edge_python, "-m", "edge_runtime", *words, "--threads", 1, "--json")]
    watch = Watch(Device(tmp_path / "device"), tmp_path / "state" / "lease", command)
    yield watch
    if watch.generation is not None:
        watch.generation.kill()
        watch.generation.communicate()


def test_text_waits_for_the_running_step_and_the_next_step_for_the_text(watch: Watch) -> None:
    device, layout = watch.device, small_layout()
    resident = device.start()
    resident.around = replace(
        resident.around, lease=lambda give_up: training_lease(watch.lease, wait=time.sleep, give_up=give_up)
    )
    assert resident.handle(greet(layout)).kind == "profile"
    device.trainer.on_step = watch.step
    whole = device.trainer.batch_sequences  # one call of the trainer a step
    reply = resident.handle(make_plan(layout, batch_sequences=whole, steps=100_000, deadline_s=86400.0))
    assert unseal(reply, Decline).reason is Reason.BUSY, "it was told to end once the text was there"

    assert watch.generation is not None
    printed, said = watch.generation.communicate(timeout=60)
    assert watch.generation.returncode == 0, said
    text = json.loads(printed)
    assert len(text["tokens"]) >= 2
    assert sum(at_end for _, at_end in watch.wanted) <= 1, "more than one step ended while somebody waited for text"
    assert all(at_end for at_begin, at_end in watch.wanted if at_begin)
    generated_s = text["prefill_s"] + (len(text["tokens"]) - 1) / text["decode_tokens_per_s"]
    pauses = [begin - end for (_, end), (begin, _) in zip(watch.times, watch.times[1:], strict=False)]
    assert max(pauses) >= generated_s > 0, "some pause between two steps holds the whole generation"
