"""A job's own local Ray."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NICENESS = """
import os
import ray
from pipeline.cluster.session import ray_session

with ray_session():
    print(ray.get(ray.remote(num_cpus=1)(lambda: os.nice(0)).remote()))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_workers_are_as_nice_as_the_job_that_started_them() -> None:
    command = ["nice", "-n", "3", sys.executable, "-c", NICENESS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == os.nice(0) + 3
