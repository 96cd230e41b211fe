"""What the commands of ``python -m server`` do, one function each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.formats.errors import UserError
from server import registry
from server.home import Home
from server.superlink import (
    LinkError,
    SuperLink,
    find_superlink,
    last_lines,
    list_nodes,
    register_node,
    running_superlink,
    unregister_node,
)
from server.view import FederationView, bytes_text, read_federation, read_federations

if TYPE_CHECKING:
    from server.config import FederationConfig

MOST_RESTARTS = 5
CALM_S = 600.0


def up(home: Home, port: int | None, page_port: int, hosts: Sequence[str], listen: tuple[str, int] | None) -> int:
    """Serve until interrupted: SuperLink, fleet page and metrics; a SuperLink that dies is started again.

    Args:
        home: Made if needed.
        port: Of the SuperLink; None: the last one, else a free one.
        page_port: Of the fleet page.
        hosts: Names by which devices reach this server, for its certificate.
        listen: Address and port at which devices of other machines are let in.

    Raises:
        UserError: A port is taken, or another ``up`` serves this home.
        LinkError: The SuperLink does not start, or keeps dying.
    """
    from server.certificates import ensure_certificates
    from server.page import serve_in_background

    named = [listen[0]] if listen and listen[0] not in ("0.0.0.0", "::") else []
    ensure_certificates(home, [*hosts, *named], datetime.now(UTC))
    deaths: list[float] = []
    with terminable(), serve_in_background(home, page_port) as page:
        while True:
            with running_superlink(home, port) as link, _gateway(home, link, listen) as door:
                _announce(home, link, door, page, again=bool(deaths))
                while not link.ended:
                    time.sleep(0.2)
                port = int(link.address.rpartition(":")[2])
            deaths = [death for death in deaths if time.monotonic() - death < CALM_S] + [time.monotonic()]
            if len(deaths) > MOST_RESTARTS:
                raise LinkError(f"the SuperLink died {len(deaths)} times in {CALM_S:g} s: {last_lines(home.log)}")
            print("the SuperLink died; it is started again; a run that was under way goes on with resume", flush=True)


def run(home: Home, config: FederationConfig, *, fresh: bool) -> int:
    """Start a federation and show its rounds; the exit code.

    Raises:
        UserError: It has rounds already, or no SuperLink is up.
    """
    directory = home.run(config.name)
    if has_rounds(directory):
        if not fresh:
            raise UserError(
                "federation", config.name, "a name without rounds",
                f"python -m server resume federation={config.name}, or name=OTHER, or --fresh to put it aside",
            )  # fmt: skip
        _put_aside(home, directory)
    return _start_and_follow(home, config)


def resume(home: Home, name: str, overrides: Sequence[str]) -> int:
    """Go on after the last committed round; the exit code.

    Raises:
        UserError: There is no such federation, or it has no committed round.
    """
    from server.config import config_from_json, with_overrides

    names = [view.name for view in read_federations(home) if has_rounds(home.run(view.name))]
    if name not in names:
        raise UserError(
            "federation", name, ", ".join(names) or "none yet: no federation here has a committed round",
            "start one: python -m server run federation=NAME",
        )  # fmt: skip
    return _start_and_follow(home, with_overrides(config_from_json(home.run(name) / "config.json"), overrides))


def status(home: Home, *, as_json: bool) -> int:
    """Print what is up, who is enrolled, and where every federation stands."""
    devices, views = registry.enrolled(home), read_federations(home)
    try:
        link: SuperLink | None = find_superlink(home)
        states = list_nodes(home)
    except (UserError, LinkError):
        link, states = None, {}
    online = sum(device.node is not None and states.get(device.node) == "online" for device in devices)
    if as_json:
        print(json.dumps(_status_values(link, devices, online, views)))
        return 0
    print(f"SuperLink   {f'up at {link.address}' if link else 'down; start it: python -m server up'}")
    print(f"devices     {registry.summary(devices)}" + (f", {online} online" if link else ""))
    for view in views:
        loss = view.latest("held_out_loss")
        measured = "" if loss is None else f", held-out loss {loss:.4f}"
        print(f"federation  {view.name}: {view.state}, round {view.round}/{view.wanted_rounds}{measured}, {_age(view)}")
        for number, verdict in view.candidates[-3:]:
            print(f"            candidate of round {number}: {verdict}")
    return 0


def enrol(home: Home, card: Path) -> int:
    """Enrol a device; registered at once when the SuperLink is up, else at the next ``up``."""
    device = registry.enrol(home, card)
    print(f"{device.name} is enrolled, {_applied(home)}")
    return 0


def revoke(home: Home, name: str) -> int:
    """Shut a device out, at once when the SuperLink is up."""
    device = registry.revoke(home, name)
    print(f"{device.name} is revoked, {_applied(home)}")
    return 0


def simulate(config: FederationConfig, clients: int, client: str | None, out: Path | None) -> int:
    """Run a federation of simulated devices in this process and print its rounds."""
    from server.fleet import load_factory, simulate
    from server.terminal import record_line

    started, cpu = time.monotonic(), time.process_time()
    with contextlib.ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sevenfold-simulate-")))
        factory = load_factory(client) if client else None
        simulate(config, clients, out, factory, lambda record: print(record_line(record, config.rounds), flush=True))
        view = read_federation(out)
    spent, cpu = time.monotonic() - started, time.process_time() - cpu
    print(
        f"{clients} simulated devices, {view.round} rounds, {bytes_text(view.total('bytes_up'))} up, "
        f"{bytes_text(view.total('bytes_down'))} down, {spent:.1f} s, {cpu / max(view.round, 1):.2f} CPU s a round"
    )
    return 0


def page(home: Home, port: int) -> int:
    """Serve the fleet page alone until interrupted."""
    from server.page import serve_in_background

    with terminable(), serve_in_background(home, port) as address:
        print(f"fleet page  {address}", flush=True)
        threading.Event().wait()
    return 0


def node_commands(home: Home) -> registry.NodeCommands:
    """The registry's hands on the SuperLink."""
    return registry.NodeCommands(
        lambda name, key: register_node(home, name, key),
        lambda node: unregister_node(home, node),
        lambda: list_nodes(home),
    )


