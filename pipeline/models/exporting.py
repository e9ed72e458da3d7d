"""A trained classifier as two files that anyone can use, and back: no Ray, no MLflow, no pickle.

    FOLDER/model.safetensors   the bare network's tensors under its own names; timm reads them too
    FOLDER/config.json         what builds the network again, its inputs, how it was made

    classifier = load_classifier("FOLDER")
    classifier.predict("cat.jpg")    [{"name": "cat", "label": 3, "probability": 0.93}, ...]

To record something more: a field of ``ClassifierDescription``. A file that says what older readers
would misunderstand needs a higher ``VERSION``.

Shape letters:  B images   H, W rows and columns in pixels   K classes
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, overload

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pipeline.config.classification import Tap
from pipeline.data.pseudo_labels import versions
from pipeline.errors import DataError, StorageError, WeightsError, one_line
from pipeline.models.backbones import build_model
from pipeline.models.checkpoints import fit_state_dict
from pipeline.models.grid_classifier import GridClassifier
from pipeline.storage import Location

FORMAT = "patchseed-classifier"
VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Images that go through the network at once.
_BATCH = 32

ImageLike: TypeAlias = Image.Image | NDArray[np.uint8] | str | Path


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the network's input: resized, cut, ``(value / 255 - mean) / std``."""

    image_size: int
    """Side of the square input in pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    crop: Literal["centre", "whole"] = "centre"
    """The centre of the picture, or all of it squeezed into the square."""

    crop_pct: float = 0.875
    """centre only: the shorter side is brought to ``floor(image_size / crop_pct)`` first."""

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class ClassifierDescription:
    """All there is to know about a trained classifier but its weights. JSON values throughout."""

    architecture: str
    """The name that ``build_model`` knows it by."""

    classes: tuple[str, ...]
    """Names by label."""

    preprocessing: Preprocessing

    image_size: int | None = None
    """This and the next five as they were given to ``build_model``."""

    patch_size: int | None = None
    drop_path: float | None = None
    stages: tuple[int, ...] = (-1,)
    tap: Tap | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    metrics: Mapping[str, float] = field(default_factory=dict)
    """What it reached, such as ``{"validation/accuracy": 0.91}``."""

    made_by: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: the command, the configuration, the data's fingerprint."""


