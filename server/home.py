"""Where a federation's server keeps its files: one directory, ``.federation/`` unless said otherwise.

| in it | |
| --- | --- |
| ``ca.crt`` ``ca.key`` ``server.crt`` ``server.key`` | the certificate that devices are given, and what it signed |
| ``superlink.db`` ``superlink.json`` ``superlink.log`` | Flower's state, the running SuperLink, what it printed |
| ``flwr/`` ``app/`` | Flower's own home; what ``flwr run`` sends: settings and a licence, no code |
| ``registry/`` | one file a device that may take part |
| ``runs/<federation>/`` | settings, ledger, devices, checkpoints and candidates |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.formats.errors import UserError

DEFAULT_HOME = Path(".federation")


@dataclass(frozen=True, slots=True)
class Home:
    """Paths below one directory, absolute."""

    root: Path

    @property
    def ca_certificate(self) -> Path:
        """What devices trust."""
        return self.root / "ca.crt"

    @property
    def database(self) -> Path:
        """The SuperLink's."""
        return self.root / "superlink.db"

    @property
    def link_file(self) -> Path:
        """Process and port of the SuperLink, while it runs and after."""
        return self.root / "superlink.json"

    @property
    def log(self) -> Path:
        """What SuperLink and ServerApp printed."""
        return self.root / "superlink.log"

    @property
    def flower(self) -> Path:
        """FLWR_HOME."""
        return self.root / "flwr"

    @property
    def app(self) -> Path:
        """What ``flwr run`` bundles."""
        return self.root / "app"

    @property
    def registry(self) -> Path:
        """Enrolled devices."""
        return self.root / "registry"

    @property
    def runs(self) -> Path:
        """One directory a federation."""
        return self.root / "runs"

    def run(self, federation: str) -> Path:
        """A federation's directory."""
        return self.runs / federation


def open_home(path: Path, *, create: bool) -> Home:
    """The home at ``path``.

    Args:
        path: Relative or absolute.
        create: Make it (readable by its owner alone) when it does not exist.

    Raises:
        UserError: It does not exist, or its path holds characters that Flower's configuration cannot.
    """
    root = Path(os.path.abspath(path))
    if any(character in str(root) for character in "'\"\\\n\r"):
        raise UserError("--home", str(path), "a path without quotes, backslashes and line breaks")
    if create:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not root.is_dir():
        raise UserError("--home", str(path), "a federation's home", "python -m server up makes one")
    return Home(root)