def apply_registry(home: Home) -> None:
    """One process at a time tells the SuperLink what the registry says."""
    home.registry.mkdir(mode=0o700, exist_ok=True)
    with (home.registry / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        registry.apply(home, node_commands(home))


def has_rounds(directory: Path) -> bool:
    """Whether a federation's directory holds a committed round."""
    return any((directory / "checkpoints").glob("*.safetensors"))


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, with everything it started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _gateway(home: Home, link: SuperLink, listen: tuple[str, int] | None) -> Iterator[str | None]:
    if listen is None:
        yield None
        return
    from server.gateway import serve_gateway

    with serve_gateway(home, link, *listen) as address:
        yield address


def _announce(home: Home, link: SuperLink, door: str | None, page: str, *, again: bool) -> None:
    apply_registry(home)
    print(f"SuperLink   {link.address} (TLS, enrolled devices only)")
    if door is not None:
        print(f"devices     enter at {door} (TLS, enrolled devices only)")
    elif not again:
        print("            for devices of this machine; --listen HOST:PORT lets in others")
    if not again:
        print(f"CA          {home.ca_certificate} (give it to each device)")
        print(f"fleet page  {page} (metrics at {page}metrics)")
        print(f"devices     {registry.summary(registry.enrolled(home))}; add one: python -m server enrol DEVICE.json")
        print("Ctrl-C ends it", flush=True)


def _start_and_follow(home: Home, config: FederationConfig) -> int:
    from rich.console import Console

    from server.federation import read_manifest
    from server.following import FAILED, REFUSED, check_package, follow, start_federation, take_mark
    from server.terminal import live_rounds

    if config.gate and find_spec("mlflow") is None:
        raise UserError("gate", True, "false here: the pipeline extra is not installed", "add gate=false")
    for note in check_package(config, read_manifest(config)):
        print(note, file=sys.stderr)
    directory = home.run(config.name)
    if config.secure.enabled:
        _write_enrolled(home, config.name)
    mark, before = take_mark(directory), read_federation(directory).rounds
    number = start_federation(home, config)
    print(f"run {number} of {config.name}, {config.rounds} rounds; Ctrl-C stops it", flush=True)
    go_on = f"python -m server resume federation={config.name} goes on"
    try:
        with live_rounds(Console(), config.name, config.rounds, before) as show:
            outcome = follow(home, config, number, mark, show)
    except KeyboardInterrupt:
        print(f"stopped after round {read_federation(directory).round}; {go_on}", file=sys.stderr)
        return 130
    if outcome.reason:
        print(f"{config.name} ended early: {outcome.reason}; {go_on}", file=sys.stderr)
        return 1
    view = read_federation(directory)
    print(f"{view.round} rounds, {bytes_text(view.total('bytes_up'))} up, {bytes_text(view.total('bytes_down'))} down")
    for index, verdict in view.candidates[-1:]:
        print(f"candidate of round {index}: {verdict}; {directory / 'candidates' / f'{index:06d}'}")
    if outcome.verdict == FAILED:
        print(f"the gate could not judge it; the end of {directory / 'gate.log'}: {last_lines(directory / 'gate.log')}",
              file=sys.stderr)  # fmt: skip
        return 1
    return 3 if outcome.verdict == REFUSED else 0


def _write_enrolled(home: Home, federation: str) -> None:
    """With masks, devices should not take the server's word for who is who."""
    from edge_runtime.formats.signing import signing_key

    path = registry.write_enrolled(home, federation, time.time_ns(), signing_key())
    if path is not None:
        print(
            f"signed list of devices: {path}; give it to each device (client --enrolled FILE) to bind its masks to it"
        )


def _applied(home: Home) -> str:
    try:
        find_superlink(home)
    except UserError:
        return "effective at the next python -m server up"
    apply_registry(home)
    return "effective now"


def _put_aside(home: Home, directory: Path) -> None:
    """Renamed, never deleted."""
    index = 1
    while (target := home.runs / f".{directory.name}.{index}").exists():
        index += 1
    os.replace(directory, target)
    print(f"the earlier {directory.name} is now {target}")


def _age(view: FederationView) -> str:
    if view.last_time is None:
        return "nothing recorded"
    minutes = max(time.time() - view.last_time, 0) / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"


def _status_values(
    link: SuperLink | None, devices: Sequence[registry.Device], online: int, views: Sequence[FederationView]
) -> dict[str, Any]:
    return {
        "superlink": link.address if link else None,
        "devices": {
            "enrolled": sum(not device.revoked for device in devices),
            "revoked": sum(device.revoked for device in devices),
            "online": online if link else None,
        },
        "federations": [
            {
                "name": view.name,
                "state": view.state,
                "round": view.round,
                "rounds": view.wanted_rounds,
                "held_out_loss": view.latest("held_out_loss"),
                "bytes_up": view.total("bytes_up"),
                "bytes_down": view.total("bytes_down"),
                "candidates": [{"round": index, "verdict": verdict} for index, verdict in view.candidates],
            }
            for view in views
        ],
    }
