"""The example manifests are valid and agree with the code and with docker-compose.yml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from infra.cli import COMMANDS
from streams.config.environment import PREFIX
from streams.config.settings import Settings, keys, variable

ROOT = Path(__file__).parents[3]
OBJECTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((ROOT / "infra/deploy/kubernetes/streamformer.yml").read_text())
)
BY_KIND = {each["kind"]: each for each in OBJECTS}
POD: dict[str, Any] = BY_KIND["StatefulSet"]["spec"]["template"]["spec"]
WORKER: dict[str, Any] = POD["containers"][0]
VERSION = kubernetes_validate.latest_version()


@pytest.mark.parametrize("found", OBJECTS, ids=lambda found: str(found["kind"]))
def test_valid_by_the_schemas_of_kubernetes(found: dict[str, Any]) -> None:
    """Each object satisfies the strict schema of its kind, and one with an unknown field does not."""
    kubernetes_validate.validate(found, VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**found, "imagine": "x"}, VERSION, strict=True)


def test_variables_are_settings() -> None:
    """Every variable with our prefix is that of a setting, with a value that the setting accepts."""
    data: dict[str, str] = BY_KIND["ConfigMap"]["data"]
    known = {variable(key): key for key in keys()}
    named = {*data, *(each["name"] for each in WORKER["env"])}
    assert {name for name in named if name.startswith(PREFIX)} <= set(known)
    content: dict[str, Any] = {}
    for name, value in data.items():
        if name.startswith(PREFIX):
            group, _, key = known[name].rpartition(".")
            (content.setdefault(group, {}) if group else content)[key] = value
    assert Settings(**content).web.host == "0.0.0.0"


def test_the_worker_is_probed_where_it_serves_and_has_time_to_stop() -> None:
    """Probes and ports are those of the web server, and the grace period is above the worker's own limit."""
    assert WORKER["args"][0] in COMMANDS
    port = Settings.model_fields["web"].default.port
    assert WORKER["ports"] == [{"name": "metrics", "containerPort": port}]
    assert BY_KIND["Service"]["spec"]["ports"][0]["port"] == port
    assert WORKER["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert WORKER["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    limit_s = Settings.model_fields["worker"].default.shutdown_timeout_ms / 1_000
    assert POD["terminationGracePeriodSeconds"] > limit_s


def test_every_pod_has_a_name_and_a_disk_of_its_own() -> None:
    """The instance id is the pod's stable name, every mount is a volume, and only mounted folders are written."""
    (instance_id,) = (each for each in WORKER["env"] if each["name"] == variable("worker.instance_id"))
    assert instance_id["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    claims = {each["metadata"]["name"] for each in BY_KIND["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    mounts = {each["name"]: each["mountPath"] for each in WORKER["volumeMounts"]}
    assert set(mounts) == claims | {each["name"] for each in POD["volumes"]}
    data = BY_KIND["ConfigMap"]["data"]
    for written in (data["STREAMFORMER_DATA_DIR"], data["XDG_CACHE_HOME"]):
        assert Path(mounts["data"]) in Path(written).parents
    assert mounts["release"] == data["STREAMFORMER_ENCODER_RELEASE_DIR"]


def test_selectors_match_the_pods() -> None:
    """Service, StatefulSet and disruption budget select the labels that the pods have."""
    labels = BY_KIND["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert BY_KIND["Service"]["spec"]["selector"] == labels
    for kind in ("StatefulSet", "PodDisruptionBudget"):
        assert BY_KIND[kind]["spec"]["selector"]["matchLabels"] == labels
