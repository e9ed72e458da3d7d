"""Recorded training runs, read back: from an experiment of MLflow, or from the runs' own folders.

    read_experiment("patchseed", None) -> [RecordedRun(name="swin-...", seed=0, ...), ...]
    read_folders("runs/")              -> the same, from every runs/*/summary.json

Both give the runs in the order they were recorded. Nothing is written, and a database that is not
there is not made. MLflow is reached through tracking/tracker.py, the only file that imports it.

To read another kind of run: its name beside ``KIND``. To read another fact of a run: a field in
``RecordedRun``, and a line in ``_from_mlflow`` and in ``_from_summary``.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from pipeline.comparison.paired import SEED, WEIGHT, RecordedRun, did_you_mean
from pipeline.config import flatten
from pipeline.errors import ConfigError, DataError, StorageError, one_line, without_secrets
from pipeline.storage import Location
from pipeline.tracking.tracker import OFF, absolute_uri, connect

KIND = "classifier"
KIND_TAG, FINISHED_TAG = "patchseed.kind", "patchseed.finished"
PAIR_KEY_TAG, CONFIG_HASH_TAG = "patchseed.pair_key", "patchseed.config_hash"
SUMMARY = "summary.json"

# MLflow's own default: a larger page is one slower request.
_PAGE = 1000
_LOG = logging.getLogger(__name__)


def read_experiment(experiment: str, tracking_uri: str | None) -> list[RecordedRun]:
    """The classifier runs of an experiment, in the order they were started.

    A run whose seed, DRLoc weight or pair key was not recorded is left out, with a warning.

    Raises:
        ConfigError: the URI is none that MLflow reads, or ``off``.
        DataError: there is no such database or experiment, or no classifier run in it.
        StorageError: MLflow cannot be reached.
    """
    if tracking_uri == OFF:
        raise ConfigError(
            "tracking_uri must be a store to read runs from, got 'off'; runs that were not tracked "
            "are read with --runs FOLDER"
        )
    uri = absolute_uri(tracking_uri)
    _check_database(uri)
    try:
        client, _ = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage == "deleted":
            raise DataError(_unknown(client, experiment, uri))
        runs = list(_pages(lambda token: _runs_page(client, found.experiment_id, token)))
        if not runs:
            raise DataError(f"experiment {experiment!r} holds no {KIND} runs; {_there(client)}")
    except DataError:
        raise
    except Exception as fault:  # MLflow, its drivers and the network raise all sorts
        raise StorageError(
            f"MLflow at {without_secrets(uri)} cannot be read: {without_secrets(one_line(fault))}"
        ) from fault
    return _usable(runs, _from_mlflow, lambda run: f"run {run.info.run_id}")


def read_folders(runs: str) -> list[RecordedRun]:
    """The classifier runs whose folders lie in ``runs``, in the order they were begun.

    A summary that cannot be used is left out, with a warning.

    Raises:
        ConfigError: the URI has a scheme that is not read.
        DataError: no folder in it holds the summary of a classifier run.
        StorageError: the store cannot be reached.
    """
    place = Location.parse(runs)
    summaries = [place.child(name).child(SUMMARY) for name in place.names()]
    found = [summary for summary in summaries if summary.kind() == "file"]
    read = [(summary, content) for summary in found if (content := _content(summary)) is not None]
    mine = [one for one in read if one[1].get("kind") == KIND]
    mine.sort(key=lambda one: _seconds(one[1].get("created_at")))
    if not mine:
        raise DataError(
            f"{place} must hold the folders of finished {KIND} runs (RUN/{SUMMARY}), "
            + (
                f"found {len(summaries)} entries and {len(found)} summaries, none of a {KIND}"
                if summaries
                else "there is nothing; give the --output that they were trained with"
            )
        )
    return _usable(mine, lambda one: _from_summary(*one), lambda one: str(one[0]))


def _check_database(uri: str) -> None:
    """Raise DataError where connecting would make a database: reading must leave no trace."""
    path = uri.partition(":///")[2].partition("?")[0]
    if uri.startswith("sqlite") and not os.path.exists(path):
        raise DataError(
            f"there is no MLflow database {path}: give --tracking-uri, or run this where the "
            "training was started"
        )


def _pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    """The items of all pages; ``page`` gives the one that a token names."""
    token: str | None = None
    while True:
        found = page(token)
        yield from found
        token = found.token
        if not token:
            return


def _runs_page(client: Any, experiment_id: str, token: str | None) -> Any:
    return client.search_runs(
        [experiment_id],
        f"tags.`{KIND_TAG}` = '{KIND}'",
        max_results=_PAGE,
        order_by=["attributes.start_time ASC"],
        page_token=token,
    )


def _names(client: Any) -> list[str]:
    """The experiments there are, the deleted ones left out."""
    found = _pages(lambda token: client.search_experiments(max_results=_PAGE, page_token=token))
    return sorted(one.name for one in found)


def _unknown(client: Any, experiment: str, uri: str) -> str:
    where = without_secrets(uri)
    told = did_you_mean(experiment, _names(client))
    return f"MLflow at {where} has no experiment {experiment!r}{told}"


def _there(client: Any) -> str:
    return f"there are the experiments {', '.join(_names(client))}"


def _usable(
    runs: list[Any], read: Callable[[Any], RecordedRun], name: Callable[[Any], str]
) -> list[RecordedRun]:
    """What ``read`` makes of the runs; one that lacks what pairing needs costs a warning."""
    records = []
    for run in runs:
        try:
            records.append(read(run))
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            what = f"no {fault}" if isinstance(fault, KeyError) else one_line(fault)
            _LOG.warning("%s is left out: %s", name(run), what)
    if not records:
        raise DataError(f"none of {len(runs)} {KIND} runs tells its seed, weight and pair key")
    return records


def _from_mlflow(run: Any) -> RecordedRun:
    params, tags = run.data.params, run.data.tags
    return RecordedRun(
        name=run.info.run_name or run.info.run_id,
        config=dict(params),
        metrics=dict(run.data.metrics),
        pair_key=tags[PAIR_KEY_TAG],
        config_hash=tags.get(CONFIG_HASH_TAG, ""),
        seed=int(params[SEED]),
        drloc_weight=float(params[WEIGHT]),
        finished=tags.get(FINISHED_TAG) == "true",
        where=f"MLflow run {run.info.run_id}",
        images=tags.get("data.images_sha256", ""),
    )


def _from_summary(place: Location, content: Mapping[str, Any]) -> RecordedRun:
    # As MLflow would give it: one comparison must not depend on where the runs were read.
    config = {name: str(value) for name, value in flatten(content["config"]).items()}
    numbers = content["metrics"].items()
    return RecordedRun(
        name=str(content["name"]),
        config=config,
        metrics={name: float(value) for name, value in numbers if value is not None},
        pair_key=str(content["pair_key"]),
        config_hash=str(content["config_hash"]),
        seed=int(config[SEED]),
        drloc_weight=float(config[WEIGHT]),
        finished=content["finished"] is True,
        where=str(place),
        images=str(content.get("data", {}).get("images_sha256", "")),
    )


def _content(summary: Location) -> dict[str, Any] | None:
    """A summary's content; None, with a warning, where it is no JSON object."""
    try:
        content = json.loads(summary.read_bytes())
    except (OSError, ValueError) as fault:
        _LOG.warning("%s is left out: %s", summary, one_line(fault))
        return None
    if not isinstance(content, dict):
        _LOG.warning("%s is left out: it is no JSON object", summary)
        return None
    return content


def _seconds(created_at: Any) -> float:
    """A time as seconds, whether it was written as a number or as ISO 8601; 0 where it is none."""
    try:
        return float(created_at)
    except (TypeError, ValueError):
        return _seconds_of_date(str(created_at))


def _seconds_of_date(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
