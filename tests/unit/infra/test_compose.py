"""docker-compose.yml is valid and agrees with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra.cli import COMMANDS
from streams.config.settings import Settings, keys, variable

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service.get("image") == "streamformer"}


def test_valid_by_the_compose_specification() -> None:
    """The file satisfies the JSON schema of the Compose specification, and a broken one does not."""
    schema = json.loads((ROOT / "tests/data/compose_spec.json").read_text())
    mount = schema["definitions"]["service"]["properties"]["volumes"]["items"]["oneOf"][1]
    mount["properties"]["bind"]["properties"]["create_host_path"] = {"type": "boolean"}  # newer than this schema
    jsonschema.validate(COMPOSE, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"kafka": {"imagine": "x"}}}, schema)


@pytest.mark.parametrize("name", OURS)
def test_commands_exist(name: str) -> None:
    """Each of our services runs a command that the console script has."""
    assert OURS[name]["command"][0] in COMMANDS


@pytest.mark.parametrize("name", OURS)
def test_variables_are_settings(name: str) -> None:
    """Every variable of our services is the variable of a setting, with a value that the setting accepts."""
    environment = OURS[name]["environment"]
    known = {variable(key): key for key in keys()}
    assert set(environment) <= set(known)
    content: dict[str, Any] = {}
    for name_, value in environment.items():
        group, _, key = known[name_].rpartition(".")
        (content.setdefault(group, {}) if group else content)[key] = value
    Settings(**content)


def test_all_services_agree_on_broker_and_partitions() -> None:
    """Topics, worker and replayer use the address that the broker advertises, and the same number of partitions."""
    addresses = {service["environment"]["STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS"] for service in OURS.values()}
    assert len(addresses) == 1
    assert f"//{addresses.pop()}" in SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert len({service["environment"]["STREAMFORMER_TOPICS_PARTITIONS"] for service in OURS.values()}) == 1


def test_worker_starts_after_the_topics_and_serves_the_published_port() -> None:
    """The worker waits for the topics job, and its web port is the one that is published, probed and scraped."""
    worker = SERVICES["worker"]
    assert worker["depends_on"]["topics"]["condition"] == "service_completed_successfully"
    port = worker["environment"].get("STREAMFORMER_WEB_PORT", Settings.model_fields["web"].default.port)
    assert worker["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f":{port}/livez" in worker["healthcheck"]["test"][-1]
    scrape = yaml.safe_load((ROOT / "infra/deploy/prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"worker:{port}"]


def test_worker_has_time_to_stop_gracefully() -> None:
    """The grace period is longer than the worker's own limit for stopping."""
    limit_s = Settings.model_fields["worker"].default.shutdown_timeout_ms / 1_000
    assert float(SERVICES["worker"]["stop_grace_period"].rstrip("s")) > limit_s


def test_mounted_files_exist_and_images_are_pinned() -> None:
    """Every mounted folder exists, every named volume is declared, and every foreign image has a full version."""
    for service in SERVICES.values():
        for mount in service.get("volumes", ()):
            if isinstance(mount, dict):
                continue
            source = mount.partition(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).is_dir(), source
            else:
                assert source in COMPOSE["volumes"]
        assert service in OURS.values() or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_worker_runs_the_release_of_the_demo_and_never_creates_its_folder() -> None:
    """RELEASE or else releases/demo is mounted read-only where the worker looks; a missing folder is an error."""
    worker = SERVICES["worker"]
    (mount,) = (mount for mount in worker["volumes"] if isinstance(mount, dict))
    assert mount["source"] == "${RELEASE:-./releases/demo}"
    assert mount["target"] == worker["environment"]["STREAMFORMER_ENCODER_RELEASE_DIR"]
    assert mount["read_only"] is True
    assert mount["bind"] == {"create_host_path": False}


def test_the_image_holds_the_extras_of_its_commands() -> None:
    """The Dockerfile installs the extra of every command that a service runs."""
    dockerfile = (ROOT / "infra/deploy/docker/Dockerfile").read_text()
    installed = re.search(r"'\.\[([a-z,]+)\]'", dockerfile)
    assert installed is not None
    needed = {COMMANDS[service["command"][0]].extra for service in OURS.values()} - {""}
    assert needed == set(installed[1].split(","))


def test_only_loopback_is_published() -> None:
    """Every published port is bound to loopback, so other machines cannot reach it."""
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_dockerfile_copies_what_exists() -> None:
    """Every source of a COPY is in the repository and allowed by .dockerignore."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in (ROOT / "infra/deploy/docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert source in allowed
                assert (ROOT / source).exists(), source
