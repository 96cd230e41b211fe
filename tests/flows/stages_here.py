"""Stages run in the test's own process, which saves imports, beside the first outputs of a finished run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import Layout
from tests.flows.conftest import FinishedRun


def layout_beside(finished: FinishedRun, root: Path) -> Layout:
    """A layout with the corpus, teacher and targets of a finished run."""
    layout = Layout(root)
    layout.metrics("x").parent.mkdir(parents=True)
    for folder in ("corpus", "teacher", "targets"):
        shutil.copytree(getattr(finished.layout, folder), getattr(layout, folder))
        shutil.copy2(finished.layout.metrics({"corpus": "clean"}.get(folder, folder)), layout.metrics("x").parent)
    return layout


@contextmanager
def in_this_process() -> Iterator[None]:
    """What stages set for their process is undone."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
            patch.setenv(name, "1")
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
