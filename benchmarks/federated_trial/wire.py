"""What travels, in torch: the values that a codec's bytes decode to, and how many bytes they are.

The same numbers as ``edge_runtime.formats.codec`` gives, for many clients at once and without making the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
HEADER_BYTES = 400
_LARGEST_CODE = {"int8": 127, "int4": 7}
_VALUE_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
_SCALE_BYTES = 2


def decoded(values: Tensor, codec: str) -> Tensor:
    """What the other side reads when ``values`` (..., n) are sent; n is a multiple of the block unless in floats."""
    if codec == "fp32":
        return values
    if codec == "fp16":
        return values.half().float()
    largest = _LARGEST_CODE[codec]
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    scales = round_up_to_bfloat16(blocks.abs().amax(-1, keepdim=True) / largest)
    divisor = torch.where(scales > 0, scales, 1.0)
    return ((blocks / divisor).round().clamp(-largest, largest) * scales).reshape(values.shape)


def encoded_bytes(count: int, codec: str) -> int:
    """Bytes of ``count`` values, scales included, the message's header not."""
    scales = -(-count // BLOCK) * _SCALE_BYTES if codec in _LARGEST_CODE else 0
    return -(-count * _VALUE_BITS[codec] // 8) + scales


def round_up_to_bfloat16(values: Tensor) -> Tensor:
    """The nearest values of a bfloat16's precision that are not below these; for values that are not negative."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
