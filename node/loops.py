"""The compiled loops around a shard's ``step`` and around a decoder: live, replay, the step alone, and multicast reception.

Each is generated as a small module that imports the parts it drives, so that nothing returns to Python while it runs. The parts are
compiled inside the loop only; a loop has one entry point, since each would contain all of them again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from tickmesh.transports.codecache import load_generated
from tickmesh.transports.receive_path import MODULES, SOCKETS

_LIVE = """\
# The live loop of one shard: input rings -> journal -> step -> output ring. Generated.
import numpy as np

from tickmesh.node.continuation import localize, make_ids, make_positions, resume
from tickmesh.node.event import ANY_VIEW, EVENT
from tickmesh.node.handover import TAKEN_NS, begin, carry_over, no_carry, pass_on
from tickmesh.node.journal import W_NEXT, JournalArrays, journal_append_batch, journal_state
from tickmesh.node.release_marks import make_marks, put_mark
from tickmesh.node.shard_state import warm_arrays
from tickmesh.transports.counters import histogram_record
from tickmesh.transports.references import refer
from tickmesh.transports.ring import HEADER_BYTES, RingArrays, ring_read_batch, ring_sleep, ring_wait, ring_writer_heartbeat
from tickmesh.transports.toolbox import IDLE_SLEEP, SLEEPER, idle, load_acquire, loop, monotonic_ns, now_ns
import tickmesh_generated.{shard} as shard_module
from tickmesh_generated.{shard} import step

FIRST_SLEEP_ROUND = 256  # a loop that may sleep does so at once after work, for 20 us (what comes meanwhile is one batch), then until woken
SLEEP_NS = 2_000_000
LATENCY_MAX_NS = 60_000_000_000  # older stamps are recorded ones, not ours


@loop
def run(
    again, stop, baton, turn, carry, inputs, readers, journal, journalled, batch, batch_any, shard, latency, batch_events, idle_mode, marks,
    ids, given, positions, sources, sleepers
):
    # Until stop[0] is set, then 0; or -1: handed over after a change of the configuration; or the errno for which the journal could not
    # take events: what is not journalled is not processed. stop[1] counts rounds without input, stop[2] events taken.
    # inputs[0] is the control ring, read event by event. With turn > 0 it waits until the loop before hands over.
    # Events of source sources[s] get the shard's ids and, after a takeover, only what the journal lacks is taken; -1: they are taken as is.
    # After every batch a mark tells the release gate which inputs the outputs so far come from.
    # With again = (first, end) only a step over these events of the batch, which the journal has already; returns how many were taken.
    referred = refer(shard)
    if again[1] != 0:
        return step(batch_any, again[0], again[1], referred)
    if turn > 0:
        if not begin(baton, turn, stop):
            return np.int64(0)
        carry_over(carry, shard.books, shard.core, shard.info, shard.patterns, shard.masks, shard.last)
        baton[TAKEN_NS] = monotonic_ns()
    rounds = 0
    marked = True
    while load_acquire(stop, 0) == 0:
        taken = 0
        for s in range(readers.size):
            count = ring_read_batch(inputs[s], readers[s], batch, {batch} if s > 0 else 1)
            if count == 0:
                continue
            taken += count
            source = sources[s]
            if source >= 0:
                if positions[source].resuming != 0:
                    count = resume(positions[source : source + 1], ids, batch, count)
                localize(ids, given, batch, count)
            histogram_record(batch_events, count)
            failure = np.int64(0)
            if journalled != 0:
                appended = journal_append_batch(journal, batch, count, stop, idle_mode)
                if appended < count and load_acquire(stop, 0) == 0:
                    failure = max(journal_state(journal), np.int64(1))
                count = appended
            done = np.int64(0)
            while done < count:
                done += step(batch_any, done, count, referred)
                if done < count:  # the gate may be what keeps the ring full
                    put_mark(marks, journal.words[W_NEXT], shard.core[0].out_seq, now_ns())
                    if ring_wait(shard.out, stop, idle_mode) == 0:
                        break
            now = now_ns()
            marked = put_mark(marks, journal.words[W_NEXT], shard.core[0].out_seq, now)
            for i in range(done):
                age = now - batch[i].ts_recv
                if age >= 0 and age < LATENCY_MAX_NS:
                    histogram_record(latency, age)
            if failure != 0:
                return failure
            if s == 0 and done == 1 and batch[0].kind == 17 and batch[0].flags & 1:
                stop[2] += taken
                pass_on(baton)
                return np.int64(-1)
        if taken == 0:
            stop[1] += 1
            if not marked:
                marked = put_mark(marks, journal.words[W_NEXT], shard.core[0].out_seq, now_ns())
            if rounds & 255 == 255:
                ring_writer_heartbeat(shard.out)
            if idle_mode == IDLE_SLEEP and rounds > FIRST_SLEEP_ROUND and sleepers.size >= readers.size:
                ring_sleep(inputs, readers, sleepers, SLEEP_NS)
                rounds += 1
            else:
                rounds = idle(idle_mode, rounds)
        else:
            stop[2] += taken
            rounds = FIRST_SLEEP_ROUND if idle_mode == IDLE_SLEEP else 0
    return np.int64(0)


