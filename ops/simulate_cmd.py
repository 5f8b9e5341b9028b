"""``tickmesh simulate``: a simulated market into a file, a pcap, onto multicast, or served over SoupBinTCP or FIX.

:func:`simulate` is the typer command; :func:`run_simulation` is what it does, for other programs. Every output of one call is made from the
same configuration by a fresh simulator, so a file, a pcap and a multicast run of one seed carry the same messages.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tickmesh.node.fix_store import StoreError
from tickmesh.ops.fix_server import FixServerOptions, factor_of, serve
from tickmesh.ops.rerequest_server import RerequestServer
from tickmesh.ops.simulated_lines import FaultConfig, LineConfig, SimulatedLines, send_lines, write_lines
from tickmesh.ops.simulator import OPEN_NS, Simulator, SimulatorConfig, SimulatorConfigError, write_itch
from tickmesh.ops.soupbintcp_server import ServerOptions, SoupBinTcpServer, feed_log
from tickmesh.transports.multicast import MulticastError
from tickmesh.transports.pacing import PaceError

EXIT_FAILED, EXIT_USAGE = 1, 2
PASSWORD = "TICKMESH_SIMULATE_PASSWORD"
"""Environment variable with the password that clients of SoupBinTCP and FIX must give."""
_SERVE_LOOK_S = 0.2
_SERVED_ON_S = 2.0
"""Requests are answered for so long after the end."""
DEFAULT_A, DEFAULT_B = "udp://239.1.1.1:26400", "udp://239.1.1.2:26400"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a simulation goes; at least one must be named."""

    file: Path | None = None
    pcap: Path | None = None
    multicast: tuple[str, ...] = ()
    """Endpoints, one per line, A first."""
    interface: str | None = "lo"
    ttl: int = 1
    speed: str = "realtime"
    rerequest: str | None = None
    """Where requests for lost messages are answered while multicast is sent."""
    lines: LineConfig = field(default_factory=LineConfig)
    soupbintcp: ServerOptions | None = None
    fix: FixServerOptions | None = None


