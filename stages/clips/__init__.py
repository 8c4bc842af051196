"""Reading of video datasets: layouts, decoding, frame selection, resizing and subject prompts."""

from stages.clips.bucketing import bucket_of, is_in_bucket
from stages.clips.config import ClipsConfig
from stages.clips.dataset import (
    ClipDataset,
    InputShard,
    input_shard_name,
    open_dataset,
    retry_shard_name,
)
from stages.clips.decoding import VideoError
from stages.clips.geometry import FrameGeometry
from stages.clips.loading import load_clip
from stages.clips.probing import ClipProbe, probe_clip
from stages.clips.prompts import SubjectPrompt
from stages.clips.records import BadRecord, Clip, ClipRecord, ClipSkipped
from stages.clips.video import encode_video, read_video, write_video

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
    "encode_video",
    "input_shard_name",
    "is_in_bucket",
    "load_clip",
    "open_dataset",
    "probe_clip",
    "read_video",
    "retry_shard_name",
    "write_video",
]
