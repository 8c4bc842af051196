"""Finding stores under a cache folder; used by training, inspection and the console."""

from pathlib import Path

from cache_schema.errors import StoreNotFound
from cache_schema.layout import STORE_FILE, check_identifier


def list_stores(cache_root: Path) -> list[Path]:
    """Folders of all stores directly under `cache_root`, sorted; empty if it does not exist."""
    root = Path(cache_root)
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (path / STORE_FILE).is_file())


def find_store(cache_root: Path, kind: str, *, folder: str | None = None) -> Path:
    """The store of a kind: the one in `folder`, or else the only one under `cache_root`.

    Raises `StoreNotFound` if there is none, or if there are several to choose from.
    """
    check_identifier(kind, "kind")
    stores = list_stores(cache_root)
    if folder is not None:
        for store in stores:
            if store.name == folder:
                return store
        raise StoreNotFound(
            f"no store {folder!r} in {cache_root}; there are {_names(stores)}. Set "
            f"train.stores.{kind} to one of them, or run sam2vx-pipeline extract-features"
        )
    of_kind = [store for store in stores if store.name.startswith(f"{kind}-")]
    if not of_kind:
        raise StoreNotFound(
            f"no {kind} store in {cache_root}; run sam2vx-pipeline extract-features to make it"
        )
    if len(of_kind) > 1:
        raise StoreNotFound(
            f"several {kind} stores in {cache_root}: {_names(of_kind)}; set train.stores.{kind} to "
            "the one to use"
        )
    return of_kind[0]


def _names(stores: list[Path]) -> str:
    return ", ".join(store.name for store in stores) or "none"
