"""The broker's jars are exactly the pinned ones, mended when damaged, and their absence is one clear line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jgo
import pytest
import requests

from infra.kafka import jars
from infra.kafka.jars import JarsUnavailable, kafka_jars


class Environment:
    """What jgo builds: the jars of one folder."""

    def __init__(self, folder: Path) -> None:
        self.all_jars = sorted(folder.glob("*.jar"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which two small jars are pinned, downloaded by writing them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "m2"))
    (tmp_path / "digests").write_text(f"{_sha(b'one')}  one.jar\n{_sha(b'two')}  two.jar\n")
    monkeypatch.setattr(jars, "DIGESTS", tmp_path / "digests")
    (tmp_path / "env" / "jars").mkdir(parents=True)
    (tmp_path / "m2").mkdir()
    return tmp_path / "env" / "jars"


def test_half_downloaded_jar_is_downloaded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jar cut short, in the environment and in the repository it is linked from, is replaced by a whole one."""
    repository = folder.parent.parent / "m2" / "one.jar"
    (folder / "one.jar").write_bytes(b"o")
    repository.write_bytes(b"o")

    def build(_: str) -> Environment:
        if not repository.exists():
            repository.write_bytes(b"one")
        (folder / "one.jar").write_bytes(repository.read_bytes())
        (folder / "two.jar").write_bytes(b"two")
        return Environment(folder)

    monkeypatch.setattr(jgo, "build", build)
    assert [jar.read_bytes() for jar in kafka_jars()] == [b"one", b"two"]


def test_other_bytes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jars that differ from their digests even when fresh are never run."""

    def build(_: str) -> Environment:
        (folder / "one.jar").write_bytes(b"evil")
        return Environment(folder)

    monkeypatch.setattr(jgo, "build", build)
    with pytest.raises(JarsUnavailable, match=r"differ from their digests: one\.jar"):
        kafka_jars()


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("Name or service\nnot known"),
        OSError(28, "No space left on device"),
        RuntimeError("404"),
    ],
)
def test_failed_download_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """No network, a full disk and a missing artifact are each one line that names the way out."""

    def build(_: str) -> Environment:
        raise error

    monkeypatch.setattr(jgo, "build", build)
    with pytest.raises(JarsUnavailable, match="KAFKA_BOOTSTRAP_SERVERS") as caught:
        kafka_jars()
    assert "\n" not in str(caught.value)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
