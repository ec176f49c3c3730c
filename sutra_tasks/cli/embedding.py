"""``sutra embed``: embeds texts from the command line, a file or standard input, in bounded memory."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sutra_tasks.client.embed_many import embed_many
from sutra_tasks.errors import SutraError
from sutra_tasks.files import replacing

if TYPE_CHECKING:
    from sutra_tasks.vectors import Vectors

__all__ = ["read_texts", "run"]

FORMATS = (".npy", ".jsonl")


def run(source: str, out: Path | None, *, prompt: str | None, dimensions: int | None) -> None:
    """Embed the texts of ``source``, and write ``out``, which appears only when it is complete."""
    if out is not None and out.suffix not in FORMATS:
        raise SutraError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    texts, count = read_texts(source)
    vectors = embed_many(texts, prompt=prompt, dimensions=dimensions)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        shown = progress.track(vectors, total=count)
        if out is None:
            _write_lines(shown, sys.stdout)
        elif out.suffix == ".npy":
            _write_npy(shown, out)
        else:
            with _open_new(out, "w") as file:
                _write_lines(shown, file)


def read_texts(source: str) -> tuple[Iterator[str], int | None]:
    """Return the texts of ``source``, and their number if it is known without reading standard input.

    Raises:
        SutraError: the file cannot be read, or a line of it has no text.
    """
    if source == "-":
        return (line.rstrip("\n") for line in sys.stdin), None
    if not source.endswith(".jsonl"):
        return iter([source]), 1
    path = Path(source)
    try:
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    except OSError as error:
        raise SutraError(f"{source}: {error.strerror}") from None
    return _jsonl(path), count


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                raise SutraError(f"{path}:{number}: not JSON") from None
            text = value.get("text") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise SutraError(f'{path}:{number}: expected a string or an object with "text"')
            yield text


@contextmanager
def _open_new(out: Path, mode: str) -> Iterator[IO[Any]]:
    """Open a file that becomes ``out`` once the block has ended without an error."""
    if out.is_dir():
        raise SutraError(f"--out {out}: it is a folder")
    with replacing(out) as temporary:
        try:
            file = temporary.open(mode)
        except OSError as error:
            raise SutraError(f"--out {out}: {error.strerror}") from None
        with file:
            yield file


def _write_lines(vectors: Iterable[Vectors], file: IO[str]) -> None:
    for index, vector in enumerate(vectors):
        file.write(json.dumps({"index": index, "vector": [float(f"{x:.9g}") for x in vector]}))
        file.write("\n")
        file.flush()


def _write_npy(vectors: Iterable[Vectors], out: Path) -> None:
    # The header has the number of rows, which is known only at the end.
    with tempfile.TemporaryFile() as rows, _open_new(out, "wb") as file:
        count = width = 0
        for vector in vectors:
            rows.write(vector.tobytes())
            count, width = count + 1, len(vector)
        rows.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(rows, file)
