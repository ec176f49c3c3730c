"""Which model a name means: of the registry, or one that the deployment was given."""

from dataclasses import replace

import pytest

from sutra_tasks.errors import InvalidOptionError, ModelError
from sutra_tasks.models.registry.names import bare_name, is_path, shown_name, split_reference
from sutra_tasks.models.registry.resolve import resolve_model_name
from sutra_tasks.settings import Settings
from tests.unit.fake_registry import Store

OPTIONS = Settings(model="search", models="extra, docs@2, /home/jane@corp/model, jane@corp/model")


def meant(model: str, store: Store | None, options: Settings = OPTIONS) -> str:
    return resolve_model_name(model, options, store)  # type: ignore[arg-type]


@pytest.fixture
def store() -> Store:
    return Store()


def test_a_model_of_the_registry_is_its_version_that_serves(store: Store) -> None:
    assert meant("search", store) == "search@1"
    assert meant("docs", store) == "docs@1"
    assert meant("docs@3", store) == "docs@3"
    assert meant("docs@2", store) == "docs@2"


@pytest.mark.parametrize("model", ["search", "extra"])
def test_a_version_that_was_only_added_takes_no_configured_name_over(store: Store, model: str) -> None:
    store.serves[model] = None
    assert meant(model, store) == model
    store.serves[model] = 1
    assert meant(model, store) == f"{model}@1"


def test_a_name_of_the_registry_alone_of_which_none_serves_is_an_error(store: Store) -> None:
    store.serves["docs"] = None
    with pytest.raises(ModelError, match="none of it serves"):
        meant("docs", store)


@pytest.mark.parametrize("path", ["/home/jane@corp/model", "jane@corp/model"])
def test_a_configured_path_with_an_at_sign_is_a_path(store: Store, path: str) -> None:
    store.serves["jane"] = 1
    assert meant(path, store) == path
    assert meant(path, store, replace(OPTIONS, model=path, models=None)) == path
    assert split_reference(path) is None
    assert bare_name(path) == path


@pytest.mark.parametrize("name", ["../search", "/etc/passwd", "nobody", "nobody@1"])
def test_no_other_name_is_taken(store: Store, name: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"docs, .*extra, .*search"):
        meant(name, store)
    with pytest.raises(InvalidOptionError):
        meant(name, None)


@pytest.mark.parametrize(
    ("reference", "found"),
    [("a@1", ("a", 1)), *((one, None) for one in ("a@0", "a@01", "a", "a@", "a@1@2", "/a@1"))],
)
def test_a_version_is_a_name_and_a_number(reference: str, found: tuple[str, int] | None) -> None:
    assert split_reference(reference) == found
    assert bare_name(reference) == (found[0] if found else reference)


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("BAAI/bge-m3", "BAAI/bge-m3"),
        ("search@3", "search@3"),
        ("/home/jane/models/e5", "e5"),
        ("/home/jane/models/e5/", "e5"),
        ("~/e5", "e5"),
        ("./e5", "e5"),
        ("../../e5", "e5"),
        ("C:\\models\\e5", "e5"),
        (
            "/data/hub/models--BAAI--bge-m3/snapshots/5617a9f61b028005a4858fdac845db406aefb181",
            "BAAI/bge-m3",
        ),
        ("/", "model"),
        ("..", "model"),
    ],
)
def test_readers_elsewhere_see_a_models_name_and_not_where_it_is(reference: str, shown: str) -> None:
    assert shown_name(reference) == shown
    assert is_path(reference) == (reference != shown)
