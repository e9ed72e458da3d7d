"""The clustering job, told in order: table, network, vectors, clusters, the new table, the picture.

Whatever can be wrong with flags, weights or the output is found before an image is read. The new
table is the old one but for its labels and the rows of images that have gone since, so its manifest
holds the old one's settings and, under ``clusters.``, those of this job. The picture shows some
crops of each cluster: what they have in common is for people to see.

Shape letters:  N boxes   D channels   K clusters
"""

import os
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.clustering.kmeans import Clustering, cluster
from pipeline.clustering.table_boxes import (
    BATCH_SIZES,
    CropOptions,
    Decoder,
    TableBoxes,
    crop_vectors,
)
from pipeline.config import ClusterJob, ImagesConfig
from pipeline.data.images import DecodedImage, decode_image
from pipeline.data.places import with_absolute_places
from pipeline.data.pseudo_labels import Manifest, manifest_sha256, read_manifest, versions
from pipeline.drawing.images import (
    Finding,
    Picture,
    Size,
    base_name,
    contact_sheet,
    draw_box,
    encoded,
)
from pipeline.errors import ConfigError, DataError, TooManyBadImages, WeightsError
from pipeline.gallery.maps import decoding_of
from pipeline.labelling.run import open_run, require_free
from pipeline.lease import Lease
from pipeline.models.backbones import build_class_tokens, load_weights
from pipeline.models.checkpoints import Weights
from pipeline.models.dino_vit import ClassTokens
from pipeline.models.exported_backbone import network_of_checkpoint
from pipeline.progress import ProgressReporter
from pipeline.storage import Location

COLUMNS = 8
MOST_CLUSTERS = 100
"""On one sheet: more rows nobody looks at."""

_CELL: Size = (200, 150)
_NOTHING = (238, 240, 242)


