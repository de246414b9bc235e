"""The broker's jars from Maven Central through jgo, checked against a pinned list of digests.

jgo caches what it downloads but writes files in place, so an interrupted download looks like a finished one. Every
jar is therefore compared with `jars.sha256` before use; one that differs is deleted and downloaded once more.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jgo
import requests
from jgo.config import GlobalSettings

from infra.errors import InfraError
from infra.paths import cache_dir

ENDPOINT = "org.apache.kafka:kafka_2.13:4.1.2+org.slf4j:slf4j-simple:1.7.36"
"""Apache Kafka, and a logger that writes to standard error: without one the reason of a failed start is lost."""

DIGESTS = Path(__file__).with_name("jars.sha256")


class JarsUnavailable(InfraError):
    """The broker's jars could not be brought to this machine."""


def kafka_jars() -> list[Path]:
    """The classpath of the broker, downloaded when missing or damaged; raises `JarsUnavailable`."""
    with _one_at_a_time():
        jars = _build()
        if damaged := _damaged(jars):
            _forget(damaged)
            jars = _build()
            if damaged := _damaged(jars):
                raise JarsUnavailable(
                    "downloaded jars differ from their digests",
                    ", ".join(jar.name for jar in damaged),
                    "check what stands between this machine and Maven Central (a proxy?), then run it again",
                )
    return jars


def _build() -> list[Path]:
    try:
        return sorted(jgo.build(ENDPOINT).all_jars)
    except (requests.RequestException, RuntimeError, OSError, ValueError) as error:
        raise JarsUnavailable(
            "cannot download the broker's jars from Maven Central",
            str(error),
            "check the network and the free disk space and run it again, "
            "or set KAFKA_BOOTSTRAP_SERVERS to a broker that you have",
        ) from error


def _damaged(jars: list[Path]) -> list[Path]:
    lines = [line.split() for line in DIGESTS.read_text().splitlines()]
    pinned = {name: digest for digest, name in lines}
    return [jar for jar in jars if _digest(jar) != pinned.get(jar.name)]


def _digest(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget(jars: list[Path]) -> None:
    """Delete damaged jars from jgo's environment and from the repository cache that it links them from."""
    repository = Path(GlobalSettings.load().repo_cache)
    for jar in jars:
        jar.unlink(missing_ok=True)
        for copy in repository.glob(f"**/{jar.name}"):
            copy.unlink()
    (jars[0].parent.parent / "jgo.lock.toml").unlink(missing_ok=True)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two downloads into the same cache would read each other's half-written files."""
    with (cache_dir() / "jars.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
