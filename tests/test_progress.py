"""Progress where stdout is no terminal: lines a person can read in a job log."""

import pytest

from pipeline.progress import ProgressReporter, duration


def test_a_line_tells_count_share_speed_time_left_and_outcomes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressReporter("label", 1000, seconds=0.0) as progress:
        progress.advance(240, {"bad": 3, "noobj": 41})
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("label 240/1,000 (24.0 %) ")
    assert " img/s eta " in line
    assert line.endswith("bad=3 noobj=41")


def test_no_line_before_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("label", 100, seconds=3600) as progress:
        for _ in range(10):
            progress.advance(10, {})
    # Only the closing line.
    assert capsys.readouterr().out.count("\n") == 1


def test_what_an_earlier_run_did_counts_for_the_share_and_not_for_the_speed() -> None:
    with ProgressReporter("label", 100, done=90, seconds=3600) as progress:
        assert progress.done == 90
        assert progress.items_per_second == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (75.2, "1m15s"), (3661, "1h01m")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_job_of_one_piece_still_has_a_speed_and_says_how_long_it_took(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressReporter("label", 60, seconds=3600) as progress:
        progress.advance(60, {"bad": 0})
        assert progress.items_per_second > 0
    line = capsys.readouterr().out
    assert line.startswith("label 60/60 (100.0 %) ")
    assert " in 0s bad=0" in line
    assert "eta" not in line
