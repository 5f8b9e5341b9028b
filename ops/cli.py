"""The command line, ``tickmesh``. Each command imports what it needs when it runs, so that help and completion come at once.

Exit codes: 0 done, 1 failed (a file, a server, this host), 2 wrong usage or a refused configuration, 3 a check found something wrong,
4 a node refused it, 5 a node did not answer in time, 130 ended by Ctrl-C. Results go to standard output, everything else to standard
error. ``docs/reference/cli.md`` is what :func:`reference_markdown` gives (``tickmesh reference`` prints it); a test compares them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from tickmesh.control.config import Config

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CHECK, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
REFUSALS = (
    "tickmesh.control.config.ConfigError",
    "tickmesh.control.config_store.NoConfiguration",
    "tickmesh.control.config_store.NoSuchVersion",
    "tickmesh.control.sharding.NoSuchShard",
    "tickmesh.control.sharding.SymbolTooLong",
    "tickmesh.control.toml_text.BadKeyPath",
    "tickmesh.control.toml_text.NotEditable",
    "tickmesh.node.calculation.CalculationError",
    "tickmesh.node.calculation.PlanError",
    "tickmesh.node.decoder.MappingError",
    "tickmesh.node.fields.MappingError",
    "tickmesh.node.protocol.SpecError",
    "tickmesh.node.reader.SourceError",
    "tickmesh.node.risk.LimitError",
    "tickmesh.node.store_link.NoStore",
    "tickmesh.ops.bench.UnknownBench",
    "tickmesh.ops.capture_kind.UnknownCapture",
    "tickmesh.ops.config_store_cmd.NoSuchKey",
    "tickmesh.ops.config_store_cmd.WrongPlace",
    "tickmesh.ops.shards_cmd.NoSuchNode",
    "tickmesh.ops.shards_cmd.NoSuchShard",
    "tickmesh.ops.journal_cmd.BadRange",
    "tickmesh.ops.simulator.SimulatorConfigError",
    "tickmesh.ops.subscribe_cmd.PatternError",
    "tickmesh.transports.multicast.BadEndpoint",
    "tickmesh.transports.pacing.PaceError",
)
"""Errors that say that what was asked for is wrong (exit code 2); all others of ours mean that doing it failed (1)."""

# ---------------------------------------------------------------- errors


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and text for a person: what happened and what to do."""
    ancestry = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    if any(name in REFUSALS for name in ancestry):
        return EXIT_USAGE, str(error)
    if any(name.startswith("tickmesh.") for name in ancestry):
        return EXIT_FAILED, str(error)
    if isinstance(error, OSError) and error.filename:
        return EXIT_FAILED, f"{error.filename}: {error.strerror}; check the path and its permissions"
    if isinstance(error, OSError | MemoryError):
        return EXIT_FAILED, str(error) or "out of memory: lower [cluster] instruments_max, orders_max or ring_capacity"
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return EXIT_FAILED, f"a defect in tickmesh: {text}; run it again with TICKMESH_DEBUG=1 and report the traceback"


def _say(text: str) -> None:
    """Lines on standard error, each with our name before it."""
    for line in text.splitlines() or [""]:
        print(f"tickmesh: {line}", file=sys.stderr, flush=True)


