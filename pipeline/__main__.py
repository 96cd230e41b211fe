"""``python -m pipeline``: from text and a checkpoint to signed packages.

Without overrides it is ``dvc repro``. ``stage=NAME submodel=NAME`` alone is what dvc.yaml calls.
Any other override runs the same stages in this process, into ``runs/<digest>/``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pipeline.artifacts import Layout
    from pipeline.settings import Config

PROJECT = Path(__file__).resolve().parent.parent
_MOVED = "SEVENFOLD_INTERPRETER_CHOSEN"
HELP = """Sevenfold pipeline: text and a 7B checkpoint in, signed 4-bit submodels out.

usage: python -m pipeline [KEY=VALUE ...]

  python -m pipeline                            the demo, reproducible: everything that changed runs again (DVC)
  python -m pipeline dry_run=true               what would run and why, disk, memory and time needed
  python -m pipeline experiment=ci              the same in seconds, into runs/
  python -m pipeline teacher=local teacher.path=DIR data=local data.path=FILE_OR_DIR
                                                your checkpoint (Llama, Qwen2, Qwen3, Mistral), your text
  python -m pipeline experiment=qwen2_5_7b      a 7B from the hub; also experiment=llama_7b
  python -m pipeline experiment=qwen2_5_7b_whole
                                                that 7B itself in 4 bits, no students; yours with teacher=local
  python -m pipeline stage=export submodel=tiny one stage, in place
  torchrun --nproc-per-node 2 -m pipeline stage=distill submodel=small
                                                one training over several GPUs or processes; stage=teacher too
  python -m pipeline stage=gate candidate=DIR   a federation's adapter: champion if it beats the one there is
  python -m pipeline stage=adapter submodel=tiny action=train adapter.name=recovery
                                                the adapter library: train list show score compose remove

stages       clean teacher targets distill quantize export evaluate package report register
             ship = quantize + export + evaluate + package of one submodel in one process
             gate and adapter are no steps of a run: candidate=DIR [package=DIR] [gate.text=FILE] [gate.margin=NATS]
groups       data teacher submodel distill quantize export gate adapter track runtime experiment (files in conf/)
settings     any key of conf/, for example distill.steps=400 quantize.rounding=rtn 'export.containers=[onnx]'
output       artifacts/packages/<submodel>/  reports/family.json  reports/index.html  (runs/<digest>/... with overrides)
exit codes   0 done, 2 something you can correct (one line each on stderr), 3 a gate refused a submodel or an adapter
"""


def main(arguments: list[str]) -> int:
    """Run the pipeline and return the exit code."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(HELP, end="")
        return 0
    _use_project_interpreter(arguments)
    from edge_runtime.formats.errors import GateError, SevenfoldError
    from pipeline.torchrun import is_first_to_end, lost_process

    try:
        return _run(arguments)
    except GateError as error:
        return _end(3, str(error))
    except SevenfoldError as error:
        return _end(2, str(error))
    except FloatingPointError as error:
        return _end(2, f"{error}; lower teacher.learning_rate or distill.learning_rate")
    except KeyboardInterrupt:
        return _end(130, "interrupted; the same command goes on from here")
    except Exception as error:
        if lost := lost_process(error):
            return _end(2, lost)
        if is_first_to_end():
            raise
        return 2  # another process failed first and said why


