"""kombu's Redis transport with atomic taking: pop and record are one step.

Stock kombu pops with BRPOP and records the message after; a process killed between the two loses it,
and what it recorded comes back after an hour. Here a script moves messages from their queue to the
process's held list (:mod:`sutra_tasks.broker.in_flight`), and acknowledging removes them from it.
Nothing times out, so a long task is never delivered twice while it runs.

Only workers use this transport; any stock Celery client sends to them. It leans on internals of kombu
5.7, and ``tests/redis/test_channel.py`` holds it against the stock channel's behaviour.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from functools import cached_property
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import redis
from celery.utils.log import get_logger
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import loads

from sutra_tasks import keys
from sutra_tasks.broker.in_flight import held_by
from sutra_tasks.broker.queues import MOST_CREDIT, home, lanes
from sutra_tasks.broker.requeue import tokens_of, weight_of
from sutra_tasks.client import transport
from sutra_tasks.connections import no_retries

if TYPE_CHECKING:
    from sutra_tasks.broker.in_flight import HeldMessages

__all__ = ["Channel", "QoS", "Transport"]

logger = get_logger(__name__)

MOST_MESSAGES: Final = 16
MOST_BYTES: Final = 1 << 20
TAKE: Final = "take"
TELL: Final = "tell"
TAKEN: Final = "sutra_taken"
REFUSED_PAUSE_S: Final = 0.5
OTHER_END: Final = 8
"""One take in this many begins with the last priority, so that bulk is not starved by what is urgent."""

IDLE_WAIT_S: Final = 0.1
"""An idle worker waits on its first list and looks into the others this often."""


def _nothing() -> None:
    """Do nothing, on the event loop: being called is the point."""


class QoS(stock.QoS):  # type: ignore[misc]  # kombu is half typed
    """Deliveries of one channel; the server's side of them is the held list."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remember a delivery; taking it has already recorded it."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Finish a message; from any thread."""
        message = self._delivered.get(delivery_tag)
        if message is not None:  # else its connection is lost, and it was given back
            # In this order: finishing wakes the loop, which must see that there is room.
            virtual.QoS.ack(self, delivery_tag)
            self.channel.finish(message)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give a message back to the queue it belongs to, or drop it; from any thread."""
        message = self._delivered.get(delivery_tag)
        if message is not None and requeue:
            self.channel.give_back(message)
            virtual.QoS.ack(self, delivery_tag)
            self.channel.wake()
        else:
            self.ack(delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no message becomes visible by waiting."""

    def restore_unacked_once(self, stderr: Any = None) -> None:  # noqa: ARG002 - kombu's signature
        """Give back what is unfinished; what cannot be told now is reclaimed on reconnecting."""
        self._on_collect.cancel()
        self._flush()
        if self._delivered.restored:
            return
        self._delivered.restored = True
        self.channel.abandon(list(self._delivered.values()))
        self._delivered.clear()


