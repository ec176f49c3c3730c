"""Decompresses the body of a message, up to a limit: a few kilobytes can stand for gigabytes."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from kombu.compression import encoders

from sutra_tasks.errors import InvalidMessageError

__all__ = ["COMPRESSIONS", "inflate"]

MOST_DICTIONARY_BYTES: Final = 256 << 20
"""Memory that the header of an LZMA stream may ask for."""


def _zstd() -> Any:
    try:
        module = import_module("compression.zstd")  # from Python 3.14 on
    except ModuleNotFoundError:
        module = import_module("backports.zstd")
    return module.ZstdDecompressor()


COMPRESSIONS: Final[Mapping[str, Callable[[], Any]]] = {
    # kombu calls zlib's format gzip.
    **dict.fromkeys(("application/x-gzip", "gzip", "zlib"), zlib.decompressobj),
    **dict.fromkeys(("application/x-bz2", "bzip2", "bzip"), bz2.BZ2Decompressor),
    **dict.fromkeys(
        ("application/x-lzma", "lzma", "xz"),
        lambda: lzma.LZMADecompressor(memlimit=MOST_DICTIONARY_BYTES),
    ),
    **(dict.fromkeys(("application/zstd", "zstd"), _zstd) if "application/zstd" in encoders() else {}),
}
"""What makes a decompressor, by the names that kombu's senders write."""


def inflate(body: bytes, compression: str, most_bytes: int) -> bytes:
    """Return what was compressed.

    Args:
        body: of a message.
        compression: one of :data:`COMPRESSIONS`.
        most_bytes: that the result may have; no more are decompressed.

    Raises:
        InvalidMessageError: it is corrupt, incomplete, or larger.
    """
    decompressor = COMPRESSIONS[compression]()
    try:
        inflated: bytes = decompressor.decompress(body, most_bytes + 1)
    except Exception:  # noqa: BLE001 - each module has an error of its own
        raise InvalidMessageError("body", f"it is not what {compression} compresses to") from None
    if len(inflated) > most_bytes:
        reason = f"it has more than {most_bytes} bytes when it is decompressed"
        raise InvalidMessageError("body", reason)
    if not decompressor.eof:
        raise InvalidMessageError("body", f"its end is missing, of what {compression} compresses to")
    return inflated
