from pathlib import Path

import numpy as np
import pytest

from stages.clips import ClipRecord, ClipsConfig, load_clip, open_dataset

_CLIPS = Path(__file__).parents[4] / "shared" / "clips"


@pytest.mark.skipif(not _CLIPS.is_dir(), reason="the real clips are not on this machine")
def test_real_clips_load_with_their_boxes():
    config = ClipsConfig(path=_CLIPS, num_frames=9, height=96, width=144, clips_per_shard=5)
    shards = open_dataset(config).shards
    records = [record for shard in shards for record in shard.records()]
    assert [shard.num_clips() for shard in shards] == [5, 3]
    assert all(isinstance(record, ClipRecord) for record in records)
    for record in records:
        clip = load_clip(record, config)
        assert clip.frames_THWC.shape == (9, 96, 144, 3)
        assert clip.frames_THWC.std() > 5 and clip.caption
        np.testing.assert_allclose(
            clip.prompts[0].box_xyxy, np.array(record.prompts[0].box_xyxy) / 5
        )
