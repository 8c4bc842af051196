"""Decoded frames to 8-bit RGB as a standard display shows it: BT.709 primaries, no HDR.

FFmpeg converts the matrix and the range that a frame names, and takes BT.601, limited range, for
one that names none. What it leaves is done here: PQ and HLG become SDR (BT.2390's roll-off from
1,000 cd/m2 to the 203 cd/m2 of BT.2408's reference white), BT.2020 and P3 primaries BT.709's.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation

# Legend: H W pixels, C colour (RGB).

EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)
"""How libswscale converts between RGB and YUV: within 1 of 255 of the closed form, and the same on
every processor. Without the last three flags values differ by up to 4 between instruction sets."""

_PEAK = 1000.0
"""cd/m2 that HDR frames are taken to reach."""
_WHITE = 203.0
"""cd/m2 that become full scale: BT.2408's reference white."""

_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_LINEAR_OR_LOG = {
    ColorTrc.LINEAR: "linear",
    ColorTrc.LOG: "logarithmic",
    ColorTrc.LOG_SQRT: "logarithmic",
    ColorTrc.SMPTE428: "SMPTE 428",
}
_MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)
"""Colour matrices, by ITU-T H.273's numbers, that FFmpeg converts; 3 is reserved, as 2 unknown."""
_MATRIX_NAMES = {8: "YCgCo", 10: "BT.2020 constant luminance", 14: "ICtCp", 15: "IPT-C2"}

_WIDE = {
    ColorPrimaries.BT2020: ("BT.2020", (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290)),
    ColorPrimaries.SMPTE431: ("DCI-P3", (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351)),
    ColorPrimaries.SMPTE432: ("P3-D65", (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290)),
}
"""Chromaticities x, y of red, green, blue and white. BT.601's are within a few percent of BT.709's
and left."""
_BT709 = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290)


@dataclass(frozen=True, slots=True)
class Colour:
    """What a stream or a frame says of its colours, and what has to be done to them."""

    transfer: int
    """`av.video.reformatter.ColorTrc`; an unknown one is taken for SDR."""
    primaries: int
    """`ColorPrimaries`; unknown ones are taken for BT.709's, or BT.2020's where the transfer is
    HDR."""
    matrix: int
    """By ITU-T H.273's numbers."""

    @property
    def hdr(self) -> str | None:
        """PQ or HLG, where the frames are HDR."""
        return _HDR.get(self.transfer)  # type: ignore[call-overload]

    @property
    def conversions(self) -> tuple[str, ...]:
        """What `rgb` does beyond FFmpeg's conversion, in words for a clip's record."""
        wide = self._wide
        return (
            *((f"{self.hdr} to SDR",) if self.hdr else ()),
            *((f"{wide[0]} to BT.709",) if wide else ()),
        )

    @property
    def problem(self) -> str | None:
        """Why such frames cannot be converted."""
        if self.transfer in _LINEAR_OR_LOG:
            return f"frames of {_LINEAR_OR_LOG[self.transfer]} transfer are not converted"  # type: ignore[index]
        if self.matrix not in _MATRICES:
            name = _MATRIX_NAMES.get(self.matrix, f"number {self.matrix}")
            return f"frames of the colour matrix {name} are not converted"
        return None

    def rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3], BT.709, of a frame that has these colours and no `problem`."""
        if not self.conversions:
            return _to_ndarray(frame, "rgb24")
        return self._standard(_to_ndarray(frame, "rgb48le"))

    def _standard(self, signal_HWC: np.ndarray) -> np.ndarray:
        """uint16 RGB in these primaries and this transfer -> uint8 in BT.709's."""
        wide = self._wide
        if self.hdr:
            nits_HWC = _pq_table()[signal_HWC] if self.hdr == "PQ" else _hlg_nits(signal_HWC)
            light_HWC = _rolled_off(nits_HWC) / np.float32(_WHITE)
        else:
            light_HWC = _bt709_table()[signal_HWC]
        if wide:
            light_HWC = light_HWC @ _to_bt709(wide[1]).T
        # By the root, so that steps are even finer than 8 bits in the dark.
        roots_HWC = np.sqrt(np.clip(light_HWC, 0, 1))
        steps_HWC = np.rint(roots_HWC * np.float32(65535)).astype(np.uint16)
        return (_bt1886_bytes() if self.hdr else _bt709_bytes())[steps_HWC]

    @property
    def _wide(self) -> tuple[str, tuple[float, ...]] | None:
        if self.hdr and self.primaries in (0, ColorPrimaries.UNSPECIFIED, 3):  # 0, 3: reserved
            return _WIDE[ColorPrimaries.BT2020]
        return _WIDE.get(self.primaries)  # type: ignore[call-overload]


