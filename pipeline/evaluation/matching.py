"""Which label belongs to which annotated image, by their names.

Labels are known by URI, annotations by a file name or its last part, so names are compared part by
part from the end. A Parquet of images gives URIs such as ``photos.parquet#17/name.jpg``: the
``#17`` ends a part, so nothing special is needed.

To add a way of naming: give it a rank in ``_Names``.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath

from pipeline.data.ground_truth import GroundTruth
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Prediction


@dataclass(frozen=True)
class Matching:
    """The join.

    Attributes:
        predictions: one per annotated image, in the order given; None where there is no label.
        num_unmatched: labels whose image is not annotated.
    """

    predictions: list[Prediction | None]
    num_unmatched: int


@dataclass
class _Claim:
    """The label that has the best right to an image so far, and one with just the same right."""

    rank: int
    prediction: Prediction
    rival: str | None = None


def match(predictions: Iterable[Prediction], truths: Sequence[GroundTruth]) -> Matching:
    """Give every annotated image its label.

    A label belongs to the image whose file name is the longest suffix of the label's name, compared
    by whole parts: ``/data/val/1.jpg`` is ``val/1.jpg`` rather than ``1.jpg``. What finds nothing
    is tried without the extension, then by the annotation's other names, and last the other way
    round (the annotation has more folders than the label). An image goes to the label that found it
    earliest in this order.

    Raises:
        DataError: two labels have the same right to an image, or no label finds any.
    """
    names = _Names(truths)
    claims: dict[int, _Claim] = {}
    num_labels, example = 0, ""
    for prediction in predictions:
        num_labels += 1
        example = example or prediction.name
        found = names.find(prediction.name)
        if found is not None:
            _stake(claims, found, prediction)
    if not claims:
        raise DataError(_nothing_matches(example, truths))
    _refuse_rivals(claims, truths)
    held = [claims.get(index) for index in range(len(truths))]
    return Matching(
        [None if claim is None else claim.prediction for claim in held], num_labels - len(claims)
    )


def _stake(claims: dict[int, _Claim], found: tuple[int, int], prediction: Prediction) -> None:
    index, rank = found
    holder = claims.get(index)
    if holder is None or rank < holder.rank:
        claims[index] = _Claim(rank, prediction)
    elif rank == holder.rank:
        holder.rival = holder.rival or prediction.name


def _refuse_rivals(claims: dict[int, _Claim], truths: Sequence[GroundTruth]) -> None:
    rivals = [(index, claim) for index, claim in claims.items() if claim.rival is not None]
    if rivals:
        index, claim = rivals[0]
        raise DataError(
            f"{len(rivals)} annotated images have several labels; the first: "
            f"{truths[index].file_name} has {claim.prediction.name} and {claim.rival}. Put the "
            "folders that tell them apart into the ground truth's file names, or label fewer images"
        )


def _nothing_matches(example: str, truths: Sequence[GroundTruth]) -> str:
    if not example or not truths:
        return f"{'the ground truth' if example else '--labels'} holds no image"
    return (
        "no label belongs to an annotated image: labels are named like "
        f"{example}, the ground truth like {truths[0].file_name}"
    )


class _Names:
    """Names of annotated images -> their index, one table per rank."""

    def __init__(self, truths: Sequence[GroundTruth]) -> None:
        names = [_parts(truth.file_name) for truth in truths]
        aliases = [[_parts(alias) for alias in truth.aliases] for truth in truths]
        self._exact = _table([[name] for name in names])
        if len(self._exact) < len(truths):
            twice, _ = Counter(names).most_common(1)[0]
            raise DataError(f"the ground truth lists the image {'/'.join(twice)} twice")
        self._stems = _table([[name, _without_extension(name)] for name in names])
        self._aliases = _table([[*others, *map(_without_extension, others)] for others in aliases])
        self._shorter = _table([[name[i:] for i in range(1, len(name))] for name in names])
        # Longer suffixes of a label's name cannot be in any table.
        self._depth = max((len(name) for name in chain(names, *aliases)), default=0)

    def find(self, name: str) -> tuple[int, int] | None:
        """Index of the image that goes by this name and the rank at which it was found."""
        whole = _parts(name)
        tail = whole[-self._depth :]
        suffixes = [tail[i:] for i in range(len(tail))]
        stems = [_without_extension(suffix) for suffix in suffixes]
        tries = (
            (self._exact, suffixes),
            (self._stems, stems),
            (self._aliases, [*suffixes, *stems]),
            (self._shorter, [whole]),
        )
        hits = (
            (index, rank)
            for rank, (table, keys) in enumerate(tries)
            for key in keys
            if (index := table.get(key)) is not None
        )
        return next(hits, None)


def _table(keys_by_image: Iterable[Iterable[tuple[str, ...]]]) -> dict[tuple[str, ...], int | None]:
    """Every key with its image's index; None for a key that several images share."""
    table: dict[tuple[str, ...], int | None] = {}
    for index, keys in enumerate(keys_by_image):
        for key in set(keys):
            table[key] = None if key in table else index
    return table


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _without_extension(parts: tuple[str, ...]) -> tuple[str, ...]:
    return (*parts[:-1], PurePosixPath(parts[-1]).stem) if parts else parts
