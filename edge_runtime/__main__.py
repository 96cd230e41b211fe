"""``python -m edge_runtime``: probe a device, generate, chat, measure, bind an adapter, take part in a federation.

Text and results go to stdout, everything else to stderr. Exit codes: 0 done, 2 something the user can correct
(one line says what), 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edge_runtime.config import DEFAULTS
from edge_runtime.federated.command import add_client
from edge_runtime.formats.errors import SevenfoldError

if TYPE_CHECKING:
    from edge_runtime.request import SamplingParams
    from edge_runtime.session import Opening

_CONTAINERS = ("onnx", "tflite", "tflite_legacy")
_DESCRIPTION = "Run signed Sevenfold packages on this device."
_EXAMPLES = """examples:
  python -m edge_runtime probe
  python -m edge_runtime generate --package artifacts/packages/small --prompt "The function returns"
  python -m edge_runtime chat --package artifacts/packages/small --backend tflite
  python -m edge_runtime bench --package artifacts/packages/small --json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not a traceback.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except SevenfoldError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.filename or options.command}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
    return 0


class _OneLineParser(argparse.ArgumentParser):
    """Says a mistake in one line, where argparse would print the whole usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m edge_runtime",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_probe(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_bench(commands)
    _add_bind(commands)
    add_client(commands)
    return parser


def _add_probe(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    command = commands.add_parser("probe", help="what this device has: processor, memory, disk, runtimes")
    command.add_argument("--disk", type=Path, default=Path(), metavar="DIR", help="look at this directory's disk")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_probe)


def _add_generate(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    command = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    _add_opening(command)
    command.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    command.add_argument("--chat", action="store_true", help="the prompt is a message in the chat template")
    _add_sampling(command)
    command.add_argument("--json", action="store_true", help="one JSON object with text, tokens and timings")
    command.set_defaults(run=_generate)


def _add_chat(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    command = commands.add_parser("chat", help="talk, a line at a time", allow_abbrev=False)
    _add_opening(command)
    _add_sampling(command)
    command.set_defaults(run=_chat)


def _add_bench(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    command = commands.add_parser("bench", help="measure speed and memory, score given tokens", allow_abbrev=False)
    _add_opening(command)
    numbers = {
        "--prompt-tokens": (DEFAULTS.bench_prompt_tokens, "length of the prompt"),
        "--tokens": (DEFAULTS.bench_tokens, "tokens to decode after it"),
        "--repeat": (DEFAULTS.bench_repeat, "rounds; the best and the median count; 0 skips the speed"),
    }
    for name, (default, meaning) in numbers.items():
        command.add_argument(name, type=int, default=default, metavar="N", help=f"{meaning} (default {default})")
    command.add_argument("--score", type=Path, metavar="FILE.npy", help="token ids (S, T): print loss and perplexity")
    command.add_argument("--logits-out", type=Path, metavar="FILE.npy", help="with --score: write float32 (S, T, V)")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_bench)


def _add_bind(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    command = commands.add_parser("bind", help="note in an adapter which package's base it was trained on")
    command.add_argument("--package", type=Path, required=True, metavar="DIR")
    command.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="adapter in PEFT's format")
    command.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="FILE", help="trust this public key"
    )
    command.set_defaults(run=_bind)


def _add_opening(command: argparse.ArgumentParser) -> None:
    command.add_argument("--package", type=Path, required=True, metavar="DIR", help="a signed package")
    command.add_argument(
        "--backend", choices=("auto", "onnx", "tflite"), default="auto", help="default: the first that runs"
    )
    command.add_argument("--container", choices=_CONTAINERS, help="exactly these files, instead of --backend's choice")
    command.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter in PEFT's format")
    command.add_argument("--unbound-adapter", action="store_true", help="accept an adapter that names no base")
    command.add_argument(
        "--threads", type=int, default=DEFAULTS.threads, metavar="N", help="default: every usable core"
    )
    command.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="FILE", help="trust this public key from now on"
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-tokens", type=int, default=DEFAULTS.max_tokens, metavar="N", help="default: %(default)s"
    )
    command.add_argument("--seed", type=int, default=DEFAULTS.seed, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--temperature",
        type=float,
        default=DEFAULTS.temperature,
        metavar="T",
        help="0: no chance; default: %(default)s",
    )
    command.add_argument("--top-k", type=int, default=DEFAULTS.top_k, metavar="K", help="default: all tokens")
    command.add_argument("--top-p", type=float, default=DEFAULTS.top_p, metavar="P", help="default: %(default)s")
    command.add_argument("--stop", action="append", default=[], metavar="S", help="end before this text (repeatable)")


def _probe(options: argparse.Namespace) -> None:
    import json

    from edge_runtime.probe import describe, probe_device

    profile = probe_device(options.disk)
    print(json.dumps(profile.to_dict()) if options.json else describe(profile))


def _generate(options: argparse.Namespace) -> None:
    from edge_runtime.terminal import run_generate

    params = _sampling(options)
    run_generate(_opening(options), options.prompt, params, chat=options.chat, as_json=options.json)


def _chat(options: argparse.Namespace) -> None:
    from edge_runtime.chat import run_chat

    run_chat(_opening(options), _sampling(options))


def _bench(options: argparse.Namespace) -> None:
    from edge_runtime.bench import BenchPlan, run_bench
    from edge_runtime.formats.errors import UserError

    if options.logits_out is not None and options.score is None:
        raise UserError("--logits-out", str(options.logits_out), "only together with --score", "add --score FILE.npy")
    if options.repeat < 0:
        raise UserError("--repeat", options.repeat, "0 or more")
    plan = BenchPlan(options.prompt_tokens, options.tokens, options.repeat, options.score, options.logits_out)
    run_bench(_opening(options), plan, as_json=options.json)


def _bind(options: argparse.Namespace) -> None:
    from edge_runtime.formats.lora import bind_adapter
    from edge_runtime.session import open_verified

    base_digest = open_verified(options.package, options.trust).manifest.base_digest
    bind_adapter(options.adapter, base_digest)
    print(f"{options.adapter}: bound to base {base_digest}", file=sys.stderr)


def _opening(options: argparse.Namespace) -> Opening:
    from edge_runtime.session import Opening

    return Opening(
        package=options.package,
        backend=options.backend,
        container=options.container,
        adapter=options.adapter,
        allow_unbound=options.unbound_adapter,
        threads=options.threads,
        trust=tuple(options.trust),
    )


def _sampling(options: argparse.Namespace) -> SamplingParams:
    from edge_runtime.request import SamplingParams

    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        max_tokens=options.max_tokens,
        stop=tuple(options.stop),
    )


def _fail(message: str) -> int:
    print(f"edge_runtime: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
