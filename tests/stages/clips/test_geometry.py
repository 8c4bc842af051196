import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.clips.geometry import cover_and_crop


def geometry_of(source: tuple[int, int], target: tuple[int, int], pixel_aspect: float = 1.0):
    return cover_and_crop(
        *source,
        height=target[0],
        width=target[1],
        pixel_aspect=pixel_aspect,
        source_fps=8.0,
        sampling="consecutive",
    )


def test_equal_sizes_keep_every_pixel():
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert np.array_equal(geometry_of((48, 64), (48, 64)).frame(frame), frame)


def test_equal_shape_equals_a_plain_pillow_resize():
    frame = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    expected = Image.fromarray(frame).resize((64, 48), Image.Resampling.BICUBIC)
    assert np.array_equal(geometry_of((96, 128), (48, 64)).frame(frame), np.asarray(expected))


def test_a_crop_at_full_scale_is_a_slice():
    frame = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    assert np.array_equal(geometry_of((48, 80), (48, 64)).frame(frame), frame[:, 8:72])


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = geometry_of((64, 64), (16, 16)).frame(stripes)
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() <= 8


@settings(max_examples=60)
@given(
    source=st.tuples(st.integers(8, 2000), st.integers(8, 2000)),
    target=st.tuples(st.sampled_from([16, 128, 480]), st.sampled_from([16, 192, 720])),
    pixel_aspect=st.sampled_from([1.0, 4 / 3, 0.5]),
)
def test_the_window_lies_inside_the_source_centred_and_tight(source, target, pixel_aspect):
    geometry = geometry_of(source, target, pixel_aspect)
    window_height = target[0] / geometry.scale_y
    window_width = target[1] / geometry.scale_x
    assert window_height <= source[0] * (1 + 1e-9) and window_width <= source[1] * (1 + 1e-9)
    assert geometry.top == pytest.approx((source[0] - window_height) / 2, abs=1e-6)
    assert geometry.left == pytest.approx((source[1] - window_width) / 2, abs=1e-6)
    assert min(geometry.top, geometry.left) == pytest.approx(0, abs=1e-6)
    assert geometry.scale_x / geometry.scale_y == pytest.approx(pixel_aspect)
    centre = geometry.points(np.array([[source[1] / 2, source[0] / 2]]))
    np.testing.assert_allclose(centre, [[target[1] / 2, target[0] / 2]])


def test_a_mask_of_another_size_names_both_sizes():
    with pytest.raises(ValueError, match=r"10x20.*48x64"):
        geometry_of((48, 64), (48, 64)).mask(np.ones((10, 20), bool))


def test_the_record_is_json():
    record = geometry_of((480, 720), (128, 192)).as_dict()
    assert json.loads(json.dumps(record)) == record
