"""gate: a federation's candidate adapter against the champion; the better one is registered and published.

No step of a run: it is called whenever there is a candidate, and its outputs belong to the project.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import GateError, UserError
from edge_runtime.formats.lora import Adapter, load_adapter
from edge_runtime.formats.package import Package
from pipeline.adapters.candidate import Candidate, open_candidate
from pipeline.adapters.champion import crown, keep_adapter
from pipeline.adapters.trial import REFERENCE_CONTAINER, Verdict, judge
from pipeline.artifacts import PROJECT, Layout, file_digest, sole_writer, write_json
from pipeline.data.packing import pack_for_package, shuffled_document_rows
from pipeline.settings import Config
from pipeline.tracking_adapters import AdapterVersion, NewAdapter, list_adapters, register_champion

_TEXTS = (".txt", ".jsonl", ".parquet")


def run(config: Config, layout: Layout) -> None:
    """Judge ``config.candidate``; when it passes, register it and let ``adapters/<submodel>/champion`` point to it.

    Raises:
        GateError: It is not better, or the containers disagree; nothing was registered.
        SevenfoldError: Candidate, package or text cannot be used.
    """
    if config.candidate is None:
        raise UserError("candidate", None, "the directory of a candidate", "add candidate=DIR")
    candidate = open_candidate(config.candidate, config.package)
    adapters, store = layout.adapters(candidate.submodel), PROJECT / config.track.store
    with sole_writer(layout, "gate", candidate.submodel):
        versions, champion = list_adapters(store, candidate.submodel)
        if champion is not None and _is(champion, candidate):
            link = crown(keep_adapter(adapters, candidate.adapter, candidate.digest))
            print(f"{candidate.submodel}: this adapter is champion already, version {champion.version}: {_shown(link)}")
            return
        _refuse_superseded(candidate, versions, champion)
        text = _held_out_text(config, layout, candidate.package)
        sequences = _pack(config, candidate.package, text)
        verdict = judge(
            candidate.package, candidate.adapter, _opponent(candidate, champion), sequences, config.gate,
            threads=config.runtime.threads, seed=config.seed,
        )  # fmt: skip
        report = _write_report(candidate, champion, verdict, layout)
        if verdict.reasons:
            raise GateError(f"{candidate.submodel}: not champion: {verdict.reasons[0]} (all figures: {_shown(report)})")
        folder = keep_adapter(adapters, candidate.adapter, candidate.digest)
        version = register_champion(store, _entry(candidate, verdict, text, sequences), folder)
        link = crown(folder)
    _print_passed(candidate, verdict, version, link)


def _is(version: AdapterVersion, candidate: Candidate) -> bool:
    base_digest = candidate.package.manifest.base_digest
    return (version.base_digest, version.adapter_digest) == (base_digest, candidate.digest)


def _refuse_superseded(candidate: Candidate, versions: list[AdapterVersion], champion: AdapterVersion | None) -> None:
    """The champion only moves forward: not to an earlier version, not to the base of an earlier package."""
    if champion is None:
        return
    manifest = candidate.package.manifest
    earlier = next((entry.version for entry in versions if _is(entry, candidate)), None)
    if earlier is not None and earlier < champion.version:
        raise GateError(
            f"{candidate.submodel}: not champion: this adapter was version {earlier}, the champion is version"
            f" {champion.version}; train on from the champion"
        )
    if champion.base_digest != manifest.base_digest and manifest.counter < champion.counter:
        raise GateError(
            f"{candidate.submodel}: not champion: its package has counter {manifest.counter}, the champion's had"
            f" {champion.counter}; federate on the newer package"
        )


def _opponent(candidate: Candidate, champion: AdapterVersion | None) -> Adapter | None:
    """The champion of this base; one of another base cannot run on this package."""
    manifest = candidate.package.manifest
    if champion is None or champion.base_digest != manifest.base_digest:
        return None
    return load_adapter(champion.directory, manifest.decoder, manifest.base_digest)


def _held_out_text(config: Config, layout: Layout, package: Package) -> Path:
    """What the user gave, or the held-out text of the run whose ``artifacts/packages/`` holds the package."""
    if (text := config.gate.text) is not None:
        if not text.is_file() or text.suffix not in _TEXTS:
            raise UserError("gate.text", str(text), f"an existing file ending in {' '.join(_TEXTS)}", "check the path")
        return text
    artifacts = package.directory.parent.parent
    root = artifacts.parent if artifacts.name == "artifacts" else layout.root
    text = Layout(root).corpus / "held_out.jsonl"
    if not text.is_file():
        raise UserError("gate.text", str(text), "the held-out text of the package's run", "add gate.text=FILE")
    return text


def _pack(config: Config, package: Package, text: Path) -> NDArray[np.int32]:
    """(S, T) tokens; from the pipeline's own text, its evaluation's sequences come first."""
    length = min(config.distill.sequence_tokens, package.manifest.decoder.context_tokens)
    return pack_for_package(package, shuffled_document_rows(text, config.seed), length, config.gate.sequences).tokens


def _write_report(candidate: Candidate, champion: AdapterVersion | None, verdict: Verdict, layout: Layout) -> Path:
    facts = candidate.facts
    figures = {
        "federation": facts.federation,
        "round": facts.round,
        "submodel": candidate.submodel,
        "base_digest": facts.base_digest,
        "adapter_sha256": candidate.digest,
        "champion_before": champion and champion.version,
        **verdict.to_dict(),
    }
    path = layout.metrics("gate", facts.federation)
    write_json(path, figures)
    return path


def _entry(candidate: Candidate, verdict: Verdict, text: Path, sequences: NDArray[np.int32]) -> NewAdapter:
    facts, manifest = candidate.facts, candidate.package.manifest
    tags = {
        "federation": facts.federation,
        "round": str(facts.round),
        "submodel": candidate.submodel,
        "base_digest": facts.base_digest,
        "adapter": candidate.digest,
        "package": candidate.package.digest,
        "counter": str(manifest.counter),
    }
    params = {
        "rank": candidate.adapter.rank,
        "scale": candidate.adapter.scale,
        "modules": len(candidate.adapter.pairs),
        "sequences": len(sequences),
        "sequence_tokens": sequences.shape[1],
        "text_sha256": file_digest(text),
    }
    name = f"{facts.federation} round {facts.round}"
    return NewAdapter(candidate.submodel, name, tags, params, _metrics(candidate, verdict), candidate.curve)


def _metrics(candidate: Candidate, verdict: Verdict) -> dict[str, float]:
    metrics = {f"agreement/{name}": value for name, value in verdict.agreement.items()}
    for container, gain in verdict.gains.items():
        prefix = "" if container == REFERENCE_CONTAINER else f"{container}/"
        metrics |= {
            f"{prefix}loss": gain.loss_candidate,
            f"{prefix}loss_base": gain.loss_base,
            f"{prefix}loss_reference": gain.loss_reference,
            f"{prefix}improvement": gain.mean,
            f"{prefix}improvement_low": gain.low,
            f"{prefix}perplexity": math.exp(gain.loss_candidate),
            f"{prefix}perplexity_base": math.exp(gain.loss_base),
        }
    if candidate.facts.held_out_loss is not None:
        metrics["federation/held_out_loss"] = candidate.facts.held_out_loss
    return metrics


def _print_passed(candidate: Candidate, verdict: Verdict, version: int, link: Path) -> None:
    facts = candidate.facts
    print(f"{candidate.submodel}: champion is version {version}, {facts.federation} after round {facts.round}")
    for container, gain in verdict.gains.items():
        print(
            f"  {container}: held-out perplexity {math.exp(gain.loss_base):.2f} without an adapter,"
            f" {math.exp(gain.loss_reference):.2f} before, {math.exp(gain.loss_candidate):.2f} now"
            f" ({gain.mean:.4f} nats a token lower, at least {gain.low:.4f})"
        )
    package = _shown(candidate.package.directory)
    print(f"next: python -m edge_runtime generate --package {package} --adapter {_shown(link)} --prompt ...")


def _shown(path: Path) -> Path:
    """Relative to where the user stands, when it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
