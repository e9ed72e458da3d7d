"""What runs share and in what they differ, in few words: the labels of a paired comparison.

A configuration is a mapping of dotted names to texts. To have a setting named in every group's
label: add a line to ``group_label``.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence

Config = Mapping[str, str]

LOSS, SEED, WEIGHT = "drloc.", "seed", "drloc.weight"
# More than these in a label, and nobody reads it.
_MOST_NAMED = 4
_MOST_LISTED = 20
_NOTHING = "unset"
# Where a run is written and how fast it is, not what it is: no reason why two do not pair.
_PLACES = ("experiment", "run_name", "tracking_uri", "output", "export", "debug", "data.root")


def group_labels(groups: Mapping[str, Sequence[Config]]) -> dict[str, str]:
    """A label for each group: data, model, epochs, and what differs between the groups only.

    A setting that varies within a group, as paths may, tells no groups apart.
    """
    shown = _telling({key: list(configs) for key, configs in groups.items()})
    return {key: _group_label(configs[0], shown) for key, configs in groups.items()}


def _group_label(config: Config, shown: Sequence[str]) -> str:
    parts = [config[name] for name in ("data.name", "model.name") if name in config]
    if "epochs" in config:
        parts.append(f"{config['epochs']} epochs")
    if config.get("data.select_on_test", "False") == "True":
        parts.append("epoch chosen on the test set")
    parts += [f"{name} {config.get(name, _NOTHING)}" for name in shown[:_MOST_NAMED]]
    if len(shown) > _MOST_NAMED:
        parts.append(f"and {len(shown) - _MOST_NAMED} more settings")
    return ", ".join(parts) or "all runs"


def _telling(groups: Mapping[str, Sequence[Config]]) -> list[str]:
    """Names that have one value within each group, and not the same one in all."""
    named = {"data.name", "model.name", "epochs", "data.select_on_test", SEED, *_PLACES}
    names = {name for configs in groups.values() for config in configs for name in config}
    telling = []
    for name in sorted(names - named):
        values = [{config.get(name) for config in configs} for configs in groups.values()]
        constant = all(len(one) == 1 for one in values)
        if constant and len(set.union(*values)) > 1 and not name.startswith(LOSS):
            telling.append(name)
    return telling


def setting_label(drloc: Config, others: Iterable[Config]) -> str:
    """One setting of DRLoc: its weight, and whatever else tells it from the ``others``."""
    others = list(others)
    parts = [f"weight {drloc.get(WEIGHT, _NOTHING)}"]
    for name in sorted(set(drloc).union(*others) - {WEIGHT}):
        if any(one.get(name) != drloc.get(name) for one in others):
            parts.append(f"{name.removeprefix(LOSS)} {drloc.get(name, _NOTHING)}")
    return ", ".join(parts)


def nearest_settings(treated: Sequence[Config], baseline: Sequence[Config]) -> str:
    """In which settings the two runs differ that come nearest to a pair; empty for none.

    Raises:
        ValueError: one of the sides is empty.
    """
    if not treated or not baseline:
        raise ValueError("both sides need a run for a nearest pair")
    nearest = min((_unlike(one, other) for one in treated for other in baseline), key=len)
    more = f" and {len(nearest) - _MOST_NAMED} more" if len(nearest) > _MOST_NAMED else ""
    return ", ".join(nearest[:_MOST_NAMED]) + more


def _unlike(treated: Config, baseline: Config) -> list[str]:
    names = sorted(set(treated) | set(baseline))
    return [
        f"{name} ({treated.get(name, _NOTHING)} with DRLoc, {baseline.get(name, _NOTHING)} without)"
        for name in names
        if name not in _PLACES
        and not name.startswith(LOSS)
        and treated.get(name) != baseline.get(name)
    ]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, and all of them."""
    if not known:
        return ": there is none"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(close)}?" if close else ""
    more = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
    return f"{hint} (there are: {', '.join(known[:_MOST_LISTED])}{more})"
