"""A one-dimensional array of bytes in NumPy's file format, as Flower carries it, read without NumPy's reader.

That one allocates whatever length the file's header states, and its header is a Python expression.
"""

from __future__ import annotations

import re

from edge_runtime.formats.envelope import MAX_PAYLOAD_BYTES
from edge_runtime.formats.errors import MessageError

_LONGEST_HEADER_BYTES = 256
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)(\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,12}),\), \} *\n)", re.DOTALL
)


def unpack_byte_array(raw: bytes, count: int) -> bytes:
    """The bytes behind the header.

    Args:
        raw: A NumPy file from another machine.
        count: How many bytes it is said to hold.

    Raises:
        MessageError: Not such a file, another length than stated, or longer than a payload may be.
    """
    header = _HEADER.match(raw[:_LONGEST_HEADER_BYTES])
    if header is None or int.from_bytes(header[1], "little") != len(header[2]):
        raise MessageError("message: the payload is not a NumPy file of bytes")
    length = len(raw) - header.end()
    if length > MAX_PAYLOAD_BYTES or not length == count == int(header[3]):
        raise MessageError("message: the payload is not as long as it says, or longer than allowed")
    return raw[header.end() :]
