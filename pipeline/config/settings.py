"""What all groups of knobs share: frozen, no unknown names, ranges checked before work begins."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "bf16", "fp16"]

Place = Literal["file or folder", "images", "weights"]
"""What a setting names: something that is there; a collection, as label_images takes it, or an
archive; weights, a file or the name they were published under."""

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """A frozen group of knobs; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    places: ClassVar[Mapping[str, Place]] = {}
    """The settings, by dotted names, that say what to read (runs/places.py)."""


class TrackedSettings(Settings):
    """Where a job's run is recorded."""

    tracking_uri: str | None = None
    """MLflow server or database; None is $MLFLOW_TRACKING_URI, else sqlite in ./mlflow.db. 'off'
    records nothing."""

    experiment: str = "patchseed"
    """MLflow experiment the run belongs to."""

    run_name: str | None = None
    """MLflow run name; None is made of the method and the configuration's hash."""

    debug: bool = False
    """Show tracebacks and the logs of the libraries underneath."""


def flatten(groups: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as one level with dotted names: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in groups.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
