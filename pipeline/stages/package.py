"""package: exported files, their model card and a signature."""

from __future__ import annotations

from typing import Any

from edge_runtime.formats.package import MODEL_CARD_FILE
from pipeline.artifacts import StageRun, file_digest, read_json, write_json
from pipeline.export.assembly import WEIGHTS_FILE, copy_exports, seal
from pipeline.report.card import write_card

_SIGNED_FIGURES = ("kl_to_fp", "top1_to_fp", "perplexity")


def run(run: StageRun) -> None:
    """Write the signed package."""
    config, name = run.config, run.submodel
    exports, weights = run.layout.exports(name), run.layout.weights(name) / WEIGHTS_FILE
    evaluation = read_json(run.layout.evaluation(name) / "evaluation.json")
    copy_exports(exports, run.output / "package", link=False)
    package = run.output / "package"
    fields = {
        "name": name,
        "version": config.export.version,
        "counter": config.export.counter,
        "base_digest": file_digest(weights),
        "licence": config.export.licence,
    }
    write_card(name, {"submodels": {name: evaluation}, **family_facts(run)}, fields, package / MODEL_CARD_FILE)
    manifest = seal(package, config, exports=exports, weights=weights, metrics=signed_metrics(evaluation))
    for path in package.iterdir():
        path.replace(run.output / path.name)
    package.rmdir()
    metrics = {"files": len(manifest.files), "base_digest": manifest.base_digest, "counter": manifest.counter}
    write_json(run.layout.metrics("package", name), metrics)


def signed_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """Quality figures for the manifest; nothing that depends on the machine's mood."""
    return {
        f"{container}.{figure}": round(float(figures[figure]), 4)
        for container, figures in evaluation["packages"].items()
        for figure in _SIGNED_FIGURES
        if figures[figure] is not None
    }


def family_facts(run: StageRun) -> dict[str, Any]:
    """What a family's report says of the teacher, the data and the prompt."""
    targets, cleaned = read_json(run.layout.metrics("targets")), read_json(run.layout.metrics("clean"))
    teacher = read_json(run.layout.metrics("teacher"))
    if targets["perplexity"] is None:  # nobody learned: the teacher was measured as a submodel
        own = read_json(run.layout.evaluation(run.submodel) / "evaluation.json")
        targets |= {figure: own[f"{figure}_fp"] for figure in ("perplexity", "bits_per_byte")}
    return {
        "teacher": {
            "origin": teacher["origin"],
            "params": targets["params"],
            "perplexity": targets["perplexity"],
            "bits_per_byte": targets["bits_per_byte"],
        },
        "dataset": {
            "source": run.config.data.source,
            "licence": cleaned["licence"],
            "documents": cleaned["documents"],
            "kept": cleaned["kept"],
            "held_out": cleaned["held_out"],
            "dropped": cleaned["dropped"],
            "train_tokens": targets["train_tokens"],
            "held_out_tokens": targets["held_out_tokens"],
        },
        "prompt": run.config.runtime.prompt,
    }
