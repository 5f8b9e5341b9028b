"""Connections that come and go: what is raised when one cannot be made or is lost, how long to wait before the next try, TLS, secrets.

Reconnecting follows the usual rule (exponential backoff with jitter): the wait doubles from a least to a most, and each is drawn
between half of it and all of it, so that clients that lost one server together do not come back together. A connection that has lasted
longer than the wait before it, and for some seconds, starts the waits anew: a server that lets everybody in and throws them out again is
left alone more and more.
"""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_DOUBLINGS_MAX = 40
_SETTLED_S = 5.0
"""A connection that has lasted so long was one."""


class ConnectionProblem(Exception):
    """A connection could not be made, or cannot go on. The message says what to do.

    Attributes:
        endpoint: the address, without secrets.
        reason: what happened.
        permanent: whether trying again soon is of no use: the longest wait comes first.
    """

    permanent = False
    _ADVICE = ""

    def __init__(self, endpoint: str, reason: str, advice: str = "") -> None:
        advice = advice or self._ADVICE
        super().__init__(f"{endpoint}: {reason}" + (f": {advice}" if advice else ""))
        self.endpoint, self.reason = endpoint, reason


class ConnectionLost(ConnectionProblem):
    """The other side has gone, or nobody answers."""


class ConnectionSilent(ConnectionProblem):
    """Nothing has come for too long, not even what the protocol promises."""


class LoginRefused(ConnectionProblem):
    """The other side does not let us in."""

    permanent = True
    _ADVICE = "check the user, the password or token, and that this address may log in"


class NotTrusted(ConnectionProblem):
    """TLS cannot be trusted; nothing was sent."""

    permanent = True
    _ADVICE = "name the authority of its certificate in tls_ca_file, and the host as the certificate has it"


class Refused(ConnectionProblem):
    """The other side does not do what it was asked for.

    Attributes:
        retry_after_s: how long it wants us to wait; None: it does not say.
    """

    permanent = True

    def __init__(self, endpoint: str, reason: str, advice: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(endpoint, reason, advice)
        self.retry_after_s = retry_after_s


class BrokenProtocol(ConnectionProblem):
    """What comes is not what the protocol says, and where the next message begins is not known any more."""


class SecretMissing(Exception):
    """A secret that the configuration names is not there.

    Attributes:
        place: the environment variable or file.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place} {reason}")
        self.place = place


# ---------------------------------------------------------------- backoff


def backoff_s(attempt: int, least_s: float = 0.05, most_s: float = 2.0, draw: Callable[[float, float], float] = random.uniform) -> float:
    """How long to wait before try `attempt` (from 0): doubles from `least_s` to `most_s`; `draw` gives the jitter."""
    return min(most_s, least_s * 2.0 ** min(attempt, _DOUBLINGS_MAX)) * draw(0.5, 1.0)


@dataclass
class Backoff:
    """Waits before tries to connect, in seconds.

    Attributes:
        least_s, most_s: the first wait and the longest.
        random: where jitter comes from.
        attempt: tries without success so far.
    """

    least_s: float
    most_s: float
    random: random.Random = field(default_factory=random.Random)
    attempt: int = 0
    _last_s: float = 0.0

    def next_s(self, *, permanent: bool = False) -> float:
        """How long to wait now; `permanent`: the longest wait, since nothing will have changed soon."""
        attempt = _DOUBLINGS_MAX if permanent else self.attempt
        self._last_s = backoff_s(attempt, self.most_s if permanent else self.least_s, self.most_s, self.random.uniform)
        self.attempt += 1
        return self._last_s

    def lasted(self, seconds: float) -> None:
        """A connection has ended after so long."""
        if seconds > max(self._last_s, min(_SETTLED_S, self.most_s)):
            self.attempt = 0


# ---------------------------------------------------------------- secrets and TLS


def read_secret(variable: str | None, file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """A secret from an environment variable or a file's first line; None if neither is named.

    Raises:
        SecretMissing: it is named and not there, or empty.
    """
    if variable is not None:
        if not environment.get(variable):
            raise SecretMissing(f"environment variable {variable}", "is not set: export it before the node starts")
        return environment[variable]
    if file is None:
        return None
    try:
        found = file.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SecretMissing(str(file), f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not found:
        raise SecretMissing(str(file), "is empty: it should hold the secret in its first line")
    return found


def client_tls(authority: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """TLS that trusts the system's authorities, or only `authority`; with a `certificate` of our own for servers that ask for one.

    Raises:
        SecretMissing: a file is missing or holds something else.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority) if authority else None)
    except (OSError, ssl.SSLError) as error:
        raise SecretMissing(str(authority), f"is no file of certificates in PEM ({error.strerror or error})") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise SecretMissing(str(certificate), f"and its key cannot be used ({error.strerror or error})") from None
    return context
