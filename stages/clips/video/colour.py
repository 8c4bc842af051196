"""Converts decoded frames to 8-bit SDR RGB with BT.709 primaries.

FFmpeg converts the matrix and range signalled by a frame, and assumes BT.601, limited range, if
there are none. This module does the rest: PQ and HLG are tone-mapped to SDR (BT.2390's roll-off
from 1,000 cd/m2 to the 203 cd/m2 of BT.2408's reference white), and BT.2020 and P3 primaries are
converted to BT.709.
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
"""libswscale flags for RGB <-> YUV: within 1 of 255 of the exact result, and identical on every
processor. Without the last three flags values differ by up to 4 between instruction sets."""

_PEAK = 1000.0
"""Assumed peak luminance of HDR frames, cd/m2."""
_WHITE = 203.0
"""Luminance mapped to full scale, cd/m2: BT.2408's reference white."""

_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_LINEAR_OR_LOG = {
    ColorTrc.LINEAR: "linear",
    ColorTrc.LOG: "logarithmic",
    ColorTrc.LOG_SQRT: "logarithmic",
    ColorTrc.SMPTE428: "SMPTE 428",
}
_MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)
"""Colour matrices that FFmpeg converts, as numbered in ITU-T H.273; 3 is reserved, 2 unknown."""
_MATRIX_NAMES = {8: "YCgCo", 10: "BT.2020 constant luminance", 14: "ICtCp", 15: "IPT-C2"}

_WIDE_GAMUTS = {
    ColorPrimaries.BT2020: ("BT.2020", (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290)),
    ColorPrimaries.SMPTE431: ("DCI-P3", (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351)),
    ColorPrimaries.SMPTE432: ("P3-D65", (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290)),
}
"""Chromaticities x, y of red, green, blue and white. BT.601 primaries are within a few percent of
BT.709 and are not converted."""
_BT709 = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290)


