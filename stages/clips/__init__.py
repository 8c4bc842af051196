"""Reading of video datasets: layouts, decoding, frame selection, resizing and subject prompts."""

from stages.clips.bucketing import bucket_of, is_in_bucket
from stages.clips.config import ClipsConfig
from stages.clips.dataset.shards import (
    ClipDataset,
    InputShard,
    input_shard_name,
    open_dataset,
    retry_shard_name,
    select_clips,
    videos_below,
)
from stages.clips.geometry import FrameGeometry
from stages.clips.loading import ClipProbe, load_clip, probe_clip
from stages.clips.records import BadRecord, Clip, ClipRecord, ClipSkipped, SubjectPrompt
from stages.clips.video.decoding import read_video
from stages.clips.video.encoding import copy_without_tags, encode_video, write_video
from stages.clips.video.streams import VideoError

__all__ = [
    "BadRecord",
    "Clip",
    "ClipDataset",
    "ClipProbe",
    "ClipRecord",
    "ClipSkipped",
    "ClipsConfig",
    "FrameGeometry",
    "InputShard",
    "SubjectPrompt",
    "VideoError",
    "bucket_of",
    "copy_without_tags",
    "encode_video",
    "input_shard_name",
    "is_in_bucket",
    "load_clip",
    "open_dataset",
    "probe_clip",
    "read_video",
    "retry_shard_name",
    "select_clips",
    "videos_below",
    "write_video",
]
