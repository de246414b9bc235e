"""The broker's jars, downloaded from Maven Central by jgo and checked against pinned digests.

jgo caches downloads but writes files in place, so an interrupted download looks complete. Every jar is therefore
compared with `jars.sha256` before use, and a jar that differs or is missing is downloaded once more.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jgo
import requests
from jgo.config import GlobalSettings
from jgo.env import Environment

from infra.errors import InfraError
from infra.paths import cache_dir

ENDPOINT = "org.apache.kafka:kafka_2.13:4.1.2+org.slf4j:slf4j-simple:1.7.36"
"""Apache Kafka, and a logger to standard error, without which the reason of a failed start would be lost."""

DIGESTS = Path(__file__).with_name("jars.sha256")


class JarsUnavailable(InfraError):
    """The broker's jars could not be downloaded, or are not the pinned ones."""


def kafka_jars() -> list[Path]:
    """Return the classpath of the broker; download what is missing or damaged. Raises `JarsUnavailable`."""
    with _one_at_a_time():
        environment = _build()
        if wrong := _wrong(environment):
            _forget(environment, wrong)
            environment = _build()
            if wrong := _wrong(environment):
                raise JarsUnavailable(
                    "downloaded jars are not the pinned ones",
                    ", ".join(sorted(wrong)),
                    "check whether a proxy between this machine and Maven Central alters files, then run it again",
                )
    return sorted(environment.all_jars)


def _build() -> Environment:
    try:
        return jgo.build(ENDPOINT)
    except (requests.RequestException, RuntimeError, OSError, ValueError) as error:
        raise JarsUnavailable(
            "cannot download the broker's jars from Maven Central",
            str(error),
            "check the network and the free disk space, then run it again, "
            "or set KAFKA_BOOTSTRAP_SERVERS to an existing broker",
        ) from error


def _wrong(environment: Environment) -> set[str]:
    """Return the names of jars that are missing, superfluous or different from the pinned ones."""
    lines = [line.split() for line in DIGESTS.read_text().splitlines()]
    pinned = {(name, digest) for digest, name in lines}
    found = {(jar.name, _digest(jar)) for jar in environment.all_jars}
    return {name for name, _ in pinned ^ found}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget(environment: Environment, names: set[str]) -> None:
    """Delete jgo's environment, which jgo would not complete, and the jars in its repository that are wrong."""
    shutil.rmtree(environment.path)
    repository = Path(GlobalSettings.load().repo_cache)
    for name in names:
        for copy in repository.glob(f"**/{name}"):
            copy.unlink()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Lock the cache: two concurrent downloads would read each other's half-written files."""
    with (cache_dir() / "jars.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
