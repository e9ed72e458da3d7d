"""The fit of a head, told in order: output, sample, cuts of its images, fit, report, record.

The cuts are a pass like any other over images (run.py), spread over whatever does the work; its
rows hold features and cuts instead of boxes. The fit itself (localization/head_fit.py) goes over
the finished blocks again and again, in their order, so that who did which block does not matter.
``config.json`` is written last: where it is, the head is whole.
"""

import hashlib
import heapq
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.config import FitHeadJob, LocalizationConfig
from pipeline.data.lake import INPUT_SCHEMA, Collection, Listing
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.data.pseudo_labels import config_hash, versions
from pipeline.drawing.images import (
    METHOD_COLOURS,
    METHOD_NAMES,
    THUMBNAIL,
    Finding,
    Picture,
    base_name,
    contact_sheet,
    draw_box,
    encoded,
)
from pipeline.drawing.tables import markdown_table
from pipeline.errors import DataError
from pipeline.labelling.block_tasks import LabelPlan
from pipeline.labelling.labeller import PseudoBoxes, PseudoBoxLabeller
from pipeline.labelling.outcomes import NOTHING_FOUND
from pipeline.labelling.rows import Image, Outcome, Provenance, no_object
from pipeline.labelling.run import HEAD_CONFIG, HEAD_WEIGHTS, LabelPass, LabelRun, open_run
from pipeline.labelling.saved_head import HeadRecord, encode_head, read_head
from pipeline.labelling.work_through import Spread, work_through
from pipeline.lease import Lease
from pipeline.localization.head import Head
from pipeline.localization.head_fit import CutImages, Fit, fit_head, why_not
from pipeline.localization.localize import localize
from pipeline.models.checkpoints import Weights
from pipeline.models.features import PatchFeatures
from pipeline.storage import Location
from pipeline.tracking.tracker import Tracker, start_tracker

REPORT, PICTURE = "report.md", "boxes.png"
_NUM_PICTURES = 24
# Images a task: the sample is small, and every worker should have some.
_BLOCK_SIZE = 16

CUTS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        # Rows and columns of patches, and a patch's side in pixels of what the network saw.
        pa.field("grid", pa.list_(pa.int32())),
        pa.field("stride", pa.int32()),
        # float32 as the backbone gave them, and a bit per patch; null where there is no cut.
        pa.field("tokens", pa.large_binary()),
        pa.field("cut", pa.binary()),
    ]
)

_LOG = logging.getLogger("pipeline.head_run")


class NoHeadFits(DataError):
    """The images could be read, but no head can be fitted on them."""


class CutSampler(PseudoBoxLabeller):
    """Gives each row of decoded pixels its features and its cut."""

    schema = CUTS_SCHEMA

    def look_at(
        self, images: Sequence[Image], features: PatchFeatures, sizes_B2: NDArray[Any]
    ) -> list[Outcome]:
        """One outcome per image of a batch."""
        found = self.localize(features)
        tokens_BHWD = features.tokens_BHWD.float().cpu().numpy()
        cut_BHW = found.mask_BHW.cpu().numpy()
        return [
            {
                "status": "ok",
                "error": None,
                "grid": list(cut_HW.shape),
                "stride": features.stride,
                "tokens": tokens_HWD.tobytes(),
                "cut": np.packbits(cut_HW).tobytes(),
            }
            if hit
            else no_object(NOTHING_FOUND["ncut"])
            for hit, tokens_HWD, cut_HW in zip(
                found.found_B.tolist(), tokens_BHWD, cut_BHW, strict=True
            )
        ]


