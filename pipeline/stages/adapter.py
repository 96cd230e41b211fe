"""adapter: the library of a submodel's adapters: train, list, show, score, compose, remove.

No step of a run: it is called by people, and its outputs belong to the project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import Adapter
from edge_runtime.formats.package import Package, open_package
from edge_runtime.formats.signing import load_trust
from pipeline.adapters.composition import compose_adapters
from pipeline.adapters.library import (
    Origin,
    Record,
    add_adapter,
    find_record,
    is_champion,
    list_records,
    open_adapter,
    record_scores,
    remove_adapter,
)
from pipeline.artifacts import Layout, fingerprint, sole_writer
from pipeline.tracking_library import AdapterEvent, track_adapter

ACTIONS = ("train", "list", "show", "score", "compose", "remove")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What an action needs.

    Attributes:
        name: Of the adapter; every action but list needs it.
        goal: Of train: ``recovery`` of what 4 bits cost, or ``text``.
        base: What a text adapter is trained on: ``int4``, the codes that ship, or ``fp``.
        rank: 1 to 256 for train; for compose the result's, None keeps all ranks. TFLite files take what they were
            exported for (export.lora_rank).
        alpha: Of train; the adapter's output is multiplied by alpha / rank.
        targets: Projections of train; None takes those that the package has slots for.
        steps: Updates of train.
        batch_sequences: Sequences an update.
        learning_rate: At its highest, in (0, 1).
        text: Of train and score: a file of documents instead of the run's own sequences, or None.
        held_out_sequences: Sequences of every figure, 1 or more.
        parts: Of compose: name to weight.
        licence: Of what the adapter is made from.
        force: Of remove: also the champion.
    """

    name: str | None = None
    goal: Literal["recovery", "text"] = "recovery"
    base: Literal["int4", "fp"] = "int4"
    rank: int | None = None
    alpha: int = 16
    targets: tuple[str, ...] | None = None
    steps: int = 200
    batch_sequences: int = 8
    learning_rate: float = 1e-3
    text: Path | None = None
    held_out_sequences: int = 16
    parts: Mapping[str, float] | None = None
    licence: str = "unknown"
    force: bool = False


@dataclass(frozen=True, slots=True)
class AdapterContext:
    """Where an action works.

    Attributes:
        layout: Of the run whose submodel it is.
        submodel: Its name.
        package: The signed package; None takes the layout's.
        store: Of MLflow.
        threads: Of the runtimes.
        seed: Of everything random.
        bf16: Train in bfloat16.
    """

    layout: Layout
    submodel: str
    store: Path
    package: Path | None = None
    threads: int = 2
    seed: int = 7
    bf16: bool = False


def run_action(action: str, settings: AdapterSettings, context: AdapterContext) -> None:
    """Do one thing with the library of a submodel and print what came of it.

    Raises:
        UserError: No such action, a setting is missing, or what it names is not there.
        SevenfoldError: Adapter, package or weights cannot be used.
    """
    if action not in ACTIONS:
        raise UserError("action", action, ", ".join(ACTIONS))
    adapters = context.layout.adapters(context.submodel)
    if action == "list":
        _print_list(adapters)
        return
    if settings.name is None:
        raise UserError("adapter.name", None, f"a name, for action={action}", "add adapter.name=NAME")
    if action == "show":
        _print_record(adapters, find_record(adapters, settings.name))
        return
    with sole_writer(context.layout, "adapter", context.submodel):
        if action == "remove":
            remove_adapter(adapters, settings.name, even_champion=settings.force)
            print(f"{context.submodel}: {settings.name} is gone")
        elif action == "train":
            _print_record(adapters, _train(settings.name, settings, context))
        elif action == "compose":
            _print_record(adapters, _compose(settings.name, settings, context))
        else:
            _print_record(adapters, _score(settings.name, settings, context))


