"""A teacher with another vocabulary: the same text in its tokens, compared wherever both tokenizers cut.

Where a token of the student and one of the teacher end at the same character, both have read the same
text, so what they predict next can be compared without multiplying probabilities of parts. Tokens that
both vocabularies have are compared by a generalised JSD, the others by the L1 distance of sorted
probabilities: Universal Logit Distillation (arXiv 2402.12030), and its hybrid in TRL's GOLD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch, LossSum, to_device
from pipeline.distillation.objectives import hidden_and_head
from pipeline.distillation.signals import checked_head, head_logits, last_hidden
from pipeline.distillation.token_bytes import TokenBytes, TokenKind, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_Named = dict[TokenBytes, int]
_SMALLEST = 1e-8  # probabilities under the logarithm, as in TRL


@dataclass(frozen=True, slots=True)
class TextTokens:
    """One side: a tokenizer, the id that ends a document, and rows of its model's output matrix."""

    tokenizer: Tokenizer
    eos_id: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """Tokens of the same bytes: student's ids (M,) and teacher's (M,); and masks (V,) of those without a partner."""

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_only: torch.Tensor
    teacher_only: torch.Tensor


@dataclass(frozen=True, slots=True)
class Alignment:
    """The same text in the teacher's tokens (L,), and the positions (N,) of both sides that end together."""

    tokens: NDArray[np.int64]
    student: NDArray[np.int64]
    teacher: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AlignedSignal:
    """The teacher's hidden states (N, H) at shared ends, its output matrix, and where they are in (B * T)."""

    hidden: torch.Tensor
    head: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class AlignedLoss:
    """How two distributions over different vocabularies are compared.

    Attributes:
        beta: Of the JSD over shared tokens (0..1): 0 is the forward KL, 1 the reverse.
        shared_weight: Of that JSD (0..1), the sorted distance having the rest; None: the share of the
            teacher's vocabulary that is shared.
        chunk_positions: Positions whose logits exist at once (1..65536).
    """

    beta: float = 0.5
    shared_weight: float | None = None
    chunk_positions: int = 256

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("shared_weight", self.shared_weight)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"distill.aligned.{name}", value, "0..1")


@dataclass(frozen=True, slots=True)
class AlignedSource:
    """A teacher of another vocabulary, run on every batch."""

    teacher: Any
    head: torch.Tensor
    student_side: TextTokens
    teacher_side: TextTokens
    bf16: bool

    @classmethod
    def open(cls, teacher: Any, student_side: TextTokens, teacher_side: TextTokens, bf16: bool) -> AlignedSource:
        """Take a causal teacher.

        Raises:
            UserError: It is not one, or it has no rows for some tokens of its tokenizer.
        """
        head = checked_head(teacher)
        if teacher_side.vocabulary != len(head):
            raise UserError("teacher.tokenizer", teacher_side.vocabulary, f"the {len(head)} rows of the teacher")
        return cls(teacher, head, student_side, teacher_side, bf16)

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its alignments, for the thread that makes batches ahead of the training loop."""
        rows = batch.tokens.cpu().numpy()
        return replace(batch, signal=[align(row, self.student_side, self.teacher_side) for row in rows])

    def signal(self, batch: Batch) -> AlignedSignal:
        """What the teacher says of the batch, at the ends where the student's prediction counts."""
        alignments: list[Alignment] = (batch if isinstance(batch.signal, list) else self.prepare(batch)).signal
        length = max(1, *(len(alignment.tokens) for alignment in alignments))
        tokens = np.full((len(alignments), length), self.teacher_side.eos_id, np.int64)  # the rest is never seen
        for row, alignment in zip(tokens, alignments, strict=True):
            row[: len(alignment.tokens)] = alignment.tokens
        sequence_tokens = batch.tokens.shape[1]
        student = np.concatenate([index * sequence_tokens + item.student for index, item in enumerate(alignments)])
        teacher = np.concatenate([index * length + item.teacher for index, item in enumerate(alignments)])
        counted = batch.counts.cpu().numpy().reshape(-1)[student]
        hidden = last_hidden(self.teacher, torch.from_numpy(tokens), self.bf16).flatten(0, 1)
        chosen = hidden[torch.from_numpy(teacher[counted]).to(hidden.device)]
        places = torch.from_numpy(student[counted]).to(batch.tokens.device)
        return AlignedSignal(chosen.to(self.head.device), self.head, places)


