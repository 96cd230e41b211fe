"""The command line as its users meet it: a process, its streams and its exit code."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save_file

from edge_runtime import backends
from edge_runtime.__main__ import main
from edge_runtime.formats.signing import TRUSTED_DIRECTORY, public_pem
from tests.edge_runtime import fakes
from tests.edge_runtime.conftest import BASE_DIGEST
from tests.edge_runtime.fakes import BOS, SPEC, TableBackend

ROOT = Path(__file__).resolve().parents[2]
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture
def fake_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every container opens as a table, in this process."""
    for container, (_, _, file) in backends.OPENERS.items():
        monkeypatch.setitem(backends.OPENERS, container, (fakes.__name__, "TableBackend", file))


def start(*arguments: object, fake: bool = False, **options: object) -> subprocess.Popen[str]:
    """The command line in a process; with ``fake``, its backends are tables."""
    module = "tests.edge_runtime.fakes" if fake else "edge_runtime"
    command = [sys.executable, "-W", "error", "-m", module, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **(pipes | options))  # type: ignore[call-overload, no-any-return]


def run(*arguments: object, fake: bool = False, stdin: str = "") -> subprocess.CompletedProcess[str]:
    process = start(*arguments, fake=fake)
    stdout, stderr = process.communicate(stdin)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def assert_refused(result: subprocess.CompletedProcess[str], *says: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    for text in says:
        assert text in result.stderr


def expected_text(prompt: str, num_tokens: int) -> str:
    """What the table says greedily, as the byte tokenizer shows it."""
    backend, ids = TableBackend(), [BOS, *prompt.encode()]
    for _ in range(num_tokens):
        ids.append(int(np.argmax(backend.logits(ids))))
    return bytes(ids[1 + len(prompt) :]).decode()


@pytest.mark.parametrize("arguments", [["probe"], ["probe", "--json"], ["--help"], ["generate", "--help"]])
def test_light_commands_answer_in_half_a_second_of_processor_time(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "edge_runtime", *arguments], cwd=ROOT, capture_output=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_light_commands_import_nothing_heavy() -> None:
    code = "import sys; from edge_runtime.__main__ import main; main(['probe']); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "onnxruntime", "ai_edge_litert", "tokenizers", "cryptography", "safetensors", "jinja2", "rich"}
    assert heavy.isdisjoint(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--package", "nowhere", "--prompt", "x"], "no package here"),
        (["generate", "--prompt", "x"], "--package"),
        (["generate", "--package", "x", "--prompt", "x", "--backend", "cuda"], "choose from"),
        (["generate", "--package", "x", "--prompt", "x", "--max", "3"], "unrecognized arguments"),
        (["generate", "--package", "x", "--prompt", "x", "--temperature", "-1"], "temperature: got -1.0"),
        (["generate", "--package", "x", "--prompt", "x", "--seed", "many"], "--seed"),
        (["bench", "--package", "x", "--threads", "0"], "--threads: got 0"),
        (["bench", "--package", "x", "--logits-out", "x.npy"], "--score"),
        (["chat", "--package", "x", "--trust", "absent.pem"], "absent.pem"),
        (["probe", "--disk", "absent"], "absent: No such file"),
        (["surprise"], "invalid choice"),
        ([], "command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(config_dir: Path, arguments: list[str], says: str) -> None:
    assert_refused(run(*arguments), says)


def test_damaged_and_foreign_packages_are_one_line_and_exit_2(package_dir: Path, tmp_path: Path) -> None:
    generate = ("generate", "--package", package_dir, "--prompt", "x")
    (package_dir / "extra.txt").touch()
    assert_refused(run(*generate), "extra.txt", "not listed")
    (package_dir / "extra.txt").unlink()
    (package_dir / "manifest.sig").rename(tmp_path / "kept.sig")
    assert_refused(run(*generate), "unsigned")
    (tmp_path / "kept.sig").rename(package_dir / "manifest.sig")
    shutil.rmtree(package_dir / "onnx")
    assert_refused(run(*generate, "--backend", "onnx"), "no container onnx", "tflite tflite_legacy")


def test_trust_is_given_once(seal: Callable[..., Path], config_dir: Path, tmp_path: Path) -> None:
    stranger = Ed25519PrivateKey.generate()
    (tmp_path / "stranger.pem").write_bytes(public_pem(stranger.public_key()))
    generate = ("generate", "--package", seal(key=stranger), "--prompt", "x", *GREEDY)
    assert_refused(run(*generate, fake=True), "--trust FILE")
    assert run(*generate, "--trust", tmp_path / "stranger.pem", fake=True).returncode == 0
    assert run(*generate, fake=True).returncode == 0
    assert len(list((config_dir / TRUSTED_DIRECTORY).iterdir())) == 2


def test_text_goes_to_stdout_and_everything_else_to_stderr(package_dir: Path) -> None:
    result = run("generate", "--package", package_dir, "--prompt", "hello", *GREEDY, fake=True)
    assert result.returncode == 0
    assert result.stdout == expected_text("hello", 8) + "\n"
    assert "tiny 0.1.0 through onnx" in result.stderr and "6 + 8 tokens" in result.stderr


@pytest.mark.usefixtures("fake_backends")
def test_json_is_one_object(package_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--package", str(package_dir), "--prompt", "hello", "--json", *GREEDY]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["text"] == expected_text("hello", 8)
    assert (done["finish_reason"], done["prompt_tokens"], done["generated_tokens"]) == ("length", 6, 8)
    assert (done["backend"], done["container"]) == ("table", "onnx")
    assert len(done["tokens"]) == 8
    assert min(done[name] for name in ("prefill_s", "decode_tokens_per_s", "load_s", "peak_rss_bytes")) > 0


@pytest.mark.usefixtures("fake_backends")
def test_stop_seed_and_chat_reach_the_engine(package_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*extra: str) -> str:
        assert main(["generate", "--package", str(package_dir), "--prompt", "hi", *extra]) == 0
        return capsys.readouterr().out

    whole = text(*GREEDY)
    assert text(*GREEDY, "--stop", whole[3]) == whole[:3] + "\n"
    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--chat", *GREEDY) == text("--prompt", "[user] hi\n[assistant] ", *GREEDY)


def write_adapter(directory: Path) -> Path:
    """The smallest adapter that fits: rank 1 on one projection."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {"lora_A": np.ones((1, SPEC.hidden_size), np.float32), "lora_B": np.ones((32, 1), np.float32)}
    save_file(
        {f"{prefix}.{half}.weight": value for half, value in halves.items()}, directory / "adapter_model.safetensors"
    )
    return directory


def test_an_adapter_is_used_once_it_is_bound(package_dir: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    generate = ("generate", "--package", package_dir, "--prompt", "hello", *GREEDY)
    assert_refused(run(*generate, "--adapter", adapter, fake=True), "names no base", "--unbound-adapter")
    unbound = run(*generate, "--adapter", adapter, "--unbound-adapter", fake=True)
    assert run("bind", "--package", package_dir, "--adapter", adapter).returncode == 0
    assert json.loads((adapter / "base.json").read_text()) == {"base_digest": BASE_DIGEST}
    bound = run(*generate, "--adapter", adapter, fake=True)
    assert (bound.returncode, bound.stdout) == (0, unbound.stdout)
    assert bound.stdout != run(*generate, fake=True).stdout


def test_chat_answers_each_line_and_remembers(seal: Callable[..., Path]) -> None:
    package = seal(decoder=replace(SPEC, context_tokens=200))
    chat = ("chat", "--package", package, "--temperature", "0", "--max-tokens", "3")
    result = run(*chat, fake=True, stdin="a\n\n/what\nb\n/reset\na\n/exit\nnever\n")
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    first = expected_text("[user] a\n[assistant] ", 3)
    second = expected_text(f"[user] a\n[assistant] {first}\n[user] b\n[assistant] ", 3)
    assert answers == [first, second, first]
    assert "forgotten" in result.stderr and "/what: unknown" in result.stderr
    assert run(*chat, fake=True, stdin="a\n").stdout == first + "\n"


def test_chat_prefills_only_what_is_new(seal: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TableBackend(replace(SPEC, context_tokens=200))
    monkeypatch.setattr("edge_runtime.session.open_backend", lambda *arguments, **options: backend)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert main(["chat", "--package", str(seal(decoder=backend.spec)), "--max-tokens", "3"]) == 0
    # The template's newline, the new turn, and the last answered token, which was never decoded.
    assert backend.prefilled_tokens == [len("<[user] a\n[assistant] "), len("x\n[user] b\n[assistant] ")]


def test_chat_drops_old_turns_and_refuses_what_never_fits(package_dir: Path) -> None:
    chat = ("chat", "--package", package_dir, "--temperature", "0", "--max-tokens", "4")
    result = run(*chat, fake=True, stdin="abc\nabc\n" + "x" * 60 + "\nabc\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 3
    assert "oldest turn was dropped" in result.stderr
    assert "at most 44 fit; shorten the message" in result.stderr
    assert result.stdout.splitlines()[0] == result.stdout.splitlines()[2]


def test_chat_needs_a_template(package_dir: Path, seal: Callable[..., Path], unsealed: Path) -> None:
    shutil.rmtree(package_dir)
    template = unsealed / "chat_template.jinja"
    content = template.read_bytes()
    template.unlink()
    try:
        assert_refused_last_line(run("chat", "--package", seal(), fake=True, stdin="a\n"), "has no chat template")
    finally:
        template.write_bytes(content)


def assert_refused_last_line(result: subprocess.CompletedProcess[str], says: str) -> None:
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]


def test_a_closed_pipe_ends_quietly(seal: Callable[..., Path]) -> None:
    process = start(*endless(seal), fake=True)
    assert process.stdout is not None and process.stderr is not None and process.stdin is not None
    process.stdout.read(1)
    process.stdout.close()
    process.stdin.close()
    assert "Error" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141


def test_an_interrupt_ends_quietly(seal: Callable[..., Path]) -> None:
    process = start(*endless(seal), fake=True)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr and "KeyboardInterrupt" not in stderr


def endless(seal: Callable[..., Path]) -> Sequence[object]:
    """A generation that fills any pipe."""
    package = seal(decoder=replace(SPEC, context_tokens=2**30), eos=())
    return ("generate", "--package", package, "--prompt", "x", "--max-tokens", 10**8)


@pytest.mark.usefixtures("fake_backends")
def test_bench_measures_and_scores(package_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.random.default_rng(0).integers(0, SPEC.vocab_size, (3, 20))
    np.save(tmp_path / "ids.npy", tokens)
    sizes = ("--prompt-tokens", "8", "--tokens", "4", "--repeat", "2")
    files = ("--score", str(tmp_path / "ids.npy"), "--logits-out", str(tmp_path / "logits.npy"))
    assert main(["bench", "--package", str(package_dir), "--json", *sizes, *files]) == 0
    result = json.loads(capsys.readouterr().out)
    backend = TableBackend()
    expected = np.stack([[backend.logits(row[: end + 1]) for end in range(20)] for row in tokens.tolist()])
    logits = np.load(tmp_path / "logits.npy", allow_pickle=False)
    assert (logits.dtype, logits.shape) == (np.float32, (3, 20, SPEC.vocab_size))
    assert np.array_equal(logits, expected)
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(expected[:, :-1]).double().flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten()
    ).item()
    assert abs(result["loss"] - loss) < 1e-12
    assert abs(result["perplexity"] / np.exp(loss) - 1) < 1e-12
    assert result["scored_tokens"] == 57
    assert result["decode_tokens_per_s"] >= result["decode_tokens_per_s_median"] > 0
    assert result["prefill_tokens_per_s"] >= result["prefill_tokens_per_s_median"] > 0
    assert sorted(path.name for path in tmp_path.glob("*npy*")) == ["ids.npy", "logits.npy"]


@pytest.mark.usefixtures("fake_backends")
def test_bench_can_score_alone(package_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((1, 4), np.int32))
    arguments = ["bench", "--package", str(package_dir), "--repeat", "0", "--score", str(tmp_path / "ids.npy")]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "decode_tokens_per_s" not in result and result["scored_tokens"] == 3
    assert main(arguments) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_backends")
@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.zeros((2, 49), np.int64), "at most 48"),
        (np.full((2, 4), SPEC.vocab_size), "0 to 257"),
        (np.full((2, 4), -1), "0 to 257"),
        (np.zeros(4, np.int64), "shape (4,)"),
        (np.zeros((2, 1), np.int64), "shape (2, 1)"),
        (np.zeros((2, 4), np.float32), "float32"),
        (np.array([["a", "b"]], dtype=object), "allow_pickle=False"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(
    package_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: np.ndarray, says: str
) -> None:
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    out = tmp_path / "logits.npy"
    arguments = ["--repeat", "0", "--score", str(tmp_path / "ids.npy"), "--logits-out", str(out)]
    assert main(["bench", "--package", str(package_dir), *arguments]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.usefixtures("fake_backends")
def test_bench_sizes_must_fit_the_context(package_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--package", str(package_dir), "--prompt-tokens", "40", "--tokens", "9"]) == 2
    assert "40 + 9" in capsys.readouterr().err.splitlines()[-1]


def test_peak_memory_is_this_process_alone(package_dir: Path) -> None:
    ballast = np.ones(300_000_000 // 8)
    result = run("bench", "--package", package_dir, "--json", "--prompt-tokens", "4", "--tokens", "4", fake=True)
    assert 10e6 < json.loads(result.stdout)["peak_rss_bytes"] < 150e6
    assert ballast.nbytes == 300_000_000 and os.getpid() > 0