@dataclass(frozen=True, slots=True)
class Colour:
    """Colour description of a stream or frame, and its conversion."""

    transfer: int
    """`av.video.reformatter.ColorTrc`; unknown values count as SDR."""
    primaries: int
    """`ColorPrimaries`; unknown values count as BT.709, or as BT.2020 if the transfer is HDR."""
    matrix: int
    """Colour matrix, as numbered in ITU-T H.273."""

    @property
    def hdr(self) -> str | None:
        """ "PQ" or "HLG"; None for SDR frames."""
        return _HDR.get(self.transfer)  # type: ignore[call-overload]

    @property
    def conversions(self) -> tuple[str, ...]:
        """Conversions by `rgb` beyond those of FFmpeg, as stored in a clip's record."""
        wide_gamut = self._wide_gamut
        return (
            *((f"{self.hdr} to SDR",) if self.hdr else ()),
            *((f"{wide_gamut[0]} to BT.709",) if wide_gamut else ()),
        )

    @property
    def problem(self) -> str | None:
        """Why these colours cannot be converted; None if they can."""
        if self.transfer in _LINEAR_OR_LOG:
            return f"{_LINEAR_OR_LOG[self.transfer]} transfer is not supported"  # type: ignore[index]
        if self.matrix not in _MATRICES:
            name = _MATRIX_NAMES.get(self.matrix, f"number {self.matrix}")
            return f"colour matrix {name} is not supported"
        return None

    def rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame of these colours, without `problem`, to uint8 [H, W, 3] in BT.709."""
        if not self.conversions:
            return _to_ndarray(frame, "rgb24")
        return self._to_bt709_bytes(_to_ndarray(frame, "rgb48le"))

    def _to_bt709_bytes(self, signal_HWC: np.ndarray) -> np.ndarray:
        """Convert uint16 RGB of these primaries and transfer to uint8 BT.709."""
        wide_gamut = self._wide_gamut
        if self.hdr:
            nits_HWC = _pq_table()[signal_HWC] if self.hdr == "PQ" else _hlg_nits(signal_HWC)
            light_HWC = _roll_off(nits_HWC) / np.float32(_WHITE)
        else:
            light_HWC = _bt709_table()[signal_HWC]
        if wide_gamut:
            light_HWC = light_HWC @ _to_bt709(wide_gamut[1]).T
        # Tables are indexed by the square root, so that steps stay below 8 bits in dark regions.
        roots_HWC = np.sqrt(np.clip(light_HWC, 0, 1))
        steps_HWC = np.rint(roots_HWC * np.float32(65535)).astype(np.uint16)
        return (_bt1886_bytes() if self.hdr else _bt709_bytes())[steps_HWC]

    @property
    def _wide_gamut(self) -> tuple[str, tuple[float, ...]] | None:
        if self.hdr and self.primaries in (0, ColorPrimaries.UNSPECIFIED, 3):  # 0, 3: reserved
            return _WIDE_GAMUTS[ColorPrimaries.BT2020]
        return _WIDE_GAMUTS.get(self.primaries)  # type: ignore[call-overload]


def colour_of(source: Any) -> Colour:
    """The colour description of a decoded frame or a codec context."""
    return Colour(int(source.color_trc), int(source.color_primaries), int(source.colorspace))


def _to_ndarray(frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
    return frame.to_ndarray(format=pixel_format, interpolation=EXACT)


def _unit() -> np.ndarray:
    return np.linspace(0, 1, 65536)


@cache
def _pq_table() -> np.ndarray:
    """16-bit PQ signal (SMPTE ST 2084) -> float32 cd/m2."""
    return _pq_to_nits(_unit()).astype(np.float32)


@cache
def _hlg_table() -> np.ndarray:
    """16-bit HLG signal (ARIB STD-B67, BT.2100) -> float32 scene light, 0 to 1."""
    signal = _unit()
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(
        np.float32
    )


@cache
def _bt709_table() -> np.ndarray:
    """16-bit BT.709 signal -> float32 light, 0 to 1."""
    signal = _unit()
    return np.where(signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45)).astype(
        np.float32
    )


@cache
def _bt709_bytes() -> np.ndarray:
    """Light (step / 65,535)^2 -> uint8 BT.709 signal."""
    light = _unit() ** 2
    signal = np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)
    return np.rint(255 * signal).astype(np.uint8)


@cache
def _bt1886_bytes() -> np.ndarray:
    """Light (step / 65,535)^2, relative to white -> uint8 signal of a BT.1886 display."""
    return np.rint(255 * _unit() ** (2 / 2.4)).astype(np.uint8)


def _hlg_nits(signal_HWC: np.ndarray) -> np.ndarray:
    """HLG signal -> display light, cd/m2, on a 1,000 cd/m2 display (BT.2100, system gamma 1.2)."""
    scene_HWC = _hlg_table()[signal_HWC]
    luminance_HW = scene_HWC @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return np.float32(_PEAK) * luminance_HW[..., None] ** np.float32(0.2) * scene_HWC


def _roll_off(nits_HWC: np.ndarray) -> np.ndarray:
    """Compress luminance from the peak to white, by one factor per pixel, which keeps its hue."""
    brightest_HW = nits_HWC.max(axis=-1)
    steps_HW = np.rint(np.clip(brightest_HW / np.float32(_PEAK), 0, 1) ** np.float32(0.25) * 65535)
    return nits_HWC * _roll_off_factors()[steps_HW.astype(np.uint16)][..., None]


@cache
def _roll_off_factors() -> np.ndarray:
    """float32 factor for a pixel whose brightest channel is peak * (step / 65,535)^4 cd/m2.

    BT.2390's EETF: in the PQ domain the identity up to the knee, then a Hermite spline to white.
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
    """float32 [3, 3] matrix from linear RGB of these primaries to BT.709; white maps to white."""
    matrix = (
        np.linalg.inv(_to_xyz(_BT709)) @ _white_adaptation(chromaticities) @ _to_xyz(chromaticities)
    )
    return matrix.astype(np.float32)


def _to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    xyz = np.array([_xyz(x, y) for x, y in _pairs(chromaticities)]).T
    primaries, white = xyz[:, :3], xyz[:, 3]
    return primaries * np.linalg.solve(primaries, white)


def _white_adaptation(chromaticities: tuple[float, ...]) -> np.ndarray:
    """Bradford chromatic adaptation of the white point to that of BT.709."""
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    source, target = (bradford @ _xyz(*_pairs(c)[3]) for c in (chromaticities, _BT709))
    return np.linalg.inv(bradford) @ np.diag(target / source) @ bradford


def _xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


def _pairs(chromaticities: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(chromaticities[::2], chromaticities[1::2], strict=True))
