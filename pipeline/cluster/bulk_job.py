"""A bulk job's life, told in order: output, list of inputs, blocks, table, summary.

What the blocks are labelled with is ``Work``, and the jobs (label_images.py, detect_images.py) are
doors that make one. Whatever can be wrong with flags, weights or the output is found before an
image is read. The work itself is spread in label_blocks.py; what survives a kill, and why, is told
in labelling/run.py.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pipeline.cluster.label_blocks import label_blocks
from pipeline.config import BlockJob, BulkJob, flatten
from pipeline.data.lake import Listing
from pipeline.data.pseudo_labels import Manifest, config_hash, iterate_labels, versions
from pipeline.errors import ConfigError, TooManyBadImages, without_secrets
from pipeline.gallery.gallery import sheet_of_boxes
from pipeline.labelling.block_tasks import LabelPlan, Recipe
from pipeline.labelling.rows import Provenance
from pipeline.labelling.run import LabelPass, LabelRun, open_run
from pipeline.labelling.work_through import Spread, label_here, work_through
from pipeline.lease import Lease
from pipeline.storage import Location
from pipeline.tracking.tracker import OFF, Tracker, absolute_uri, start_tracker


class ImageList(Protocol):
    """The images to go over: ``lake.Collection``, ``lake.TableImages``."""

    @property
    def report(self) -> Listing:
        """What was met; complete once ``chunks`` is exhausted."""
        ...

    def chunks(self) -> Iterator[pa.Table]:
        """Tables of ``INPUT_SCHEMA``; every image_id once."""
        ...


@dataclass(frozen=True, eq=False)
class Work:
    """What a job does to its images."""

    name: str
    """The job's, for MLflow: ``label_images``."""

    verb: str
    """For the line of progress: ``label``."""

    run_name: str
    """The MLflow run's where the job has none; a hash of the configuration follows."""

    images: Callable[[], ImageList]
    """Asked only where there is something to list."""

    recipe: Recipe
    weights_sha256: str
    config: dict[str, Any]
    """All that decides the boxes, as flat JSON values: a resumed run must have the same."""


def run_bulk_job(job: BulkJob, work: Work) -> int:
    """Give every image of the work one row of the table at ``job.output``.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; the output then still holds what is done.
    """
    output = Location.parse(job.output)
    if output.kind() == "file":
        raise ConfigError(f"--output must be a folder, got the file {output}")
    with Lease(output) as lease:
        run = open_run(output, work.config, resume=job.resume, overwrite=job.overwrite)
        number = run.passes_committed()
        label_pass = run.open_pass(number)
        if not label_pass.is_listed and not _freeze_inputs(run, label_pass, job, work):
            run.tidy()
            manifest = run.manifest()
            with _tracker(run, job, work, told=manifest) as tracker:
                _log_start(tracker, manifest.job, run, work)
                _log_results(tracker, manifest, output)
            return _summarise(manifest, output, job)
        provenance = Provenance(run.run_id, config_hash(run.config), work.weights_sha256)
        plan = LabelPlan(label_pass, work.recipe, provenance, job.decode, job.compute)
        with _tracker(run, job, work) as tracker:
            _log_start(tracker, _as_told(job), run, work)
            speed = work_through(
                plan,
                spread_of(job),
                verb=work.verb,
                progress_seconds=job.progress_seconds,
                tracker=tracker,
                lease=lease,
            )
            lease.check()
            manifest = run.commit(
                number,
                weights_sha256=work.weights_sha256,
                job=_as_told(job),
                versions=versions(),
                tracking=_tracked_as(tracker, job),
            )
            tracker.log_metrics({"images_per_second": speed})
            _log_results(tracker, manifest, output)
    return _summarise(manifest, output, job)


def spread_of(job: BlockJob) -> Spread:
    """What does the job's work: Ray, or this process."""
    return label_here if job.compute.num_actors == 0 else partial(label_blocks, debug=job.debug)


def _freeze_inputs(run: LabelRun, label_pass: LabelPass, job: BulkJob, work: Work) -> bool:
    """Decide once what this pass labels; False where there is nothing left to do."""
    if not run.is_finished:
        try:
            collection = work.images()
            label_pass.freeze_inputs(collection.chunks(), job.compute.block_size)
            label_pass.note_listing(collection.report.model_dump(mode="json"))
        except BaseException:
            run.abandon()
            raise
        for line in _describe(collection.report):
            _say(line)
        return True
    failed = list(run.failed_inputs()) if job.retry_failed else []
    if not failed:
        _say(f"{run.output} is finished already; nothing is left to do")
        return False
    label_pass.freeze_inputs(iter(failed), job.compute.block_size)
    _say(f"{sum(table.num_rows for table in failed):,} failed images are gone over again")
    return True


