"""Finding stores under a cache folder."""

from pathlib import Path

import pytest

from cache_schema import (
    ArraySpec,
    StoreNotFound,
    StoreReader,
    StoreSettings,
    StoreWriter,
    find_store,
    list_stores,
    verify_store,
)


def _make(root: Path, kind: str, seed: int = 0) -> Path:
    spec = ArraySpec(dtype="uint8", shape=(1,), dimension_names=("n",))
    settings = StoreSettings(kind=kind, arrays={"a": spec}, values={"seed": seed})
    return StoreWriter.open(root, settings, provenance={}).path


def test_stores_are_listed_in_order_and_other_folders_are_not(tmp_path: Path) -> None:
    text, latents = _make(tmp_path, "text"), _make(tmp_path, "latents")
    (tmp_path / "teacher-000000000000").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert list_stores(tmp_path) == [latents, text]
    assert list_stores(tmp_path / "nowhere") == []


def test_the_only_store_of_a_kind_is_found(tmp_path: Path) -> None:
    text, text_long = _make(tmp_path, "text"), _make(tmp_path, "text_long")
    assert find_store(tmp_path, "text") == text
    assert find_store(tmp_path, "text_long") == text_long
    assert find_store(tmp_path, "text", folder=text.name) == text


def test_without_a_store_the_remedy_is_to_make_it(tmp_path: Path) -> None:
    _make(tmp_path, "text")
    with pytest.raises(StoreNotFound, match="no teacher store ") as error:
        find_store(tmp_path, "teacher")
    assert error.value.remedy == "make"


def test_several_stores_are_listed_and_one_must_be_chosen(tmp_path: Path) -> None:
    stores = sorted(_make(tmp_path, "teacher", seed) for seed in range(2))
    with pytest.raises(StoreNotFound) as error:
        find_store(tmp_path, "teacher")
    for store in stores:
        assert store.name in str(error.value)
    assert (error.value.remedy, error.value.subject) == ("choose", "teacher")
    assert find_store(tmp_path, "teacher", folder=stores[1].name) == stores[1]


@pytest.mark.parametrize("folder", ["teacher-nothere", "../cache", "/"])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, folder: str) -> None:
    store = _make(tmp_path / "cache", "teacher")
    with pytest.raises(StoreNotFound, match=store.name):
        find_store(tmp_path / "cache", "teacher", folder=folder)


def test_a_folder_without_a_store_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreNotFound, match=r"no store\.json"):
            StoreReader(path)
        with pytest.raises(StoreNotFound):
            verify_store(path)
