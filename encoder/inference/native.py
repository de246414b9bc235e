"""The fast kernel: `kernel.cpp` built for one geometry, over a slab in huge pages.

The slab is one block of memory; `attention.h` has the map of what a block holds:

    slab    | slot 0                                       | slot 1                                       | ...
    slot    | block of layer 0 | block of layer 1 | ...    | block of layer 0 | block of layer 1 | ...    |

The address of layer l in slot s is blocks[l] + s * slot_bytes. Event times are kept apart, in one ring per slot that is
as wide as the widest window.

Shapes: S users of a plan, T tokens, L layers, H heads, K head size, W window; others as in `kernel`.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from encoder.arrays import F32, I64, U8
from encoder.attention import rope_periods
from encoder.compiled import Kernel, load_library
from encoder.inference.kernel import Geometry
from encoder.inference.plan import Plan
from encoder.model import TimeEncoding

FOLDER = Path(__file__).parent
KERNEL = Kernel(
    FOLDER / "kernel.cpp",
    (FOLDER / "vectors.h", FOLDER / "attention.h"),
    "the encoder runs on plain torch, several times slower",
)
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_SIGNATURES = {
    "attend": [_POINTER] * 3 + [_LONG] + [_INT] * 3 + [_POINTER, _LONG] + [_POINTER] * 8,
    "time_gaps": [_POINTER, _INT, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _POINTER, _POINTER],
    "add_norm": [_POINTER] * 5 + [ctypes.c_float, _LONG, _INT],
    "gelu": [_POINTER, _LONG],
    "encode_times": [_POINTER] * 3 + [_INT, ctypes.c_double, _POINTER, _LONG, _LONG],
    "rope": [_POINTER] * 3 + [_LONG],
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
        """Return the library for a geometry, built if it is not cached; None if it cannot be built."""
        definitions: dict[str, int | str] = {
            "HEAD_DIM": geometry.head_dim,
            "SHARE": geometry.heads // geometry.kv_heads,
            "WINDOW_MAX": max(geometry.windows),
            "ROW": _NAMES[geometry.rows],
            "CELL": _NAMES[geometry.cells],
        }
        library = load_library(KERNEL, definitions)
        return cls(geometry, library) if library else None

    def block_bytes(self) -> list[int]:
        """Return the bytes of one slot in each layer, [L]."""
        return [self.functions.block_bytes(self.geometry.kv_heads, window) for window in self.geometry.windows]

    def bytes_per_slot(self) -> int:
        """Return the memory of one user, in bytes."""
        return sum(self.block_bytes()) + 8 * max(self.geometry.windows)

    def places(self, window: int) -> int:
        """Return the number of places in a ring of this window: the window, padded to whole vectors."""
        lanes: int = self.functions.lanes()
        return -(-window // lanes) * lanes


class NativeKernel:
    """The fast `Kernel`. `slopes` [L, H] are the non-negative slopes of the event-time bias, or None without one."""

    def __init__(self, library: Library, slots: int, slopes: Tensor | None) -> None:
        self._geometry = library.geometry
        self._library = library
        self._functions = library.functions
        self._slopes = slopes
        sizes = library.block_bytes()
        self._slot_bytes = sum(sizes)
        self.slab = _huge_pages(slots * self._slot_bytes)
        start = self.slab.ctypes.data
        self._blocks = [start + sum(sizes[:layer]) for layer in range(len(sizes))]  # [L] addresses in slot 0
        self._times_ms = np.zeros((slots if slopes is not None else 0, max(self._geometry.windows)), np.int64)
        self._kinds = np.unique(np.array(self._geometry.windows, np.int32))  # the distinct windows, ascending
        self._time_gaps = [np.zeros((0, library.places(int(window))), np.float32) for window in self._kinds]  # [T, W]
        self._periods = rope_periods(self._geometry.head_dim)  # [K / 2]
        self._rope = np.zeros((0, self._geometry.head_dim), np.float32)  # [T, K] cosines, then sines

    def begin(self, plan: Plan, times_ms: I64) -> None:
        """Begin a pass; see `Kernel.begin`."""
        self._plan = plan
        self._compute_rope(plan.positions)
        if self._slopes is not None:
            self._compute_time_gaps(plan, np.ascontiguousarray(times_ms))

    def attend(self, layer: int, qkv: Tensor, out: Tensor) -> None:
        """Attend in one layer; see `Kernel.attend`."""
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
            self._rope.ctypes.data,
            None if self._slopes is None else self._time_gaps_of(g.windows[layer]).ctypes.data,
        )

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm, out: Tensor) -> None:
        """Add and normalise; see `Kernel.add_norm`."""
        rows, dim = x.shape
        added = None if y is None else y.data_ptr()
        self._functions.add_norm(
            x.data_ptr(), added, norm.weight.data_ptr(), norm.bias.data_ptr(), out.data_ptr(), norm.eps, rows, dim
        )

    def gelu(self, x: Tensor) -> None:
        """Apply GELU in place; see `Kernel.gelu`."""
        self._functions.gelu(x.data_ptr(), x.numel())

    def encode_times(self, encoding: TimeEncoding, time_ms: Tensor, out: Tensor) -> None:
        """Encode times; see `Kernel.encode_times`."""
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
        """Normalise to length one; see `Kernel.to_length_one`."""
        self._functions.to_length_one(x.data_ptr(), out.data_ptr(), *x.shape)

    def scribble(self) -> None:
        """Fill the slab and the results of the last pass with NaN."""
        self.slab.view(np.uint8).fill(0xFF)
        for rows in (*self._time_gaps, self._rope):
            rows.fill(np.nan)

    def _time_gaps_of(self, window: int) -> F32:
        return self._time_gaps[int(np.searchsorted(self._kinds, window))]

    def _compute_rope(self, positions: I64) -> None:
        """Compute the rotary cosines and sines of positions [T], which all heads and layers share."""
        if len(self._rope) < len(positions):
            self._rope = np.zeros((len(positions), self._geometry.head_dim), np.float32)
        self._functions.rope(positions.ctypes.data, self._periods.ctypes.data, self._rope.ctypes.data, len(positions))

    def _compute_time_gaps(self, plan: Plan, times_ms: I64) -> None:
        """Store the event times [T], and compute the time gaps that all heads and layers of a window share."""
        if len(self._time_gaps[0]) < len(times_ms):
            self._time_gaps = [np.zeros((len(times_ms), gaps.shape[1]), np.float32) for gaps in self._time_gaps]
        pointers = np.array([gaps.ctypes.data for gaps in self._time_gaps], np.uintp)
        self._functions.time_gaps(
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


def _huge_pages(size: int) -> U8:
    """Reserve `size` zero bytes; memory is used as it is touched, in huge pages where the system has them."""
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
