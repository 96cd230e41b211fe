"""bf16 weights that compute beside fp32 weights that learn.

Forward and backward pass see bf16 parameters only: no casts of weights, residuals of half the bytes.
Each gradient is added to its fp32 sum as soon as it is complete and freed, so micro-batches add up in
fp32, and the optimizer sees nothing but fp32 tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class MasterWeights:
    """Parameters, their fp32 originals in the same order, and the hooks between their gradients."""

    parameters: tuple[torch.nn.Parameter, ...]
    masters: tuple[torch.nn.Parameter, ...]
    hooks: tuple[RemovableHandle, ...]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters: after every step of the optimizer."""
        torch._foreach_copy_(list(self.parameters), list(self.masters))

    def detach(self) -> None:
        """Take the hooks away; the parameters keep their gradients again."""
        for hook in self.hooks:
            hook.remove()


def attach_masters(parameters: Iterable[torch.nn.Parameter]) -> MasterWeights:
    """Make an fp32 original of every parameter; its ``grad`` sums what backward passes give the parameter.

    Call it while the parameters are still fp32, then cast them, if their full precision matters.
    """
    learned = tuple(parameters)
    masters = tuple(torch.nn.Parameter(parameter.detach().float().clone()) for parameter in learned)
    hooks = tuple(
        parameter.register_post_accumulate_grad_hook(_Adding(master))
        for parameter, master in zip(learned, masters, strict=True)
    )
    return MasterWeights(learned, masters, hooks)


@dataclass(frozen=True, slots=True)
class _Adding:
    master: torch.nn.Parameter

    def __call__(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self.master.grad is None:
            self.master.grad = gradient.float()
        else:
            self.master.grad.add_(gradient)
