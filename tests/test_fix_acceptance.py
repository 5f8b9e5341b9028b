"""The public FIX 4.4 acceptance suite: conversations of the session level, each held with our acceptor over TCP."""

from __future__ import annotations

import asyncio
import os
from functools import cache
from pathlib import Path

import pytest
from fix_conversations import Conversation, Unexpected

from tickmesh.node.fix_dictionary import Dictionary, load_dictionary

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / "../shared/data"))
SCRIPTS = DATA / "fix_acceptance_fix44"
_SUITE = """
10_MsgSeqNumEqual 10_MsgSeqNumGreater 10_MsgSeqNumLess 11a_NewSeqNoGreater 11b_NewSeqNoEqual 11c_NewSeqNoLess 13b_UnsolicitedLogoutMessage
14a_BadField 14b_RequiredFieldMissing 14c_TagNotDefinedForMsgType 14d_TagSpecifiedWithoutValue 14e_IncorrectEnumValue
14f_IncorrectDataFormat 14g_HeaderBodyTrailerFieldsOutOfOrder 14h_RepeatedTag 14i_RepeatingGroupCountNotEqual
15_HeaderAndBodyFieldsOrderedDifferently 19a_PossResendMessageThatHAsAlreadyBeenSent 19b_PossResendMessageThatHasNotBeenSent
1a_ValidLogonMsgSeqNumTooHigh 1a_ValidLogonWithCorrectMsgSeqNum 1b_DuplicateIdentity 1c_InvalidSenderCompID 1c_InvalidTargetCompID
1d_InvalidLogonBadSendingTime 1d_InvalidLogonLengthInvalid 1d_InvalidLogonWrongBeginString 1e_NotLogonMessage 20_SimultaneousResendRequest
21_RepeatingGroupSpecifierWithValueOfZero 2a_MsgSeqNumCorrect 2b_MsgSeqNumTooHigh 2c_MsgSeqNumTooLow 2d_GarbledMessage
2e_PossDupAlreadyReceived 2e_PossDupNotReceived 2f_PossDupOrigSendingTimeTooHigh 2g_PossDupNoOrigSendingTime 2i_BeginStringValueUnexpected
2k_CompIDDoesNotMatchProfile 2m_BodyLengthValueNotCorrect 2o_SendingTimeValueOutOfRange 2q_MsgTypeNotValid 2r_UnregisteredMsgType
2t_FirstThreeFieldsOutOfOrder 3b_InvalidChecksum 3c_GarbledMessage 4a_NoDataSentDuringHeartBtInt 4b_ReceivedTestRequest 6_SendTestRequest
7_ReceiveRejectMessage 8_AdminAndApplicationMessages 8_OnlyAdminMessages 8_OnlyApplicationMessages AlreadyLoggedOn RejectResentMessage
ReverseRoute ReverseRouteWithEmptyRoutingTags SessionReset
"""
NAMES = _SUITE.split()
"""All of them."""

pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason=f"the acceptance suite is not at {SCRIPTS}")


@cache
def dictionary() -> Dictionary:
    return load_dictionary(DATA / "fix_dictionaries" / "FIX44.xml")


def test_no_conversation_of_the_suite_is_left_out() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in SCRIPTS.glob("*.def"))


@pytest.mark.parametrize("name", NAMES)
def test_the_acceptor_says_what_the_script_says(name: str) -> None:
    asyncio.run(Conversation(SCRIPTS / f"{name}.def", dictionary()).run())


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("34=2\x0149=ISLD", "34=3\x0149=ISLD"),
        ("112=HELLO\x0110=0", "112=HELLO\x0158=more\x0110=0"),
        ("eDISCONNECT", "E8=FIX.4.4\x0135=0\x01"),
    ],
    ids=["another sequence", "a field more", "a message in place of the end"],
)
def test_a_conversation_that_goes_otherwise_fails(said: str, wanted: str, tmp_path: Path) -> None:
    script = (SCRIPTS / "4b_ReceivedTestRequest.def").read_text(encoding="latin-1")
    assert said in script
    changed = tmp_path / "changed.def"
    changed.write_text(script.replace(said, wanted, 1), encoding="latin-1")
    with pytest.raises(Unexpected):
        asyncio.run(Conversation(changed, dictionary()).run())
