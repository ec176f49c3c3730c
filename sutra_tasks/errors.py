"""Every exception of this package.

    SutraError
    ├── SettingsError               a SUTRA_* variable is wrong (ValueError)
    │   └── BrokerNotConfiguredError
    ├── InvalidInputError           the call can never succeed (ValueError)
    │   ├── InvalidTextError
    │   ├── TooLargeError
    │   ├── InvalidOptionError
    │   ├── TooLittleTextError
    │   ├── CallbackQueueError
    │   └── InvalidMessageError     a message on a queue is not one that a worker can run
    ├── MissingRightsError          the server's user may not do what is needed
    ├── ServerUnavailableError      a server does not answer; nothing was sent (ConnectionError)
    ├── UnsupportedVersionError     written by another version of this package
    ├── ResultRefusedError          the results server takes the result neither now nor later
    ├── CorruptResultError          stored vectors do not decode
    ├── CorruptMessageError         a message between workers does not decode
    ├── DeviceNameTakenError        another live worker has the name of this device
    ├── NoHealthyWorkersError       no device to send work to
    ├── FleetSaturated              more work waits than the fleet can do in time; nothing was sent
    ├── BackpressureSignal          a stream is full, or sheds low priorities; the entry was not accepted
    ├── UnconfirmedEntriesError     entries of a stream may have been sent
    ├── StreamFaultError            the server refuses for good what is to be done with a stream
    ├── PoisonMessageError          the workers that took this message died
    ├── EncodingError               a device failed on this text
    ├── IncompleteDocumentError     parts of a long text were lost
    ├── DistillationUnderWayError   another run makes the next version of this model
    ├── TrainingDivergedError       a distillation's loss exploded; its student became no version
    ├── PromotionRefusedError       a version of a model did not pass the gate; the old one serves on
    └── ModelError                  a model cannot be loaded or served
        └── SpaceUnavailableError   no model that is served gives vectors of the space

The arguments of an exception are its facts, positional and JSON: Celery stores them and makes the
exception anew from them, so that the caller's ``.get()`` raises the same class with the same attributes.
Texts are never among them.
"""

from __future__ import annotations

__all__ = [
    "BackpressureSignal",
    "BrokerNotConfiguredError",
    "CallbackQueueError",
    "CorruptMessageError",
    "CorruptResultError",
    "DeviceNameTakenError",
    "DistillationUnderWayError",
    "EncodingError",
    "FleetSaturated",
    "IncompleteDocumentError",
    "InvalidInputError",
    "InvalidMessageError",
    "InvalidOptionError",
    "InvalidTextError",
    "MissingRightsError",
    "ModelError",
    "NoHealthyWorkersError",
    "PoisonMessageError",
    "PromotionRefusedError",
    "ResultRefusedError",
    "ServerUnavailableError",
    "SettingsError",
    "SpaceUnavailableError",
    "StreamFaultError",
    "SutraError",
    "TooLargeError",
    "TooLittleTextError",
    "TrainingDivergedError",
    "UnconfirmedEntriesError",
    "UnsupportedVersionError",
]


class SutraError(Exception):
    """Base of every exception this package raises on purpose."""


class SettingsError(SutraError, ValueError):
    """A setting has a value that cannot be used."""

    def __init__(self, variable: str, value: str, reason: str) -> None:
        super().__init__(variable, value, reason)
        self.variable, self.value, self.reason = variable, value, reason

    def __str__(self) -> str:
        return f"{self.variable}={self.value!r}: {self.reason}"


class BrokerNotConfiguredError(SettingsError):
    """No broker is configured, so there is nowhere to send the texts."""

    def __init__(self) -> None:
        super().__init__("SUTRA_BROKER_URL", "", "not set")
        self.args = ()

    def __str__(self) -> str:
        return (
            "no broker is configured. Set SUTRA_BROKER_URL, for example "
            "SUTRA_BROKER_URL=redis://127.0.0.1:6379/0; `sutra up` starts a local fleet "
            "with its own server and prints the value to set."
        )


class InvalidInputError(SutraError, ValueError):
    """The call can never succeed, however often it is sent."""


