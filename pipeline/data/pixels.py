"""URIs -> rows of decoded pixels: what a CPU task hands to the network.

One row per input, always: an image that cannot be read or decoded is a row with a status and no
pixels. Pixels travel as raw bytes of uint8 RGB, because a plain Arrow column crosses processes
without a copy.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.images import DecodedImage, decode_image
from pipeline.data.pseudo_labels import MAX_ERROR_LENGTH
from pipeline.data.sources import ReadFault, fetch_bytes

PIXELS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("exif_orientation", pa.int8()),
        pa.field("num_frames", pa.int32()),
        pa.field("content_sha256", pa.string()),
        pa.field("size_bytes", pa.int64()),
        # (rows, columns, 3) uint8 of the image as the network sees it; null unless status is ok.
        pa.field("pixels", pa.large_binary()),
        pa.field("pixel_rows", pa.int32()),
        pa.field("pixel_columns", pa.int32()),
    ]
)


def load_pixels(
    inputs: pa.Table,
    *,
    min_side: int,
    max_side: int,
    max_pixels: int,
    background: tuple[int, int, int],
) -> pa.Table:
    """Read and decode the images of ``inputs`` (``image_id``, ``uri``): rows of ``PIXELS_SCHEMA``.

    Rows keep their order. Nothing about a single image raises; see ``images.decode_image`` for
    what becomes of each kind of file.
    """
    uris = inputs["uri"].to_pylist()
    columns: dict[str, list[Any]] = {name: [] for name in PIXELS_SCHEMA.names[2:]}
    for data in fetch_bytes(uris):
        if isinstance(data, ReadFault):
            _append(columns, unread(data), None)
        else:
            image = decode_image(
                data,
                min_side=min_side,
                max_side=max_side,
                max_pixels=max_pixels,
                background=background,
            )
            _append(columns, image, data)
    arrays = [inputs["image_id"].combine_chunks(), inputs["uri"].combine_chunks()]
    arrays += [pa.array(columns[field.name], field.type) for field in list(PIXELS_SCHEMA)[2:]]
    return pa.Table.from_arrays(arrays, schema=PIXELS_SCHEMA)


def facts_of(image: DecodedImage, data: bytes | None) -> dict[str, Any]:
    """What a row says of an image and its bytes (None where there are none), but for the pixels."""
    return {
        "status": image.status,
        "error": None if image.error is None else image.error[:MAX_ERROR_LENGTH],
        "width": image.width,
        "height": image.height,
        "exif_orientation": image.exif_orientation,
        "num_frames": image.num_frames,
        "content_sha256": None if data is None else hashlib.sha256(data).hexdigest(),
        "size_bytes": None if data is None else len(data),
    }


def unread(fault: ReadFault) -> DecodedImage:
    """The image of which there are no bytes."""
    return DecodedImage(None, None, None, "error_read", fault.reason, None, None)


def _append(columns: dict[str, list[Any]], image: DecodedImage, data: bytes | None) -> None:
    pixels = image.pixels_HW3
    row = facts_of(image, data) | {
        "pixels": None if pixels is None else pixels.tobytes(),
        "pixel_rows": None if pixels is None else pixels.shape[0],
        "pixel_columns": None if pixels is None else pixels.shape[1],
    }
    for name, value in row.items():
        columns[name].append(value)


def pixels_of_row(table: pa.Table, row: int) -> NDArray[np.uint8] | None:
    """The ``(rows, columns, 3)`` pixels of one row, a read-only view; None where it has none."""
    value = table["pixels"][row]
    if not value.is_valid:
        return None
    shape = (table["pixel_rows"][row].as_py(), table["pixel_columns"][row].as_py(), 3)
    pixels: NDArray[np.uint8] = np.frombuffer(value.as_buffer(), dtype=np.uint8).reshape(shape)
    return pixels
