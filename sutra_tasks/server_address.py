"""The address of a server: the one parser of ``SUTRA_BROKER_URL`` and ``SUTRA_RESULT_URL``.

It reads the spellings of redis-py, of Celery and of Valkey::

    redis://user:password@host:6379/0        valkey:// is the same
    rediss://host:6379/0?ssl_ca_certs=F      TLS; valkeys:// is the same
    unix:///run/valkey.sock?db=0             or redis+socket:///run/valkey.sock?virtual_host=0
    sentinel://host1:26379,host2:26379/NAME  or sentinel://host1;sentinel://host2/0?master_name=NAME

Secrets stay out of ``repr``, ``str`` and JSON of an address, and out of every refusal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl, quote, unquote

from sutra_tasks.errors import SettingsError
from sutra_tasks.server_options import CONNECTION, PLACE, SENTINEL, TLS

__all__ = ["ServerAddress"]

SCHEMES: Final = {
    "redis": "tcp", "valkey": "tcp", "rediss": "tls", "valkeys": "tls",
    "unix": "unix", "redis+socket": "unix", "valkey+socket": "unix",
    "sentinel": "sentinel", "redis+sentinel": "sentinel", "valkey+sentinel": "sentinel",
}  # fmt: skip
EXPECTED: Final = (
    "must be the address of a Redis or Valkey server: redis://, rediss://, valkey://, valkeys://, "
    "unix:// or sentinel://"
)
NO_CLUSTER: Final = (
    "Redis Cluster is not supported. Use a server that is not in cluster mode, with Sentinel if another "
    "one has to take over: sentinel://host:26379/NAME"
)
QUOTING: Final = (
    "cannot be read: in a user name or password write / as %2F, ? as %3F, # as %23, @ as %40, : as %3A "
    "and % as %25"
)
PORT: Final = 6379
SENTINEL_PORT: Final = 26379
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:\[\]]*)(?::([0-9]{1,5}))?")
_HIGHEST_PORT: Final = 65535


@dataclass(frozen=True, slots=True, repr=False)
class ServerAddress:
    """Where a server is, and how to connect to it.

    Attributes:
        scheme: ``redis``, ``rediss``, ``unix`` or ``sentinel``.
        hosts: name and port of the server, or of each Sentinel; empty for a socket.
        path: of a unix socket; empty otherwise.
        primary: the name by which Sentinels know the server; empty without Sentinels.
        db: number of the database.
        user, password: of an ACL; None: not given.
        tls: redis-py's options of TLS; None: no TLS.
        options: redis-py's other options of a connection that the URL names.
        sentinel_user, sentinel_password: of the Sentinels themselves.
        variable: the setting that names the address.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    primary: str = ""
    db: int = 0
    user: str | None = None
    password: str | None = None
    tls: Mapping[str, Any] | None = field(default=None, hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sentinel_user: str | None = None
    sentinel_password: str | None = None
    variable: str = field(default="SUTRA_BROKER_URL", compare=False)

    @classmethod
    def parse(cls, url: str, variable: str = "SUTRA_BROKER_URL") -> ServerAddress:
        """Read an address.

        Args:
            url: as users write it.
            variable: the setting with the URL, for errors.

        Raises:
            SettingsError: it cannot be read, or has an option that is not supported.
        """
        return _Parser(url, variable).address()

    @property
    def place(self) -> str:
        """Host and port, the path of the socket, or the Sentinels."""
        return self.path or ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)

    def __str__(self) -> str:
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        if self.path:
            return f"unix://{user}{quote(self.path)}?db={self.db}"
        primary = f"{quote(self.primary, safe='')}/" if self.primary else ""
        return f"{self.scheme}://{user}{self.place}/{primary}{self.db}"

    def __repr__(self) -> str:
        return f"<ServerAddress {self}>"

    def __json__(self) -> str:
        # Celery reports its settings to monitors as JSON.
        return str(self)

    def celery_url(self, *, with_password: bool = False) -> str:
        """Return the address as stock Celery reads it: without options, and with one Sentinel only."""
        secret = f":{quote(self.password, safe='')}" if self.password and with_password else ""
        login = f"{quote(self.user or '', safe='')}{secret}@" if self.user or secret else ""
        if self.path:
            return f"redis+socket://{login}{quote(self.path)}?virtual_host={self.db}"
        host, port = self.hosts[0]
        return f"{self.scheme}://{login}{f'[{host}]' if ':' in host else host}:{port}/{self.db}"


@dataclass(frozen=True, slots=True, repr=False)
class _Part:
    """One URL, cut into pieces but not decoded; an address of Sentinels may have several."""

    login: str
    hosts: str
    path: str
    query: str


