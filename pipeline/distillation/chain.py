"""A family as a chain: what each student starts from, whom it learns from, and in which order.

A pure plan: names in, steps out. One cut from a 7B to 135M removes 98 %, which no published recipe survives; cut
step by step (7B, 3B, 1.5B, 0.5B, 135M), each student is the next one's initialiser, and its teacher where wanted.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.formats.errors import UserError

if TYPE_CHECKING:
    from pipeline.distillation.shapes import StudentShape

TEACHER = "teacher"


class Start(StrEnum):
    """What a student's first weights are."""

    PRUNED = "pruned"
    CHECKPOINT = "checkpoint"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Link:
    """One submodel's settings.

    Attributes:
        name: Of the submodel.
        cut_from: What it is cut from: ``teacher`` or the name of another submodel.
        checkpoint: An existing small checkpoint to start from instead.
        learns_from: Whose distribution it learns: ``teacher`` or the name of another submodel.
        trims: Whether it keeps a part of the vocabulary only.
        whole: It is the teacher itself.
    """

    name: str
    cut_from: str = TEACHER
    checkpoint: Path | None = None
    learns_from: str = TEACHER
    trims: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class ChainStep:
    """One student, at its place in the order.

    Attributes:
        name: Of the submodel.
        start: Cut out of ``initialiser``, a checkpoint, or the teacher as it is.
        initialiser: The model it is cut from, and on which importance is measured: ``teacher``, the name of a student
            that an earlier step trained, or None where nothing is cut.
        checkpoint: Its first weights where ``start`` says so.
        learns_from: Whose distribution it learns.
        needs: Submodels that must be trained before, in the family's order.
        depth: Cuts between the teacher and this student.
    """

    name: str
    start: Start
    initialiser: str | None
    checkpoint: Path | None
    learns_from: str
    needs: tuple[str, ...]
    depth: int

    @property
    def measures_anew(self) -> bool:
        """Whether the teacher's stored importance is of no use: another model is cut."""
        return self.initialiser not in (None, TEACHER)

    @property
    def uses_stored_targets(self) -> bool:
        """Whether it learns from the targets that the teacher wrote once."""
        return self.learns_from == TEACHER


def plan_chain(links: Sequence[Link]) -> tuple[ChainStep, ...]:
    """Students in an order in which each comes after what it needs; the given order wherever that is free.

    Raises:
        UserError: No submodels, a name that is taken twice or unknown, settings that contradict, or a cycle.
    """
    if not links:
        raise UserError("family", "no submodels", "at least one")
    by_name = {link.name: link for link in links}
    _require_names(links, by_name)
    needs = {link.name: _needs(link, links) for link in links}
    steps: dict[str, ChainStep] = {}
    while len(steps) < len(links):
        ready = next((link for link in links if link.name not in steps and steps.keys() >= set(needs[link.name])), None)
        if ready is None:
            raise UserError("submodel.cut_from", _cycle(needs, steps), "a chain that begins at the teacher")
        initialiser = None if ready.checkpoint or ready.whole else ready.cut_from
        depth = 0 if initialiser is None else 1 + (0 if initialiser == TEACHER else steps[initialiser].depth)
        start = Start.WHOLE if ready.whole else Start.CHECKPOINT if ready.checkpoint else Start.PRUNED
        steps[ready.name] = ChainStep(
            ready.name, start, initialiser, ready.checkpoint, ready.learns_from, needs[ready.name], depth
        )
    return tuple(steps.values())


def require_vocabularies(links: Sequence[Link], *, aligned: bool) -> None:
    """Refuse submodels whose ids could not be compared; tokenizers of checkpoints are compared when they are read.

    Args:
        links: What ``plan_chain`` took.
        aligned: Whether the loss compares words, and not ids.

    Raises:
        UserError: Naming the submodel and the setting.
    """
    by_name = {link.name: link for link in links}
    for link in links:
        inherited = _trimmed_by(link.cut_from, by_name)
        if link.trims and inherited is not None:
            raise UserError(
                f"submodel {link.name}: vocab_coverage, vocab_size", f"given, and cut from {link.cut_from}",
                f"one trimming: {inherited} has its vocabulary trimmed already", "leave them out, or cut from another",
            )  # fmt: skip
        other = _trimmed_by(link.learns_from, by_name)
        if not aligned and other not in (None, _trimmed_by(link.name, by_name)):
            raise UserError(
                f"submodel {link.name}: learns_from", link.learns_from,
                f"one with all of the teacher's tokens, or the same ones: {other} has its vocabulary trimmed",
                "name another, or choose distill.loss=aligned, which compares words",
            )  # fmt: skip