@dataclass(frozen=True)
class StoredSample:
    """The images of a finished pass of ``CutSampler``, again at each call, one at a time."""

    label_pass: LabelPass

    def __call__(self) -> Iterator[CutImages]:
        for row in self.rows():
            yield _cut_image(row)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Those that have a cut."""
        for table in self.label_pass.all_rows():
            yield from (row for row in table.to_pylist() if row["tokens"] is not None)


def run_head_fit(job: FitHeadJob, weights: Weights, spread: Spread) -> tuple[Head, HeadRecord]:
    """Fit a head and write it to ``job.output``; where it is there already, ``--resume`` reads it.

    Args:
        job: with absolute places and the network of its weights.
        weights: of the backbone.
        spread: does the work on images.

    Raises:
        NoHeadFits: fewer than two images have a cut, or they say nothing.
        PatchseedError: of the kinds that a bulk job raises; finished blocks stay.
    """
    output = Location.parse(job.output)
    config = job.what_decides_the_head(weights.sha256)
    with Lease(output) as lease:
        run = open_run(output, config, resume=job.resume, overwrite=job.overwrite)
        if output.child(HEAD_CONFIG).kind() == "file":
            return read_head(output)
        label_pass = replace(run.open_pass(0), schema=CUTS_SCHEMA)
        if not label_pass.is_listed:
            _draw_sample(run, label_pass, job)
        with start_tracker(
            job.tracking_uri,
            experiment=job.experiment,
            run_name=job.run_name or f"fit-head-{config_hash(config)[:8]}",
        ) as tracker:
            tracker.log_params(config)
            tracker.set_tags({"job": "fit_head", "run_id": run.run_id, "output": str(output)})
            work_through(
                _plan(job, weights, run, label_pass),
                spread,
                verb="cut",
                progress_seconds=job.progress_seconds,
                tracker=tracker,
                lease=lease,
            )
            fit = _fit(StoredSample(label_pass), job)
            lease.check()
            record = _write(fit, run, label_pass, job, tracker)
    return fit.head, record


def _draw_sample(run: LabelRun, label_pass: LabelPass, job: FitHeadJob) -> None:
    """Decide which images are looked at: those of the lowest ids, which are hashes of names."""
    try:
        collection = Collection(job.images)
        drawn = heapq.nsmallest(job.num_images, _ids(collection.chunks()))
    except BaseException:
        run.abandon()
        raise
    ids, uris = zip(*drawn, strict=True)
    inputs = pa.table({"image_id": ids, "uri": uris}, schema=INPUT_SCHEMA)
    label_pass.note_listing(collection.report.model_dump(mode="json"))
    label_pass.freeze_inputs(iter([inputs]), min(_BLOCK_SIZE, job.compute.block_size))


def _ids(chunks: Iterator[pa.Table]) -> Iterator[tuple[str, str]]:
    for chunk in chunks:
        yield from zip(chunk["image_id"].to_pylist(), chunk["uri"].to_pylist(), strict=True)


def _plan(job: FitHeadJob, weights: Weights, run: LabelRun, label_pass: LabelPass) -> LabelPlan:
    recipe = PseudoBoxes(
        job.backbone,
        weights,
        LocalizationConfig(rule="ncut", cut_threshold=job.cut_threshold),
        job.compute.precision,
        job.compute.batch_size,
        labeller=CutSampler,
    )
    provenance = Provenance(run.run_id, config_hash(run.config), weights.sha256)
    return LabelPlan(label_pass, recipe, provenance, job.decode, job.compute)


def _fit(sample: StoredSample, job: FitHeadJob) -> Fit:
    _say(f"fitting a head in {job.num_rounds} rounds")
    try:
        return fit_head(sample, num_rounds=job.num_rounds)
    except ValueError as fault:
        raise NoHeadFits(
            f"no head can be fitted on {job.images}: {fault}. Use --localization.rule ncut, or "
            "give more images"
        ) from fault


def _write(
    fit: Fit, run: LabelRun, label_pass: LabelPass, job: FitHeadJob, tracker: Tracker
) -> HeadRecord:
    """The head, its picture, its report, and the record that makes them one, last."""
    data = encode_head(fit.head)
    listing = label_pass.listing() or {}
    record = HeadRecord(
        run_id=run.run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config=run.config,
        head_sha256=hashlib.sha256(data).hexdigest(),
        num_images=sum(label_pass.sizes()),
        num_cut=fit.num_images,
        share=fit.head.share,
        auc=fit.auc,
        agreement=fit.agreement,
        border=fit.border,
        changes=fit.changes,
        refused=why_not(fit),
        collection=Listing.model_validate(listing).model_dump(mode="json"),
        versions=versions(),
    )
    sheet = _sheet(fit, StoredSample(label_pass), job)
    report = _report(fit, record)
    run.output.child(HEAD_WEIGHTS).write_bytes(data)
    run.output.child(PICTURE).write_bytes(sheet)
    run.output.child(REPORT).write_bytes(report.encode())
    text = record.model_dump_json(indent=1) + "\n"
    run.output.child(HEAD_CONFIG).write_bytes(text.encode())
    label_pass.folder.delete()
    told = ("share", "auc", "agreement", "border")
    tracker.log_metrics({name: getattr(record, name) for name in told})
    tracker.log_artifact_bytes(sheet, PICTURE)
    tracker.log_text(report, REPORT)
    tracker.log_dict(record.model_dump(mode="json"), HEAD_CONFIG)
    _say(f"fitted on {record.num_cut} of {record.num_images} images: {figures(record)}")
    return record


def figures(record: HeadRecord) -> str:
    """What speaks for a head, in one line."""
    return (
        f"{record.share:.0%} of patches on objects, AUC {record.auc:.2f} across images, "
        f"IoU {record.agreement:.2f} with the cuts' boxes, {record.border:.2f} along edges"
    )


def _report(fit: Fit, record: HeadRecord) -> str:
    verdict = "kept" if record.refused is None else f"REFUSED: {record.refused}"
    rounds = [
        (number + 1, f"{head.threshold:.4f}", "" if change is None else f"{change:.2%}")
        for number, (head, change) in enumerate(zip(fit.rounds, (None, *fit.changes), strict=True))
    ]
    made = [(name, value) for name, value in record.config.items()]
    lines = [
        "# A head fitted without labels",
        "",
        f"{verdict}.",
        "",
        markdown_table(
            ("what speaks for it", "value"),
            [
                ("images of the sample", record.num_images),
                ("images that have a cut", record.num_cut),
                ("share of patches on objects", f"{record.share:.3f}"),
                ("AUC of one half's cuts foretold by the other half's", f"{record.auc:.3f}"),
                ("mean IoU of its boxes with the cuts' boxes", f"{record.agreement:.3f}"),
                ("patches along edges on objects, beside others", f"{record.border:.3f}"),
            ],
        ),
        "",
        "How it changed over the rounds:",
        "",
        markdown_table(("round", "threshold", "patches that changed sides"), rounds),
        "",
        f"![Boxes of the cut and of the head]({PICTURE})",
        "",
        "How it was made:",
        "",
        markdown_table(("setting", "value"), [*made, *record.versions.items()]),
    ]
    return "\n".join(lines) + "\n"


def _sheet(fit: Fit, sample: StoredSample, job: FitHeadJob) -> bytes:
    """Images with the cut's box beside the head's."""
    pictures: list[Picture] = []
    captions: list[str] = []
    for row in islice(sample.rows(), _NUM_PICTURES):
        inputs = pa.table({name: [row[name]] for name in ("image_id", "uri")})
        pixels = pixels_of_row(load_pixels(inputs, **dict(job.decode)), 0)
        if pixels is None:
            # Gone since it was cut.
            continue
        image = _cut_image(row)
        found = {
            "ncut": localize(image.features_BHWD, rule="ncut", cut_threshold=job.cut_threshold),
            "head": localize(image.features_BHWD, rule="head", head=fit.head),
        }
        for rule, one in found.items():
            finding = Finding(one.boxes_B4[one.found_B].numpy() * row["stride"])
            pictures.append(draw_box(pixels, finding, colour=METHOD_COLOURS[rule], fit=THUMBNAIL))
            captions.append(f"{METHOD_NAMES[rule]}  {base_name(row['uri'])}")
    if not pictures:
        raise DataError(f"the images of {job.images} are gone since they were cut")
    return encoded(contact_sheet(pictures, captions, columns=6, title="The cut and the head"))


def _cut_image(row: dict[str, Any]) -> CutImages:
    height, width = row["grid"]
    tokens_HWD = np.frombuffer(row["tokens"], np.float32).reshape(height, width, -1)
    bits = np.unpackbits(np.frombuffer(row["cut"], np.uint8), count=height * width)
    return CutImages(
        torch.from_numpy(tokens_HWD.copy())[None],
        torch.from_numpy(bits.reshape(1, height, width).astype(bool)),
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
