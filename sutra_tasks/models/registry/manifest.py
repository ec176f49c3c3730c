"""The manifest of one version of a model: origin, embedding space, measurements, files."""

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
"""The manifest's own file in the folder of a version; the only file there that it does not list."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ParentModel:
    """The model that a version was made from, and the embedding space of that model."""

    model: str
    space: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFacts:
    """The part of a manifest that the caller of :meth:`ModelRegistry.add` provides.

    Attributes:
        space: name of the embedding space of its vectors.
        width: dimensions of its vectors.
        golden: its vectors of the golden texts, as ``GoldenVectors.to_json`` writes them.
        parent: the model it was made from, if any.
        metrics: measurements by name; JSON values.
        recipe: the distillation that made it, as JSON, if one did.
        fingerprint: digest of recipe and data; a run that finds it in a manifest has nothing new to do.
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
    """All that the registry stores about one version of a model.

    Attributes:
        name: of the model.
        version: 1 or more.
        created_at: seconds since 1970.
        files: sha256 of each file by its path in the folder, in hexadecimal.
        bytes: size of all files together.
    """

    name: str
    version: int
    created_at: float
    files: Mapping[str, str]
    bytes: int

    def to_json(self) -> str:
        """Return the manifest as JSON.

        Raises:
            ModelError: a value cannot be written as JSON.
        """
        try:
            return json.dumps({"v": VERSION, **asdict(self)}, indent=1, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ModelError(self.name, f"its manifest cannot be written: {error}") from None

    @classmethod
    def from_json(cls, text: str | builtins.bytes) -> Manifest:
        """Read a manifest from JSON.

        Raises:
            UnsupportedVersionError: another release wrote it.
            ModelError: it is damaged.
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
    """Return the newest version whose vectors have this space, or can be cut to it."""
    exact = [one.version for one in versions if one.space == space]
    wider = [one.version for one in versions if _without_width(one.space) == _without_width(space)]
    return next(iter([*exact[-1:], *wider[-1:]]), None)


def _without_width(space: str) -> str:
    """Return a space's name without its width, which changes when vectors are cut."""
    return space.rpartition(":")[0] or space


def _version(text: str | bytes) -> str:
    return str(json.loads(text).get("v"))[:20]


def _checks(value: Mapping[str, Any]) -> dict[str, bool]:
    """Return for each field whether its value is usable."""
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
    """Return whether a path is normalised, stays in its folder, and is not the manifest."""
    parts = path.split("/")
    return path == str(PurePosixPath(path)) and not {"", ".", ".."} & set(parts) and path != MANIFEST