class InvalidTextError(InvalidInputError):
    """One of the texts is not text that can be embedded."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason

    def __str__(self) -> str:
        return f"texts[{self.position}]: {self.reason}"


class TooLargeError(InvalidInputError):
    """The call is over a size limit; ``setting`` raises it."""

    def __init__(self, what: str, size: int, limit: int, setting: str) -> None:
        super().__init__(what, size, limit, setting)
        self.what, self.size, self.limit, self.setting = what, size, limit, setting

    def __str__(self) -> str:
        many = self.what.endswith("in one call")
        split = "Split the call (embed_many does it for you)" if many else "Split the text"
        return (
            f"{self.what}: {self.size:,} is over the limit of {self.limit:,}. {split} or raise "
            f"{self.setting}."
        )


class InvalidOptionError(InvalidInputError):
    """An option of ``embed`` has a value that this fleet cannot serve."""

    def __init__(self, option: str, value: str, expected: str) -> None:
        super().__init__(option, value, expected)
        self.option, self.value, self.expected = option, value, expected

    def __str__(self) -> str:
        return f"{self.option}={self.value}: expected {self.expected}"


class TooLittleTextError(InvalidInputError):
    """There are too few different texts to learn from and to measure on.

    Attributes:
        found: texts that can be used.
        needed: texts that are needed.
        bad_rows: rows that could not be read.
        left_out: texts that were found, but that are in labelled pairs, which are measured on.
    """

    def __init__(self, found: int, needed: int, bad_rows: int, left_out: int = 0) -> None:
        super().__init__(found, needed, bad_rows, left_out)
        self.found, self.needed, self.bad_rows, self.left_out = found, needed, bad_rows, left_out

    def __str__(self) -> str:
        bad = f" ({self.bad_rows:,} rows could not be read)" if self.bad_rows else ""
        held = (
            f" {self.left_out:,} more are left out: they are measured on, in labelled pairs."
            if self.left_out
            else ""
        )
        return (
            f"{self.found:,} different texts were found{bad}, and {self.needed:,} are needed: those "
            f"that are held out, and twice as many to learn from.{held} Add texts, or lower held_out."
        )


class CallbackQueueError(InvalidInputError):
    """A callback of another application names no queue, so no worker of that application gets it."""

    def __init__(self, task: str, option: str) -> None:
        super().__init__(task, option)
        self.task, self.option = task, option

    def __str__(self) -> str:
        return (
            f"{self.option}: the task {self.task!r} names no queue. Celery sends callbacks through "
            "the worker that ran embed, where this task is unknown; name the queue your own "
            f"workers consume: {self.task.rsplit('.', 1)[-1]}.s(...).set(queue='...')."
        )


class InvalidMessageError(InvalidInputError):
    """A message on a queue is not one that a worker can run; ``field`` is the first one at fault."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field} of the task's message: {self.reason}. docs/messages.md has the format"


class MissingRightsError(SutraError):
    """The user of a server may not run a command, or not use a key or a channel, that is needed.

    Attributes:
        user: of the access control list.
        missing: rules to add, as ``ACL SETUSER`` takes them in a shell: ``+publish '~sutra:fleet'
            '&celery-task-meta-*'``; empty if the server does not tell.
        variable: the setting with the address of the server.
        reason: what the server says, if it does not tell the rules.
    """

    def __init__(self, user: str, missing: str, variable: str, reason: str = "") -> None:
        super().__init__(user, missing, variable, reason)
        self.user, self.missing, self.variable, self.reason = user, missing, variable, reason

    def __str__(self) -> str:
        rules = [one.strip("'") for one in self.missing.split()]
        kinds = (("command", "+"), ("key", "~"), ("channel", "&"))
        names = [(kind, [one[1:] for one in rules if one[0] == sign]) for kind, sign in kinds]
        lacks = " and ".join(
            f"the {kind}{'s' if len(some) > 1 else ''} {', '.join(some)}" for kind, some in names if some
        )
        return (
            f"the user {self.user!r} of the server of {self.variable} may not use "
            f"{lacks or f'what is needed: {self.reason}'}. "
            f"Grant it with ACL SETUSER {self.user} {self.missing or '...'}. "
            "docs/servers.md has the least rights of each role."
        )


class ServerUnavailableError(SutraError, ConnectionError):
    """The broker or the results server does not answer, or refuses for now; nothing was sent.

    Attributes:
        reason: the name of the error, or what the server itself says.
        refused: whether the server answered: it is loading, full or a replica, say.
    """

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.refused = reason, refused
        self.args = (reason, refused) if refused else (reason,)

    def __str__(self) -> str:
        if self.refused:
            return (
                f"the server of SUTRA_BROKER_URL or SUTRA_RESULT_URL refuses for now: {self.reason} "
                "Nothing was sent. Send it again once the server is well."
            )
        return (
            f"the server of SUTRA_BROKER_URL or SUTRA_RESULT_URL does not answer ({self.reason}). "
            "Nothing was sent. Is it running, and is the address right?"
        )


