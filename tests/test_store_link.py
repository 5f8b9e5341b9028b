"""A store is opened as ``[store]`` says: tokens from the environment, TLS, buckets of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from nats_fixtures import ConfiguredServer
from store_servers import StoreServer, contract, server

from tickmesh.control.config import ConfigError, StoreSettings, parse_config
from tickmesh.control.store import StoreUnavailable
from tickmesh.node.store_link import NoStore, TokenMissing, open_store
from tickmesh.ops.config_store_cmd import WrongPlace, settings_of
from tickmesh.transports.nats import NatsRefused

__all__ = ["server"]


def settings(text: str) -> StoreSettings:
    return parse_config(f"[store]\n{text}").store


@contract
async def test_a_table_opens_its_store(server: StoreServer) -> None:
    process = server.process
    text = f'kind = "nats"\naddress = "{process.url}"\nbucket = "own"' if "nats" in process.url else (
        f'kind = "consul"\naddress = "127.0.0.1:{process.port}"'
    )  # fmt: skip
    async with open_store(settings(text)) as store:
        version = await store.put("a", b"1")
        async with open_store(settings(text)) as other:
            entry = await other.get("a")
        assert entry is not None
        assert entry.version == version


@contract
async def test_the_token_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ConfiguredServer(tmp_path, "authorization { token: sesame }\n") as locked:
        monkeypatch.delenv("TICKMESH_NATS_TOKEN", raising=False)
        text = f'kind = "nats"\naddress = "{locked.url}"\ntoken_env = "MY_TOKEN"'
        with pytest.raises(TokenMissing, match="MY_TOKEN"):
            async with open_store(settings(text)):
                pass
        monkeypatch.setenv("MY_TOKEN", "wrong")
        with pytest.raises(NatsRefused):
            async with open_store(settings(text)):
                pass
        monkeypatch.setenv("MY_TOKEN", "sesame")
        async with open_store(settings(text)) as store:
            await store.put("a", b"1")


@contract
async def test_consuls_files_for_tls_are_used(tmp_path: Path) -> None:
    text = f'kind = "consul"\naddress = "127.0.0.1:1"\nca_file = "{tmp_path}/absent.pem"'
    with pytest.raises(StoreUnavailable, match=r"absent\.pem"):
        async with open_store(settings(text)):
            pass
    with pytest.raises(NoStore, match="--store URL"):
        async with open_store(settings("")):
            pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kind = "consul"\naddress = "http://x:8500"', "must be HOST:PORT"),
        ('kind = "consul"\naddress = "x"', "must be HOST:PORT"),
        ('kind = "nats"\naddress = "nats://u:p@x:4222"', "holds a secret"),
        ('kind = "nats"\naddress = "x:4222"', "must be nats://HOST:PORT"),
        ('kind = "consul"\nbucket = "b"', "has no meaning for 'consul'"),
        ('address = "x:1"', "has no meaning for 'none'"),
        ('kind = "etcd"', "must be 'none', 'consul' or 'nats'"),
        ('kind = "nats"\ntoken = "x"', "secrets come from the environment"),
        ('kind = "nats"\nkey_file = "x"', "name both"),
    ],
)
def test_what_is_no_store_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="store") as caught:
        settings(text)
    assert said in str(caught.value)


def test_a_url_is_a_store() -> None:
    assert settings_of("consul://10.0.0.1") == settings('kind = "consul"\naddress = "10.0.0.1:8500"')
    assert settings_of("nats://h:4222/b") == settings('kind = "nats"\naddress = "nats://h:4222"\nbucket = "b"')
    assert settings_of("nats://h:1,nats://g:2").server == "nats://h:1,nats://g:2"
    assert settings("").server == "127.0.0.1:8500"
    for bad in ("h:4222", "nats://", "consul://h:0x", "nats://u:p@h"):
        with pytest.raises(WrongPlace):
            settings_of(bad)
