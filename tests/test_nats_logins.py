"""Every way to log in, and TLS, against real servers that ask for it: publishing, reading, coming back, and being turned away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from nats_fixtures import ConfiguredServer
from nats_logins import Operator, make_authority, make_certificate, user_key
from test_nats_link import publishing, records, stream, until

from tickmesh.node.subscription import subscribe
from tickmesh.transports.nats import Login, LoginFileUnusable, NatsInsecure, NatsRefused, NatsUnreachable, connect
from tickmesh.transports.nats_reader import StreamReader


@dataclass
class Asked:
    """What a server asks for.

    Attributes:
        config: text for its configuration.
        login: what it lets in.
        wrong: what it does not.
        secure: whether it speaks TLS.
    """

    config: str
    login: Login
    wrong: Login
    secure: bool = False


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def token(folder: Path) -> Asked:
    return Asked('authorization { token: "s3cret" }\n', Login(token="s3cret"), Login(token="wr0ng"))


def password(folder: Path) -> Asked:
    right = Login(user="feed", password="s3cret")
    return Asked('authorization { user: feed, password: "s3cret" }\n', right, replace(right, password="wr0ng"))


def nkey(folder: Path) -> Asked:
    known, unknown = user_key(), user_key()
    right, wrong = (Login(nkey=written(folder / f"{name}.nk", key.seed + "\n")) for name, key in (("known", known), ("unknown", unknown)))
    return Asked(f"authorization {{ users: [ {{ nkey: {known.public} }} ] }}\n", right, wrong)


def credentials(folder: Path) -> Asked:
    known, unknown = Operator(), Operator()
    right, wrong = (
        Login(credentials=written(folder / f"{name}.creds", one.credentials())) for name, one in (("known", known), ("unknown", unknown))
    )
    return Asked(known.config, right, wrong)


def _certified(folder: Path, verify: bool) -> str:
    make_authority(folder, "ca")
    make_certificate(folder, "ca", "server")
    files = f'cert_file: "{folder}/server.pem", key_file: "{folder}/server.key", ca_file: "{folder}/ca.pem"'
    return f"tls {{ {files}, verify: {str(verify).lower()} }}\n"


def tls(folder: Path) -> Asked:
    make_authority(folder, "other")
    config = _certified(folder, verify=False) + token(folder).config
    return Asked(config, Login(token="s3cret", ca=folder / "ca.pem"), Login(token="s3cret", ca=folder / "other.pem"), True)


def own_certificate(folder: Path) -> Asked:
    config = _certified(folder, verify=True)
    make_certificate(folder, "ca", "client")
    make_authority(folder, "other")
    make_certificate(folder, "other", "stranger")
    right = Login(ca=folder / "ca.pem", certificate=folder / "client.pem", key=folder / "client.key")
    return Asked(config, right, replace(right, certificate=folder / "stranger.pem", key=folder / "stranger.key"), True)


WAYS: list[Callable[[Path], Asked]] = [token, password, nkey, credentials, tls, own_certificate]


@pytest.fixture(autouse=True)
def no_login_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "USER", "PASSWORD", "CREDS", "NKEY", "CA", "CERT", "KEY"):
        monkeypatch.delenv(f"TICKMESH_NATS_{name}", raising=False)
        monkeypatch.delenv(f"TICKMESH_NATS_{name}_FILE", raising=False)


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Asked:
    found: Asked = request.param(tmp_path)
    return found


@pytest.fixture
def server(asked: Asked, tmp_path: Path) -> Iterator[ConfiguredServer]:
    with ConfiguredServer(tmp_path / "nats", asked.config) as running:
        yield running


def address(server: ConfiguredServer, asked: Asked) -> str:
    return server.url.replace("nats://", "tls://") if asked.secure else server.url


def test_publishes_reads_and_comes_back(server: ConfiguredServer, asked: Asked) -> None:
    """A lost connection logs in again, for the publisher and for the reader."""

    async def run() -> None:
        writing = await connect(address(server, asked), login=asked.login)
        reading = await connect(address(server, asked), login=asked.login)
        reader = StreamReader(reading, stream("c").name, 1)
        try:
            async with publishing(writing, stream("c")) as publisher:
                await publisher.publish(1, records(1, 10))
                assert await publisher.drain(10)
                server.kill()
                await until(lambda: not writing.connected)
                server.start()
                await publisher.publish(11, records(11, 10))
                assert await publisher.drain(20)
                found: list[bytes] = []
                async with asyncio.timeout(20):
                    while len(found) < 2:
                        message = await reader.next()
                        found += [message.data[16:]] if message.data else []
                assert b"".join(found) == records(1, 20)
                await until(lambda: reading.connected)
                await reader.close()
        finally:
            await writing.close()
            await reading.close()
        assert writing.reconnects == 1

    asyncio.run(run())


def test_others_are_turned_away(server: ConfiguredServer, asked: Asked) -> None:
    for login in (asked.wrong, Login()):
        with pytest.raises((NatsRefused, NatsInsecure)) as caught:
            asyncio.run(connect(server.url, login=login))
        assert "wr0ng" not in str(caught.value)
        assert "s3cret" not in str(caught.value)
        assert (caught.type is NatsInsecure) == asked.secure


def test_a_subscriber_logs_in_from_the_environment(server: ConfiguredServer, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    login = asked.login
    given = {"TOKEN": login.token, "USER": login.user, "PASSWORD": login.password, "CREDS": login.credentials, "NKEY": login.nkey}
    for name, value in {**given, "CA": login.ca, "CERT": login.certificate, "KEY": login.key}.items():
        if value:
            monkeypatch.setenv(f"TICKMESH_NATS_{name}", str(value))

    async def run() -> None:
        async with subscribe(address(server, asked), pattern="tm.c.bbo.*") as maps:
            assert await maps.open() is maps

    asyncio.run(run())


# ---------------------------------------------------------------- TLS


def test_no_secret_goes_to_a_server_without_tls(tmp_path: Path) -> None:
    """nats-py would send the token in the clear, to whoever listens there."""
    asked = token(tmp_path)
    make_authority(tmp_path, "ca")
    with ConfiguredServer(tmp_path / "nats", asked.config) as server:
        for url, login in (
            (server.url.replace("nats://", "tls://"), asked.login),
            (server.url, replace(asked.login, ca=tmp_path / "ca.pem")),
        ):
            with pytest.raises(NatsInsecure, match="does not ask for TLS"):
                asyncio.run(connect(url, login=login))
        assert server.running


def test_a_certificate_for_another_name_is_not_trusted(tmp_path: Path) -> None:
    make_authority(tmp_path, "ca")
    make_certificate(tmp_path, "ca", "server", "DNS:nats.example.org")
    config = f'tls {{ cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.key" }}\n'
    with ConfiguredServer(tmp_path / "nats", config) as server, pytest.raises(NatsInsecure, match="certificate is not valid for"):
        asyncio.run(connect(server.url, login=Login(ca=tmp_path / "ca.pem")))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("way", ["nkey", "credentials", "ca", "certificate", "key"])
@pytest.mark.parametrize("text", [None, "", "nothing of the kind\n", "-----BEGIN NATS USER JWT-----\n"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, way: str, text: str | None) -> None:
    """Before anything is sent, and at once."""
    path = tmp_path / "login"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoginFileUnusable) as caught:
        asyncio.run(connect("nats://127.0.0.1:1", login=Login(**{way: path})))
    assert str(path) in str(caught.value)


def test_a_secrets_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKMESH_NATS_PASSWORD_FILE", str(tmp_path / "none"))
    with pytest.raises(LoginFileUnusable, match=str(tmp_path / "none")):
        asyncio.run(connect("nats://127.0.0.1:1"))


def test_good_files_alone_do_not_make_a_server(tmp_path: Path) -> None:
    for login in (nkey(tmp_path).login, credentials(tmp_path).login, own_certificate(tmp_path).login):
        with pytest.raises(NatsUnreachable):
            asyncio.run(connect("nats://127.0.0.1:1", login=login, wait_s=0.3))
