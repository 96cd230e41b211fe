"""Writing a file so that a reader sees the old bytes or the new ones, never half of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a temporary file beside ``path``, then rename it; missing parent directories are made."""
    with temporary_beside(path, content, mode) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def temporary_beside(path: Path, content: bytes, mode: int) -> Iterator[Path]:
    """A complete file next to ``path``, on the same file system; removed at exit unless renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp creates with mode 600, so a private key is never readable by others, not even for an instant.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
