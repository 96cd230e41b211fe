"""The federation's own certificate authority, made at first use; devices are given ``ca.crt`` and nothing else."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.files import write_atomically
from server.home import Home

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
RENEW_DAYS = 30
_ALWAYS = ("localhost", "127.0.0.1")


def ensure_certificates(home: Home, hosts: Sequence[str], now: datetime) -> None:
    """Make what is missing: the authority once, the server's certificate when hosts are new or it nears its end.

    Args:
        home: Where ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key`` lie; keys are readable by their owner.
        hosts: Names and addresses by which devices reach this server, beside localhost.
        now: Aware.

    Raises:
        UserError: A host is neither a name nor an address.
    """
    names = [_general_name(host) for host in dict.fromkeys((*_ALWAYS, *hosts))]
    authority, authority_key = _authority(home, now)
    current = home.root / "server.crt"
    if current.is_file() and (home.root / "server.key").is_file():
        certificate = x509.load_pem_x509_certificate(current.read_bytes())
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        fresh = certificate.not_valid_after_utc - now > timedelta(days=RENEW_DAYS)
        if fresh and certificate.issuer == authority.subject and set(names) <= set(held):
            return
        names = list(dict.fromkeys([*names, *held]))
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sevenfold SuperLink")])
    certificate = (
        _builder(subject, authority.subject, key, now, SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write_key(home.root / "server.key", key)
    write_atomically(current, certificate.public_bytes(serialization.Encoding.PEM))


def _authority(home: Home, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key_file = home.root / "ca.key"
    if home.ca_certificate.is_file() and key_file.is_file():
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise UserError("ca.key", str(key_file), "the key that this server made", "remove ca.key and ca.crt")
        return x509.load_pem_x509_certificate(home.ca_certificate.read_bytes()), key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Sevenfold federation {os.urandom(4).hex()}")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key, now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_file, key)
    write_atomically(home.ca_certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # a device's clock may be behind
        .not_valid_after(now + timedelta(days=days))
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(path, text, mode=0o600)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if len(host) > 253 or not all(label and label.replace("-", "a").isalnum() and label.isascii() for label in labels):
        raise UserError("--name", host, "a host name or an IP address")
    return x509.DNSName(host)
