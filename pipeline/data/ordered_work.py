"""A function mapped over items by several processes, results in the items' order, few items in memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process, resource_tracker
from typing import TypeVar

from edge_runtime.formats.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 3  # items a worker: one in work, two waiting, so that a slow item starves nobody


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for every item, in order; at most three items a worker are in memory.

    Args:
        function: Importable, as are its arguments' types: processes are started afresh.
        items: Read as results are taken.
        workers: Processes; 1 works in this one. A worker whose parent was killed ends too.

    Raises:
        UserError: A worker was killed, mostly because memory ran out.
    """
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    items = iter(items)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker)
    try:
        waiting.extend(_submit(pool, function, item) for item in islice(items, workers * _AHEAD))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(_submit(pool, function, item) for item in islice(items, 1))
            yield result
    except BrokenProcessPool:
        raise UserError(
            "data.workers", workers, "workers that live to the end; one was killed, mostly for want of memory",
            "lower data.workers; the same command goes on from here",
        ) from None  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    """Hand an item over; a process that this starts never sees an interrupt, not even while it starts."""
    resource_tracker.ensure_running()  # would let interrupts through again if it began below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(function, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """One thread a worker, which ends with its parent."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes nothing: without this its workers would wait for items forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