class Channel(transport.Channel):
    """A consuming channel that takes into, and acknowledges from, a held list."""

    QoS = QoS
    # A name, not the object: Celery shows transport options to `inspect stats` and Flower.
    from_transport_options = (*stock.Channel.from_transport_options, "incarnation")
    incarnation: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._idle = False
        self._looked_at = 0.0
        self._expected: deque[str] = deque()
        self._home: str | None = None
        self._strays = False  # something may be held that nobody here has
        self._refused_until_s = 0.0
        self._takes = 0
        self._identified: Any = None
        self._connection_id: int | None = None
        super().__init__(*args, **kwargs)

    @cached_property
    def held(self) -> HeldMessages | None:
        """What this process holds; None for a channel that only sends."""
        return held_by(self.incarnation) if self.incarnation else None

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Start consuming; what a lost connection of this process left held goes back first."""
        # A consumer that does not acknowledge (of replies) has nothing to hold: it takes as stock does.
        if not no_ack and queue not in self._fanout_queues and self._home is None and self.held:
            self._home = home(queue)
            if returned := self.held.reclaim(self.commands, self._home):
                logger.warning("%d messages of the lost connection went back", returned)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def finish(self, message: Any) -> None:
        """Note an acknowledgement; the next take tells the server. From any thread."""
        if self.held is not None and message.sutra_raw is not None:
            self.held.finish(message.sutra_raw)
            self.wake()
            if message.sutra_weight >= MOST_CREDIT:
                self._unblock()

    def forward(self, message: Any, device_id: str) -> None:
        """Pass a delivered message on to a device, exactly as it came, instead of handling it."""
        assert self.held is not None
        priority = self._get_message_priority(message._raw)  # noqa: SLF001 - kombu's raw payload
        self.held.forward(
            message.sutra_raw,
            keys.device_queue(device_id),
            priority,
            load=keys.load(device_id),
            weight=message.sutra_weight,
        )
        virtual.QoS.ack(self.qos, message.delivery_tag)
        self.wake()

    def give_back(self, message: Any) -> None:
        """Return a message to the queue it belongs to, marked as redelivered; from any thread."""
        if self.held is not None and message.sutra_raw is not None:
            try:
                self.held.give_back(
                    self.commands,
                    message.sutra_raw,
                    home(message.sutra_queue),
                    failed=message.sutra_failed,
                )
            except (OSError, redis.RedisError) as error:
                # Many threads at once may even want for connections.
                logger.warning("a message goes back a little later: %s", error)
                self._strays = True
                self.wake()
        else:  # read with basic_get, which takes without recording
            info = message.delivery_info
            self._do_restore_message(
                message._raw,  # noqa: SLF001 - kombu's raw payload
                info["exchange"],
                info["routing_key"],
                self.commands,
                leftmost=False,
            )

    def abandon(self, messages: list[Any]) -> None:
        """Return the messages of a channel that closes, if the server can be reached."""
        if self.held is None:
            return
        try:
            for message in messages:
                if message.sutra_raw is None:
                    self.give_back(message)
                else:
                    self.held.abandon(message.sutra_raw)
            if self._home is not None:
                self.held.reclaim(self.commands, self._home)
        except (OSError, redis.RedisError) as error:
            logger.warning("held messages go back on reconnecting: %s", error)

    def wake(self) -> None:
        """Have the loop look at once for what there is to tell and to take. From any thread."""
        # With a take under way its answer wakes the loop, IDLE_WAIT_S from now at the latest.
        listening = self._in_poll and not self.connection.cycle._paused_brpop  # noqa: SLF001
        if not listening and (loop := self._loop) is not None:
            loop.call_soon(_nothing)

    def _unblock(self) -> None:
        """End a take that waits: a large load must not outlast the work. From any thread."""
        waits = bool(self._expected) and self._expected[-1] not in (TAKE, TELL)
        if waits and self._connection_id is not None:
            # If it has ended by itself, the server does nothing; if this fails, it will soon.
            with suppress(redis.RedisError, OSError):
                self.commands.client_unblock(self._connection_id)

    def _identify(self, connection: Any) -> None:
        """Learn how the server calls a new connection."""
        if self._identified is not connection._sock:  # noqa: SLF001 - redis-py reconnects by itself
            connection.send_command("CLIENT", "ID")
            self._connection_id = connection.read_response()
            self._identified = connection._sock  # noqa: SLF001 - as above

    @property
    def _loop(self) -> Any:
        """The event loop of this connection, if it has one."""
        return self.connection and self.connection.cycle.loop

    def close(self) -> None:
        """Give back what is held while there is still a connection to do it on."""
        self._closing = True
        if self._in_poll:
            # A take is under way: hear its answer first, or what it took would stay behind.
            with suppress(Empty, redis.RedisError, OSError):
                self._brpop_read()
        if not self.closed and self._qos is not None:
            self._qos.restore_unacked_once()
        super().close()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        # redis-py would retry with sleeps inside the event loop; Celery reconnects better.
        params: dict[str, Any] = super()._connparams(asynchronous)
        return params | {"retry": no_retries()}

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.held is None or self._home is None:
            super()._brpop_start(timeout)
            return
        if monotonic() < self._refused_until_s:
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self._strays:
            self._strays = False
            try:
                self.held.reclaim(self.commands, self._home)
            except BaseException:
                self._strays = True
                raise
        commands = self._next_commands(queues)
        if not commands:
            return
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        try:
            self._identify(connection)
            connection.send_packed_command(connection.pack_commands(commands))
        except BaseException:
            self._forget_expected()
            raise

    def _next_commands(self, queues: list[str]) -> list[tuple[Any, ...]]:
        """Return what to tell and to ask now, and expect the answers; nothing if there is neither."""
        assert self.held is not None
        queues = [queue for queue in queues if self.held.may_take(queue)]
        if not queues:
            if not self.held.has_news:
                return []
            self._expected.append(TELL)
            return [self.held.take_command((), room=0, most_bytes=0)]
        lists = [name for tier in zip(*map(lanes, queues), strict=True) for name in tier]
        commands: list[tuple[Any, ...]] = []
        # A first list that was empty a moment ago is worth waiting on, also behind news.
        waits = self._idle
        if self.held.has_news or not waits:
            self._takes += 1
            turn = -1 if self._takes % OTHER_END == 0 else 1
            room = min(self.qos.can_consume_max_estimate() or MOST_MESSAGES, MOST_MESSAGES)
            take = self.held.take_command(
                lists[::turn], room=max(1, room - waits), most_bytes=MOST_BYTES
            )
            commands.append(take)
            self._expected.append(TAKE)
        if waits:
            commands.append(("BLMOVE", lists[0], self.held.key, "RIGHT", "LEFT", IDLE_WAIT_S))
            self._expected.append(lists[0])
        return commands

    def _forget_expected(self) -> None:
        """Expect no answer any more: what was to be told is told again."""
        assert self.held is not None
        self._expected.clear()
        self.held.not_told()

    def _on_connection_disconnect(self, connection: Any) -> None:
        # kombu drops a connection it thinks stale and goes on with this channel: an answer that was
        # under way is never heard, and what it took would stay held.
        if self.held is not None and self._in_poll is connection:
            self._forget_expected()
            self._strays = True
        super()._on_connection_disconnect(connection)

    def _brpop_read(self, **options: Any) -> bool:
        if self.held is None or self._home is None:
            return bool(super()._brpop_read(**options))
        connection, delivered = self.client.connection, False
        while self._expected:
            expected = self._expected[0]
            try:
                answer = connection.read_response()
            except redis.ResponseError as error:
                self._refused(error)
                continue
            except self.connection_errors:
                self._forget_expected()
                self._in_poll = None
                connection.disconnect()
                raise
            self._expected.popleft()
            if not self._expected:
                self._in_poll = None
            taken = self._taken(expected, answer)
            if not self._closing:  # else they stay held, and go back with the rest
                delivered = bool(taken) or delivered
                self._deliver_all(taken)
            if self._expected and not self._closing and not connection.can_read(timeout=0):
                break
        if not delivered:
            raise Empty
        return True

    def _deliver_all(self, taken: list[tuple[bytes | str, bytes]]) -> None:
        """Deliver every message, also behind one whose handling fails: each is held already."""
        failed: Exception | None = None
        for source, raw in taken:
            try:
                self._deliver(source, raw)
            except Exception as error:  # noqa: BLE001 - raised below
                failed = failed or error
        if failed is not None:
            raise failed

    def _taken(self, expected: str, answer: Any) -> list[tuple[bytes | str, bytes]]:
        """Return what an answer brings, and decide whether to wait on the first list next."""
        assert self.held is not None
        if expected is TELL:
            self.held.told()
            return []
        if expected is TAKE:
            self.held.told()
            self._looked_at = monotonic()
            self._idle = not answer
            return list(zip(answer[::2], answer[1::2], strict=True))
        # While messages come one by one, waiting gets each at once; the other lists have their turn.
        self._idle = answer is not None and monotonic() - self._looked_at < IDLE_WAIT_S
        return [(expected, answer)] if answer is not None else []

    def _refused(self, error: redis.ResponseError) -> None:
        """Ask again, but not at once: the server refuses (its memory is full, say); nothing is lost."""
        assert self.held is not None
        if self._expected.popleft() in (TAKE, TELL):
            self.held.not_told()
        if not self._expected:
            self._in_poll = None
        self._idle = False
        self._refused_until_s = monotonic() + REFUSED_PAUSE_S
        logger.error("the server refuses to give messages: %s", error)
        if (loop := self._loop) is not None:
            loop.call_later(REFUSED_PAUSE_S, _nothing)

    def _deliver(self, source: bytes | str, raw: bytes) -> None:
        assert self.held is not None
        name = source.decode() if isinstance(source, bytes) else source
        queue = name.partition(self.sep)[0]
        self._queue_cycle.rotate(queue)
        try:
            payload = loads(raw)
            payload["properties"]["delivery_tag"]
            weight = weight_of(payload)
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.error("dropped %d bytes in %s that are no message", len(raw), queue)  # noqa: TRY400
            self.held.finish(raw)
            return
        payload[TAKEN] = (raw, queue, weight)
        self.held.delivered(raw, home(queue), tokens=weight or tokens_of(payload), weight=weight)
        self.connection._deliver(payload, queue)  # noqa: SLF001 - as kombu's own channel does

    class Message(virtual.Message):  # type: ignore[misc]  # kombu is half typed
        """A delivery that remembers the bytes it was taken as: the held list knows it by them."""

        def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
            self.sutra_raw, self.sutra_queue, self.sutra_weight = payload.pop(TAKEN, (None, None, 0))
            self.sutra_failed = False
            super().__init__(payload, channel=channel, **kwargs)


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]  # kombu is half typed
    """kombu's poller, without a system call for each socket at each turn of the loop."""

    # Kept here: kombu forgets its current loop when Celery resets it, at the first lost connection.
    loop: Any = None

    @property
    def fds(self) -> dict[int, Any]:
        """The sockets the event loop does not listen to yet; without a loop, all of them."""
        found: dict[int, Any] = super().fds
        loop = self.loop
        return found if loop is None else {fd: c for fd, c in found.items() if fd not in loop.readers}


class Transport(stock.Transport):  # type: ignore[misc]  # kombu is half typed
    """The transport of worker processes: ``broker_transport`` in their settings."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Serve a connection from ``loop``."""
        self.cycle.loop = loop
        super().register_with_event_loop(connection, loop)

    def _reject_inbound_message(self, raw_message: dict[str, Any]) -> None:
        # A message of a queue whose consumer was just cancelled: it is held, so it goes back.
        for channel in self.channels:
            if channel and channel.held is not None and (TAKEN in raw_message):
                raw, queue, _ = raw_message[TAKEN]
                channel.held.give_back(channel.commands, raw, home(queue))
                return
        super()._reject_inbound_message(raw_message)