class _Explained:
    """What a command's errors become: lines and exit codes."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing is left to be told
            raise typer.Exit(EXIT_OK) from None
        except Exception as error:
            if os.environ.get("TICKMESH_DEBUG") == "1":
                raise
            code, text = explained(error)
            _say(text)
            raise typer.Exit(code) from None


class _Command(_Explained, TyperCommand):  # type: ignore[misc]
    """A command."""


class _Group(_Explained, TyperGroup):  # type: ignore[misc]
    """A command that has others below it."""


def _finish(code: int) -> None:
    if code:
        raise typer.Exit(code)


# ---------------------------------------------------------------- the application

app = typer.Typer(
    name="tickmesh",
    help="Sharded market-data nodes: feeds to books, calculations and a NATS stream.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a check found something wrong, 4 a node refused it, "
    "5 a node did not answer in time, 130 ended by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
node_app = typer.Typer(help="Run a node.", no_args_is_help=True, rich_markup_mode=None)
config_app = typer.Typer(help="Look at configurations, and change a running cluster's.", no_args_is_help=True, rich_markup_mode=None)
journal_app = typer.Typer(help="Look into journals.", no_args_is_help=True, rich_markup_mode=None)
servers_app = typer.Typer(help="Programs of the servers that tickmesh starts itself.", no_args_is_help=True, rich_markup_mode=None)
shards_app = typer.Typer(cls=_Group, rich_markup_mode=None, invoke_without_command=True, subcommand_metavar="[COMMAND]")
app.add_typer(node_app, name="node")
app.add_typer(config_app, name="config")
app.add_typer(journal_app, name="journal")
app.add_typer(servers_app, name="servers")
app.add_typer(shards_app, name="shards")


def _shown_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        print(f"tickmesh {metadata.version('tickmesh')}")
        raise typer.Exit


def _debug(asked: bool) -> None:
    if asked:
        os.environ["TICKMESH_DEBUG"] = "1"


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_shown_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", callback=_debug, help="Show tracebacks of errors (also TICKMESH_DEBUG=1).")] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="The configuration, a TOML file.")]
ClusterName = Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Only this cluster.")]
NodeNameOption = Annotated[str | None, typer.Option("--node", metavar="NAME", help="Only this node.")]


def _load(path: Path) -> Config:
    """A configuration, checked to the last calculation."""
    from tickmesh.control.config import load_config
    from tickmesh.node.config_checks import config_checks

    return load_config(path, config_checks(path.parent))


def _progress(quiet: bool) -> Callable[[str], None] | None:
    return None if quiet else _say


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


# ---------------------------------------------------------------- running


@app.command(cls=_Command)
def up(
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More recordings, after the first one.")] = None,
    capture: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Recordings to play: --capture FILE [FILE]...")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="A configuration of one's own.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the embedded nats-server; 0: any free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the demonstration keeps its data; made anew.")] = None,
    quiet: Quiet = False,
) -> None:
    """Everything on this host: nats-server, node and feed.

    Without options a simulated market; with --capture recordings, at their own pace; with --config what that says. Ctrl-C ends it well.
    """
    captures = [*(capture or []), *(more or [])]
    if config is not None and (captures or port is not None or data_dir is not None):
        raise typer.BadParameter("a configuration names its own sources, ports and folders", param_hint="--capture, --port, --data-dir")
    _check_files(captures)
    from tickmesh.ops.up import up as start

    _finish(start(captures, config, port=port, data_dir=data_dir, progress=_progress(quiet)))


@app.command(cls=_Command)
def cluster(
    store: Annotated[str, typer.Option(metavar="nats|consul", help="A bucket on the nats-servers, or three Consul servers.")] = "nats",
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Nodes, each a process.")] = 3,
    shards: Annotated[int, typer.Option(min=1, max=64, help="Shards.")] = 4,
    replicas: Annotated[int, typer.Option(min=1, max=16, help="Nodes that hold each shard, its leader included.")] = 2,
    nats_servers: Annotated[int, typer.Option(min=1, max=3, help="nats-servers, 1 or 3; each output stream is on all of them.")] = 3,
    rate: Annotated[int, typer.Option(min=1, help="Messages per second of the simulated market.")] = 1000,
    data_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For data and logs; none: a temporary folder.")] = None,
    namespaces: Annotated[bool, typer.Option("--namespaces", help="Each node in a network namespace of its own; takes root.")] = False,
    quiet: Quiet = False,
) -> None:
    """A whole cluster on this host, to look at and to break: servers, nodes, and a market on multicast over loopback.

    It shows who leads what, and starts a node again that has been killed. Ctrl-C ends it well.
    """
    if store not in ("nats", "consul"):
        raise typer.BadParameter(f"{store!r} is neither nats nor consul", param_hint="--store")
    if nats_servers == 2:
        raise typer.BadParameter("two servers cannot do without one: give 1 or 3", param_hint="--nats-servers")
    from tickmesh.ops import cluster_cmd
    from tickmesh.ops.local_cluster import LocalClusterOptions
    from tickmesh.ops.namespaces import lacking

    if namespaces and (reason := lacking()):
        raise typer.BadParameter(reason, param_hint="--namespaces")

    with cluster_cmd.temporary_folder(data_dir) as folder:
        options = LocalClusterOptions(
            folder.absolute(),
            store="consul" if store == "consul" else "nats",
            nodes=nodes,
            shards=shards,
            replicas=replicas,
            nats_servers=nats_servers,
            stream_replicas=nats_servers,
            rate=rate,
            namespaces=namespaces,
        )
        _finish(cluster_cmd.run(options, _progress(quiet) or (lambda _: None), view=not quiet))


@node_app.command("run", cls=_Command)
def node_run(config: ConfigFile, quiet: Quiet = False) -> None:
    """Run a node until Ctrl-C or SIGTERM."""
    loaded = _load(config)
    from tickmesh.node.running import run_node
    from tickmesh.ops.up import GENERATORS, embedded_servers

    ready = None if quiet else lambda: _say("ready")
    with embedded_servers(loaded) as targets:
        _finish(run_node(loaded, progress=_progress(quiet), ready=ready, generators=GENERATORS, targets=targets))


@app.command(cls=_Command)
def replay(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings, read in this order; or the folder of one journal.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration; a journal has its own beside it.")
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="The source whose settings apply; none: the only one.")] = None,
    summary: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the summary as JSON here; -: to standard output.")] = None,
    depth: Annotated[int, typer.Option(min=0, max=1000, help="Levels of each book in the summary.")] = 10,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run recordings through a configuration, or a journal through the configurations that it names.

    At full speed and without NATS. The same inputs give the same outputs, to the bit; of a journal's, a digest is printed.
    """
    to_stdout = as_json or summary == Path("-")
    target = None if summary is None or summary == Path("-") else summary
    if target is not None:
        _check_writable(target)
    started = time.perf_counter()
    result, text = _replayed_journal(files, config, depth, quiet) if files[0].is_dir() else _replayed(files, config, source, depth, quiet)
    if target is not None:
        _write_json(target, result)
    if to_stdout:
        _print_json(result)
    else:
        print(text)
    if not quiet:
        _say(f"done in {time.perf_counter() - started:.1f} s" + (f", summary in {target}" if target else ""))


