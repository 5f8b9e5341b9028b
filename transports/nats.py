"""NATS: a connection that comes back, and a publisher that loses nothing and publishes nothing twice.

The publisher owns one JetStream stream. Every message carries the sequence of its last record (``Out-Seq``), its ``Epoch`` and ``Writer``,
a message id, and the stream sequence it must follow (``Nats-Expected-Last-Sequence``), so that the stream accepts each message at one
place only. Messages are sent ahead of their acknowledgements, a window at a time. Whenever it is unclear what the stream holds (a timeout,
a lost connection, a refusal, a duplicate), the publisher reads the stream's last message and sends again what is missing after it: the
stream is the truth, not the acknowledgements.

A publisher takes the stream over by a **fence**: as many empty messages as a window has places, stored in one step (an atomic batch). One
message would not do: a deposed writer's messages are under way, each expecting the one before it; the first would be refused, but the
second expects the very sequence that a fence of one message has. After a whole window of them, none of its messages fits any more.

It knows nothing of markets: records are bytes of a fixed size, and the caller says how a run of them becomes a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import nats.errors
import nats.js.errors as js_errors
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from tickmesh.transports.connection import backoff_s

# ---------------------------------------------------------------- errors


class LinkError(Exception):
    """NATS cannot be used as asked. The message says what to do."""


class NatsUnreachable(LinkError):
    """Nobody answers at the address.

    Attributes:
        url: the address, without secrets.
        reason: the last failure.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"no NATS server answers at {url} ({reason}): check the address, and that the server runs")
        self.url, self.reason = url, reason


class NatsRefused(LinkError):
    """The server does not let us in.

    Attributes:
        url: the address, without secrets.
        reason: what the server said.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"the NATS server at {url} refuses the login ({reason}): give a token, user, credentials or key that it knows")
        self.url, self.reason = url, reason


class NatsInsecure(LinkError):
    """There is no connection by TLS that can be trusted; no secret was sent.

    Attributes:
        url: the address, without secrets.
        reason: what is wrong.
    """

    def __init__(self, url: str, reason: str) -> None:
        what = "name the authority of its certificate (TICKMESH_NATS_CA), and your own certificate and key if it asks for them"
        super().__init__(f"no trusted TLS connection to the NATS server at {url} ({reason}): {what}")
        self.url, self.reason = url, reason


class LoginFileUnusable(LinkError):
    """A file to log in with cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot log in to NATS with the file {path}: {reason}")
        self.path, self.reason = path, reason