class ClassProbability(TypedDict):
    """A class, and how probable the network thinks it is."""

    name: str
    label: int
    probability: float


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier in evaluation mode, with what its inputs must be."""

    module: GridClassifier
    """Normalised images ``(B, 3, H, W)`` in, ``Prediction`` out, as ``build_model`` made it."""

    description: ClassifierDescription
    device: torch.device

    @overload
    def predict(self, images: ImageLike, *, top_k: int = ...) -> list[ClassProbability]: ...

    @overload
    def predict(self, images: list[Any], *, top_k: int = ...) -> list[list[ClassProbability]]: ...

    def predict(
        self, images: ImageLike | list[Any], *, top_k: int = 5
    ) -> list[ClassProbability] | list[list[ClassProbability]]:
        """The ``top_k`` most probable classes of an image, the best first; of a list, a list each.

        Args:
            images: A Pillow image, a file, an (h, w, 3) uint8 array, or a list of such.
            top_k: At most as many as there are classes.

        Raises:
            DataError: an image cannot be read, or is no 8-bit picture.
        """
        if isinstance(images, list):
            return self._predict(images, top_k)
        return self._predict([images], top_k)[0]

    def _predict(self, images: Sequence[ImageLike], top_k: int) -> list[list[ClassProbability]]:
        found = []
        for start in range(0, len(images), _BATCH):
            recipe = self.description.preprocessing
            rows = [preprocess(image, recipe) for image in images[start : start + _BATCH]]
            found += self._most_probable(torch.stack(rows), top_k)
        return found

    @torch.inference_mode()
    def _most_probable(self, images_B3HW: Tensor, top_k: int) -> list[list[ClassProbability]]:
        classes = self.description.classes
        probabilities_BK = self.module(images_B3HW.to(self.device)).logits_BK.float().softmax(dim=1)
        best = probabilities_BK.topk(min(top_k, len(classes)), dim=1)
        return [
            [
                {"name": classes[label], "label": label, "probability": probability}
                for label, probability in zip(labels, values, strict=True)
            ]
            for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def export_classifier(
    model: nn.Module, description: ClassifierDescription, folder: Location
) -> None:
    """Write the classifier's two files; config.json is written last and makes them valid.

    Of ``model`` only ``model.network`` is written: no head that training alone needs.

    Raises:
        WeightsError: the weights are not finite, or the description builds another network.
        StorageError: the folder cannot be written.
    """
    network: Any = model.network
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }
    # What cannot be loaded again is found out here, where the weights still are.
    fit_state_dict(_build(description).network, state, "the trained network")
    config = _config_of(description)
    content = safetensors.torch.save(
        state, metadata={"format": "pt", "config_sha256": config_sha256(config)}
    )
    config["weights"] = {
        "file": WEIGHTS_NAME,
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    text = json.dumps(config, indent=1, ensure_ascii=False, allow_nan=False)
    folder.child(WEIGHTS_NAME).write_bytes(content)
    folder.child(CONFIG_NAME).write_bytes(text.encode())


def load_classifier(path: str | Path, *, device: str = "cpu") -> TrainedClassifier:
    """The classifier that ``export_classifier`` wrote into a folder of a disk or a bucket.

    Raises:
        WeightsError: a file is missing, damaged, of another version, or belongs to another export.
        StorageError: the folder cannot be read.
        ConfigError: the architecture is not known here.
    """
    folder = Location.parse(str(path))
    config = _read_config(folder)
    description = _description_in(config, folder)
    place = folder.child(WEIGHTS_NAME)
    content = _read(place)
    if hashlib.sha256(content).hexdigest() != config["weights"]["sha256"]:
        raise WeightsError(
            f"{place} is damaged or belongs to another {CONFIG_NAME}; export the classifier again"
        )
    try:
        state = safetensors.torch.load(content)
    except SafetensorError as fault:
        raise WeightsError(f"{place} is no safetensors file ({one_line(fault, 120)})") from fault
    module = _build(description)
    fit_state_dict(module.network, state, str(place))
    target = torch.device(device)
    return TrainedClassifier(module.to(target).eval(), description, target)


def config_sha256(config: Mapping[str, Any]) -> str:
    """A hash of all that config.json says but for the weights; model.safetensors carries it."""
    said = {name: value for name, value in config.items() if name != "weights"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def preprocess(image: ImageLike, recipe: Preprocessing) -> Tensor:
    """The network's input for an image: ``(3, image_size, image_size)`` float32.

    Bit by bit what ``pipeline.classification.augment.eval_transform`` makes of it.

    Raises:
        DataError: the image cannot be read, or is no 8-bit picture.
    """
    rgb, side = _rgb(image), recipe.image_size
    interpolation = InterpolationMode(recipe.interpolation)
    if recipe.crop == "whole":
        cut = F.resize(rgb, [side, side], interpolation=interpolation)
    else:
        shorter = math.floor(side / recipe.crop_pct)
        cut = F.center_crop(F.resize(rgb, [shorter], interpolation=interpolation), [side, side])
    # Torchvision's newer transforms.v2 rounds otherwise in the last bit.
    normalised_3HW: Tensor = F.normalize(F.to_tensor(cut), list(recipe.mean), list(recipe.std))
    return normalised_3HW


def _rgb(image: ImageLike) -> Image.Image:
    """The picture upright, in mode RGB, its transparent parts over white: as in training."""
    if isinstance(image, str | Path):
        return _rgb(_open(Path(image)))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"an array must be (h, w, 3) uint8, got {image.shape} {image.dtype}; "
                "bring it to RGB values from 0 to 255"
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(
            "an image must be a file's name, a Pillow image, an (h, w, 3) uint8 array or a list of "
            f"such, got {type(image).__name__}"
        )
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise DataError(f"an image must have 8 bits a channel, got mode {image.mode}; scale it")
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.new("RGB", layer.size, (255, 255, 255))
        upright.paste(layer, mask=layer)
    return upright.convert("RGB")


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    # A decoder given damaged bytes may raise anything.
    except Exception as fault:
        raise DataError(f"{path} cannot be decoded ({one_line(fault, 160)})") from fault


def _build(description: ClassifierDescription) -> GridClassifier:
    """The network of that description, as it is before any training."""
    # Its initial weights are thrown away: nobody else's random numbers shall change for them.
    with torch.random.fork_rng(devices=[]):
        return build_model(
            description.architecture,
            num_classes=len(description.classes),
            image_size=description.image_size,
            patch_size=description.patch_size,
            drop_path=description.drop_path,
            stages=description.stages,
            tap=description.tap,
            options=dict(description.options),
        )


_BUILD_ARGUMENTS = ("image_size", "patch_size", "drop_path", "stages", "tap", "options")


def _config_of(description: ClassifierDescription) -> dict[str, Any]:
    """config.json without its last entry, ``weights``; what JSON would make of it."""
    said = asdict(description)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": description.architecture,
        "num_classes": len(description.classes),
        "class_names": description.classes,
        "build": {name: said[name] for name in _BUILD_ARGUMENTS},
        "preprocessing": said["preprocessing"],
        "metrics": said["metrics"],
        "made_by": said["made_by"],
        "versions": versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    return plain


def _read_config(folder: Location) -> dict[str, Any]:
    """What config.json says.

    Raises:
        WeightsError: it is no description of a classifier that this version can read.
    """
    place = folder.child(CONFIG_NAME)
    try:
        config: Any = json.loads(_read(place))
    except ValueError as fault:
        raise WeightsError(f"{place} is not JSON ({one_line(fault, 120)})") from fault
    found = (config.get("format"), config.get("version")) if isinstance(config, dict) else ()
    if found != (FORMAT, VERSION):
        raise WeightsError(
            f"{place} must be a {FORMAT} of version {VERSION}, got {found}; "
            "export the classifier with this version of Patchseed"
        )
    return dict(config)


def _description_in(config: dict[str, Any], folder: Location) -> ClassifierDescription:
    """The description that ``_config_of`` wrote down."""
    try:
        recipe, build = dict(config["preprocessing"]), dict(config["build"])
        for name in ("mean", "std"):
            recipe[name] = tuple(recipe[name])
        build["stages"] = tuple(build["stages"])
        # Asked for here, so that what lacks it is refused as incomplete.
        str(config["weights"]["sha256"])
        return ClassifierDescription(
            architecture=config["architecture"],
            classes=tuple(config["class_names"]),
            preprocessing=Preprocessing(**recipe),
            metrics=config["metrics"],
            made_by=config["made_by"],
            **build,
        )
    except (KeyError, TypeError) as fault:
        raise WeightsError(
            f"{folder.child(CONFIG_NAME)} is incomplete ({type(fault).__name__}: "
            f"{one_line(fault, 120)}); export the classifier again"
        ) from fault


def _read(place: Location) -> bytes:
    try:
        return place.read_bytes()
    except FileNotFoundError as fault:
        raise WeightsError(f"{place} is missing: give the folder of an exported model") from fault
    except OSError as fault:
        raise StorageError(f"cannot read {place}: {one_line(fault)}") from fault