def _replayed(files: list[Path], config: Path | None, source: str | None, depth: int, quiet: bool) -> tuple[dict[str, Any], str]:
    if config is None:
        raise typer.BadParameter("recordings need a configuration", param_hint="--config")
    _check_files(files)
    from tickmesh.node.replay import replay as run

    loaded = _load(config)
    result = run(loaded, files, source, depth, _progress(quiet), folder=loaded.folder)
    return result, _replay_text(result)


def _replayed_journal(folders: list[Path], config: Path | None, depth: int, quiet: bool) -> tuple[dict[str, Any], str]:
    if len(folders) > 1 or config is not None:
        raise typer.BadParameter("a journal is replayed by itself: one folder, and no --config", param_hint="FILE")
    from tickmesh.node.journal_replay import replay_journal

    result = replay_journal(folders[0], depth, _progress(quiet))
    rows = [f"shard {result['shard']}: {result['events_total']:,} events, {result['outputs_total']:,} outputs"]
    rows += [f"configuration {v['version']} from output {v['outputs_before'] + 1:,}" for v in result["versions"]]
    rows += ["events    " + _counts_text(result["events"]), f"sha-256 of the outputs  {result['digest']}"]
    return result, "\n".join(rows)


def _check_files(files: list[Path]) -> None:
    for path in files:
        with path.open("rb"):
            pass


