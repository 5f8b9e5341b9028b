"""Certificates, nkeys and credentials for a nats-server under test, made on the spot."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import nkeys


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_authority(folder: Path, name: str) -> None:
    """``NAME.pem`` and ``NAME.key``: an authority that signs certificates."""
    subject = ["-subj", f"/CN={name}", "-days", "2", "-addext", "keyUsage=critical,keyCertSign"]
    _openssl(folder, "req", "-x509", "-newkey", "ed25519", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem", *subject)


def make_certificate(folder: Path, authority: str, name: str, address: str = "IP:127.0.0.1") -> None:
    """``NAME.pem`` and ``NAME.key``: a certificate for `address`, signed by `authority`."""
    _openssl(folder, "req", "-newkey", "ed25519", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / f"{name}.ext").write_text(f"subjectAltName={address}\n")
    signer = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext"]
    _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signer)


class Key:
    """An nkey pair.

    Attributes:
        seed, public: as text.
    """

    def __init__(self, prefix: int) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), prefix).decode()
        self.pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public = self.pair.public_key.decode()

    def token(self, subject: Key, name: str, claims: dict[str, Any]) -> str:
        """A JWT about `subject`, signed with this key."""
        body: dict[str, Any] = {"iss": self.public, "sub": subject.public, "name": name, "iat": 1, "nats": {**claims, "version": 2}}
        body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
        parts = [_base64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body)]
        return ".".join([*parts, _base64(self.pair.sign(".".join(parts).encode()))])


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def user_key() -> Key:
    return Key(nkeys.PREFIX_BYTE_USER)


class Operator:
    """An operator with one account that may use JetStream.

    Attributes:
        config: text for the configuration of a server that trusts the operator.
    """

    def __init__(self) -> None:
        operator, system, self._account = (
            Key(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
        )
        limits = dict.fromkeys(("subs", "data", "payload", "conn", "leaf", "imports", "exports"), -1)
        about_system = operator.token(system, "system", {"type": "account", "limits": limits})
        limits = limits | {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "wildcards": True}
        about_account = operator.token(self._account, "account", {"type": "account", "limits": limits})
        about_operator = operator.token(operator, "operator", {"type": "operator"})
        known = f"{self._account.public}: {about_account}, {system.public}: {about_system}"
        self.config = (
            f"operator: {about_operator}\nsystem_account: {system.public}\nresolver: MEMORY\nresolver_preload: {{ {known} }}\n"
        )

    def credentials(self) -> str:
        """Text of a ``.creds`` file of a new user of the account."""
        user = user_key()
        token = self._account.token(user, "user", {"type": "user", "subs": -1, "data": -1, "payload": -1})
        return (
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
