"""Loading the source clip of a stored clip from the dataset."""

from stages.clips import (
    Clip,
    ClipDataset,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    input_shard_name,
    load_clip,
)


def load_source_clip(
    dataset: ClipDataset | None, clips: ClipsConfig, *, shard: str, key: str
) -> Clip | str:
    """Decode the source of a stored clip, or return why that is not possible.

    Args:
        dataset: The dataset; None if there is none.
        clips: Length, size and frame rate to decode to.
        shard: Name of the clip's shard in the store, possibly a retry shard.
        key: The clip's key.
    """
    if dataset is None:
        return f"no dataset at {clips.path}"
    name = input_shard_name(shard, dataset)
    for candidate in (candidate for candidate in dataset.shards if candidate.name == name):
        for record in candidate.records():
            if record.key == key and isinstance(record, ClipRecord):
                try:
                    return load_clip(record, clips)
                except ClipSkipped as problem:
                    return f"the dataset's clip can no longer be read ({problem})"
    return f"the dataset at {clips.path} has no clip {key!r} in shard {name or shard}"
