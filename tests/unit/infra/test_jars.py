"""The broker's jars are exactly the pinned ones and repaired when damaged; their absence is one clear line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jgo
import pytest
import requests

from infra.kafka import jars
from infra.kafka.jars import JarsUnavailable, kafka_jars

CONTENTS = {"one.jar": b"one", "two.jar": b"two"}


class Jgo:
    """A fake that behaves as jgo does: it trusts its folders, and downloads only what the repository lacks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "env"
        self.repository = folder / "m2"
        self.repository.mkdir()
        self.served = dict(CONTENTS)

    def build(self, _: str) -> Jgo:
        """Create the environment, unless it exists, with links into the repository."""
        if not self.path.exists():
            self.path.mkdir()
            for name, content in self.served.items():
                if not (self.repository / name).exists():
                    (self.repository / name).write_bytes(content)
                os.link(self.repository / name, self.path / name)
        return self

    @property
    def all_jars(self) -> list[Path]:
        """Jars in the environment."""
        return list(self.path.glob("*.jar"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jgo:
    """Return a fake with two small pinned jars, of which none is downloaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "m2"))
    digests = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in CONTENTS.items()]
    (tmp_path / "digests").write_text("\n".join(digests) + "\n")
    monkeypatch.setattr(jars, "DIGESTS", tmp_path / "digests")
    made = Jgo(tmp_path)
    monkeypatch.setattr(jgo, "build", made.build)
    return made


def test_fresh_jars_are_the_pinned_ones(fake: Jgo) -> None:
    """The classpath is exactly the pinned jars."""
    assert _contents() == CONTENTS


def test_half_a_download_is_downloaded_again(fake: Jgo) -> None:
    """A jar in the repository that an interrupted download cut short is replaced by a whole one."""
    (fake.repository / "one.jar").write_bytes(b"o")
    assert _contents() == CONTENTS


def test_damage_in_the_environment_is_repaired(fake: Jgo) -> None:
    """A jar truncated after a good download is replaced in the environment and in the repository it is linked from."""
    kafka_jars()
    (fake.path / "two.jar").write_bytes(b"")
    assert _contents() == CONTENTS


def test_missing_jar_is_fetched(fake: Jgo) -> None:
    """A jar deleted from the environment is downloaded again."""
    kafka_jars()
    (fake.path / "one.jar").unlink()
    assert _contents() == CONTENTS


@pytest.mark.parametrize("served", [{**CONTENTS, "one.jar": b"evil"}, {"one.jar": b"one"}, {**CONTENTS, "x.jar": b"x"}])
def test_other_jars_are_rejected(fake: Jgo, served: dict[str, bytes]) -> None:
    """Wrong content, a missing jar and a superfluous one are never run, even fresh from the network."""
    fake.served = served
    with pytest.raises(JarsUnavailable, match="not the pinned ones"):
        kafka_jars()


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("Name or service\nnot known"),
        OSError(28, "No space left on device"),
        RuntimeError("404"),
    ],
)
def test_failed_download_is_one_clear_line(fake: Jgo, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """No network, a full disk and a missing artifact are each one line that names the remedy."""

    def build(_: str) -> Jgo:
        raise error

    monkeypatch.setattr(jgo, "build", build)
    with pytest.raises(JarsUnavailable, match="KAFKA_BOOTSTRAP_SERVERS") as caught:
        kafka_jars()
    assert "\n" not in str(caught.value)


def _contents() -> dict[str, bytes]:
    return {jar.name: jar.read_bytes() for jar in kafka_jars()}
