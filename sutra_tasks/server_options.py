"""The options that an address of a server may have, by name; each with the function that reads its text.

A function raises ``ValueError`` with the reason why a text cannot be used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["CONNECTION", "PLACE", "SENTINEL", "TLS"]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("must be a whole number")
    return int(text)


def _positive(text: str) -> int:
    if (number := _whole(text)) < 1:
        raise ValueError("must be 1 or more")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    # Workers and readers wait on the server for up to a second.
    if not 1.0 < number < float("inf"):
        raise ValueError("must be seconds, more than 1")
    return number


def _flag(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise ValueError("must be true or false")
    return known[text.lower()]


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be text")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be ASCII characters without spaces")
    return text


def _one_of(**known: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text.lower() not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return known[text.lower()]

    return parse


CONNECTION: Final[Mapping[str, Callable[[str], Any]]] = {
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "socket_keepalive": _flag,
    "socket_read_size": _positive,
    "health_check_interval": _whole,
    "retry_on_timeout": _flag,
    "max_connections": _positive,
    "client_name": _name,
    "protocol": _one_of(**{"2": 2, "3": 3}),
}
"""Options of any connection, by redis-py's names."""

TLS: Final[Mapping[str, Callable[[str], Any]]] = {
    "ssl_cert_reqs": _one_of(
        required="required", optional="optional", none="none",
        cert_required="required", cert_optional="optional", cert_none="none",
    ),
    "ssl_ca_certs": _text,
    "ssl_ca_path": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_password": _text,
    "ssl_check_hostname": _flag,
    "ssl_ciphers": _text,
}  # fmt: skip
"""Options of TLS, by redis-py's names; ``ssl_cert_reqs`` in Celery's spelling as well."""

PLACE: Final[Mapping[str, Callable[[str], Any]]] = {
    "db": _whole,
    "virtual_host": _whole,
    "username": _text,
    "password": _text,
}
SENTINEL: Final[Mapping[str, Callable[[str], Any]]] = {
    "master_name": _text,
    "sentinel_username": _text,
    "sentinel_password": _text,
    "ssl": _flag,
}
