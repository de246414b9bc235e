"""The C++ kernel equals the reference in torch, and is built once per machine or replaced by the reference."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from encoder.compiled import distrust, find_compiler
from encoder.inference.kernel import Geometry, Kernel, Precision
from encoder.inference.native import Library, NativeKernel
from encoder.inference.plan import plan_tokens, reaches
from encoder.inference.reference import TorchKernel
from encoder.inference.runtime import make_incremental, make_kernel
from encoder.model import TimeEncoding
from tests.unit.inference.histories import random_release
from tests.unit.inference.test_runtimes import SMALL

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
GEOMETRIES = [(8, 2, 32, (64, 64)), (3, 1, 10, (5, 8, 33)), (4, 4, 6, (1, 16)), (16, 1, 4, (7,)), (2, 1, 66, (12, 3))]


@needs_compiler
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "windows"), GEOMETRIES)
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, windows: tuple[int, ...], cells: torch.dtype, biased: bool
) -> None:
    """Attention equals the reference for any head size, window, number of key heads and number of tokens.

    Slabs begin full of NaN, and positions begin at 0 or around a billion.
    """
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    geometry = Geometry(heads, kv_heads, head_dim, windows, torch.float32, cells)
    slopes = torch.rand(len(windows), heads, generator=generator) if biased else None
    library = Library.load(geometry)
    assert library is not None
    native, reference = NativeKernel(library, 6, slopes), TorchKernel(geometry, 6, slopes)
    native.scribble()
    kernels: list[Kernel] = [native, reference]
    firsts = rng.integers(0, 10**9, 6) * rng.integers(0, 2, 6)
    counts = firsts.copy()
    now_ms = np.zeros(6, np.int64)
    exact = cells is torch.float32
    differences = []
    for _ in range(12):
        some = rng.permutation(6)[: rng.integers(1, 7)]
        fresh = np.minimum(rng.choice([1, 1, 2, 9, 70], len(some)), reaches(windows)[0])
        counts[some] += fresh
        plan = plan_tokens(some, counts[some], fresh, firsts[some], windows)
        times_ms = np.concatenate(
            [now_ms[s] + np.cumsum(rng.integers(0, 10**7, f)) for s, f in zip(some, fresh, strict=True)]
        )
        now_ms[some] = times_ms[plan.starts[1:] - 1]
        for layer, rows in enumerate(plan.layers):
            qkv = torch.randn(int(rows.starts[-1]), (heads + 2 * kv_heads) * head_dim, generator=generator)
            outputs = [torch.full((len(qkv) - int(rows.silent.sum()), heads * head_dim), torch.nan) for _ in range(2)]
            for kernel, out in zip(kernels, outputs, strict=True):
                if layer == 0:
                    kernel.begin(plan, times_ms)
                kernel.attend(layer, qkv, out)
            torch.testing.assert_close(*outputs, rtol=0, atol=2e-5 if exact else 1e-2)
            differences.append((outputs[0] - outputs[1]).abs().flatten())
    # A key halfway between two bfloat16 may round either way, so a few outputs differ, and the mean hardly does.
    assert torch.cat(differences).mean() <= (1e-6 if exact else 2e-5)


@needs_compiler
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_norms_and_gelu_equal_the_reference(rows: torch.dtype) -> None:
    """Sums, LayerNorm and GELU agree for widths that do not fill whole vectors, and for large values."""
    kernels = kernels_of(rows)
    generator = torch.Generator().manual_seed(3)
    norm = nn.LayerNorm(53)
    nn.init.normal_(norm.weight, generator=generator)
    x, y = 30 * torch.randn(9, 53, generator=generator), torch.randn(9, 53, generator=generator).to(rows)
    wide = torch.cat([torch.linspace(-200, 200, 500), torch.linspace(-6, 6, 501)]).to(rows)
    results = []
    with torch.inference_mode():
        for kernel in kernels:
            mine, out, curve = x.clone(), torch.empty(9, 53, dtype=rows), wide.clone()
            kernel.add_norm(mine, y, norm, out)
            kernel.gelu(curve)
            results.append((mine, out.float(), curve.float()))
    tolerance = 1e-5 if rows is torch.float32 else 2e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("periods", [1, 12, 16, 32, 45])
def test_time_encodings_equal_the_reference(rows: torch.dtype, periods: int) -> None:
    """Encodings agree for any number of periods and any phase, from before 1970 to the year 5000.

    Columns to the left and right of the encoding stay as they were.
    """
    kernels = kernels_of(rows)
    generator = torch.Generator().manual_seed(periods)
    lengths_ms = 1_000 * torch.logspace(0, 7.5, periods, dtype=torch.float64)
    encoding = TimeEncoding(tuple(lengths_ms.tolist()), log_origin=3.5)
    nn.init.normal_(encoding.phases, std=4, generator=generator)
    spread = torch.rand(300, dtype=torch.float64, generator=generator)
    times_ms = torch.cat([torch.tensor([-7, 0, 1, 999, 1_000, 10**14]), torch.exp(32 * spread).long()])
    results = []
    with torch.inference_mode():
        for kernel in kernels:
            wide = torch.full((len(times_ms), 3 + encoding.width + 2), torch.nan, dtype=rows)
            kernel.encode_times(encoding, times_ms, wide[:, 3:-2])
            assert wide[:, :3].isnan().all()
            assert wide[:, -2:].isnan().all()
            results.append(wide[:, 3:-2])
    exact = rows is torch.float32
    torch.testing.assert_close(*results, rtol=0 if exact else 1e-2, atol=5e-6 if exact else 1e-2)


@needs_compiler
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_length_one_equals_the_reference(rows: torch.dtype) -> None:
    """Lengths agree for odd widths, huge, tiny and zero rows; a row with a NaN or an infinity stays not finite."""
    x = torch.randn(7, 53, generator=torch.Generator().manual_seed(1)).to(rows)
    x[1] *= 1e15
    x[2] *= 1e-15
    x[3] = 0
    x[4, 50] = torch.nan
    x[5, 2] = torch.inf
    results = []
    for kernel in kernels_of(rows):
        out = torch.full((7, 53), -5.0)
        kernel.to_length_one(x, out)
        results.append(out)
    ours, theirs = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert ours[4].isnan().all()
    assert ours[5].isnan().any()


def kernels_of(rows: torch.dtype) -> list[Kernel]:
    """Return both kernels with one slot, for operations that do not depend on slots."""
    geometry = Geometry(2, 1, 6, (4,), rows, torch.float32)
    library = Library.load(geometry)
    assert library is not None
    return [NativeKernel(library, 1, None), TorchKernel(geometry, 1, None)]


@needs_compiler
def test_built_once_into_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A geometry is compiled into `$XDG_CACHE_HOME` once and found again; another one gets its own file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "streamformer" / "kernels"
    one, other = (Geometry(2, 1, d, (4,), torch.float32, torch.float32) for d in (6, 8))
    assert Library.load(one)
    (built,) = folder.iterdir()
    os.utime(built, (1, 1))
    assert Library.load(one)
    assert built.stat().st_mtime == 1
    assert Library.load(other)
    assert len(list(folder.iterdir())) == 2


@needs_compiler
@pytest.mark.parametrize("shared", ["file", "folder"])
def test_code_that_others_may_write_is_not_loaded(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cached library or folder that other users may write is not loaded; the kernel is compiled again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "streamformer" / "kernels"
    geometry = Geometry(2, 1, 6, (4,), torch.float32, torch.float32)
    assert Library.load(geometry)
    (built,) = folder.iterdir()
    assert built.stat().st_mode & 0o077 == 0
    built.unlink()  # the loaded library stays mapped
    built.write_bytes(b"code of another user")
    (built if shared == "file" else folder).chmod(0o777)
    with caplog.at_level(logging.WARNING):
        library = Library.load(geometry)
    assert library is not None
    assert library.bytes_per_slot() > 0
    assert "can be written by other users (mode 777)" in caplog.text
    assert (built.read_bytes() == b"code of another user") is (shared == "folder")


def test_code_of_another_owner_is_distrusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of this user is trusted, one of another user is not, and a link is not."""
    file, link = tmp_path / "kernel.so", tmp_path / "link.so"
    file.touch(0o700)
    link.symlink_to(file)
    assert distrust(file) is None
    assert distrust(link) is not None
    os.chown(file, 1234, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert str(distrust(file)).startswith("belongs to user")


@needs_compiler
def test_a_container_without_a_home_compiles_into_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a home, or with a cache folder that cannot be made, each start compiles, and no file is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "streamformer").write_text("a file where a folder should be")
    geometry = Geometry(2, 1, 6, (4,), torch.float32, torch.float32)
    for home in ("none", "unusable"):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", "" if home == "none" else str(tmp_path))
            if home == "none":
                patch.setattr(Path, "home", _no_home)
            assert Library.load(geometry)
        assert "the kernel is compiled at each start" in caplog.text
    assert not list((tmp_path / "tmp").iterdir())


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("fault", ["no compiler", "broken compiler"])
def test_without_a_library_the_reference_serves(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the library cannot be built, the runtime logs one line and runs on plain torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if fault == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", "false")
    release = random_release(SMALL, 1)
    with caplog.at_level(logging.WARNING):
        kernel, _ = make_kernel(release, Precision(), 1 << 20)
    assert isinstance(kernel, TorchKernel)
    assert len(caplog.records) == 1
    assert "runs on plain torch" in caplog.text
    assert make_incremental(release, cache_bytes_max=1 << 20, precision=Precision()).embedding_dim == 16
