"""What the registry says of one version of a model: where it comes from, what it gives, its files."""

from __future__ import annotations

import builtins
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Final

from sutra_tasks.errors import ModelError, UnsupportedVersionError
from sutra_tasks.models.registry.names import is_model_name

__all__ = ["MANIFEST", "VERSION", "Manifest", "ParentModel", "VersionFacts", "newest_of_space"]

VERSION: Final = 1
MANIFEST: Final = "manifest.json"
"""Its name in the folder of a version; the only file there that it does not list."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ParentModel:
    """The model that a version was made from: its name, and the embedding space it gives."""

    model: str
    space: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFacts:
    """What whoever adds a version says of it.

    Attributes:
        space: name of the embedding space of its vectors.
        width: dimensions of its vectors.
        golden: its vectors of the known texts, in the form that ``Golden.to_json`` gives.
        parent: the model it was made from, if any.
        metrics: what was measured of it, by name; JSON values.
        recipe: how it was made, as JSON, if it was.
        fingerprint: of recipe and data, by which a run finds that there is nothing new.
    """

    space: str
    width: int
    golden: str
    parent: ParentModel | None = None
    metrics: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(VersionFacts):
    """One version of a model, as its folder says.

    Attributes:
        name: the model's.
        version: 1 or more.
        created_at: seconds since 1970.
        files: sha256 of each file by its path in the folder, in hexadecimal.
        bytes: of all files together.
    """

    name: str
    version: int
    created_at: float
    files: Mapping[str, str]
    bytes: int

    def to_json(self) -> str:
        """Return the stored form.

        Raises:
            ModelError: a fact is not JSON, or not a number.
        """
        try:
            return json.dumps({"v": VERSION, **asdict(self)}, indent=1, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ModelError(self.name, f"its manifest cannot be written: {error}") from None

    @classmethod
    def from_json(cls, text: str | builtins.bytes) -> Manifest:
        """Read the stored form.

        Raises:
            UnsupportedVersionError: another version wrote it.
            ModelError: it does not decode.
        """
        try:
            value: Any = json.loads(text)
        except ValueError:
            raise ModelError("of the registry", "its manifest is not JSON") from None
        if not isinstance(value, dict):
            raise ModelError("of the registry", "its manifest is not an object")
        if value.pop("v", None) != VERSION:
            raise UnsupportedVersionError("a model's manifest", _version(text), VERSION)
        shown = str(value.get("name"))[:64]
        if set(value) != {option.name for option in fields(cls)}:
            raise ModelError(shown, "its manifest has other fields than a manifest")
        wrong = [name for name, fits in _checks(value).items() if not fits]
        if wrong:
            raise ModelError(shown, f"its manifest has no usable {wrong[0]}")
        parent = value.pop("parent")
        return cls(**value, parent=None if parent is None else ParentModel(**parent))


def newest_of_space(versions: Sequence[Manifest], space: str) -> int | None:
    """Return the last version that gives vectors of a space, or of which it is a narrower cut."""
    for pinned in (lambda of: of == space, lambda of: _uncut(of) == _uncut(space)):
        if found := [one.version for one in versions if pinned(one.space)]:
            return found[-1]
    return None


def _uncut(space: str) -> str:
    """Return a space's name without its width: vectors cut to fewer dimensions have another."""
    return space.rpartition(":")[0] or space


def _version(text: str | bytes) -> str:
    return str(json.loads(text).get("v"))[:20]


def _checks(value: Mapping[str, Any]) -> dict[str, bool]:
    """Say of each field whether it has a value of its kind."""
    parent, files, created_at = value["parent"], value["files"], value["created_at"]
    return {
        "name": is_model_name(value["name"]),
        "version": _is_count(value["version"], least=1),
        "created_at": type(created_at) in (int, float) and math.isfinite(created_at),
        "space": _is_text(value["space"]),
        "width": _is_count(value["width"], least=1),
        "parent": parent is None
        or (
            isinstance(parent, dict)
            and set(parent) == {"model", "space"}
            and all(map(_is_text, parent.values()))
        ),
        "files": isinstance(files, dict)
        and bool(files)
        and all(_is_inside(path) and _is_sha256(digest) for path, digest in files.items()),
        "bytes": _is_count(value["bytes"], least=0),
        "golden": _is_text(value["golden"]),
        "metrics": isinstance(value["metrics"], dict),
        "recipe": isinstance(value["recipe"], dict | None),
        "fingerprint": value["fingerprint"] is None or _is_text(value["fingerprint"]),
    }


def _is_count(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_inside(path: str) -> bool:
    """Say whether a path stays in its folder, is written in one way only, and is not the manifest's."""
    parts = path.split("/")
    return path == str(PurePosixPath(path)) and not {"", ".", ".."} & set(parts) and path != MANIFEST
