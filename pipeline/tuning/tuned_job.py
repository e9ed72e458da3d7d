"""Values of a trial -> the settings of the job they belong to, and the best ones as YAML.

A training job is tuned where it stands in ``KINDS`` of runs/kinds.py.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import LabelJob
from pipeline.config.presets import merged
from pipeline.config.settings import Settings
from pipeline.config.tuning import TuneJob
from pipeline.data.places import absolute_places
from pipeline.errors import ConfigError, one_line
from pipeline.runs.kinds import KINDS
from pipeline.tuning.space import LOCALIZATION, OWN, Space, Values

Tree = dict[str, Any]
"""Settings in their groups."""


def base_of(job: TuneJob, space: Space) -> Tree:
    """The settings that stay as they are: the preset, over it the file, over that --set.

    Raises:
        ConfigError: a file cannot be read, or the settings are not legal ones of the tuned job.
    """
    if space.job == OWN:
        if job.base or job.base_preset or job.set:
            raise ConfigError(f"--base and --set have no effect: {space.name} brings its own run")
        return {}
    if (space.job == LOCALIZATION) != (job.labels_for is not None):
        needs = "needs" if space.job == LOCALIZATION else "takes no"
        raise ConfigError(f"a sweep of the {space.job} {needs} --labels-for and --ground-truth")
    base = _as_given(job, space)
    settings = settings_of(space, base, {})
    _require_measurable(space, settings)
    # Workers may be in other folders.
    return merged(base, nested(absolute_places(settings)))


def _as_given(job: TuneJob, space: Space) -> Tree:
    base: Tree = {}
    if job.base_preset is not None:
        trained = KINDS.get(space.job)
        base = _preset(job.base_preset, trained.presets() if trained else {})
    if job.base is not None:
        base = merged(base, _read_base(job.base))
    for text in job.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set must be NAME=VALUE, such as epochs=10, got {text}")
        base = merged(base, nested({name.replace("-", "_"): _parsed(text, value)}))
    if job.labels_for is not None:
        base = merged(base, {"images": job.labels_for, "output": "labels"})
    return base


def _require_measurable(space: Space, settings: Any) -> None:
    if space.job in KINDS and settings.num_workers > 1:
        raise ConfigError(
            f"the sweep says where trials run, got num_workers {settings.num_workers} in the base; "
            "leave it out, and give --trial-workers, --trial-cpus and --trial-gpus"
        )
    if space.metric.startswith("probe/") and settings.probe.images is None:
        raise ConfigError(
            f"{space.metric} is measured on photos whose objects are known: give them with --set "
            "probe.images=PHOTOS probe.ground_truth=BOXES"
        )


def num_epochs(space: Space, base: Tree) -> int | None:
    """Epochs of a trial that is not stopped; None where only the space's own ``run`` knows."""
    if space.job not in KINDS:
        return None
    settings: Any = settings_of(space, base, {})
    return int(settings.num_epochs)


def settings_of(space: Space, base: Tree, values: Values) -> Settings:
    """The tuned job's settings, checked.

    Raises:
        ConfigError: a name is unknown, or a value is out of range, alone or beside others.
    """
    group: type[Settings] = LabelJob if space.job == LOCALIZATION else KINDS[space.job].job
    try:
        return group.model_validate(merged(base, nested(values)))
    except ValidationError as fault:
        raise ConfigError(
            f"the {space.job}'s settings are wrong: "
            + "; ".join(
                ".".join(str(part) for part in error["loc"])
                + ": " * bool(error["loc"])
                + error["msg"].removeprefix("Value error, ")
                + ("" if isinstance(error["input"], dict) else f", got {error['input']!r}")
                for error in fault.errors()
            )
        ) from fault


def best_yaml(space: Space, base: Tree, values: Values) -> tuple[str, str]:
    """The best settings as --config of the tuned job takes them, and the command that does."""
    if space.job == OWN:
        return yaml.safe_dump(values, sort_keys=False), ""
    localizes = space.job == LOCALIZATION
    script = "jobs/label_images.py" if localizes else KINDS[space.job].script
    settings = merged(base, nested(values))
    command = f"python {script} --config best.yaml"
    if localizes:
        # Where the labels go is not what was searched.
        del settings["output"]
        command += " --output labels/"
    text = yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False)
    return f"# {command}\n{text}", command


def nested(flat: Values) -> Tree:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    tree: Tree = {}
    for name, value in flat.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def _preset(name: str, known: dict[str, Tree]) -> Tree:
    if name not in known:
        close = ", ".join(list(known)[:8]) or "none"
        raise ConfigError(f"--base-preset {name} is unknown; this job has {close}...")
    return known[name]


def _read_base(path: str) -> Tree:
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, yaml.YAMLError) as fault:
        raise ConfigError(f"--base {path} cannot be read: {one_line(fault)}") from fault
    if not isinstance(content, dict):
        raise ConfigError(f"--base {path} must hold names and values")
    return content


def _parsed(text: str, value: str) -> Any:
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as fault:
        raise ConfigError(f"--set {text} is no YAML: {one_line(fault)}") from fault
    if isinstance(found, str):
        # YAML 1.1 reads 1e-3 as a text.
        try:
            return float(found)
        except ValueError:
            return found
    return found
