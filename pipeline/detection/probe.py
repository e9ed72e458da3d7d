"""What a detector finds on photos whose objects are known, measured while it trains.

Each worker looks at its share of the photos; the numbers are those of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.config import TrainDetectorJob
from pipeline.config.labelling import Difficult
from pipeline.data.ground_truth import GroundTruth, annotated_images
from pipeline.data.labelled_images import decode_rgb, printable
from pipeline.data.sources import ReadFault, fetch_bytes
from pipeline.detection.predictor import Predictor
from pipeline.errors import DataError
from pipeline.evaluation.average_precision import average_precision
from pipeline.evaluation.corloc import best_ious, corloc
from pipeline.evaluation.predictions import Detections
from pipeline.training.workers import Workers


@dataclass(frozen=True, eq=False)
class DetectionProbe:
    """Photos by their URIs, and what is on them."""

    uris: Sequence[str]
    truths: Sequence[GroundTruth]
    difficult: Difficult

    def numbers(self, predictor: Predictor, workers: Workers) -> dict[str, float]:
        """``probe/ap50``, ``probe/ap`` and so on, and ``probe/corloc``, each in [0, 1].

        All workers must call it, and all get the same numbers.

        Raises:
            DataError: a photo cannot be read.
        """
        mine = [predictor.predict(_photo(uri)) for uri in self.uris[workers.rank :: workers.size]]
        shares = workers.gathered(mine)
        # Photo i is number i // size of worker i % size.
        found: list[Detections] = [
            shares[index % workers.size][index // workers.size] for index in range(len(self.uris))
        ]
        precision = average_precision(self.truths, found, difficult=self.difficult)
        numbers = {
            f"probe/{name}": value for name, value in precision.stats.items() if value is not None
        }
        # As in the papers, over all objects, the difficult ones too.
        boxes_N4 = np.array([one.boxes_D4[0] if len(one) else np.zeros(4) for one in found])
        ious_N = best_ious(boxes_N4, [truth.boxes_N4 for truth in self.truths])
        return numbers | {"probe/corloc": corloc(ious_N)}


def read_probe(job: TrainDetectorJob) -> DetectionProbe | None:
    """The photos of the job's settings; None where it names none.

    Raises:
        DataError: photos or boxes cannot be read, or do not belong together.
    """
    chosen = job.probe
    if chosen.images is None or chosen.ground_truth is None:
        return None
    inputs, truths = annotated_images(
        chosen.images, chosen.ground_truth, num_images=chosen.num_images
    )
    return DetectionProbe(inputs["uri"].to_pylist(), truths, chosen.difficult)


def _photo(uri: str) -> Image.Image:
    (data,) = fetch_bytes([uri])
    if isinstance(data, ReadFault):
        raise DataError(f"cannot read {printable(uri)}: {data.reason}")
    return decode_rgb(data, printable(uri))
