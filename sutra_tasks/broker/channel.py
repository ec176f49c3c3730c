"""kombu's Redis channel for workers: taking a message and recording who has it are one step.

kombu pops a message and records it after; a process that is killed in between loses it, and what was
recorded is delivered again after an hour, also if its task still runs. This channel moves messages into
the process's in-flight list (:mod:`sutra_tasks.broker.in_flight`), and acknowledging removes them there.
No time limit is involved, so a long task is never delivered twice while it runs.

Leans on internals of kombu 5.7; ``tests/redis/test_channel.py`` compares it with kombu's own channel.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from itertools import count
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any

import redis
from celery.utils.log import get_logger
from kombu.transport import virtual

from sutra_tasks import keys
from sutra_tasks.broker.attempts import attempts_of
from sutra_tasks.broker.deliveries import DECODED, TAKEN, Message, QoS
from sutra_tasks.broker.in_flight import in_flight_of
from sutra_tasks.broker.load import MOST_CREDIT, tokens_of, weight_of
from sutra_tasks.broker.message_check import check_attempts, check_message, decode_body, parse
from sutra_tasks.broker.queues import requeue_target
from sutra_tasks.broker.refused import FAILED_PAUSE_S, refused_payload
from sutra_tasks.broker.requeue import NOT_ROUTED
from sutra_tasks.broker.take_protocol import TakeProtocol
from sutra_tasks.client import transport
from sutra_tasks.connections import pool_client
from sutra_tasks.errors import InvalidMessageError
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.broker.in_flight import InFlightMessages
    from sutra_tasks.broker.take_protocol import Taken

__all__ = ["Channel"]

logger = get_logger(__name__)


def _checked(
    raw: bytes, queue: str, *, most_bytes: int, most_attempts: int
) -> tuple[dict[str, Any], int]:
    """Return a message as kombu and Celery can handle it, and the tokens it has in a device's load.

    What no worker can run is replaced by a message of the task ``sutra.refused``.

    kombu would decode and decompress each body, however large it becomes. Here it is done once, with a
    limit, and not at all for a message that is only forwarded.
    """
    parsed: Any = None
    try:
        parsed = parse(raw)
        check_message(parsed, queue, most_bytes=most_bytes)
        runs_here = queue.startswith(keys.DEVICE_QUEUE_PREFIX) or queue in NOT_ROUTED
        decoded = decode_body(parsed, most_bytes=most_bytes) if runs_here else None
        if queue in NOT_ROUTED:  # routers give up the others
            check_attempts(attempts_of(parsed["headers"]), most_attempts)
    except InvalidMessageError as error:
        return refused_payload(parsed, error), weight_of(parsed)
    properties = {**parsed["properties"]}
    properties["delivery_info"] = {**(properties.get("delivery_info") or {})}
    payload = {**parsed, "properties": properties}
    if runs_here or queue == keys.EMBED_QUEUE:
        properties["body_encoding"] = None
        payload["headers"] = {k: v for k, v in parsed["headers"].items() if k != "compression"}
    if decoded is not None:
        payload["body"], payload[DECODED] = decoded
    return payload, weight_of(parsed)


def _nothing() -> None:
    """Do nothing, on the event loop: being called wakes it."""


class Channel(transport.Channel):
    """A channel whose consumers take into their process's in-flight list.

    Without an ``incarnation``, and for consumers that do not acknowledge, it is kombu's own.
    """

    QoS = QoS
    Message = Message
    # A name, not the object: Celery shows transport options to `inspect stats` and Flower.
    from_transport_options = (*transport.Channel.from_transport_options, "incarnation")
    incarnation: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._protocol: TakeProtocol | None = None  # from the first consumer that acknowledges
        self._unclaimed_target = ""
        self._has_unclaimed = False
        self._identified_socket: Any = None
        self._tags = count(1)
        self._connection_id: int | None = None
        super().__init__(*args, **kwargs)

    @cached_property
    def in_flight(self) -> InFlightMessages | None:
        """What this process has in flight; None for a channel that only sends."""
        return in_flight_of(self.incarnation) if self.incarnation else None

    @property
    def scripts(self) -> redis.Redis:
        """The client of our own keys, which carry the namespace; ``commands`` puts it before kombu's."""
        return pool_client(self.pool)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Start consuming; requeue first what a lost connection of this process left in flight."""
        acknowledges = not no_ack and queue not in self._fanout_queues
        if acknowledges and self._protocol is None and self.in_flight is not None:
            self._protocol = TakeProtocol(self.in_flight)
            self._unclaimed_target = requeue_target(queue)
            if moved := self.in_flight.requeue_unclaimed(self.scripts, self._unclaimed_target):
                logger.warning("%d messages of the lost connection were requeued", moved)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def acknowledge(self, message: Any) -> None:
        """Note that a message is done; the next take tells the server. From any thread."""
        if self.in_flight is not None and message.sutra_raw is not None:
            self.in_flight.acknowledge(message.sutra_raw)
            self.wake()
            if message.sutra_weight >= MOST_CREDIT:
                self._unblock()

    def forward(self, message: Any, device_id: str) -> None:
        """Move a delivered message to a device's queue, byte for byte, instead of handling it."""
        assert self.in_flight is not None
        priority = self._get_message_priority(message._raw)  # noqa: SLF001 - kombu's raw payload
        self.in_flight.forward(message.sutra_raw, device_id, priority, weight=message.sutra_weight)
        virtual.QoS.ack(self.qos, message.delivery_tag)
        self.wake()

    def requeue(self, message: Any) -> None:
        """Requeue a message, marked as redelivered; from any thread."""
        if self.in_flight is not None and message.sutra_raw is not None:
            target = requeue_target(message.sutra_queue)
            try:
                self.in_flight.requeue(
                    self.scripts, message.sutra_raw, target, failed=message.sutra_failed
                )
            except (OSError, redis.RedisError) as error:
                # Many threads at once may run out of connections.
                logger.warning("a message is requeued a little later: %s", error)
                self._has_unclaimed = True
                self.wake()
        else:  # read with basic_get, which records nothing
            info = message.delivery_info
            self._do_restore_message(
                message._raw,  # noqa: SLF001 - kombu's raw payload
                info["exchange"],
                info["routing_key"],
                self.commands,
                leftmost=False,
            )

    def requeue_all(self, messages: list[Any]) -> None:
        """Requeue the messages of a channel that closes, if the server can be reached."""
        if self.in_flight is None:
            return
        try:
            for message in messages:
                if message.sutra_raw is None:
                    self.requeue(message)
                else:
                    self.in_flight.consumer_gone(message.sutra_raw)
            if self._protocol is not None:
                self.in_flight.requeue_unclaimed(self.scripts, self._unclaimed_target)
        except (OSError, redis.RedisError) as error:
            logger.warning("messages in flight are requeued on reconnecting: %s", error)

    def wake(self) -> None:
        """Have the event loop send what is pending and take what there is, now. From any thread."""
        # While an answer is awaited, it wakes the loop: after IDLE_WAIT_S at the latest.
        listening = self._in_poll and not self.connection.cycle._paused_brpop  # noqa: SLF001
        if not listening and (loop := self._loop) is not None:
            loop.call_soon(_nothing)

    def close(self) -> None:
        """Requeue what is in flight while there is still a connection to do it on."""
        self._closing = True
        if self._in_poll:
            # Read the answer that is on its way first: what it brings must be requeued, too.
            with suppress(Empty, redis.RedisError, OSError):
                self._brpop_read()
        if not self.closed and self._qos is not None:
            self._qos.restore_unacked_once()
        super().close()

    # --- Sending and reading, where kombu's poller calls for BRPOP -------------------------------

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self._protocol is None:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self._has_unclaimed:
            self._requeue_unclaimed()
        commands = self._protocol.commands(
            queues, most_messages=self.qos.can_consume_max_estimate(), now=monotonic()
        )
        if not commands:
            return
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        try:
            self._identify(connection)
            connection.send_packed_command(connection.pack_commands(commands))
        except BaseException:
            self._protocol.connection_lost()
            raise

    def _requeue_unclaimed(self) -> None:
        assert self.in_flight is not None
        self._has_unclaimed = False  # first, because another thread may set it meanwhile
        try:
            self.in_flight.requeue_unclaimed(self.scripts, self._unclaimed_target)
        except BaseException:
            self._has_unclaimed = True
            raise

    def _brpop_read(self, **options: Any) -> bool:
        if self._protocol is None:
            return bool(super()._brpop_read(**options))
        connection, delivered = self.client.connection, False
        while self._protocol.awaits_answer:
            taken = self._read_answer(self._protocol, connection)
            if not self._protocol.awaits_answer:
                self._in_poll = None
            if self._closing:
                continue  # they stay in flight, and are requeued with the others
            delivered = delivered or bool(taken)
            self._deliver_all(taken)
            if self._protocol.awaits_answer and not connection.can_read(timeout=0):
                break
        if not delivered:
            raise Empty
        return True

    def _read_answer(self, protocol: TakeProtocol, connection: Any) -> list[Taken]:
        """Read the next answer, and return the messages it brings."""
        try:
            answer = connection.read_response()
        except redis.ResponseError as error:
            if pause_s := protocol.refused(error, monotonic()):
                logger.error("the server refuses to give messages: %s", error)  # noqa: TRY400 - no bug
                if (loop := self._loop) is not None:
                    loop.call_later(pause_s, _nothing)
            return []
        except self.connection_errors:
            protocol.connection_lost()
            self._in_poll = None
            connection.disconnect()
            raise
        return protocol.answered(answer, monotonic())

    def _deliver_all(self, taken: list[Taken]) -> None:
        """Deliver every message, also after one whose handling fails: all are in flight already."""
        failed: Exception | None = None
        for one in taken:
            try:
                self._deliver(one)
            except self.connection_errors as error:
                failed = failed or error
            except Exception:
                # Whatever a message does to this worker's code, it ends no worker and delays no other.
                logger.exception("a message could not be handled; it counts an attempt")
                self._requeue_failed(one)
        if failed is not None:
            raise failed

    def _requeue_failed(self, taken: Taken) -> None:
        """Requeue a message that this worker could not handle, after a pause of its own."""
        in_flight = self.in_flight
        assert in_flight is not None

        def requeue_it() -> None:
            for tag, message in list(self.qos._delivered.items()):  # noqa: SLF001 - kombu's own table
                if message.sutra_raw == taken.raw:
                    virtual.QoS.ack(self.qos, tag)  # it counts in the prefetch no more
            try:
                in_flight.requeue(self.scripts, taken.raw, requeue_target(taken.queue), failed=True)
            except (OSError, redis.RedisError) as error:
                logger.warning("a message is requeued a little later: %s", error)
                self._has_unclaimed = True

        loop = self._loop
        if loop is None:
            requeue_it()
        else:
            loop.call_later(FAILED_PAUSE_S, requeue_it)

    def _receive_one(self, c: Any) -> Any:
        # What was published to the channels of Celery's remote control; anybody can.
        try:
            return super()._receive_one(c)
        except (Empty, *self.connection_errors):
            raise
        except Exception as error:  # noqa: BLE001 - whatever was published
            logger.warning("ignored what was published and is no message: %r", error)
            raise Empty from None

    def _deliver(self, taken: Taken) -> None:
        assert self.in_flight is not None
        queue, raw = taken.queue, taken.raw
        self._queue_cycle.rotate(queue)
        options = settings()
        payload, weight = _checked(
            raw, queue, most_bytes=options.max_message_bytes, most_attempts=options.max_attempts
        )
        payload[TAKEN] = (raw, queue, weight)
        # Two messages of foreign senders may have the same tag, and would share an acknowledgement.
        payload["properties"]["delivery_tag"] = f"sutra-{next(self._tags)}"
        tokens = weight or tokens_of(payload)
        self.in_flight.delivered(raw, requeue_target(queue), tokens=tokens, weight=weight)
        self.connection._deliver(payload, queue)  # noqa: SLF001 - as kombu's own channel does

    # --- Its connection --------------------------------------------------------------------------

    @property
    def _loop(self) -> Any:
        """The event loop of this connection, if it has one."""
        return self.connection and self.connection.cycle.loop

    def _on_connection_disconnect(self, connection: Any) -> None:
        # kombu drops a connection it thinks stale and keeps this channel. The answer that was on its way
        # is never read, and what it brings stays in flight without a consumer.
        if self._protocol is not None and self._in_poll is connection:
            self._protocol.connection_lost()
            self._has_unclaimed = True
        super()._on_connection_disconnect(connection)

    def _identify(self, connection: Any) -> None:
        """Ask the server for its id of a new connection."""
        socket = connection._sock  # noqa: SLF001 - redis-py reconnects by itself
        if self._identified_socket is not socket:
            connection.send_command("CLIENT", "ID")
            self._connection_id = connection.read_response()
            self._identified_socket = socket

    def _unblock(self) -> None:
        """End a waiting ``BLMOVE``, so that a large message leaves the load at once. From any thread."""
        waits = self._protocol is not None and self._protocol.waits
        if waits and self._connection_id is not None:
            # If it has ended by itself, the server does nothing; if this fails, it will end soon.
            with suppress(redis.RedisError, OSError):
                self.scripts.client_unblock(self._connection_id)
