"""``python -m edge_runtime client``: take part in a federation; ``client keys``: what its operator must enrol."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.config import CLIENT_DEFAULTS, choose_threads, state_directory
from edge_runtime.formats.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")
_PEM = b"-----BEGIN CERTIFICATE-----"
_MAX_FILE_BYTES = 1 << 20
_EPILOG = """examples:
  python -m edge_runtime client keys --name kitchen > kitchen.json
  python -m edge_runtime client --name kitchen --package packages/small --data notes/ \\
      --superlink 192.168.1.10:9443 --root-certificate ca.crt"""


def add_client(commands: Any) -> None:
    """Add the command to a parser's commands."""
    command = commands.add_parser(
        "client",
        help="take part in a federation: train an adapter on local text, send what it learned",
        description="Train a federation's adapter on the text in a directory. The text never leaves the device.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run_client)
    command.add_argument("--package", type=Path, metavar="DIR", help="a signed package with training files")
    command.add_argument("--data", type=Path, metavar="DIR", help="directory of .txt and .jsonl files")
    command.add_argument("--superlink", metavar="HOST:PORT", help="the federation's SuperLink")
    command.add_argument("--root-certificate", type=Path, metavar="FILE", help="its ca.crt")
    command.add_argument("--insecure", action="store_true", help="no TLS; for a SuperLink on this machine only")
    _add_device(command)
    command.add_argument(
        "--trainer", choices=("auto", "onnx", "tflite", "torch"), default="auto", help="default: the first that runs"
    )
    command.add_argument("--stock-supernode", action="store_true", help="connect through Flower's own SuperNode")
    command.add_argument("--threads", type=int, metavar="N", help="default: every usable core")
    command.add_argument("--max-rank", type=int, metavar="N", help="train at most this rank; default: what fits")
    command.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="FILE", help="trust this public key from now on"
    )
    command.add_argument(
        "--enrolled", type=Path, metavar="FILE", help="mask updates among the devices of this signed list only"
    )
    _add_limits(command)
    keys = command.add_subparsers(dest="action", metavar="").add_parser(
        "keys", help="print this device's public keys as JSON", allow_abbrev=False
    )
    _add_device(keys)
    keys.set_defaults(run=run_keys)


def run_keys(options: argparse.Namespace) -> None:
    """Make the keys if needed; print what the operator enrols, and leave it in the state directory.

    Raises:
        UserError: The name or the directory is not usable.
    """
    from edge_runtime.federated.identity import write_enrolment

    name = _name(options.name)
    path = write_enrolment(_state_path(options.state, name), name)
    print(path.read_text(), end="")
    print(f"{path}: give it to the federation's operator", file=sys.stderr)


def run_client(options: argparse.Namespace) -> None:
    """Take part until told to stop.

    Raises:
        SevenfoldError: Anything that the user can correct, as one line.
    """
    from edge_runtime.federated.state import open_state
    from edge_runtime.federated.stopping import Stop

    _check(options)
    name = _name(options.name)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"{name}: %(name)s: %(message)s")
    log = _log(name)
    stop = Stop()
    with (
        open_state(_state_path(options.state, name), log) as state,
        _resident(options, name, state, stop, log) as resident,
    ):
        stop.listen()
        if options.stock_supernode:
            _serve_stock(options, state.directory, resident.handle, stop, log)
        else:
            from edge_runtime.federated.identity import node_key
            from edge_runtime.federated.supernode import Link, serve_superlink

            link = Link(options.superlink, options.root_certificate)
            serve_superlink(link, node_key(state.directory), state, resident.handle, stop, log)
    log("ended")


@contextlib.contextmanager
def _resident(
    options: argparse.Namespace, name: str, state: Any, stop: Any, log: Callable[[str], None]
) -> Iterator[Any]:
    """The resident with its package verified, its trainer open and its text read."""
    from edge_runtime.federated.data import LocalData, Retention
    from edge_runtime.federated.identity import device_key
    from edge_runtime.federated.readiness import Limits, check_readiness
    from edge_runtime.federated.resident import Resident, Surroundings
    from edge_runtime.federated.secure import SecureSessions
    from edge_runtime.federated.trainer import open_trainer
    from edge_runtime.probe import usable_cores
    from edge_runtime.scheduler.lease import training_lease
    from edge_runtime.session import open_verified
    from edge_runtime.text import load_tokenizer

    started_s = time.monotonic()
    threads = choose_threads(options.threads, usable_cores())
    package = open_verified(options.package, options.trust)
    tokenizer, manifest = load_tokenizer(package), package.manifest
    data = LocalData(
        directory=options.data,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        bos=manifest.bos,
        eos=manifest.eos[0] if manifest.eos else None,
        most_bytes=options.text_bytes,
        retention=Retention(options.retention_days, options.keep_bytes),
        now=time.time,
        log=log,
    )
    data.refresh()
    limits = Limits(
        options.battery, options.heat, options.memory_bytes, options.metered_file, state.directory / "pause"
    )
    around = Surroundings(
        lease=lambda give_up: training_lease(options.lease, wait=stop.wait, give_up=give_up),
        readiness=lambda: check_readiness(limits),
        stopping=stop,
        clock=time.monotonic,
        log=log,
        retry_after_s=CLIENT_DEFAULTS.retry_after_s,
        most_rank=options.max_rank,
    )
    key = device_key(state.directory)
    sessions = SecureSessions(key, None if options.enrolled is None else _enrolled(options.enrolled))
    trainer = open_trainer(options.trainer, package, threads=threads)
    try:
        log(
            f"{manifest.name} {manifest.version} through {trainer.name} ({threads} threads), "
            f"{data.count(trainer.buckets[0])} sequences, ready in {time.monotonic() - started_s:.1f} s"
        )
        yield Resident(name, manifest, trainer, data, state, key, around, sessions)
    finally:
        trainer.close()


