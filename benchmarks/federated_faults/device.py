"""Devices of a federation on digits: the real resident over the real state directory, honest or not.

As a process it is a whole device: the project's SuperNode, registered keys, TLS.

    python -m benchmarks.federated_faults.device HOME NAME HOST:PORT
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.federated_faults.digits import SPEC, TARGET, DigitsTrainer, digits_layout, read_letters
from edge_runtime.federated.data import LocalData, Retention
from edge_runtime.federated.identity import device_key, node_key
from edge_runtime.federated.resident import Resident, Surroundings
from edge_runtime.federated.secure import SecureSessions
from edge_runtime.federated.state import DeviceState, open_state
from edge_runtime.federated.stopping import Stop
from edge_runtime.formats.codec import Codec, decode, encode
from edge_runtime.formats.envelope import Envelope, seal, sha256, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout
from edge_runtime.formats.manifest import Manifest
from edge_runtime.formats.messages import Hello, Plan, Update
from edge_runtime.formats.package import open_package, seal_package
from edge_runtime.formats.signing import load_trust, signing_key

Responder = Callable[[Envelope], Envelope]
HONEST, NAN, FLIP, SCALE, BOTH, LATE = "honest", "NaN", "flipped signs", "ten times its update", "both", "late"
PACKAGE, DEVICES, PLAN_FILE, BASE_FILE = "package", "devices", "misbehaviour.json", "base.json"
_NAN_SCALE = np.uint16(0x7FC0)  # the upper half of a float32 that is not a number


def write_package(directory: Path, base: Mapping[str, np.ndarray]) -> Manifest:
    """A signed package that holds nothing but the base of digits."""
    directory.mkdir(parents=True)
    text = json.dumps({name: value.tolist() for name, value in sorted(base.items())})
    (directory / BASE_FILE).write_text(text)
    (directory / "tokenizer.json").write_text("{}")  # a package must list one; nothing reads it here
    return seal_package(
        directory, name="digits", version="1.0.0", counter=1, base_digest=sha256(text.encode()), decoder=SPEC,
        bos=None, eos=[], containers={}, licence="Apache-2.0", key=signing_key(),
    )  # fmt: skip


def open_base(directory: Path) -> tuple[Manifest, DigitsTrainer]:
    """Verify the package and open the trainer over its base."""
    manifest = open_package(directory, load_trust()).manifest
    base = json.loads((directory / BASE_FILE).read_text())
    return manifest, DigitsTrainer({name: np.asarray(value, np.float32) for name, value in base.items()})


@contextlib.contextmanager
def open_resident(
    directory: Path, manifest: Manifest, trainer: DigitsTrainer, stop: Stop, log: Callable[[str], None]
) -> Iterator[tuple[Resident, DeviceState]]:
    """A device whose state, keys and text (``directory/text``) are on the disk; it shares its lease with nobody."""
    with open_state(directory, log) as state:
        data = LocalData(directory / "text", read_letters, None, None, 1 << 24, Retention(), time.time, log)
        data.refresh()
        around = Surroundings(
            lease=lambda give_up: contextlib.nullcontext(True),
            readiness=lambda: None, stopping=stop, clock=time.monotonic, log=log, retry_after_s=1.0,
        )  # fmt: skip
        key = device_key(directory)
        yield Resident(directory.name, manifest, trainer, data, state, key, around, SecureSessions(key, None)), state


def misbehaving(respond: Responder, conduct: Callable[[int], str], late_s: float = 0.0) -> Responder:
    """A device whose answer to the plan of a round is spoilt as ``conduct`` says.

    Its own residuals stay honest: it lies on the way out, as one does whose client was changed.
    """
    layout: AdapterLayout | None = None

    def answer(envelope: Envelope) -> Envelope:
        nonlocal layout
        if envelope.kind == "hello":
            layout = unseal(envelope, Hello).layout()
        reply = respond(envelope)
        if envelope.kind != "plan" or reply.kind != "update":
            return reply
        kind, plan = conduct(unseal(envelope, Plan).round), unseal(envelope, Plan)
        if kind == LATE:
            time.sleep(late_s)
        known = layout or digits_layout(unseal(reply, Update).base_digest, (plan.rank,), 2.0 * plan.rank)
        if kind in (HONEST, LATE):
            return reply
        try:
            return tamper(reply, known, kind)
        except (MessageError, ValueError):  # so far off already that the update cannot be written any more
            return reply

    return answer


def tamper(reply: Envelope, layout: AdapterLayout, kind: str) -> Envelope:
    """An update that is not a number, or -1, 10 or -10 times what it was; its digest is right again."""
    update = unseal(reply, Update)
    sizes = layout.segment_sizes(update.phase.groups, update.rank)
    if kind == NAN:
        if update.codec not in (Codec.INT8, Codec.INT4):
            raise ValueError(f"NaN is written into the scales of a codec, and {update.codec} has none")
        payload = _NAN_SCALE.astype("<u2").tobytes() + reply.payload[2:]
    else:
        factor = np.float32({FLIP: -1.0, SCALE: 10.0, BOTH: -10.0}[kind])
        payload = encode(decode(reply.payload, sizes, update.codec) * factor, sizes, update.codec)
    return seal(replace(update, payload_sha256=sha256(payload)), payload)


def read_conduct(home: Path, name: str) -> tuple[Callable[[int], str], float]:
    """(round to conduct, seconds of a delay) of a device, from the file that the benchmark wrote."""
    values = json.loads((home / PLAN_FILE).read_text())
    mine = values["devices"].get(name, {})
    return (lambda number: mine.get(str(number), HONEST)), float(values["late_s"])


def main() -> None:
    """Be one device until told to stop."""
    from edge_runtime.federated.supernode import Link, serve_superlink

    home, name, address = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    stop = Stop()

    def log(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {name}: {line}", flush=True)

    manifest, trainer = open_base(home / PACKAGE)
    if TARGET not in trainer.targets:
        raise SystemExit("the base and the trainer differ")
    conduct, late_s = read_conduct(home, name)
    with open_resident(home / DEVICES / name, manifest, trainer, stop, log) as (resident, state):
        stop.listen()
        handle = misbehaving(resident.handle, conduct, late_s)
        serve_superlink(Link(address, home / "ca.crt"), node_key(state.directory), state, handle, stop, log)


if __name__ == "__main__":
    main()
