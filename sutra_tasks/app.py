"""The Celery app of this package, which works beside the Celery app of a Django or Flask project.

It does not become the current or default app of the process that imports it, shares no tasks with other
apps, and installs no fix-ups. A process may fork at any time: the child connects anew.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import cached_property
from typing import Any, Final

from celery import Celery
from kombu import pools
from kombu.utils.objects import cached_property as kombu_property

__all__ = ["Sutra", "app"]

_WITH_LOCKS: Final = (
    "celery.app.amqp", "celery.app.base", "celery.app.control", "celery.backends.redis",
    "celery.canvas", "kombu.connection", "kombu.transport.redis",
)  # fmt: skip
"""Modules with classes whose cached properties have a lock that a call takes."""


class Sutra(Celery):  # type: ignore[misc]  # Celery is untyped
    """Celery, with :class:`~sutra_tasks.client.results.EmbedResult` as ``app.AsyncResult``.

    In a child of a process that used it, it drops the parent's connections and locks: before the child
    runs on, and if something forks without telling Python, as uWSGI does, at the child's first call.
    """

    _backend_cache: Any
    _process = os.getpid()
    _first_use = threading.RLock()
    """Held while connections are made: threads that call first must not make them twice."""

    @cached_property
    def AsyncResult(self) -> Any:  # noqa: N802 - Celery's name
        """The class of this app's results."""
        return self.subclass_with_self("sutra_tasks.client.results:EmbedResult", keep_reduce=True)

    @cached_property
    def GroupResult(self) -> Any:  # noqa: N802 - Celery's name
        """The class of the results of this app's groups."""
        return self.subclass_with_self("sutra_tasks.client.results:EmbedGroupResult", keep_reduce=True)

    @property
    def backend(self) -> Any:
        """The result backend of this process."""
        self.leave_parent()
        if self._backend_cache is not None:  # no lock: the garbage collector comes here, too
            return self._backend_cache
        with self._first_use:
            return super().backend

    @property
    def pool(self) -> Any:
        """The connections to the broker of this process."""
        self.leave_parent()
        with self._first_use:
            return super().pool

    @property
    def producer_pool(self) -> Any:
        """The producers of this process."""
        self.leave_parent()
        with self._first_use:
            return super().producer_pool

    def leave_parent(self) -> None:
        """Drop what belongs to the parent, if this process was forked and has not done so."""
        if os.getpid() != self._process:
            self._after_fork()

    def _after_fork(self) -> None:
        """Celery's hook in a forked child: close the parent's sockets here, and forget its locks."""
        self._process = os.getpid()
        # A thread of the parent may have held any lock, and does not exist in this process.
        self._finalize_mutex, self._first_use = threading.RLock(), threading.RLock()
        self.clock.mutex = threading.Lock()
        _renew_locks_of_properties()
        transport = sys.modules.get("sutra_tasks.client.transport")
        for channel in list(transport.Channel.all) if transport is not None else ():
            channel.abandon()
        if hasattr(self._backend_cache, "abandon"):
            self._backend_cache.abandon()
        self._backend_cache = None
        # kombu keeps a pool for each address, and would give this process the parent's.
        producers = self.amqp._producer_pool if "amqp" in self.__dict__ else None  # noqa: SLF001 - no other way
        for group, used in ((pools.connections, self._pool), (pools.producers, producers)):
            for address in [address for address, one in group.items() if one is used]:
                dict.__delitem__(group, address)  # it is a hash, which the group would hash again
        # Names of reply queues: replies to the parent are not for this process.
        self.__dict__.pop("oid", None)
        self.__dict__.pop("control", None)
        self._local = threading.local()
        super()._after_fork()


def _renew_locks_of_properties() -> None:
    modules = [sys.modules[name] for name in _WITH_LOCKS if name in sys.modules]
    classes = {one for module in modules for one in vars(module).values() if isinstance(one, type)}
    for attribute in [attribute for one in classes for attribute in vars(one).values()]:
        if isinstance(attribute, kombu_property):
            attribute.lock = threading.RLock()


app = Sutra("sutra", set_as_current=False, fixups=[])
app.config_from_object("sutra_tasks.celery_settings:CLIENT")
app.loader.override_backends = dict.fromkeys(
    ("redis", "rediss"), "sutra_tasks.client.results:ResultBackend"
)
os.register_at_fork(after_in_child=app.leave_parent)