class StreamMissing(LinkError):
    """There is no such stream.

    Attributes:
        stream: its name.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(f"there is no stream {stream} on this server: check the cluster's name and the shard, and that its node has run")
        self.stream = stream


class Fenced(LinkError):
    """Another writer has taken the stream over: stop publishing.

    Attributes:
        stream: its name.
        epoch: ours.
        newer_epoch: the other writer's; the same as ours if it was started later under our epoch.
    """

    def __init__(self, stream: str, epoch: int, newer_epoch: int) -> None:
        super().__init__(f"another node has taken stream {stream} over, under epoch {newer_epoch}; ours is {epoch}: this one must stop")
        self.stream, self.epoch, self.newer_epoch = stream, epoch, newer_epoch


class PublishRefused(LinkError):
    """The stream refuses a message for good.

    Attributes:
        stream: its name.
        code: JetStream's error code.
        description: what the server said.
    """

    def __init__(self, stream: str, code: int, description: str) -> None:
        super().__init__(f"stream {stream} refuses messages: {description} (JetStream error {code})")
        self.stream, self.code, self.description = stream, code, description


class ForeignStream(LinkError):
    """The stream holds messages that this publisher cannot have written.

    Attributes:
        stream: its name.
        sequence: stream sequence of the message.
    """

    def __init__(self, stream: str, sequence: int) -> None:
        super().__init__(f"message {sequence} of stream {stream} has no Out-Seq header, so it is no output: choose another cluster name")
        self.stream, self.sequence = stream, sequence


class SequenceGap(LinkError):
    """A record does not follow the one before it. Publish the gap first.

    Attributes:
        expected, found: sequences.
    """

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(f"record {found} was given where {expected} is next: publish_gap({expected}, {found - 1}) first")
        self.expected, self.found = expected, found


# ---------------------------------------------------------------- the link


@dataclass(frozen=True)
class Login:
    """How to log in; what is absent is not used. Secrets come from the environment or from files, never from configuration.

    Attributes:
        token, user, password: as the server knows them.
        credentials: path of a ``.creds`` file.
        nkey: path of a file with an nkey seed.
        ca, certificate, key: paths of PEM files for TLS; with any of them, and with a ``tls://`` address, nothing is said without TLS.
    """

    token: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    credentials: Path | None = None
    nkey: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def from_environment(cls) -> Login:
        """``TICKMESH_NATS_TOKEN``, ``_USER``, ``_PASSWORD`` (each also as ``…_FILE``: read from there), and the paths
        ``TICKMESH_NATS_CREDS``, ``_NKEY``, ``_CA``, ``_CERT``, ``_KEY``.

        Raises:
            LoginFileUnusable: a secret's file cannot be read.
        """

        def path(name: str) -> Path | None:
            value = os.environ.get(f"TICKMESH_NATS_{name}")
            return Path(value) if value else None

        return cls(
            _secret("TOKEN"), _secret("USER"), _secret("PASSWORD"), path("CREDS"), path("NKEY"), path("CA"), path("CERT"), path("KEY")
        )

    def secure(self, url: str) -> bool:
        """Whether TLS is a must."""
        return any((self.ca, self.certificate, self.key)) or any(one.startswith(("tls://", "wss://")) for one in url.split(","))

    def options(self, url: str) -> dict[str, Any]:
        """Keyword arguments for nats-py.

        Raises:
            LoginFileUnusable: a file is missing or holds something else.
        """
        found: dict[str, Any] = {}
        if self.token is not None and "@" not in url:
            found["token"] = self.token
        if self.user is not None and "@" not in url:
            found.update(user=self.user, password=self.password or "")
        if self.credentials is not None:
            _check_credentials(self.credentials)
            found["user_credentials"] = str(self.credentials)
        if self.nkey is not None:
            _check_seed(self.nkey, _read_login_file(self.nkey).strip())
            found["nkeys_seed"] = str(self.nkey)
        if self.secure(url):
            found["tls"] = self._tls()
        return found

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        except (OSError, ssl.SSLError) as error:
            assert self.ca is not None
            raise LoginFileUnusable(self.ca, f"no PEM file of an authority's certificate ({error})") from error
        own = self.certificate or self.key
        if own is not None:
            try:
                context.load_cert_chain(str(own), str(self.key) if self.key else None)
            except (OSError, ssl.SSLError) as error:
                raise LoginFileUnusable(own, f"no PEM certificate with its key {self.key or 'in the same file'} ({error})") from error
        return context


def _read_login_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoginFileUnusable(path, error.strerror or str(error)) from error


def _check_credentials(path: Path) -> None:
    """nats-py looks for the two parts without end; so they must be there."""
    lines = _read_login_file(path).splitlines()
    found = [k for name in (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED") for k, line in enumerate(lines[:-1]) if name in line]
    if len(found) != 2:
        raise LoginFileUnusable(path, "it is no .creds file: those hold one user JWT and one nkey seed")
    _check_seed(path, lines[found[1] + 1].strip())


def _check_seed(path: Path, seed: bytes) -> None:
    import nkeys  # brings libsodium, which other logins do not need

    try:
        nkeys.from_seed(bytearray(seed)).wipe()
    except (nkeys.NkeysError, ValueError) as error:
        raise LoginFileUnusable(path, f"it holds no nkey seed ({type(error).__name__})") from error


def _secret(name: str) -> str | None:
    """A secret from the environment, or from the file that the environment names."""
    file = os.environ.get(f"TICKMESH_NATS_{name}_FILE")
    if file:
        return _read_login_file(Path(file)).decode(errors="replace").strip()
    return os.environ.get(f"TICKMESH_NATS_{name}") or None


def redacted(url: str) -> str:
    """An address that may be shown: without user, password and token."""
    return ",".join(f"{one.partition('://')[0]}://{one.rpartition('@')[2].rpartition('://')[2]}" for one in url.split(","))


def _next_server(servers: list[Any], _info: dict[str, Any]) -> tuple[Any, float]:
    """Reconnect to the server that failed least, after its backoff."""
    best = min(servers, key=lambda server: server.reconnects)
    return best, backoff_s(best.reconnects)


class _Client(Client):  # type: ignore[misc]
    """nats-py's client, which sends its login in the clear to a server that offers no TLS, whatever it was told, and stops reading when the
    answer to a ping comes that nobody waits for any more.

    Attributes:
        secure: send nothing without TLS.
    """

    secure = False

    def _connect_command(self) -> Any:
        if self.secure and not self._server_info.get("tls_required") and self._current_server.uri.scheme != "wss":
            raise _NotEncrypted("the server does not ask for TLS")
        return super()._connect_command()

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():  # given up: its answer is late
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


class _NotEncrypted(nats.errors.Error):  # type: ignore[misc]
    pass


class NatsLink:
    """A connection to NATS that reconnects for ever, with backoff. Make one with :func:`connect`.

    Attributes:
        client: the nats-py client. It buffers nothing while disconnected: a publish fails instead.
        url: the address, without secrets.
        disconnects, reconnects: how often it was lost and came back.
        last_error: what went wrong last, for showing; empty if nothing did.
    """

    def __init__(self, url: str) -> None:
        self.url = redacted(url)
        self.client = _Client()
        self.disconnects = self.reconnects = 0
        self.last_error = ""
        self._up = asyncio.Event()
        self._refused: asyncio.Future[LinkError] = asyncio.get_running_loop().create_future()
        self._listeners: list[Callable[[], None]] = []

    @property
    def connected(self) -> bool:
        """Whether a message published now would be sent."""
        return bool(self.client.is_connected)

    def on_disconnect(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the connection is lost, until :meth:`forget`."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        """Call `listener` no more; not an error if it is not called anyway."""
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    async def send(self, command: bytes) -> None:
        """Send a whole protocol command as it is. nats-py's own `publish` copies a message twice more and checks each header anew.

        Raises:
            nats.errors.Error: not connected; nothing is buffered.
        """
        client = self.client
        if not client.is_connected:
            raise nats.errors.OutboundBufferLimitError
        await client._send_command(command)
        if client._flush_queue.empty():
            await client._flush_pending()

    async def wait_connected(self) -> None:
        """Wait until the connection is back.

        Raises:
            NatsUnreachable: it was closed.
        """
        while not self.connected:
            if self.client.is_closed:
                raise NatsUnreachable(self.url, "the connection was closed")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._up.wait(), 0.25)

    async def close(self) -> None:
        """Close the connection for good."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.client.flush(1), 1.5) if self.connected else None
        await self.client.close()

    async def _open(self, servers: list[str], name: str, login: dict[str, Any], each_s: float) -> None:
        self.client.secure = "tls" in login
        await self.client.connect(
            servers,
            name=name,
            error_cb=self._on_error,
            disconnected_cb=self._on_down,
            reconnected_cb=self._on_up,
            reconnect_to_server_handler=_next_server,
            reconnect_time_wait=0.1,
            max_reconnect_attempts=-1,
            connect_timeout=each_s,
            ping_interval=2,
            max_outstanding_pings=2,
            pending_size=0,
            skip_subject_validation=True,
            **login,
        )
        self._up.set()

    async def _on_error(self, error: Exception) -> None:
        self.last_error = str(error) or type(error).__name__
        if self._refused.done():
            return
        if isinstance(error, (ssl.SSLError, _NotEncrypted)):
            self._refused.set_result(NatsInsecure(self.url, self.last_error))
        elif any(word in self.last_error.lower() for word in ("authorization", "authentication", "nkey")):
            self._refused.set_result(NatsRefused(self.url, self.last_error))

    async def _on_down(self) -> None:
        self.disconnects += 1
        self._up.clear()
        for listener in list(self._listeners):
            listener()

    async def _on_up(self) -> None:
        self.reconnects += 1
        self._up.set()


