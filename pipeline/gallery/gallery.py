"""A pseudo-label table -> pictures: a row of panels per image, and a contact sheet of them all.

Box, seed and score are drawn as they stand in the table; the maps beside them are computed again
(gallery/maps.py). Names in a table come from whoever made it: what is written is named by us.
"""

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import DrawJob, ImagesConfig
from pipeline.data.masks import at_pixels
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.data.pseudo_labels import Manifest, iterate_labels, read_labels, read_manifest
from pipeline.drawing.images import (
    METHOD_COLOURS,
    METHOD_NAMES,
    PANEL,
    THUMBNAIL,
    Finding,
    Panel,
    Picture,
    Pixels,
    Size,
    base_name,
    contact_sheet,
    draw_box,
    encoded,
    panel_row,
)
from pipeline.errors import (
    ConfigError,
    DataError,
    StorageError,
    WeightsError,
    one_line,
    without_secrets,
)
from pipeline.gallery.maps import MapDrawer, decoding_of, load_map_drawer
from pipeline.models.published_weights import CNNS
from pipeline.progress import ProgressReporter
from pipeline.storage import Location
from pipeline.tracking.tracker import OFF, absolute_uri, start_tracker

SHEET_NAME = "contact_sheet.png"

# On the sheet and in MLflow: more nobody looks at in one go, and memory holds them all.
_MOST_ON_SHEET = 60
_IMAGES_AT_ONCE = 8
# Of an image with many boxes these are drawn: so many at most, this much of the best one's score.
_MOST_BOXES = 10
_LEAST_SHARE = 0.5
# In the manifest of a table that a detector made.
_DETECTOR = "detector.weights_sha256"
_COLUMNS = (
    *("image_id", "uri", "status", "width", "height", "boxes", "scores", "method"),
    *("seed_xy", "seed_degree", "area_fraction", "content_sha256"),
)
_LOG = logging.getLogger("pipeline.gallery.gallery")

Row = dict[str, Any]


@dataclass(frozen=True)
class _Drawn:
    """One picture: its file's name and bytes, and its entry on the contact sheet."""

    name: str
    data: bytes
    thumbnail: Picture
    caption: str


@dataclass(frozen=True)
class _TrackedRun:
    """Where the pictures are recorded; without an id in a run of their own."""

    uri: str | None
    run_id: str | None


def draw_gallery(job: DrawJob) -> int:
    """Draw ``job.num_images`` images of a table to files, and record them in MLflow.

    Files of an earlier drawing are replaced, others stay. Without the table's weights only boxes
    and seeds are drawn, and a warning says so.

    Returns:
        The exit code: 0.

    Raises:
        DataError: there is no finished table, or not one of its chosen images can be drawn.
        WeightsError: ``job.checkpoint`` cannot be used, or the table was made with other weights.
        StorageError: the output cannot be written.
        ConfigError: a URI is of an unknown kind, or the output is the table's own folder.
    """
    labels, output = Location.parse(job.labels), _output_of(job)
    manifest = read_manifest(labels)
    run = _run_to_record_in(job, manifest)
    rows = _spread_over(read_labels(labels, _COLUMNS), ("ok", "no_object"), job.num_images)
    if not rows:
        raise DataError(f"{labels} has no image that was labelled ({_told(manifest.counts)})")
    _keep_out_of_the_collection(output, rows)
    rows = _with_masks(labels, rows)
    drawer = _map_drawer(labels, manifest, job.checkpoint)
    shown = _draw_all(rows, drawer, decoding_of(manifest), output)
    title = f"{_recipe(manifest)}   {len(shown)} of {manifest.rows:,} images"
    sheet = contact_sheet(
        [one.thumbnail for one in shown], [one.caption for one in shown], columns=6, title=title
    )
    output.child(SHEET_NAME).write_bytes(encoded(sheet))
    _say(f"pictures and {SHEET_NAME} are in {output}")
    failed = {name: n for name, n in manifest.counts.items() if name not in ("ok", "no_object")}
    if failed:
        _say(f"images of the table without a label, never drawn: {_told(failed)}")
    if run is not None:
        _record(run, job, output, encoded(sheet), shown)
    return 0


def sheet_of_boxes(rows: pa.Table, *, limit: int = 16) -> bytes | None:
    """A contact sheet in PNG of at most ``limit`` labelled images with boxes, masks and seeds.

    The images are read from their URIs; what is not there any more is left out.

    Args:
        rows: a table in ``pseudo_labels.SCHEMA``, or its columns that a picture needs.
        limit: the images are spread evenly over those with a box.

    Returns:
        None where no row has a box, or none of the chosen images is there.
    """
    chosen = _spread_over(rows.select([*_COLUMNS, "masks"]), ("ok",), limit)
    entries = [
        (_boxed(row, pixels, THUMBNAIL), _caption(row))
        for row, pixels in _images(chosen, ImagesConfig(min_side=1, max_side=512))
        if not isinstance(pixels, str)
    ]
    if not entries:
        return None
    thumbnails, captions = zip(*entries, strict=True)
    return encoded(contact_sheet(thumbnails, captions, columns=4))


