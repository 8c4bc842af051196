"""Decodes mask images in common formats to the boolean mask of one subject."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from cache_schema.shown_text import first_few
from stages.clips.video.streams import MAX_FRAME_PIXELS

# Legend: H W pixels, C colour.

MAX_MASK_BYTES = 64 << 20
"""Largest mask image (64 MiB)."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OTHER_FORMATS = {b"\xff\xd8\xff": "a JPEG", b"GIF8": "a GIF", b"RIFF": "a WebP", b"BM": "a BMP"}

_MAX_HARD_VALUES = 8
"""Masks with soft edges have more distinct values than this; label images rarely do."""
_GREY_NOISE = 8 / 255
"""Compression noise of black and white, as a fraction of white."""
_COLOUR_NOISE = 24
"""Compression noise of a colour channel, out of 255."""
_VOID = 255
"""Index of unlabelled ("void") pixels in many label images."""


def decode_mask(png: bytes, ids: Sequence[int] | None = None) -> np.ndarray:
    """Decode a PNG to a bool [H, W] mask.

    - black and another grey (white, 1, …), in 1, 8 or 16 bits, possibly with soft edges or
      compression noise: pixels closer to the other grey;
    - a colour palette, as in DAVIS and YouTube-VOS: every index above 0;
    - one colour on black: the coloured pixels;
    - an alpha channel that is not constant: the opaque pixels.

    Args:
        png: Content of the file.
        ids: Select the pixels with these palette indices or grey values instead.

    Raises:
        ValueError: The content is not a PNG, has over MAX_FRAME_PIXELS pixels, or is ambiguous;
            the message lists the values found.
    """
    image = _open(png)
    if ids is not None:
        return _mask_of_ids(image, ids)
    if image.mode in ("RGBA", "LA", "PA") or (
        "transparency" in image.info and image.mode in ("P", "L", "RGB", "1")
    ):
        return _mask_of_alpha(np.asarray(image.convert("RGBA")))
    if image.mode == "P":
        return _mask_of_palette(image)
    values = np.asarray(image)
    return _mask_of_colours(values) if values.ndim == 3 else _mask_of_greys(values)


def _open(png: bytes) -> Image.Image:
    """Decode the image.

    Raises:
        ValueError: As `decode_mask`.
    """
    if not png.startswith(_SIGNATURE):
        known = [name for start, name in _OTHER_FORMATS.items() if png.startswith(start)]
        found = known[0] if known else f"a file that starts with {png[:8]!r}"
        raise ValueError(f"the mask is not a PNG but {found if png else 'an empty file'}")
    try:
        image = Image.open(io.BytesIO(png), formats=("PNG",))
        size = (image.width, image.height)
        if image.width * image.height <= MAX_FRAME_PIXELS:
            image.load()
            return image
    except UnidentifiedImageError as error:
        # Pillow's message contains the address of an object, which differs between runs.
        raise ValueError("the mask is not a readable PNG: its header is damaged") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the mask is not a readable PNG: {error}") from error
    raise ValueError(f"the mask is {size[0]}x{size[1]}; the limit is {MAX_FRAME_PIXELS:,} pixels")


def _mask_of_ids(image: Image.Image, ids: Sequence[int]) -> np.ndarray:
    values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError(f"mask_ids need a palette or greyscale mask; the mask is {image.mode}")
    mask_HW = np.isin(values, np.array(ids, np.int64))
    if not mask_HW.any():
        raise ValueError(
            f"the mask has none of mask_ids {list(ids)}; it has {_describe_values(values)}"
        )
    return mask_HW


def _mask_of_palette(image: Image.Image) -> np.ndarray:
    indices = np.asarray(image)
    palette = np.zeros((256, 3), np.uint8)
    entries = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    used = np.unique(indices)
    if (np.ptp(palette[used], axis=1) == 0).all():
        return _mask_of_greys(palette[indices, 0])
    if used[0] != 0 or (palette[0].any() and not palette[used].any(axis=1).all()):
        raise ValueError(
            "the mask's palette does not distinguish the subject from the rest; it has "
            f"{_describe_values(indices)}: select those of the subject, such as "
            f"{_example_ids(used)}"
        )
    if _VOID in used and len(used) > 2:
        raise ValueError(
            f"the mask has {_describe_values(indices)}, and 255 often marks unlabelled pixels: "
            f"select those of the subject, such as {_example_ids(used[used != _VOID])}"
        )
    return indices > 0


