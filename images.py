"""From an image file to the array that a network takes."""

import io
import logging
import os
import struct
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP AVIF"  # of Pillow; the last is new in 11.3
DEEP = "one of the 16-bit images, which do not say what is white: convert it to 8 bits"
DAMAGED = "it is cut off, or damaged"


class UserError(ValueError):
    """A mistake that the user can correct: `common.cli` prints it as one line."""


@dataclass
class Spec:
    """What a network expects of its input. It is in every checkpoint, for `predict.py`."""

    classes: list[str]
    size: int  # height and width, in pixels
    channels: int = 3  # 3: RGB, 1: grayscale
    mean: float | list = 0.5  # the network gets (pixel / 255 - mean) / std,
    std: float | list = 0.5  # one number, or one for each channel
    crop: float = 0.0  # side of a centered square, as a fraction of the shorter side; 0: no crop

    def __post_init__(self):
        self.classes = [str(name) for name in self.classes]
        self.mean = np.asarray(self.mean, float).tolist()  # plain numbers, for a checkpoint
        self.std = np.asarray(self.std, float).tolist()

    @property
    def shape(self):
        """Of an image as a network takes it: height, width, channels."""
        return self.size, self.size, self.channels


def printable(text):
    """The first 200 characters of a text, in one line, control characters escaped."""
    line = " ".join(str(text).split())[:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def decode(file):
    """An image file as uint8 RGB (H, W, 3), rotated by its EXIF, on white where it is transparent.
    Raises UserError where it cannot be read."""
    try:
        if not os.path.isfile(file):  # a pipe has no end
            raise ValueError("no such file")
        data = Path(file).read_bytes()
        if data.startswith(b"\x89PNG") and is_plain_png(data):
            return decode_by_opencv(data)
        return decode_by_pillow(data)
    except Exception as error:  # a damaged file can raise anything in there
        why = printable(error).split(" <")[0] or DAMAGED
        raise UserError(f"{printable(str(file)[-200:])} cannot be read: {why}") from None


def is_plain_png(data):
    """Whether OpenCV takes a PNG rightly. Raises ValueError for what nothing here takes rightly."""
    chunks = set()
    start = 8
    while b"IEND" not in chunks:  # decoders believe a length of 4 GB, and take as much memory
        chunks.add(data[start + 4 : start + 8])
        start += 12 + int.from_bytes(data[start : start + 4], "big")
        if start > len(data):
            raise ValueError(DAMAGED)
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    if depth == 16:
        raise ValueError(DEEP)
    if color == 0 and depth < 8 and b"tRNS" in chunks:  # Pillow takes another gray for transparent
        raise ValueError("few bits and a transparent gray: convert it to 8 bits")
    if color in (4, 6) or width * height > 2**26:  # alpha; Pillow refuses bombs
        return False
    # Of an animation it takes another image; what it finds odd, it prints.
    return chunks.isdisjoint([b"tRNS", b"eXIf", b"iCCP", b"acTL"])


def decode_by_opencv(data):
    """A JPEG or a plain PNG, in less time than Pillow takes."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError(DAMAGED)
    return image


def decode_by_pillow(data):
    """An image of any of FORMATS."""
    image = Image.open(io.BytesIO(data), formats=FORMATS.split())
    if image.format in ("JPEG", "MPO"):
        return decode_by_opencv(data)
    if image.format == "TIFF":
        check_tiff(image)
    image.load()
    if image.mode[0] in "FI":
        raise ValueError(DEEP)
    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return np.array(white)
    return np.array(image.convert("RGB"))


def check_tiff(image):
    """Raise ValueError for a TIFF whose pixels Pillow may take for others."""
    tags = image.tag_v2
    if max(tags.get(258, [1])) > 8:  # bits
        raise ValueError(DEEP)
    is_infrared = image.mode == "RGBA" and 338 not in tags  # or whatever a fourth band may be
    if is_infrared or tags.get(284) == 2 or tags.get(339, [1])[0] != 1:  # band by band; signed
        raise ValueError("a TIFF of an unusual kind: convert it to RGB")


def prepare(image, spec):
    """A decoded image, uint8 (H, W), (H, W, 1) or (H, W, 3), as a network takes it, uint8 (size,
    size, channels)."""
    size = spec.size
    height, width = image.shape[:2]
    if spec.crop:
        side = max(1, round(spec.crop * min(height, width)))
        image = image[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
        height = width = side
    smaller = (min(width, size), min(height, size))
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)  # the mean of all pixels
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    if image.ndim == 2 and spec.channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    elif image.ndim == 3 and spec.channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return image.reshape(spec.shape)


def read_images(sources, spec):
    """Yield each image as `prepare` gives it, or a UserError where it cannot be read, in order.
    sources: files, decoded images, or (data set of torchvision, index) pairs."""

    def read(source):
        try:
            if isinstance(source, tuple):
                dataset, index = source
                source = np.asarray(dataset[index][0].convert("RGB"))
            elif not isinstance(source, np.ndarray):
                source = decode(source)
            return prepare(source, spec)
        except (OSError, ValueError, cv2.error) as error:
            return UserError(error)

    chunk = min(16, len(sources) // os.cpu_count() // 2 + 1)  # a task costs as much as a small file
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # its errors, as its warnings, name no file
    # OpenCV and Pillow release Python's global lock.
    with ThreadPool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from pool.imap(read, sources, chunk)
