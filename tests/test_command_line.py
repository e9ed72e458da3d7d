"""Flags and YAML become a checked configuration; a fault is one line and its own exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.command_line import parse
from pipeline.config import DetectJob, LabelJob
from pipeline.errors import ConfigError
from tests.conftest import ROOT

NEEDED = ["--images", "photos", "--output", "labels"]


def run(*args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "jobs/label_images.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_flags_reach_nested_settings() -> None:
    job = parse(
        LabelJob, [*NEEDED, "--backbone.block", "5", "--backbone.feature", "value", "--resume"]
    )
    assert (job.backbone.block, job.backbone.feature, job.resume) == (5, "value", True)
    assert job.localization.keep_fraction == 0.5


def test_all_values_out_of_range_are_told_at_once() -> None:
    bad = ["--localization.keep-fraction", "3", "--localization.num-candidates", "0"]
    with pytest.raises(ConfigError) as fault:
        parse(LabelJob, [*NEEDED, *bad])
    text = str(fault.value)
    assert "--localization.keep-fraction: input should be less than or equal to 1, got 3.0" in text
    assert "--localization.num-candidates" in text


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--resume and --overwrite contradict each other"):
        parse(LabelJob, [*NEEDED, "--resume", "--overwrite"])


def test_a_yaml_file_gives_values_and_later_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "images: photos\noutput: labels\nresume: true\n"
        "localization: {rule: lost, num_candidates: 7}\n"
        "decode: {background: [1, 2, 3]}\ncompute: {wait: false}\n"
    )
    job = parse(LabelJob, ["--config", str(path), "--localization.num-candidates", "9"])
    assert (job.images, job.resume, job.localization.rule) == ("photos", True, "lost")
    assert (job.localization.num_candidates, job.decode.background) == (9, (1, 2, 3))


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "!!python/object:os.system {}"])
def test_a_broken_yaml_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"--config .*job\.yaml"):
        parse(LabelJob, ["--config", str(path)])


def test_a_misspelt_flag_gets_a_suggestion_quickly_and_exit_code_2() -> None:
    started = time.monotonic()
    done = run(*NEEDED, "--localization.keep-fracton", "0.5")
    assert done.returncode == 2
    assert "--localization.keep-fraction" in done.stderr
    assert "Traceback" not in done.stderr
    # Generous for a busy machine; importing torch and Ray alone takes longer than this on one.
    assert time.monotonic() - started < 10


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['label_images.py', '--help']\n"
        "import runpy\n"
        "try: runpy.run_path('jobs/label_images.py', run_name='__main__')\n"
        "except SystemExit as done: print(done.code, {'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("0 set()")


@pytest.mark.parametrize("flag", ["--help", "--list-presets"])
def test_a_reader_that_goes_away_is_no_fault(flag: str) -> None:
    """As of `| head`: the shell's code for it, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "jobs/train_classifier.py", flag]
    done = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_missing_weights_are_one_line_and_exit_code_4(tmp_path: Path) -> None:
    done = run("--images", "photos", "--output", str(tmp_path), "--backbone.checkpoint", "gone.pth")
    assert done.returncode == 4
    assert done.stderr.startswith("WeightsError: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("signal_number", "code"), [(2, 130), (15, 143)])
def test_an_interrupt_ends_with_its_own_code_and_the_resume_hint(
    signal_number: int, code: int
) -> None:
    script = (
        "import os, signal, time\n"
        # A shell in the background starts its children deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pipeline.command_line import run_job\nfrom pipeline.config import LabelJob\n"
        f"def call(job): os.kill(os.getpid(), {signal_number}); time.sleep(5)\n"
        "import sys; sys.argv = ['x', '--images', 'a', '--output', 'b']\n"
        "run_job(LabelJob, call, None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "--resume" in done.stderr


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--decode.background", "300", "0", "0"], "--decode.background: .*got 300"),
        (["--decode.max-side", "10"], "--decode.max-side"),
        (["--decode.min-side", "500", "--decode.max-side", "100"], "min_side must be at most"),
        (["--decode.max-side", "99999999999"], "--decode.max-side"),
        (["--config"], "--config needs a file"),
    ],
)
def test_values_that_would_make_nonsense_are_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(LabelJob, [*NEEDED, *flags])


def test_help_tells_of_the_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(LabelJob, ["--help"], "A job.")
    assert "--config FILE.yaml" in capsys.readouterr().out


def test_help_lists_a_jobs_own_flags_first_and_those_of_all_jobs_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(DetectJob, ["--help"])
    told = capsys.readouterr().out
    flags = [told.index(flag) for flag in ("--detector", "--output", "--tracking-uri")]
    assert flags == sorted(flags)
