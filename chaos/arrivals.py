"""When outputs arrive: a push consumer on every shard's output stream, and a look at the epoch of each frame's header.

All times are of one monotonic clock, in the process that reads, so that they compare with what else it does.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tickmesh.node.event import Kind
from tickmesh.node.frames import FrameError, decode_frame, stream_name, stream_subject
from tickmesh.transports.nats import NatsLink

_GAPS_KEPT = 1 << 20
_PENDING_MAX = 1 << 20


@dataclass
class EpochArrivals:
    """Frames of one epoch. Seconds of ``time.monotonic``.

    Attributes:
        first_s, last_s: when the first and the last of them arrived.
        frames: how many there were.
    """

    first_s: float
    last_s: float
    frames: int = 1


@dataclass
class ShardArrivals:
    """Frames of one shard.

    Attributes:
        epochs: by epoch.
        gaps_s: seconds between frames that follow each other under one epoch.
        last_s: when the last frame arrived; 0: there was none.
        longest_s: the longest time between two frames, of whatever epochs, since somebody set it to 0.
    """

    epochs: dict[int, EpochArrivals] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)
    last_s: float = 0.0
    longest_s: float = 0.0

    @property
    def epoch(self) -> int:
        """The highest that has been seen; 0: none."""
        return max(self.epochs, default=0)

    def take(self, epoch: int, at_s: float) -> None:
        """A frame has arrived."""
        self.longest_s = max(self.longest_s, at_s - self.last_s if self.last_s else 0.0)
        self.last_s = at_s
        known = self.epochs.get(epoch)
        if known is None:
            self.epochs[epoch] = EpochArrivals(at_s, at_s)
            return
        if len(self.gaps_s) < _GAPS_KEPT:
            self.gaps_s.append(at_s - known.last_s)
        known.last_s, known.frames = at_s, known.frames + 1

    def after(self, epoch: int) -> EpochArrivals | None:
        """The first epoch above this one; None: there is none yet."""
        later = [one for one in self.epochs if one > epoch]
        return self.epochs[min(later)] if later else None


class Arrivals:
    """Reads every shard's stream from now on; :meth:`start`, then :meth:`close`. The connection is the caller's."""

    def __init__(self, link: NatsLink, cluster: str, shards: int) -> None:
        self.shards = [ShardArrivals() for _ in range(shards)]
        self._link, self._cluster, self._subscriptions = link, cluster, list[Any]()
        self._news = asyncio.Event()
        self.told = False

    async def start(self) -> None:
        """Begin to read. Raises StreamMissing's cause, an error of JetStream, if a stream is not there."""
        jetstream = self._link.client.jetstream(timeout=5)
        for number in range(len(self.shards)):
            subscription = await jetstream.subscribe(
                stream_subject(self._cluster, number),
                stream=stream_name(self._cluster, number),
                ordered_consumer=True,
                deliver_policy=_new(),
                cb=self._taker(number),
                pending_msgs_limit=_PENDING_MAX,
            )
            self._subscriptions.append(subscription)

    async def close(self) -> None:
        """End it."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()

    def _taker(self, number: int) -> Any:
        shard = self.shards[number]

        async def take(message: Any) -> None:
            at_s = time.monotonic()
            if (message.headers or {}).get("Kind") == "fence":
                return
            try:
                header, events = decode_frame(message.data)
            except FrameError:
                return  # the checker tells of it
            if header.count:
                shard.take(header.epoch, at_s)
                self.told = self.told or bool((events["kind"] != Kind.TIMER).any())
                self._news.set()

        return take

    async def first_after(self, shard: int, epoch: int, limit_s: float) -> EpochArrivals | None:
        """The frames of the first epoch above `epoch`, once one has arrived; None: not within the limit."""
        end = time.monotonic() + limit_s
        while (found := self.shards[shard].after(epoch)) is None:
            self._news.clear()
            left_s = end - time.monotonic()
            if left_s <= 0:
                return None
            try:
                await asyncio.wait_for(self._news.wait(), left_s)
            except TimeoutError:
                return None
        return found

    async def quiet(self, silent_s: float, limit_s: float) -> bool:
        """Wait until nothing but TIMERs has arrived for so long; whether that came in time."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            self.told = False
            await asyncio.sleep(silent_s)
            if not self.told:
                return True
        return False

    def gaps_ms(self) -> dict[str, float]:
        """Percentiles of the time between frames while nothing happens: what a pause has to be compared with."""
        return percentiles([gap * 1000 for shard in self.shards for gap in shard.gaps_s])


def _new() -> Any:
    from nats.js.api import DeliverPolicy

    return DeliverPolicy.NEW


def percentiles(values_ms: list[float]) -> dict[str, float]:
    """Count, p50, p99 and max, in ms."""
    if not values_ms:
        return {"count": 0}
    p50, p99 = (float(one) for one in np.percentile(values_ms, [50, 99], method="higher"))
    return {"count": len(values_ms), "p50": round(p50, 1), "p99": round(p99, 1), "max": round(max(values_ms), 1)}
