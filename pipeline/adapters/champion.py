"""The champion adapter as a folder that devices and people load: ``<adapters>/champion``.

Every adapter lies in a folder named after its digest and ``champion`` is a link to one of them: replacing a link is
one atomic rename, replacing a folder is not.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import Adapter, save_adapter

CHAMPION_LINK = "champion"
_DIGEST_DIGITS = 16
_FOLDER = re.compile(r"[0-9a-f]{16}")


def keep_adapter(adapters: Path, adapter: Adapter, digest: str) -> Path:
    """Write an adapter into its own folder below ``adapters`` and return that folder."""
    folder = adapters / digest[:_DIGEST_DIGITS]
    save_adapter(folder, adapter)
    return folder


def crown(folder: Path) -> Path:
    """Let ``champion`` beside ``folder`` point to it, and return the link.

    The former champion's folder stays, for a reader who is just opening it; older ones go. What is not named after a
    digest, such as the library, is left alone.

    Raises:
        UserError: Something that is not our link is in the way.
    """
    link = folder.parent / CHAMPION_LINK
    if link.exists() and not link.is_symlink():
        raise UserError(str(link), "a file or folder", "a link that stage=gate keeps", "move it away")
    former = os.readlink(link) if link.is_symlink() else folder.name
    if former == folder.name and link.exists():
        return link
    temporary = folder.parent / f".{CHAMPION_LINK}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    temporary.replace(link)
    for other in folder.parent.iterdir():
        if other.is_dir() and _FOLDER.fullmatch(other.name) and other.name not in (folder.name, former):
            shutil.rmtree(other)
    return link