def run_simulation(
    config: SimulatorConfig,
    outputs: Outputs,
    *,
    stop: threading.Event | None = None,
    progress: Callable[[int], None] | None = None,
    listening: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Make every output; returns the summary that ``--json`` prints. A server comes last, and serves until it is stopped.

    Args:
        stop: ends multicast and the server early.
        progress: told the number of messages so far.
        listening: told the server's address.

    Raises:
        SimulatorConfigError: nothing to write to, or a setting is wrong.
        MulticastError, PaceError, StoreError, OSError: an output cannot be used.
    """
    if not (outputs.file or outputs.pcap or outputs.multicast or outputs.soupbintcp or outputs.fix):
        raise SimulatorConfigError("output", None, "at least one of --file, --pcap, --multicast, --soupbintcp and --fix")
    if outputs.soupbintcp and outputs.fix:
        raise SimulatorConfigError("fix", outputs.fix.port, "one server at a time: --soupbintcp or --fix")
    if outputs.fix:
        factor_of(outputs.speed)
    summary: dict[str, Any] = {"seed": config.seed, "rate": config.rate}
    if outputs.file:
        written = write_itch(outputs.file, config, progress)
        summary |= _summary(written.simulator, written.sha256) | {"file": {"path": str(outputs.file), "bytes": written.bytes}}
    if outputs.pcap:
        lines = SimulatedLines(Simulator(config), outputs.lines)
        endpoints = outputs.multicast or (DEFAULT_A, DEFAULT_B)[: len(outputs.lines.faults)]
        datagrams = write_lines(outputs.pcap, lines, endpoints, progress)
        summary |= _summary(lines.simulator, lines.sha256) | {"pcap": {"path": str(outputs.pcap), "datagrams": datagrams} | _lines(lines)}
    if outputs.multicast:
        lines = SimulatedLines(Simulator(config), outputs.lines)
        with suppress(KeyboardInterrupt), ExitStack() as serving:
            server = serving.enter_context(RerequestServer(outputs.rerequest)) if outputs.rerequest else None
            send_lines(
                lines, outputs.multicast, interface=outputs.interface, ttl=outputs.ttl, speed=outputs.speed, stop=stop, progress=progress,
                keep=server.keep if server else None,
            )  # fmt: skip
            if server:
                (stop or threading.Event()).wait(_SERVED_ON_S)
                summary["rerequest"] = {"endpoint": server.endpoint, "requests": server.requests, "answered": server.answered}
        summary |= _summary(lines.simulator, lines.sha256)
        summary["multicast"] = {"endpoints": list(outputs.multicast), "datagrams": lines.datagrams_sent} | _lines(lines)
    if outputs.soupbintcp is not None:
        summary |= _serve(config, outputs.soupbintcp, outputs.speed, stop or threading.Event(), progress, listening)
    if outputs.fix is not None:
        summary |= _serve_fix(config, outputs.fix, outputs.speed, stop or threading.Event(), progress, listening)
    return summary


def _serve_fix(
    config: SimulatorConfig,
    options: FixServerOptions,
    speed: str,
    stop: threading.Event,
    progress: Callable[[int], None] | None,
    listening: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Serve the day over FIX while somebody is subscribed, until `stop` or Ctrl-C."""
    served = asyncio.run(serve(config, options, speed, stop, progress, listening))
    return _summary(served.market.simulator, served.market.sha256) | {"fix": served.counts}


def _serve(
    config: SimulatorConfig,
    options: ServerOptions,
    speed: str,
    stop: threading.Event,
    progress: Callable[[int], None] | None,
    listening: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Serve the day over SoupBinTCP, also after its end, until `stop` or Ctrl-C."""
    simulator = Simulator(config)
    with SoupBinTcpServer(options) as server:
        if listening:
            listening(f"tcp://{options.host}:{server.port}")
        with suppress(KeyboardInterrupt):
            for messages in feed_log(simulator, server.log, speed, stop):
                if progress:
                    progress(messages)
            server.end()
            while not stop.wait(_SERVE_LOOK_S):
                pass
        served = {"endpoint": f"tcp://{options.host}:{server.port}", "logins": server.logins, "refused": server.refused}
        return _summary(simulator, server.log.sha256) | {"soupbintcp": served | {"disconnects": server.disconnects}}


def _summary(simulator: Simulator, sha256: str) -> dict[str, Any]:
    return {
        "messages": simulator.messages,
        "by_type": simulator.counts(),
        "sha256": sha256,
        "simulated_seconds": round((simulator.time_ns - OPEN_NS) / 1e9, 9),
        "complete": simulator.finished,
        "symbols": simulator.truth(),
    }


def _lines(lines: SimulatedLines) -> dict[str, Any]:
    return {"lines": [vars(counts) for counts in lines.counts()]}


# ---------------------------------------------------------------- the command


def simulate(
    seed: Annotated[int, typer.Option(help="Same seed and options, same bytes.")] = 1,
    symbols: Annotated[int, typer.Option(help="Instruments, 1 to 8000.")] = 8,
    rate: Annotated[int, typer.Option(help="Mean messages per simulated second.")] = 5000,
    messages: Annotated[int | None, typer.Option(help="Length of the day in messages, exactly.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Trading time in simulated seconds.")] = None,
    file: Annotated[Path | None, typer.Option(help="Write an ITCH 5.0 BinaryFILE file.")] = None,
    pcap: Annotated[Path | None, typer.Option(help="Write the datagrams of every line to a pcap file.")] = None,
    multicast: Annotated[str | None, typer.Option(help=f"Send MoldUDP64 to line A, such as {DEFAULT_A}.")] = None,
    multicast_b: Annotated[str | None, typer.Option(help=f"Send line B too, such as {DEFAULT_B}.")] = None,
    interface: Annotated[str, typer.Option(help="Interface that multicast leaves by.")] = "lo",
    ttl: Annotated[int, typer.Option(help="Multicast hops allowed.")] = 1,
    soupbintcp: Annotated[int | None, typer.Option(help="Serve it over SoupBinTCP at this port; 0: any free one.")] = None,
    fix: Annotated[int | None, typer.Option(help="Serve books and trades over FIX 4.4 at this port; 0: any free one.")] = None,
    fix_client: Annotated[list[str] | None, typer.Option(help="CompID of a client that may log on; CLIENT by default. Repeatable.")] = None,
    fix_store: Annotated[
        Path | None, typer.Option(help="Folder for the sequences and messages of FIX sessions; none: they begin anew with the program.")
    ] = None,
    listen: Annotated[str, typer.Option(help="Address that the server listens at.")] = "127.0.0.1",
    user: Annotated[
        str | None, typer.Option(help=f"User that a login or logon must name, with the password in {PASSWORD}; none: any.")
    ] = None,
    disconnects: Annotated[int, typer.Option(help="Break each connection off after so many messages in the mean; 0: never.")] = 0,
    loss_a: Annotated[float, typer.Option(help="Share of datagrams lost on line A, 0 to 0.9.")] = 0.0,
    loss_b: Annotated[float, typer.Option(help="Share of datagrams lost on line B.")] = 0.0,
    duplicate: Annotated[float, typer.Option(help="Share of datagrams sent twice, on each line.")] = 0.0,
    reorder: Annotated[float, typer.Option(help="Share of datagrams that come late, on each line.")] = 0.0,
    rerequest: Annotated[
        str | None, typer.Option(help="Answer MoldUDP64 requests for lost messages at udp://ADDRESS:PORT, until 2 s after the end.")
    ] = None,
    session: Annotated[str, typer.Option(help="Session name, up to 10 characters; with FIX the CompID.")] = "TICKMESH",
    mtu: Annotated[int, typer.Option(help="Largest IP packet in bytes.")] = 1500,
    speed: Annotated[str, typer.Option(help="realtime, a factor of it, or max (not with FIX).")] = "realtime",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Simulate a market: seeded order flow against a matching engine, as ITCH 5.0 in a file, a pcap, on multicast or SoupBinTCP, or as FIX.

    Exit codes: 0 done (also after Ctrl-C), 1 an output cannot be used, 2 an option is wrong.
    """
    try:
        config = SimulatorConfig(seed=seed, symbols=symbols, rate=rate, messages=messages, seconds=seconds)
        endpoints = tuple(text for text in (multicast, multicast_b) if text)
        if multicast_b and not multicast:
            raise SimulatorConfigError("multicast_b", multicast_b, "line A too (--multicast)")
        if rerequest and not multicast:
            raise SimulatorConfigError("rerequest", rerequest, "lines to lose messages on (--multicast)")
        two_lines = bool(multicast_b) or (pcap is not None and not multicast)
        faults = tuple(FaultConfig(loss=loss, duplicate=duplicate, reorder=reorder) for loss in (loss_a, loss_b)[: 1 + two_lines])
        lines = LineConfig(session=session, mtu_bytes=mtu, faults=faults)
        served = _server_options(soupbintcp, listen, session, user, disconnects, seed)
        fix_served = _fix_options(fix, listen, session, fix_client, user, fix_store)
        outputs = Outputs(
            file=file, pcap=pcap, multicast=endpoints, interface=interface, ttl=ttl, speed=speed, rerequest=rerequest, lines=lines,
            soupbintcp=served, fix=fix_served,
        )  # fmt: skip
        with _shown(config, quiet=as_json) as progress:
            summary = run_simulation(config, outputs, progress=progress, listening=lambda at: typer.echo(f"serving at {at}", err=True))
    except (SimulatorConfigError, PaceError) as error:
        _fail(str(error), EXIT_USAGE)
    except ValueError as error:
        _fail(f"simulate: {error}", EXIT_USAGE)
    except (MulticastError, StoreError) as error:
        _fail(f"simulate: {error}", EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            port = soupbintcp if fix is None else fix
            _fail(f"simulate: cannot listen at {listen}:{port} ({error.strerror}); choose another port or address", EXIT_FAILED)
        _fail(f"simulate: cannot write {error.filename}: {error.strerror}; choose another path or make it writable", EXIT_FAILED)
    else:
        typer.echo(json.dumps(summary, indent=2) if as_json else summary_text(summary))


def _server_options(port: int | None, host: str, session: str, user: str | None, disconnects: int, seed: int) -> ServerOptions | None:
    if port is None:
        return None
    _check_port("soupbintcp", port)
    if disconnects < 0:
        raise SimulatorConfigError("disconnects", disconnects, "0 or more messages")
    password = _password(user)
    return ServerOptions(host=host, port=port, session=session, user=user, password=password, disconnect_every=disconnects, seed=seed)


def _fix_options(
    port: int | None, host: str, session: str, clients: list[str] | None, user: str | None, store: Path | None
) -> FixServerOptions | None:
    if port is None:
        if clients or store:
            raise SimulatorConfigError("fix", None, "a port for FIX sessions (--fix)")
        return None
    _check_port("fix", port)
    own = {"clients": tuple(clients)} if clients else {}
    return FixServerOptions(host=host, port=port, sender=session, user=user, password=_password(user), store=store, **own)


def _check_port(name: str, port: int) -> None:
    if not 0 <= port <= 65_535:
        raise SimulatorConfigError(name, port, "a port from 0 to 65535")


def _password(user: str | None) -> str | None:
    password = os.environ.get(PASSWORD)
    if user is not None and not password:
        raise SimulatorConfigError("user", user, f"its password too, in the environment variable {PASSWORD}")
    return password


def _fail(message: str, code: int) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(code)


@contextmanager
def _shown(config: SimulatorConfig, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A progress line on stderr where somebody looks at it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.completed:,.0f} messages"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=config.messages)
        yield lambda messages: shown.update(task, completed=messages)


def summary_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    types = "  ".join(f"{kind} {count:,}" for kind, count in summary["by_type"].items())
    rows = [
        f"{summary['messages']:,} messages, {summary['simulated_seconds']:.3f} simulated seconds after the open"
        + ("" if summary["complete"] else " (stopped before the end of the day)"),
        f"by type  {types}",
        f"sha256   {summary['sha256']}",
    ]
    for name in ("file", "pcap", "multicast", "rerequest", "soupbintcp", "fix"):
        if name in summary:
            rows.append(f"{name:<8} " + ", ".join(f"{k} {v}" for k, v in summary[name].items() if k != "lines"))
            rows += [f"  line {'ABCDEFGH'[k]}: " + ", ".join(f"{word} {n:,}" for word, n in line.items())
                     for k, line in enumerate(summary[name].get("lines", ()))]  # fmt: skip
    rows.append(f"{'symbol':<8}{'bid':>12}{'ask':>12}{'last':>12}{'trades':>10}{'volume':>14}{'orders':>8}  status")
    for symbol, truth in list(summary["symbols"].items())[:20]:
        bid, ask = (_price_text(truth[side][0][0] if truth[side] else None) for side in ("bids", "asks"))
        counts = f"{truth['trades']:>10,}{truth['volume']:>14,}{truth['orders']:>8,}  {truth['status']}"
        rows.append(f"{symbol:<8}{bid:>12}{ask:>12}{_price_text(truth['last']):>12}{counts}")
    if len(summary["symbols"]) > 20:
        rows.append(f"… and {len(summary['symbols']) - 20} more (--json has all)")
    return "\n".join(rows)


def _price_text(price: int | None) -> str:
    return "–" if price is None else f"{price // 10_000}.{price % 10_000 // 100:02d}"
