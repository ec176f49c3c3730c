"""What a manifest says survives its JSON, and nothing else is read as one."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as laws
from hypothesis import strategies as st

from sutra_tasks.errors import ModelError, UnsupportedVersionError
from sutra_tasks.models.registry.manifest import Manifest, ParentModel
from sutra_tasks.models.registry.names import is_model_name

DIGEST = "0123456789abcdef" * 4
MADE = Manifest(
    name="short",
    version=3,
    created_at=1.5e9,
    space="static-0123:256",
    width=256,
    golden='{"v": 1}',
    parent=ParentModel("all-MiniLM-L6-v2", "abc:384"),
    metrics={"cosine_similarity": 0.95, "ndcg_preservation": None, "interval": [0.9, 0.97]},
    recipe={"v": 1, "teacher": "all-MiniLM-L6-v2"},
    fingerprint="f00",
    files={"model.safetensors": DIGEST, "1_Dense/config.json": DIGEST},
    bytes=1000,
)


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(MADE.to_json()), **values})


@laws(max_examples=60, deadline=None)
@given(
    metrics=st.dictionaries(st.text(), st.none() | st.floats(allow_nan=False, allow_infinity=False)),
    golden=st.text(min_size=1),
    version=st.integers(1, 10**9),
    parent=st.none() | st.builds(ParentModel, st.text(min_size=1), st.text(min_size=1)),
    recipe=st.none() | st.just({"alpha": 0.5}),
)
def test_a_manifest_survives_its_json(**facts: Any) -> None:
    made = replace(MADE, **facts)
    assert Manifest.from_json(made.to_json()) == made
    assert Manifest.from_json(made.to_json().encode()) == made


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_versions_manifest_is_refused_as_such(version: object) -> None:
    with pytest.raises(UnsupportedVersionError) as caught:
        Manifest.from_json(changed(v=version))
    assert caught.value.supported == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", b"\xff\xfe", '"manifest"'])
def test_what_is_no_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(ModelError, match="manifest"):
        Manifest.from_json(text)


WRONG: list[tuple[str, list[object]]] = [
    ("name", [None, "", "../up", "a/b", "a..b", 3]),
    ("version", [0, -1, True, 1.0, "1", None]),
    ("created_at", [None, "now", True, float("inf"), float("nan")]),
    ("space", [None, "", 3]),
    ("width", [0, 2.5, None]),
    ("parent", ["model", {}, {"model": "a"}, {"model": "a", "space": ""}, []]),
    ("files", [None, {}, [], {"a": "short"}, {"a": None}, {"a": DIGEST.upper()}]),
    ("bytes", [-1, 1.5, None]),
    ("golden", [None, "", {"v": 1}]),
    ("metrics", [None, [], 3]),
    ("recipe", ["text", []]),
    ("fingerprint", ["", 3]),
]


@pytest.mark.parametrize(("name", "value"), [(name, one) for name, values in WRONG for one in values])
def test_a_field_of_another_kind_is_named(name: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"no usable {name}"):
        Manifest.from_json(changed(**{name: value}))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/", "", ".", "manifest.json"]
)
def test_a_file_outside_its_folder_is_refused(path: str) -> None:
    with pytest.raises(ModelError, match="files"):
        Manifest.from_json(changed(files={path: DIGEST}))


def test_no_field_is_missing_and_none_unknown() -> None:
    value = json.loads(MADE.to_json())
    for name in value.keys() - {"v"}:
        with pytest.raises(ModelError, match="other fields"):
            Manifest.from_json(json.dumps({key: one for key, one in value.items() if key != name}))
    with pytest.raises(ModelError, match="other fields"):
        Manifest.from_json(changed(more=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_is_not_written(value: object) -> None:
    with pytest.raises(ModelError, match="short"):
        replace(MADE, metrics={"cosine_similarity": value}).to_json()


def test_names_are_those_of_recipes() -> None:
    assert is_model_name("a.b-c_1")
    assert not any(is_model_name(name) for name in (None, "", ".hidden", "-a", "a/b", "a" * 65))
