"""The constructor of the runtime through which streams/ embeds users, which starts from a release on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from encoder.hardware import CPU, gpu_precision, own_device
from encoder.inference.cuda import CudaForwardPass
from encoder.inference.forward import ForwardPass
from encoder.inference.full import FULL_USERS_MAX, FullStreamingRuntime, FullWindowRuntime
from encoder.inference.incremental import IncrementalRuntime
from encoder.inference.interface import EncoderRuntime
from encoder.inference.kernel import Geometry, Kernel, Precision
from encoder.inference.linear import prepare_linear
from encoder.inference.native import Library, NativeKernel
from encoder.inference.reference import TorchKernel
from encoder.inference.slots import SlotTable
from encoder.model import StreamingEncoder
from encoder.release import Release, load_release

Kind = Literal["incremental", "full"]
DType = Literal["auto", "fp32", "bf16"]


def load_runtime(
    release_dir: Path,
    *,
    kind: Kind = "incremental",
    cache_bytes_max: int,
    threads: int = 1,
    dtype: DType = "auto",
) -> EncoderRuntime:
    """Return the runtime of a release, on this process's CUDA device if there is one; sets torch's thread count.

    `cache_bytes_max` bounds the memory of the cache. On a CPU its address space is reserved at once and its memory is
    used as users come; on a GPU its memory is allocated at once. `dtype` is explained at `choose_precision`. Raises
    `ReleaseError` for a release that cannot be trusted, and `ValueError` for settings that do not fit it.
    """
    torch.set_num_threads(threads)
    release = load_release(release_dir)
    release.model.to(own_device())
    if isinstance(release.model, StreamingEncoder):
        make = make_incremental if kind == "incremental" else make_full
        precision = choose_precision(dtype, release.config.d_model, release.model.device)
        return make(release, cache_bytes_max=cache_bytes_max, precision=precision)
    if kind == "incremental":
        raise ValueError("a window encoder keeps nothing between actions: set the runtime's kind to full")
    return FullWindowRuntime(release)


def make_incremental(
    release: Release, *, cache_bytes_max: int, precision: Precision, native: bool = True
) -> IncrementalRuntime:
    """Return the incremental runtime of a streaming release, on the device that its model is on."""
    kernel, slots = make_kernel(release, precision, cache_bytes_max, native=native)
    forward = make_forward_pass(release, kernel, precision)
    if isinstance(forward, CudaForwardPass):
        forward.capture()
    return IncrementalRuntime(release.version, release.config, forward, SlotTable(slots))


def make_full(
    release: Release, *, cache_bytes_max: int, precision: Precision, native: bool = True
) -> FullStreamingRuntime:
    """Return the full runtime of a streaming release; it needs slots only while a part of a batch runs."""
    kernel, slots = make_kernel(release, precision, cache_bytes_max, slots_max=FULL_USERS_MAX, native=native)
    return FullStreamingRuntime(release, make_forward_pass(release, kernel, precision), slots)


def make_forward_pass(release: Release, kernel: Kernel, precision: Precision) -> ForwardPass:
    """Return the forward pass for the device that the model and the kernel's slabs are on."""
    if isinstance(kernel, TorchKernel) and kernel.device.type == "cuda":
        return CudaForwardPass(release, kernel, precision.products)
    return ForwardPass(release, kernel, precision.products)


def make_kernel(
    release: Release, precision: Precision, cache_bytes_max: int, *, slots_max: int | None = None, native: bool = True
) -> tuple[Kernel, int]:
    """Return a kernel and its number of slots for users.

    The native kernel serves on a CPU. The reference serves if `native` is false, if the native kernel cannot be built,
    and on a GPU, where it has one more slot, for padding.
    """
    geometry, device = Geometry.of(release.config, precision), release.model.device
    library = _library(release, geometry, native=native)
    per_user = library.bytes_per_slot() if library else TorchKernel.bytes_per_slot(geometry)
    spare = int(device.type == "cuda")
    slots = cache_bytes_max // per_user - spare
    if slots < 1:
        least = (1 + spare) * per_user
        raise ValueError(f"cache is too small for one user: {cache_bytes_max} bytes; set at least {least}")
    slots = min(slots, slots_max or slots)
    if library:
        return NativeKernel(library, slots, slopes(release)), slots
    return TorchKernel(geometry, slots + spare, slopes(release), device), slots


def kernel_bytes(release: Release, precision: Precision, *, native: bool = True) -> int:
    """Return the cache bytes of one user."""
    geometry = Geometry.of(release.config, precision)
    library = _library(release, geometry, native=native)
    return library.bytes_per_slot() if library else TorchKernel.bytes_per_slot(geometry)


def _library(release: Release, geometry: Geometry, *, native: bool) -> Library | None:
    return Library.load(geometry) if native and release.model.device == CPU else None


def slopes(release: Release) -> torch.Tensor | None:
    """Return the non-negative slopes [L, H] of the event-time bias in float32; None when the encoder has none."""
    if not release.config.time_bias:
        return None
    learned: list[torch.Tensor] = [block.slope for block in release.model.layers if block.slope is not None]
    return F.softplus(torch.stack(learned)).detach()


def choose_precision(dtype: DType, d_model: int, device: torch.device = CPU) -> Precision:
    """Return the precision that a setting means on this machine; on a CPU this times products for about 10 ms.

    `fp32` is float32 throughout. `bf16` allows bfloat16: the cache takes half the memory, and products use bfloat16
    where the processor multiplies faster in it, or where the GPU supports it. `auto` is `bf16` on such machines and
    `fp32` on all others.
    """
    if dtype == "fp32":
        return Precision()
    if device.type == "cuda":
        faster = gpu_precision() == torch.bfloat16
    else:
        faster = 1.2 * _product_s(d_model, torch.bfloat16) < _product_s(d_model, torch.float32)
    if faster:
        return Precision(torch.bfloat16, torch.bfloat16)
    return Precision(cache=torch.bfloat16 if dtype == "bf16" else torch.float32)


@torch.inference_mode()
def _product_s(d_model: int, dtype: torch.dtype) -> float:
    """Return the best of three timings of a feed-forward layer's first product with 256 rows."""
    linear = nn.Linear(d_model, 4 * d_model)
    product = prepare_linear(linear, dtype)
    rows, out = torch.zeros(256, d_model, dtype=dtype), torch.empty(256, 4 * d_model, dtype=dtype)
    product(rows, out)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(rows, out)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
