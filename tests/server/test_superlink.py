"""The SuperLink as a process: TLS, registered keys, no calls home, and nothing of it left behind."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_runtime.formats.errors import UserError
from server.certificates import ensure_certificates
from server.home import Home, open_home
from server.processes import MARKER, end_processes, is_running, marked_processes
from server.superlink import (
    LinkError,
    SuperLink,
    find_superlink,
    list_nodes,
    register_node,
    running_superlink,
    unregister_node,
)

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def new_key() -> str:
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*form).decode()


def names(home: Home) -> list[str]:
    certificate = x509.load_pem_x509_certificate((home.root / "server.crt").read_bytes())
    held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return sorted(str(name.value) for name in held)


def digests(home: Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.root.glob("*.*") if path.suffix in (".crt", ".key")}


def test_certificates_are_made_once_and_keys_are_private(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home", create=True)
    ensure_certificates(home, [], NOW)
    before = digests(home)
    ensure_certificates(home, [], NOW + datetime.timedelta(days=100))
    assert digests(home) == before and set(before) == {"ca.crt", "ca.key", "server.crt", "server.key"}
    assert {(home.root / name).stat().st_mode & 0o777 for name in ("ca.key", "server.key")} == {0o600}
    assert home.root.stat().st_mode & 0o777 == 0o700
    assert names(home) == ["127.0.0.1", "localhost"]


def test_a_new_host_changes_the_servers_certificate_and_not_what_devices_trust(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home", create=True)
    ensure_certificates(home, [], NOW)
    before = digests(home)
    ensure_certificates(home, ["fleet.example", "10.0.0.7"], NOW)
    ensure_certificates(home, [], NOW)
    assert names(home) == ["10.0.0.7", "127.0.0.1", "fleet.example", "localhost"]
    assert digests(home)["ca.crt"] == before["ca.crt"] and digests(home)["server.crt"] != before["server.crt"]


def test_a_certificate_near_its_end_is_renewed(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home", create=True)
    ensure_certificates(home, [], NOW)
    before = digests(home)
    ensure_certificates(home, [], NOW + datetime.timedelta(days=701))
    assert digests(home)["server.crt"] != before["server.crt"]


@pytest.mark.parametrize("host", ["", "a b", "a/b", "*", "ü.example", "x" * 300])
def test_hosts_that_are_none_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match="host name or an IP address"):
        ensure_certificates(open_home(tmp_path / "home", create=True), [host], NOW)


def test_a_home_with_quotes_in_its_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without quotes"):
        open_home(tmp_path / "it's", create=True)
    with pytest.raises(UserError, match="makes one"):
        open_home(tmp_path / "missing", create=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not show environments")
def test_only_processes_of_this_home_are_found_and_ended(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()",
    ]
    here, there = (
        subprocess.Popen(command, env={**os.environ, MARKER: str(home)}, stdout=subprocess.PIPE, start_new_session=True)
        for home in (tmp_path / "home", tmp_path / "home2")
    )
    with here, there:
        assert here.stdout is not None and here.stdout.readline() == b"1\n"
        assert marked_processes(tmp_path / "home") == [here.pid]
        end_processes([here.pid], grace_s=0.2)
        assert here.wait() == -signal.SIGKILL and there.poll() is None
        assert not is_running(here.pid) and is_running(there.pid)
        there.kill()


def free_port() -> int:
    """Other tests start SuperLinks beside this one; the usual port is anybody's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = open_home(tmp_path_factory.mktemp("link") / "home", create=True)
    ensure_certificates(home, [], datetime.datetime.now(datetime.UTC))
    return home


@pytest.fixture(scope="module")
def link(home: Home) -> Iterator[SuperLink]:
    with running_superlink(home, free_port()) as link:
        yield link


@pytest.mark.xdist_group("superlink")
class TestRunning:
    def test_it_is_found_by_its_home_and_only_while_it_is_up(self, home: Home, link: SuperLink, tmp_path: Path) -> None:
        assert find_superlink(home) == link
        with pytest.raises(UserError, match="python -m server up"):
            find_superlink(open_home(tmp_path, create=False))

    def test_a_second_up_of_the_same_home_is_refused(self, home: Home, link: SuperLink) -> None:
        with pytest.raises(UserError, match="no other `up`"), running_superlink(home):
            pass
        assert not link.ended

    def test_it_speaks_tls_of_our_authority_alone(self, home: Home, link: SuperLink) -> None:
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"https://{link.address}/health", timeout=10)
        context = ssl.create_default_context(cafile=str(home.ca_certificate))
        with urllib.request.urlopen(f"https://{link.address}/health", timeout=10, context=context) as reply:
            assert reply.status == 200

    def test_a_key_is_registered_once_and_unregistered(self, home: Home, link: SuperLink) -> None:
        key = new_key()
        node = register_node(home, "pi", key)
        assert list_nodes(home)[node] == "registered"
        with pytest.raises(LinkError, match="already in use"):
            register_node(home, "pi", key)
        unregister_node(home, node)
        assert node not in list_nodes(home)
        with pytest.raises(LinkError, match="not found"):
            unregister_node(home, node)

    def test_calls_home_are_switched_off(self, home: Home, link: SuperLink) -> None:
        environ = Path(f"/proc/{link.pid}/environ")
        if not environ.exists():
            pytest.skip("this system does not show environments")
        variables = dict(entry.split("=", 1) for entry in environ.read_text().split("\0") if "=" in entry)
        assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
        assert (
            variables["FLWR_DISABLE_UPDATE_CHECK"] == variables["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
        )
        command = Path(f"/proc/{link.pid}/cmdline").read_text().split("\0")
        assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation", "127.0.0.1"} <= set(command)
        assert "--insecure" not in command


@pytest.mark.xdist_group("superlink")
def test_killed_and_started_again_it_keeps_its_port_its_nodes_and_no_stray_process(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home", create=True)
    ensure_certificates(home, [], datetime.datetime.now(datetime.UTC))
    with running_superlink(home, free_port()) as first:
        node = register_node(home, "pi", new_key())
        strays = marked_processes(home.root)
        assert first.process is not None
        first.process.kill()
        first.process.wait()
        assert first.ended
    with running_superlink(home) as second:
        assert second.address == first.address and second.pid != first.pid
        assert node in list_nodes(home)
        assert not set(strays) & set(marked_processes(home.root))
    assert second.ended and marked_processes(home.root) == []


@pytest.mark.xdist_group("superlink")
def test_a_superlink_that_cannot_start_quotes_its_log(tmp_path: Path) -> None:
    home = open_home(tmp_path / "home", create=True)
    ensure_certificates(home, [], datetime.datetime.now(datetime.UTC))
    home.database.mkdir()
    with pytest.raises(LinkError, match=r"ended at once \(.*database"), running_superlink(home):
        pass
