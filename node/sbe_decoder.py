"""Writes the part of a decoder that an SBE schema needs: one function per mapped message, with its groups and variable-length data.

The rest, framing, arbitration, instruments, is that of every decoder (:mod:`tickmesh.node.decoder`). Of each message:

* **Walked first.** All groups and data are stepped over by the lengths on the wire before anything is made of them. A message whose
  counts or lengths reach beyond it makes no event and is counted (`bad_group`), whatever its counts say.
* **Block lengths are the wire's.** A newer version's longer blocks are stepped over; fields that an older version lacks are null.
* **Resumed.** A message may make more events than `out` has room for: then ``Feed.state[RESUME]`` says how many of its entries are done.
* **Code for what is mapped only.** Other messages of the schema are counted by name, groups without events are stepped over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tickmesh.node.decoder import _DecoderWriter, _equals, _load, _Source, _words
from tickmesh.node.event import NO_SIDE, PRICE_DECIMALS, Kind
from tickmesh.node.protocol import KINDS, Field, Framing
from tickmesh.node.sbe_mapping import Condition, FlagTest, SbeCase, SbeSpec, Source, Template, Text, definition_part, leaf_field
from tickmesh.node.sbe_schema import Data, Encoding, Enum, Group, Leaf, Level, Member

_IMPORTS = """
from tickmesh.node.feed import BAD_ENCODING, BAD_GROUP, OTHER_SCHEMA, RESOLVED_BELOW, UNKNOWN_INSTRUMENT, find_code, resolve_symbol
from tickmesh.node.sbe_kernels import (
    HAS_HELD, IMPLIED, RESUME, clear_ladder, clear_ladders, data_word, define, find_template, hold_last, learn_ladder, lose_ladders,
    meet_book, put_event, put_level, rescale, resolve_book, set_depth, take_held,
)
"""
_RECOVERY_IMPORTS = """
from tickmesh.node import recovery as R
from tickmesh.node.feed import SINCE, Feed
from tickmesh.node.recovery import (
    begin_book, begin_packet, begin_recovery, end_book, forget_recovery, keep_packet, of_use, see_snapshot, stage, take_ladder, tell,
    wants_packet,
)
"""
_DEFINITION_IMPORTS = """
from tickmesh.node import definitions as D
from tickmesh.node.definitions import begin_definitions, take_definitions
"""
_RECOVERY = '''

@outlined
def _decode_aside(buf, pos, end, seq, ts_recv, feed):
    """Decode messages up to `end`, staging what belongs to the book that is recovered, with ladders and counters aside."""
    r, zero = feed.recovery, np.int64(0)
    aside = Feed(feed.instruments, feed.codes, feed.code_keys, feed.state, r.counts, r.malformed, feed.arbiter, r.ladders, feed.depths,
                 feed.held, feed.orders, r, r.known, feed.definitions)
    while pos < end:
        before = pos
        pos, left, last, n = _decode(buf, pos, end, np.int64(1 << 62), seq, ts_recv, aside, r.scratch, zero)
        if not stage(r, feed.instruments.records, feed.known, feed.state[SINCE], n, IMPLIED):
            feed.state[RESUME] = feed.state[HAS_HELD] = 0
            return False
        if pos == before and n == 0:
            break
    return True


@outlined
def _recover_book(buf, pos, end, last, ts_recv, feed):
    """A snapshot and what the feed has brought since; true if there is something to tell now."""
    r, done = feed.recovery, feed.arbiter.state[A.EXPECTED] - 1
    if not of_use(r, last, done):
        return False
    begin_book(r)
    good = _decode_aside(buf, pos, end, done, ts_recv, feed)
    seq = last + 1
    while good and seq <= done:
        slot = seq % np.int64(r.kept.size)
        at = slot * R.SLOT_BYTES
        good = _decode_aside(r.bytes, at + {header}, at + r.kept[slot].length, done, ts_recv, feed)
        seq += 1
    found = end_book(r, done)
    if found >= 0:
        take_ladder(r, feed.ladders, found, {levels})
        learn_ladder(feed, found, done)
        implied = find_code(feed, feed.instruments.records[found].code | IMPLIED)
        if implied < RESOLVED_BELOW:
            take_ladder(r, feed.ladders, implied, {levels})
            learn_ladder(feed, implied, done)
    return r.words[R.COUNT] > 0


@outlined
def _recover(buf, packet, feed):
    """Read a packet of the snapshot channel; true if it is done with, false if something is to be told before the rest of it."""
    w, s = feed.recovery.words, feed.arbiter.state
    s[A.NOW] = max(s[A.NOW], packet.ts_recv)
    p, size = np.int64(packet.offset), np.int64(packet.length)
    if size < {header} or p + size > np.int64(buf.size):
        feed.malformed[SHORT_PACKET] += _ONE
        return True
    if w[R.POSITION] == 0:
        begin_packet(feed.recovery, feed.known, np.int64({sequence}))
        w[R.POSITION] = {header}
    pos, end = p + w[R.POSITION], p + size
    while w[R.WANTED] != 0 and pos + {prefix} <= end:
        total = _total(buf, pos)
        if total <= {offset} or pos + total > end:
            feed.malformed[TRUNCATED] += _ONE
            break
        last, reports = _processed(buf, pos + {offset}, total - {offset})
        if last >= 0:
            see_snapshot(feed.recovery, reports)
        told = last >= 0 and _recover_book(buf, pos, pos + total, last, packet.ts_recv, feed)
        pos += total
        if told:
            w[R.POSITION] = pos - p
            return False
    w[R.POSITION] = 0
    return True
'''
_DEFINITIONS = '''

@outlined
def _define(buf, packet, feed, out, n):
    """Read a packet of the definition channel; returns (n, whether it is done with): if not, it goes on with more room."""
    w, s = feed.definitions, feed.arbiter.state
    p, size = np.int64(packet.offset), np.int64(packet.length)
    end, room = p + size, np.int64(out.size) - {reserve}
    if size < {header} or end > np.int64(buf.size):
        feed.malformed[SHORT_PACKET] += _ONE
        return n, True
    if w[D.POSITION] == 0:
        begin_definitions(w, np.int64({sequence}))
        w[D.POSITION] = {messages_at}
    first, seq = n, max(s[A.EXPECTED] - 1, 0)
    pos, left, seq, n = _decode_definitions(buf, p + w[D.POSITION], end, np.int64(1 << 62), seq, packet.ts_recv, feed, out, n)
    take_definitions(w, feed.instruments.records, out, first, n, IMPLIED)
    if pos < end and n > room:
        w[D.POSITION] = pos - p
        return n, False
    if pos < end:
        feed.malformed[LENGTH_PAST_END if pos + {prefix} <= end else TRUNCATED] += _ONE
    w[D.POSITION] = 0
    s[A.NOW] = max(s[A.NOW], packet.ts_recv)  # not before: nothing may become due in the middle of a message
    return n, True
'''
_MORE_OF_BOOKS = 3
"""Events that say that a book is known, or that it ended or begins under another name."""
_MADE_HERE = 1
"""`aux` of a CLEAR of all instruments that a message asks for: the packets' sequence goes on (see continuation.py)."""
_I64_MAX = (1 << 63) - 1


