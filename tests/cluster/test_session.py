"""A job's own local Ray, and one that was there before."""

import os
import subprocess
import sys

import pytest
import ray

from pipeline.cluster.session import ray_session
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


@pytest.mark.ray
def test_a_ray_that_this_process_has_already_is_used_and_left_as_it_is(ray_address: str) -> None:
    ray.init(address=ray_address, log_to_driver=False)
    try:
        mine = ray.get_runtime_context().get_job_id()
        with ray_session():
            assert ray.get_runtime_context().get_job_id() == mine
        assert ray.is_initialized()
    finally:
        ray.shutdown()
