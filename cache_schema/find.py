"""Finding stores under a cache folder or URL."""

from collections.abc import Sequence
from pathlib import Path

from cache_schema.errors import StoreNotFound
from cache_schema.names import STORE_FILE, check_identifier
from cache_schema.storage import LocalStorage, is_url, open_storage


def list_stores(cache_root: Path | str) -> list[Path | str]:
    """Sorted folders or URLs of all stores directly under `cache_root`; empty if it does not exist.

    Raises:
        StoreNotFound: `cache_root` cannot be listed, for example on a web server.
        StoreUnreachable: a network storage did not respond.
    """
    stores = _list_stores(cache_root)
    if stores is None:
        raise StoreNotFound(f"{cache_root} cannot be listed; name the folder of the store")
    return stores


def find_store(cache_root: Path | str, kind: str, *, folder: str | None = None) -> Path | str:
    """The store of a kind: the one in `folder`, or else the only one under `cache_root`.

    Behind a URL, `folder` is not checked; opening the store fails if there is none.

    Raises:
        StoreNotFound: there is no such store, there are several, or they cannot be listed.
        StoreUnreachable: a network storage did not respond.
    """
    check_identifier(kind, "kind")
    if folder is not None:
        return _store_in_folder(cache_root, kind, folder)
    stores = _list_stores(cache_root)
    if stores is None:
        raise StoreNotFound(
            f"{cache_root} cannot be listed, so its {kind} store must be named",
            remedy="choose",
            subject=kind,
        )
    matching = [store for store in stores if _folder_name(store).startswith(f"{kind}-")]
    if not matching:
        raise StoreNotFound(f"no {kind} store in {cache_root}", remedy="make")
    if len(matching) > 1:
        raise StoreNotFound(
            f"several {kind} stores in {cache_root}: {_folder_names(matching)}",
            remedy="choose",
            subject=kind,
        )
    return matching[0]


def _store_in_folder(cache_root: Path | str, kind: str, folder: str) -> Path | str:
    if is_url(cache_root):
        if folder in ("", ".", "..") or "/" in folder:
            raise StoreNotFound(
                f"{folder!r} is not the name of a {kind} store's folder",
                remedy="choose",
                subject=kind,
            )
        return f"{str(cache_root).rstrip('/')}/{folder}"
    stores = list_stores(cache_root)
    for store in stores:
        if _folder_name(store) == folder:
            return store
    raise StoreNotFound(
        f"no store {folder!r} in {cache_root}; found {_folder_names(stores)}",
        remedy="choose or make",
        subject=kind,
    )


def _list_stores(cache_root: Path | str) -> list[Path | str] | None:
    storage = open_storage(cache_root)
    names = storage.list_folder("")
    if names is None:
        return None
    if isinstance(storage, LocalStorage):
        folders = (storage.folder / name for name in names)
        return [folder for folder in folders if (folder / STORE_FILE).is_file()]
    return [
        f"{storage.location}/{name}"
        for name in names
        if name not in ("", ".", "..") and STORE_FILE in (storage.list_folder(name) or ())
    ]


def _folder_name(store: Path | str) -> str:
    return str(store).rsplit("/", 1)[-1]


def _folder_names(stores: Sequence[Path | str]) -> str:
    return ", ".join(_folder_name(store) for store in stores) or "none"
