"""The on-disk format of feature stores: reading, writing, maintenance; specified in README.md."""

from cache_schema.attribute_table import ListedAttributes, TextColumn
from cache_schema.checksummed_json import JSON
from cache_schema.errors import (
    AlreadyCommitted,
    CacheError,
    ClipChanged,
    ClipMissing,
    CorruptClip,
    CorruptRecord,
    LockLost,
    LockUnsupported,
    Refused,
    SettingsMismatch,
    ShardBusy,
    StoreNotFound,
    StoreUnreachable,
    SymlinkInStore,
    UnknownSchemaVersion,
)
from cache_schema.find import find_store, list_stores
from cache_schema.index import ShardFacts
from cache_schema.maintenance.verify import Problem, VerifyReport, verify_store
from cache_schema.names import SCHEMA_VERSION
from cache_schema.packed_strings import PackedText, SortedText
from cache_schema.reader import StoreReader
from cache_schema.records import ClipEntry, SkippedClip, StoredArray
from cache_schema.schema import ArraySpec, Compression, StoreSettings
from cache_schema.shard_writer import ShardWriter
from cache_schema.storage import is_url
from cache_schema.writer import StoreWriter

__all__ = [
    "JSON",
    "SCHEMA_VERSION",
    "AlreadyCommitted",
    "ArraySpec",
    "CacheError",
    "ClipChanged",
    "ClipEntry",
    "ClipMissing",
    "Compression",
    "CorruptClip",
    "CorruptRecord",
    "ListedAttributes",
    "LockLost",
    "LockUnsupported",
    "PackedText",
    "Problem",
    "Refused",
    "SettingsMismatch",
    "ShardBusy",
    "ShardFacts",
    "ShardWriter",
    "SkippedClip",
    "SortedText",
    "StoreNotFound",
    "StoreReader",
    "StoreSettings",
    "StoreUnreachable",
    "StoreWriter",
    "StoredArray",
    "SymlinkInStore",
    "TextColumn",
    "UnknownSchemaVersion",
    "VerifyReport",
    "find_store",
    "is_url",
    "list_stores",
    "verify_store",
]
