"""The configuration in the store, followed by nodes: applied, refused, edited by hand, tried on one node, lost and found again.

On real Consul and real nats-server; the nodes are real followers with the real checks."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from following import CODE, TEXT, Node, applied, documents, edit, following, registered
from store_servers import KvServer, StoreServer, contract, own_server, server

from tickmesh.control.config import ConfigError
from tickmesh.control.config_store import (
    CODE_FOLDERS_MAX,
    HISTORY_MAX,
    Change,
    ConfigChanged,
    ConfigStore,
    Documents,
    HistoryEntry,
    NoSuchVersion,
    own_of,
    write_code,
)
from tickmesh.control.follower import FollowerThread
from tickmesh.control.rollout import Answer, Rollout, statuses
from tickmesh.control.store import VALUE_BYTES_MAX, StoreError, ValueTooLarge

__all__ = ["own_server", "server"]


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> str:
    return "".join(c for c in request.node.name if c.isalnum())[-32:]


# ---------------------------------------------------------------- the documents


@contract
async def test_what_is_applied_is_read_again_with_its_comments(server: StoreServer, cluster: str) -> None:
    async with server.store() as store:
        config = ConfigStore(store, cluster)
        assert (await config.read()).version == 0
        first = await applied(config, comment="the first")
        stored = await config.read()
        assert stored.version == first
        assert stored.change is not None
        assert (stored.change.comment, stored.problems) == ("the first", ())
        assert stored.documents == documents()
        assert "max_qty = 5   # for now" in stored.documents.sections["risk"]
        assert stored.documents.sections["journal"] == ""
        assert stored.documents.parse(own_of(cluster)).processing.calculations["fast"].parameters == {"window": 10}
        assert "# of the whole cluster" in stored.documents.text()
        second = await applied(config, TEXT.replace("window = 10", "window = 20"))
        assert second > first
        assert [entry.version for entry in await config.history()] == [first, second]
        assert (await config.version(first)).documents == documents()
        with pytest.raises(NoSuchVersion, match="tickmesh config history"):
            await config.version(first + 100_000)


@contract
async def test_of_two_changes_of_one_version_one_is_refused(server: StoreServer, cluster: str) -> None:
    async with server.store() as one, server.store() as other:
        a, b = ConfigStore(one, cluster), ConfigStore(other, cluster)
        await applied(a)
        for _ in range(5):
            seen = await a.read()
            tries = (c.apply(documents(TEXT.replace("10", str(n))), seen, who=f"n{n}") for n, c in ((1, a), (2, b)))
            results = await asyncio.gather(*tries, return_exceptions=True)
            lost = [result for result in results if isinstance(result, ConfigChanged)]
            assert len(lost) == 1
            assert lost[0].change is not None
            assert lost[0].change.who in ("n1", "n2")
            assert "nothing was done" in str(lost[0])
        await edit(server, a.keys.section("risk"), b"max_qty = 77")
        with pytest.raises(ConfigChanged, match="by hand"):
            await a.apply(documents(), seen)


@contract
async def test_only_what_differs_is_written_and_all_has_to_be_as_it_was(server: StoreServer, cluster: str) -> None:
    async with server.store() as store:
        config = ConfigStore(store, cluster)
        await applied(config)
        before = await config.read()
        await config.apply(before.documents.with_section("risk", "max_qty = 5"), before)
        after = await config.read()
        differ = {key for key, version in after.versions.items() if before.versions[key] != version}
        assert differ == {config.keys.section("risk"), config.keys.changed}
        assert after.change is not None
        await edit(server, config.keys.section("logging"), b'level = "debug"')  # a section that the change below leaves alone
        with pytest.raises(ConfigChanged, match="by hand"):
            await config.apply(after.documents.with_section("risk", "max_qty = 6"), after)
        await edit(server, config.keys.section("logging"), None)
        with pytest.raises(ConfigChanged):
            await config.apply(after.documents.with_section("risk", "max_qty = 6"), after)
        seen = await config.read()
        with pytest.raises(ConfigChanged):  # read so long ago that the store may have forgotten what was removed since
            await config.apply(after.documents.with_section("risk", "max_qty = 6"), replace(after, read_s=after.read_s - 3600))
        await config.apply(after.documents.with_section("risk", "max_qty = 7"), seen)
        assert (await config.read()).documents.sections["risk"] == "max_qty = 7"


@contract
async def test_of_changes_of_two_sections_at_once_one_is_refused(server: StoreServer, cluster: str) -> None:
    async with server.store() as one, server.store() as other:
        a, b = ConfigStore(one, cluster), ConfigStore(other, cluster)
        await applied(a)
        for number in range(5):
            seen = await a.read()
            wishes = ((a, "risk", f"max_qty = {number}"), (b, "logging", f'level = "{"info" if number % 2 else "debug"}"'))
            tries = (c.apply(seen.documents.with_section(section, text), seen) for c, section, text in wishes)
            results = await asyncio.gather(*tries, return_exceptions=True)
            assert [type(result) for result in results].count(ConfigChanged) == 1


@contract
async def test_history_keeps_the_newest(server: StoreServer, cluster: str) -> None:
    async with server.store() as store:
        config = ConfigStore(store, cluster)
        for number in range(1, HISTORY_MAX + 101):
            await config.remember(HistoryEntry(number, Change("me", "now", str(number)), Documents({"risk": f"max_qty = {number}"})))
        kept = [entry.version for entry in await config.history()]
        assert HISTORY_MAX <= len(kept) < HISTORY_MAX + 100
        assert kept == list(range(HISTORY_MAX + 101 - len(kept), HISTORY_MAX + 101))
        await config.prune()
        assert len(await config.history()) == HISTORY_MAX
        assert not await config.remember(HistoryEntry(150, Change("other", "later"), Documents({})))
        assert (await config.version(150)).change.comment == "150"


@contract
async def test_a_configuration_that_no_value_holds_is_refused(server: StoreServer, cluster: str) -> None:
    async with server.store() as store:
        config = ConfigStore(store, cluster)
        large = documents().with_section("logging", "# " + "x" * VALUE_BYTES_MAX)
        with pytest.raises(ValueTooLarge):
            await config.apply(large, await config.read())
        assert (await config.read()).version == 0


# ---------------------------------------------------------------- following


@contract
async def test_a_change_reaches_every_node_and_they_say_so(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    nodes = [Node(cluster, name, tmp_path) for name in ("a", "b", "c")]
    async with server.store() as store, following(store, *nodes):
        await registered(store, cluster, 3)
        told: list[Answer] = []
        config = ConfigStore(store, cluster)
        rollout = Rollout(config, 20, told.append)
        assert nodes[0].status["state"] == "waiting"
        outcome = await rollout.apply(documents(), await config.read())
        assert [(answer.node, answer.state) for answer in outcome.answers] == [("a", "applied"), ("b", "applied"), ("c", "applied")]
        assert sorted(answer.node for answer in told) == ["a", "b", "c"]
        for node in nodes:
            version, given = node.applied[-1]
            assert version == outcome.version
            assert (given.cluster.name, given.cluster.node, given.risk.max_qty) == (cluster, node.name, 5)
        said = statuses(await store.list(config.keys.status()))["a"]
        assert (said["version"], said["digest"], said["state"]) == (outcome.version, documents().digest, "running")
        assert said["leads"] == [0]
        assert said["store"]["stale"] is False


@contract
async def test_no_node_sees_half_a_change(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    nodes = [Node(cluster, name, tmp_path) for name in ("a", "b")]
    async with server.store() as store, server.store() as writer, following(store, *nodes):
        config = ConfigStore(writer, cluster)
        for number in range(2, 42):
            last = await applied(config, TEXT.replace("window = 10", f"window = {number}").replace("max_qty = 5", f"max_qty = {number}"))
        for node in nodes:
            await node.runs(last)
            versions = [version for version, _ in node.applied]
            assert versions == sorted(set(versions))
            for _, given in node.applied:
                assert given.risk.max_qty == given.processing.calculations["fast"].parameters["window"]
        known = [entry.version for entry in await config.history()]
        assert {version for node in nodes for version, _ in node.applied} <= set(known)


@contract
async def test_what_a_node_cannot_do_is_refused_with_the_reason(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    good, stubborn = Node(cluster, "good", tmp_path), Node(cluster, "stubborn", tmp_path)
    stubborn.refuses = lambda config: ["cluster.shards needs a restart"] if config.cluster.shards != 2 else []
    async with server.store() as store, following(store, good, stubborn):
        await registered(store, cluster, 2)
        config = ConfigStore(store, cluster)
        rollout = Rollout(config, 20)
        first = (await rollout.apply(documents(), await config.read())).version
        outcome = await rollout.apply(documents(TEXT.replace("shards = 2", "shards = 3")), await config.read())
        answers = {answer.node: answer for answer in outcome.answers}
        assert answers["good"].state == "applied"
        assert (answers["stubborn"].state, answers["stubborn"].reasons) == ("refused", ("cluster.shards needs a restart",))
        assert stubborn.status["version"] == first
        assert stubborn.status["refused"]["version"] == outcome.version
        back = await rollout.apply((await config.version(first)).documents, await config.read(), "back")
        assert all(answer.state == "applied" for answer in back.answers)
        assert stubborn.status["refused"] is None


@contract
async def test_an_exception_in_a_node_is_a_refusal(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)

    def broken(config: object) -> list[str]:
        raise OSError("no space left")

    node.refuses = broken
    async with server.store() as store, following(store, node):
        await applied(ConfigStore(store, cluster))
        assert await node.refused() == ["no space left"]
        assert node.status["state"] == "waiting"
        node.refuses = lambda config: ()
        await node.runs(await applied(ConfigStore(store, cluster)))


@contract
async def test_a_node_that_does_not_answer_is_named(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "slow", tmp_path)
    node.gate.clear()
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        outcome = await Rollout(config, 1.0).apply(documents(), await config.read(), nodes=["slow", "absent"])
        assert [(answer.node, answer.state) for answer in outcome.answers] == [("absent", "unanswered"), ("slow", "unanswered")]
        assert "does not follow" in outcome.answers[0].reasons[0]
        assert "still applying" in outcome.answers[1].reasons[0]
        node.gate.set()
        await node.runs(outcome.version)


# ---------------------------------------------------------------- by hand


@contract
async def test_an_edit_by_hand_works_like_the_command(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        first = await applied(config)
        await node.runs(first)
        await edit(server, config.keys.section("risk"), b"max_qty = 6\nkill_switch = true\n")
        await node.until(lambda status: status["version"] > first)
        assert node.applied[-1][1].risk.kill_switch is True
        async with asyncio.timeout(20):
            while len(history := await config.history()) < 2:
                await asyncio.sleep(0.02)
        assert (history[1].version, history[1].change.who) == (node.status["version"], "by hand")
        assert history[1].documents.sections["risk"] == "max_qty = 6\nkill_switch = true\n"
        stored = await config.read()
        assert (stored.change, stored.version) == (None, history[1].version)


BAD_EDITS = [
    ("risk", b"max_qty = ", "config/risk:1: is not TOML"),
    ("risk", b"# limits\nmax_qty = -1", "config/risk:2: risk.max_qty = -1"),
    ("risk", b"\n\nmax_qyt = 1", "config/risk:3: risk.max_qyt"),
    ("risk", b"\xff\xfe", "config/risk: is not UTF-8 text"),
    ("risk", None, "config/risk: is missing (put the key back, or make it empty)"),
    ("rsik", b"max_qty = 1", "config/rsik: is no section (did you mean 'risk'?"),
    ("processing", b'[calculations.fast]\nuse = "emma"', "config/processing:2: processing.calculations.fast.use"),
    ("processing", b'[calculations.fast]\nuse = "x.py:flow"', "there is no file"),
    ("cluster", b'node = "z"', "config/cluster:1: cluster.node = 'z': is each node's own"),
    ("cluster", b'name = "other"', "is another cluster's name"),
    ("code/../../x.py", b"", "is no file name"),
]


@contract
async def test_a_bad_edit_is_refused_and_the_last_good_one_goes_on(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        for section, value, reason in BAD_EDITS:
            if ".." in section and not isinstance(server, KvServer):
                continue  # Consul's HTTP interface resolves it
            good = await applied(config)
            await node.runs(good)
            await edit(server, config.keys.section(section), value)
            reasons = await node.refused()
            assert reason in reasons[0], (section, value)
            assert len(reasons) == 1
            assert (node.status["version"], node.status["state"]) == (good, "running")
            assert node.applied[-1][0] == good
        await node.runs(await applied(config))
        assert node.status["refused"] is None


@contract
async def test_all_that_is_wrong_is_said_at_once(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        bad = documents().with_section("risk", "max_qty = 0\nmax_rate = 0\n").with_section("logging", 'level = "loud"')
        await config.apply(bad, await config.read())
        reasons = await node.refused()
        assert len(reasons) == 3
        assert "did you mean" in "".join(reasons) or "must be" in reasons[2]


@contract
async def test_an_edit_that_is_taken_back_is_forgotten(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        await node.runs(await applied(config))
        await edit(server, config.keys.section("nonsense"), b"x = 1")
        await node.refused()
        await edit(server, config.keys.section("nonsense"), None)
        await node.until(lambda status: status["refused"] is None)


@contract
async def test_a_node_that_starts_late_misses_what_others_had(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    async with server.store() as store:
        config = ConfigStore(store, cluster)
        good = await applied(config)
        await edit(server, config.keys.section("risk"), None)
        late = Node(cluster, "late", tmp_path)
        async with following(store, late):
            assert "is missing" in (await late.refused())[0]
            assert late.applied == []
        again = Node(cluster, "again", tmp_path, running=(good, documents()))
        async with following(store, again):
            assert "is missing" in (await again.refused())[0]
            assert (again.status["version"], again.status["state"]) == (good, "running")


@contract
async def test_an_edit_in_two_steps_is_refused_until_it_is_whole(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        good = await applied(config)
        await node.runs(good)
        await edit(server, config.keys.section("processing"), b'[calculations.mine]\nuse = "mine.py:flow"')
        assert "there is no file" in (await node.refused())[0]
        assert node.status["version"] == good
        await edit(server, config.keys.code("mine.py"), CODE.encode())
        await node.until(lambda status: status["refused"] is None)
        assert list(node.applied[-1][1].processing.calculations) == ["mine"]


# ---------------------------------------------------------------- code


@contract
async def test_code_goes_with_the_configuration(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    text = TEXT + '[processing.calculations.mine]\nuse = "mine.py:flow"\nscale = 2.0\n'
    node = Node(cluster, "a", tmp_path / "nodes")
    async with server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        await node.runs(await config.apply(documents(text, folder=tmp_path), await config.read()))
        folder = node.applied[-1][1].code_folder
        assert (folder / "mine.py").read_text() == CODE
        assert folder.is_relative_to(tmp_path / "nodes" / "a")
        await edit(server, config.keys.code("mine.py"), CODE.replace("def flow", "def flaw").encode())
        assert "flow" in "\n".join(await node.refused())
        await edit(server, config.keys.code("mine.py"), CODE.replace("total", "sum").encode())
        await node.until(lambda status: status["refused"] is None)
        assert node.applied[-1][1].code_folder != folder
        await node.runs(await applied(config))
        assert (await config.read()).documents.code == {}


def test_code_folders_are_bounded_and_stay_inside(tmp_path: Path) -> None:
    kept = write_code(tmp_path, Documents({}, {"deep/a.py": "first"}))
    for number in range(CODE_FOLDERS_MAX + 5):
        write_code(tmp_path, Documents({}, {"a.py": str(number)}))
        assert write_code(tmp_path, Documents({}, {"deep/a.py": "first"})) == kept
    assert len(list(tmp_path.iterdir())) == CODE_FOLDERS_MAX
    assert (kept / "deep" / "a.py").read_text() == "first"
    for name in ("../x.py", "/x.py", "a/../../x.py", "", "."):
        with pytest.raises(ConfigError, match="no file name"):
            write_code(tmp_path / "inside", Documents({}, {name: "x"}))
    assert not (tmp_path / "x.py").exists()
    assert list((tmp_path / "inside").iterdir()) == []


# ---------------------------------------------------------------- one node first


@contract
async def test_a_canary_goes_first_then_all(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    bird, other = Node(cluster, "bird", tmp_path), Node(cluster, "other", tmp_path)
    async with server.store() as store, following(store, bird, other):
        await registered(store, cluster, 2)
        config = ConfigStore(store, cluster)
        rollout = Rollout(config, 20)
        await rollout.apply(documents(), await config.read())
        order: list[str] = []
        for node in (bird, other):
            node.refuses = lambda config, name=node.name: order.append(name) or []  # type: ignore[misc]
        new = documents(TEXT.replace("window = 10", "window = 11"))
        outcome = await rollout.canary("bird", new, await config.read(), hold_s=0.3)
        assert [(answer.node, answer.state) for answer in outcome.answers] == [("bird", "applied"), ("other", "applied")]
        assert order[0] == "bird"
        assert order.count("other") == 1
        windows = [given.processing.calculations["fast"].parameters["window"] for _, given in bird.applied]
        assert windows == sorted(windows), "the canary never went back"
        await bird.until(lambda status: status["canary"] is None)
        assert (bird.status["version"], bird.status["source"]) == (outcome.version, "config")
        assert await store.list(config.keys.canary()) == {}


@contract
async def test_a_canary_that_refuses_is_withdrawn(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    bird, other = Node(cluster, "bird", tmp_path), Node(cluster, "other", tmp_path)
    bird.refuses = lambda config: ["it tastes bad"] if config.risk.max_qty == 6 else []
    async with server.store() as store, following(store, bird, other):
        await registered(store, cluster, 2)
        config = ConfigStore(store, cluster)
        rollout = Rollout(config, 20)
        first = (await rollout.apply(documents(), await config.read())).version
        bad = documents(TEXT.replace("max_qty = 5", "max_qty = 6"))
        outcome = await rollout.canary("bird", bad, await config.read())
        assert (outcome.version, outcome.withdrawn) == (0, ("bird",))
        assert [(answer.state, answer.reasons) for answer in outcome.answers] == [("refused", ("it tastes bad",))]
        assert (await config.read()).version == first
        assert [given.risk.max_qty for _, given in other.applied] == [5]
        assert bird.status["version"] == first
        assert await store.list(config.keys.canary()) == {}
        absent = await Rollout(config, 0.5).canary("nobody", documents(), await config.read())
        assert absent.answers[0].state == "unanswered"
        assert await store.list(config.keys.canary()) == {}


@contract
async def test_a_canary_that_is_called_off_at_any_moment_leaves_nothing(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    bird, rng = Node(cluster, "bird", tmp_path), random.Random(5)
    async with server.store() as store, following(store, bird):
        await registered(store, cluster, 1)
        config = ConfigStore(store, cluster)
        first = await applied(config)
        for number in range(12):
            new = documents(TEXT.replace("max_qty = 5", f"max_qty = {6 + number}"))
            task = asyncio.create_task(Rollout(config, 20).canary("bird", new, first_read := await config.read(), hold_s=60))
            await asyncio.sleep(rng.random() * 0.03)
            task.cancel()
            await asyncio.wait({task}, timeout=30)
            assert task.cancelled(), "one cancellation is enough"
            assert await store.list(config.keys.canary()) == {}
            assert (first_read.version, (await config.read()).version) == (first, first)
        await bird.until(lambda status: (status["source"], status["version"], status["canary"]) == ("config", first, None))


@contract
async def test_a_store_that_goes_before_a_canary_is_withdrawn_hides_nothing(own_server: StoreServer, cluster: str, tmp_path: Path) -> None:
    bird = Node(cluster, "bird", tmp_path)
    bird.refuses = lambda config: ["it tastes bad"] if config.risk.max_qty == 6 else []
    async with own_server.store() as store, following(store, bird):
        await registered(store, cluster, 1)
        config = ConfigStore(store, cluster)
        await bird.runs(await applied(config))
        bad, read = documents(TEXT.replace("max_qty = 5", "max_qty = 6")), await config.read()
        outcome = await Rollout(config, 20, lambda _: own_server.process.kill()).canary("bird", bad, read)
        assert [(answer.state, answer.reasons) for answer in outcome.answers] == [("refused", ("it tastes bad",))]
        assert (outcome.version, list(outcome.withdrawn), list(outcome.left)) == (0, [], [config.keys.canary("bird")])
        assert outcome.left[config.keys.canary("bird")]


@contract
async def test_a_canary_that_was_left_behind_ends_with_the_next_change(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    bird = Node(cluster, "bird", tmp_path)
    async with server.store() as store, following(store, bird):
        await registered(store, cluster, 1)
        config = ConfigStore(store, cluster)
        first = await applied(config)
        await bird.runs(first)
        left = {"id": "left", **documents(TEXT.replace("max_qty = 5", "max_qty = 6")).as_json()}
        await edit(server, config.keys.canary("bird"), json.dumps(left).encode())
        await bird.until(lambda status: status["source"] == "canary")
        assert bird.applied[-1][1].risk.max_qty == 6
        outcome = await Rollout(config, 20).apply(documents(TEXT.replace("max_qty = 5", "max_qty = 7")), await config.read())
        assert (outcome.withdrawn, outcome.answers[0].state) == (["bird"], "applied")
        assert bird.applied[-1][1].risk.max_qty == 7
        for bad in (b"nonsense", b"[]", b'{"id": "x", "sections": 3}'):
            await edit(server, config.keys.canary("bird"), bad)
            await bird.until(lambda status: (status["canary"] or {}).get("state") == "refused")
            assert bird.status["version"] == outcome.version
            await edit(server, config.keys.canary("bird"), None)
            await bird.until(lambda status: status["canary"] is None)


@contract
async def test_a_dry_run_applies_nothing(server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    node.refuses = lambda config: ["does not compile"] if config.risk.max_qty == 9 else []
    async with server.store() as store, following(store, node):
        await registered(store, cluster, 1)
        config = ConfigStore(store, cluster)
        rollout = Rollout(config, 20)
        first = (await rollout.apply(documents(), await config.read())).version
        (passed,) = await rollout.dry_run(documents(TEXT.replace("max_qty = 5", "max_qty = 8")))
        (failed,) = await rollout.dry_run(documents(TEXT.replace("max_qty = 5", "max_qty = 9")))
        assert (passed.state, failed.state, failed.reasons) == ("passed", "refused", ("does not compile",))
        (invalid,) = await rollout.dry_run(documents().with_section("risk", "max_qty = 0"))
        assert "config/risk:1" in invalid.reasons[0] or "greater than 0" in invalid.reasons[0]
        assert [given.risk.max_qty for given in node.tried] == [8, 9]
        assert (node.status["version"], len(node.applied), (await config.read()).version) == (first, 1, first)
        assert await store.list(config.keys.dry_run()) == {}


# ---------------------------------------------------------------- a store that is away


@contract
async def test_a_lost_store_changes_nothing_and_is_found_again(own_server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with own_server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        for number in range(10):  # so that a store that starts anew is behind
            first = await applied(config, TEXT.replace("window = 10", f"window = {number + 2}"))
        await node.runs(first)
        own_server.process.kill()
        await node.until(lambda status: status["store"]["stale"])
        assert (node.status["version"], node.status["state"]) == (first, "running")
        own_server.process.start()
        if own_server.keeps_data:
            await node.until(lambda status: not status["store"]["stale"])
        else:
            await node.until(lambda status: "lost its data" in status["store"]["reason"])
        assert (node.status["version"], node.status["refused"]) == (first, None)
        async with asyncio.timeout(30):
            while True:
                try:
                    again = await applied(config, TEXT.replace("max_qty = 5", "max_qty = 50"))
                    break
                except (StoreError, ConfigChanged):
                    await asyncio.sleep(0.05)
        await node.runs(again)
        assert node.applied[-1][1].risk.max_qty == 50
        await registered(store, cluster, 1)


@contract
async def test_a_store_that_does_not_answer_is_waited_for(own_server: StoreServer, cluster: str, tmp_path: Path) -> None:
    node = Node(cluster, "a", tmp_path)
    async with own_server.store() as store, following(store, node):
        config = ConfigStore(store, cluster)
        first = await applied(config)
        await node.runs(first)
        own_server.pause()
        await node.until(lambda status: status["store"]["stale"])
        with pytest.raises(StoreError):
            await applied(config)
        own_server.resume()
        await node.until(lambda status: not status["store"]["stale"])
        assert node.status["refused"] is None


def test_a_thread_follows_for_ever(own_server: StoreServer, cluster: str, tmp_path: Path) -> None:
    """It starts while there is no store, outlives its restarts, and ends when it is told to."""
    node = Node(cluster, "a", tmp_path)
    own_server.process.kill()

    def reach(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < end, node.status
            time.sleep(0.01)

    async def put(text: str) -> int:
        async with own_server.store() as store:
            return await applied(ConfigStore(store, cluster), text)

    with FollowerThread(node.follower, own_server.store) as thread:
        reach(lambda: thread.last_error != "" or "not" in node.status["store"]["reason"])
        own_server.process.start()
        for number in range(3, 9):
            version = asyncio.run(put(TEXT.replace("window = 10", f"window = {number}")))
            reach(lambda version=version: node.status["version"] == version)  # type: ignore[misc]
        own_server.process.kill()
        reach(lambda: bool(node.status["store"]["stale"]))
        assert node.status["version"] == version
        own_server.process.start()
        again = asyncio.run(put(TEXT))
        reach(lambda: node.status["version"] == again)
        assert thread.stop()
        assert thread.stop()
    assert FollowerThread(node.follower, own_server.store).stop()