def safe_name(index: int, uri: str) -> str:
    """The file name of picture ``index`` (from 0), of the image at ``uri``.

    The number makes it unique; the rest is for people: no separators, no control characters, of
    bounded length, whatever the URI holds.
    """
    stem = re.sub(r"\.\w{1,5}$", "", base_name(uri))
    stem = re.sub(r"[^\w.-]+", "_", stem).strip("._-")
    stem = stem.encode(errors="replace")[:100].decode(errors="ignore")
    return f"{index + 1:04d}-{stem or 'image'}.jpg"


def _output_of(job: DrawJob) -> Location:
    output = Location.parse(job.output)
    if output == Location.parse(job.labels):
        raise ConfigError(f"--output must not be the table's own folder, got {output}")
    if output.kind() == "file":
        raise StorageError(f"--output must be a folder, got the file {output}: choose another")
    return output


def _keep_out_of_the_collection(output: Location, rows: Sequence[Row]) -> None:
    """Pictures among the photos would be labelled next time."""
    for row in rows:
        if row["uri"].startswith(f"{output}/"):
            raise ConfigError(
                f"--output {output} holds the images themselves: choose another folder"
            )


def _spread_over(table: pa.Table, statuses: Sequence[str], number: int) -> list[Row]:
    """At most ``number`` rows of these statuses, evenly spread in the order of their URIs."""
    table = table.filter(pc.is_in(table["status"], value_set=pa.array(statuses))).sort_by("uri")
    number = min(number, table.num_rows)
    chosen = [index * table.num_rows // number for index in range(number)]
    rows: list[Row] = table.take(pa.array(chosen, pa.int64())).to_pylist()
    return rows


def _with_masks(labels: Location, rows: Sequence[Row]) -> list[Row]:
    """The rows with their masks, read for them alone: a whole table's fill the memory."""
    wanted = pa.array([row["image_id"] for row in rows])
    masks: Row = {}
    for part in iterate_labels(labels, ["image_id", "masks"]):
        part = part.filter(pc.is_in(part["image_id"], value_set=wanted))
        masks |= zip(part["image_id"].to_pylist(), part["masks"].to_pylist(), strict=True)
    return [row | {"masks": masks[row["image_id"]]} for row in rows]


def _map_drawer(labels: Location, manifest: Manifest, checkpoint: str | None) -> MapDrawer | None:
    """What draws the maps; None, and a warning, where the table's weights are out of reach.

    Raises:
        WeightsError: a checkpoint was asked for and cannot be used.
    """
    if checkpoint is None and _DETECTOR in manifest.config:
        # A detector has no seeds and no maps of them.
        return None
    try:
        return load_map_drawer(labels, manifest, checkpoint)
    except (WeightsError, ConfigError) as fault:
        if checkpoint is not None:
            raise
        reason = without_secrets(one_line(fault))
        _LOG.warning("no maps, only boxes and seeds: %s; or --checkpoint FILE here", reason)
        return None


def _draw_all(
    rows: Sequence[Row], drawer: MapDrawer | None, decoding: ImagesConfig, output: Location
) -> list[_Drawn]:
    """Write a picture per row; those that fit on the contact sheet are returned.

    Raises:
        DataError: not one of the images is there.
    """
    every = -(-len(rows) // _MOST_ON_SHEET)
    shown: list[_Drawn] = []
    skipped: Counter[str] = Counter()
    with ProgressReporter("draw", len(rows)) as progress:
        for index, (row, pixels) in enumerate(_images(rows, decoding)):
            if isinstance(pixels, str):
                skipped[pixels] += 1
            else:
                drawn = _draw(index, row, pixels, drawer)
                output.child(drawn.name).write_bytes(drawn.data)
                if len(shown) <= index // every:
                    shown.append(drawn)
            progress.advance(1, {"skipped": int(isinstance(pixels, str))})
    if not shown:
        raise DataError(
            f"none of the {len(rows)} chosen images can be drawn ({_told(skipped)}), for example "
            f"{rows[0]['uri']}: were they moved or changed since they were labelled?"
        )
    if skipped:
        _say(f"skipped {skipped.total()} of {len(rows)} images: {_told(skipped)}")
    return shown


def _images(rows: Sequence[Row], decoding: ImagesConfig) -> Iterator[tuple[Row, Pixels | str]]:
    """Each row with the pixels of its image, or with the reason why there are none."""
    for first in range(0, len(rows), _IMAGES_AT_ONCE):
        batch = rows[first : first + _IMAGES_AT_ONCE]
        names = {name: [row[name] for row in batch] for name in ("image_id", "uri")}
        decoded = load_pixels(pa.table(names), **decoding.model_dump())
        now = decoded.select(["content_sha256", "error"]).to_pylist()
        for index, row in enumerate(batch):
            pixels = pixels_of_row(decoded, index)
            if pixels is None:
                yield row, str(now[index]["error"])
            elif row["content_sha256"] not in (None, now[index]["content_sha256"]):
                # The box would lie on a picture that it was not found in.
                yield row, "changed since it was labelled"
            else:
                yield row, pixels


def _draw(index: int, row: Row, pixels: Pixels, drawer: MapDrawer | None) -> _Drawn:
    method = METHOD_NAMES.get(row["method"], row["method"])
    panels = [Panel(_boxed(row, pixels, PANEL), f"{method}, as in the table", _note(row))]
    if drawer is not None:
        panels += drawer.panels(pixels)
    details = f"{row['width']} x {row['height']} px   {row['uri']}"
    return _Drawn(
        safe_name(index, row["uri"]),
        encoded(panel_row(base_name(row["uri"]), details, panels), "JPEG"),
        _boxed(row, pixels, THUMBNAIL),
        _caption(row),
    )


def _note(row: Row) -> str:
    """What the table says of an image beside its boxes."""
    if row["status"] != "ok":
        return "no object was found"
    if len(row["boxes"]) > 1:
        return f"the best {len(_best(row))} of {len(row['boxes'])} boxes"
    area = f"{100 * (row['area_fraction'] or 0):.0f} % of the image"
    return area if row["seed_degree"] is None else f"{area}, seed of degree {row['seed_degree']}"


def _boxed(row: Row, pixels: Pixels, fit: Size) -> Picture:
    """The image with what the table says of it."""
    # The table is in original pixels; these may have been scaled down for the network.
    scale = pixels.shape[1] / row["width"] if row["width"] else 1.0
    best, seed = _best(row), row["seed_xy"]
    finding = Finding(
        [[edge * scale for edge in row["boxes"][one]] for one in best],
        (seed[0] * scale, seed[1] * scale) if seed else None,
        [row["scores"][one] for one in best if row["scores"]],
        _masks(row, best, pixels),
    )
    family = row["method"].partition("_")[0]
    colour = METHOD_COLOURS.get(family, METHOD_COLOURS["solost"])
    return draw_box(pixels, finding, colour=colour, fit=fit)


def _masks(row: Row, chosen: Sequence[int], pixels: Pixels) -> list[NDArray[np.bool_]]:
    """Of these boxes, at the pixels of the image, which may have been scaled down; [] if none."""
    masks = row.get("masks")
    if not masks:
        return []
    if len(masks) != len(row["boxes"]):
        raise DataError(
            f"{row['uri']} has {len(masks)} masks for {len(row['boxes'])} boxes: the table is "
            "damaged"
        )
    shown = (pixels.shape[1], pixels.shape[0])
    size = (row["width"] or shown[0], row["height"] or shown[1])
    return [at_pixels(masks[one], *size, shown=shown) for one in chosen]


def _best(row: Row) -> list[int]:
    """What is worth drawing: a detector tells of a hundred boxes, most of them hardly believed."""
    boxes, scores = row["boxes"] or [], row["scores"] or []
    if len(boxes) != len(scores):
        return list(range(len(boxes)))
    order = sorted(range(len(boxes)), key=lambda one: -scores[one])[:_MOST_BOXES]
    return [
        one for one in order if one == order[0] or scores[one] >= _LEAST_SHARE * scores[order[0]]
    ]


def _caption(row: Row) -> str:
    return base_name(row["uri"]) + ("" if row["status"] == "ok" else "  no object")


def _recipe(manifest: Manifest) -> str:
    """What the table was made with, in a few words."""
    config = manifest.config
    detected = METHOD_NAMES["cad"] if _DETECTOR in config else "boxes"
    rule = METHOD_NAMES.get(str(config.get("localization.rule")), detected)
    backbone = config.get("backbone.name")
    if backbone is None or backbone in CNNS:
        return f"{rule} on {backbone}" if backbone else rule
    feature, block = config.get("backbone.feature"), config.get("backbone.block")
    return f"{rule} on {backbone}, {feature} of block {block}"


def _run_to_record_in(job: DrawJob, manifest: Manifest) -> _TrackedRun | None:
    """The labelling run; a run of its own where only an MLflow is given; None for no record."""
    run_id = manifest.tracking.get("run_id")
    uri = job.tracking_uri or manifest.tracking.get("uri") or None
    if uri == OFF or (run_id is None and job.tracking_uri is None):
        return None
    database = absolute_uri(uri)
    path = Path(database.partition(":///")[2].partition("?")[0])
    if job.tracking_uri is None and database.startswith("sqlite") and not path.is_file():
        # A table that was carried here: an empty database would help nobody.
        _LOG.warning("not recorded in MLflow: there is no %s; give --tracking-uri or off", path)
        return None
    return _TrackedRun(database, run_id)


def _record(
    run: _TrackedRun, job: DrawJob, output: Location, sheet: bytes, shown: Sequence[_Drawn]
) -> None:
    tracker = start_tracker(
        run.uri,
        experiment=job.experiment,
        run_name=job.run_name,
        known={"run_id": run.run_id},
    )
    tracker.log_artifact_bytes(sheet, f"pictures/{SHEET_NAME}")
    for drawn in shown:
        tracker.log_artifact_bytes(drawn.data, f"pictures/{drawn.name}")
    delivery = tracker.close()
    _say(f"MLflow run {delivery.run_id}: {delivery}")


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items())) or "no rows"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
