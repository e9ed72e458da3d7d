"""ray_cluster.yaml is a cluster that `ray up` accepts, with a closed door."""

from typing import Any

import pytest
import yaml

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.ray
def test_the_file_passes_rays_own_validation(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


@pytest.mark.ray
def test_rays_validation_would_catch_a_misspelt_key(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config({**cluster, "max_wrokers": 3}))


def test_the_head_runs_no_tasks(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}


def test_there_is_a_pool_without_and_a_pool_with_gpus(cluster: dict[str, Any]) -> None:
    gpus = {
        name: kind["resources"].get("GPU", 0)
        for name, kind in cluster["available_node_types"].items()
    }
    assert gpus == {"head": 0, "decode": 0, "label": 1}


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_starts_ray_with_token_auth(cluster: dict[str, Any], commands: str) -> None:
    start = [command for command in cluster[commands] if "ray start" in command]
    assert len(start) == 1
    assert "RAY_AUTH_MODE=token" in start[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_dashboard_listens_to_the_head_alone(cluster: dict[str, Any]) -> None:
    assert any("--dashboard-host=127.0.0.1" in c for c in cluster["head_start_ray_commands"])
