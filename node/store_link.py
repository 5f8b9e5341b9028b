"""Opening the store that a ``[store]`` table names: Consul, or a JetStream bucket."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import structlog

from tickmesh.control.config import Config, StoreSettings
from tickmesh.control.config_store import Keys
from tickmesh.control.consul_store import ConsulOptions, ConsulStore
from tickmesh.control.kv_store import KvStore
from tickmesh.control.store import Store, StoreError, VersionMismatch
from tickmesh.transports.nats import LinkError, Login, connect

CONSUL_TOKEN = "TICKMESH_CONSUL_TOKEN"
"""Environment variable of Consul's token, where ``token_env`` names no other one."""
CONSUL_FILES = ("TICKMESH_CONSUL_CA", "TICKMESH_CONSUL_CERT", "TICKMESH_CONSUL_KEY")
"""Environment variables of the files for TLS with Consul, where ``[store]`` names none."""
_log = structlog.get_logger("store")


class NoStore(Exception):
    """No store is configured."""

    def __init__(self) -> None:
        super().__init__('no store is configured: give [store] with kind = "consul" or "nats", or --store URL')


class TokenMissing(Exception):
    """The environment variable that should hold the store's token is not set.

    Attributes:
        name: of the variable.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the environment variable {name}, which [store] token_env names, is not set: put the store's token there")
        self.name = name


@asynccontextmanager
async def open_store(settings: StoreSettings, resolve: Callable[[str], Path] = Path, *, name: str = "tickmesh") -> AsyncIterator[Store]:
    """A store for as long as the context lasts, on connections of its own, for the loop that runs.

    Args:
        settings: the ``[store]`` table.
        resolve: makes paths of it files, such as :meth:`tickmesh.control.config.Config.resolve`.
        name: shown in the NATS server's list of connections.

    Raises:
        NoStore: there is none.
        TokenMissing: its token is not there.
        StoreError: it cannot be used.
        LinkError: NATS cannot be used as asked.
    """
    if settings.kind == "none":
        raise NoStore
    token = _token(settings)
    named = (settings.ca_file, settings.certificate_file, settings.key_file)
    if settings.kind == "consul" and not any(named):
        named = (os.environ.get(CONSUL_FILES[0]), os.environ.get(CONSUL_FILES[1]), os.environ.get(CONSUL_FILES[2]))
    ca, certificate, key = (resolve(path) if path else None for path in named)
    if settings.kind == "consul":
        host, _, port = settings.server.rpartition(":")
        consul = ConsulStore(ConsulOptions(host, int(port), token, ca, certificate, key))
        try:
            yield consul
        finally:
            await consul.close()
        return
    login = Login.from_environment()
    login = replace(login, ca=ca or login.ca, certificate=certificate or login.certificate, key=key or login.key)
    if settings.credentials_file:
        login = replace(login, credentials=resolve(settings.credentials_file))
    link = await connect(settings.server, name=name, login=replace(login, token=token) if token else login)
    try:
        bucket = await KvStore.open(link.client, settings.bucket, replicas=settings.replicas)
        try:
            yield bucket
        finally:
            await bucket.close()
    finally:
        await link.close()


def source_numbers(config: Config, known: Mapping[str, int], wait_s: float = 3.0) -> dict[str, int]:
    """Numbers of a configuration's sources, the same on every node of the cluster: the store keeps one for each name, for good.

    Args:
        known: numbers that are in use on this node; given to the store if it has none.
        wait_s: how long to ask the store.

    Returns:
        By name, those of the store; while it is away, the known ones.
    """
    try:
        return asyncio.run(asyncio.wait_for(_number_sources(config, known), wait_s))
    except (StoreError, LinkError, NoStore, TokenMissing, TimeoutError, OSError) as error:
        _log.warning("sources are numbered without the store", reason=str(error) or type(error).__name__)
        return {}


async def _number_sources(config: Config, known: Mapping[str, int]) -> dict[str, int]:
    key = f"{Keys(config.cluster.name).root}sources"
    async with open_store(config.store, config.resolve) as store:
        while True:
            entry = await store.get(key)
            numbers = {str(name): int(number) for name, number in json.loads(entry.value).items()} if entry else dict(known)
            before = dict(numbers) if entry else None
            for name in config.data_sources:
                numbers.setdefault(name, max(numbers.values(), default=-1) + 1)
            if numbers == before:
                return numbers
            try:
                await store.put(key, json.dumps(numbers).encode(), expected=entry.version if entry else 0)
                return numbers
            except VersionMismatch:
                continue


def _token(settings: StoreSettings) -> str | None:
    """The token; of NATS, one that :meth:`Login.from_environment` finds anyway is not looked for here."""
    if settings.token_env:
        value = os.environ.get(settings.token_env)
        if not value:
            raise TokenMissing(settings.token_env)
        return value
    return os.environ.get(CONSUL_TOKEN) or None if settings.kind == "consul" else None