def warm():
    ring = RingArrays(np.zeros(HEADER_BYTES // 8, np.uint64), np.zeros(8, EVENT))
    words = np.zeros(1, np.uint64)
    journal = JournalArrays(words, words, np.zeros(1, EVENT), words)
    batch = np.zeros(1, EVENT)
    stop, baton, shard = np.ones(3, np.int64), np.zeros(8, np.int64), warm_arrays(shard_module)
    run(np.zeros(2, np.int64), stop, baton, 0, no_carry(shard.books), (ring,) * {inputs}, np.zeros({inputs}, np.int64), journal, 0, batch,
        batch.view(ANY_VIEW), shard, np.zeros(8, np.int64), np.zeros(8, np.int64), 0, make_marks(0),
        *make_ids(1), make_positions(1), np.zeros({inputs}, np.int64), np.zeros(0, SLEEPER))
"""

_STEP = """\
# The step of one shard, called from Python. Generated.
import numpy as np

from tickmesh.node.event import ANY_VIEW
from tickmesh.node.shard_state import warm_arrays
from tickmesh.transports.references import refer
from tickmesh.transports.toolbox import loop
import tickmesh_generated.{shard} as shard_module


@loop
def step(batch, first, count, shard):
    return shard_module.step(batch, first, count, refer(shard))


def warm():
    step(np.zeros(1, ANY_VIEW), 0, 0, warm_arrays(shard_module))
"""

_REPLAY = """\
# Decoder and shard in one loop: recorded bytes -> batches of events -> step. Generated.
import numpy as np

from tickmesh.node.event import ANY_VIEW, EVENT
from tickmesh.node.shard_state import warm_arrays
{imports}from tickmesh.transports.references import refer
from tickmesh.transports.toolbox import {kinds}
import tickmesh_generated.{decoder} as decoder_module
import tickmesh_generated.{shard} as shard_module
from tickmesh_generated.{decoder} import {decode}
from tickmesh_generated.{shard} import step

FIRST = BY_EVENT = np.int64(0)

{each}
@loop
{body}


def warm():
    feed = decoder_module.warm_feed()
    shard = warm_arrays(shard_module)
    batch = np.zeros(8, EVENT)
    {call}
"""

_TIMERS = """
@inlined
def step_timed(batch, batch_any, count, shard, clock, timer, timer_any):
    # timers go in between where the events pass a boundary, as a live node's router puts them
    first = FIRST
    for i in range(count):
        if timer_due(clock, batch[i]):
            step(batch_any, first, i, shard)
            first = i
            fill_timer(clock, FIRST, batch[i].ts_recv, BY_EVENT, timer[0])
            step(timer_any, FIRST, FIRST + 1, shard)
    step(batch_any, first, count, shard)

"""

_REPLAY_STREAM = """\
def replay(buf, pos, end, ts_recv, feed, batch, batch_any, shard{more}):
    # returns where it stopped: what is left is not a whole message
    referred = refer(shard)
    while pos < end:
        before = pos
        pos, count = stream_events(buf, pos, end, ts_recv, feed, batch)
        {step}
        if pos == before and count == 0:
            break
    return pos"""

_REPLAY_PACKETS = """\
def replay(buf, packets, first, count, flush_ns, feed, batch, batch_any, shard{more}):
    # with flush_ns != 0 these were the last packets: then what waits for missing ones is given up
    referred = refer(shard)
    ended = False
    while True:
        if ended:
            events = flush_events(flush_ns, feed, batch)
        else:
            first, events = packet_events(buf, packets, first, count, feed, batch)
        {step}
        if first >= count and events == 0:
            if ended or flush_ns == 0:
                return first
            ended = True"""

_RECEIVE = """\
# The receiver of one multicast source: {way} -> datagrams -> events -> the shards' input rings. Generated.
import numpy as np

from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
{imports}from tickmesh.node.router import make_router, route, route_silence
from tickmesh.transports.{module} import receive_batch, warm_line
from tickmesh.transports.multicast import wait_readable
from tickmesh.transports.ring import HEADER_BYTES, RingArrays
from tickmesh.transports.toolbox import IDLE_SLEEP, idle, inlined, load_acquire, loop, now_ns
import tickmesh_generated.{decoder} as decoder_module
from tickmesh_generated.{decoder} import flush_events, packet_events

FIRST = np.int64(0)
FIRST_SLEEP_ROUND = 256
SLEEP_MS = 2


@inlined
def hand_on(buffer, packets, count, feed, batch, router):
    # datagrams to the shards' rings; false once a ring stays full after the stop flag is set
    first = FIRST
    while count > 0:
        first, events = packet_events(buffer, packets, first, count, feed, batch)
        if not route(router, batch, FIRST, events):
            return False
        if first >= count and events == 0:
            break
    return True


@loop
def receive(stop, lines, buffers, packets, feed, batch, router, idle_mode, readable{argument}):
    # until stop[0] is set or a shard's ring stays full after it
    rounds = 0
    while load_acquire(stop, 0) == 0:
        received = 0
        for line in range({lines}):
            now = now_ns()
            count = receive_batch(lines[line], buffers[line], packets[line], line, now)
            received += count
            if not hand_on(buffers[line], packets[line], count, feed, batch, router):
                return
{noted}{asking}        if received == 0:
            events = flush_events(now_ns(), feed, batch)
            while events > 0:
                if not route(router, batch, FIRST, events):
                    return
                events = flush_events(now_ns(), feed, batch)
            if not route_silence(router):
                return
            if idle_mode == IDLE_SLEEP and rounds > FIRST_SLEEP_ROUND:
                wait_readable(readable, SLEEP_MS)
                rounds += 1
            else:
                rounds = idle(idle_mode, rounds)
        else:
            rounds = FIRST_SLEEP_ROUND if idle_mode == IDLE_SLEEP else 0


def warm():
    feed = decoder_module.warm_feed()
    ring = RingArrays(np.zeros(HEADER_BYTES // 8, np.uint64), np.zeros(8, EVENT))
    stop = np.ones(1, np.int64)
    router = make_router((ring,) * {shards}, InstrumentTable(1).arrays.records, stop, 0, 0)
    kernel, buffer, packets = warm_line()
    receive(stop, (kernel,) * {lines}, (buffer,) * {lines}, (packets,) * {lines}, feed, np.zeros(8, EVENT), router, 0,
            np.zeros(6, np.int32){warmed})
"""

_ASKING = {
    "imports": "from tickmesh.node.rerequest import ask, count_recovered, drop_answers, lacks, note_session, take_answers, warm_request\n"
    "from tickmesh.node.arbiter import EXPECTED\n",
    "argument": ", request",
    "noted": "            if count > 0:\n                note_session(request, feed.arbiter, buffers[line], packets[line], count)\n",
    "asking": """\
        if lacks(feed.arbiter) and ask(request, feed.arbiter, now_ns()):
            count = take_answers(request, now_ns())
            received += count
            before = feed.arbiter.state[EXPECTED]
            if not hand_on(request.buffer, request.packets, count, feed, batch, router):
                return
            count_recovered(request, before, feed.arbiter)
        elif received == 0 and idle_mode == IDLE_SLEEP:
            drop_answers(request, now_ns())
""",
    "warmed": ", warm_request()",
}


def live_loop(
    shard: ModuleType,
    inputs: int,
    batch_events: int,
    progress: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> ModuleType:
    """The module whose ``run`` drives `shard`'s step from up to `inputs` rings, the first of them the control ring.

    `check` is called before it is compiled here: see :func:`tickmesh.transports.codecache.load_generated`.
    """
    return load_generated("shard", _LIVE.format(shard=_stem(shard), inputs=inputs, batch=batch_events), progress, check)


def step_loop(shard: ModuleType, progress: Callable[[str], None] | None = None) -> ModuleType:
    """The module whose ``step`` is `shard`'s, for callers in Python."""
    return load_generated("shard_step", _STEP.format(shard=_stem(shard)), progress)


def replay_loop(
    decoder: ModuleType, shard: ModuleType, progress: Callable[[str], None] | None = None, *, timers: bool = False
) -> ModuleType:
    """The module whose ``replay`` decodes recorded bytes and steps `shard`, without returning to Python.

    With `timers` it takes three more arguments: the source's clock, an EVENT array of one, and the same as ANY_VIEW.
    """
    stream = hasattr(decoder, "decode_stream")
    more = ", clock, timer, timer_any" if timers else ""
    step = f"step_timed(batch, batch_any, {{count}}, referred{more})" if timers else "step(batch_any, FIRST, {count}, referred)"
    body = (_REPLAY_STREAM if stream else _REPLAY_PACKETS).format(more=more, step=step.format(count="count" if stream else "events"))
    place = "0, 0, 0, feed" if stream else "feed.arbiter.no_packets, 0, 0, 0, feed"
    extra = ", make_clock(1), timer, timer.view(ANY_VIEW)" if timers else ""
    call = f"replay(np.zeros(64, np.uint8), {place}, batch, batch.view(ANY_VIEW), shard{extra})"
    source = _REPLAY.format(
        decoder=_stem(decoder),
        shard=_stem(shard),
        decode="stream_events" if stream else "flush_events, packet_events",
        imports="from tickmesh.node.timers import fill_timer, make_clock, timer_due\n" if timers else "",
        kinds="inlined, loop" if timers else "loop",
        each=_TIMERS if timers else "",
        body=body,
        call=f"timer = np.zeros(1, EVENT)\n    {call}" if timers else call,
    )
    return load_generated("replay", source, progress)


def receive_loop(
    decoder: ModuleType,
    lines: int,
    shards: int,
    progress: Callable[[str], None] | None = None,
    *,
    way: str = SOCKETS,
    rerequests: bool = False,
) -> ModuleType:
    """The module whose ``receive`` polls `lines` places of a way to receive, decodes, and routes to `shards` rings.

    With `rerequests` it asks a server for what is missing, and takes one more argument, a :class:`tickmesh.node.rerequest.Request`.
    """
    module = MODULES[way].__name__.rpartition(".")[2]
    asking = _ASKING if rerequests else dict.fromkeys(_ASKING, "")
    source = _RECEIVE.format(decoder=_stem(decoder), lines=lines, shards=shards, way=way, module=module, **asking)
    return load_generated("receiver", source, progress)


def _stem(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]
