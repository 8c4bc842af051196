"""Mask images as people have them to the pixels of one subject."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from stages.clips.limits import MAX_FRAME_PIXELS

# Legend: H W pixels, C colour.

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OTHER_FORMATS = {b"\xff\xd8\xff": "a JPEG", b"GIF8": "a GIF", b"RIFF": "a WebP", b"BM": "a BMP"}

_FEW = 8
"""A mask with soft edges has more values than this; labels are rarely as many."""
_NOISE = 8 / 255
"""How far compression moves black and white, as a share of white."""
_COLOUR_NOISE = 24
"""How far it moves a colour, of 255."""
_VOID = 255
"""The index by which many label images mark what nobody decided on."""


def decode_mask(png: bytes, ids: Sequence[int] | None = None) -> np.ndarray:
    """The bool [H, W] mask in a PNG.

    - black and another grey (white, 1, …), in 1, 8 or 16 bits, with soft edges or compression's
      noise: what is nearer to the other grey;
    - a palette of colours, as DAVIS and YouTube-VOS have it: every index above 0;
    - one colour on black: the colour;
    - an alpha channel, where it shows something: what is opaque.

    Args:
        png: The file's content.
        ids: Take the pixels with these palette indices or grey values instead.

    Raises:
        ValueError: The bytes are no PNG, it has over MAX_FRAME_PIXELS, or what is meant cannot be
            told; the values found are named.
    """
    image = _open(png)
    if ids is not None:
        return _with_ids(image, ids)
    if image.mode in ("RGBA", "LA", "PA") or (
        "transparency" in image.info and image.mode in ("P", "L", "RGB", "1")
    ):
        return _with_alpha(np.asarray(image.convert("RGBA")))
    if image.mode == "P":
        return _with_palette(image)
    values = np.asarray(image)
    return _of_colours(values) if values.ndim == 3 else _of_greys(values)


def _open(png: bytes) -> Image.Image:
    """The image, decoded.

    Raises:
        ValueError: As `decode_mask`.
    """
    if not png.startswith(_SIGNATURE):
        known = [name for start, name in _OTHER_FORMATS.items() if png.startswith(start)]
        found = known[0] if known else f"something that begins with {png[:8]!r}"
        raise ValueError(f"the mask is no PNG but {found if png else 'an empty file'}")
    try:
        image = Image.open(io.BytesIO(png), formats=("PNG",))
        size = (image.width, image.height)
        if image.width * image.height <= MAX_FRAME_PIXELS:
            image.load()
            return image
    except UnidentifiedImageError as error:
        # Pillow's own words hold the address of an object.
        raise ValueError("the mask is no readable PNG: its header is damaged") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the mask is no readable PNG: {error}") from error
    raise ValueError(
        f"the mask is {size[0]}x{size[1]}; at most {MAX_FRAME_PIXELS:,} pixels are read"
    )


def _with_ids(image: Image.Image, ids: Sequence[int]) -> np.ndarray:
    values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError(f"mask_ids are values of a palette or of greys; the mask is {image.mode}")
    mask_HW = np.isin(values, np.array(ids, np.int64))
    if not mask_HW.any():
        raise ValueError(f"the mask has none of mask_ids {list(ids)}; it holds {_shown(values)}")
    return mask_HW


def _with_palette(image: Image.Image) -> np.ndarray:
    indices = np.asarray(image)
    palette = np.zeros((256, 3), np.uint8)
    entries = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    used = np.unique(indices)
    if (np.ptp(palette[used], axis=1) == 0).all():
        return _of_greys(palette[indices, 0])
    if used[0] != 0 or (palette[0].any() and not palette[used].any(axis=1).all()):
        raise ValueError(
            "the mask's palette does not tell the subject from the rest; it holds "
            f"{_shown(indices)}: name the subject's, such as {_example(used)}"
        )
    if _VOID in used and len(used) > 2:
        raise ValueError(
            f"the mask holds {_shown(indices)}, and 255 often marks what nobody decided on: name "
            f"the subject's, such as {_example(used[used != _VOID])}"
        )
    return indices > 0


def _with_alpha(image_HWC: np.ndarray) -> np.ndarray:
    colours, alpha = image_HWC[..., :3], image_HWC[..., 3]
    if (alpha == alpha.flat[0]).all():
        return _of_colours(colours)
    cut_out = _of_greys(alpha)
    try:
        drawn = _of_colours(colours)
    except ValueError:  # a picture of the subject
        return cut_out
    if not drawn.any() or drawn.all() or (drawn == cut_out).mean() > 0.99:
        return cut_out
    raise ValueError("the mask's colours show one subject and its alpha channel another; keep one")


def _of_colours(image_HWC: np.ndarray) -> np.ndarray:
    """Of greys that are stored as colours, or of one colour on black."""
    red, green, blue = (image_HWC[..., channel] for channel in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    if (brightest - darkest).max() <= _COLOUR_NOISE:
        return _of_greys(brightest)
    bright = image_HWC[brightest > brightest.max() / 2]
    colour = np.median(bright, axis=0)
    expected_HWC = brightest[..., None] * (colour / max(colour.max(), 1))
    if np.abs(image_HWC - expected_HWC).max() <= _COLOUR_NOISE:
        return _of_greys(brightest)
    flat = image_HWC.reshape(-1, 3)
    found = np.unique(flat[:: max(1, len(flat) // 100_000)], axis=0)
    shown = ", ".join(str(tuple(map(int, one))) for one in found[:6])
    raise ValueError(
        f"the mask has several colours ({shown}{', …' if len(found) > 6 else ''}); a mask is white "
        "on the subject and black elsewhere, or a palette image whose indices mask_ids can name"
    )


def _of_greys(values_HW: np.ndarray) -> np.ndarray:
    """Of black and one other grey, whatever its value."""
    if values_HW.dtype == np.bool_:
        values_HW = values_HW.view(np.uint8)
    low, high = int(values_HW.min()), int(values_HW.max())
    if low == high:
        if high in (0, 1, 255, 65535):
            return values_HW > 0
        raise ValueError(f"every pixel of the mask is {high}; 0 and 255 are usual")
    levels = np.unique(values_HW)
    areas = _values_of_areas(values_HW)
    noise = 0.0
    if len(levels) > _FEW:
        noise = high * _NOISE
        if len(areas) and areas[-1] > high / 2:  # beyond are overshoots
            low, high = int(areas[0]), int(areas[-1])
    between = areas[(areas > low + noise) & (areas < high - noise)]
    if len(between):
        raise ValueError(
            f"the mask holds {_shown(areas)}, not black and white alone: name the subject's, such "
            f"as {_example(areas)}"
        )
    if low > high / 4:
        raise ValueError(
            f"the mask holds {_shown(values_HW)} and no black: name the subject's, such as "
            f"{_example(levels)}"
        )
    quarter = (high - low) / 4
    bright = np.count_nonzero(values_HW > int(high - quarter))
    grey = np.count_nonzero(values_HW > int(low + quarter)) - bright
    # Of a small or blurred subject the edge may be most.
    if grey > bright and not (areas >= high - noise).any():
        raise ValueError(
            f"the mask is a picture of {len(levels)} greys from {low} to {high}; a mask is white "
            "on the subject and black elsewhere"
        )
    return values_HW > (low + high) // 2


def _values_of_areas(values_HW: np.ndarray) -> np.ndarray:
    """The values that fill a square of 3x3 pixels somewhere: areas, not edges."""
    if min(values_HW.shape) < 3:
        return np.empty(0, values_HW.dtype)
    centre = values_HW[1:-1, 1:-1]
    same = np.ones(centre.shape, bool)
    for y in (0, 1, 2):
        for x in (0, 1, 2):
            same &= values_HW[y : y + centre.shape[0], x : x + centre.shape[1]] == centre
    return np.unique(centre[same])


def _shown(values: np.ndarray) -> str:
    found = np.unique(values)
    listed = ", ".join(map(str, found[:8].tolist()))
    return f"the values {listed}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"


def _example(values: np.ndarray) -> str:
    above = [int(value) for value in np.unique(values) if value > 0]
    return f'"mask_ids": [{above[0] if above else 1}]'
