"""The market simulator: same seed, same bytes; every message valid; its own books equal those an independent reader makes of the feed."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bounds import with_bounds_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from itch_reader import LENGTHS, ItchReader, frames, read_image

from tickmesh.ops.itch_writer import MESSAGE_BYTES, stock_word
from tickmesh.ops.order_flow import messages_least
from tickmesh.ops.simulator import OPEN_NS, Simulator, SimulatorConfig, SimulatorConfigError, generate, symbol_names, write_itch

SMALL = SimulatorConfig(seed=3, symbols=4, messages=12_000, halts_per_million=600, breaks_per_million=600, halt_messages=800)


def played(config: SimulatorConfig, block: int = 5000) -> tuple[Simulator, bytes]:
    simulator, parts = Simulator(config), []
    while not simulator.finished:
        image, end = simulator.next_block(block)
        parts.append(image[:end].tobytes())
    return simulator, b"".join(parts)


def test_feed_rebuilds_the_exchange_s_own_books() -> None:
    simulator, image = played(SMALL)
    reader = read_image(image)
    assert reader.truth(10**6) == simulator.truth(10**6)
    assert dict(reader.types) == simulator.counts()
    assert simulator.messages == sum(reader.types.values()) == 12_000
    assert reader.system == "OSQMEC"
    assert list(reader.stocks.values()) == list(simulator.symbols)
    assert reader.time_ns == simulator.time_ns


def test_books_agree_in_the_middle_of_the_day() -> None:
    simulator, reader = Simulator(SMALL), ItchReader()
    while not simulator.finished:
        image, end = simulator.next_block(1000)
        for message in frames(image[:end].tobytes()):
            reader.read(message)
        if len(reader.stocks) == 4 and len(reader.status) == 4:
            assert reader.truth(5) == simulator.truth(5)


def test_day_holds_every_message_type() -> None:
    counts = played(SMALL)[0].counts()
    assert set(counts) == set(MESSAGE_BYTES)


def test_lengths_are_those_of_the_specification() -> None:
    assert {kind: LENGTHS[kind] for kind in MESSAGE_BYTES} == MESSAGE_BYTES


def test_same_seed_same_bytes_however_it_is_cut() -> None:
    whole = hashlib.sha256(generate(SMALL)).hexdigest()
    assert whole == hashlib.sha256(played(SMALL, 1)[1]).hexdigest() == hashlib.sha256(played(SMALL, 777)[1]).hexdigest()


def test_bytes_are_the_same_on_every_host() -> None:
    """A change here is a change of every recorded seed: it needs a word in the release notes."""
    config = SimulatorConfig(seed=42, symbols=8, messages=20_000)
    assert hashlib.sha256(generate(config)).hexdigest() == "851dc1df93013c0ceb11357a07e347a6bc6b03ae42daab41f0ce72eec52b472d"


@pytest.mark.parametrize("change", [{"seed": 4}, {"symbols": 5}, {"rate": 6000}, {"halts_per_million": 0}])
def test_other_settings_other_bytes(change: dict[str, int]) -> None:
    config = {"seed": 3, "symbols": 4, "messages": 3000, "halts_per_million": 6000}
    assert generate(SimulatorConfig(**config)).tobytes() != generate(SimulatorConfig(**(config | change))).tobytes()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**64 - 1), symbols=st.integers(1, 12), extra=st.integers(0, 1500), rate=st.sampled_from([1, 300, 50_000, 10**7])
)
def test_any_market_is_valid(seed: int, symbols: int, extra: int, rate: int) -> None:
    messages = messages_least(symbols, 32) + extra
    config = SimulatorConfig(
        seed=seed, symbols=symbols, messages=messages, rate=rate, depth_orders=16 + seed % 64, halts_per_million=20_000, halt_messages=50
    )
    simulator, image = played(config, 1 + seed % 999)
    assert read_image(image).truth() == simulator.truth()
    assert simulator.messages == messages


def test_market_looks_alive() -> None:
    simulator, prices = Simulator(SimulatorConfig(seed=1, symbols=6, seconds=30, rate=3000)), []
    while not simulator.finished:
        simulator.next_block(1_000_000, simulator.next_ns + 1_000_000_000)
        prices.append([truth["last"] or 0 for truth in simulator.truth(1).values()])
    truth, moved = simulator.truth(), np.array(prices[-25:-1])
    assert all(row["trades"] > 100 for row in truth.values())
    assert all(len(np.unique(moved[:, i])) > 5 for i in range(6))
    spreads = [row["asks"][0][0] - row["bids"][0][0] for row in truth.values()]
    assert all(100 <= spread <= 3000 for spread in spreads)
    counts = simulator.counts()
    share = Counter({k: v / simulator.messages for k, v in counts.items()})
    assert share["A"] + share["F"] > 0.35
    assert 0.02 < share["E"] < 0.2
    assert share["D"] > 0.25


def test_mean_rate_is_the_one_asked_for() -> None:
    simulator = played(SimulatorConfig(seed=9, symbols=5, messages=100_000, rate=20_000, halts_per_million=0))[0]
    seconds = (simulator.time_ns - OPEN_NS) / 1e9
    assert 0.97 < simulator.messages / seconds / 20_000 < 1.03


def test_opening_is_at_half_past_nine() -> None:
    image = generate(SMALL).tobytes()
    opening = next(m for m in frames(image) if m[:1] == b"S" and m[11:] == b"Q")
    assert int.from_bytes(opening[5:11], "big") == OPEN_NS


def test_source_can_pull_by_time() -> None:
    simulator = Simulator(SimulatorConfig(seed=5, symbols=2))
    start = simulator.next_ns
    seen = 0
    for elapsed_ns in range(0, 400_000_000, 10_000_000):
        image, end = simulator.next_block(10**5, start + elapsed_ns)
        assert simulator.time_ns <= start + elapsed_ns < simulator.next_ns
        assert len(image) >= end + 64
        seen += end
    assert seen > 0
    assert not simulator.finished
    assert simulator.next_block(5, start)[1] == 0


def test_day_bounded_by_time_ends_after_it() -> None:
    simulator, image = played(SimulatorConfig(seed=2, symbols=3, seconds=0.5))
    closing = next(m for m in frames(image) if m[:1] == b"S" and m[11:] == b"M")
    assert 0 <= int.from_bytes(closing[5:11], "big") - OPEN_NS - 500_000_000 < 20_000_000
    assert read_image(image).truth() == simulator.truth()


def test_finished_day_gives_nothing_more() -> None:
    simulator, _ = played(SMALL)
    assert simulator.next_block(100)[1] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1}, {"symbols": 0}, {"symbols": 8001}, {"rate": 0}, {"rate": 10**8}, {"messages": 10}, {"seconds": 0},
        {"seconds": 1e9}, {"halt_messages": 0}, {"depth_orders": 1}, {"symbols": True}, {"rate": 2.5},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(SimulatorConfigError) as error:
        SimulatorConfig(**wrong)
    (field,) = wrong
    assert error.value.field == field
    assert field in str(error.value)
    assert "give" in str(error.value)


def test_endless_day_cannot_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(SimulatorConfigError, match="messages or seconds"):
        write_itch(tmp_path / "x", SimulatorConfig())
    with pytest.raises(SimulatorConfigError, match="messages or seconds"):
        generate(SimulatorConfig())
    assert not list(tmp_path.iterdir())


def test_file_is_the_image(tmp_path: Path) -> None:
    told: list[int] = []
    written = write_itch(tmp_path / "day.itch", SMALL, told.append)
    content = (tmp_path / "day.itch").read_bytes()
    assert content == generate(SMALL).tobytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert told[-1] == 12_000
    assert [p.name for p in tmp_path.iterdir()] == ["day.itch"]


def test_unwritable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere/day") as error:
        write_itch(tmp_path / "nowhere" / "day", SMALL)
    assert error.value.filename == str(tmp_path / "nowhere" / "day")


def test_symbols_are_distinct_and_stable() -> None:
    names = symbol_names(8000)
    assert len(set(names)) == 8000
    assert all(len(name) == 4 and name.isascii() and name.isupper() for name in names)
    assert symbol_names(5) == names[:5] == ("ALFA", "BRVO", "CHRL", "DLTA", "EKKO")


@pytest.mark.parametrize("symbol", ["", "NINELONGS", "É"])
def test_bad_symbol_is_refused(symbol: str) -> None:
    with pytest.raises(ValueError, match="stock symbol"):
        stock_word(symbol)


@pytest.mark.slow
def test_no_index_leaves_its_array() -> None:
    """A day with bounds checks compiled in gives the same bytes."""
    program = "import test_simulator as t, hashlib; print(hashlib.sha256(t.generate(t.SMALL)).hexdigest())"
    done = with_bounds_checks("-c", program, folder=Path(__file__).parent)
    assert done.stdout.strip() == hashlib.sha256(generate(SMALL)).hexdigest(), done.stderr[-2000:]
