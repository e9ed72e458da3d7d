"""The door of jobs/train_classifier.py: a classifier's run, its export and its results."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.classification.run import export_run, train_classifier_here
from pipeline.cluster.training import run_training, say
from pipeline.config import TrainClassifierJob
from pipeline.runs.folder import RunFolder
from pipeline.runs.places import require_places, with_absolute_places
from pipeline.storage import Location


def train_classifier(job: TrainClassifierJob) -> int:
    """Train what ``job`` describes, or go on with it, and tell the results.

    Returns:
        The exit code: 0.

    Raises:
        PatchseedError: of the kind that errors.py lists; finished epochs are kept.
    """
    job = with_absolute_places(job)

    def check() -> None:
        require_places(job, but=("data.root",) if job.data.download else ())

    def finish(folder: RunFolder, summary: dict[str, Any]) -> None:
        if job.export is not None:
            for line in export_run(folder, Location.parse(job.export), onnx=job.onnx):
                say(line)
        _tell_results(summary, folder)

    return run_training(job, train_classifier_here, finish, check)


def _tell_results(summary: dict[str, Any], folder: RunFolder) -> None:
    metrics = summary["metrics"]
    table = Table()
    table.add_column("accuracy")
    table.add_column("selected epoch", justify="right")
    table.add_column("last epoch", justify="right")
    for of, selected in (("val", "val/accuracy_best"), ("test", "test/accuracy_selected")):
        if selected in metrics:
            last = metrics[f"{of}/accuracy_last"]
            table.add_row(of, f"{metrics[selected]:.2%}", f"{last:.2%}")
    Console().print(table)
    say(f"epoch {metrics['selected_epoch']:.0f} was chosen on {summary['data']['selected_on']}")
    say(f"model    {folder.place.child('model')}")
    say(f"figures  {folder.place.child('figures')}")
    say("compare  python jobs/compare_runs.py --runs " + str(folder.place).rpartition("/")[0])