class SbeDecoderWriter(_DecoderWriter):
    """Writes the functions of a decoder for a mapped schema."""

    spec: SbeSpec

    def __init__(self, spec: SbeSpec, framing: Framing, out: _Source) -> None:
        super().__init__(spec, framing, out)
        self.big = spec.schema.big
        self.depths = any(case.kind == "depth" for template in spec.templates for case in template.cases)
        for template in spec.templates:
            for case in template.cases:
                for source in _sources(case):
                    self._note_map(source.field)
        self.reserve = max([_events_max(spec, template) for template in spec.templates], default=1) + 2

    def _note_map(self, field: Field) -> None:
        if field.map is not None and field.size == 1:
            self.maps.setdefault((tuple(field.map.items()), field.map_default), f"_MAP_{len(self.maps)}")

    def tables(self) -> None:
        self.out(_IMPORTS.strip("\n"))
        if self._recovers:
            self.out(_RECOVERY_IMPORTS.strip("\n"))
        if self._defines:
            self.out(_DEFINITION_IMPORTS.strip("\n"))
        ordered = list(enumerate(message.id for message in self.spec.ordered))
        ordered.sort(key=lambda item: item[1])
        self.out(f"_TEMPLATES = np.array({[template for _, template in ordered]}, np.int64)")
        self.out(f"_COUNTERS = np.array({[counter for counter, _ in ordered]}, np.int64)")
        super().tables()

    def on_clear(self) -> str:
        ladders = "\n            clear_ladders(feed, np.int64(0))" if self.spec.levels else ""
        return ladders + ("\n            forget_recovery(feed.recovery)" if self._recovers else "")

    @property
    def _recovers(self) -> bool:
        """Whether the feed may have a snapshot channel: a packet has one sequence, by which snapshots say what they contain."""
        return bool(self.spec.processed) and self.framing.packets and self.framing.by_packet

    @property
    def _defines(self) -> bool:
        """Whether the feed may have a definition channel."""
        return self.spec.defines and self.framing.packets and self.framing.sequence is not None

    def recovering(self) -> dict[str, str]:
        lost = "\n            lose_ladders(feed)" if self.spec.levels else ""
        found = {**super().recovering(), "gapped": lost}
        done = "arb.lines[line, A.LINE_PACKETS] += _ONE\n                    i += 1\n                continue"
        if self._recovers:
            tell = "n = tell(feed.recovery, out, n)\n            continue"
            found["told"] = f"\n        if feed.recovery.words[R.COUNT] > 0:\n            {tell}"
            found["gapped"] += "\n            begin_recovery(feed.recovery, s[A.EXPECTED] - 1)"
            found["beside"] += (
                "\n            if line == feed.recovery.words[R.LINE]:\n"
                f"                if _recover(buf, packets[np.uint64(i)], feed):\n                    {done}"
            )
        if self._defines:
            found["beside"] += (
                "\n            if line == feed.definitions[D.LINE]:\n"
                "                n, whole = _define(buf, packets[np.uint64(i)], feed, out, n)\n"
                f"                if whole:\n                    {done}"
            )
        return found

    def keeping(self) -> str:
        if not self._recovers:
            return ""
        kept = "keep_packet(feed.recovery, buf, p, size, seq, packet.ts_recv)"
        return f"if wants_packet(feed.recovery, seq, s[A.EXPECTED]):\n    {kept}"

    # ---- the loop over messages

    def messages(self) -> None:
        self._instruments()
        for counter, template in enumerate(self.spec.templates):
            if template.cases:
                _TemplateWriter(self, template, counter).write(f"_{template.message.name}")
        whole = {template.message.id: f"_{template.message.name}" for template in self.spec.templates if template.cases}
        self._loop("inlined", "_decode", whole)
        if self._recovers:
            self._recovery()
        if self._defines:
            self._definitions()

    def _definitions(self) -> None:
        """``_define``: a packet of the definition channel (:mod:`tickmesh.node.definitions`)."""
        fr, functions = self.framing, {}
        for counter, template in enumerate(self.spec.templates):
            part = definition_part(template)
            if part.cases:
                functions[part.message.id] = f"_{part.message.name}"
            if part.cases and part != template:
                functions[part.message.id] = f"_definitions_in_{part.message.name}"
                _TemplateWriter(self, part, counter).write(functions[part.message.id])
        self._loop("outlined", "_decode_definitions", functions, counts=False)
        prefix = fr.length.offset + fr.length.size
        assert fr.sequence is not None
        self.out(_DEFINITIONS.format(header=fr.header_bytes, messages_at=fr.messages_at, prefix=prefix, reserve=self.reserve,
                                     sequence=_load(fr.sequence, "p")))  # fmt: skip

    def _recovery(self) -> None:
        """``_recover``: a packet of the snapshot channel (:mod:`tickmesh.node.recovery`)."""
        fr, out, header = self.framing, self.out, self.spec.schema.header
        assert fr.sequence is not None
        out("\n@outlined\ndef _processed(buf, m, length):")
        out.indent()
        out('"""Up to which packet of the feed a snapshot goes, -1: the message is none; and how many a turn has, 0: it does not say."""')
        none = "np.int64(-1), np.int64(0)"
        out(f"if length < {header.size}:\n    return {none}")
        out(f"block, template, b0 = {self._header_part('blockLength')}, {self._header_part('templateId')}, m + {header.size}")
        out(f"if {self._header_part('schemaId')} != {self.spec.schema.id} or block + {header.size} > length:\n    return {none}")
        for template, field in self.spec.processed.items():
            total = self.spec.reports.get(template)
            reach = max(one.offset + one.size for one in (field, total) if one)
            found = ", ".join(f"np.int64({_load(one, 'b0') if one else 0})" for one in (field, total))
            out(f"if template == {template} and block >= {reach}:\n    return {found}")
        out(f"return {none}")
        out.indent(-1)
        prefix = fr.length.offset + fr.length.size
        out(_RECOVERY.format(header=fr.header_bytes, prefix=prefix, offset=fr.message_offset, levels=max(1, self.spec.ladder_levels),
                             sequence=_load(fr.sequence, "p")))  # fmt: skip

    def _instruments(self) -> None:
        """``_by_code`` and ``_by_symbol``: the instrument of a message or entry, with its REFERENCE if it is new."""
        tick = f"np.int64({self.spec.tick_size})"
        met = "\n        if instrument < RESOLVED_BELOW:\n            n = meet_book(feed, instrument, number, seq, stamp, ts_recv, out, n)"
        met = met if self.spec.levels else ""
        self.out(f'''
@inlined
def _by_code(feed, number, seq, stamp, ts_recv, out, n):
    instrument = find_code(feed, number)
    if instrument >= RESOLVED_BELOW:
        instrument, n = resolve_book(feed, instrument, number, {tick}, seq, stamp, ts_recv, out, n){met}
    return instrument, n


@inlined
def _by_symbol(feed, w0, w1, w2, tick, seq, stamp, ts_recv, out, n):
    instrument = find_instrument(feed.instruments, np.uint32(feed.state[SOURCE]), w0, w1, w2)
    if instrument >= RESOLVED_BELOW or feed.instruments.records[instrument].announced == np.uint32(0):
        instrument, n = resolve_symbol(feed, w0, w1, w2, tick, seq, stamp, ts_recv, out, n)
    return instrument, n
''')

    def _loop(self, kind: str, name: str, functions: Mapping[int, str], *, counts: bool = True) -> None:
        """A loop over messages that calls the functions of some, by template id; `counts`: each has a sequence, if the framing says so."""
        fr, out, header = self.framing, self.out, self.spec.schema.header
        prefix = fr.length.offset + fr.length.size
        out(f"\n@{kind}\ndef {name}(buf, pos, end, left, seq, ts_recv, feed, out, n):")
        out.indent()
        out('"""Decode up to `left` messages; returns (pos, left, seq, n) where it stopped."""')
        out(f"room = np.int64(out.size) - {self.reserve}\nmalformed = feed.malformed")
        out(f"while left > 0 and n <= room:\n    if pos + {prefix} > end:\n        break\n    total = _total(buf, pos)")
        out.indent()
        step = "" if fr.by_packet or not counts else "\n    seq += 1"
        out(f"if total <= {fr.message_offset}:")
        if fr.zero_length_is_end:
            out(f"    feed.state[ENDS] += 1\n    pos += {max(fr.message_offset, prefix)}\n    continue")
        else:
            least = max(fr.length_unit, prefix)
            out(f"    malformed[ZERO_LENGTH] += _ONE\n    pos += max(total, {least}){step}\n    left -= 1\n    continue")
        out("if pos + total > end:\n    break")
        out(f"m, length, done = pos + {fr.message_offset}, total - {fr.message_offset}, True")
        out(f"if length < {header.size}:\n    malformed[BAD_LENGTH] += _ONE")
        if fr.encoding:
            out(f"elif not ({_equals(_load(fr.encoding[0], 'pos'), fr.encoding[0], fr.encoding[1])}):\n    malformed[BAD_ENCODING] += _ONE")
        out("else:")
        out.indent()
        self._dispatch_template(functions)
        out.indent(-1)
        out("if not done:\n    break  # in the middle of a message: it goes on here with more room")
        out(f"pos += total\nleft -= 1{step.replace('    ', '')}")
        out.indent(-1)
        out("return pos, left, seq, n")
        out.indent(-1)
        out()

    def _dispatch_template(self, functions: Mapping[int, str]) -> None:
        out, schema = self.out, self.spec.schema
        part = {name: self._header_part(name) for name in ("blockLength", "templateId", "schemaId", "version")}
        out(f"block, template, version = {part['blockLength']}, {part['templateId']}, {part['version']}")
        out(f"if {part['schemaId']} != {schema.id}:\n    malformed[OTHER_SCHEMA] += _ONE")
        out(f"elif block + {schema.header.size} > length:\n    malformed[BAD_LENGTH] += _ONE")
        for template, name in functions.items():
            out(f"elif template == {template}:")
            out(f"    n, done = {name}(buf, m + {schema.header.size}, m + length, block, version, seq, ts_recv, feed, out, n)")
        out("else:")
        out("    found = find_template(_TEMPLATES, template)")
        out("    if found < 0:\n        malformed[UNKNOWN_MESSAGE] += _ONE")
        out("    else:\n        feed.counts[np.uint64(_COUNTERS[np.uint64(found)])] += _ONE")

    def _header_part(self, name: str) -> str:
        member = self.spec.schema.header.member(name)
        assert member is not None
        return f"np.int64({self.member(member, 'm')})"

    def member(self, member: Member, base: str) -> str:
        """Expression for a part of a header."""
        assert isinstance(member.type, Encoding)
        field = leaf_field(Leaf(member.name, member.offset, member.type, None, None, 0), self.big)
        assert field is not None
        return _load(field, base)


