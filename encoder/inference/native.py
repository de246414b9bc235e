"""The kernel in C++ (`kernel.cpp`), over slabs in huge pages. Shapes as in `kernel`."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from encoder.attention import rope_periods
from encoder.inference.build import load_library
from encoder.inference.kernel import Geometry
from encoder.inference.plan import Int64s, Plan
from encoder.model import TimeEncoding

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_SIGNATURES = {
    "attend": [_POINTER] * 3 + [_LONG] + [_INT] * 3 + [_POINTER, _LONG] + [_POINTER] * 8,
    "lags": [_POINTER, _INT, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _POINTER, _POINTER],
    "add_norm": [_POINTER] * 5 + [ctypes.c_float, _LONG, _INT],
    "gelu": [_POINTER, _LONG],
    "encode_times": [_POINTER] * 3 + [_INT, ctypes.c_double, _POINTER, _LONG, _LONG],
    "rotations": [_POINTER] * 3 + [_LONG],
    "to_length_one": [_POINTER, _POINTER, _LONG, _INT],
}


class Library:
    """`kernel.cpp` built for one geometry."""

    def __init__(self, geometry: Geometry, library: ctypes.CDLL) -> None:
        self.geometry = geometry
        self.functions = library
        library.block_bytes.argtypes, library.block_bytes.restype = [_INT, _INT], _LONG
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes, getattr(library, name).restype = arguments, None

    @classmethod
    def load(cls, geometry: Geometry) -> Library | None:
        """Build or find it; None where there is no compiler."""
        definitions: dict[str, int | str] = {
            "HEAD_DIM": geometry.head_dim,
            "SHARE": geometry.heads // geometry.kv_heads,
            "WINDOW_MAX": max(geometry.windows),
            "ROW": _NAMES[geometry.rows],
            "CELL": _NAMES[geometry.cells],
        }
        library = load_library(definitions)
        return cls(geometry, library) if library else None

    def block_bytes(self) -> list[int]:
        """Bytes of one slot in each layer."""
        return [self.functions.block_bytes(self.geometry.kv_heads, window) for window in self.geometry.windows]

    def bytes_per_slot(self) -> int:
        """Memory of one user, in bytes."""
        return sum(self.block_bytes()) + 8 * max(self.geometry.windows)

    def places(self, window: int) -> int:
        """A window, padded to whole vectors."""
        lanes: int = self.functions.lanes()
        return -(-window // lanes) * lanes


class NativeKernel:
    """The fast `Kernel`. `slopes` [L, H] are the non-negative slopes of the event-time bias, None without."""

    def __init__(self, library: Library, slots: int, slopes: Tensor | None) -> None:
        self._geometry = library.geometry
        self._library = library
        self._functions = library.functions
        self._slopes = slopes
        sizes = library.block_bytes()
        self._slot_bytes = sum(sizes)
        self.slab = _huge_pages(slots * self._slot_bytes)
        start = self.slab.ctypes.data
        self._blocks = [start + sum(sizes[:layer]) for layer in range(len(sizes))]
        self._times_ms = np.zeros((slots if slopes is not None else 0, max(self._geometry.windows)), np.int64)
        self._kinds = np.unique(np.array(self._geometry.windows, np.int32))
        self._lags = [np.zeros((0, library.places(int(window))), np.float32) for window in self._kinds]
        self._periods = rope_periods(self._geometry.head_dim)
        self._rotations = np.zeros((0, self._geometry.head_dim), np.float32)

    def begin(self, plan: Plan, times_ms: Int64s) -> None:
        self._plan = plan
        self._find_rotations(plan.positions)
        if self._slopes is not None:
            self._find_lags(plan, np.ascontiguousarray(times_ms))

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        g, plan = self._geometry, self._plan
        rows = plan.layers[layer]
        assert qkv.is_contiguous()
        assert out.is_contiguous()
        self._functions.attend(
            qkv.data_ptr(),
            out.data_ptr(),
            self._blocks[layer],
            self._slot_bytes,
            g.heads,
            g.kv_heads,
            g.windows[layer],
            None if self._slopes is None else self._slopes[layer].data_ptr(),
            len(plan.slots),
            plan.slots.ctypes.data,
            rows.starts.ctypes.data,
            rows.tokens.ctypes.data,
            rows.silent.ctypes.data,
            plan.starts.ctypes.data,
            plan.offsets.ctypes.data,
            self._rotations.ctypes.data,
            None if self._slopes is None else self._lags_of(g.windows[layer]).ctypes.data,
        )

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        rows, dim = x.shape
        added = None if y is None else y.data_ptr()
        self._functions.add_norm(
            x.data_ptr(), added, norm.weight.data_ptr(), norm.bias.data_ptr(), out.data_ptr(), norm.eps, rows, dim
        )

    def gelu(self, x: Tensor) -> None:
        self._functions.gelu(x.data_ptr(), x.numel())

    def encode_times(self, encoding: TimeEncoding, time_ms: Tensor, out: Tensor) -> None:
        periods, phases = encoding.periods_ms, encoding.phases
        assert time_ms.is_contiguous()
        self._functions.encode_times(
            time_ms.data_ptr(),
            periods.data_ptr(),
            phases.data_ptr(),
            len(periods),
            encoding.log_origin,
            out.data_ptr(),
            out.stride(0),
            len(out),
        )

    def to_length_one(self, x: Tensor, out: Tensor) -> None:
        self._functions.to_length_one(x.data_ptr(), out.data_ptr(), *x.shape)

    def scribble(self) -> None:
        """Fill the slabs and what is left of the last step with NaN."""
        self.slab.view(np.uint8).fill(0xFF)
        for rows in (*self._lags, self._rotations):
            rows.fill(np.nan)

    def _lags_of(self, window: int) -> npt.NDArray[Any]:
        return self._lags[int(np.searchsorted(self._kinds, window))]

    def _find_rotations(self, positions: Int64s) -> None:
        """Take the cosines and sines that all heads and layers share."""
        if len(self._rotations) < len(positions):
            self._rotations = np.zeros((len(positions), self._geometry.head_dim), np.float32)
        self._functions.rotations(
            positions.ctypes.data, self._periods.ctypes.data, self._rotations.ctypes.data, len(positions)
        )

    def _find_lags(self, plan: Plan, times_ms: Int64s) -> None:
        """Store the event times, and take the logarithms that all heads and layers share."""
        if len(self._lags[0]) < len(times_ms):
            self._lags = [np.zeros((len(times_ms), lags.shape[1]), np.float32) for lags in self._lags]
        pointers = np.array([lags.ctypes.data for lags in self._lags], np.uintp)
        self._functions.lags(
            self._times_ms.ctypes.data,
            self._times_ms.shape[1],
            plan.slots.ctypes.data,
            plan.starts.ctypes.data,
            len(plan.slots),
            plan.offsets.ctypes.data,
            times_ms.ctypes.data,
            len(self._kinds),
            self._kinds.ctypes.data,
            pointers.ctypes.data,
        )


def _huge_pages(size: int) -> npt.NDArray[Any]:
    """`size` zero bytes: address space at once, memory as it is touched, in huge pages where the system has them."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
