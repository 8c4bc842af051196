"""Masks in the formats of various programs: read correctly, or refused."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from stages.clips.dataset.masks import decode_mask


def png(image: np.ndarray | Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, format="PNG", **options)
    return out.getvalue()


def disc(height: int = 48, width: int = 64, radius: float = 14, x: float = 30) -> np.ndarray:
    """bool [height, width]."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (rows - height / 2) ** 2 + (columns - x) ** 2 < radius**2


def labels() -> np.ndarray:
    """Three subjects, 1, 2 and 3, on 0."""
    rows = np.zeros((48, 64), np.uint8)
    for number in (1, 2, 3):
        rows[disc(radius=6, x=16 * number)] = number
    return rows


def palette_image(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indices, mode="P")
    image.putpalette([part for colour in colours for part in colour])
    return image


DAVIS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
MASK = disc()
BYTES = MASK.astype(np.uint8)
PHOTO = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def rgba(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([np.broadcast_to(colours, (*alpha.shape, 3)), alpha]).astype(np.uint8)


AS_MEANT = {
    "grey": png(BYTES * 255),
    "0 and 1": png(BYTES),
    "0 and 100": png(BYTES * 100),
    "one bit": png(MASK),
    "video levels": png((16 + BYTES * 219).astype(np.uint8)),
    "16 bits": png(BYTES.astype(np.uint16) * 65535),
    "16 bits, 0 and 1": png(BYTES.astype(np.uint16)),
    "grey as RGB": png(np.repeat(BYTES[..., None] * 255, 3, axis=2)),
    "red on black": png(BYTES[..., None] * np.array([200, 10, 10], np.uint8)),
    "DAVIS, one subject": png(palette_image(BYTES, DAVIS)),
    "DAVIS, index 3": png(palette_image(BYTES * 3, DAVIS)),
    "black and white palette": png(palette_image(BYTES, [(0, 0, 0), (255, 255, 255)])),
    "white and black palette": png(palette_image(1 - BYTES, [(255, 255, 255), (0, 0, 0)])),
    "opaque RGBA": png(rgba(BYTES[..., None] * 255, np.full(MASK.shape, 255))),
    "white with alpha": png(rgba(np.array([255, 255, 255]), BYTES * 255)),
    "cut-out": png(rgba(PHOTO, BYTES * 255)),
    "cut-out on black": png(rgba(PHOTO * BYTES[..., None], BYTES * 255)),
    "black and white cut-out": png(rgba(BYTES[..., None] * 255, BYTES * 255)),
    "grey with alpha": png(np.dstack([BYTES * 90, BYTES * 255])),
    "palette with a transparent index": png(palette_image(BYTES, DAVIS), transparency=0),
}


@pytest.mark.parametrize("name", AS_MEANT)
def test_a_mask_is_read_as_it_is_meant(name):
    assert np.array_equal(decode_mask(AS_MEANT[name]), MASK)


@pytest.mark.parametrize("quality", [30, 60, 75, 95])
@pytest.mark.parametrize("colour", [(255, 255, 255), (220, 30, 30)])
def test_compressions_noise_is_no_label(quality, colour):
    image = Image.fromarray(BYTES[..., None] * np.array(colour, np.uint8))
    out = io.BytesIO()
    image.convert("L" if len(set(colour)) == 1 else "RGB").save(
        out, format="JPEG", quality=quality, subsampling=0
    )
    try:
        found = decode_mask(png(Image.open(io.BytesIO(out.getvalue()))))
    except ValueError as error:  # colours bleed: then they are told
        assert len(set(colour)) > 1 and "several colours" in str(error)
    else:
        assert (found == MASK).mean() > 0.98


@pytest.mark.parametrize("blur", [0.5, 1, 2, 4])
@pytest.mark.parametrize("radius", [2, 5, 14])
def test_soft_edges_are_cut_in_the_middle(blur, radius):
    hard = disc(radius=radius)
    soft = Image.fromarray(hard.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blur))
    middle = (np.asarray(soft).min() + np.asarray(soft).max()) / 2
    try:
        found = decode_mask(png(soft))
    except ValueError as error:  # nothing is left but the edge
        assert radius <= 3 * blur and "a picture of" in str(error)
    else:
        assert np.array_equal(found, np.asarray(soft) > middle)


def test_antialiased_edges_are_no_labels():
    fine = disc(480, 640, 140, 300).astype(np.uint8) * 255
    for box in (2, 4, 5):  # 2 gives the values 0, 64, 128, 191, 255
        soft = Image.fromarray(fine).reduce(box)
        found = decode_mask(png(soft))
        assert np.array_equal(found, np.asarray(soft) > 127)