class UnsupportedVersionError(SutraError):
    """Another version of this package wrote a message or a stored record."""

    def __init__(self, what: str, version: str, supported: int) -> None:
        super().__init__(what, version, supported)
        self.what, self.version, self.supported = what, version, supported

    def __str__(self) -> str:
        return (
            f"{self.what} has version {self.version}, and this sutra-tasks understands "
            f"{self.supported}. Run the same release on both sides."
        )


class ResultRefusedError(SutraError):
    """The results server takes a task's result neither now nor later; ``reason`` is its own words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the results server does not take the result of this task: {self.reason}"


class CorruptResultError(SutraError):
    """Stored vectors do not decode: this package did not write the record."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"stored vectors do not decode: {self.reason}"


class CorruptMessageError(SutraError):
    """A message between workers does not decode: this package did not write it."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} does not decode. Do all workers run the same release and model?"


class DeviceNameTakenError(SutraError):
    """Another worker that lives has the name of this device."""

    def __init__(self, device_id: str) -> None:
        super().__init__(device_id)
        self.device_id = device_id

    def __str__(self) -> str:
        return (
            f"a live worker has the name {self.device_id} already, and each device needs its own. Stop "
            "that worker, or set SUTRA_DEVICE_ID to another name; fleets that should not see each other "
            "on one server need a SUTRA_NAMESPACE each"
        )


class NoHealthyWorkersError(SutraError):
    """No live device took the work in time."""

    def __init__(self, known: int, oldest_heartbeat_s: float | None, waited_s: float) -> None:
        super().__init__(known, oldest_heartbeat_s, waited_s)
        self.known, self.oldest_heartbeat_s, self.waited_s = known, oldest_heartbeat_s, waited_s

    def __str__(self) -> str:
        seen = (
            "none has ever registered"
            if self.oldest_heartbeat_s is None
            else f"{self.known} known, the oldest heartbeat {self.oldest_heartbeat_s:.0f} s ago"
        )
        return (
            f"no live device after {self.waited_s:.0f} s ({seen}). "
            "`sutra status` lists the fleet; start devices with `sutra up`."
        )


class FleetSaturated(SutraError):  # noqa: N818 - a state of the fleet, not a fault
    """More work waits than ``SUTRA_MAX_QUEUE_S`` allows; nothing was sent."""

    def __init__(self, backlog_tokens: int, retry_after_s: float) -> None:
        super().__init__(backlog_tokens, retry_after_s)
        self.backlog_tokens, self.retry_after_s = backlog_tokens, retry_after_s

    def __str__(self) -> str:
        return (
            f"the fleet is saturated: {self.backlog_tokens:,} tokens wait. Nothing was sent. Try again "
            f"in {self.retry_after_s:.0f} s, add devices, or raise SUTRA_MAX_QUEUE_S."
        )


class BackpressureSignal(SutraError):  # noqa: N818 - a state of the stream, not a fault
    """A stream takes no more entries for now; nothing is lost.

    Attributes:
        size: entries that wait.
        capacity: entries that may wait; less than ``size`` if other producers ignore the signal.
        throttle_rate: the share of its unthrottled rate that a producer is asked to keep to.
        retry_after_s: seconds after which the stream should take entries again.
        accepted: how many of the call's entries, from the first on, are in the stream.
    """

    def __init__(
        self, size: int, capacity: int, throttle_rate: float, retry_after_s: float, accepted: int = 0
    ) -> None:
        super().__init__(size, capacity, throttle_rate, retry_after_s, accepted)
        self.size, self.capacity, self.accepted = size, capacity, accepted
        self.throttle_rate, self.retry_after_s = throttle_rate, retry_after_s

    def __str__(self) -> str:
        why = "is full" if self.size >= self.capacity else "sheds entries of low priority"
        return (
            f"the stream {why}: {self.size:,} entries wait, {self.capacity:,} may. Of this call "
            f"{self.accepted or 'nothing'} was accepted. Try again in {self.retry_after_s:.2f} s, "
            "add devices, or raise SUTRA_STREAM_BUFFER_SIZE."
        )


class UnconfirmedEntriesError(SutraError, ConnectionError):
    """The connection failed while entries were sent to a stream.

    Attributes:
        ids: of the entries that may be in the stream or not; all entries before them are in it.
        reason: of the connection.
    """

    def __init__(self, ids: list[str], reason: str) -> None:
        super().__init__(ids, reason)
        self.ids, self.reason = ids, reason

    def __str__(self) -> str:
        return (
            f"the server did not say whether it has the last {len(self.ids)} entries ({self.reason})."
            " Send them again with the same ids: readers drop what they have seen."
        )


class StreamFaultError(SutraError):
    """The server refuses for good what is to be done with a stream; other streams are not affected."""

    def __init__(self, stream: str, reason: str) -> None:
        super().__init__(stream, reason)
        self.stream, self.reason = stream, reason

    def __str__(self) -> str:
        return (
            f"the server refuses what is to be done with stream {self.stream}: {self.reason}. "
            f"`sutra stream status {self.stream}` names what is wrong with it."
        )


class PoisonMessageError(SutraError):
    """The workers that took this message died; it is kept as a dead letter."""

    def __init__(self, attempts: int, reason: str) -> None:
        super().__init__(attempts, reason)
        self.attempts, self.reason = attempts, reason

    def __str__(self) -> str:
        return (
            f"given up after {self.attempts} attempts: {self.reason}. It is kept: `sutra dead-letters "
            "list` shows a message, `sutra stream dead-letters` a stream's, and both can retry it."
        )


class EncodingError(SutraError):
    """The engine failed on this text; others of the same batch are not affected."""

    def __init__(self, device: str, position: int, reason: str) -> None:
        super().__init__(device, position, reason)
        self.device, self.position, self.reason = device, position, reason

    def __str__(self) -> str:
        return f"device {self.device} could not embed texts[{self.position}]: {self.reason}"


class IncompleteDocumentError(SutraError):
    """Parts of a long text were lost, and lost again when they were sent again.

    Attributes:
        missing: parts that were not embedded, or whose vectors are gone.
        parts: of the text.
        waited_s: seconds without progress; 0: the whole document is gone from the results server.
    """

    def __init__(self, missing: int, parts: int, waited_s: float) -> None:
        super().__init__(missing, parts, waited_s)
        self.missing, self.parts, self.waited_s = missing, parts, waited_s

    def __str__(self) -> str:
        if not self.waited_s:
            return (
                f"the results server lost the {self.parts} parts of a long text while they were "
                "computed. Were keys deleted by hand, or does its maxmemory-policy evict them? Send "
                "the text again."
            )
        return (
            f"{self.missing} of {self.parts} parts of a long text were not embedded after "
            f"{self.waited_s:.0f} s, though they were sent again. Were queues emptied by hand? "
            "Send the text again."
        )


class ModelError(SutraError):
    """A model cannot be found, loaded or served."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    def __str__(self) -> str:
        return f"model {self.model}: {self.reason}"


