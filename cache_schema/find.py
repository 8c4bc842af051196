"""Finding stores under a cache folder or URL; used by training, inspection and the console."""

from collections.abc import Sequence
from pathlib import Path

from cache_schema.errors import StoreNotFound
from cache_schema.names import STORE_FILE, check_identifier
from cache_schema.storage import LocalPlace, is_url, open_place


def list_stores(cache_root: Path | str) -> list[Path | str]:
    """Folders or URLs of all stores directly under `cache_root`, sorted; none if it does not exist.

    Raises:
        StoreNotFound: what lies there cannot be listed, as on a web server.
        StoreUnreachable: a network place did not answer.
    """
    stores = _listed(cache_root)
    if stores is None:
        raise StoreNotFound(f"{cache_root} cannot be listed; name the folder of the store")
    return stores


def find_store(cache_root: Path | str, kind: str, *, folder: str | None = None) -> Path | str:
    """The store of a kind: the one in `folder`, or else the only one under `cache_root`.

    Behind a URL a `folder` is taken as it is: whoever opens it sees whether a store is there.

    Raises:
        StoreNotFound: there is none, there are several to choose from, or they cannot be listed.
        StoreUnreachable: a network place did not answer.
    """
    check_identifier(kind, "kind")
    if folder is not None:
        return _named(cache_root, kind, folder)
    stores = _listed(cache_root)
    if stores is None:
        raise StoreNotFound(
            f"{cache_root} cannot be listed; set train.stores.{kind} to the folder of its {kind} "
            "store"
        )
    of_kind = [store for store in stores if _name(store).startswith(f"{kind}-")]
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


def _named(cache_root: Path | str, kind: str, folder: str) -> Path | str:
    if is_url(cache_root):
        if folder in ("", ".", "..") or "/" in folder:
            raise StoreNotFound(f"train.stores.{kind} is {folder!r}, which is no folder's name")
        return f"{str(cache_root).rstrip('/')}/{folder}"
    stores = list_stores(cache_root)
    for store in stores:
        if _name(store) == folder:
            return store
    raise StoreNotFound(
        f"no store {folder!r} in {cache_root}; there are {_names(stores)}. Set "
        f"train.stores.{kind} to one of them, or run sam2vx-pipeline extract-features"
    )


def _listed(cache_root: Path | str) -> list[Path | str] | None:
    place = open_place(cache_root)
    names = place.list_folder("")
    if names is None:
        return None
    if isinstance(place, LocalPlace):
        folders = (place.folder / name for name in names)
        return [folder for folder in folders if (folder / STORE_FILE).is_file()]
    return [
        f"{place.where}/{name}"
        for name in names
        if name not in ("", ".", "..") and STORE_FILE in (place.list_folder(name) or ())
    ]


def _name(store: Path | str) -> str:
    return str(store).rsplit("/", 1)[-1]


def _names(stores: Sequence[Path | str]) -> str:
    return ", ".join(_name(store) for store in stores) or "none"
