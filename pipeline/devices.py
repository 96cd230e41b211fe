"""How fast and how large this machine is, and how fast an H100 would be: what a plan's times rest on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.needs import Needs
from pipeline.settings import Config
from pipeline.sizes import QWEN_7B, ModelSizes

# Measured on one H100 (benchmarks/README.md, "Throughput on a GPU"): from stored draws a 0.5B student learned 131,810
# tokens/s, and an online step of 16,384 tokens spent 346 ms in a 7B teacher's layers and 26 ms in its head.
H100_PEAK_FLOPS = 989e12
MEASURED_STUDENT = ModelSizes(152_064, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, biased=True)
_MEASURED_TOKENS = 1024
TRAINING_SHARE = 131_810 * MEASURED_STUDENT.training_flops(_MEASURED_TOKENS) / H100_PEAK_FLOPS
FORWARD_SHARE = 16_384 / 0.372 * QWEN_7B.forward_flops(_MEASURED_TOKENS) / H100_PEAK_FLOPS

# Of a plain fp32 product's rate on the same cores, as a demo run on two of them reached it: training and teacher in
# bf16 or not, then evaluation (4-bit files, and the fp32 student beside them); and seconds around each update.
_CPU_SHARES = {True: 0.55, False: 0.45}
_EVALUATION_SHARE = 0.17
_CPU_STEP_S = 0.05
_PRODUCT_SIZE, _MEASURING_S = 256, 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan counts with.

    Attributes:
        cpu: Name, for people.
        cpu_flops: Operations a second of plain fp32 products on the threads of the run, measured.
        bf16: Matrices are multiplied in bfloat16, on the GPU or else here.
        memory_bytes: Of the machine.
        gpu: Name of the GPU that torch would use, or None.
        gpu_bytes: Its memory.
        gpu_flops: Its data sheet's bf16 operations a second; None: not known, or no GPU.
    """

    cpu: str
    cpu_flops: float
    bf16: bool
    memory_bytes: float
    gpu: str | None = None
    gpu_bytes: float = 0.0
    gpu_flops: float | None = None


def look_at_machine(config: Config) -> Machine:
    """Ask torch for its GPU, the system for its memory, and time a product on the CPU."""
    import psutil
    import torch

    from pipeline.distillation.from_config import training_device, uses_bf16
    from pipeline.distillation.speed import peak_flops

    device, memory = training_device(), float(psutil.virtual_memory().total)
    cpu, bf16, rate = f"{_cpu_name()}, {config.threads} threads", uses_bf16(config), _measured_flops(config.threads)
    if device.type != "cuda":
        return Machine(cpu, rate, bf16, memory)
    found = torch.cuda.get_device_properties(device)
    return Machine(cpu, rate, bf16, memory, found.name, float(found.total_memory), peak_flops(device))


def seconds(needs: Needs, machine: Machine, gpu_flops: float | None) -> float:
    """Time of one execution: models on a GPU of ``gpu_flops``, or with None on the CPU as everything else."""
    host_s = needs.fixed_s + needs.host_flops / (machine.cpu_flops * _EVALUATION_SHARE)
    if gpu_flops is not None:
        training_s = needs.training_flops / (gpu_flops * TRAINING_SHARE)
        return host_s + training_s + needs.forward_flops / (gpu_flops * FORWARD_SHARE)
    rate = machine.cpu_flops * _CPU_SHARES[machine.bf16]
    return host_s + (needs.training_flops + needs.forward_flops) / rate + needs.steps * _CPU_STEP_S


def _measured_flops(threads: int) -> float:
    """The best of many short products of one thread, times the threads: others may share the cores just now."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE)
        best_s, end_s = float("inf"), time.perf_counter() + _MEASURING_S
        while time.perf_counter() < end_s:
            start_s = time.perf_counter()
            a @ a
            best_s = min(best_s, time.perf_counter() - start_s)
    finally:
        torch.set_num_threads(before)
    return 2 * _PRODUCT_SIZE**3 / best_s * threads


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "this CPU")
