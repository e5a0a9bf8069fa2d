"""The operator's certificate authority. Its key and those of all certificates are derived from the master key: the same
key, name and window give the same bytes, so that nothing has to be stored, and writing it again changes nothing.

P-256, which every TLS library and FIPS mode has, with deterministic signatures (RFC 6979).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID

from lockstep_api.tls import Material
from lockstep_operator.plan.renewal import Validity, period

_CURVE = ec.SECP256R1()
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256: FIPS 186-5 and SP 800-186, 3.2.1.3."""
_SCALAR_BYTES = 48
"""More than the 32 of a scalar, so that the remainder is as good as uniform: FIPS 186-5, A.2.1."""
_FIRST_DAY = datetime(2020, 1, 1, tzinfo=UTC)
_NO_LAST_DAY = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280, 4.1.2.5: a certificate without a well-defined end. An authority lives as long as its master key."""


@dataclass(frozen=True)
class Authority:
    """What signs."""

    master_key: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @classmethod
    def derive(cls, master_key: bytes) -> Authority:
        """The authority of a master key."""
        key = _private_key(master_key, "lockstep certificate authority")
        digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
        subject = _named(f"Lockstep {digest[:4].hex()}")  # another key's authority has another name
        builder = (
            _builder(subject, subject, key.public_key(), key.public_key())
            .not_valid_before(_FIRST_DAY)
            .not_valid_after(_NO_LAST_DAY)
            .serial_number(_serial(master_key, "lockstep certificate authority's serial"))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
        )
        return cls(master_key, key, builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True))

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, validity: Validity, number: int, *, believes: bytes = b"") -> Material:
        """The certificate of ``name`` (a DNS name) for a window, for both ends of a connection. ``believes`` are other
        authorities' certificates that go with it."""
        identity = f"lockstep certificate/{name}/{validity.renew_seconds:g}/{number}"
        key = _private_key(self.master_key, identity)
        first, last = (datetime.fromtimestamp(at, UTC) for at in period(name, validity, number))
        builder = (
            _builder(_named(name), self.certificate.subject, key.public_key(), self.key.public_key())
            .not_valid_before(first)
            .not_valid_after(last)
            .serial_number(_serial(self.master_key, f"{identity}'s serial"))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
        )
        certificate = builder.sign(self.key, hashes.SHA256(), ecdsa_deterministic=True)
        return Material(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            self.pem + believes,
        )


def _derive(master_key: bytes, purpose: str, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt=None, info=purpose.encode()).derive(master_key)


def _private_key(master_key: bytes, purpose: str) -> ec.EllipticCurvePrivateKey:
    scalar = int.from_bytes(_derive(master_key, purpose, _SCALAR_BYTES)) % (_ORDER - 1) + 1
    return ec.derive_private_key(scalar, _CURVE)


def _serial(master_key: bytes, purpose: str) -> int:
    return int.from_bytes(_derive(master_key, purpose, 16)) | 1  # positive, at most 20 bytes: RFC 5280, 4.1.2.2


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])  # its longest: RFC 5280, A.1


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
