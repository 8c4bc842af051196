from fractions import Fraction
from itertools import permutations

import pytest

from stages.clips import BadRecord, bucket_of, is_in_bucket, load_clip

BUCKETS = ("9x32x48", "9x48x32", "17x32x48", "9x64x96", "9x32x32")


def chosen(tools, config, video, buckets=BUCKETS, **changes):
    return bucket_of(tools.record_of(video), config(buckets=buckets, **changes)).size_name


@pytest.mark.parametrize(
    ("frames", "height", "width", "size"),
    [
        (9, 32, 48, "9x32x48"),
        (16, 32, 48, "9x32x48"),
        (17, 32, 48, "17x32x48"),
        (90, 32, 48, "17x32x48"),
        (9, 48, 32, "9x48x32"),
        (17, 48, 32, "9x48x32"),
        (9, 64, 96, "9x64x96"),
        (9, 62, 96, "9x32x48"),
        (17, 64, 96, "17x32x48"),
        (9, 16, 24, "9x32x48"),
        (5, 32, 48, "9x32x48"),
        (9, 40, 40, "9x32x32"),
        (9, 32, 96, "9x32x48"),
    ],
    ids=lambda value: str(value),
)
def test_shape_decides_then_length_then_area(tools, config, frames, height, width, size):
    video = tools.encode(tools.counting_frames(frames, height, width), pix_fmt="yuv420p")
    assert chosen(tools, config, video) == size


def test_the_length_counts_at_the_asked_rate(tools, config):
    video = tools.encode(tools.counting_frames(34), fps=16)
    assert chosen(tools, config, video) == "17x32x48"
    assert chosen(tools, config, video, fps=4.0) == "9x32x48"
    assert chosen(tools, config, video, fps=None) == "17x32x48"
    assert chosen(tools, config, video, fps=60.0) == "9x32x48", "its rate is too low"


@pytest.mark.parametrize(("rotation", "size"), [(0, "9x32x48"), (90, "9x48x32"), (180, "9x32x48")])
def test_the_upright_frame_counts(tools, config, rotation, size):
    video = tools.encode(tools.counting_frames(9), rotation=rotation)
    assert chosen(tools, config, video) == size


def test_pixels_that_are_not_square_count_as_they_are_shown(tools, config):
    video = tools.encode(tools.counting_frames(9, 48, 48), pixel_aspect=Fraction(2, 3))
    assert chosen(tools, config, video, buckets=("9x32x48", "9x48x32")) == "9x48x32"


def test_ratios_that_differ_by_rounding_alone_are_one_shape(tools, config):
    """854x480 lies nearer to 480x848 than to 16:9; the longer clip of 720x1280's shape is taken."""
    video = tools.encode(tools.counting_frames(17, 96, 170), pix_fmt="yuv420p")
    assert chosen(tools, config, video, buckets=("9x96x176", "17x80x144")) == "17x80x144"


def test_what_cannot_be_read_goes_to_one_size_whose_loading_says_why(tools, config):
    settings = config(buckets=BUCKETS[::-1])
    broken = tools.record_of(b"no video")
    bad = BadRecord(key="b", reason="bad_record", detail="two captions")
    for record in (broken, bad):
        assert sum(is_in_bucket(record, size) for size in settings.sizes) == 1
        assert bucket_of(record, settings).num_frames == 9


@pytest.mark.parametrize("frames", [5, 9, 30])
def test_the_order_of_the_sizes_does_not_matter(tools, config, frames):
    record = tools.record_of(tools.encode(tools.counting_frames(frames)))
    expected = bucket_of(record, config(buckets=BUCKETS)).size_name
    for buckets in list(permutations(BUCKETS))[::13]:
        settings = config(buckets=buckets)
        assert bucket_of(record, settings).size_name == expected
    assert sum(is_in_bucket(record, size) for size in settings.sizes) == 1


def test_a_clip_is_loaded_at_its_size(tools, config):
    record = tools.record_of(tools.encode(tools.counting_frames(20, 48, 32)))
    size = bucket_of(record, config(buckets=BUCKETS))
    assert load_clip(record, size).frames_THWC.shape == (9, 48, 32, 3)


def test_without_buckets_every_clip_is_of_the_one_size(tools, config):
    settings = config()
    assert settings.sizes == (settings,)
    assert is_in_bucket(tools.record_of(b"no video"), settings)


def test_sizes_have_the_other_settings_in_common(config):
    settings = config(buckets=["49x480x720", "81x768x1360"], fps=16.0)
    assert [(s.num_frames, s.height, s.width, s.fps) for s in settings.sizes] == [
        (49, 480, 720, 16.0),
        (81, 768, 1360, 16.0),
    ]
    assert [size.size_name for size in settings.sizes] == ["49x480x720", "81x768x1360"]


@pytest.mark.parametrize(
    ("buckets", "told"),
    [
        (["480x720"], "frames x height x width, got '480x720'"),
        (["49x480x720p"], "frames x height x width"),
        (["48x480x720"], "8N.1, got '48x480x720'"),
        (["1x480x720"], "8N.1"),
        (["49x480x722"], "multiples of 16, got '49x480x722'"),
        (["49x0x720"], "multiples of 16"),
        (["49x480x720", "049x480x720"], "each size once, got 49x480x720 twice"),
    ],
)
def test_what_is_no_size_is_refused(config, buckets, told):
    with pytest.raises(ValueError, match=told):
        config(buckets=buckets)
