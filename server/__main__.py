"""``python -m server``: the federation's server.

Exit codes: 0 done, 1 ended early or could not be judged, 2 something the user can correct (a line for each fault),
3 the gate refused the adapter, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edge_runtime.formats.errors import ConfigError, SevenfoldError, UserError

if TYPE_CHECKING:
    from server.home import Home

PAGE_PORT = 9480
_DESCRIPTION = "Lead federations: devices train a LoRA adapter on text that never leaves them."
_EXAMPLES = """examples:
  python -m server up                                   SuperLink with TLS, and the fleet page
  python -m server enrol device.json                    let a device take part
  python -m server run federation=demo rounds=20        start a federation and watch it
  python -m server resume federation=demo               go on after a crash or an interruption
  python -m server simulate clients=1000 rounds=3       simulated devices, one process, no network

settings: any key of conf/federation/default.yaml, as key=value
exit codes: 0 done, 1 ended early, 2 something you can correct, 3 the gate refused the adapter, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except SevenfoldError as error:
        print(f"server: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"server: {error.filename or options.command}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0 if options.command in ("up", "page") else 130


class _OneLineParser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m server",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_serving(commands)
    _add_running(commands)
    _add_devices(commands)
    return parser


def _add_serving(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    up = _command(commands, "up", _up, "SuperLink, fleet page and metrics, in the foreground")
    up.add_argument("--port", type=_port, metavar="N", help="of the SuperLink; default: the last one, else a free one")
    up.add_argument(
        "--page-port", type=_page_port, default=PAGE_PORT, metavar="N", help="0: any free one; default: %(default)s"
    )
    up.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="a name or address of this server (repeatable)"
    )
    up.add_argument(
        "--listen", type=_address, metavar="HOST:PORT", help="let in devices of other machines, at this address of ours"
    )
    page = _command(commands, "page", _page, "the fleet page alone")
    page.add_argument(
        "--port", type=_page_port, default=PAGE_PORT, metavar="N", help="0: any free one; default: %(default)s"
    )
    status = _command(commands, "status", _status, "what is up, who is enrolled, where federations stand")
    status.add_argument("--json", action="store_true", help="one JSON object")


def _add_running(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    run = _command(commands, "run", _run, "start a federation and watch it to its end")
    run.add_argument("--fresh", action="store_true", help="put an earlier one of this name aside")
    resume = _command(commands, "resume", _resume, "go on after the last committed round")
    simulate = _command(commands, "simulate", _simulate, "simulated devices in this process: clients=N")
    simulate.add_argument(
        "--client", metavar="MODULE:FUNCTION", help="makes a device: (index, layout, seed) -> function"
    )
    simulate.add_argument("--out", type=Path, metavar="DIR", help="keep ledger and checkpoints here")
    for command in (run, resume, simulate):
        command.add_argument("words", nargs="*", metavar="key=value", help="federation=NAME, and settings")
    demo = _command(commands, "demo", _demo, "SuperLink and three clients on this machine, to a champion adapter")
    demo.add_argument(
        "--page-port", type=_page_port, default=PAGE_PORT, metavar="N", help="0: any free one; default: %(default)s"
    )


def _add_devices(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    enrol = _command(commands, "enrol", _enrol, "let a device take part")
    enrol.add_argument("card", type=Path, metavar="DEVICE.json", help="what `edge_runtime client keys` wrote on it")
    revoke = _command(commands, "revoke", _revoke, "shut a device out")
    revoke.add_argument("device", metavar="NAME")


def _command(
    commands: argparse._SubParsersAction[_OneLineParser], name: str, run: object, meaning: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
    command.add_argument("--home", type=Path, default=Path(".federation"), metavar="DIR", help="default: %(default)s")
    command.set_defaults(run=run)
    return command


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: 1 to 65535")
    return int(text)


def _page_port(text: str) -> int:
    return 0 if text == "0" else _port(text)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: HOST:PORT, for example 192.168.1.10:9444")
    return host.strip("[]"), _port(port)


def _up(options: argparse.Namespace) -> int:
    from server.operation import up

    return up(_home(options, create=True), options.port, options.page_port, options.name, options.listen)


def _page(options: argparse.Namespace) -> int:
    from server.operation import page

    return page(_home(options), options.port)


def _status(options: argparse.Namespace) -> int:
    from server.operation import status

    return status(_home(options), as_json=options.json)


def _run(options: argparse.Namespace) -> int:
    from server.config import load_federation

    name, rest = _split(options.words, "federation")
    if name is None:
        raise UserError("federation", None, "a file of conf/federation or a path", "add federation=demo")
    config = load_federation(name, rest)
    from server.operation import run

    return run(_home(options), config, fresh=options.fresh)


def _resume(options: argparse.Namespace) -> int:
    from server.operation import resume

    name, rest = _split(options.words, "federation")
    if name is None:
        raise UserError("federation", None, "a federation that was run here", "add federation=NAME")
    return resume(_home(options), name, rest)


def _simulate(options: argparse.Namespace) -> int:
    from server.config import load_federation

    clients, rest = _split(options.words, "clients")
    name, rest = _split(rest, "federation")
    if clients is None or not clients.isdigit() or not 1 <= int(clients) <= 1_000_000:
        raise UserError("clients", clients, "1 to 1000000", "add clients=100")
    everyone = [f"cohort.size={clients}", "cohort.over_selection=1", f"cohort.quorum={-(-int(clients) * 2 // 3)}"]
    config = load_federation(name or "demo", [*everyone, "gate=false", *rest])
    from server.operation import simulate

    return simulate(config, int(clients), options.client, options.out)


def _demo(options: argparse.Namespace) -> int:
    from server.demo import run_demo

    return run_demo(options.home, options.page_port)


def _enrol(options: argparse.Namespace) -> int:
    from server.operation import enrol

    return enrol(_home(options, create=True), options.card)


def _revoke(options: argparse.Namespace) -> int:
    from server.operation import revoke

    return revoke(_home(options), options.device)


def _home(options: argparse.Namespace, *, create: bool = False) -> Home:
    from server.home import open_home

    return open_home(options.home, create=create)


def _split(words: Sequence[str], key: str) -> tuple[str | None, list[str]]:
    """(value of ``key=value``, the other words)."""
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] == key]
    return (values[-1] if values else None), [word for word in words if word.partition("=")[0] != key]


if __name__ == "__main__":
    sys.exit(main())