def _train(name: str, settings: AdapterSettings, context: AdapterContext) -> Record:
    from pipeline.adapters.bases import load_dequantized
    from pipeline.adapters.training import fit_adapter, train_on_text, train_recovery
    from pipeline.distillation.batches import Sequences
    from pipeline.distillation.checkpoints import discard_checkpoint
    from pipeline.distillation.correction import LoraSettings
    from pipeline.distillation.trainer import TrainPlan
    from pipeline.export.assembly import WEIGHTS_FILE
    from pipeline.export.checkpoint import load_student

    layout, package = context.layout, _package(context)
    base_digest = package.manifest.base_digest
    if any(record.name == name for record in list_records(layout.adapters(context.submodel))):
        raise UserError("adapter.name", name, "a new name", f"choose another, or action=remove adapter.name={name}")
    lora = LoraSettings(settings.rank or 8, settings.alpha, _targets(settings, package), seed=context.seed)
    plan = TrainPlan(
        settings.steps, settings.batch_sequences, settings.learning_rate, weight_decay=0.0, warmup_ratio=0.05,
        bf16=context.bf16, seed=context.seed, checkpoint_every_steps=100,
    )  # fmt: skip
    tokens, counts, source = _training_tokens(settings, context, package)
    held_out = _held_out(settings, context, package)
    digest = fingerprint(name, asdict(lora), asdict(plan), settings.goal, settings.base, source, base_digest)
    checkpoint = layout.checkpoint("adapter", digest)
    student = load_student(layout.student(context.submodel))
    quantized, spec = load_dequantized(
        layout.student(context.submodel), layout.weights(context.submodel) / WEIGHTS_FILE
    )
    sequences = Sequences(tokens, counts)
    if settings.goal == "recovery":
        done = train_recovery(
            quantized, student, lora, sequences, held_out, plan, checkpoint, base_digest=base_digest
        )  # fmt: skip
    else:
        model = quantized if settings.base == "int4" else student
        done = train_on_text(model, lora, sequences, held_out, plan, checkpoint, base_digest=base_digest)
    kind: Any = "recovery" if settings.goal == "recovery" else "trained"
    variant = "int4" if settings.goal == "recovery" else settings.base
    origin = Origin(kind, variant, settings.licence, source, {key: round(v, 6) for key, v in done.figures.items()})
    record = add_adapter(layout.adapters(context.submodel), name, fit_adapter(done.adapter, spec), origin)
    params = {"goal": settings.goal, "base": variant, **asdict(lora), "steps": plan.steps, "source": source}
    _track(context, record, "train", params, record.figures, done.history)
    discard_checkpoint(checkpoint)
    return record


def _compose(name: str, settings: AdapterSettings, context: AdapterContext) -> Record:
    if not settings.parts:
        raise UserError("adapter.parts", settings.parts, "names and weights", "add 'adapter.parts={one:0.5,other:0.5}'")
    adapters, package = context.layout.adapters(context.submodel), _package(context)
    parts = [_open(context, package, part) for part in settings.parts]
    composed = compose_adapters(parts, list(settings.parts.values()), settings.rank)
    records = [find_record(adapters, part) for part in settings.parts]
    variants = {record.base_variant for record in records}
    origin = Origin(
        "composed", "fp" if variants == {"fp"} else "int4",
        " and ".join(dict.fromkeys(record.licence for record in records)),
        " ".join(f"{weight:+g}*{part}" for part, weight in settings.parts.items()),
        {"cut_off_ratio": round(composed.error, 6)},
    )  # fmt: skip
    record = add_adapter(adapters, name, composed.adapter, origin)
    _track(context, record, "compose", {"source": record.source, "rank": record.rank}, record.figures)
    return record