def _sources(case: SbeCase) -> list[Source]:
    """Every field that a case reads."""
    found = [value for value in case.values.values() if isinstance(value, Source)]
    found += [value.exponent for value in found if isinstance(value.exponent, Source)]
    found += [condition.source for condition in case.when] + [test.source for test in case.tests]
    found += [source for source in (case.code, case.stamp, case.joined and case.joined[1]) if source]
    return found


def _events_max(spec: SbeSpec, template: Template) -> int:
    """Events that one entry of a message can make, its instrument's REFERENCE included."""
    most = 1
    for path in {case.path for case in template.cases}:
        cases = [case for case in template.cases if case.path == path]
        chosen = 1 + sum(case.go_on for case in cases)
        most = max(most, 1 + chosen * (2 + (spec.levels if any("change" in case.values for case in cases) else 0)))
    return most + (_MORE_OF_BOOKS if spec.levels else 0)


class _TemplateWriter:
    """Writes the function of one message."""

    def __init__(self, writer: SbeDecoderWriter, template: Template, counter: int) -> None:
        self.writer, self.out, self.counter = writer, writer.out, counter
        self.spec, self.message, self.cases = writer.spec, template.message, template.cases
        self.chain: list[Level] = [template.message]
        self.used = [(self._path(case, source.depth), source) for case in self.cases for source in _sources(case)]
        self.texts = [(case, case.symbol) for case in self.cases if case.symbol]
        self.loaded: dict[str, str] = {}
        self.hoisted = self._hoisted()

    def _path(self, case: SbeCase, depth: int) -> tuple[str, ...]:
        """The level that a case's source of that depth is in."""
        if depth < 0:
            assert case.joined is not None
            return (case.joined[0],)
        return case.path[:depth]

    def _hoisted(self) -> str:
        """How the message's root names the instrument of all entries, which is looked up once then: ``code``, ``symbol``, or not at all."""
        making = [case for case in self.cases if case.kind not in ("nothing", "reference") and not case.whole]
        conditional = any(case.when and not case.path for case in self.cases)  # what says nothing should name no instrument either
        defining = any(case.kind == "reference" for case in self.cases)  # which gives the instrument its name first
        if not making or conditional or defining or any("book" in case.values or self._lacks_code(case) for case in making):
            return ""
        codes, symbols = [case.code for case in making], [case.symbol for case in making]
        if all(code and code.depth == 0 for code in codes):
            return "code"
        return "symbol" if not any(codes) and all(text and text.depth == 0 for text in symbols) else ""

    def write(self, name: str) -> None:
        out, rare = self.out, self.cases == definition_part(Template(self.message, self.cases)).cases
        out(f"\n@{'outlined' if rare else 'inlined'}\ndef {name}(buf, b0, end, k0, version, seq, ts_recv, feed, out, n):")
        out.indent()
        out(f'"""{self.message.name}: returns (n, whether all of it is decoded)."""')
        out(f"state, malformed, room = feed.state, feed.malformed, np.int64(out.size) - {self.writer.reserve - 1}")
        out("done, first = state[RESUME], n")
        least = self._least(())
        if least:
            out(f"if k0 < {least}:\n    malformed[BAD_LENGTH] += _ONE\n    return n, True")
        out("p = b0 + k0")
        self._walk(self.message, (), "p", record=True)
        out("if p > end:\n    malformed[BAD_GROUP] += _ONE\n    return n, True")
        out("if state[HAS_HELD] != 0:\n    n = take_held(feed, out, n)")
        out(f"if done == 0:\n    feed.counts[{self.counter}] += _ONE")
        self._message_wide()
        if self._at(()):
            out("if done == 0:")
            out.indent()
            self._unit((), self._at(()))
            out.indent(-1)
        out("base = np.int64(1)")
        for group in self.message.groups:
            self._entries(group, (group.name,))
        out("state[RESUME] = 0\nreturn n, True")
        out.indent(-1)
        out()

    def _message_wide(self) -> None:
        """What all entries share: time and instrument of the root."""
        out = self.out
        stamps = [case.stamp for case in self.cases if case.stamp and case.stamp.depth == 0]
        out(f"stamp = {self._time(stamps[0])}" if stamps else "stamp = ts_recv")
        making = [case for case in self.cases if case.kind not in ("nothing", "reference") and not case.whole]
        if self.hoisted == "code":
            assert making[0].code is not None
            out(f"instrument, n = _by_code(feed, {self._number(making[0].code)}, seq, stamp, ts_recv, out, n)")
        elif self.hoisted == "symbol":
            assert making[0].symbol is not None
            self._symbol_words(making[0].symbol, ())
            tick = f"np.int64({self.spec.tick_size})"
            out(f"instrument, n = _by_symbol(feed, w0, w1, w2, {tick}, seq, stamp, ts_recv, out, n)")

    # ---- stepping over groups and data

    def _at(self, path: tuple[str, ...]) -> list[SbeCase]:
        return [case for case in self.cases if case.path == path]

    def _needed(self, path: tuple[str, ...]) -> bool:
        """Whether events are made of a group's entries, of groups in them, or with their fields."""
        inside = any(case.path[: len(path)] == path for case in self.cases)
        return inside or any(case.joined and (case.joined[0],) == path for case in self.cases)

    def _least(self, path: tuple[str, ...]) -> int:
        """Bytes that a block must have for what is read of it."""
        ends = [source.field.offset + source.field.size for used, source in self.used
                if used == path and not source.guarded and source.leaf.constant is None]  # fmt: skip
        ends += [text.field.offset + text.field.size for case, text in self.texts
                 if text.field and not text.guarded and case.path[: text.depth] == path]  # fmt: skip
        return max(ends, default=0)

    def _walk(self, level: Level, path: tuple[str, ...], p: str, *, record: bool) -> None:
        """Step `p` over the groups and data of a level, beyond `end` if they leave the message. `record` keeps their places."""
        for group in level.groups:
            self._walk_group(level, group, (*path, group.name), p, record=record)
        for data in level.data:
            self._walk_data(level, data, path, p, record=record)

    def _walk_group(self, level: Level, group: Group, path: tuple[str, ...], p: str, *, record: bool) -> None:
        out, dimension, name = self.out, group.dimension, "_".join(path)
        kept = record and self._needed(path)
        if kept:
            out(f"at_{name}, num_{name}, k_{name} = end, np.int64(0), np.int64(0)")
        newer = f"version >= {group.since} and " if group.since > level.since else ""
        out(f"if {newer}{p} <= end:")
        out.indent()
        block, count = self.writer.member(dimension.block, p), self.writer.member(dimension.count, p)
        tag = f"_{len(path)}"
        out(f"block{tag}, count{tag} = np.int64({block}), np.int64({count})\n{p} += {dimension.size}")
        least = self._least(path) if self._needed(path) else 0
        out(f"if count{tag} > max(end - {p}, 0)" + (f" or (count{tag} > 0 and block{tag} < {least})" if least else "") + ":")
        out(f"    {p} = end + 1")
        out("else:")
        out.indent()
        if kept:
            out(f"at_{name}, num_{name}, k_{name} = {p}, count{tag}, block{tag}")
        if group.flat:
            out(f"{p} += count{tag} * block{tag}")
        else:
            out(f"for _{tag} in range(count{tag}):")
            out.indent()
            out(f"if {p} > end:\n    break\n{p} += block{tag}")
            self._walk(group, path, p, record=False)
            out.indent(-1)
        out.indent(-2)

    def _walk_data(self, level: Level, data: Data, path: tuple[str, ...], p: str, *, record: bool) -> None:
        out = self.out
        kept = record and any(text.data is data and case.path[: text.depth] == path for case, text in self.texts)
        name = "_".join((*path, data.name))
        if kept:
            out(f"at_{name}, len_{name} = end, np.int64(0)")
        newer = f"version >= {data.since} and " if data.since > level.since else ""
        out(f"if {newer}{p} <= end:")
        out(f"    length = np.int64({self.writer.member(data.length, p)})")
        if kept:
            out(f"    at_{name}, len_{name} = {p} + {data.size}, length")
        out(f"    {p} += {data.size} + length")

    # ---- entries

    def _entries(self, group: Group, path: tuple[str, ...]) -> None:
        """The loop over a group's entries, if events are made of them or of groups in them."""
        if not any(case.path[: len(path)] == path for case in self.cases):
            return
        out, depth, name, mine = self.out, len(path), "_".join(path), self._at(path)
        stop = "state[RESUME] = base{i}\n    return hold_last(feed, out, n, first), False"
        if group.flat and depth == 1:
            out(f"for i in range(max(done - base, 0), num_{name}):")
            out.indent()
            out("if n > room:\n    " + stop.format(i=" + i"))
            out(f"b1, k1 = at_{name} + i * k_{name}, k_{name}")
            self._unit(path, mine)
            out.indent(-1)
            out(f"base += num_{name}")
            return
        out(f"p{depth} = at_{name}\nfor i{depth} in range(num_{name}):")
        out.indent()
        out(f"b{depth}, k{depth} = p{depth}, k_{name}\np{depth} += k_{name}")
        self._walk(group, path, f"p{depth}", record=True)
        if mine:
            out("if base >= done:")
            out.indent()
            out("if n > room:\n    " + stop.format(i=""))
            self._unit(path, mine)
            out.indent(-1)
            out("base += 1")
        for inner in group.groups:
            self._entries(inner, (*path, inner.name))
        out.indent(-1)

    def _unit(self, path: tuple[str, ...], cases: Sequence[SbeCase]) -> None:
        """The events of the root or of one entry: the first case that fits, and those after one that says `go_on`."""
        out = self.out
        self._load_fields(path, cases)
        joined = next((case.joined for case in cases if case.joined), None)
        if joined:
            group, number = joined
            present = self._present(number)
            out(f"number = np.int64({self._raw(number)})" + (f" if {present} else np.int64(0)" if present else ""))
            out(f"known = number > 0 and number <= num_{group}")
            out(f"bj, kj = at_{group} + (number - 1) * k_{group} if known else b0, k_{group}")
        simple = len(cases) == 1 and not cases[0].when
        if not simple:
            out("hit, over = False, False")
        for case in cases:
            tests = [self._condition(condition) for condition in case.when]
            if case.joined:
                tests.append("known")
            test = " and ".join([*([] if simple else ["not over"]), *tests])
            out(f"if {test}:" if test else "if True:")
            out.indent()
            if not simple:
                out(f"hit, over = True, {not case.go_on}")
            self._case(case)
            out.indent(-1)
        if not simple and cases[-1].when:
            out("if not hit:\n    malformed[BAD_FIELD] += _ONE")
        elif simple and joined:
            out("else:\n    malformed[BAD_FIELD] += _ONE")
        self.loaded = {}

    def _load_fields(self, path: tuple[str, ...], cases: Sequence[SbeCase]) -> None:
        """Read the entry's fields once, into locals: what is written once is compiled once."""
        self.loaded = {}
        for source in (source for case in cases for source in _sources(case)):
            if source.depth != len(path) or source.guarded or source.leaf.constant is not None or source.field.size > 8:
                continue
            load = _load(dataclasses.replace(source.field, signed=False), self._base(source)[0])
            if load not in self.loaded:
                self.loaded[load] = f"f{len(self.loaded)}_{source.field.name.replace('.', '_')}"
                self.out(f"{self.loaded[load]} = {load}")

    def _with_locals(self, expression: str) -> str:
        for load, name in self.loaded.items():
            expression = expression.replace(load, name)
        return expression

    # ---- one event

    def _case(self, case: SbeCase) -> None:
        out = self.out
        if case.kind == "nothing":
            out("pass")
            return
        values: dict[str, str] = {}
        refusals: list[tuple[str, str]] = []
        for target, source in case.values.items():
            values[target], found = self._value(target, source)
            refusals += found
        if (lacks := self._lacks_code(case)) and not case.whole:
            refusals.insert(0, (lacks, "UNKNOWN_INSTRUMENT"))
        word = "if"
        for test, reason in refusals:
            out(f"{word} {test}:\n    malformed[{reason}] += _ONE")
            word = "elif"
        if refusals:
            out("else:")
            out.indent()
        if case.stamp and case.stamp.depth != 0:
            out(f"stamp = {self._time(case.stamp)}")
        if case.kind == "reference":
            self._reference(case, values)
        elif case.whole:
            self._whole(case, values)
        else:
            self._of_instrument(case, values)
        if refusals:
            out.indent(-1)

    def _reference(self, case: SbeCase, values: dict[str, str]) -> None:
        out = self.out
        assert case.symbol is not None
        self._symbol_words(case.symbol, case.path)
        out(f"tick = {values.get('tick_size', self.spec.tick_size)}")
        out(f"tick = tick if tick > 0 else np.int64({self.spec.tick_size})")
        if case.code:
            out(f"instrument, n = define(feed, {self._number(case.code)}, w0, w1, w2, tick, seq, stamp, ts_recv, out, n)")
        else:
            out("instrument, n = _by_symbol(feed, w0, w1, w2, tick, seq, stamp, ts_recv, out, n)")

    def _whole(self, case: SbeCase, values: dict[str, str]) -> None:
        if case.kind == "clear":
            values = {"aux": str(_MADE_HERE), **values}
            if self.spec.levels:
                self.out("clear_ladders(feed, seq)")
        self._put(case, values, "_ALL")

    def _of_instrument(self, case: SbeCase, values: dict[str, str]) -> None:
        out = self.out
        if not self.hoisted:
            if case.code:
                if case.kind == "clear" and "book" in values:  # of a book that has never been heard of there is nothing to clear
                    out(f"instrument = find_code(feed, {self._number(case.code)} | IMPLIED)")
                else:
                    self._book(case, values)
            elif case.symbol:
                self._symbol_words(case.symbol, case.path)
                tick = f"np.int64({self.spec.tick_size})"
                out(f"instrument, n = _by_symbol(feed, w0, w1, w2, {tick}, seq, stamp, ts_recv, out, n)")
        out("if instrument < RESOLVED_BELOW:")
        out.indent()
        if case.kind == "depth":
            out(f"n = set_depth(feed, instrument, {values['qty']}, {self.spec.levels}, seq, stamp, ts_recv, out, n)")
        else:
            if case.kind == "clear" and self.spec.levels:
                side = values.get("side", str(NO_SIDE))
                out(f"clear_ladder(feed, instrument, np.uint8({side}), {self.spec.ladder_levels})")
                out(f"if np.uint8({side}) == np.uint8({NO_SIDE}):\n    learn_ladder(feed, instrument, seq)")
            if "change" not in values:
                self._put(case, values, "instrument")
            else:  # which may become several events, or none
                position = f"np.int64({values['position']})"
                levels = f"np.int64({self.spec.levels})"
                shown = f"feed.depths[instrument] if feed.depths[instrument] > 0 else {levels}" if self.writer.depths else levels
                change = f"feed, np.int64({values['change']}), {position}, {shown}, np.int64({self.spec.ladder_levels})"
                self._put(case, values, "instrument", change=change)
        out.indent(-1)

    def _book(self, case: SbeCase, values: dict[str, str]) -> None:
        """The instrument by its code, or the one that is its book of implied orders."""
        assert case.code is not None
        book = f" | (IMPLIED if {values['book']} == 1 else _ZERO)" if "book" in values else ""
        self.out(f"instrument, n = _by_code(feed, {self._number(case.code)}{book}, seq, stamp, ts_recv, out, n)")

    def _put(self, case: SbeCase, values: dict[str, str], instrument: str, *, change: str = "") -> None:
        kind = int(Kind.GAP) if case.kind == "stale" else int(KINDS[case.kind])
        flags = " | ".join([str(case.flags), *(self._flag(test) for test in case.tests)])
        casts = {"price": "np.int64", "qty": "np.int64", "id": "np.uint64", "aux": "np.int64"}
        body = ", ".join(f"{cast}({values.get(name, '0')})" for name, cast in casts.items())
        side = f"np.uint8({values.get('side', NO_SIDE)})"
        place, what = "out, n, first, seq, stamp, ts_recv", f"{side}, np.uint16({flags})"
        if change:  # which may become several events, or none
            self.out(f"n = put_level({change}, {place}, {instrument}, {what},\n    {body})")
        else:
            self.out(f"n = put_event({place}, {instrument}, np.uint8({kind}), {what},\n    {body})")

    # ---- expressions

    def _base(self, source: Source) -> tuple[str, str]:
        return ("bj", "kj") if source.depth < 0 else (f"b{source.depth}", f"k{source.depth}")

    def _raw(self, source: Source) -> str:
        if source.leaf.constant is not None:
            return str(_constant(source))
        return self._with_locals(_load(source.field, self._base(source)[0]))

    def _present(self, source: Source) -> str | None:
        """Test whether this version of the message has the field; None if it must."""
        if not source.guarded:
            return None
        if source.leaf.constant is not None:
            return f"(version >= {source.leaf.since})"
        return f"(version >= {source.leaf.since} and {source.field.offset + source.field.size} <= {self._base(source)[1]})"

    def _number(self, code: Source) -> str:
        field = code.field
        raw = self._raw(dataclasses.replace(code, field=dataclasses.replace(field, signed=False)))
        return f"np.uint64({raw})"

    def _lacks_code(self, case: SbeCase) -> str:
        """Test whether a message does not say its instrument's code, as it is null or older than the field; nothing if it must."""
        return self._lacks(case.code) if case.code else ""

    def _time(self, stamp: Source) -> str:
        unit = f" * {self.spec.timestamp_unit_ns}" if self.spec.timestamp_unit_ns != 1 else ""
        since = "state[MIDNIGHT_NS] + " if self.spec.timestamp_since == "midnight" else ""
        raw = self._raw(stamp)
        tests = [self._present(stamp)] if stamp.guarded else []
        if stamp.field.null is not None:
            tests.append(f"not ({_equals(raw, stamp.field, [stamp.field.null])})")
        value = f"{since}np.int64({raw}){unit}"
        return f"({value} if {' and '.join(str(test) for test in tests)} else ts_recv)" if tests else value

    def _condition(self, condition: Condition) -> str:
        source = condition.source
        if source.leaf.constant is not None:
            return str(_constant(source) in condition.values if condition.null is None else not condition.null)
        raw, present = self._raw(source), self._present(source)
        if condition.null is None:
            test = " or ".join(f"{raw} == np.uint64({value})" for value in condition.values) if source.field.text else ""
            test = f"({test or _equals(raw, source.field, condition.values)})"
            kind = source.leaf.type
            none = kind.null if isinstance(kind, Enum) else source.field.null
            if present and none is not None and none in condition.values:  # what an older version lacks is null
                return f"(not {present} or {test})"
            return f"({present} and {test})" if present else test
        null = f"({_equals(raw, source.field, [source.field.null])})" if source.field.null is not None else "False"
        null = f"(not {present} or {null})" if present else null
        return null if condition.null else f"not {null}"

    def _flag(self, test: FlagTest) -> str:
        raw, present = self._raw(test.source), self._present(test.source)
        check = f"(np.int64({raw}) & {test.bits}) {'==' if test.wanted else '!='} {test.equals}"
        return f"({test.flag} if {present + ' and ' if present else ''}{check} else 0)"

    def _value(self, target: str, source: Source | int) -> tuple[str, list[tuple[str, str]]]:
        """Expression for an event field, and when to refuse: (test, reason)."""
        if isinstance(source, int):
            return str(source & ((1 << 64) - 1) if target == "id" else source), []
        if source.leaf.constant is not None and source.exponent is None:
            return self._folded(target, source)
        if source.exponent is not None:
            return self._rescaled(target, source)
        value, refusals = _by_distance(source.field, self._raw(source)) or self.writer._field_value(
            source.field, target, self._base(source)[0]
        )
        value, refusals = self._with_locals(value), [(self._with_locals(test), reason) for test, reason in refusals]
        present = self._present(source)
        if present is None:
            return value, refusals
        nothing = self._nothing(target, source)
        if nothing is None:
            return value, [(f"not {present}", "BAD_FIELD"), *refusals]
        cast = "np.uint64" if target == "id" else "np.int64"
        return f"({cast}({value}) if {present} else {cast}({nothing}))", [(f"{present} and ({test})", reason) for test, reason in refusals]

    def _nothing(self, target: str, source: Source) -> str | None:
        """What a field says that is not there; None: the event cannot do without it."""
        field = source.field
        if field.map is None:
            return "_NO_PRICE" if field.decimals >= 0 else "0"
        leaf = source.leaf
        null = leaf.type.null if isinstance(leaf.type, Enum) else leaf.primitive.null if leaf.null is None else int(leaf.null)
        null = null & 0xFF if null is not None and field.size == 1 else null
        found = field.map.get(null, field.map_default) if null is not None else field.map_default
        return None if found is None else str(found)

    def _folded(self, target: str, source: Source) -> tuple[str, list[tuple[str, str]]]:
        """The value of a constant field."""
        raw, field = _constant(source), source.field
        if field.map is not None:
            found = field.map.get(raw, field.map_default)
            return (str(found), []) if found is not None else ("0", [("True", "BAD_FIELD")])
        if field.decimals >= 0:
            raw *= 10 ** (9 - field.decimals)
        return str(raw & ((1 << 64) - 1) if target == "id" else raw), []

    def _rescaled(self, target: str, source: Source) -> tuple[str, list[tuple[str, str]]]:
        """A decimal whose exponent is on the wire, or that is not a price of at most 9 decimals."""
        out, field, scale = self.out, source.field, source.exponent
        raw, power = self._raw(source), self._raw(scale) if isinstance(scale, Source) else str(scale or 0)
        unscaled = self._lacks(scale) if isinstance(scale, Source) else ""
        tests = [f"not {test}" for test in (self._lacks(source),) if test]
        mantissa = f"np.int64({raw}) if {self._present(source)} else np.int64(0)" if source.guarded else f"np.int64({raw})"
        exponent = f"np.int64({power}) if not {unscaled} else np.int64(0)" if unscaled else f"np.int64({power})"
        out(f"v_{target}, exact_{target} = rescale({mantissa}, {exponent}, np.int64({source.digits}))")
        is_price = target in ("price", "tick_size") or (target == "aux" and source.digits == PRICE_DECIMALS)
        nothing = "_NO_PRICE" if is_price else "np.int64(0)"
        large = f" or {raw} > np.uint64({_I64_MAX})" if field.size == 8 and not field.signed and source.leaf.constant is None else ""
        refusals = [(unscaled, "BAD_FIELD")] if unscaled else []
        refusals.append((f"(not exact_{target}{large})", "PRICE_OVERFLOW"))
        if not tests:
            return f"v_{target}", refusals
        return f"(v_{target} if {tests[0]} else {nothing})", [(f"{tests[0]} and {test}", reason) for test, reason in refusals]

    def _lacks(self, source: Source) -> str:
        """Test whether a field is null or not there; nothing if it always has a value."""
        present, null = self._present(source), source.field.null
        tests = [f"not {present}"] if present else []
        if null is not None and source.leaf.constant is None:
            tests.append(f"({_equals(self._raw(source), source.field, [null])})")
        return f"({' or '.join(tests)})" if tests else ""

    def _symbol_words(self, text: Text, path: tuple[str, ...]) -> None:
        """``w0, w1, w2``: a symbol's words."""
        out = self.out
        if text.field:
            words, base = _words(text.field, f"b{text.depth}"), f"k{text.depth}"
            present = f"version >= {text.since} and {text.field.offset + text.field.size} <= {base}"
            assigned = f"w0, w1, w2 = {words}"
            out(f"w0, w1, w2 = _ZERO, _ZERO, _ZERO\nif {present}:\n    {assigned}" if text.guarded else assigned)
            return
        assert text.data is not None
        name = "_".join((*path[: text.depth], text.data.name))
        words = ", ".join(f"data_word(le64(buf, at_{name} + {8 * w}), len_{name} - {8 * w})" for w in range(3))
        out(f"w0, w1, w2 = trim_words({words})")
        out(f"if len_{name} > 24:\n    w0 = _ZERO  # longer than a symbol can be: unknown")


def _by_distance(field: Field, raw: str) -> tuple[str, list[tuple[str, str]]] | None:
    """A map from bytes in a row to numbers in a row, as most are: a subtraction, which costs less than a table. None for any other map."""
    if not field.map or field.size != 1 or field.map_default is not None:
        return None
    codes = sorted(field.map)
    distance = codes[0] - field.map[codes[0]]
    if codes[-1] - codes[0] + 1 != len(codes) or any(code - field.map[code] != distance for code in codes):
        return None
    refusals = ([f"{raw} < {codes[0]}"] if codes[0] else []) + ([f"{raw} > {codes[-1]}"] if codes[-1] < 255 else [])
    value = f"np.int64({raw}) - {distance}" if distance else f"np.int64({raw})"
    return value, [(f"({' or '.join(refusals)})", "BAD_FIELD")] if refusals else []


def _constant(source: Source) -> int:
    value = source.leaf.constant
    if isinstance(value, bytes):
        return int.from_bytes(value[:8], "little")
    return int(value or 0)


__all__ = ["SbeDecoderWriter"]
