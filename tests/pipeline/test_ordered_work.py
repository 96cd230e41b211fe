"""Several processes: results in order, few items in memory, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data.ordered_work import map_ordered


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_items_are_read_as_results_are_taken(workers: int) -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        for number in range(200):
            read += 1
            yield -number

    with closing(map_ordered(abs, items(), workers)) as results:
        for number, result in enumerate(results):
            assert result == number
            assert number < read <= number + 1 + 3 * workers
    assert read == 200


def test_a_worker_that_fails_fails_the_whole() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(map_ordered(int, ["1", "2", "x", "4"], 2))


def test_an_item_that_cannot_be_read_ends_it() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise UserError("line 21", "{", "one JSON object a line")

    with pytest.raises(UserError, match=r"^line 21"):
        list(map_ordered(abs, items(), 2))


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^data.workers: got 2, allowed: workers that live to the end"):
        list(map_ordered(os._exit, [9] * 8, 2))


def test_workers_end_with_a_parent_that_is_killed() -> None:
    code = (
        "from pipeline.data.ordered_work import map_ordered\n"
        "import os, multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    for number in map_ordered(abs, iter(int, 1), 2):\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert len(gone) == 2 and not alive


def test_an_interrupt_reaches_the_parent_alone() -> None:
    """Ctrl-C goes to the whole group of processes; workers must not print tracebacks of their own."""
    code = (
        "from pipeline.data.ordered_work import map_ordered\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        for number in map_ordered(abs, iter(int, 1), 2): print(flush=True)\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGINT)
        printed, errors = parent.communicate(timeout=30)
    assert printed.split() == ["interrupted"] and errors == ""