def _score(name: str, settings: AdapterSettings, context: AdapterContext) -> Record:
    from pipeline.adapters.scores import score_adapter
    from pipeline.export.checkpoint import load_student

    package = _package(context)
    adapter = _open(context, package, name)
    student = load_student(context.layout.student(context.submodel))
    scores = score_adapter(
        adapter, student, package, _held_out(settings, context, package), threads=context.threads
    )  # fmt: skip
    record = record_scores(
        context.layout.adapters(context.submodel), name, scores.by_variant, scores.refused
    )  # fmt: skip
    figures = {
        f"{variant}/{figure}": value
        for variant, values in scores.by_variant.items()
        for figure, value in values.items()
    }
    _track(context, record, "score", {"held_out_sequences": settings.held_out_sequences}, figures)
    return record


def _package(context: AdapterContext) -> Package:
    return open_package(context.package or context.layout.package(context.submodel), load_trust())


def _open(context: AdapterContext, package: Package, name: str) -> Adapter:
    manifest = package.manifest
    return open_adapter(context.layout.adapters(context.submodel), name, manifest.decoder, manifest.base_digest)


def _targets(settings: AdapterSettings, package: Package) -> tuple[str, ...]:
    """What was asked for, or what every container of the package has slots for."""
    if settings.targets:
        return settings.targets
    slots = [container.adapters.targets for name, container in package.manifest.containers.items() if name == "onnx"]
    if not slots or not slots[0]:
        raise UserError(
            "adapter.targets", None, "projections such as q_proj: the package has no slots to take them from",
            "add adapter.targets=[q_proj,v_proj]",
        )  # fmt: skip
    return tuple(slots[0])


def _training_tokens(
    settings: AdapterSettings, context: AdapterContext, package: Package
) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None, str]:
    """(tokens (S, T), counts or None, where from): the run's own sequences, or a file's."""
    if settings.text is not None:
        tokens, counts = _pack_file(settings.text, package, context, None)
        return tokens, counts, settings.text.name
    return _stored(context, "train.npy"), None, "the run's training text"


def _held_out(settings: AdapterSettings, context: AdapterContext, package: Package) -> NDArray[np.int32]:
    """The run's held-out sequences; a text of the user's has no side that is held out."""
    return _stored(context, "held_out.npy")[: settings.held_out_sequences]


def _stored(context: AdapterContext, name: str) -> NDArray[np.int32]:
    path = context.layout.sequences(context.submodel) / name
    if not path.is_file():
        raise UserError("adapter.text", str(path), "the sequences of a finished run", "run python -m pipeline first")
    tokens: NDArray[np.int32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return tokens


def _pack_file(
    text: Path, package: Package, context: AdapterContext, most: int | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """A file's documents: texts whole, of conversations the answers."""
    from pipeline.data.packing import document_rows, pack_for_package

    length = min(_stored(context, "train.npy").shape[1], package.manifest.decoder.context_tokens)
    packed = pack_for_package(package, document_rows(text), length, most)
    return packed.tokens, packed.counts


def _track(
    context: AdapterContext, record: Record, action: str, params: Mapping[str, Any], metrics: Mapping[str, float],
    history: Any = (),
) -> None:  # fmt: skip
    event = AdapterEvent(
        context.submodel, record.name, action, record.base_digest, record.sha256, params, metrics, history
    )
    track_adapter(context.store, event)


def _print_list(adapters: Path) -> None:
    records = list_records(adapters)
    if not records:
        print(f"{adapters.name}: no adapter yet; action=train adapter.name=NAME makes one")
    for record in records:
        scored = " ".join(
            f"{variant} loss {figures['base_loss']:.4f} -> {figures['loss']:.4f}"
            for variant, figures in record.scores.items()
        )
        star = " (champion)" if is_champion(adapters, record) else ""
        shape = f"{record.kind}, rank {record.rank}, {' '.join(record.targets)}"
        print(f"{record.name}{star}: {shape}; {scored or 'no scores'}")


def _print_record(adapters: Path, record: Record) -> None:
    star = {"champion": True} if is_champion(adapters, record) else {}
    print(json.dumps(record.model_dump(mode="json") | star, indent=2))