def require_shrinking(steps: Sequence[ChainStep], shapes: Mapping[str, StudentShape]) -> None:
    """Refuse a chain in which a student is larger than the one it is cut from.

    Args:
        steps: What ``plan_chain`` gave.
        shapes: Sizes of each submodel that is cut; those that start from a checkpoint may be left out.

    Raises:
        UserError: Naming both submodels and the size.
    """
    for step in steps:
        if step.initialiser is None or not step.measures_anew or step.initialiser not in shapes:
            continue
        for field in shapes[step.name].__slots__:
            size, limit = getattr(shapes[step.name], field), getattr(shapes[step.initialiser], field)
            if size > limit:
                raise UserError(
                    f"submodel {step.name}: {field}", size, f"at most the {limit} of {step.initialiser}",
                    "make it smaller, or cut it from the teacher",
                )  # fmt: skip


def describe_chain(steps: Sequence[ChainStep], *, stored: bool = True) -> list[str]:
    """One line a step for a dry run: what it starts from, what is measured for that, and whom it learns from.

    Args:
        steps: What ``plan_chain`` gave.
        stored: The teacher's draws were written once; else the teacher runs beside each student.
    """
    lines = []
    for step in steps:
        if step.start == Start.WHOLE:
            lines.append(f"{step.name}: the teacher itself, nothing cut, nothing learned")
            continue
        if step.initialiser is None:
            origin = f"starts from {step.checkpoint}, nothing measured"
        else:
            where = "before its training" if step.measures_anew else "by stage targets"
            origin = f"cut from {step.initialiser}, importance measured on it {where}"
        learned = "its stored draws" if stored and step.uses_stored_targets else "run beside it"
        lines.append(f"{step.name}: {origin}; learns from {step.learns_from}, {learned}")
    return lines


def _require_names(links: Sequence[Link], by_name: Mapping[str, Link]) -> None:
    known = [TEACHER, *by_name]
    for link in links:
        if link.name == TEACHER:
            raise UserError("submodel.name", TEACHER, "any other name", "it stands for the family's teacher")
        if sum(other.name == link.name for other in links) > 1:
            raise UserError("family", link.name, "each submodel once")
        for field, value in (("cut_from", link.cut_from), ("learns_from", link.learns_from)):
            if value not in known:
                close = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
                hint = f"did you mean {close[0]}?" if close else ""
                raise UserError(f"submodel {link.name}: {field}", value, ", ".join(known), hint)
        if link.checkpoint is not None and link.cut_from != TEACHER:
            raise UserError(
                f"submodel {link.name}: cut_from", link.cut_from, "nothing beside checkpoint", "choose one of the two"
            )  # fmt: skip


def _needs(link: Link, links: Sequence[Link]) -> tuple[str, ...]:
    wanted = {link.learns_from} | ({link.cut_from} if link.checkpoint is None else set())
    return tuple(other.name for other in links if other.name in wanted)


def _trimmed_by(name: str, by_name: Mapping[str, Link]) -> str | None:
    """The submodel whose trimming ``name`` has, its own or that of what it is cut from."""
    while name != TEACHER and not by_name[name].trims and by_name[name].checkpoint is None:
        name = by_name[name].cut_from
    return name if name != TEACHER and by_name[name].trims else None


def _cycle(needs: Mapping[str, tuple[str, ...]], done: Mapping[str, ChainStep]) -> str:
    """A cycle among those that are not done, as ``a -> b -> a``."""
    path = [next(name for name in needs if name not in done)]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in needs[path[-1]] if name not in done))
    return " -> ".join(path[path.index(path[-1]) :])
