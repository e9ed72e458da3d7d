"""The knobs of clustering boxes into classes without names."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.config.settings import Normalization, PositiveInt, Seed, Settings

ClusteringMethod = Literal["kmeans++", "lost"]


class TokenBackboneConfig(Settings):
    """Which network turns a crop into a vector: the class token after its last norm."""

    name: str = "vit_small_patch16_224.dino"
    """Any plain timm ViT with a class token."""

    checkpoint: str | None = None
    """Local .safetensors or .pth with the weights; without it they come from the hub by name."""

    normalize: Normalization = "imagenet"
    """Input normalisation: ImageNet's mean and deviation, or 0.5 and 0.5 (timm's augreg ViTs)."""


class ClusterJob(Settings):
    """Give the boxes of a table classes without names, as LOST does for class-aware detection."""

    places: ClassVar = {"labels": "file or folder", "backbone.checkpoint": "file or folder"}

    labels: str
    """Pseudo-label table (folder); its images are found through its URIs."""

    output: str
    """Folder (or URI) of the new table; must be new, unless --overwrite."""

    num_clusters: PositiveInt = 20
    """Classes to find; labels are 1 to this number. LOST takes 20 for VOC."""

    method: ClusteringMethod = "kmeans++"
    """k-means++ with restarts, label 1 being the largest cluster; or what LOST runs: SciPy's
    kmeans2 on whitened vectors, random centres, 10 iterations."""

    restarts: PositiveInt = 10
    """k-means++ only: runs of which the best is kept."""

    seed: Seed = 123
    """Of the centres; 123 is LOST's."""

    crop_size: Annotated[int, Field(ge=16, le=1024)] = 256
    """Pixels of a crop's shorter side."""

    antialias: bool = True
    """Smooth crops that are made smaller; LOST's torchvision did not."""

    batch_size: PositiveInt | None = None
    """Crops per forward pass at most (they must share a patch grid); None is 64 on a GPU and 4 on
    a CPU."""

    overwrite: bool = False
    """Replace the table that the output holds, when the new one is ready."""

    sheet: str | None = None
    """File for a picture of sample crops per cluster; None is OUTPUT_clusters.png beside the
    output, 'off' draws none."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """More images that can no longer be read than this end the (complete) job with exit code 6."""

    progress_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between progress lines where the output is not a terminal."""

    backbone: TokenBackboneConfig = TokenBackboneConfig()

    debug: bool = False
    """Show tracebacks."""

    def what_decides_the_classes(self, weights_sha256: str, manifest_sha256: str) -> dict[str, Any]:
        """The settings behind the labels, flat; they join those of the table they were made of."""
        said = {
            "labels": self.labels,
            "labels_manifest_sha256": manifest_sha256,
            "num_clusters": self.num_clusters,
            "method": self.method,
            "restarts": self.restarts if self.method == "kmeans++" else None,
            "seed": self.seed,
            "crop_size": self.crop_size,
            "antialias": self.antialias,
            "backbone": self.backbone.name,
            "normalize": self.backbone.normalize,
            "weights_sha256": weights_sha256,
        }
        return {f"clusters.{name}": value for name, value in said.items()}
