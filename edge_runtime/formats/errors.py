"""The error tree. Every user error ends as one line on stderr and exit code 2.

Capacity ("not now") is a return value; misuse ("never") is one of these.
"""

from __future__ import annotations


class SevenfoldError(Exception):
    """Root of everything this project raises on purpose."""


class UserError(SevenfoldError):
    """Input that the user can correct.

    Args:
        field: What was wrong, in the user's words (``submodel.width``, ``--max-tokens``).
        value: What was given.
        allowed: What would have been accepted.
        next_step: What to type or change.
    """

    def __init__(self, field: str, value: object, allowed: str, next_step: str = "") -> None:
        self.field, self.value, self.allowed, self.next_step = field, value, allowed, next_step
        tail = f"; {next_step}" if next_step else ""
        super().__init__(f"{field}: got {value!r}, allowed: {allowed}{tail}")


class ConfigError(SevenfoldError):
    """Several faults in a configuration, one line each."""


class PackageError(SevenfoldError):
    """A package that cannot be used: damaged, cut, oversized or of an unknown format."""


class SignatureError(PackageError):
    """A package whose signature is missing, wrong, or made by a key not trusted here."""


class AdapterError(SevenfoldError):
    """An adapter that does not fit the package it is given to."""


class BackendError(SevenfoldError):
    """A runtime that is missing, cannot load the file, or returns no usable logits."""


class ExportError(SevenfoldError):
    """A model that a container cannot hold; the message names the numbers."""


class GateError(SevenfoldError):
    """A submodel that must not be registered because its gate failed."""


class MessageError(SevenfoldError):
    """Bytes or fields from another machine that are not what the protocol allows."""
