"""The Celery app of this package, which works beside the Celery app of a Django or Flask project.

It does not become the current or default app of the process that imports it, shares no tasks with other
apps, installs no fix-ups, and takes nothing from the ``CELERY_*`` environment variables of another app.
A process may fork at any time: the child connects anew.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from celery import Celery
from celery.app.utils import Settings as CelerySettings
from celery.local import PromiseProxy
from kombu import pools
from kombu.utils.objects import cached_property as kombu_property

from sutra_tasks.settings import forget_foreign_variables

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Sutra", "app"]

_WITH_LOCKS: Final = (
    "celery.app.amqp", "celery.app.base", "celery.app.control", "celery.backends.redis",
    "celery.canvas", "kombu.connection", "kombu.transport.redis",
)  # fmt: skip
"""Modules with classes whose cached properties have a lock that a call takes."""


class OwnSettings(CelerySettings):  # type: ignore[misc]  # Celery is untyped
    """Celery's settings, without the environment variables that Celery puts before them."""

    @property
    def broker_url(self) -> Any:
        """The broker of this app; not ``CELERY_BROKER_URL``."""
        return self.get("broker_url")

    broker_read_url = broker_write_url = broker_url

    @property
    def result_backend(self) -> Any:
        """The result backend of this app; not ``CELERY_RESULT_BACKEND``."""
        return self.get("result_backend")


class _UserOptions(defaultdict[str, set[Any]]):
    """Options of the ``celery`` command that this app adds: none.

    The command asks for them once it has found the app, and before it reads the options of ``worker``,
    ``beat`` or ``flower``, which it also takes from ``CELERY_WORKER_POOL`` and the like.
    """

    def get(self, *_: Any) -> Any:
        forget_foreign_variables()
        return ()


class Sutra(Celery):  # type: ignore[misc]  # Celery is untyped
    """Celery, with :class:`~sutra_tasks.client.results.EmbedResult` as ``app.AsyncResult``.

    In a child of a process that used it, it drops the parent's connections and locks: before the child
    runs on, and if something forks without telling Python, as uWSGI does, at the child's first call.
    """

    _backend_cache: Any
    _process = os.getpid()
    _first_use = threading.RLock()
    """Held while connections are made: threads that call first must not make them twice."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        object.__setattr__(self._conf, "__class__", OwnSettings)
        self.user_options = _UserOptions(set)

    def task(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """Make a task of this app, on its first use; a decorator, with or without options.

        Celery's own gives the task to the current app where ``FORKED_BY_MULTIPROCESSING`` is set: in
        processes that a worker of another app has started.
        """
        if function is None:
            return partial(self.task, **options)
        options.pop("shared", None)
        if self.finalized:
            return self._task_from_fun(function, **options)
        made = PromiseProxy(self._task_from_fun, (function,), options, __doc__=function.__doc__)
        self._pending.append(made)
        return made

    def _connection(self, url: Any, *args: Any, **options: Any) -> Any:
        """Celery's hook for every connection to the broker: its URL is that of the address."""
        address = self.conf.broker_transport_options.get("address")
        return super()._connection(url if address is None else str(address), *args, **options)

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


# The loader is named, because Celery would take it from CELERY_LOADER.
app = Sutra("sutra", loader="celery.loaders.app:AppLoader", set_as_current=False, fixups=[])
app.config_from_object("sutra_tasks.celery_settings:CLIENT")
os.register_at_fork(after_in_child=app.leave_parent)
