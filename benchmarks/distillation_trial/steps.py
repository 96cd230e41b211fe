"""One training step of each way that is compared. A step takes a mark: a function told which phase just ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from benchmarks.distillation_trial.models import Setting, build_model
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.fast_layers import compile_layers
from pipeline.distillation.head_losses import HeadSignal, head_loss
from pipeline.distillation.master_weights import attach_masters
from pipeline.distillation.signals import DenseSignal, SparseSignal

Mark = Callable[[str], None]
Step = Callable[[Mark], torch.Tensor]
_LEARNING_RATE = 1e-4
_RING = 4


@dataclass(frozen=True, slots=True)
class Case:
    """How a case trains.

    Attributes:
        name: In the table.
        signal: ``plain`` (whole logits, as one writes it with transformers), ``online``, ``float8`` or ``stored``.
        batch_sequences: Of one forward and backward pass.
        micro_batches: Passes a step of the optimizer.
        chunk_tokens: Positions whose logits exist at a time.
        whole_loop: The loop that ``stage=distill`` runs, not only its steps.
        ahead: The teacher reads the next batch on a stream of its own while the student learns from this one.
    """

    name: str
    signal: str
    batch_sequences: int
    micro_batches: int = 1
    chunk_tokens: int = 4096
    ahead: bool = False
    whole_loop: bool = False

    def tokens_per_step(self, setting: Setting) -> int:
        return self.batch_sequences * self.micro_batches * setting.sequence_tokens


@dataclass(slots=True)
class Marks:
    """Times of phases by events on the GPU, and nothing elsewhere."""

    on: bool = False
    events: list[tuple[str, torch.cuda.Event]] = field(default_factory=list)

    def __call__(self, name: str) -> None:
        if self.on:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append((name, event))

    def milliseconds(self) -> dict[str, float]:
        """Sum of each phase: the time since the mark before."""
        sums: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.events, self.events[1:], strict=False):
            sums[name] = sums.get(name, 0.0) + before.elapsed_time(after)
        return sums


def make_step(case: Case, setting: Setting, teacher: Any, device: torch.device, compiled: bool) -> Step:
    """Build the case's student and optimizer around a teacher."""
    student = build_model(setting.student, setting, device, 1, torch.bfloat16)
    if case.signal == "plain":
        return _plain_step(case, setting, teacher, student)
    if compiled:
        compile_layers(student)
    return _fused_step(case, setting, teacher, student)


def _plain_step(case: Case, setting: Setting, teacher: Any, student: Any) -> Step:
    """Two models, whole logits of both, KL of torch in fp32, AdamW on the bf16 weights."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE, fused=True)
    batches = _token_batches(case, setting, student.device)

    def step(mark: Mark) -> torch.Tensor:
        mark("start")
        tokens = batches[0]
        with torch.no_grad():
            targets = teacher(input_ids=tokens, use_cache=False).logits
        mark("teacher")
        logits = student(input_ids=tokens, use_cache=False).logits
        mark("student")
        log_q = functional.log_softmax(logits.float(), dim=-1).flatten(0, 1)
        log_p = functional.log_softmax(targets.float(), dim=-1).flatten(0, 1)
        loss = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        mark("loss")
        loss.backward()
        mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        return loss.detach()

    return step


def _fused_step(case: Case, setting: Setting, teacher: Any, student: Any) -> Step:
    """Compiled layers, loss fused with the head, fp32 originals of bf16 weights."""
    weights = attach_masters(student.parameters())
    optimizer = torch.optim.AdamW(weights.masters, lr=_LEARNING_RATE, fused=student.device.type == "cuda")
    batches = _token_batches(case, setting, student.device)
    signals = (
        _stored_signals(case, setting, student.device) if case.signal == "stored" else _taught(case, teacher, batches)
    )
    kind = LossKind.SAMPLED_KL if case.signal == "stored" else LossKind.FORWARD_KL
    turns = itertools.count()

    def step(mark: Mark) -> torch.Tensor:
        mark("start")
        total = torch.zeros((), device=student.device)
        for _ in range(case.micro_batches):
            tokens, signal = batches[next(turns) % _RING], next(signals)
            mark("teacher")
            hidden = student.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            mark("student")
            head = student.get_output_embeddings().weight
            value = head_loss(hidden, head, signal, kind, None, case.chunk_tokens)
            mark("loss")
            loss = value.total / (value.weight * case.micro_batches)
            loss.backward()
            total += loss.detach()
            mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.publish()
        mark("optimizer")
        return total

    return step


def _taught(case: Case, teacher: Any, batches: list[torch.Tensor]) -> Iterator[HeadSignal]:
    """The teacher's hidden states of one batch after another."""
    head = teacher.get_output_embeddings().weight

    @torch.no_grad()
    def teach(turn: int) -> torch.Tensor:
        tokens = batches[turn % _RING]
        hidden: torch.Tensor = teacher.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    states = _begun_early(teach) if case.ahead else map(teach, itertools.count())
    for state in states:
        yield DenseSignal(state, head)


def _begun_early(teach: Callable[[int], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each result, after the next one's work was queued on a stream of its own."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    following = teach(0)
    for turn in itertools.count(1):
        main.wait_stream(side)  # what is given now is complete
        side.wait_stream(main)  # and the next one starts beside the step that learns from it
        current = following
        with torch.cuda.stream(side):
            following = teach(turn)
            following.record_stream(main)
        yield current


def _stored_signals(case: Case, setting: Setting, device: torch.device) -> Iterator[HeadSignal]:
    draws = [draws_of(case, setting, seed) for seed in range(_RING)]
    for ids, weights in itertools.cycle(draws):
        yield SparseSignal(ids.to(device, non_blocking=True), weights.to(device, non_blocking=True))


def _token_batches(case: Case, setting: Setting, device: torch.device) -> list[torch.Tensor]:
    """A ring of random batches (B, T)."""
    shape = case.batch_sequences, setting.sequence_tokens
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(setting.vocabulary, shape, generator=generator).to(device) for _ in range(_RING)]


def draws_of(case: Case, setting: Setting, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of a batch in host memory as the store decodes them: distinct ids (N, K), weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = case.batch_sequences * setting.sequence_tokens
    starts = torch.randint(setting.vocabulary // setting.draws, (rows, setting.draws), generator=generator)
    ids = starts * setting.draws + torch.arange(setting.draws)
    weights = torch.rand(rows, setting.draws, generator=generator)
    weights /= weights.sum(dim=-1, keepdim=True)
    return (ids.pin_memory(), weights.pin_memory()) if torch.cuda.is_available() else (ids, weights)
