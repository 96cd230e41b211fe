"""The kernels one by one: are they right at full vocabulary, how long do they take, what does float8 do to targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.distillation_trial.models import Setting, Sizes
from pipeline.distillation import divergences
from pipeline.distillation.divergences import LossKind, dense_divergence
from pipeline.distillation.head_losses import head_loss
from pipeline.distillation.signals import DenseSignal

DENSE = [kind for kind in LossKind if kind not in (LossKind.SAMPLED_KL, LossKind.CROSS_ENTROPY)]
_CHECKED_ROWS = 8
_TIMED_ROWS = 4096


def report(setting: Setting, device: torch.device, timings: bool) -> None:
    """Print the error of every loss kernel against the formulas in fp64, and on request times."""
    _check(setting, device)
    if timings:
        _time_losses(setting, device)
        _time_products(setting, device)
        for name, sizes, backward in (("teacher", setting.teacher, False), ("student", setting.student, True)):
            _time_attention(name, sizes, setting.sequence_tokens, device, backward)


@torch.no_grad()
def report_targets(setting: Setting, teachers: dict[str, Any]) -> None:
    """Print how far targets move: by float8, and by nothing but other bf16 kernels, which is the noise below."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(setting.vocabulary, (1, setting.sequence_tokens), generator=generator)
    states = {}
    for name in ("plain", "online", "float8"):
        model = teachers[name]
        states[name] = (
            model.get_decoder()(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state[0].float()
        )
    head = teachers["plain"].get_output_embeddings().weight.float()
    reference = states["plain"]
    for name, label in (("online", "compiled bf16 teacher"), ("float8", "float8 teacher")):
        target = DenseSignal(reference, head)
        value = head_loss(states[name], head, target, LossKind.FORWARD_KL, None, 256)
        same = (reference @ head.T).argmax(-1) == (states[name] @ head.T).argmax(-1)
        error = float((states[name] - reference).norm() / reference.norm())
        print(
            f"{label} against eager bf16: KL {float(value.total / value.weight):.2e} nats a position, "
            f"top-1 agreement {float(same.float().mean()):.4f}, hidden states {error:.4f} apart",
            flush=True,
        )
    log_p = torch.log_softmax(reference[:256] @ head.T, dim=-1)
    print(f"entropy of these targets: {float(-(log_p.exp() * log_p).sum(dim=-1).mean()):.2f} nats", flush=True)


def _check(setting: Setting, device: torch.device) -> None:
    from pipeline.distillation import head_loss_kernels

    generator = torch.Generator(device).manual_seed(0)
    shape = _CHECKED_ROWS, setting.vocabulary
    student, teacher = (torch.randn(shape, generator=generator, device=device).mul_(3).bfloat16() for _ in range(2))
    errors = {}
    for kind in DENSE:
        divergence = dense_divergence(kind, 1.5, 0.3, 0.1)
        expected, found = student.double(), student.clone()
        losses = divergences.overwrite_dense(divergence, expected, teacher.double())
        errors[kind.value] = _errors(
            head_loss_kernels.overwrite_dense(divergence, found, teacher), losses, found, expected
        )
    ids = torch.randint(setting.vocabulary, (_CHECKED_ROWS, 32), generator=generator, device=device)
    weights = torch.softmax(torch.randn(ids.shape, generator=generator, device=device), dim=-1)
    expected, found = student.double(), student.clone()
    losses = divergences.overwrite_sparse(expected, ids, weights)
    errors["sampled_kl"] = _errors(head_loss_kernels.overwrite_sparse(found, ids, weights), losses, found, expected)
    print("relative error of (loss, bf16 gradient) against fp64:", flush=True)
    print("  " + ", ".join(f"{name} {a:.1e} {b:.1e}" for name, (a, b) in errors.items()), flush=True)
    total = torch.randn(64, 32, generator=generator, device=device)
    left, right = (torch.randn(n, 48, generator=generator, device=device).bfloat16() for n in (64, 32))
    wanted = total.double() + left.double() @ right.double().T
    torch.ops.aten.addmm.dtype_out(total, left, right.T, torch.float32, out=total)
    print(f"  product added in fp32: {float((total - wanted).norm() / wanted.norm()):.1e}", flush=True)


def _errors(
    losses: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor, exact: torch.Tensor
) -> tuple[float, float]:
    return (
        float((losses - wanted).norm() / wanted.norm()),
        float((gradient.double() - exact).norm() / exact.norm()),
    )


def _time_losses(setting: Setting, device: torch.device) -> None:
    from pipeline.distillation import head_loss_kernels

    student, teacher = (
        torch.randn(_TIMED_ROWS, setting.vocabulary, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    logits_bytes = student.nbytes
    for blocks, warps in ((2048, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16)):
        head_loss_kernels.BLOCK, head_loss_kernels._WARPS = blocks, warps
        shown = []
        for kind in (LossKind.FORWARD_KL, LossKind.JSD):
            divergence = dense_divergence(kind, 1.0, 0.5, 0.1)
            took_ms = _milliseconds(lambda d=divergence: head_loss_kernels.overwrite_dense(d, student, teacher))
            passes = 5 if kind is LossKind.FORWARD_KL else 7
            shown.append(f"{kind.value} {took_ms:.2f} ms ({passes * logits_bytes / took_ms / 1e9:.2f} TB/s)")
        ids = torch.randint(setting.vocabulary, (_TIMED_ROWS, 32), device=device)
        weights = torch.full(ids.shape, 1 / 32, device=device)
        took_ms = _milliseconds(lambda i=ids, w=weights: head_loss_kernels.overwrite_sparse(student, i, w))
        shown.append(f"sampled_kl {took_ms:.2f} ms ({3 * logits_bytes / took_ms / 1e9:.2f} TB/s)")
        print(f"  {_TIMED_ROWS} rows, block {blocks}, {warps} warps: {', '.join(shown)}", flush=True)
    head_loss_kernels.BLOCK, head_loss_kernels._WARPS = 4096, 8


def _time_products(setting: Setting, device: torch.device) -> None:
    """Rates of the products that matter, random operands, in TFLOP/s."""
    teacher, student, vocabulary = setting.teacher, setting.student, setting.vocabulary
    shapes = {
        "teacher up": (16384, teacher.ffn, teacher.hidden),
        "teacher down": (16384, teacher.hidden, teacher.ffn),
        "teacher q": (16384, teacher.hidden, teacher.hidden),
        "student up": (16384, student.ffn, student.hidden),
        "student down": (16384, student.hidden, student.ffn),
        "student q": (16384, student.hidden, student.hidden),
        "student head": (4096, vocabulary, student.hidden),
        "teacher head": (4096, vocabulary, teacher.hidden),
        "head's gradient": (vocabulary, student.hidden, 4096),
        "up's gradient": (student.ffn, student.hidden, 16384),
        "logits to hidden": (4096, student.hidden, vocabulary),
    }
    for name, (m, n, k) in shapes.items():
        a, b = (torch.randn(size, k, device=device, dtype=torch.bfloat16) for size in (m, n))
        rates = {"bf16": 2e-9 * m * n * k / _milliseconds(lambda a=a, b=b: a @ b.T)}
        if name == "head's gradient":
            total = torch.zeros(m, n, device=device)
            into = lambda a=a, b=b, t=total: torch.ops.aten.addmm.dtype_out(t, a, b.T, torch.float32, out=t)  # noqa: E731
            rates["added in fp32"] = 2e-9 * m * n * k / _milliseconds(into)
        if name.startswith("teacher"):
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            one, by_row = (
                torch.ones((), device=device),
                (torch.ones(m, 1, device=device), torch.ones(1, n, device=device)),
            )
            for label, scales in (("float8", (one, one)), ("float8 by row", by_row)):
                call = _scaled(a8, b8, *scales)
                rates[label] = 2e-9 * m * n * k / _milliseconds(call)
        print(f"  {name} {m} x {n} x {k}: " + ", ".join(f"{key} {rate:.0f}" for key, rate in rates.items()), flush=True)


def _scaled(a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch._scaled_mm(a, b.T, scale_a=of_a, scale_b=of_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def _time_attention(name: str, sizes: Sizes, tokens: int, device: torch.device, backward: bool) -> None:
    size = sizes.hidden // sizes.heads
    shapes = [(16, tokens, heads, size) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    q, k, v = (
        torch.randn(s, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_(backward) for s in shapes
    )
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel([backend]):
                run = lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
                forward_ms = _milliseconds(run)
                both_ms = _milliseconds(lambda run=run: run().sum().backward()) if backward else float("nan")
            print(
                f"  attention of the {name}, {backend.name}: {forward_ms:.2f} ms, with backward {both_ms:.2f}",
                flush=True,
            )
        except RuntimeError as error:
            print(f"  attention of the {name}, {backend.name}: {str(error).splitlines()[0]}", flush=True)


def _milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median of single calls between events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