def _end(code: int, line: str) -> int:
    """The exit code, and one line for people: of several processes the first that ends says why."""
    from pipeline.torchrun import is_first_to_end

    if is_first_to_end():
        print(line, file=sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    from pipeline.artifacts import Layout
    from pipeline.config import config_digest, load_configs
    from pipeline.flow import ADAPTER, GATE, STAGES, execute, planned
    from pipeline.plan import print_plan, require_checkpoints, require_resources, require_sources
    from pipeline.summary import print_summary
    from pipeline.torchrun import is_first, process_count, require_training

    configs = load_configs(arguments)
    first = next(iter(configs.values()))
    require_training(first)
    given = dict(argument.split("=", 1) for argument in arguments)
    if first.stage == GATE:
        return _gate(first, given)
    if first.stage == ADAPTER:
        return _adapter(configs, given)
    in_place = set(given) <= {"dry_run"} or ("stage" in given and set(given) <= {"stage", "submodel", "dry_run"})
    layout = Layout(PROJECT if in_place else PROJECT / "runs" / config_digest(configs))
    chosen = [
        (stage, config)
        for stage, config in planned(configs)
        if _is_chosen(stage.name, first.stage)
        and (not stage.per_submodel or given.get("submodel", config.submodel.name) == config.submodel.name)
    ]
    if not chosen:
        _refuse_stage(first.stage)
    if first.stage is None:
        require_sources(first)
        require_checkpoints(configs.values())
    if first.dry_run:
        print_plan(chosen, configs, layout, with_dvc=in_place and first.stage is None)
        return 0
    if in_place and first.stage is None:
        return _reproduce(configs, layout)
    require_resources(chosen, configs, layout)
    if not in_place and is_first():
        print(f"output: {layout.root.relative_to(PROJECT)}", file=sys.stderr)
    for stage, config in chosen:
        execute(STAGES[stage.name], config, layout)
    if process_count() > 1:
        from pipeline.distillation.parallel import leave_processes

        leave_processes()
    if first.stage is None:
        print_summary(layout)
    return 0


def _gate(config: Config, given: dict[str, str]) -> int:
    """Judge a candidate; its results belong to the project whatever the overrides."""
    from edge_runtime.formats.errors import UserError
    from pipeline.artifacts import Layout
    from pipeline.stages.gate import run

    if "submodel" in given:
        raise UserError("submodel", given["submodel"], "none with stage=gate, the package names it", "leave it out")
    run(config, Layout(PROJECT))
    return 0


def _adapter(configs: dict[str, Config], given: dict[str, str]) -> int:
    """One action of a submodel's adapter library; what is not about it names the run that it belongs to."""
    from dataclasses import fields

    from edge_runtime.formats.errors import UserError
    from pipeline.artifacts import Layout
    from pipeline.config import config_digest
    from pipeline.distillation.from_config import uses_bf16
    from pipeline.flow import STAGES, prepare_process
    from pipeline.stages.adapter import AdapterContext, AdapterSettings, run_action

    if "submodel" not in given:
        names = ", ".join(configs)
        raise UserError("submodel", "none", names, f"add submodel={next(iter(configs))}")
    config = configs[given["submodel"]]
    of_run = {key for key in given if key not in ("stage", "action", "submodel", "package")}
    in_place = all(key.startswith("adapter.") for key in of_run)
    layout = Layout(PROJECT if in_place else PROJECT / "runs" / config_digest(configs))
    prepare_process(STAGES["distill"], config)
    values = config.adapter.model_dump()
    values["targets"] = None if values["targets"] is None else tuple(values["targets"])
    settings = AdapterSettings(**{field.name: values[field.name] for field in fields(AdapterSettings)})
    context = AdapterContext(
        layout, config.submodel.name, PROJECT / config.track.store, config.package, config.threads, config.seed,
        uses_bf16(config),
    )  # fmt: skip
    run_action(str(config.action), settings, context)
    return 0


def _is_chosen(name: str, wanted: str | None) -> bool:
    from pipeline.flow import SHIP

    return wanted is None or name == wanted or (wanted == "ship" and name in SHIP)


def _refuse_stage(wanted: str | None) -> NoReturn:
    import difflib

    from edge_runtime.formats.errors import UserError
    from pipeline.flow import stage_names

    close = difflib.get_close_matches(str(wanted), stage_names(), n=1)
    raise UserError("stage", wanted, ", ".join(stage_names()), f"did you mean {close[0]}?" if close else "")


def _reproduce(configs: dict[str, Config], layout: Layout) -> int:
    """``dvc repro`` with this interpreter's programs first on PATH, then the table."""
    import subprocess

    from edge_runtime.formats.errors import UserError
    from pipeline.flow import STAGES, execute, planned
    from pipeline.plan import require_resources
    from pipeline.summary import print_summary

    first = next(iter(configs.values()))
    programs = Path(sys.executable).parent
    if not (programs / "dvc").exists():
        raise UserError("dvc", "not installed", "the pipeline extra", "make setup, or pip install '.[pipeline]'")
    require_resources(list(planned(configs)), configs, layout)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([programs / "dvc", "repro", "--quiet"], cwd=PROJECT, env=environment, check=False)
    if done.returncode:
        print("stopped; python -m pipeline goes on from here", file=sys.stderr)
        return done.returncode
    if not (PROJECT / first.track.store / "mlflow.db").exists():  # outside DVC's sight
        execute(STAGES["register"], first, layout, force=True)
    print_summary(layout)
    return 0


def _use_project_interpreter(arguments: list[str]) -> None:
    """Under a Python without our libraries (``.venv/bin/dvc`` without activation), go on in the project's own."""
    from importlib.util import find_spec

    if find_spec("hydra") is not None:
        return
    own = PROJECT / ".venv" / "bin" / "python"
    if own.exists() and _MOVED not in os.environ:  # once: the project's own may be incomplete too
        os.execve(own, [str(own), "-m", "pipeline", *arguments], {**os.environ, _MOVED: "1"})
    print("python: hydra is not installed here; type make setup, or pip install '.[pipeline]'", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
