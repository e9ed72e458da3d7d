"""The knobs of turning scores into probabilities."""

from typing import Any, ClassVar, Literal

from pipeline.config.settings import Seed, Settings

CalibrationMethod = Literal["logistic", "isotonic"]


class CalibrateJob(Settings):
    """Turn the scores of a table into probabilities, by some tens of labelled images."""

    places: ClassVar = {"labels": "file or folder", "ground_truth": "file or folder"}

    labels: str
    """Pseudo-label table (folder)."""

    ground_truth: str
    """What is on some tens of its images, drawn at random: COCO JSON, or a folder of Pascal VOC
    XML files. Images without an object belong in it too."""

    output: str
    """Folder (or URI) of the new table; must be new, unless --overwrite."""

    method: CalibrationMethod = "logistic"
    """Logistic on the score and the columns contrast and agreement, where every box has them; or
    isotonic on the score alone, which needs more images and keeps the order."""

    seed: Seed = 0
    """Of the folds and of the bootstrap behind intervals."""

    overwrite: bool = False
    """Replace the table that the output holds, when the new one is ready."""

    debug: bool = False
    """Show tracebacks."""

    def what_decides_the_scores(
        self, ground_truth_sha256: str, manifest_sha256: str
    ) -> dict[str, Any]:
        """The settings behind the scores, flat; they join those of the table they were made of."""
        said = {
            "labels": self.labels,
            "labels_manifest_sha256": manifest_sha256,
            "ground_truth": self.ground_truth,
            "ground_truth_sha256": ground_truth_sha256,
            "method": self.method,
            "seed": self.seed,
        }
        return {f"calibration.{name}": value for name, value in said.items()}
