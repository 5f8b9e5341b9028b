"""The parts that FIX fields play in the messages that become events, as the compiled decoder knows them.

Which tags play them is said here for what is mapped without a word of configuration (:data:`CLASSES`), and for a source's own by
:mod:`tickmesh.node.fix_mapping`. This module imports nothing of ours: what is compiled depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

(
    SKIP, KNOWN, SYMBOL, SIDE, PRICE, QTY, ID, AUX, ACTION, TYPE, SEQ, SENDING_TIME, TIME, ENTRY_DATE, ENTRY_TIME, STATUS, TICK_SIZE,
    EXEC_TYPE, EXEC_TRANS, REF_ID, COUNT, POSS_DUP, SENDER, NEW_SEQ, ORDERS, ASK, ASK_QTY, OWN_SEQ, GAP_FILL, TRADE_ID, DATA_LENGTH,
    ORIGINAL_TIME,
) = range(32)  # fmt: skip
"""Slots: the part that a field plays. SKIP: the dictionary does not have it; KNOWN: it means nothing to us."""
SLOTS = 32
SLOT_MASK, SPECIAL, FREE, MEMBER = 31, 64, 32, 128
"""A role is a slot and bits: MEMBER belongs to an entry of the group, FREE may stand before the group too, SPECIAL begins an entry or,
where it is no MEMBER, announces a data field."""

OTHER, SNAPSHOT, INCREMENTAL, EXECUTION, SECURITY_STATUS, DEFINITION, DEFINITIONS, QUOTE, TRADE_REPORT = range(9)
"""Classes of messages; OTHER is counted, and watched for its sequence."""
CODES = 1 << 16
ROLES = 2 * CODES
"""Roles of a class: first by the digits of a tag of up to four, then by the number of a longer one."""

HEADER = {34: SEQ, 49: SENDER, 52: SENDING_TIME, 43: POSS_DUP, 122: ORIGINAL_TIME}


@dataclass(frozen=True)
class MessageClass:
    """How the messages of a class are read.

    Attributes:
        type: MsgType.
        name: what they are counted under.
        body: tag -> slot outside the group.
        count, delimiter: of its group; 0: none.
        entry: tag -> slot inside the group.
    """

    type: str
    name: str
    body: Mapping[int, int]
    count: int = 0
    delimiter: int = 0
    entry: Mapping[int, int] | None = None


_ENTRY = {269: TYPE, 270: PRICE, 271: QTY, 272: ENTRY_DATE, 273: ENTRY_TIME, 346: ORDERS, 54: SIDE, 278: TRADE_ID}
CLASSES = (
    MessageClass("", "other", {36: NEW_SEQ, 123: GAP_FILL}),
    MessageClass("W", "snapshot", {55: SYMBOL, 60: TIME}, 268, 269, _ENTRY),
    MessageClass("X", "incremental", {60: TIME}, 268, 279, {**_ENTRY, 279: ACTION, 55: SYMBOL, 280: REF_ID}),
    MessageClass(
        "8", "execution_report",
        {55: SYMBOL, 54: SIDE, 31: PRICE, 32: QTY, 17: TRADE_ID, 37: AUX, 60: TIME, 150: EXEC_TYPE, 20: EXEC_TRANS, 19: REF_ID},
    ),
    MessageClass("f", "security_status", {55: SYMBOL, 326: STATUS, 60: TIME}),
    MessageClass("d", "security_definition", {55: SYMBOL, 969: TICK_SIZE, 60: TIME}),
    MessageClass("y", "security_list", {60: TIME}, 146, 55, {55: SYMBOL, 969: TICK_SIZE}),
    MessageClass("S", "quote", {55: SYMBOL, 132: PRICE, 133: ASK, 134: QTY, 135: ASK_QTY, 60: TIME}),
    MessageClass("AE", "trade_report", {55: SYMBOL, 31: PRICE, 32: QTY, 571: TRADE_ID, 487: EXEC_TRANS, 572: REF_ID, 60: TIME}),
)  # fmt: skip
"""By the numbers of the classes, OTHER first."""
COUNTERS = (*(c.name for c in CLASSES), "heartbeat", "test_request", "resend_request", "reject", "sequence_reset", "logout", "logon")
ADMIN = {"0": 9, "1": 10, "2": 11, "3": 12, "4": 13, "5": 14, "A": 15}


@dataclass(frozen=True)
class FixTables:
    """What the decoder reads.

    Attributes:
        types: u8[65536]: the two bytes of a MsgType as a little-endian word -> index of :data:`COUNTERS`; the first are the classes.
        roles: u8, ROLES per class.
        data_tags: i32[65536]: length field -> its data field.
        groups: u8 per class: whether it has a group.
        by_order: `id` is mapped: books are kept by order.
    """

    types: npt.NDArray[np.uint8]
    roles: npt.NDArray[np.uint8]
    data_tags: npt.NDArray[np.int32]
    groups: npt.NDArray[np.uint8]
    by_order: bool


def empty_tables() -> FixTables:
    """Tables of the final types and sizes that map nothing."""
    types, roles = np.zeros(CODES, np.uint8), np.zeros(len(CLASSES) * ROLES, np.uint8)
    return FixTables(types, roles, np.zeros(CODES, np.int32), np.zeros(len(CLASSES), np.uint8), False)
