"""The device's side of secure aggregation."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from edge_runtime.formats.envelope import Envelope
from edge_runtime.formats.masking import RandomBytes
from edge_runtime.formats.messages import Plan

KINDS = frozenset({"maskinvite", "maskroster", "maskdelivery", "maskunmask"})


class SecureSessions:
    """Masking sessions of this device, in memory: after a restart they are gone and the device counts as lost.

    Args:
        device_key: Signs this device's ephemeral keys.
        enrolled: Devices whose keys it accepts; None: every key with a valid signature (said in the log).
        random_bytes: Source of secrets.
    """

    def __init__(
        self, device_key: Ed25519PrivateKey, enrolled: object | None, random_bytes: RandomBytes = os.urandom
    ) -> None:
        raise NotImplementedError

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer a message whose kind is in KINDS; a ``Decline`` when it is not allowed. Never raises."""
        raise NotImplementedError

    def mask(self, plan: Plan, codes: NDArray[np.int32], sizes: Sequence[int], weight: int) -> bytes:
        """The masked payload of ``codes`` (n,) from ``masking.quantize_for_mask``, once in a session.

        Adds ``plan.noise_std`` as integer noise itself: the caller adds none when ``plan.mask`` is set, and none
        of it may enter the residual.

        Raises:
            MessageError: No such session at this stage, or a plan, code or weight that it does not allow.
        """
        raise NotImplementedError
