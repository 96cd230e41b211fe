"""Documentation out of installed packages: the docstrings of their sources, read without importing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from edge_runtime.formats.errors import UserError
from pipeline.data.sources import Document, module_docstrings

_SKIPPED = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "externals", "examples", "benchmarks"}
_LICENCE_CHARS = 60


def package_documents(names: Sequence[str]) -> Iterator[Document]:
    """Yield the docstrings of installed distributions, in the order of names and then of paths.

    Args:
        names: Distributions, as pip lists them.

    Raises:
        UserError: One of them is not installed.
    """
    for name in names:
        distribution = _distribution(name)
        files = sorted(str(file) for file in distribution.files or () if file.suffix == ".py")
        for file in files:
            parts = Path(file).parts
            path = Path(str(distribution.locate_file(file)))
            if ".." in parts or _SKIPPED.intersection(parts) or not path.is_file():
                continue
            yield from module_docstrings(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__"))


def package_licence(name: str) -> str:
    """What a distribution says of its licence, in at most 60 characters.

    Raises:
        UserError: It is not installed.
    """
    fields = _distribution(name).metadata
    classifiers = [value.split("::")[-1].strip() for value in fields.get_all("Classifier") or () if "License" in value]
    named = [fields[name] for name in ("License-Expression", "License") if name in fields]
    stated = " / ".join(classifiers) if classifiers and "License-Expression" not in fields else next(iter(named), "")
    return (stated or "not stated").split("\n")[0].strip()[:_LICENCE_CHARS]


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise UserError("data.packages", name, "installed distributions", f"pip install {name}") from None
