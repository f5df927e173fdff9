"""TLS for a server of our own: a certificate authority made here, and a certificate that it signs for the server.

`cryptography` takes a while to import, so this module is imported only where certificates are made.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dspex.bus.identity import write_private

__all__ = ["AUTHORITY", "CERTIFICATE", "HOSTS", "KEY", "make_certificates"]

AUTHORITY, AUTHORITY_KEY = "ca.pem", "ca-key.pem"
CERTIFICATE, KEY = "server.pem", "server-key.pem"
HOSTS = ("localhost", "127.0.0.1", "::1")
"""The names a server's certificate always has."""
AUTHORITY_DAYS, DAYS = 3650, 365
EARLY = timedelta(days=30)
"""So long before it ends a certificate is made anew."""
SKEW = timedelta(hours=1)
"""A certificate is valid so long before it was made, for those whose clock is behind."""


def make_certificates(folder: Path, hosts: tuple[str, ...] = ()) -> datetime:
    """Make what is missing, ends soon or lacks a host; return when the server's certificate ends.

    Each key is written before its certificate, so whoever dies in between leaves a key without a certificate, and the
    next call makes both anew.
    """
    authority, key = _load(folder / AUTHORITY), folder / AUTHORITY_KEY
    if authority is None or not key.is_file() or _ends_soon(authority):
        authority = _make_authority(folder)
    server = _load(folder / CERTIFICATE)
    names = tuple(dict.fromkeys((*HOSTS, *hosts, *(_names_of(server) if server else ()))))
    if (
        server is None or not (folder / KEY).is_file() or _ends_soon(server) or not _issued_by(server, authority)
        or set(names) - set(_names_of(server))
    ):  # fmt: skip
        server = _make_server(folder, authority, names)
    return server.not_valid_after_utc


def _make_authority(folder: Path) -> x509.Certificate:
    key = _new_key(folder / AUTHORITY_KEY)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dspex authority of this folder")])
    certificate = (
        _builder(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(folder / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


def _make_server(folder: Path, authority: x509.Certificate, hosts: tuple[str, ...]) -> x509.Certificate:
    signer = serialization.load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey), "the authority's key is of the kind that we make"
    key = _new_key(folder / KEY)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dspex server")])
    certificate = (
        _builder(name, authority.subject, key, DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    write_private(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _new_key(file: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    kind = serialization.PrivateFormat.PKCS8
    write_private(file, key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
    return key


def _load(file: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError):
        return None


def _ends_soon(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_after_utc - datetime.now(UTC) < EARLY


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # whatever is wrong with it, it is made anew
        return False
    return True


def _names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