def test_subjects_of_a_label_mask_are_chosen():
    davis = png(palette_image(labels(), DAVIS))
    assert np.array_equal(decode_mask(davis), labels() > 0)
    for source in (davis, png(labels()), png(labels().astype(np.uint16))):
        assert np.array_equal(decode_mask(source, [2]), labels() == 2)
        assert np.array_equal(decode_mask(source, [1, 3]), np.isin(labels(), [1, 3]))
        # Not every subject is on every first frame.
        assert np.array_equal(decode_mask(source, [3, 7]), labels() == 3)
        with pytest.raises(ValueError, match=r"none of mask_ids .* has the values 0, 1, 2, 3"):
            decode_mask(source, [7, 9])
    assert np.array_equal(decode_mask(png(MASK), [0]), ~MASK)
    with pytest.raises(ValueError, match="the mask is RGBA"):
        decode_mask(png(rgba(PHOTO, BYTES * 255)), [1])


def with_void(indices: np.ndarray) -> np.ndarray:
    indices = indices.copy()
    indices[:4] = 255
    return indices


REFUSED = {
    "label mask": (png(labels()), "the values 0, 1, 2, 3.*mask_ids"),
    "label mask of 16 bits": (png(labels().astype(np.uint16)), "the values 0, 1, 2, 3"),
    "labels spread for the eye": (png(labels() * 80), "the values 0, 80, 160, 240"),
    "labels and void": (png(with_void(labels())), "the values 0, 1, 2, 3, 255"),
    "palette with void": (
        png(palette_image(with_void(labels()), [*DAVIS, *[(1, 2, 3)] * 252])),
        "the values 0, 1, 2, 3, 255, and 255 often",
    ),
    "trimap": (
        png(np.where(disc(radius=8), 255, np.where(disc(), 128, 0)).astype(np.uint8)),
        "the values 0, 128, 255",
    ),
    "no background": (png(BYTES + 1), "the values 1, 2 and no black"),
    "one grey": (png(np.full((8, 8), 7, np.uint8)), "every pixel of the mask is 7"),
    "palette without background": (
        png(palette_image(BYTES + 1, DAVIS)),
        "does not distinguish the subject from the rest; it has the values 1, 2",
    ),
    "red and black palette": (
        png(palette_image(1 - BYTES, [(128, 0, 0), (0, 0, 0)])),
        "does not distinguish the subject from the rest",
    ),
    "DAVIS as RGB": (
        png(palette_image(labels(), DAVIS).convert("RGB")),
        r"several colours \(\(0, 0, 0\), \(0, 128, 0\), \(128, 0, 0\)",
    ),
    "photo": (png(PHOTO), "several colours"),
    "depth map": (
        png(np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (48, 64)).copy()),
        "a picture of 64 greys from 0 to 252",
    ),
    "alpha against colours": (
        png(rgba(BYTES[..., None] * 255, (1 - BYTES) * 255)),
        "colours show one subject and its alpha",
    ),
    "JPEG": (b"\xff\xd8\xff\xe0 and more", "the mask is not a PNG but a JPEG"),
    "text": (b"no picture", "not a PNG but a file that starts with b'no pictu'"),
    "empty": (b"", "not a PNG but an empty file"),
    "cut off": (png(PHOTO)[:-30], "not a readable PNG"),
    "header alone": (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a readable PNG: its header is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_the_same_words_each_time(name):
    content, words = REFUSED[name]
    told = []
    for _ in range(2):
        with pytest.raises(ValueError, match=words) as error:
            decode_mask(content)
        told.append(str(error.value))
    assert told[0] == told[1] and " at 0x" not in told[0]


@pytest.mark.parametrize(
    "image",
    [
        np.array([[0, 255], [0, 0]], np.uint8),
        np.array([[0, 1], [0, 0]], np.uint8),
        np.array([[False, True], [False, False]]),
        np.repeat(np.array([[0, 200], [0, 20]], np.uint8)[..., None], 3, axis=2),
    ],
    ids=["grey", "indices", "1 bit", "RGB"],
)
def test_masks_of_a_few_pixels_read_alike(image):
    assert decode_mask(png(image)).tolist() == [[False, True], [False, False]]


def test_a_giant_mask_is_refused_before_it_is_decoded():
    content = png(Image.new("1", (20_000, 4_000)))
    assert len(content) < 50_000
    with pytest.raises(ValueError, match="20000x4000"):
        decode_mask(content)