def _describe(listing: Listing) -> Iterator[str]:
    """What was found, and what was left out and why, so that nothing is missing in silence."""
    yield f"found {listing.num_images:,} images in {listing.root}"
    if listing.ignored_by_extension:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in listing.ignored_by_extension.items())
        yield f"  not images by their extension: {kinds}"
    if listing.num_duplicates:
        yield f"  listed more than once, labelled once: {listing.num_duplicates:,}"
    if listing.num_refused_links:
        links = ", ".join(listing.refused_links)
        yield f"  links out of the folder or to nowhere: {listing.num_refused_links:,} ({links})"
    if listing.num_unreadable_folders:
        folders = ", ".join(listing.unreadable_folders)
        yield f"  UNREADABLE FOLDERS, their images are missing: {folders}"


def _tracker(run: LabelRun, job: BulkJob, work: Work, told: Manifest | None = None) -> Tracker:
    """A new MLflow run; of a finished table, which is ``told`` again, the one that it has."""
    name = job.run_name or f"{work.run_name}-{config_hash(run.config)[:8]}"
    known: dict[str, str] = {}
    if told is not None and job.tracking_uri != OFF:
        here = told.tracking.get("uri") == _told_uri(job)
        # The run's id is a tag for tables that know none.
        known = {"tag": told.run_id, **(told.tracking if here else {})}
    return start_tracker(
        job.tracking_uri,
        experiment=job.experiment,
        run_name=name,
        known=known,
        again=told is not None,
    )


def _tracked_as(tracker: Tracker, job: BulkJob) -> dict[str, str]:
    """How the MLflow run is found by who reads the table."""
    if tracker.tag is None:
        return {}
    known = {"uri": _told_uri(job), "tag": tracker.tag}
    run_id = tracker.wait_for_run_id(timeout_s=5.0)
    return known if run_id is None else {**known, "run_id": run_id}


def _told_uri(job: BulkJob) -> str:
    return without_secrets(absolute_uri(job.tracking_uri))


def _as_told(job: BulkJob) -> dict[str, Any]:
    """The job's settings as manifest and MLflow show them: a database's password is not one."""
    settings = job.model_dump(mode="json")
    if job.tracking_uri is not None:
        settings["tracking_uri"] = without_secrets(job.tracking_uri)
    return settings


def _log_start(tracker: Tracker, job: dict[str, Any], run: LabelRun, work: Work) -> None:
    tracker.log_params(flatten(job))
    tracker.set_tags({"job": work.name, "run_id": run.run_id, "output": str(run.output)})


def _log_results(tracker: Tracker, manifest: Manifest, output: Location) -> None:
    counts = {f"count.{status}": number for status, number in manifest.counts.items()}
    tracker.log_metrics({**counts, "rows": manifest.rows})
    tracker.set_tags({"weights_sha256": manifest.weights_sha256})
    tracker.log_dict(manifest.model_dump(mode="json"), "manifest.json")
    tracker.log_dict(manifest.config, "config.json")
    sheet = sheet_of_boxes(next(iterate_labels(output)))
    if sheet is not None:
        tracker.log_artifact_bytes(sheet, "boxes.png")


def _summarise(manifest: Manifest, output: Location, job: BulkJob) -> int:
    """The closing table, and exit code 0 unless too many images failed."""
    table = Table(title=f"{manifest.rows:,} rows in {output}", title_justify="left")
    for column in ("status", "images", "%", "for example"):
        table.add_column(column, justify="left" if column in ("status", "for example") else "right")
    examples = _examples(output, set(manifest.counts))
    for status, number in manifest.counts.items():
        share = f"{100 * number / manifest.rows:.1f}"
        table.add_row(status, f"{number:,}", share, examples.get(status, ""))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    _say(f"See them:    python jobs/draw_boxes.py --labels {output} --output PICTURES")
    _say(f"Measure:     python jobs/evaluate_boxes.py --labels {output} --ground-truth GT")
    bad = sum(n for status, n in manifest.counts.items() if status.startswith("error_"))
    if bad > job.max_bad_fraction * manifest.rows:
        raise TooManyBadImages(
            f"{bad:,} of {manifest.rows:,} images failed, more than --max-bad-fraction "
            f"{job.max_bad_fraction:g}; every one has its row. Try again with --resume "
            "--retry-failed, or allow more"
        )
    return 0


def _examples(output: Location, statuses: set[str]) -> dict[str, str]:
    """One URI (and its reason) per status, read until each has been seen."""
    found: dict[str, str] = {}
    for table in iterate_labels(output, ["uri", "status", "error"]):
        for status in statuses - found.keys():
            rows = table.filter(pa.compute.equal(table["status"], status)).slice(0, 1).to_pylist()
            for row in rows:
                reason = f" ({row['error']})" if row["error"] else ""
                found[status] = f"{row['uri']}{reason}"
        if statuses == found.keys():
            break
    return found


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
