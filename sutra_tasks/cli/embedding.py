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

from sutra_tasks.cli.reading import read_texts
from sutra_tasks.cli.server import connected
from sutra_tasks.client.embed_many import embed_many
from sutra_tasks.errors import SutraError
from sutra_tasks.files import replacing
from sutra_tasks.settings import settings

if TYPE_CHECKING:
    from sutra_tasks.vectors import Vectors

__all__ = ["run"]

FORMATS = (".npy", ".jsonl")


def run(
    source: str,
    out: Path | None,
    *,
    prompt: str | None,
    dimensions: int | None,
    encoding: str | None,
    as_jsonl: bool,
) -> None:
    """Embed the texts of ``source``, and write ``out``, which appears only when it is complete."""
    if out is not None and out.suffix not in FORMATS:
        raise SutraError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    texts, count = read_texts(source, settings(), encoding=encoding, as_jsonl=as_jsonl)
    connected(settings()).close()  # a client would try a server that is away for a while
    vectors = embed_many(texts, prompt=prompt, dimensions=dimensions)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    unseen = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=unseen) as progress:
        shown = progress.track(vectors, total=count)
        if out is None:
            _write_lines(shown, sys.stdout)
        elif out.suffix == ".npy":
            _write_npy(shown, out)
        else:
            with _open_new(out, "w") as file:
                _write_lines(shown, file)


@contextmanager
def _open_new(out: Path, mode: str) -> Iterator[IO[Any]]:
    """Open a file that becomes ``out`` once the block has ended without an error."""
    if out.is_dir():
        raise SutraError(f"--out {out}: it is a folder")
    try:
        # Of a link the file that it names is replaced, not the link.
        with replacing(out.resolve()) as temporary, temporary.open(mode) as file:
            yield file
    except SutraError:
        raise
    except OSError as error:  # no right to write there, or no space left
        raise SutraError(f"--out {out}: {error.strerror or error}") from None


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
