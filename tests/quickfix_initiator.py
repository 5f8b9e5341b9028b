"""The C++ engine `quickfix` as an initiator, in a process of its own: ``python quickfix_initiator.py SETTINGS USER PASSWORD``.

It subscribes to ALFA and BRVO whenever it is logged on, prints what comes (``logon``, ``logout``, or a message with ``|`` for the
separator), and takes lines from its input: ``order ID`` sends an order, ``stop`` logs out and ends it.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import quickfix as fix

USER, PASSWORD = sys.argv[2:4]


def say(text: str) -> None:
    print(text, flush=True)


class Application(fix.Application):
    """Prints everything."""

    def onCreate(self, session_id):
        self.session_id = session_id

    def onLogon(self, session_id):
        say("logon")
        self.requests = getattr(self, "requests", 0) + 1
        request = fix.Message()
        request.getHeader().setField(fix.MsgType("V"))
        for field in (fix.MDReqID(f"R{self.requests}"), fix.SubscriptionRequestType("1"), fix.MarketDepth(10), fix.MDUpdateType(1)):
            request.setField(field)
        types = fix.Group(267, 269)
        for kind in ("0", "1"):
            types.setField(fix.MDEntryType(kind))
            request.addGroup(types)
        symbols = fix.Group(146, 55)
        for name in ("ALFA", "BRVO"):
            symbols.setField(fix.Symbol(name))
            request.addGroup(symbols)
        fix.Session.sendToTarget(request, session_id)

    def onLogout(self, session_id):
        say("logout")

    def toAdmin(self, message, session_id):
        kind = fix.MsgType()
        message.getHeader().getField(kind)
        if kind.getValue() == "A":
            message.setField(fix.StringField(553, USER))
            message.setField(fix.StringField(554, PASSWORD))

    def fromAdmin(self, message, session_id):
        pass

    def toApp(self, message, session_id):
        pass

    def fromApp(self, message, session_id):
        say(message.toString().replace("\x01", "|"))

    def order(self, name):
        order = fix.Message()
        order.getHeader().setField(fix.MsgType("D"))
        fields = (fix.ClOrdID(name), fix.HandlInst("1"), fix.Symbol("ALFA"), fix.Side("1"), fix.OrderQty(100), fix.OrdType("1"))
        for field in fields:
            order.setField(field)
        order.setField(fix.StringField(60, f"{datetime.now(UTC):%Y%m%d-%H:%M:%S}"))
        fix.Session.sendToTarget(order, self.session_id)


def main() -> None:
    settings = fix.SessionSettings(sys.argv[1])
    application = Application()
    initiator = fix.SocketInitiator(application, fix.MemoryStoreFactory(), settings)
    initiator.start()
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "order":
            application.order(rest)
        elif word == "stop":
            break
    initiator.stop()
    say("stopped")


main()
