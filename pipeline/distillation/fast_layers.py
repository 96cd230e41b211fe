"""Decoder layers that run faster on GPUs: compiled one by one, and attention by cuDNN where no gradient is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ATTENTION = "sevenfold_cudnn"


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated part of a transformer: the first list of modules in it; empty if there is none."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module))
    return list(next(lists, []))


@contextmanager
def compiled_layers(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Compile each decoder layer for the time of the block; equal layers share the code.

    Every shape gets code of its own: code for any shape is slower, and a training has few of them.
    """
    layers = decoder_layers(model) if wanted else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def compile_layers(model: nn.Module) -> None:
    """The same for good."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)


def hasten_teacher(teacher: Any, compiled: bool) -> Any:
    """Make a frozen teacher on one GPU faster, in place; anywhere else leave it as it is.

    cuDNN attends nearly twice as fast as flash attention without gradients (benchmarks/README.md).

    Args:
        teacher: A causal transformers model that attends by torch's scaled dot products.
        compiled: Compile its layers too.
    """
    if teacher.device.type != "cuda" or getattr(teacher, "hf_device_map", None):
        return teacher
    if teacher.config._attn_implementation == "sdpa" and teacher.dtype == torch.bfloat16:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attend_by_cudnn)
        teacher.config._attn_implementation = _ATTENTION
    if compiled:
        compile_layers(teacher)
    return teacher


def use_deterministic_kernels() -> None:
    """The same bits in every run of this process. Memory that nothing wrote is read by nothing: it is not filled."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch has no stub of it


def uncompiled() -> Any:
    """A block in which compiled layers run as they are written: for few passes over shapes that do not come again."""
    return torch.compiler.set_stance("force_eager")


def _attend_by_cudnn(*arguments: Any, **named: Any) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        return sdpa_attention_forward(*arguments, **named)