def _check_writable(target: Path) -> None:
    """Refuse now what could not be written after minutes of work."""
    if target.is_dir():
        raise IsADirectoryError(0, "is a folder, name a file in it", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(0, "there is no such folder", str(target.parent))
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise PermissionError(0, "cannot be written", str(target))


def _write_json(target: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _counts_text(counts: dict[str, int]) -> str:
    return "  ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _replay_text(result: dict[str, Any]) -> str:
    """A replay's summary for people; the JSON has all of it."""
    source, instruments = result["source"], result["instruments"]
    seconds = max(source["seconds"], 1e-9)
    malformed, missing = sum(result["malformed"].values()), sum(gap["last"] - gap["first"] + 1 for gap in result["gaps"])
    rows = [
        f"{source['format']}: {source['messages_total']:,} messages, {source['bytes']:,} bytes in {seconds:.3f} s"
        f" ({source['messages_total'] / seconds:,.0f} messages/s)",
        f"malformed {malformed:,}   gaps {len(result['gaps']):,} ({missing:,} missing)   duplicates {result['duplicates']:,}",
        "events    " + _counts_text(result["events"]),
        "refused   " + _counts_text(result["refused"]),
        f"{'symbol':<14}{'trades':>10}{'volume':>16}  {'bid':>14}{'ask':>14}",
    ]
    ordered = sorted(instruments.items(), key=lambda item: -item[1]["trades"])
    for symbol, about in ordered[:20]:
        bid, ask = (about["last_bbo"][0], about["last_bbo"][2]) if about["last_bbo"] else (None, None)
        rows.append(f"{symbol:<14}{about['trades']:>10,}{about['volume']:>16}  {bid or '–':>14}{ask or '–':>14}")
    if len(ordered) > 20:
        rows.append(f"… and {len(ordered) - 20} more (--json has all)")
    return "\n".join(rows)


# ---------------------------------------------------------------- delegated

_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def simulate(ctx: typer.Context) -> None:
    """Simulate a market: file, pcap or multicast."""
    from tickmesh.node.logs import set_log_level

    set_log_level("info")  # to standard error: a summary as JSON must stay one
    _finish(int(simulate_command().main(list(ctx.args), prog_name="tickmesh simulate", standalone_mode=False) or 0))


def simulate_command() -> Any:
    """The command that `simulate` hands over to, with its options."""
    from tickmesh.ops.simulate_cmd import simulate as command

    own = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    own.command("simulate", cls=_Command)(command)
    return typer.main.get_command(own)


# ---------------------------------------------------------------- configuration


@config_app.command("show", cls=_Command)
def config_show(file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOML file.")], as_json: AsJson = False) -> None:
    """The values in effect, and where each comes from."""
    config = _load(file)
    from tickmesh.ops import config_cmd

    if as_json:
        _print_json(config_cmd.show_json(config))
    else:
        _print_table(config_cmd.show_table(config))


@config_app.command("schema", cls=_Command)
def config_schema(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON Schema, for editors.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page, docs/reference/configuration.md.")] = False,
) -> None:
    """Every key: type, default, unit, bounds, meaning."""
    from tickmesh.ops import config_cmd

    if as_json and markdown:
        raise typer.BadParameter("give one of them", param_hint="--json, --markdown")
    if as_json:
        _print_json(config_cmd.json_schema())
    elif markdown:
        print(config_cmd.schema_markdown(), end="")
    else:
        _print_table(config_cmd.schema_table())


StoreUrl = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="consul://HOST:PORT or nats://HOST:PORT; none: TICKMESH_STORE, or --config's.")
]
StoreCluster = Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="The cluster; none: TICKMESH_CLUSTER, or --config's.")]
StoreFile = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="A node's own file, with [store] and the name.")]
Comment = Annotated[str, typer.Option("--comment", "-m", metavar="TEXT", help="Why, for the history.")]
Canary = Annotated[str | None, typer.Option("--canary", metavar="NODE", help="This node first; the others if it takes it.")]
Hold = Annotated[float, typer.Option("--hold-s", min=0, max=3600, help="How long the canary must do well before the others follow.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Nodes check and compile it; nothing is applied.")]
WaitFor = Annotated[list[str] | None, typer.Option("--node", metavar="NAME", help="Wait for these nodes; none: every one that runs.")]
Timeout = Annotated[float, typer.Option("--timeout-s", min=0.1, max=3600, help="How long to wait for the nodes.")]


def _wish(comment: str, canary: str | None, hold_s: float, dry_run: bool, nodes: list[str] | None, timeout_s: float) -> Any:
    from tickmesh.ops.config_store_cmd import Wish

    if canary is not None and dry_run:
        raise typer.BadParameter("a dry run applies nothing: give --node NAME for the nodes that try it", param_hint="--canary, --dry-run")
    return Wish(comment, canary, hold_s, dry_run, tuple(nodes or ()), timeout_s)