class _Parser:
    """Reads one address; every refusal names the variable and shows no more of it than its scheme."""

    def __init__(self, url: str, variable: str) -> None:
        self._variable = variable
        self._shown = "..."
        scheme, found, self._rest = url.strip().partition("://")
        if not found or not re.fullmatch(r"[a-z][a-z0-9+]*", scheme):
            self._refuse(EXPECTED)
        self._shown, self._scheme = f"{scheme}://...", scheme
        if "cluster" in scheme:
            self._refuse(NO_CLUSTER)
        if scheme not in SCHEMES:
            self._refuse(EXPECTED)
        self._kind = SCHEMES[scheme]

    def address(self) -> ServerAddress:
        parts = self._parts()
        given = self._options(parts)
        user, password = self._login(parts, given)
        paths = list(dict.fromkeys(part.path for part in parts if part.path.strip("/")))
        if len(paths) > 1:
            self._refuse("give the same path for every Sentinel, or for one only")
        path = (paths or [""])[0]
        names = [one for one in path.split("/") if one]
        primary = ""
        if self._kind == "unix":
            if parts[0].hosts:
                self._refuse("the path of a socket begins with three slashes: unix:///run/valkey.sock")
            path, names = "/" + unquote(path), []
        elif self._kind == "sentinel":
            primary = given.pop("master_name", None) or next(
                (unquote(one) for one in names if not one.isdecimal()), ""
            )
            names = [one for one in names if unquote(one) != primary]
            if not primary:
                self._refuse(
                    "add the name by which the Sentinels know the server: /NAME or ?master_name="
                )
        db = self._db(names, given)
        tls = {name: given.pop(name) for name in list(given) if name in TLS}
        has_tls = self._kind == "tls" or given.pop("ssl", False) or (self._kind == "sentinel" and tls)
        if tls and not has_tls:
            self._refuse(f"option {next(iter(tls))}: TLS needs rediss:// (or valkeys://)")
        return ServerAddress(
            scheme={"tcp": "redis", "tls": "rediss"}.get(self._kind, self._kind),
            hosts=() if self._kind == "unix" else self._hosts(parts),
            path=path if self._kind == "unix" else "",
            primary=primary,
            db=db,
            user=user,
            password=password,
            tls={"ssl_cert_reqs": "required", **tls} if has_tls else None,
            sentinel_user=given.pop("sentinel_username", None),
            sentinel_password=given.pop("sentinel_password", None),
            options=given,
            variable=self._variable,
        )

    def _parts(self) -> list[_Part]:
        if self._kind != "sentinel":
            return [self._part(self._rest)]
        several = [one for one in self._rest.split(";") if one]
        return [self._part(one.removeprefix(f"{self._scheme}://")) for one in several]

    def _part(self, text: str) -> _Part:
        before, _, query = text.partition("?")
        place, _, path = before.partition("/")
        login, _, hosts = place.rpartition("@")
        # An @ behind the place belongs to a password with a / or ? in it, but for the path of a socket.
        if "#" in text or "@" in (query if self._kind == "unix" else path + query):
            self._refuse(QUOTING)
        return _Part(login, hosts, path, query)

    def _options(self, parts: list[_Part]) -> dict[str, Any]:
        known = {**PLACE, **CONNECTION, **TLS, **(SENTINEL if self._kind == "sentinel" else {})}
        found: dict[str, Any] = {}
        for part in parts:
            for name, text in parse_qsl(part.query, keep_blank_values=True):
                if not re.fullmatch(r"[a-z_]{1,40}", name):
                    self._refuse("what follows the ? must be options: name=value&name=value")
                if name not in known:
                    close = get_close_matches(name, known, 1)
                    hint = f"; did you mean {close[0]}?" if close else f": {', '.join(sorted(known))}"
                    self._refuse(f"option {name} is not supported{hint}")
                try:
                    value = known[name](text)
                except ValueError as error:
                    self._refuse(f"option {name}: {error}")
                if found.setdefault(name, value) != value:
                    self._refuse(f"option {name}: is given twice")
        return found

    def _login(self, parts: list[_Part], given: dict[str, Any]) -> tuple[str | None, str | None]:
        logins = list(dict.fromkeys(part.login for part in parts if part.login))
        if len(logins) > 1:
            self._refuse(
                "give the same user name and password for every Sentinel, or for the first only"
            )
        user, _, password = (logins or [""])[0].partition(":")
        by_option = given.pop("username", None), given.pop("password", None)
        return unquote(user) or by_option[0], unquote(password) or by_option[1]

    def _hosts(self, parts: list[_Part]) -> tuple[tuple[str, int], ...]:
        texts = [
            one for part in parts for one in part.hosts.split(",") if one or self._kind != "sentinel"
        ]
        default = SENTINEL_PORT if self._kind == "sentinel" else PORT
        if not texts or (len(texts) > 1 and self._kind != "sentinel"):
            self._refuse("must name one host, or several Sentinels: sentinel://host1,host2/NAME")
        return tuple(self._host(one, default) for one in texts)

    def _host(self, text: str, default: int) -> tuple[str, int]:
        found = _HOST.fullmatch(text)
        if found is None:
            self._refuse(
                "host and port cannot be read: write host:6379, an IPv6 address in brackets as in "
                "[::1]:6379, and a : or @ in a password as %3A or %40"
            )
        port = int(found[2]) if found[2] else default
        if not 1 <= port <= _HIGHEST_PORT:
            self._refuse(f"port {port} is not between 1 and {_HIGHEST_PORT}")
        return unquote(found[1].strip("[]")) or "localhost", port

    def _db(self, names: list[str], given: dict[str, Any]) -> int:
        numbers = [given.pop(name) for name in ("db", "virtual_host") if name in given]
        if len(names) > 1 or not all(re.fullmatch(r"[0-9]{1,9}", one) for one in names):
            self._refuse("the path must be the number of a database, as in /0")
        numbers += [int(one) for one in names]
        if len(set(numbers)) > 1:
            self._refuse("two different databases are given")
        return numbers[0] if numbers else 0

    def _refuse(self, reason: str) -> NoReturn:
        raise SettingsError(self._variable, self._shown, reason) from None
