"""The labelling job away from this machine's disk and shell: object stores, the Jobs API."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.pseudo_labels import read_manifest
from pipeline.storage import Location
from tests.conftest import ROOT, ray_head
from tests.jobs.conftest import LabelJobs, write_photos

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a Ray head's dashboard, behind a token as ray_cluster.yaml has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with ray_head(dashboard=True) as (_, page):
            yield f"http://{page}"


def submit(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_the_jobs_api_runs_the_job_to_success(
    head: str, label_jobs: LabelJobs, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", 6)
    job = label_jobs.command(tmp_path / "photos", tmp_path / "labels")
    # A process of its own, because Ray reads its token once per process.
    command = ["ray", "job", "submit", "--address", head, "--working-dir", "."]
    command += ["--", "python", *job[1:]]
    done = submit(command)
    deadline = time.monotonic() + 60
    # A head that has just started answers before the agent that runs jobs is there.
    while "No available agent" in done.stdout + done.stderr and time.monotonic() < deadline:
        time.sleep(1)
        done = submit(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 rows in" in done.stdout
    assert read_manifest(Location.parse(str(tmp_path / "labels"))).counts == {"ok": 6}


def test_the_jobs_api_is_closed_to_those_without_the_token(head: str) -> None:
    request = urllib.request.Request(f"{head}/api/jobs/")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 401


def test_images_and_table_may_both_lie_in_an_object_store(
    s3_bucket: str, label_jobs: LabelJobs, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", 5)
    for path in (tmp_path / "photos").rglob("*.png"):
        name = path.relative_to(tmp_path).as_posix()
        Location.parse(f"{s3_bucket}/{name}").write_bytes(path.read_bytes())
    Location.parse(f"{s3_bucket}/photos/broken.jpg").write_bytes(b"no picture")
    output = f"{s3_bucket}/labels"
    # Workers of the tests' Ray would not know this bucket.
    done = label_jobs.run_alone(f"{s3_bucket}/photos", output, "--max-bad-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert read_manifest(Location.parse(output)).counts == {"error_decode": 1, "ok": 5}
    again = label_jobs.run(f"{s3_bucket}/photos", output, "--resume", "--max-bad-fraction", "0.2")
    assert "nothing is left to do" in again.stdout
    told = done.stdout + done.stderr + json.dumps(read_manifest(Location.parse(output)).job)
    assert "canary-secret" not in told