def _report(report: Any, as_json: bool, quiet: bool) -> None:
    """A change's report, advice, and the exit code."""
    if as_json:
        _print_json(report.as_json())
    else:
        print(report.text())
    if not quiet:
        if report.left_out:
            _say(f"not for the store, each node's own: {', '.join(report.left_out)}")
        if report.exit_code and report.did == "applied":
            _say(f"it is in the store all the same; to take it back: tickmesh config rollback {report.before}")
    _finish(report.exit_code)


@config_app.command("apply", cls=_Command)
def config_apply(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The whole configuration, a TOML file.")],
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    canary: Canary = None,
    hold_s: Hold = 0.0,
    dry_run: DryRun = False,
    nodes: WaitFor = None,
    comment: Comment = "",
    timeout_s: Timeout = 30.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a file the configuration of a running cluster.

    It is checked here, compared, stored in one transaction with the code that it names, and every node's answer is waited for. FILE may
    name store and cluster itself.
    """

    wish = _wish(comment, canary, hold_s, dry_run, nodes, timeout_s)
    from tickmesh.ops import config_store_cmd as commands

    loaded = _load(file)
    place = commands.place_of(store, cluster, config, loaded)
    _report(commands.run_to_its_end(commands.apply_file(file, place, wish, _say), _say), as_json, quiet)


@config_app.command("get", cls=_Command)
def config_get(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Dotted path of a key or table; none: the whole document.")] = None,
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    as_json: AsJson = False,
) -> None:
    """A running cluster's configuration, or a value of it.

    Without a key, the document as it was applied, comments included: edit it and apply it again.
    """
    import asyncio

    from tickmesh.ops import config_store_cmd as commands

    about, text = asyncio.run(commands.get(key, commands.place_of(store, cluster, config)))
    if as_json:
        _print_json(about)
    else:
        print(text.rstrip("\n"))


@config_app.command("set", cls=_Command)
def config_set(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Dotted path, such as risk.max_qty.")],
    value: Annotated[str | None, typer.Argument(metavar="[VALUE]", help="A value as TOML has it; anything else is a text.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the key or table, in place of VALUE.")] = False,
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    canary: Canary = None,
    hold_s: Hold = 0.0,
    dry_run: DryRun = False,
    nodes: WaitFor = None,
    comment: Comment = "",
    timeout_s: Timeout = 30.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Change one value of a running cluster's configuration.

    The rest of the text stays as it is, comments included. Otherwise like apply.
    """

    if remove == (value is not None):
        raise typer.BadParameter("give VALUE, or --remove", param_hint="VALUE")
    wish = _wish(comment, canary, hold_s, dry_run, nodes, timeout_s)
    from tickmesh.ops import config_store_cmd as commands

    place = commands.place_of(store, cluster, config)
    _report(commands.run_to_its_end(commands.set_key(key, value, place, wish, _say), _say), as_json, quiet)


@config_app.command("diff", cls=_Command)
def config_diff(
    first: Annotated[str, typer.Argument(metavar="FILE|VERSION", help="A file: what it would change. A version: what has changed.")],
    second: Annotated[str | None, typer.Argument(metavar="[FILE|VERSION]", help="From the first to this one.")] = None,
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    as_json: AsJson = False,
) -> None:
    """What differs, key by key, and whether it needs a restart."""
    import asyncio

    from tickmesh.ops import config_store_cmd as commands

    files = [Path(one) for one in (first, second) if one is not None and not one.isdigit()]
    place = commands.place_of(store, cluster, config, _load(files[0]) if files else None)
    found = asyncio.run(commands.compare(first, second, place, _say))
    if as_json:
        _print_json([one.as_json() for one in found])
    else:
        print("\n".join(commands.difference_lines(found)) or "  no difference")


@config_app.command("history", cls=_Command)
def config_history(
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    limit: Annotated[int, typer.Option(min=1, help="Newest versions to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Versions of the configuration: who, when, why; * is the one in the store."""
    import asyncio

    from tickmesh.ops import config_store_cmd as commands

    rows = asyncio.run(commands.history(commands.place_of(store, cluster, config), limit))
    if as_json:
        _print_json(rows)
    elif rows:
        print(commands.history_text(rows))


@config_app.command("rollback", cls=_Command)
def config_rollback(
    version: Annotated[int, typer.Argument(metavar="VERSION", help="A version of the history.")],
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    canary: Canary = None,
    hold_s: Hold = 0.0,
    dry_run: DryRun = False,
    nodes: WaitFor = None,
    comment: Comment = "",
    timeout_s: Timeout = 30.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Apply an earlier version again, under a new number."""

    wish = _wish(comment, canary, hold_s, dry_run, nodes, timeout_s)
    from tickmesh.ops import config_store_cmd as commands

    place = commands.place_of(store, cluster, config)
    _report(commands.run_to_its_end(commands.roll_back(version, place, wish, _say), _say), as_json, quiet)


@config_app.command("status", cls=_Command)
def config_status(store: StoreUrl = None, cluster: StoreCluster = None, config: StoreFile = None, as_json: AsJson = False) -> None:
    """What every node of a cluster runs, and what it refused and why."""
    import asyncio

    from tickmesh.ops import config_store_cmd as commands

    rows = asyncio.run(commands.node_statuses(commands.place_of(store, cluster, config)))
    if as_json:
        _print_json(rows)
    else:
        print(commands.node_statuses_text(rows) or "no node has followed this store")


@config_app.command("watch", cls=_Command)
def config_watch(
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Tell of every change as it is made, and of what each node makes of it, until Ctrl-C."""
    import asyncio

    from tickmesh.ops import config_store_cmd as commands

    def tell(about: dict[str, Any], text: str) -> None:
        print(json.dumps(about) if as_json else text, flush=True)

    asyncio.run(commands.follow(commands.place_of(store, cluster, config), tell, count))


def _print_table(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


# ---------------------------------------------------------------- shards

NatsUrl = Annotated[str | None, typer.Option("--server", metavar="URL", help="NATS of the heartbeats; none: the configured delivery's.")]


@shards_app.callback()
def shards(
    ctx: typer.Context,
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    server: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Who leads each shard of a cluster, and who could.

    Leases and wished moves come from the store, the rest from a fifth of a second of the nodes' heartbeats.
    """
    import asyncio

    if ctx.invoked_subcommand is not None:
        return
    from tickmesh.ops import config_store_cmd, shards_cmd

    found = asyncio.run(shards_cmd.look(config_store_cmd.place_of(store, cluster, config), server))
    if as_json:
        _print_json([one.as_json() for one in found])
    else:
        _print_table(shards_cmd.table(found))


@shards_app.command("move", cls=_Command)
def shards_move(
    shard: Annotated[int, typer.Argument(metavar="SHARD", min=0, help="Number of the shard.")],
    to: Annotated[str, typer.Option("--to", metavar="NODE", help="The node that is to lead it.")],
    wait_s: Annotated[float, typer.Option("--wait-s", min=0.1, max=3600, help="How long to wait; then the wish is withdrawn.")] = 30.0,
    store: StoreUrl = None,
    cluster: StoreCluster = None,
    config: StoreFile = None,
    server: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Have another node lead a shard.

    The leader lets it have everything first, so that nothing waits for a lease to run out. Exit code 4 if the leader withdraws the wish,
    5 if it is not done in time. Ctrl-C withdraws it.
    """
    import asyncio

    from tickmesh.ops import config_store_cmd, shards_cmd

    done = asyncio.run(shards_cmd.move(config_store_cmd.place_of(store, cluster, config), shard, to, wait_s, server))
    if as_json:
        _print_json(done.as_json())
    else:
        print(done)
    _finish(done.exit_code)


# ---------------------------------------------------------------- looking


@app.command(cls=_Command)
def status(cluster: ClusterName = None, node: NodeNameOption = None, as_json: AsJson = False) -> None:
    """Nodes of this host: counters, latencies, rings.

    Read from outside, at no cost to them. Nodes that have ended show with their last numbers.
    """
    from tickmesh.ops.status_cmd import status_command

    _finish(status_command(cluster, node, as_json=as_json))


@app.command(cls=_Command)
def top(
    cluster: ClusterName = None,
    node: NodeNameOption = None,
    interval_s: Annotated[float, typer.Option("--interval", "-i", min=0.1, max=60, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One interval, then end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per interval.")] = False,
) -> None:
    """Rates and latencies of this host's nodes, live.

    q or Ctrl-C ends it.
    """
    from tickmesh.ops.status_cmd import top_command

    _finish(top_command(cluster, node, interval_s=interval_s, once=once, as_json=as_json))


def _from_sequence(text: str | None) -> Any:
    if text in (None, "now", "all"):
        return text
    if not text.isdigit():
        raise typer.BadParameter(f"{text!r} is neither a sequence number nor now nor all", param_hint="--from")
    return int(text)


@app.command(cls=_Command)
def subscribe(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="tm.CLUSTER.KIND.SYMBOL, such as 'tm.demo.bbo.*' or 'tm.demo.>'.")],
    server: Annotated[str, typer.Option(metavar="URL", help="Address of the NATS server.")] = "nats://127.0.0.1:4222",
    start: Annotated[str | None, typer.Option("--from", metavar="SEQ|now|all", help="Read the streams, exactly once, from here.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many lines.")] = None,
    batches: Annotated[bool, typer.Option("--batches", help="Print frames of the streams instead of events.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print a cluster's outputs, live or from any place."""
    from tickmesh.ops import subscribe_cmd

    begin = _from_sequence(start)
    code = subscribe_cmd.subscribe_command(pattern, server=server, from_sequence=begin, count=count, batches=batches, as_json=as_json)
    _finish(EXIT_FAILED if code == subscribe_cmd.EXIT_SERVER else code)


@app.command(cls=_Command)
def doctor(as_json: AsJson = False) -> None:
    """What this host lacks, and what to do about it."""
    from tickmesh.ops.doctor import run

    _finish(EXIT_CHECK if run(as_json) else EXIT_OK)


@app.command(cls=_Command)
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Which; none: all. See --list.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the work: a look, not a measurement.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the benchmarks and end.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON here; -: print it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure against the alternatives, on this machine.

    Each benchmark runs us and its peer in turns and reports medians. What cannot run here is left out, with the reason.
    """
    from tickmesh.ops import bench as benches

    if listed:
        print(benches.list_text())
        return
    target = Path(json_file) if json_file not in (None, "-") else None
    if target is not None:
        _check_writable(target)
    report = benches.run_benches(names or [], quick=quick, progress=_progress(quiet))
    if target is not None:
        _write_json(target, report)
    if json_file == "-":
        _print_json(report)
    else:
        print(benches.report_text(report))
    _finish(EXIT_OK if report["rows"] else EXIT_FAILED)


# ---------------------------------------------------------------- journals

JournalFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A shard's journal.")]


@journal_app.command("show", cls=_Command)
def journal_show(
    folder: JournalFolder,
    start: Annotated[int | None, typer.Option("--from", metavar="SEQ", min=0, help="First sequence; none: the oldest kept.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many events.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print a journal's events, with their symbols."""
    from tickmesh.ops.journal_cmd import show_command

    _finish(show_command(folder, start=start, count=count, as_json=as_json))


@journal_app.command("verify", cls=_Command)
def journal_verify(folder: JournalFolder, as_json: AsJson = False) -> None:
    """Check every bit of a journal.

    Exit code 3, and the place, if it is damaged.
    """
    from tickmesh.ops.journal_cmd import verify_command

    _finish(verify_command(folder, as_json=as_json))


# ---------------------------------------------------------------- the reference page


@servers_app.command("install", cls=_Command)
def servers_install(
    programs: Annotated[list[str] | None, typer.Argument(metavar="[PROGRAM]...", help="consul, toxiproxy; none: both.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Get Consul and Toxiproxy, if this host lacks them.

    They go into the user's cache folder. Consul is Debian's package, Toxiproxy is built by Go; nothing else on the host changes.
    """
    from tickmesh.ops.servers_install import PROGRAMS, install

    unknown = [name for name in programs or [] if name not in PROGRAMS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(PROGRAMS)}", param_hint="PROGRAM")
    found = install(programs or [], _progress(quiet))
    if as_json:
        _print_json([{"name": one.name, "path": str(one.path), "installed": not one.before} for one in found])
    else:
        for one in found:
            print(f"{one.name}  {one.path}{'' if one.before else '  (installed)'}")


@app.command(hidden=True)
def reference() -> None:
    """Print the reference page of the command line, ``docs/reference/cli.md``."""
    print(reference_markdown(), end="")


def commands(prefix: str = "tickmesh", group: Any = None) -> Iterator[tuple[str, Any]]:
    """Every command with its full name, in the order of the help."""
    found: Any = group or typer.main.get_command(app)
    for name, command in found.commands.items():
        if hasattr(command, "commands"):
            if command.invoke_without_command:
                yield f"{prefix} {name}", command
            yield from commands(f"{prefix} {name}", command)
        elif not command.hidden:
            yield f"{prefix} {name}", simulate_command() if name == "simulate" else command


def reference_markdown() -> str:
    """The reference page of the command line."""
    parts = [_MARKDOWN_HEAD]
    for name, command in commands():
        visible = [param for param in command.params if param.name != "help"]
        arguments = [param for param in visible if param.param_type_name == "argument"]
        options = [param for param in visible if param.param_type_name == "option"]
        usage = " ".join([name, *(["[OPTIONS]"] if options else []), *(str(param.metavar or param.name).upper() for param in arguments)])
        parts.append(f"\n## `{name}`\n\n{cleandoc(command.help or '')}\n\n```\n{usage}\n```\n")
        parts += ["| | default | meaning |", "|---|---|---|"] if visible else []
        parts += [_markdown_row(param) for param in [*arguments, *options]]
    parts += _markdown_counters()
    return "\n".join(parts) + "\n"


def _markdown_row(param: Any) -> str:
    if param.param_type_name == "argument":
        shown, default = str(param.metavar or param.name).upper(), "" if param.required else "none"
    else:
        flag = getattr(param, "is_flag", False)
        shown = ", ".join(param.opts) + ("" if flag else f" {param.metavar or 'VALUE'}")
        default = "" if flag else "must be given" if param.required else "none" if param.default is None else f"`{param.default}`"
    return f"| `{shown.replace('|', ' or ')}` | {default} | {param.help or ''} |"


def _markdown_counters() -> Iterator[str]:
    """What `status --json` counts."""
    from tickmesh.node import telemetry

    yield _MARKDOWN_COUNTERS
    kinds: tuple[Any, ...] = (telemetry.NODE_ABOUT, telemetry.SOURCE_ABOUT, telemetry.SHARD_ABOUT, telemetry.DELIVERY_ABOUT)
    for name, about in zip(("node", "source", "shard", "delivery"), kinds):
        yield from (f"| {name} | `{counter.name.lower()}` | {text} |" for counter, text in about.items())


_MARKDOWN_COUNTERS = """
## Counters

What `status --json` gives, from the file that each node keeps, `/dev/shm/tickmesh-CLUSTER.NODE.counters`. The file describes itself (JSON
behind a 32-byte header), so that any program can read it. Latencies are histograms in ns: `receive_to_output` of a shard, from receipt
of an event to its outputs in the ring; `receive_to_stored` of a delivery, to the server's acknowledgement. Their percentiles
are within 1.6 %.

| of | counter | meaning |
|---|---|---|"""

_MARKDOWN_HEAD = """# Command line

<!-- Written by `tickmesh reference`; a test compares it with the commands. -->

Results go to standard output; progress and errors go to standard error, errors as one line each that says what to do. `--json` prints
for programs. `tickmesh --debug COMMAND …` (or `TICKMESH_DEBUG=1`) shows the traceback of an error. `tickmesh --version` prints the version,
`tickmesh --install-completion` sets up the shell's completion.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed: a file, a server or this host; `status` and `top --once`: no node lives |
| 2 | wrong usage, or a configuration is refused |
| 3 | a check found something wrong: `journal verify`, `doctor` |
| 4 | `config apply`, `set`, `rollback`: a node refused the configuration, or the canary did; `shards move`: the leader did |
| 5 | the same: a node did not answer in time |
| 130 | ended by Ctrl-C; `up`, `cluster` and `node run` stop in order and end with 0 |"""


def main() -> None:
    """Entry point of ``tickmesh``."""
    app()


if __name__ == "__main__":
    main()