def aligned_objective(source: AlignedSource, loss: AlignedLoss) -> Callable[[Any, Batch], LossSum]:
    """What the training loop minimises for a student of a teacher with another vocabulary.

    Raises:
        UserError: A tokenizer has ids that its model has no row for.
    """
    shared = match_vocabularies(source.student_side, source.teacher_side)

    def objective(model: Any, batch: Batch) -> LossSum:
        hidden, head = hidden_and_head(model, batch.tokens)
        signal = source.signal(batch)
        return aligned_loss(hidden, head, signal, to_device(shared, hidden.device), loss)

    return objective


def aligned_loss(
    hidden: torch.Tensor, head: torch.Tensor, signal: AlignedSignal, shared: SharedVocabulary, loss: AlignedLoss
) -> LossSum:
    """Compare student and teacher, chunk by chunk; logits of one chunk exist at a time, also in the backward pass.

    Args:
        hidden: The student's last hidden states (B, T, H).
        head: Its output matrix (V, H).
        signal: The teacher's side.
        shared: From ``match_vocabularies``, on the student's device.
        loss: How to compare.

    Returns:
        The sum over shared ends, and their number.
    """
    states = hidden.flatten(0, 1)[signal.places]

    def compare(student: torch.Tensor, matrix: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(head_logits(teacher, signal.head), dim=-1).to(student.device)
        q = torch.softmax((student @ matrix.T).float(), dim=-1)
        return aligned_divergence(q, p, shared, loss).sum()

    total = states.sum() * 0.0
    for student, teacher in zip(
        states.split(loss.chunk_positions), signal.hidden.split(loss.chunk_positions), strict=True
    ):
        total = total + checkpoint(compare, student, head, teacher, use_reentrant=False, preserve_rng_state=False)
    return LossSum(total, torch.tensor(float(len(states)), device=states.device))


def aligned_divergence(q: torch.Tensor, p: torch.Tensor, shared: SharedVocabulary, loss: AlignedLoss) -> torch.Tensor:
    """(N,): how far the student's q (N, V) is from the teacher's p (N, W)."""
    weight = len(shared.teacher_ids) / p.shape[-1] if loss.shared_weight is None else loss.shared_weight
    matched = _jsd(p[:, shared.teacher_ids], q[:, shared.student_ids], loss.beta)
    left, right = (
        side[:, only].sort(dim=-1, descending=True).values
        for side, only in ((q, shared.student_only), (p, shared.teacher_only))
    )
    if not left.shape[-1] or not right.shape[-1]:  # as in GOLD: no partner to compare with
        return weight * matched
    longest = max(left.shape[-1], right.shape[-1])
    left, right = (functional.pad(side, (0, longest - side.shape[-1])) for side in (left, right))
    return weight * matched + (1 - weight) * (left - right).abs().sum(dim=-1)


def match_vocabularies(student: TextTokens, teacher: TextTokens) -> SharedVocabulary:
    """Pair tokens that stand for the same bytes, however their tokenizers write them; and the ends of documents.

    Special tokens are paired by name. A token for a byte as such finds another of its kind, or else an
    ordinary token of that byte which has no partner yet.

    Raises:
        UserError: A tokenizer has ids that its model has no row for.
    """
    mine, theirs = _named_tokens(student), _named_tokens(teacher)
    for who, side, named in (("student", student, mine), ("teacher", teacher, theirs)):
        largest = max([side.eos_id, *named.values()])
        if largest >= side.vocabulary:
            raise UserError(f"{who}.tokenizer", f"id {largest}", f"0..{side.vocabulary - 1}, the rows of the {who}")
    student_ids, teacher_ids = torch.tensor(_pairs(mine, theirs, student.eos_id, teacher.eos_id)).unbind(1)
    student_only = torch.ones(student.vocabulary, dtype=torch.bool).index_fill(0, student_ids, False)
    teacher_only = torch.ones(teacher.vocabulary, dtype=torch.bool).index_fill(0, teacher_ids, False)
    return SharedVocabulary(student_ids, teacher_ids, student_only, teacher_only)


def align(tokens: NDArray[np.integer], student: TextTokens, teacher: TextTokens) -> Alignment:
    """Write a student's sequence (T,) in the teacher's tokens and find the positions that end together.

    Documents are aligned one by one; their ends are ends of both sides.
    """
    ends = np.flatnonzero(tokens == student.eos_id)
    teacher_tokens: list[int] = []
    pairs: list[tuple[int, int]] = []
    for start, stop in pairwise([-1, *ends.tolist(), len(tokens)]):
        text, student_ends = _student_ends(tokens[start + 1 : stop].tolist(), student.tokenizer)
        encoding = teacher.tokenizer.encode(text, add_special_tokens=False)
        teacher_ends = span_ends(encoding.offsets)
        shared = sorted(student_ends.keys() & teacher_ends.keys())
        pairs += [(start + 1 + student_ends[end], len(teacher_tokens) + teacher_ends[end]) for end in shared]
        teacher_tokens += encoding.ids
        if stop < len(tokens):
            pairs.append((stop, len(teacher_tokens)))
            teacher_tokens.append(teacher.eos_id)
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return Alignment(np.array(teacher_tokens, np.int64), both[:, 0], both[:, 1])


def span_ends(offsets: list[tuple[int, int]]) -> dict[int, int]:
    """Characters after which a token ends and none goes on, and the token.

    Tokens that are bytes of one character have the same offsets: only the last of them ends it.
    """
    following = [*(start for start, _ in offsets[1:]), offsets[-1][1]] if offsets else []
    return {
        end: index
        for index, ((start, end), after) in enumerate(zip(offsets, following, strict=True))
        if start < end <= after
    }


def _student_ends(ids: list[int], tokenizer: Tokenizer) -> tuple[str, dict[int, int]]:
    """The text of some tokens, and the characters that end with a token; it need not be how the text is encoded."""
    from tokenizers.decoders import DecodeStream

    stream, text, length = DecodeStream(skip_special_tokens=False), [], 0
    ends = {}
    for index, id in enumerate(ids):
        piece = stream.step(tokenizer, id)
        if piece:  # nothing comes out within a character
            text.append(piece)
            length += len(piece)
            ends[length] = index
    return "".join(text), ends


def _pairs(mine: _Named, theirs: _Named, my_eos: int, their_eos: int) -> list[tuple[int, int]]:
    """One to one, in the order of the first."""
    pairs = {my_eos: their_eos}
    taken = {their_eos}
    values = [bytes([value]) for value in range(256)]
    bytes_as_text = [(TokenBytes(TokenKind.BYTE, value), TokenBytes(TokenKind.TEXT, value)) for value in values]
    names = [(name, name) for name in mine.keys() & theirs.keys()]
    for name, other in [*names, *bytes_as_text, *((text, byte) for byte, text in bytes_as_text)]:
        first, second = mine.get(name), theirs.get(other)
        if first is not None and second is not None and first not in pairs and second not in taken:
            pairs[first] = second
            taken.add(second)
    return sorted(pairs.items())


def _named_tokens(side: TextTokens) -> _Named:
    """The first id of what stands for the same."""
    named: _Named = {}
    for id, name in token_bytes(side.tokenizer).items():
        named.setdefault(name, id)
    return named


def _jsd(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised JSD (N,) over some of the tokens."""
    log_p, log_q = p.clamp_min(_SMALLEST).log(), q.clamp_min(_SMALLEST).log()
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(dim=-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(dim=-1)
    log_mixture = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_mixture) + (1 - beta) * q * (log_q - log_mixture)).sum(dim=-1)
