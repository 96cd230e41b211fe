"""Wall time of every stage of the last ``make demo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import heading
from pipeline.artifacts import PROJECT, Layout
from pipeline.config import load_configs
from pipeline.flow import planned


def main() -> int:
    """Print one row a stage, from the records that stages leave."""
    layout, rows = Layout(PROJECT), []
    for stage, config in planned(load_configs([])):
        record = layout.record(stage.output(layout, config.submodel.name))
        if not record.exists():
            print("no finished demo here; type make demo first", file=sys.stderr)
            return 2
        label = f"{stage.name} {config.submodel.name}" if stage.per_submodel else stage.name
        rows.append((label, json.loads(record.read_text(encoding="utf-8"))["wall_s"]))
    print(heading("the demo's wall time by stage (imports of a process excluded)"))
    print("| stage | s |\n|---|---|")
    for label, wall_s in rows:
        print(f"| {label} | {wall_s:.1f} |")
    print(f"| sum | {sum(wall_s for _, wall_s in rows):.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
