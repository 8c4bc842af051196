"""Pixels against closed forms: matrices and ranges (H.273), PQ, HLG (BT.2100), wide gamuts."""

import av
import numpy as np
import pytest

from stages.clips import ClipSkipped, load_clip, probe_clip
from stages.clips.video.colour import Colour, colour_of

LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114)}
LUMA |= {2: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
BT709, BT2020, P3 = 1, 9, 12
PQ, HLG = 16, 18
NARROW, FULL = 1, 2


def yuv_frame(pixel_format: str, colours_N3: np.ndarray) -> av.VideoFrame:
    """Blocks of 8 x 8 pixels, so that chroma's sampling does not matter."""
    frame = av.VideoFrame(8 * len(colours_N3), 8, pixel_format)
    for plane, values in zip(frame.planes, colours_N3.T, strict=True):
        size = 1 if frame.format.components[0].bits == 8 else 2
        row = np.repeat(values, plane.width // len(values)).astype(f"<u{size}")
        lines = np.zeros((plane.height, plane.line_size // size), row.dtype)
        lines[:, : plane.width] = row
        plane.update(lines.tobytes())
    return frame


def signal_of(colours_N3: np.ndarray, matrix: int, colour_range: int, bits: int) -> np.ndarray:
    """R'G'B' from Y'CbCr by H.273's equations, 0 to 1 where in gamut."""
    scale, (kr, kb) = 1 << (bits - 8), LUMA[matrix]
    y, cb, cr = colours_N3.T.astype(float)
    if colour_range == FULL:
        top = (1 << bits) - 1
        y, cb, cr = y / top, (cb - 128 * scale) / top, (cr - 128 * scale) / top
    else:
        y, cb, cr = (y / scale - 16) / 219, (cb / scale - 128) / 224, (cr / scale - 128) / 224
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], axis=-1)


@pytest.mark.parametrize("colour_range", [NARROW, FULL])
@pytest.mark.parametrize("matrix", LUMA)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le", "yuv422p12le"])
def test_matrix_and_range_are_those_that_the_frame_names(pixel_format, matrix, colour_range):
    bits = int(pixel_format[-4:-2]) if pixel_format.endswith("le") else 8
    rng = np.random.default_rng(0)
    colours_N3 = rng.integers((16, 60, 60), (236, 196, 196), (40, 3)) << (bits - 8)
    frame = yuv_frame(pixel_format, colours_N3)
    frame.colorspace, frame.color_range = matrix, colour_range
    expected = np.clip(signal_of(colours_N3, matrix, colour_range, bits), 0, 1) * 255
    seen = colour_of(frame).rgb(frame)[3, 3::8].astype(float)
    # FFmpeg's tables are of limited precision; for SMPTE 240M it has other luma weights.
    assert np.abs(seen - expected).max() <= (3.5 if matrix == 7 else 1.5)


def pq_nits(signal):
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = np.power(signal, 1 / m2)
    return 10_000 * np.power(np.maximum(root - c1, 0) / (c2 - c3 * root), 1 / m1)


def pq_signal(nits):
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = np.power(nits / 10_000, m1)
    return np.power((c1 + c2 * power) / (1 + c3 * power), m2)


def hlg_nits(signal_N3):
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(signal_N3 <= 0.5, signal_N3**2 / 3, (np.exp((signal_N3 - c) / a) + b) / 12)
    return 1000 * (scene @ (0.2627, 0.6780, 0.0593))[:, None] ** 0.2 * scene


def rolled_off(nits_N3):
    """BT.2390's EETF from 1,000 to 203 cd/m2, on the brightest channel, its factor on all."""
    brightest = np.clip(nits_N3.max(axis=1), 1e-4, 1000)
    white = pq_signal(203.0) / pq_signal(1000.0)
    knee = 1.5 * white - 0.5
    mapped = []
    for value in pq_signal(brightest) / pq_signal(1000.0):
        t = (value - knee) / (1 - knee)
        spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
        mapped.append(value if value < knee else spline + (3 * t**2 - 2 * t**3) * white)
    return nits_N3 * (pq_nits(np.array(mapped) * pq_signal(1000.0)) / brightest)[:, None]


BT2020_TO_BT709 = np.array(  # BT.2087, table 2's inverse
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


def rgb48(signal_N3: np.ndarray) -> np.ndarray:
    return np.rint(signal_N3 * 65535).astype(np.uint16)[None]


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_brought_to_sdr_by_the_standards(transfer):
    signal_N3 = np.random.default_rng(0).uniform(0, 0.75 if transfer == PQ else 1, (500, 3))
    nits_N3 = pq_nits(signal_N3) if transfer == PQ else hlg_nits(signal_N3)
    light_N3 = np.clip(rolled_off(nits_N3) / 203 @ BT2020_TO_BT709.T, 0, 1)
    colour = Colour(transfer, BT2020, 9)
    seen = colour._to_bt709_bytes(rgb48(signal_N3))[0]
    # The matrix above has four places: 5e-5 of light is 4 of 255 in black, nothing elsewhere.
    errors = np.abs(seen - 255 * light_N3 ** (1 / 2.4))
    assert errors.max() <= 4 and errors[light_N3 > 0.002].max() <= 1
    assert Colour(transfer, 2, 9)._to_bt709_bytes(rgb48(signal_N3)).tolist() == [seen.tolist()]


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_greys_stay_grey_and_rise_from_black_to_white(transfer):
    signal = np.linspace(0, 1, 1001)
    seen = Colour(transfer, BT2020, 9)._to_bt709_bytes(
        rgb48(np.repeat(signal[:, None], 3, axis=1))
    )[0]
    assert np.ptp(seen, axis=-1).max() <= 1
    assert (np.diff(seen[:, 1].astype(int)) >= 0).all()
    assert seen[0, 1] == 0 and seen[-1, 1] == 255
    # A grey card at 26 cd/m2 (BT.2408) keeps its light, 12.8% of white; so does the diffuse white,
    # but for the room that highlights need.
    at = {PQ: (0.38, 0.58), HLG: (0.38, 0.75)}[transfer]
    grey, white = (int(seen[round(1000 * level), 1]) for level in at)
    assert abs(grey - 255 * 0.128 ** (1 / 2.4)) <= 4 and 215 <= white <= 245


@pytest.mark.parametrize(
    ("primaries", "inside", "pure"),
    [
        # BT.709's own colours in each gamut, and what its pure red becomes.
        (BT2020, np.linalg.inv(BT2020_TO_BT709), (255, 0, 0)),
        (P3, np.array([[0.8225, 0.1774, 0], [0.0332, 0.9669, 0], [0.0171, 0.0724, 0.9108]]), None),
    ],
)
def test_wide_gamuts_of_standard_range_give_bt709s_own_colours_back(primaries, inside, pure):
    def encoded(light):
        return np.where(light < 0.018, 4.5 * light, 1.099 * np.maximum(light, 0) ** 0.45 - 0.099)

    light_N3 = np.random.default_rng(0).uniform(0.02, 0.98, (200, 3))
    colour = Colour(BT709, primaries, 1)
    seen = colour._to_bt709_bytes(rgb48(np.clip(encoded(light_N3 @ inside.T), 0, 1)))[0]
    assert np.abs(seen - 255 * encoded(light_N3)).max() <= 1
    greys = rgb48(np.repeat(np.linspace(0, 1, 256)[:, None], 3, axis=1))
    assert np.abs(colour._to_bt709_bytes(greys)[0] - np.arange(256)[:, None]).max() <= 1
    if pure:
        assert tuple(colour._to_bt709_bytes(rgb48(np.array([[1.0, 0, 0]])))[0, 0]) == pure


def tagged(tools, transfer: int, primaries: int, matrix: int) -> bytes:
    names = {PQ: "smpte2084", HLG: "arib-std-b67", 1: "bt709", 8: "linear"}
    gamuts = {1: "bt709", 9: "bt2020", 12: "smpte432"}
    matrices = {1: "bt709", 8: "ycgco", 9: "bt2020nc", 10: "bt2020c"}
    tags = (
        f"transfer={names[transfer]}:colorprim={gamuts[primaries]}:colormatrix={matrices[matrix]}"
    )
    return tools.encode(
        tools.counting_frames(9), pix_fmt="yuv420p10le", options={"x264-params": tags}
    )


@pytest.mark.parametrize(
    ("transfer", "primaries", "done"),
    [
        (PQ, BT2020, ["PQ to SDR", "BT.2020 to BT.709"]),
        (HLG, BT2020, ["HLG to SDR", "BT.2020 to BT.709"]),
        (1, P3, ["P3-D65 to BT.709"]),
        (1, 1, []),
    ],
)
def test_what_was_done_is_recorded_told_and_can_be_refused(
    transfer, primaries, done, tools, config
):
    record = tools.record_of(tagged(tools, transfer, primaries, 9 if primaries == 9 else 1))
    clip = load_clip(record, config())
    assert clip.geometry.as_dict()["conversions"] == done
    assert list(probe_clip(record, config()).conversions) == done
    if transfer in (PQ, HLG):
        for read in (load_clip, probe_clip):
            with pytest.raises(ClipSkipped, match="HDR") as caught:
                read(record, config(hdr="skip"))
            assert caught.value.reason == "hdr"
    else:
        load_clip(record, config(hdr="skip"))


@pytest.mark.parametrize(
    ("transfer", "matrix", "words"), [(1, 8, "YCgCo"), (1, 10, "constant"), (8, 1, "linear")]
)
def test_colours_that_cannot_be_converted_are_named(transfer, matrix, words, tools, config):
    record = tools.record_of(tagged(tools, transfer, 1, matrix))
    for read in (load_clip, probe_clip):
        with pytest.raises(ClipSkipped, match=words) as caught:
            read(record, config())
        assert caught.value.reason == "undecodable"
