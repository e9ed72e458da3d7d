"""Whole training runs: killed, continued, shared, told again, exported."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.jobs import training
from tests.jobs.conftest import kill, wait_for

# Float tolerance: a resumed run repeats the same sums, two workers add them in another order.
SAME = 1e-6
REORDERED = 2e-4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_classes(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, without Ray."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = training.run(pictures, output, "--num-workers", "0")
    assert done.returncode == 0, done.stderr
    return output


# Of runs that are shared: stochastic depth draws per worker, so it is off.
SHARED = ("--model.drop-path", "0")


@pytest.fixture(scope="module")
def of_one(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that could be shared, by one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    done = training.run(pictures, output, "--num-workers", "0", *SHARED)
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_leaves_its_settings_numbers_model_and_pictures(uninterrupted: Path) -> None:
    folder = training.run_folder(uninterrupted)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["metrics"]["test/accuracy_selected"] > 0.5
    assert len((folder / "history.jsonl").read_text().splitlines()) == 6
    for name in ("config.yaml", "model/model.safetensors", "model/config.json"):
        assert (folder / name).stat().st_size > 0
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "confusion.png",
        "curves.png",
    }


def test_the_same_command_tells_a_finished_run_again_and_can_export_it(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    before = training.final_weights(uninterrupted)
    flags = ("--num-workers", "0", "--export", str(tmp_path / "model"), "--no-onnx")
    done = training.run(pictures, uninterrupted, *flags)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout
    assert training.largest_difference(before, training.final_weights(uninterrupted)) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_killed_driver_goes_on_to_the_weights_of_an_uninterrupted_run(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    process = training.start(pictures, output, "--num-workers", "0")
    wait_for(lambda: training.epochs_done(output) >= 2, process)
    kill(process)
    assert training.epochs_done(output) < 6
    done = training.run(pictures, output, "--num-workers", "0")
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    assert training.weights_apart(uninterrupted, output) <= SAME


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_ray_worker_is_replaced_and_the_weights_are_the_same(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "worker"
    process = training.start(pictures, output, "--num-workers", "1")
    wait_for(lambda: training.epochs_done(output) >= 2, process)
    training.kill_ray_worker(process)
    assert training.epochs_done(output) < 6
    assert process.wait(timeout=300) == 0, output.with_suffix(".log").read_text()
    assert "going on after epoch" in output.with_suffix(".log").read_text()
    assert training.weights_apart(uninterrupted, output) <= SAME


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_two_ray_workers_train_the_weights_of_one(
    pictures: Path, of_one: Path, tmp_path: Path
) -> None:
    done = training.run(pictures, tmp_path / "two", "--num-workers", "2", *SHARED)
    assert done.returncode == 0, done.stderr
    assert training.weights_apart(of_one, tmp_path / "two") <= REORDERED


@pytest.mark.slow
def test_torchrun_trains_the_weights_of_one_process(
    pictures: Path, of_one: Path, tmp_path: Path
) -> None:
    flags = ("--num-workers", "0", *SHARED)
    done = training.finish(training.torchrun(training.command(pictures, tmp_path / "two", *flags)))
    assert done.returncode == 0, done.stderr
    assert training.weights_apart(of_one, tmp_path / "two") <= REORDERED


def test_a_second_run_in_the_same_folder_is_refused(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "taken"
    process = training.start(pictures, output, "--num-workers", "0")
    try:
        wait_for(lambda: training.epochs_done(output) >= 1, process)
        # Held still, for it would be done before the second one has started.
        process.send_signal(signal.SIGSTOP)
        done = training.run(pictures, output, "--num-workers", "0")
    finally:
        psutil.Process(process.pid).kill()
        process.wait()
    assert done.returncode == 5
    assert f"in use by process {process.pid}" in done.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("on_tests_ray")
def test_a_loss_that_is_not_finite_ends_ray_workers_at_once_with_code_8(
    pictures: Path, tmp_path: Path
) -> None:
    flags = ("--optim.lr", "1e30", "--optim.clip", "0")
    done = training.run(pictures, tmp_path / "nan", "--num-workers", "1", *flags)
    assert done.returncode == 8, done.stderr
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("TrainingDiverged: loss or gradient is not finite at epoch")
    advised = "the same command with --detect-anomaly meets this step again and names its images"
    assert line.endswith(advised)


def test_the_same_command_with_detect_anomaly_names_the_images_of_the_same_step(
    pictures: Path, tmp_path: Path
) -> None:
    flags = ("--num-workers", "0", "--optim.lr", "1e30", "--optim.clip", "0", "--batch-size", "30")
    told = []
    for more in ((), ("--detect-anomaly",)):
        done = training.run(pictures, tmp_path / "nan", *flags, *more)
        assert done.returncode == 8, done.stderr
        told.append(done.stderr.strip().splitlines()[-1])
    plain, found = told
    assert found.partition(";")[0] == plain.partition(";")[0]
    names = found.rpartition("; images: ")[2].split(", ")
    assert names[-1] == "... and 10 more"
    assert len(set(names)) == 21
    assert all((pictures / name).is_file() for name in names[:-1]), names


@pytest.mark.usefixtures("on_tests_ray")
def test_more_workers_than_cores_are_refused_with_the_remedy(
    pictures: Path, tmp_path: Path
) -> None:
    flags = ("--num-workers", "4", "--cpus-per-worker", "256")
    done = training.run(pictures, tmp_path / "many", *flags)
    assert done.returncode == 7, done.stderr
    assert "4 workers need 1024 CPUs" in done.stderr


def test_a_run_that_is_refused_leaves_no_folder(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "refused"
    done = training.run(pictures, output, "--num-workers", "0", "--model.name", "swin_tinyy")
    assert done.returncode == 2, done.stderr
    assert "swin_tinyy" in done.stderr
    assert list(output.iterdir()) == []


@pytest.mark.slow
def test_whoever_stops_a_run_twice_sees_one_line(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    process = training.start(pictures, output, "--num-workers", "0", "--epochs", "1000")
    wait_for(lambda: training.epochs_done(output) >= 1, process)
    process.send_signal(signal.SIGTERM)
    log = output.with_suffix(".log")
    wait_for(lambda: "Interrupted" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert log.read_text().rstrip().splitlines()[-1].startswith("Interrupted: ")