def colour_of(source: Any) -> Colour:
    """The colours that a decoded frame or a codec context names."""
    return Colour(int(source.color_trc), int(source.color_primaries), int(source.colorspace))


def _to_ndarray(frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
    return frame.to_ndarray(format=pixel_format, interpolation=EXACT)


def _unit() -> np.ndarray:
    return np.linspace(0, 1, 65536)


@cache
def _pq_table() -> np.ndarray:
    """float32 cd/m2 of a 16-bit PQ signal (SMPTE ST 2084)."""
    return _pq_to_nits(_unit()).astype(np.float32)


@cache
def _hlg_table() -> np.ndarray:
    """float32 scene light, 0 to 1, of a 16-bit HLG signal (ARIB STD-B67, BT.2100)."""
    signal = _unit()
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(
        np.float32
    )


@cache
def _bt709_table() -> np.ndarray:
    """float32 light, 0 to 1, of a 16-bit BT.709 signal."""
    signal = _unit()
    return np.where(signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45)).astype(
        np.float32
    )


@cache
def _bt709_bytes() -> np.ndarray:
    """uint8 BT.709 signal of light (step / 65,535)^2."""
    light = _unit() ** 2
    signal = np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)
    return np.rint(255 * signal).astype(np.uint8)


@cache
def _bt1886_bytes() -> np.ndarray:
    """uint8 signal for a BT.1886 display of light (step / 65,535)^2 times its white."""
    return np.rint(255 * _unit() ** (2 / 2.4)).astype(np.uint8)


def _hlg_nits(signal_HWC: np.ndarray) -> np.ndarray:
    """BT.2100's display light of HLG on a display of 1,000 cd/m2 (system gamma 1.2)."""
    scene_HWC = _hlg_table()[signal_HWC]
    luminance_HW = scene_HWC @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return np.float32(_PEAK) * luminance_HW[..., None] ** np.float32(0.2) * scene_HWC


def _rolled_off(nits_HWC: np.ndarray) -> np.ndarray:
    """Bring cd/m2 up to the peak into those up to white; a pixel's hue stays (one factor)."""
    brightest_HW = nits_HWC.max(axis=-1)
    steps_HW = np.rint(np.clip(brightest_HW / np.float32(_PEAK), 0, 1) ** np.float32(0.25) * 65535)
    return nits_HWC * _roll_off_factors()[steps_HW.astype(np.uint16)][..., None]


@cache
def _roll_off_factors() -> np.ndarray:
    """float32 factor for a pixel whose brightest channel is peak * (step / 65,535)^4 cd/m2.

    BT.2390's EETF: in PQ's scale the identity up to its knee, then a Hermite spline to white.
    """
    nits = _PEAK * _unit() ** 4
    top = _nits_to_pq(np.array(_PEAK))
    signal = _nits_to_pq(nits) / top
    white = _nits_to_pq(np.array(_WHITE)) / top
    knee = 1.5 * white - 0.5
    t = (signal - knee) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * white
    )
    mapped = _pq_to_nits(np.where(signal < knee, signal, spline) * top)
    return (mapped / np.maximum(nits, 1e-9)).astype(np.float32)


_PQ_M1, _PQ_M2 = 2610 / 16384, 2523 / 4096 * 128
_PQ_C1, _PQ_C2, _PQ_C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def _pq_to_nits(signal: np.ndarray) -> np.ndarray:
    root = signal ** (1 / _PQ_M2)
    return 10_000 * (np.maximum(root - _PQ_C1, 0) / (_PQ_C2 - _PQ_C3 * root)) ** (1 / _PQ_M1)


def _nits_to_pq(nits: np.ndarray) -> np.ndarray:
    power = (nits / 10_000) ** _PQ_M1
    return ((_PQ_C1 + _PQ_C2 * power) / (1 + _PQ_C3 * power)) ** _PQ_M2


@cache
def _to_bt709(chromaticities: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 3] from linear RGB of these primaries to BT.709's; white stays white."""
    matrix = np.linalg.inv(_to_xyz(_BT709)) @ _adapted(chromaticities) @ _to_xyz(chromaticities)
    return matrix.astype(np.float32)


def _to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    xyz = np.array([_xyz(x, y) for x, y in _pairs(chromaticities)]).T
    primaries, white = xyz[:, :3], xyz[:, 3]
    return primaries * np.linalg.solve(primaries, white)


def _adapted(chromaticities: tuple[float, ...]) -> np.ndarray:
    """Bradford's adaptation of their white to BT.709's."""
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    source, target = (bradford @ _xyz(*_pairs(c)[3]) for c in (chromaticities, _BT709))
    return np.linalg.inv(bradford) @ np.diag(target / source) @ bradford


def _xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


def _pairs(chromaticities: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(chromaticities[::2], chromaticities[1::2], strict=True))
