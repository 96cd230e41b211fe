"""Who may take part: cards are checked before they are kept, and the SuperLink is made to agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from edge_runtime.formats.envelope import read_envelope
from edge_runtime.formats.errors import UserError
from edge_runtime.formats.masking_keys import open_enrolled
from edge_runtime.formats.signing import TrustStore, fingerprint
from server import registry
from server.home import Home, open_home
from server.superlink import LinkError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home", create=True)


def openssh(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*form).decode()


def card(folder: Path, name: str = "pi", **changes: object) -> Path:
    values = {
        "name": name,
        "node_key": openssh(ec.generate_private_key(ec.SECP384R1())),
        "public_key": ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
    }
    path = folder / f"card-{name}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(values | changes))
    return path


class FakeLink:
    """A SuperLink that can be cut off after its registration, before the answer is noted."""

    def __init__(self) -> None:
        self.keys: dict[int, str] = {}
        self.calls: list[str] = []
        self.cut = False

    def commands(self) -> registry.NodeCommands:
        return registry.NodeCommands(self.register, self.unregister, lambda: dict.fromkeys(self.keys, "registered"))

    def register(self, name: str, key: str) -> int:
        self.calls.append(f"register {name}")
        if key in self.keys.values():
            raise LinkError("Public key already in use.")
        node = 100 + len(self.calls)
        self.keys[node] = key
        if self.cut:
            raise KeyboardInterrupt
        return node

    def unregister(self, node: int) -> None:
        self.calls.append(f"unregister {node}")
        del self.keys[node]


def test_an_enrolled_device_is_registered_once(home: Home, tmp_path: Path) -> None:
    link = FakeLink()
    registry.enrol(home, card(tmp_path))
    assert registry.apply(home, link.commands()) == (["pi"], [])
    assert registry.apply(home, link.commands()) == ([], [])
    (device,) = registry.enrolled(home)
    assert link.keys == {device.node: device.node_key}


def test_a_revoked_device_is_unregistered_and_stays_out(home: Home, tmp_path: Path) -> None:
    link, path = FakeLink(), card(tmp_path)
    registry.enrol(home, path)
    registry.apply(home, link.commands())
    registry.revoke(home, "pi")
    assert registry.apply(home, link.commands()) == ([], ["pi"])
    assert link.keys == {} and registry.enrolled(home)[0].revoked
    registry.revoke(home, "pi")
    assert registry.apply(home, link.commands()) == ([], [])
    with pytest.raises(UserError, match="revoked"):
        registry.enrol(home, path)


def test_revoking_someone_unknown_names_who_is_there(home: Home, tmp_path: Path) -> None:
    registry.enrol(home, card(tmp_path))
    with pytest.raises(UserError, match="allowed: pi"):
        registry.revoke(home, "pie")


def test_a_registration_cut_off_before_it_was_noted_is_found_again(home: Home, tmp_path: Path) -> None:
    link = FakeLink()
    for name in ("one", "two"):
        registry.enrol(home, card(tmp_path, name))
    link.cut = True
    with pytest.raises(KeyboardInterrupt):
        registry.apply(home, link.commands())
    link.cut = False
    registry.apply(home, link.commands())
    assert {device.node for device in registry.enrolled(home)} == set(link.keys)
    assert [link.keys[d.node] for d in registry.enrolled(home)] == [d.node_key for d in registry.enrolled(home)]  # type: ignore[index]


def test_a_superlink_that_lost_its_database_gets_every_device_again(home: Home, tmp_path: Path) -> None:
    registry.enrol(home, card(tmp_path))
    registry.apply(home, FakeLink().commands())
    again = FakeLink()
    assert registry.apply(home, again.commands()) == (["pi"], [])
    assert list(again.keys) == [registry.enrolled(home)[0].node]


@pytest.mark.parametrize("field", ["name", "node_key", "public_key"])
def test_what_another_device_has_is_refused(home: Home, tmp_path: Path, field: str) -> None:
    registry.enrol(home, card(tmp_path))
    taken = json.loads((home.registry / "pi.json").read_text())[field]
    with pytest.raises(UserError, match=f"^{field}: .*pi, which is enrolled"):
        registry.enrol(home, card(tmp_path, **{"name": "other", field: taken}))  # type: ignore[arg-type]
    assert len(registry.enrolled(home)) == 1


BAD_KEYS = {
    "another curve": openssh(ec.generate_private_key(ec.SECP256R1())),
    "another kind": openssh(ed25519.Ed25519PrivateKey.generate()),
    "no key": "ecdsa-sha2-nistp384 AAAA",
    "not ascii": "ecdsa-sha2-nistp384 ü",
    "empty": "",
}


@pytest.mark.parametrize("name", ["", "../pi", ".pi", "a/b", "x" * 65, "a\n", "ü"])
def test_names_that_are_no_names_are_refused(home: Home, tmp_path: Path, name: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(json.loads(card(tmp_path).read_text()) | {"name": name}))
    with pytest.raises(UserError, match="name"):
        registry.enrol(home, path)
    assert not home.registry.exists()


@pytest.mark.parametrize("kind", BAD_KEYS)
def test_node_keys_of_another_kind_are_refused(home: Home, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"node_key: .*P-384"):
        registry.enrol(home, card(tmp_path, node_key=BAD_KEYS[kind]))


@pytest.mark.parametrize("key", ["", "00", "G" * 64, "A" * 64, 7, None])
def test_device_keys_of_another_kind_are_refused(home: Home, tmp_path: Path, key: object) -> None:
    with pytest.raises(UserError, match="public_key"):
        registry.enrol(home, card(tmp_path, public_key=key))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 20_000, "{}", '{"name": 1}'])
def test_files_that_are_no_cards_are_refused_in_one_line(home: Home, tmp_path: Path, text: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        registry.enrol(home, path)
    assert "\n" not in str(caught.value) and "client keys" in str(caught.value)


def test_a_card_brings_neither_a_node_nor_its_own_pardon(home: Home, tmp_path: Path) -> None:
    device = registry.enrol(home, card(tmp_path, node=7, revoked=False, extra="x"))
    assert (device.node, device.revoked) == (None, False)
    assert "extra" not in (home.registry / "pi.json").read_text()


def test_the_signed_list_holds_those_who_may_take_part_and_nobody_else(home: Home, tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    trusted = TrustStore({fingerprint(key.public_key()): key.public_key()})
    assert registry.write_enrolled(home, "demo", 1, key) is None
    devices = [registry.enrol(home, card(tmp_path, name)) for name in ("one", "two", "three")]
    registry.revoke(home, "two")
    path = registry.write_enrolled(home, "demo", 7, key)
    assert path is not None
    with path.open("rb") as file:
        opened = open_enrolled(read_envelope(file.read), trusted)
    assert (opened.federation, opened.serial) == ("demo", 7)
    assert opened.keys == {bytes.fromhex(device.public_key) for device in devices if device.name != "two"}


def test_comments_behind_a_key_are_dropped(home: Home, tmp_path: Path) -> None:
    key = openssh(ec.generate_private_key(ec.SECP384R1()))
    assert registry.enrol(home, card(tmp_path, node_key=f"{key} me@laptop\n")).node_key == key


def test_a_damaged_registry_is_said_not_skipped(home: Home, tmp_path: Path) -> None:
    registry.enrol(home, card(tmp_path))
    (home.registry / "pi.json").rename(home.registry / "po.json")
    with pytest.raises(UserError, match="registry"):
        registry.enrolled(home)
