"""``python -m edge_runtime client`` as a process: TLS, a registered key, signals; wrong options in one line."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_runtime.federated.identity import node_key
from edge_runtime.formats.envelope import unseal
from edge_runtime.formats.messages import Decline, Profile, Reason
from tests.edge_runtime.federated.device import greet, make_plan, small_layout
from tests.edge_runtime.federated.flower_link import FlowerLink, free_port

ROOT = Path(__file__).resolve().parents[3]
LAYOUT = small_layout()
# The command line with a trainer that needs no runtime; a step takes as long as the environment says.
PROGRAM = """
import os, sys, time
from edge_runtime.federated import trainer
from tests.edge_runtime.federated.device import LinearTrainer
def open_linear(kind, package, *, threads):
    def step():
        print("step", file=sys.stderr, flush=True)
        time.sleep(float(os.environ.get("STEP_S", "0")))
    return LinearTrainer(on_step=step)
trainer.open_trainer = open_linear
from edge_runtime.__main__ import main
sys.exit(main())
"""


def environment(config_dir: Path, **more: str) -> dict[str, str]:
    return dict(os.environ) | {"SEVENFOLD_CONFIG_DIR": str(config_dir), "PYTHONUNBUFFERED": "1"} | more


def run(config_dir: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "client", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(config_dir), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "notes.txt").write_text("".join(f"line {n}: the quick brown fox\n" for n in range(300)))
    return folder


def certify(folder: Path) -> tuple[Path, Path]:
    """A certificate of its own authority for 127.0.0.1, and its key."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "superlink")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    paths = folder / "ca.crt", folder / "server.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form, plain = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return paths


@pytest.fixture
def link(tmp_path: Path) -> Iterator[FlowerLink]:
    certificate, key = certify(tmp_path / "tls")
    running = FlowerLink(tmp_path / "link.db", free_port(), certificate=certificate, key=key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running.start()
    running.app.state.enable_supernode_auth = True
    running.begin_run()
    yield running
    running.kill()


@pytest.fixture
def start(
    tmp_path: Path, link: FlowerLink, package_dir: Path, config_dir: Path, text: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(*more: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, "client", "--package", str(package_dir), "--data", str(text)]
        command += ["--superlink", link.address, "--root-certificate", str(link.certificate), "--name", "kitchen"]
        command += ["--state", str(tmp_path / "state"), "--memory-bytes", "0", "--heat", "200", *more]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(config_dir, **variables), stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stderr is not None
    seen: list[str] = []
    for line in process.stderr:
        seen.append(line.strip())
        if word in line:
            return seen
    raise AssertionError(f"no {word!r} in {seen}")


def test_a_device_joins_trains_yields_to_a_signal_and_leaves(
    link: FlowerLink, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    number = link.register(node_key(tmp_path / "state"))
    process = start(STEP_S="0.5")
    read_until(process, f"connected to {link.address} as node {number}")
    profile = unseal(link.receive(link.send(number, greet(LAYOUT))), Profile)
    assert profile.device == "kitchen" and profile.base_digest == LAYOUT.base_digest
    assert link.receive(link.send(number, make_plan(LAYOUT, steps=1, batch_sequences=2))).kind == "update"
    asked = link.send(number, make_plan(LAYOUT, steps=1000, batch_sequences=2, plan_id="2" * 64))
    read_until(process, "bytes up")
    read_until(process, "step")
    told_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    # It says that it is busy instead of leaving the server to find out, and is gone within a step.
    assert unseal(link.receive(asked), Decline).reason is Reason.BUSY
    assert process.wait(timeout=30) == 0
    assert time.monotonic() - told_s < 20  # of 500 s of work
    assert number not in link.nodes()


def test_a_signal_while_waiting_ends_it_cleanly(
    link: FlowerLink, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    link.register(node_key(tmp_path / "state"))
    process = start()
    read_until(process, "connected")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert process.stderr is not None and "Traceback" not in process.stderr.read()


def test_a_device_that_is_not_enrolled_ends_with_one_line(
    link: FlowerLink, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start()
    lines = read_until(process, "edge_runtime:")
    assert process.wait(timeout=30) == 2
    assert "device.json" in lines[-1]


def test_a_superlink_with_another_certificate_is_not_spoken_to(
    link: FlowerLink, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    other, _ = certify(tmp_path / "other")
    process = start("--root-certificate", str(other))
    lines = read_until(process, "edge_runtime:")
    assert process.wait(timeout=30) == 2
    assert "--root-certificate" in lines[-1]


def test_keys_are_printed_for_the_operator_and_stay(tmp_path: Path, config_dir: Path) -> None:
    first = run(config_dir, "keys", "--name", "kitchen", "--state", tmp_path / "state")
    again = run(config_dir, "keys", "--name", "kitchen", "--state", tmp_path / "state")
    assert first.returncode == 0 and first.stdout == again.stdout
    found = json.loads(first.stdout)
    assert found["name"] == "kitchen" and found["node_key"].startswith("ecdsa-sha2-nistp384 ")
    assert len(bytes.fromhex(found["public_key"])) == 32
    assert json.loads((tmp_path / "state/device.json").read_text()) == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--package": None}, "--package"),
        ({"--package": "/nowhere"}, "/nowhere"),
        ({"--data": "/nowhere"}, "--data"),
        ({"--superlink": "nowhere"}, "HOST:PORT"),
        ({"--superlink": "127.0.0.1:99999"}, "HOST:PORT"),
        ({"--superlink": "10.0.0.1:9443"}, "--insecure"),
        ({"--insecure": None}, "--root-certificate"),
        ({"--root-certificate": "/nowhere"}, "--insecure"),
        ({"--insecure": None, "--root-certificate": "/nowhere"}, "--root-certificate"),
        ({"--insecure": None, "--root-certificate": __file__}, "PEM"),
        ({"--name": "../x"}, "--name"),
        ({"--threads": "0"}, "--threads"),
        ({"--battery": "30"}, "--battery"),
        ({"--retention-days": "-1"}, "--retention-days"),
        ({"--trainer": "magic"}, "--trainer"),
        ({"--max-rank": "0"}, "--max-rank"),
        ({"--enrolled": "/nowhere"}, "--enrolled"),
        ({"--state": __file__}, "--state"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(
    package_dir: Path,
    config_dir: Path,
    text: Path,
    tmp_path: Path,
    change: dict[str, str | None],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edge_runtime.__main__ import main

    options: dict[str, str | None] = {
        "--package": str(package_dir),
        "--data": str(text),
        "--superlink": "127.0.0.1:9",
        "--insecure": "",
        "--state": str(tmp_path / "state"),
    }
    options |= change
    arguments = [word for name, value in options.items() if value is not None for word in (name, value) if word]
    try:
        code = main(["client", *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    error = capsys.readouterr().err.strip()
    last = error.splitlines()[-1]
    assert code == 2 and says in last and "Traceback" not in error
