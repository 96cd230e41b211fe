"""Several processes as one: who we are, one model in all of them or spread over them, sums across them.

Started by torchrun; accelerate reads its variables, picks NCCL or Gloo and the device. The model
is wrapped together with its objective, so that an objective may reach into the model (its head,
its hidden states) and still gets whole, synchronised parameters.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch
from pipeline.distillation.fast_layers import decoder_layers
from pipeline.distillation.objectives import Objective

Sharding = Literal["none", "fsdp"]
_LONGEST_WAIT = timedelta(hours=4)  # while the first process cuts a 7B; torchrun ends all when one ends


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together; ``device`` None: wherever the model lies."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None


class Learner(nn.Module):
    """A model with its objective; called with a batch it returns (total, weight)."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """A tuple, because wrappers look for tensors in what comes out."""
        loss = self._objective(self.model, batch)
        return loss.total, loss.weight


def join_processes() -> Processes:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
    return Processes(state.process_index, state.num_processes, state.device)


def wait_for_all(processes: Processes) -> None:
    """Until every process is here: what the first one wrote is there to be read."""
    if processes.count > 1:
        torch.distributed.barrier()


def leave_processes() -> None:
    """End the connection to the other processes, when all work is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def spread(learner: Learner, processes: Processes, sharding: Sharding, *, bf16: bool) -> nn.Module:
    """``learner`` ready for all processes: copied to each (DDP), or its parameters spread (FSDP2).

    Raises:
        UserError: FSDP with parameters of several types.
    """
    if processes.count == 1:
        return learner
    if sharding == "none":
        return nn.parallel.DistributedDataParallel(learner, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    types = {parameter.dtype for parameter in learner.parameters()}
    if len(types) > 1:
        names = ", ".join(sorted(str(kind) for kind in types))
        raise UserError("sharding", f"fsdp over {names}", "parameters of one type", "load the model as fp32")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    device_type = str(processes.device.type) if processes.device else "cpu"
    mesh = init_device_mesh(device_type, (processes.count,))
    for layer in decoder_layers(learner.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The rest (embedding, last norm, head) belongs to the whole, which keeps it gathered while the objective runs.
    fully_shard(learner, mesh=mesh, mp_policy=policy)
    return learner


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same parameters: spreading one leaves the other an ordinary model."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def drop_weights(model: nn.Module) -> None:
    """Free the parameters' memory, until ``gather_weights``; tied ones stay one."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def gather_weights(model: nn.Module, spread_twin: nn.Module) -> None:
    """Put the whole of the spread parameters back into the model; all processes together."""
    for parameter, learned in zip(model.parameters(), spread_twin.parameters(), strict=True):
        parameter.data = whole(learned.detach())


@contextmanager
def without_sync(module: nn.Module, skip: bool) -> Iterator[None]:
    """Gradients stay in this process while ``skip``: only the last of a step's micro-batches is exchanged."""
    if skip and isinstance(module, nn.parallel.DistributedDataParallel):
        with module.no_sync():
            yield
        return
    synchronise: Callable[[bool], Any] | None = getattr(module, "set_requires_gradient_sync", None)
    if synchronise is not None:
        synchronise(not skip)
    yield


def sum_across(values: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The sum of every process's ``values``, in all of them."""
    if processes.count > 1:
        torch.distributed.all_reduce(values)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A spread tensor gathered in every process; any other as it is."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def placed_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of ``like``, spread if ``like`` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
