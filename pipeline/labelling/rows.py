"""What a labeller made of a block -> rows of the pseudo-label table, one per image, in its order.

Shared by all that fill the table: a labeller gives an ``Outcome`` per image, and says what it is.
To fill another column: a key of the outcome with the column's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.pixels import pixels_of_row
from pipeline.data.pseudo_labels import SCHEMA

Outcome = dict[str, Any]
"""Columns of ``SCHEMA`` by name: ``status``, ``error``, and what was found."""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Provenance:
    """What every row says about how it was made."""

    run_id: str
    config_hash: str
    weights_sha256: str


def decoded_images(decoded: pa.Table) -> list[Image | None]:
    """The ``(rows, columns, 3)`` pixels of each row of ``PIXELS_SCHEMA``; None without any."""
    return [pixels_of_row(decoded, row) for row in range(decoded.num_rows)]


def label_rows(
    decoded: pa.Table,
    outcomes: dict[int, Outcome],
    *,
    method: str,
    provenance: Provenance,
    schema: pa.Schema = SCHEMA,
) -> pa.Table:
    """Rows of ``schema``, the table's own.

    Args:
        decoded: rows of ``PIXELS_SCHEMA``.
        outcomes: by the row's number; a row without one keeps its status and error.
        method: what each row says found its boxes.
        provenance: copied into every row.
        schema: its columns come from the outcomes, from ``decoded``, or are the same in all rows.
    """
    before: list[Outcome] = decoded.select(["status", "error"]).to_pylist()
    told = [outcomes.get(row, outcome) for row, outcome in enumerate(before)]
    same = {
        "method": method,
        "run_id": provenance.run_id,
        "config_hash": provenance.config_hash,
        "weights_sha256": provenance.weights_sha256,
        "created_at": datetime.now(UTC),
    }
    arrays = []
    for field in schema:
        if field.name in ("status", "error") or field.name not in decoded.column_names:
            values = [same.get(field.name, row.get(field.name)) for row in told]
            arrays.append(pa.array(values, field.type))
        else:
            arrays.append(decoded[field.name])
    return pa.Table.from_arrays(arrays, schema=schema)


def no_object(reason: str) -> Outcome:
    """An image that was looked at in vain."""
    return {"status": "no_object", "error": reason, "boxes": [], "scores": [], "labels": []}


def too_large(image: Image, device: str) -> Outcome:
    """An image that the network has no memory for, alone as it is."""
    rows, columns, _ = image.shape
    reason = f"{columns}x{rows} pixels do not fit in the memory of {device}"
    return {"status": "error_memory", "error": reason}


def rows_in_groups(keys: Sequence[Any], size: int) -> list[list[int]]:
    """Row numbers with equal keys, at most ``size`` together; rows with key None are left out."""
    rows_by_key: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            rows_by_key.setdefault(key, []).append(row)
    return [
        rows[first : first + size]
        for rows in rows_by_key.values()
        for first in range(0, len(rows), size)
    ]