class SpaceUnavailableError(ModelError):
    """No model that is served gives vectors of the embedding space that was asked for."""

    def __init__(self, model: str, space: str, found: str) -> None:
        super().__init__(model, space)
        self.args = (model, space, found)
        self.space, self.found = space, found

    def __str__(self) -> str:
        return (
            f"model {self.model} gives vectors of the space {self.found}, not of {self.space}. Embed "
            "your texts anew, or name a version of the model that gives it: `sutra models list`."
        )


class DistillationUnderWayError(SutraError):
    """Another run makes the next version of this model."""

    def __init__(self, model: str, task: str) -> None:
        super().__init__(model, task)
        self.model, self.task = model, task

    def __str__(self) -> str:
        return f"task {self.task} makes the next version of {self.model}. Wait for it, or revoke it."


class TrainingDivergedError(SutraError):
    """The loss or the gradient of a distillation exploded; no version was added to the registry.

    Attributes:
        step: in which this was found, counted from 1.
        steps: of the whole training.
        figures: of the step, in words: JSON has no infinity.
        learning_rate: the recipe's.
        kept_step: the step of the last checkpoint, which is kept; None: there was none yet.
    """

    def __init__(
        self,
        step: int,
        steps: int,
        figures: str,
        learning_rate: float,
        kept_step: int | None,
    ) -> None:
        super().__init__(step, steps, figures, learning_rate, kept_step)
        self.step, self.steps, self.figures = step, steps, figures
        self.learning_rate, self.kept_step = learning_rate, kept_step

    def __str__(self) -> str:
        kept = (
            "There was no checkpoint yet"
            if self.kept_step is None
            else f"The checkpoint of step {self.kept_step:,} is kept"
        )
        remedy = (
            "Not even the first loss is a number: are the weights of teacher and student whole?"
            if self.step == 1
            else f"Lower learning_rate, which is {self.learning_rate:g}, to a tenth, or raise "
            "warmup_share or batch_size."
        )
        return (
            f"the training diverged at step {self.step:,} of {self.steps:,}: {self.figures}. {kept}, "
            f"and no version was added to the registry. {remedy}"
        )


class PromotionRefusedError(SutraError):
    """A version of a model did not pass the gate; the version before it serves on."""

    def __init__(self, model: str, version: int, reason: str) -> None:
        super().__init__(model, version, reason)
        self.model, self.version, self.reason = model, version, reason

    def __str__(self) -> str:
        return f"{self.model}@{self.version} was not promoted, and nothing changed: {self.reason}"
