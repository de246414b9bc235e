"""The console script reports every known failure in one line, without a traceback and with a non-zero exit code."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import infra.commands.topics
import infra.commands.worker
from infra.cli import main
from infra.kafka.durability import Findings
from streams.config.settings import Settings

DEAD = "127.0.0.1:1"


class Result(NamedTuple):
    """Outcome of one call of the script."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["topics", "create", "--bootstrap-servers", DEAD], f"no Kafka broker answers at {DEAD}"),
        (["topics", "verify", "--config", "missing.toml"], "missing.toml"),
        (["replay", "missing.parquet"], "cannot read the log missing.parquet"),
        (["replay", "--generate", "5", "--bootstrap-servers", DEAD], "the replay ended after 0 of 5 events"),
        (["broker", "--port", "0", "--folder", "missing"], "cannot create the broker's data folder"),
    ],
)
def test_known_failures_are_one_line(arguments: list[str], message: str, run: Run) -> None:
    """A wrong address, file or folder is one line on standard error, nothing on standard output, and exit code 1."""
    result = run(*arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == (1 if "topics verify" not in " ".join(arguments) else 2)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["replay", "--rate", "fast"], "--rate"),
        (["replay", "--rate", "-1"], "--rate"),
        (["replay", "--rate", "nan"], "--rate"),
        (["replay", "--rate", "10", "--speed", "2"], "--rate or --speed"),
        (["replay", "--speed", "0"], "--speed"),
        (["replay", "log.csv", "--generate", "5"], "--generate"),
        (["broker", "--port", "70000"], "--port"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], culprit: str, run: Run) -> None:
    """An invalid option is rejected by name before anything is done, with exit code 2."""
    result = run(*arguments)
    assert result.returncode == 2
    assert culprit in result.stderr


def test_taken_port_is_one_line(run: Run) -> None:
    """A broker on a port in use is rejected with the port's number."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("broker", "--port", str(port))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: port {port} is taken")


def test_wrong_setting_is_named(tmp_path: Path, run: Run) -> None:
    """A setting of the wrong type in a file is reported with its key, without a traceback."""
    (tmp_path / "settings.toml").write_text("[topics]\npartitions = 'many'\n")
    result = run("topics", "verify", "--config", "settings.toml")
    assert result.returncode == 1
    assert "topics.partitions" in result.stderr


def test_help_lists_the_commands_of_every_package(run: Run) -> None:
    """The help of the script names the commands of infra, streams and encoder."""
    result = run("--help")
    assert result.returncode == 0
    for command in ("broker", "topics", "replay", "worker", "tail"):
        assert command in result.stdout


def test_a_release_on_the_command_line_comes_first(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`worker --release` is used over `encoder.release_dir` of the settings, and changes no other setting."""
    given: list[Settings] = []
    monkeypatch.setattr(infra.commands.worker, "verify_topics", lambda _, for_worker: Findings())
    monkeypatch.setattr(infra.commands.worker, "run_worker", lambda settings, warnings: given.append(settings) or 7)
    (tmp_path / "settings.toml").write_text("[encoder]\nrelease_dir = 'a'\nruntime = 'full'\n")
    assert run("worker", "--config", "settings.toml").returncode == 7
    assert run("worker", "--config", "settings.toml", "--release", "b").returncode == 7
    assert [one.encoder.release_dir for one in given] == [Path("a"), Path("b")]
    assert given[0].encoder.runtime == given[1].encoder.runtime == "full"


def test_topics_of_a_release_on_the_command_line(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With definitions, `topics create` and `topics verify` include the embeddings if `--release` names a release."""
    created: list[list[str]] = []

    def ensure(settings: Settings, **_: Any) -> list[str]:
        created.append(settings.output_topics)
        return []

    monkeypatch.setattr(infra.commands.topics, "ensure_topics", ensure)
    monkeypatch.setattr(infra.commands.topics, "verify_topics", lambda _: Findings())
    (tmp_path / "features.toml").touch()
    (tmp_path / "settings.toml").write_text("[features]\ndefinitions_file = 'features.toml'\n")
    assert run("topics", "create", "--config", "settings.toml").returncode == 0
    with_release = run("topics", "create", "--config", "settings.toml", "--release", "a")
    assert created == [["user-features"], ["user-embeddings", "user-features"]]
    assert "present  user-embeddings" in with_release.stdout
    assert "user-embeddings" in run("topics", "verify", "--config", "settings.toml", "--release", "a").stdout


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that calls the script in an empty folder without settings in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in os.environ:
        if name.startswith(("STREAMFORMER_", "KAFKA_")):
            monkeypatch.delenv(name)

    def called(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["streamformer", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Result(int(ended.value.code or 0), printed.out, printed.err)

    return called
