"""What a finished run shows: the family's table, the texts, where things are, what to type next."""

from __future__ import annotations

from rich.console import Console

from pipeline.artifacts import PROJECT, Layout, read_json
from pipeline.report.table import family_table

_PLAIN_COLUMNS = 140


def print_summary(layout: Layout) -> None:
    """Print the family of a run to stdout."""
    family = read_json(layout.reports / "family.json")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_COLUMNS)
    console.print(family_table(family))
    console.print(f"\nprompt: {family['prompt']!r}")
    for name, submodel in family["submodels"].items():
        for container, text in submodel["samples"].items():
            console.print(f"  {name} {container}: {text!r}", markup=False, soft_wrap=True)
    register = layout.root / "artifacts" / "register" / "register.json"
    packages = (layout.root / "artifacts" / "packages").relative_to(PROJECT)
    smallest = list(family["submodels"])[-1]
    console.print(f"\nreport   {(layout.reports / 'index.html').relative_to(PROJECT)}", markup=False)
    if register.exists():
        console.print(f"charts   make ui, then {read_json(register)['chart_url']}", markup=False, soft_wrap=True)
    console.print(
        f"next     .venv/bin/python -m edge_runtime generate --package {packages / smallest}"
        f' --prompt "The function returns" --max-tokens 40',
        markup=False, soft_wrap=True,
    )  # fmt: skip