def _serve_stock(options: argparse.Namespace, state: Path, handle: Any, stop: Any, log: Callable[[str], None]) -> None:
    from edge_runtime.federated.identity import NODE_KEY_FILE, node_key
    from edge_runtime.federated.local_socket import SOCKET_FILE, serve_socket
    from edge_runtime.federated.stock_supernode import run_stock_supernode

    node_key(state)
    path = (state / SOCKET_FILE).resolve()
    with serve_socket(path, handle, log):
        run_stock_supernode(options.superlink, options.root_certificate, state / NODE_KEY_FILE, path, stop, log)


def _enrolled(path: Path) -> Any:
    from edge_runtime.formats.envelope import MAX_PAYLOAD_BYTES, read_envelope
    from edge_runtime.formats.masking_keys import open_enrolled
    from edge_runtime.formats.signing import load_trust

    try:
        with path.open("rb") as file:
            if path.stat().st_size > MAX_PAYLOAD_BYTES:
                raise UserError("--enrolled", str(path), "a signed list of devices", "ask the operator for it")
            return open_enrolled(read_envelope(file.read), load_trust())
    except (OSError, ValueError) as error:
        raise UserError(
            "--enrolled", str(path), f"a signed list of devices ({error})", "ask the operator for it"
        ) from error


def _add_device(command: Any) -> None:
    command.add_argument("--name", metavar="NAME", help="of this device, for people; default: its host name")
    command.add_argument("--state", type=Path, metavar="DIR", help="keys and memory; default: one a name")


def _add_limits(command: Any) -> None:
    limits = command.add_argument_group("limits", "beyond these the device declines, and the server asks another")
    defaults = CLIENT_DEFAULTS
    limits.add_argument(
        "--battery",
        type=float,
        default=defaults.battery_ratio,
        metavar="RATIO",
        help="least charge (default %(default)s)",
    )
    limits.add_argument(
        "--heat",
        type=float,
        default=defaults.zone_celsius,
        metavar="CELSIUS",
        help="hottest zone (default %(default)s)",
    )
    limits.add_argument(
        "--memory-bytes", type=int, default=defaults.memory_bytes, metavar="N", help="least free (default %(default)s)"
    )
    limits.add_argument("--metered-file", type=Path, metavar="FILE", help="while it exists, the network costs")
    limits.add_argument(
        "--text-bytes",
        type=int,
        default=defaults.text_bytes,
        metavar="N",
        help="text held in memory (default %(default)s)",
    )
    limits.add_argument(
        "--retention-days", type=float, metavar="N", help="DELETE text that was not changed for so long"
    )
    limits.add_argument("--keep-bytes", type=int, metavar="N", help="DELETE the oldest text beyond so many bytes")
    limits.add_argument("--lease", type=Path, metavar="DIR", help="of the right to train; default: this user's")


def _check(options: argparse.Namespace) -> None:
    for name in ("package", "data", "superlink"):
        if getattr(options, name) is None:
            raise UserError(f"--{name}", "nothing", "a value", "see python -m edge_runtime client --help")
    found = _ADDRESS.fullmatch(options.superlink)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise UserError("--superlink", options.superlink, "HOST:PORT", "for instance 192.168.1.10:9443")
    if options.root_certificate is None and not options.insecure:
        raise UserError("--root-certificate", "nothing", "the SuperLink's ca.crt", "ask its operator for it")
    if options.root_certificate is not None:
        _check_certificate(options.root_certificate, options.insecure)
    elif not _is_loopback(found[1].strip("[]")):
        raise UserError("--insecure", options.superlink, "a SuperLink on this machine", "use --root-certificate")
    if not options.data.is_dir():
        raise UserError("--data", str(options.data), "a directory of .txt and .jsonl files")
    ranges = {"battery": (0, 1), "heat": (-40, 200), "memory_bytes": (0, 1 << 50), "text_bytes": (1024, 1 << 32)}
    ranges |= {"retention_days": (0, 36500), "keep_bytes": (0, 1 << 50), "max_rank": (1, 1024)}
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}", value, f"{low} to {high}")


def _check_certificate(path: Path, insecure: bool) -> None:
    if insecure:
        raise UserError("--insecure", "with --root-certificate", "one of the two")
    try:
        with path.open("rb") as file:
            known = _PEM in file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise UserError("--root-certificate", str(path), f"a file that can be read ({error.strerror})") from error
    if not known:
        raise UserError("--root-certificate", str(path), "a certificate in PEM", "take the SuperLink's ca.crt")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(given: str | None) -> str:
    name = given if given is not None else re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
    if _NAME.fullmatch(name) is None:
        raise UserError("--name", name, "1 to 64 letters, digits and . _ -, a letter or digit first")
    return name


def _state_path(given: Path | None, name: str) -> Path:
    return given if given is not None else state_directory() / "clients" / name


def _log(name: str) -> Callable[[str], None]:
    def log(line: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        print(f"{stamp} {name}: {' '.join(line.split())}", file=sys.stderr, flush=True)

    return log
