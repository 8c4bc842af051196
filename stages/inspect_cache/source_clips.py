"""A stored clip's frames and prompts, from the dataset; used by `draw_store` and `overlay`."""

from stages.clips import (
    Clip,
    ClipDataset,
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    input_shard_name,
    load_clip,
)


def find_clip(
    dataset: ClipDataset | None, clips: ClipsConfig, *, shard: str, key: str
) -> Clip | str:
    """Decode the clip that a store holds, or say in words why it cannot be had.

    Args:
        dataset: Where to look; None if there is none.
        clips: The length, size and rate it is brought to.
        shard: The store's shard that the clip is in, perhaps one of a retry.
        key: The clip.
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
                    return f"the dataset's clip cannot be read any more ({problem})"
    return f"the dataset at {clips.path} has no clip {key!r} in shard {name or shard}"