def sample_numbers(
    vectors_ND: NDArray[np.float32], labels_N: NDArray[np.int64], *, number: int
) -> dict[int, list[int]]:
    """Of each cluster that has boxes, at most ``number`` of them, from its middle to its edge.

    They are spread evenly over its boxes in the order of their distance to its mean: the nearest
    alone would flatter it.
    """
    order_N = np.argsort(labels_N, kind="stable")
    found_K, starts_K = np.unique(labels_N[order_N], return_index=True)
    samples: dict[int, list[int]] = {}
    for label, members in zip(found_K, np.split(order_N, starts_K[1:]), strict=True):
        own_ND = vectors_ND[members].astype(np.float64)
        distance = ((own_ND - own_ND.mean(0)) ** 2).sum(1)
        members = members[np.argsort(distance, kind="stable")]
        count = min(number, len(members))
        samples[int(label)] = [
            int(members[place * len(members) // count]) for place in range(count)
        ]
    return samples


def cluster_sheet(
    boxes: TableBoxes, vectors_ND: NDArray[np.float32], labels_N: NDArray[np.int64], title: str
) -> bytes:
    """A sheet in PNG: a row of crops per cluster, from its middle to its edge.

    Args:
        boxes: The numbered boxes.
        vectors_ND: Of each box.
        labels_N: Of each box, as they are in the table.
        title: What the labels were made of.
    """
    samples = sample_numbers(vectors_ND, labels_N, number=COLUMNS)
    shown = dict(list(samples.items())[:MOST_CLUSTERS])
    found = boxes.find({number for numbers in shown.values() for number in numbers})
    sizes = np.bincount(labels_N)
    pictures: list[Picture] = []
    captions: list[str] = []
    for label, numbers in shown.items():
        for place in range(COLUMNS):
            one = found.get(numbers[place]) if place < len(numbers) else None
            pictures.append(_cell(None if one is None else one.crop))
            name = "" if one is None else base_name(one.uri)
            captions.append(f"cluster {label}: {sizes[label]:,}" if place == 0 else name)
    if len(shown) < len(samples):
        title = f"{title}, the first {len(shown)}"
    return encoded(contact_sheet(pictures, captions, columns=COLUMNS, title=title))


def _cell(crop_HW3: NDArray[np.uint8] | None) -> Picture:
    if crop_HW3 is None:
        return Image.new("RGB", _CELL, _NOTHING)
    return draw_box(crop_HW3, Finding([]), colour=_NOTHING, fit=_CELL)


OFF = "off"
# As many pixels a side as decoding allows: small boxes are cut out of the original.
_MAX_SIDE = 16_384


def cluster_boxes(job: ClusterJob) -> int:
    """Write the table of ``job.labels`` with clusters for labels, and a picture of them.

    Returns:
        The exit code: 0.

    Raises:
        ConfigError: there are more clusters than boxes, the network has no class token, or a place
            is not one we write to.
        DataError: there is no finished table, or it changes while it is read.
        WeightsError: the weights cannot be had, do not fit, or give no finite vectors.
        StorageError: the output holds something, is in use, or cannot be written.
        TooManyBadImages: all is written, but too many images could not be read any more.
    """
    job = _settled(job)
    labels, output = Location.parse(job.labels), Location.parse(job.output)
    sheet = _sheet_place(job, labels, output)
    source, source_hash = read_manifest(labels), manifest_sha256(labels)
    boxes = TableBoxes(labels, _decoder(decoding_of(source)))
    _require_enough(boxes.num_boxes, job, labels)
    weights = load_weights(job.backbone.name, job.backbone.checkpoint)
    network = _network(job, weights)
    with Lease(output) as lease:
        require_free(output, overwrite=job.overwrite, resumable=False)
        vectors_ND = _vectors(boxes, network, job)
        _require_enough(len(vectors_ND), job, labels)
        found = cluster(
            vectors_ND,
            job.num_clusters,
            method=job.method,
            restarts=job.restarts,
            seed=job.seed,
        )
        if manifest_sha256(labels) != source_hash:
            raise DataError(f"{labels} was written anew while it was read; start again")
        lease.check()
        config = source.config | job.what_decides_the_classes(weights.sha256, source_hash)
        run = open_run(output, config, resume=False, overwrite=job.overwrite)
        manifest = run.commit_rows(
            boxes.labelled(found.labels_N + 1),
            # Of the boxes, as in the rows; the clusters' own stands in the configuration.
            weights_sha256=source.weights_sha256,
            collection=source.collection,
            job=source.job | {"clusters": job.model_dump(mode="json")},
            versions=versions(),
        )
    if sheet is not None:
        title = f"{job.num_clusters} clusters of {len(vectors_ND):,} boxes, {job.backbone.name}"
        sheet.write_bytes(cluster_sheet(boxes, vectors_ND, found.labels_N + 1, title))
    return _summarise(job, manifest, boxes, found, sheet)


def _settled(job: ClusterJob) -> ClusterJob:
    """The job as it can be repeated from any folder, with the network that its weights are of."""
    job = with_absolute_places(job)
    backbone = job.backbone
    default = type(backbone).model_fields["name"].default
    name = network_of_checkpoint(backbone.name, backbone.checkpoint, default=default)
    return job.model_copy(update={"backbone": backbone.model_copy(update={"name": name})})


def _sheet_place(job: ClusterJob, labels: Location, output: Location) -> Location | None:
    """Where the picture goes; None for nowhere.

    Raises:
        ConfigError: it would lie in a table, or the output is the table itself.
    """
    if _real(output) == _real(labels):
        raise ConfigError(f"--output must not be the table of --labels itself, got {output}")
    if output.kind() == "file":
        raise ConfigError(f"--output must be a folder, got the file {output}")
    if job.sheet == OFF:
        return None
    if job.sheet is None:
        if not output.is_local and "/" not in output.path:
            raise ConfigError(f"there is no place beside {output}: give --sheet FILE or off")
        return Location(output.filesystem, f"{output.path}_clusters.png", output.scheme)
    place = Location.parse(job.sheet)
    if place.kind() == "folder":
        raise ConfigError(f"--sheet must be a file, got the folder {place}")
    for folder in (labels, output):
        if _real(place).startswith(f"{_real(folder)}/"):
            raise ConfigError(f"--sheet must not lie in a table, got {place} in {folder}")
    return place


def _real(place: Location) -> str:
    return os.path.realpath(place.path) if place.is_local else str(place)


def _decoder(decoding: ImagesConfig) -> Decoder:
    """Decodes at full resolution, or as the table was labelled where that is too large."""

    def decode(data: bytes) -> DecodedImage:
        image = _decoded(data, decoding, _MAX_SIDE)
        if image.status in ("skipped_too_large", "error_bomb", "error_memory"):
            image = _decoded(data, decoding, decoding.max_side)
        return image

    return decode


def _decoded(data: bytes, decoding: ImagesConfig, max_side: int) -> DecodedImage:
    return decode_image(
        data,
        min_side=1,
        max_side=max_side,
        max_pixels=decoding.max_pixels,
        background=decoding.background,
    )


def _require_enough(num_boxes: int, job: ClusterJob, labels: Location) -> None:
    if job.num_clusters > num_boxes:
        raise ConfigError(
            f"--num-clusters must be at most the number of boxes, {num_boxes:,} in {labels} whose "
            f"images can be read, got {job.num_clusters}"
        )


def _network(job: ClusterJob, weights: Weights) -> ClassTokens:
    network = build_class_tokens(job.backbone.name, weights)
    if job.crop_size < network.patch_size:
        raise ConfigError(
            f"--crop-size must be at least a patch of {job.backbone.name}, {network.patch_size} "
            f"pixels, got {job.crop_size}"
        )
    return network


def _vectors(boxes: TableBoxes, network: ClassTokens, job: ClusterJob) -> NDArray[np.float32]:
    """``(N, D)`` of the boxes whose images can be read, in their order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vectors_ND = np.empty((boxes.num_boxes, network.num_features), np.float32)
    options = CropOptions(job.crop_size, job.backbone.normalize, job.antialias)
    num_found = 0
    with ProgressReporter("embed", boxes.num_images, seconds=job.progress_seconds) as progress:
        for numbers, vectors_BD in crop_vectors(
            boxes.crops(lambda images, bad: progress.advance(images, {"bad": bad})),
            network.to(device),
            options,
            device=device,
            batch_size=job.batch_size or BATCH_SIZES[device],
        ):
            vectors_ND[numbers] = vectors_BD
            num_found += len(numbers)
    vectors_ND = vectors_ND[:num_found]
    broken = int((~np.isfinite(vectors_ND).all(axis=1)).sum())
    if broken:
        raise WeightsError(
            f"class tokens must be finite, those of {broken:,} of {num_found:,} crops are not: "
            f"take other weights than {job.backbone.checkpoint or job.backbone.name}"
        )
    return vectors_ND


def _summarise(
    job: ClusterJob,
    manifest: Manifest,
    boxes: TableBoxes,
    found: Clustering,
    sheet: Location | None,
) -> int:
    """Say what there is now; exit code 0 unless too many images could not be read."""
    sizes_K, bad = found.sizes_K, len(boxes.failures)
    _say(f"{manifest.rows:,} rows in {job.output}, {len(found.labels_N):,} boxes in clusters")
    _say(f"  cluster: boxes   {_told(sizes_K)}")
    _say(f"  sum of squared distances to the centres: {found.inertia:.6g}")
    empty = int((sizes_K == 0).sum())
    if empty:
        _say(f"  EMPTY CLUSTERS: {empty}; their labels do not occur")
    if bad:
        _say(f"  IMAGES THAT CANNOT BE READ ANY MORE: {bad:,}; their boxes have no label")
    if sheet is not None:
        _say(f"See them:    {sheet}")
    _say(f"Measure:     python jobs/evaluate_boxes.py --labels {job.output} --ground-truth GT")
    if bad > job.max_bad_fraction * boxes.num_images:
        raise TooManyBadImages(
            f"{bad:,} of {boxes.num_images:,} images with boxes can no longer be read, more than "
            f"--max-bad-fraction {job.max_bad_fraction:g}; every one has its row. Bring them back "
            "and cluster again, or allow more"
        )
    return 0


def _told(sizes_K: NDArray[Any]) -> str:
    shown = "  ".join(f"{label}: {size:,}" for label, size in enumerate(sizes_K[:100], start=1))
    return shown if len(sizes_K) <= 100 else f"{shown}  ..."


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