async def connect(url: str, *, name: str = "tickmesh", login: Login | None = None, wait_s: float = 5.0) -> NatsLink:
    """Connect to NATS.

    Args:
        url: ``nats://host:port`` or ``tls://…``; several, separated by commas, are servers of one cluster.
        name: shown in the server's list of connections.
        login: default: from the environment, see :meth:`Login.from_environment`.
        wait_s: how long to try.

    Raises:
        NatsUnreachable: nobody answered in time, or the address is no address.
        NatsRefused: the server does not let us in.
        NatsInsecure: TLS is a must, and there is none that can be trusted.
        LoginFileUnusable: a file of the login cannot be used.
    """
    _check_url(url)
    options = (login or Login.from_environment()).options(url)
    link, servers = NatsLink(url), url.split(",")
    each_s = min(2.0, wait_s / len(servers))  # one that is silent must leave time for the others
    opening = asyncio.ensure_future(link._open(servers, name, options, each_s))
    try:
        either: set[asyncio.Future[Any]] = {opening, link._refused}
        await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if opening.done() and opening.exception() is None:
            return link
        if link._refused.done():
            raise link._refused.result()
        failure = opening.exception() if opening.done() else None
        raise NatsUnreachable(link.url, str(failure or link.last_error) or f"no answer within {wait_s} s")
    finally:
        if not (opening.done() and not opening.cancelled() and opening.exception() is None):
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await opening
            await link.client.close()


