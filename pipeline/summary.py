"""What a finished run shows: the family's table, the texts, where things are, what to type next."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.artifacts import PROJECT, Layout, read_json
from pipeline.report.table import family_table


def print_summary(layout: Layout) -> None:
    """Print the family of a run to stdout."""
    family = read_json(layout.reports / "family.json")
    console = Console(highlight=False)
    console.print(family_table(family))
    console.print(_distillation_table(family))
    console.print(f"\nprompt: {family['prompt']!r}")
    for name, submodel in family["submodels"].items():
        for container, text in submodel["samples"].items():
            console.print(f"  {name} {container}: {text!r}", markup=False)
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


def _distillation_table(family: dict[str, object]) -> Table:
    """Each student against the same shape trained from scratch on the same tokens."""
    table = Table(title="distilled against trained from scratch, same size, same tokens (held-out KL to the teacher)")
    for column in ("submodel", "params", "distilled", "from scratch"):
        table.add_column(column, justify="left" if column == "submodel" else "right")
    for name, submodel in family["submodels"].items():  # type: ignore[attr-defined]
        scratch = submodel["kl_to_teacher_from_scratch"]
        table.add_row(
            name, f"{submodel['params']:,}", f"{submodel['kl_to_teacher']:.4f}", "-" if scratch is None else f"{scratch:.4f}"
        )  # fmt: skip
    return table
