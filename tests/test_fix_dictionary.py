"""QuickFIX dictionaries: real ones, faulty ones, and what they say about a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from fix_messages import feed_of, message, of_type, options_of, read_all
from replays import DATA

from tickmesh.control.config import Checks, ConfigError, parse_config
from tickmesh.node.config_checks import config_checks
from tickmesh.node.event import Kind
from tickmesh.node.fix_dictionary import DictionaryError, FieldDef, RejectReason, load_dictionary
from tickmesh.node.fix_feed import FixFeed
from tickmesh.node.fix_frame import Message, MessageStream
from tickmesh.node.instruments import InstrumentTable

FOLDER = DATA / "fix_dictionaries"
SMALL = """<fix type='FIX' major='4' minor='4'>
 <header><field name='BeginString' required='Y'/><field name='BodyLength' required='Y'/><field name='MsgType' required='Y'/>
  <field name='SenderCompID' required='Y'/><field name='MsgSeqNum' required='Y'/><field name='SendingTime' required='Y'/></header>
 <trailer><field name='CheckSum' required='Y'/></trailer>
 <messages><message name='Note' msgtype='B' msgcat='app'><field name='Urgency' required='N'/><component name='Lines' required='Y'/>
   <field name='BlobLen' required='N'/><field name='Blob' required='N'/></message></messages>
 <components><component name='Lines'><group name='NoLines' required='Y'><field name='Line' required='Y'/><field name='Size' required='N'/>
   <group name='NoWords' required='N'><field name='Word' required='N'/></group></group></component></components>
 <fields><field number='8' name='BeginString' type='STRING'/><field number='9' name='BodyLength' type='LENGTH'/>
  <field number='35' name='MsgType' type='STRING'/><field number='49' name='SenderCompID' type='STRING'/>
  <field number='34' name='MsgSeqNum' type='SEQNUM'/><field number='52' name='SendingTime' type='UTCTIMESTAMP'/>
  <field number='10' name='CheckSum' type='STRING'/><field number='61' name='Urgency' type='CHAR'>
   <value enum='0' description='NORMAL'/></field>
  <field number='33' name='NoLines' type='NUMINGROUP'/><field number='58' name='Line' type='STRING'/>
  <field number='600' name='Size' type='QTY'/>
  <field number='601' name='NoWords' type='NUMINGROUP'/><field number='602' name='Word' type='STRING'/>
  <field number='5000' name='BlobLen' type='LENGTH'/><field number='5001' name='Blob' type='DATA'/></fields></fix>"""
NOTE = "35=B|49=A|34=1|52=20260102-10:00:00|"


def small(tmp_path: Path, text: str = SMALL) -> Path:
    path = tmp_path / "SMALL.xml"
    path.write_text(text)
    return path


def parsed(body: str) -> Message:
    (found,) = MessageStream().feed(message(NOTE + body))
    return found


@pytest.mark.parametrize(
    ("name", "session", "version", "fields"),
    [("FIX42.xml", None, "FIX.4.2", 405), ("FIX44.xml", None, "FIX.4.4", 912), ("FIX50SP2.xml", "FIXT11.xml", "FIXT.1.1", 6028)],
)
def test_real_dictionaries(name: str, session: str | None, version: str, fields: int) -> None:
    if not (FOLDER / name).exists():
        pytest.skip(f"no dictionary {FOLDER / name}; set TICKMESH_DATA")
    read = load_dictionary(FOLDER / name, FOLDER / session if session else None)
    assert (read.version, len(read.fields)) == (version, fields)
    snapshot, increment = read.messages["W"].group(268), read.messages["X"].group(268)
    assert snapshot is not None
    assert increment is not None
    assert (snapshot.delimiter, increment.delimiter) == (269, 279)
    assert {95: 96, 354: 355, 90: 91}.items() <= read.data_pairs.items()
    assert read.tag("MDEntryPx") == read.tag("270") == 270
    assert read.fields[269].values["0"] == "BID"
    logon = read.messages["A"]
    assert logon.admin
    assert [use.tag for use in logon.members if use.required] == ([98, 108] if session is None else [98, 108, 1137])


def test_a_real_dictionary_in_a_source() -> None:
    if not (FOLDER / "FIX44.xml").exists():
        pytest.skip(f"no dictionary in {FOLDER}; set TICKMESH_DATA")
    options = options_of("fix:FIX44.xml", 'quantity_exponent = 0\nfields = { aux = "OrderID", price = "MDEntryPx" }\n')
    feed = FixFeed(options, InstrumentTable(8), folder=FOLDER)
    events = read_all(feed, [of_type("X", 1, "262=r|268=1|279=0|269=2|55=ABC|270=1|271=2|37=77|9999=x|20001=y")])
    assert events[-1]["kind"] == Kind.TRADE
    assert events[-1]["aux"] == 77
    assert feed.counters()["unknown_tags"] == 2


def test_a_dictionary_says_what_is_data_and_what_begins_an_entry(tmp_path: Path) -> None:
    read = load_dictionary(small(tmp_path))
    assert read.data_pairs == {5000: 5001}
    group = read.messages["B"].group(33)
    assert group is not None
    assert (group.delimiter, group.required, list(group.tags())) == (58, True, [33, 58, 600, 601, 602])
    stream = MessageStream(dict(read.data_pairs))
    (found,) = stream.feed(message(b"35=B\x015000=3\x015001=a\x01b\x01"))
    assert found.get(5001) == b"a\x01b"


@pytest.mark.parametrize(
    ("body", "reason", "tag"),
    [
        ("33=1|58=x", None, 0),
        ("33=2|58=x|600=1.5|601=2|602=a|602=b|58=y", None, 0),
        ("61=0|33=0", None, 0),
        ("61=0", RejectReason.REQUIRED_TAG_MISSING, 33),
        ("33=1|58=x|61=7", RejectReason.VALUE_INCORRECT, 61),
        ("33=x|58=x", RejectReason.BAD_FORMAT, 33),
        ("33=2|58=x", RejectReason.GROUP_COUNT, 33),
        ("33=1|600=1|58=x", RejectReason.GROUP_OUT_OF_ORDER, 33),
        ("33=1|58=x|58=y", RejectReason.GROUP_COUNT, 33),
        ("33=1|58=x|600=abc", RejectReason.BAD_FORMAT, 600),
        ("33=1|58=x|61=", RejectReason.TAG_WITHOUT_VALUE, 61),
        ("33=1|58=x|61=0|61=0", RejectReason.TAG_REPEATED, 61),
        ("33=1|58=x|777=1", RejectReason.UNDEFINED_TAG, 777),
        ("33=1|58=x|49=B", RejectReason.TAG_REPEATED, 49),
        ("33=4000000000|58=x", RejectReason.GROUP_COUNT, 33),
    ],
)
def test_what_a_session_would_reject(tmp_path: Path, body: str, reason: RejectReason | None, tag: int) -> None:
    found = load_dictionary(small(tmp_path)).check(parsed(body).fields)
    assert (found.reason, found.tag) == (reason, tag) if found else reason is None


def test_custom_tags(tmp_path: Path) -> None:
    read = load_dictionary(small(tmp_path)).with_fields([FieldDef(7001, "DeskCode", "INT")], ["B"])
    assert read.tag("DeskCode") == 7001
    assert read.check(parsed("33=0|7001=5").fields) is None
    rejected = read.check(parsed("33=0|7001=x").fields)
    assert rejected is not None
    assert rejected.reason == RejectReason.BAD_FORMAT


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("<fix ", "<fox ", "not XML"), ("major='4'", "", "no QuickFIX dictionary"), ("number='61'", "number='x'", "is no tag"),
        ("number='61'", "number='58'", "has the tag 58"), ("name='Size' required", "name='Sise' required", "there is no field 'Sise'"),
        ("component name='Lines' required", "component name='Nope' required", "there is no component 'Nope'"),
        ("msgtype='B'", "", "no msgtype"),
        ("<field name='Word' required='N'/>", "", "no field to begin an entry"),
        ("<field name='Word' required='N'/>", "<component name='Lines' required='N'/>", "a circle"),
        ("<field name='MsgType' required='Y'/>", "", "no header of its own"),
    ],
)  # fmt: skip
def test_faulty_dictionaries(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in SMALL
    with pytest.raises(DictionaryError, match=problem):
        load_dictionary(small(tmp_path, SMALL.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('data_format = "fix:nowhere.xml"', "cannot be read"),
        ('data_format = "fix:SMALL.xml"\nfields = { aux = "Nonsense" }', "is no field"),
        ('data_format = "fix44"\nfields = { aux = "OrderID" }', "names need a dictionary"),
        ('data_format = "fix44"\nfields = { aux = 34 }', "meaning of its own"),
        ('data_format = "fix44"\nfields = { aux = 5001, id = 5001 }', "feeds aux already"),
        ('data_format = "fix44"\nfields = { price = { path = "270", scale = 2 } }', "has no meaning for FIX"),
        ('data_format = "fix44"\nframing = "moldudp64"', "has no meaning for FIX"),
        ('type = "pcap"\ndata_format = "fix44"', "FIX is a stream"),
        ('data_format = "fix44"\nevent = "trade"', "has no meaning for 'fix44'"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_work(tmp_path: Path, body: str, problem: str) -> None:
    small(tmp_path)
    checks: Checks = config_checks(tmp_path)
    kind = "" if body.startswith("type") else 'type = "file"\n'
    with pytest.raises(ConfigError, match=problem):
        parse_config(f'[data_sources.s]\n{kind}path = "x"\n{body}\n', "mesh.toml", checks)


def test_a_feed_without_dictionary_needs_no_file() -> None:
    assert feed_of(options_of("fix42")).messages == {}