def _check_url(url: str) -> None:
    for one in url.split(","):
        try:
            parts = urlsplit(one)
            usable = parts.scheme in ("nats", "tls", "ws", "wss") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise NatsUnreachable(redacted(one), "this is no NATS address, it should look like nats://localhost:4222")


# ---------------------------------------------------------------- the publisher

Head = Callable[[int, int, int], bytes]
"""(first, count, missing) -> what precedes the records in a message. `missing` > 0: a gap marker, without records."""
Acked = Callable[[int, int, int], None]
"""Told (first, last, sent_ns) when the stream has stored a message; `sent_ns` is monotonic."""

_NO_ROOM = 10047
WINDOW_MAX = 64
"""Messages a writer may have under way, and messages of a fence. The same for all writers of a stream, for good."""
_NEVER = frozenset({10054, 10174})
"""Message too large, atomic batches not allowed: sending again cannot help. All other refusals (10071 and 10164: not the expected last
sequence, 10158: the same id is being stored, 10077: no room) are settled by reading the stream again, until it takes the message or
another writer's shows up."""


@dataclass(frozen=True)
class OutputStream:
    """The stream to publish to.

    Attributes:
        name, subject: of the stream; nobody else publishes to the subject.
        writer: starts the message ids.
        bytes_max: the oldest messages go when the stream is larger.
        age_max_s: messages go when they are older; 0: never.
        replicas: 1, or 3 and more in a NATS cluster.
        duplicate_window_s: how long the server remembers message ids.
    """

    name: str
    subject: str
    writer: str
    bytes_max: int = 512 << 20
    age_max_s: float = 0.0
    replicas: int = 1
    duplicate_window_s: float = 120.0

    def config(self) -> StreamConfig:
        """For creating it."""
        return StreamConfig(
            name=self.name,
            subjects=[self.subject],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_bytes=self.bytes_max,
            max_age=self.age_max_s,
            num_replicas=self.replicas,
            duplicate_window=self.duplicate_window_s,
            allow_atomic=True,
        )


@dataclass
class PublisherCounters:
    """What a publisher has done. `frames`, `records` and `bytes` count what the stream has stored."""

    frames: int = 0
    records: int = 0
    bytes: int = 0
    acks: int = 0
    skipped: int = 0
    """Records that were in the stream already."""
    resent: int = 0
    """Messages sent again."""
    recoveries: int = 0
    duplicates: int = 0
    refusals: int = 0
    timeouts: int = 0
    missing: int = 0
    """Records published as missing."""
    lost_by_server: int = 0
    """Records that were acknowledged and are gone: the server's disk was lost."""


@dataclass(slots=True)
class _Unacked:
    first: int
    last: int
    records: bytes | memoryview
    missing: bool
    sent_ns: int = 0
    size: int = 0
    stored: bool = False