def _mask_of_alpha(image_HWC: np.ndarray) -> np.ndarray:
    colours, alpha = image_HWC[..., :3], image_HWC[..., 3]
    if (alpha == alpha.flat[0]).all():
        return _mask_of_colours(colours)
    cut_out = _mask_of_greys(alpha)
    try:
        drawn = _mask_of_colours(colours)
    except ValueError:  # the colours are a picture of the subject
        return cut_out
    if not drawn.any() or drawn.all() or (drawn == cut_out).mean() > 0.99:
        return cut_out
    raise ValueError("the mask's colours show one subject and its alpha channel another; keep one")


def _mask_of_colours(image_HWC: np.ndarray) -> np.ndarray:
    """The mask of greys stored as RGB, or of one colour on black."""
    red, green, blue = (image_HWC[..., channel] for channel in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    if (brightest - darkest).max() <= _COLOUR_NOISE:
        return _mask_of_greys(brightest)
    bright = image_HWC[brightest > brightest.max() / 2]
    colour = np.median(bright, axis=0)
    expected_HWC = brightest[..., None] * (colour / max(colour.max(), 1))
    if np.abs(image_HWC - expected_HWC).max() <= _COLOUR_NOISE:
        return _mask_of_greys(brightest)
    flat = image_HWC.reshape(-1, 3)
    found = np.unique(flat[:: max(1, len(flat) // 100_000)], axis=0)
    shown = ", ".join(str(tuple(map(int, one))) for one in found[:6])
    raise ValueError(
        f"the mask has several colours ({shown}{', …' if len(found) > 6 else ''}); a mask is white "
        "on the subject and black elsewhere, or a palette image whose indices mask_ids can name"
    )


def _mask_of_greys(values_HW: np.ndarray) -> np.ndarray:
    """The mask of black and one other grey of any value."""
    if values_HW.dtype == np.bool_:
        values_HW = values_HW.view(np.uint8)
    low, high = int(values_HW.min()), int(values_HW.max())
    if low == high:
        if high in (0, 1, 255, 65535):
            return values_HW > 0
        raise ValueError(f"every pixel of the mask is {high}; 0 and 255 are usual")
    levels = np.unique(values_HW)
    areas = _area_values(values_HW)
    noise = 0.0
    if len(levels) > _MAX_HARD_VALUES:
        noise = high * _GREY_NOISE
        if len(areas) and areas[-1] > high / 2:  # values beyond are overshoot
            low, high = int(areas[0]), int(areas[-1])
    intermediate = areas[(areas > low + noise) & (areas < high - noise)]
    if len(intermediate):
        raise ValueError(
            f"the mask has {_describe_values(areas)}, not only black and white: select those of "
            f"the subject, such as {_example_ids(areas)}"
        )
    if low > high / 4:
        raise ValueError(
            f"the mask has {_describe_values(values_HW)} and no black: select those of the "
            f"subject, such as {_example_ids(levels)}"
        )
    quarter = (high - low) / 4
    bright = np.count_nonzero(values_HW > int(high - quarter))
    grey = np.count_nonzero(values_HW > int(low + quarter)) - bright
    # A small or blurred subject may consist mostly of edges.
    if grey > bright and not (areas >= high - noise).any():
        raise ValueError(
            f"the mask is a picture of {len(levels)} greys from {low} to {high}; a mask is white "
            "on the subject and black elsewhere"
        )
    return values_HW > (low + high) // 2


def _area_values(values_HW: np.ndarray) -> np.ndarray:
    """The values that fill at least one square of 3x3 pixels, which edges do not."""
    if min(values_HW.shape) < 3:
        return np.empty(0, values_HW.dtype)
    centre = values_HW[1:-1, 1:-1]
    same = np.ones(centre.shape, bool)
    for y in (0, 1, 2):
        for x in (0, 1, 2):
            same &= values_HW[y : y + centre.shape[0], x : x + centre.shape[1]] == centre
    return np.unique(centre[same])


def _describe_values(values: np.ndarray) -> str:
    return f"the values {first_few([str(value) for value in np.unique(values)], 8)}"


def _example_ids(values: np.ndarray) -> str:
    above = [int(value) for value in np.unique(values) if value > 0]
    return f'"mask_ids": [{above[0] if above else 1}]'