@dataclass(frozen=True)
class _Last:
    """The stream's last message; `out_seq` is None if the stream is empty; of the last records in it, those of one message,
    `records_epoch` is the epoch, `count` how many they are and `digest` their :func:`digest_of` (0: there are none)."""

    seq: int
    out_seq: int | None
    epoch: int
    writer: str
    records_epoch: int
    count: int
    digest: int


def digest_of(records: bytes) -> int:
    """Eight bytes that stand for records, never 0."""
    return int.from_bytes(hashlib.blake2b(records, digest_size=8).digest(), "big") or 1


def _empty_message(subject: str, headers: Mapping[str, str]) -> bytes:
    """A message without content, as it goes to the server."""
    block = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    return f"HPUB {subject} {len(block)} {len(block)}\r\n{block}\r\n".encode()


class OutputPublisher:
    """Publishes runs of records to one stream, each exactly once. One task calls :meth:`publish`.

    Attributes:
        counters: what it has done.
        last_error: why it had to recover last; empty if it never had to.
        records_epoch: the epoch of the last record that the stream held when it was taken over; 0: there was none.
        taken: how many records its message had, and their :func:`digest_of`; 0: it had none.
    """

    def __init__(
        self,
        link: NatsLink,
        stream: OutputStream,
        head: Head,
        *,
        epoch: int = 1,
        record_bytes: int = 64,
        window: int = WINDOW_MAX,
        ack_timeout_s: float = 2.0,
        acked: Acked | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            link: the connection; several publishers may share it.
            stream: made by :meth:`open` if absent.
            head: makes what precedes a run of records in its message.
            epoch: fencing token; a writer with a higher one takes the stream over.
            record_bytes: size of a record.
            window: messages that may be unacknowledged at a time, at most 64; a message takes one place whatever its size.
            ack_timeout_s: after this long without an acknowledgement, the stream is asked what it holds.
            acked: told about every stored message.
        """
        assert 1 <= window <= WINDOW_MAX
        self._link, self._stream, self._head, self._epoch = link, stream, head, epoch
        self._record_bytes, self._window, self._ack_timeout_s, self._acked = record_bytes, window, ack_timeout_s, acked
        self.counters = PublisherCounters()
        self.last_error = ""
        self.records_epoch = 0
        self.taken = (0, 0)
        self._unacked: deque[_Unacked] = deque()
        self._by_token: dict[str, _Unacked] = {}
        self._inbox = f"_INBOX.{os.urandom(9).hex()}"
        self._writer = os.urandom(6).hex()
        self._tokens = 0
        self._id_suffix = ""
        self._chain = 0
        self._stored = 0
        self._next = 1
        self._failures = 0
        self._open = self._opened = False
        self._trouble = asyncio.Event()
        self._progress = asyncio.Event()
        self._fatal: LinkError | None = None
        self._subscription: Any = None
        self._supervisor: asyncio.Task[None] | None = None

    # -- what it offers

    @property
    def last_out_seq(self) -> int:
        """Sequence of the last record that the stream is known to hold; 0 if it holds none."""
        return self._stored

    @property
    def next_out_seq(self) -> int:
        """Sequence of the record that :meth:`publish` takes next; older ones are skipped."""
        return self._next

    @property
    def in_flight(self) -> int:
        """Messages sent and not acknowledged yet."""
        return len(self._unacked)

    @property
    def recovering(self) -> bool:
        """Whether it is finding out what the stream holds."""
        return not self._open

    async def open(self) -> int:
        """Make the stream if absent, take it over, and continue after its last record.

        Again after an error, it goes on with what was not acknowledged.

        Returns:
            The sequence of the last record in the stream, 0 if there is none.

        Raises:
            Fenced: a newer writer has it.
            ForeignStream: it holds something else.
            PublishRefused: it cannot be made, or does not take our messages.
        """
        if self._subscription is None:
            self._link.on_disconnect(self._on_disconnect)
            self._subscription = await self._link.client.subscribe(
                self._inbox + ".*", cb=self._on_ack, pending_msgs_limit=0, pending_bytes_limit=0
            )
        if self._supervisor is not None:
            self._supervisor.cancel()
        self._fatal, self._open, self._failures = None, False, 0
        await self._recover(first_time=not self._opened)
        self._opened, self._failures = True, 0
        self._supervisor = asyncio.create_task(self._supervise())
        return self._stored

    def check(self) -> None:
        """Raise what ended publishing, if anything did.

        Raises:
            Fenced, ForeignStream, PublishRefused: nothing more can be published.
        """
        if self._fatal is not None:
            raise self._fatal

    async def publish(self, first: int, records: bytes | memoryview) -> int:
        """Publish the records ``first, first + 1, …`` as one message; waits for a place in the window. What is in the stream is skipped.

        Returns:
            How many records were new.

        Raises:
            SequenceGap: `first` is beyond :attr:`next_out_seq`.
            Fenced, ForeignStream, PublishRefused: nothing more can be published.
        """
        return await self._add(first, first + len(records) // self._record_bytes - 1, records, missing=False)

    async def publish_gap(self, first: int, last: int) -> int:
        """Publish that the records `first` to `last` are missing. Raises as :meth:`publish` does."""
        return await self._add(first, last, b"", missing=True)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until everything is stored; false if the time ran out.

        Raises:
            Fenced, ForeignStream, PublishRefused: as :meth:`publish`.
        """
        end = time.monotonic() + timeout_s
        while self._unacked:
            self.check()
            left = end - time.monotonic()
            if left <= 0:
                return False
            await self._wait_progress(min(left, 0.5))
        return True

    async def close(self) -> None:
        """Stop; what is not acknowledged may or may not be stored. The link stays open."""
        self._link.forget(self._on_disconnect)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._subscription is not None:
            with contextlib.suppress(Exception):
                await self._subscription.unsubscribe()

    # -- sending

    async def _add(self, first: int, last: int, records: bytes | memoryview, *, missing: bool) -> int:
        while not self._open or len(self._unacked) >= self._window:
            self.check()
            await self._wait_progress(0.5)
        self.check()
        if first > self._next:
            raise SequenceGap(self._next, first)
        item = _Unacked(first, last, records, missing)
        self.counters.skipped += self._trim(item, self._next - 1)
        if item.first > last:
            return 0
        self._next = last + 1
        self._unacked.append(item)
        await self._send(item)
        return last - item.first + 1

    def _trim(self, item: _Unacked, held: int) -> int:
        """Cut what the stream holds (up to sequence `held`) off the front of an item; returns how many records that were."""
        excess = min(held, item.last) - item.first + 1
        if excess <= 0:
            return 0
        item.first += excess
        if not item.missing:
            item.records = memoryview(item.records)[excess * self._record_bytes :]
        return excess

    async def _send(self, item: _Unacked) -> None:
        run = item.last - item.first + 1
        head = self._head(item.first, 0, run) if item.missing else self._head(item.first, run, 0)
        self._tokens += 1
        token = f"{self._tokens:x}"
        headers = (
            f"NATS/1.0\r\nNats-Msg-Id: {self._stream.writer}/{item.first}{self._id_suffix}\r\n"
            f"Nats-Expected-Last-Sequence: {self._chain}\r\nOut-Seq: {item.last}\r\nEpoch: {self._epoch}\r\nWriter: {self._writer}\r\n\r\n"
        ).encode()
        self._chain += 1
        self._by_token[token] = item
        item.sent_ns, item.size = time.monotonic_ns(), len(head) + len(item.records)
        size = len(headers) + item.size
        if size > self._link.client.max_payload:
            what = f"a message of {size} bytes is larger than the server takes ({self._link.client.max_payload})"
            self._fail_for_good(PublishRefused(self._stream.name, 10054, what))
            return
        line = f"HPUB {self._stream.subject} {self._inbox}.{token} {len(headers)} {size}\r\n".encode()
        try:
            await self._link.send(b"".join((line, headers, head, item.records, b"\r\n")))
        except (nats.errors.Error, OSError) as error:
            self._in_doubt(str(error) or "not connected")

    # -- hearing

    async def _on_ack(self, message: Any) -> None:
        item = self._by_token.pop(message.subject[len(self._inbox) + 1 :], None)
        if item is None:
            return  # sent before the last recovery
        if message.headers and message.headers.get("Status") == "503":
            self._in_doubt(f"no stream {self._stream.name} takes messages now")
            return
        if b'"error"' in message.data:
            error = json.loads(message.data)["error"]
            self._on_refusal(int(error.get("err_code", 0)), str(error.get("description", "")))
        elif b'"duplicate"' in message.data:
            self.counters.duplicates += 1
            self._id_suffix = f"/{self.counters.duplicates}"  # if the stream has lost that message, its id must not keep it out
            self._in_doubt("a message id was known already")
        else:
            item.stored = True
            self._failures = 0
            self._settle()

    def _on_refusal(self, code: int, description: str) -> None:
        self.counters.refusals += 1
        if code in _NEVER:
            self._fail_for_good(PublishRefused(self._stream.name, code, description))
        else:
            self._in_doubt(f"{description} (JetStream error {code})")

    def _settle(self) -> None:
        """Let go of the messages at the front of the window that are stored."""
        counters = self.counters
        while self._unacked and self._unacked[0].stored:
            item = self._unacked.popleft()
            run = item.last - item.first + 1
            counters.acks += 1
            counters.frames += 1
            counters.bytes += item.size
            counters.missing += run if item.missing else 0
            counters.records += 0 if item.missing else run
            self._stored = item.last
            if self._acked is not None:
                self._acked(item.first, item.last, item.sent_ns)
        self._progress.set()

    def _on_disconnect(self) -> None:
        self._in_doubt("the connection was lost")  # also with nothing under way: the stream may be another's by now

    def _in_doubt(self, reason: str) -> None:
        if not self._trouble.is_set():
            self.last_error = reason
            self._open = False
            self._trouble.set()

    def _fail_for_good(self, error: LinkError) -> None:
        self._fatal = self._fatal or error
        self.last_error = str(error)
        self._progress.set()

    async def _wait_progress(self, limit_s: float) -> None:
        self._progress.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._progress.wait(), limit_s)

    # -- recovering

    async def _supervise(self) -> None:
        """Notice missing acknowledgements, and recover whenever the stream's contents are in doubt."""
        while self._fatal is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._trouble.wait(), self._ack_timeout_s / 4)
            if not self._trouble.is_set():
                oldest = self._unacked[0].sent_ns if self._unacked else None
                if oldest is None or time.monotonic_ns() - oldest < self._ack_timeout_s * 1e9:
                    continue
                self.counters.timeouts += 1
                self._in_doubt(f"no acknowledgement within {self._ack_timeout_s} s")
            try:
                await self._recover(first_time=False)
            except LinkError as error:
                self._fail_for_good(error)

    async def _recover(self, *, first_time: bool) -> None:
        """Read what the stream holds, let go of that, send the rest again. Tries until it succeeds; the stream decides what is missing."""
        while not self._open:
            self.check()
            if not first_time:
                self.counters.recoveries += 1
            if self._failures:
                await asyncio.sleep(backoff_s(self._failures - 1))
            self._failures += 1
            await self._link.wait_connected()
            self._by_token.clear()  # acknowledgements of what was sent before say nothing any more
            try:
                if not first_time:
                    await self._link.client.flush(2)  # the server has taken in all that was sent before
                last = await self._take_over(first_time)
            except (TimeoutError, nats.errors.Error, js_errors.Error, OSError) as error:
                self.last_error = str(error) or type(error).__name__
                continue
            self._continue_after(last, first_time)
            await self._send_again()
        self._progress.set()

    async def _send_again(self) -> None:
        """Send the window's messages in order; new ones may follow once all are on their way."""
        self._trouble.clear()
        for item in list(self._unacked):
            if self._trouble.is_set():
                return
            self.counters.resent += 1
            await self._send(item)
        self._open = not self._trouble.is_set()

    def _continue_after(self, last: _Last, first_time: bool) -> None:
        """Bring the window in line with the stream's last message."""
        held = self._stored if last.out_seq is None else last.out_seq  # an emptied stream: what it held is not to be sent again
        self._chain = last.seq
        for item in self._unacked:
            item.stored = item.last <= held
        self._settle()
        if self._unacked:
            self._trim(self._unacked[0], held)
        if not first_time and held < self._stored:
            self.counters.lost_by_server += self._stored - held
            self._unacked.appendleft(_Unacked(held + 1, self._stored, b"", missing=True))
        self._stored = held
        self._next = max(self._next, held + 1)

    async def _take_over(self, first_time: bool) -> _Last:
        """Fence other writers off, unless the last message is ours; returns the last message."""
        last = await self._read_last()
        if last.epoch == self._epoch and last.writer == self._writer:
            if first_time:  # the answer to our fence was lost
                self.records_epoch, self.taken = last.records_epoch, (last.count, last.digest)
            return last
        if last.epoch > self._epoch or (last.epoch == self._epoch and not first_time):
            raise Fenced(self._stream.name, self._epoch, last.epoch)
        return await self._fence(last, last.out_seq if last.out_seq is not None else self._stored)

    async def _fence(self, last: _Last, held: int) -> _Last:
        client, subject = self._link.client, self._stream.subject
        common = {"Kind": "fence", "Epoch": str(self._epoch), "Writer": self._writer, "Out-Seq": str(held)}
        common["Records-Epoch"], common["Records"] = str(last.records_epoch), f"{last.count} {last.digest:x}"
        common["Nats-Batch-Id"] = os.urandom(9).hex()
        numbered = [{**common, "Nats-Batch-Sequence": "1", "Nats-Expected-Last-Sequence": str(last.seq)}]
        numbered += [{**common, "Nats-Batch-Sequence": str(number)} for number in range(2, WINDOW_MAX)]
        await self._link.send(b"".join(_empty_message(subject, headers) for headers in numbered))
        commit = {**common, "Nats-Batch-Sequence": str(WINDOW_MAX), "Nats-Batch-Commit": "1"}
        answer = json.loads((await client.request(subject, b"", timeout=2, headers=commit)).data)
        if "error" in answer:
            code, description = int(answer["error"].get("err_code", 0)), str(answer["error"].get("description", ""))
            if code in _NEVER:
                raise PublishRefused(self._stream.name, code, description)
            raise nats.errors.Error(f"{description} (JetStream error {code})")  # another writer was faster: read again
        self.records_epoch, self.taken = last.records_epoch, (last.count, last.digest)
        return _Last(int(answer["seq"]), held, self._epoch, self._writer, last.records_epoch, *self.taken)

    async def _read_last(self) -> _Last:
        """The stream's last message, from the stream's leader; makes the stream if it is absent."""
        jetstream, name = self._link.client.jetstream(timeout=2), self._stream.name
        try:
            message = await jetstream.get_last_msg(name, self._stream.subject)
        except js_errors.NotFoundError:
            return await self._empty_stream(jetstream)
        headers = message.headers or {}
        if "Out-Seq" not in headers or message.seq is None:
            raise ForeignStream(name, message.seq or 0)
        epoch = int(headers.get("Epoch", "0"))
        out_seq, data = int(headers["Out-Seq"]), message.data or b""
        if headers.get("Kind") == "fence":
            records_epoch, (count, digest) = int(headers.get("Records-Epoch", "0")), headers.get("Records", "0 0").split()
            return _Last(int(message.seq), out_seq, epoch, headers.get("Writer", ""), records_epoch, int(count), int(digest, 16))
        records = data[len(self._head(out_seq, 1, 0)) :]
        found = (len(records) // self._record_bytes, digest_of(records)) if records else (0, 0)
        return _Last(int(message.seq), out_seq, epoch, headers.get("Writer", ""), epoch, *found)

    async def _empty_stream(self, jetstream: Any) -> _Last:
        try:
            info = await jetstream.stream_info(self._stream.name)
        except js_errors.NotFoundError:
            try:
                info = await jetstream.add_stream(self._stream.config())
            except js_errors.BadRequestError as error:
                raise PublishRefused(self._stream.name, error.err_code or 0, error.description or "it cannot be made") from error
            except js_errors.ServerError as error:
                if error.err_code != _NO_ROOM:
                    raise
                what = f"{error.description}: its {self._stream.bytes_max >> 20} MiB do not fit into the server's store; make either fit"
                raise PublishRefused(self._stream.name, _NO_ROOM, what) from error
        return _Last(int(info.state.last_seq), None, 0, "", 0, 0, 0)
