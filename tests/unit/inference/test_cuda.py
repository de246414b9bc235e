"""The CUDA path: padded passes equal ordinary ones, and every tensor is on the right device.

Devices are checked with simulated tensors, on any machine. Values are compared with the CPU's where there is a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encoder.actions.columns import SequenceBatch
from encoder.features import Features
from encoder.hardware import CPU
from encoder.inference import cuda, full, load_runtime
from encoder.inference import runtime as runtime_module
from encoder.inference.cuda import COLUMNS, CudaForwardPass, SingleTokenPass
from encoder.inference.forward import ForwardPass
from encoder.inference.incremental import IncrementalRuntime
from encoder.inference.kernel import Geometry, Precision
from encoder.inference.plan import plan_tokens
from encoder.inference.reference import TorchKernel, _Block
from encoder.inference.runtime import choose_precision, kernel_bytes, make_full, make_incremental, make_kernel, slopes
from encoder.inference.slots import SlotTable
from encoder.model import EncoderConfig
from encoder.release import Release
from tests.unit.inference.histories import forward, random_release, sequences
from tests.unit.inference.test_runtimes import SHAPES, SMALL, WINDOW, disturb, user

CUDA = torch.device("cuda", 0)
HALF = Precision(torch.bfloat16, torch.bfloat16)
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Placed(TorchDispatchMode):
    """Fails on an operation that mixes devices, scalars too, and on a copy to the GPU that the host would wait for."""

    def __init__(self, devices: set[torch.device]) -> None:
        super().__init__()
        self.devices = devices
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {each.device for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)}
        assert devices <= self.devices, f"{func} on {devices}"
        if len(devices) > 1:
            assert func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy), f"{func} on {devices}"
            assert result.device == CUDA
            assert kwargs["non_blocking"]
        self.operations += 1
        return result


class Column:
    """A column of features on the host, without a tensor, because a new tensor would be a simulated one."""

    def __init__(self, values: np.ndarray) -> None:
        self.numpy = lambda: values


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Simulate a CUDA device whose tensors have shapes but no values; yield the tensors copied from it."""
    copied: list[Tensor] = []

    def copy_to_host(rows: Tensor) -> np.ndarray:
        copied.append(rows)
        return np.zeros(rows.shape, np.float32)

    def features(*args: Any) -> Features:
        with unset_fake_temporarily():
            made = of_pass(*args)
            return Features(*(Column(getattr(made, name).numpy()) for name in COLUMNS))

    of_pass = ForwardPass._features
    monkeypatch.setattr(ForwardPass, "_features", features)
    monkeypatch.setattr(cuda, "to_host", copy_to_host)
    monkeypatch.setattr(full, "to_host", copy_to_host)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield copied


class Tape(TorchDispatchMode):
    """A stand-in for a CUDA graph: replays the recorded operations on the same tensors, with no Python in between."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        """Run the recorded operations again and copy their results over the recorded ones."""
        for func, args, kwargs, results in self.recorded:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record tapes on the CPU in place of CUDA graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def cuda_runtime(release: Release, precision: Precision, slots: int) -> tuple[IncrementalRuntime, CudaForwardPass]:
    """Return the incremental runtime that a GPU gets, without recorded passes, on the device of the model."""
    geometry = Geometry.of(release.config, precision)
    kernel = TorchKernel(geometry, slots + 1, slopes(release), release.model.device)
    forward_pass = CudaForwardPass(release, kernel, precision.products)
    return IncrementalRuntime(release.version, release.config, forward_pass, SlotTable(slots)), forward_pass


@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, "read-out"])
def test_passes_run_on_their_device(shape: str, precision: Precision, gpu: list[Tensor]) -> None:
    """Prefills and passes of one or several tokens mix no devices, and never make the host wait."""
    rng = np.random.default_rng(1)
    release = simulated(SHAPES.get(shape, replace(SMALL, read_out=True)))
    assert choose_precision("auto", 32, release.model.device) == HALF
    runtime, forward_pass = cuda_runtime(release, precision, 20)
    users = [user(rng, i, release.config, 1 + 3 * i) for i in range(12)]
    used = counted(forward_pass.singles[0])
    for choices in ([1], [1, 2, 5], [1]):
        with Placed({CPU, CUDA}):
            runtime.embed(sequences(users))
        for one in users:
            one.append(rng, int(rng.choice(choices)))
    assert used[:2] == [1, 12]
    assert 0 < used[2] < 12
    assert {(rows.device, rows.dtype) for rows in gpu} == {(CUDA, torch.float32)}
    assert {slab.dtype for slab in forward_pass.kernel.keys} == {precision.cache}
    assert (runtime.prefills, runtime.extensions, forward_pass.dtype) == (12, 24, str(precision.products)[6:])


@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("gpu")
def test_a_recorded_pass_stays_on_the_device(shape: str, precision: Precision) -> None:
    """A padded pass reads and creates tensors on the device only, and no shape depends on a value."""
    _, forward_pass = cuda_runtime(simulated(SHAPES[shape]), precision, 20)
    for single in forward_pass.singles:
        with torch.no_grad(), Placed({CUDA}) as placed:
            embeddings = single.compute()
        assert (embeddings.shape, embeddings.device) == ((single.size, SHAPES[shape].embedding_dim), CUDA)
        assert placed.operations > 100


@pytest.mark.parametrize("kind", ["incremental", "full", "window"])
def test_runtimes_load_onto_the_device(kind: str, gpu: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime has its model and slabs on this process's device; only the incremental one records its passes."""
    config = WINDOW if kind == "window" else SMALL
    recorded: list[CudaForwardPass] = []
    monkeypatch.setattr(CudaForwardPass, "capture", lambda each: recorded.append(each))
    monkeypatch.setattr(runtime_module, "own_device", lambda: CUDA)
    monkeypatch.setattr(runtime_module, "load_release", lambda folder: simulated(config, CPU))
    runtime = load_runtime(Path(), kind="incremental" if kind == "incremental" else "full", cache_bytes_max=1 << 20)
    rng = np.random.default_rng(2)
    batch = sequences([user(rng, i, config, 1 + 2 * i) for i in range(12)])
    with Placed({CPU, CUDA}):
        assert runtime.embed(batch).shape == (12, config.embedding_dim)
    assert {rows.device for rows in gpu} == {CUDA}
    assert runtime.dtype == ("float32" if kind == "window" else "bfloat16")
    assert len(recorded) == (kind == "incremental")


def test_embeddings_keep_the_order_of_the_batch() -> None:
    """Users with one new token and with several, in any order, get their own embeddings."""
    rng, release = np.random.default_rng(3), random_release(SMALL, 3)
    _, forward_pass = cuda_runtime(release, Precision(), 20)
    fresh = np.array([3, 1, 2, 1, 1, 9, 1])
    batch = sequences([user(rng, i, SMALL, count) for i, count in enumerate(fresh.tolist())])
    every = np.arange(len(fresh))
    ours = forward_pass.run(batch, every, every, fresh, 0 * fresh)
    assert np.abs(ours - forward(release, batch)).max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_nothing(shape: str) -> None:
    """A padded pass returns the embeddings of an ordinary one and writes the same, apart from the spare slot."""
    config, seed = SHAPES[shape], int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng, release = np.random.default_rng(seed), random_release(SHAPES[shape], seed)
    (_, padded), (_, plain) = (cuda_runtime(release, Precision(), 50) for _ in range(2))
    single = SingleTokenPass(padded, 16)
    for _ in range(30):
        for ours, theirs in zip(slabs(padded), slabs(plain), strict=True):
            theirs.copy_(torch.from_numpy(rng.integers(-100, 100, theirs.shape)) * (1 if ours.ndim == 2 else 0.01))
            ours.copy_(theirs)
            ours[-1].fill_(torch.nan if ours.is_floating_point() else 1 << 62)
        single.buffers.scribble()
        size = int(rng.integers(1, 17))
        slots, firsts = rng.permutation(50)[:size], rng.integers(0, 100, size)
        counts = firsts + 1 + rng.choice([0, 1, 7, 300], size)
        plan = plan_tokens(slots, counts, np.ones(size, np.int64), firsts, config.windows)
        columns = [rng.integers(0, 3, size), *rng.integers(0, 2, (2, size)), *rng.integers(0, 1 << 20, (3, size))]
        columns.append(plan.positions)
        with torch.inference_mode():
            ours = single.run([*columns, slots, plan.offsets])
            plain.kernel.begin(plan, columns[COLUMNS.index("time_ms")])
            theirs = plain.embed(Features(*map(torch.from_numpy, columns)), plan.layers, plain.buffers)
        assert (ours - theirs).abs().max() <= 1e-5
        for ours, theirs in zip(slabs(padded), slabs(plain), strict=True):
            torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("tapes")
def test_histories_by_padded_passes_equal_forward(shape: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes padded to several sizes, recorded or not, mixed with ordinary ones, equal the model's forward pass."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    monkeypatch.setattr(cuda, "SIZES", (1, 4, 16))
    config, release = SHAPES[shape], random_release(SHAPES[shape], seed)
    runtime, forward_pass = cuda_runtime(release, Precision(), 20)
    if recorded:
        forward_pass.capture()
        for single in forward_pass.singles:
            monkeypatch.setattr(single, "compute", None)
    used = [counted(single) for single in forward_pass.singles]
    rng, addresses = np.random.default_rng(seed), []
    for _ in range(2):
        runtime.clear()
        follow(config, runtime, forward_pass, lambda batch: forward(release, batch), rng, 1e-5)
        held = [each for single in forward_pass.singles for each in (single.inputs, *single.buffers._held.values())]
        addresses.append([each.data_ptr() for each in held])
    assert addresses[0] == addresses[1]  # a recorded pass keeps using these addresses
    assert min(map(len, used)) >= 3
    assert runtime.prefills > 20


def test_no_place_is_written_twice() -> None:
    """A layer writes each place of a ring once, even with many tokens per user, because a GPU writes in any order."""
    rng = np.random.default_rng(4)
    fresh = np.array([1, 30, 5, 2, 30, 11])
    counts = fresh + rng.integers(0, 50, len(fresh))
    plan = plan_tokens(rng.permutation(9)[: len(fresh)], counts, fresh, 0 * fresh, (5, 21, 7))
    for layer, window in enumerate((5, 21, 7)):
        block = _Block.of(plan, CPU, layer, window)
        cells = block.slots[block.users[block.stay]] * window + block.offsets[block.stay] % window
        assert len(cells.unique()) == len(cells) > 10


def test_the_spare_slot_is_within_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the slots of users and the spare one together take no more than the bytes of the cache."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_precision("auto", 32, CUDA) == Precision()
    assert choose_precision("bf16", 32, CUDA) == Precision(cache=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        release = simulated(SMALL)
        per_user = kernel_bytes(release, Precision())
        kernel, slots = make_kernel(release, Precision(), 10 * per_user)
        assert isinstance(kernel, TorchKernel)
        held = (*kernel.keys, *kernel.values, kernel.times_ms)
        assert sum(slab.numel() * slab.itemsize for slab in held) == 10 * per_user
        assert (slots, len(kernel.times_ms), kernel.times_ms.device) == (9, 10, CUDA)
        with pytest.raises(ValueError, match=f"set at least {2 * per_user}"):
            make_kernel(release, Precision(), per_user)


@with_gpu
class TestOnGPU:
    """The runtimes on a GPU against those on the CPU."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "bf16"])
    def test_histories_equal_the_cpu(self, shape: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
        """Recorded and other passes, evictions, late events and full passes give the CPU's float32 embeddings."""
        seed = int(np.random.default_rng().integers(1 << 30))
        print(f"seed {seed}")
        monkeypatch.setattr(cuda, "SIZES", (1, 4, 16))
        config, release = SHAPES[shape], random_release(SHAPES[shape], seed)
        there = copy.deepcopy(release)
        there.model.to(CUDA)
        cache_bytes = 21 * kernel_bytes(there, precision)
        runtime = make_incremental(there, cache_bytes_max=cache_bytes, precision=precision)
        forward_pass = runtime._forward
        assert isinstance(forward_pass, CudaForwardPass)
        assert all(single._graph is not None for single in forward_pass.singles)
        rng, used = np.random.default_rng(seed), [counted(single) for single in forward_pass.singles]
        bound = 1e-5 if precision == Precision() else 0.05  # at these widths the CPU's own bfloat16 differs by 0.02
        here = make_incremental(release, cache_bytes_max=1 << 20, precision=Precision())
        follow(config, runtime, forward_pass, here.embed, rng, bound)
        assert min(map(len, used)) >= 3
        assert runtime.prefills > 20
        batch = sequences([user(rng, i, config, int(rng.integers(1, 60))) for i in range(300)])
        passes = make_full(there, cache_bytes_max=cache_bytes, precision=precision)
        assert np.abs(passes.embed(batch) - here.embed(batch)).max() <= bound


def follow(
    config: EncoderConfig,
    runtime: IncrementalRuntime,
    forward_pass: CudaForwardPass,
    expected: Callable[[SequenceBatch], np.ndarray],
    rng: np.random.Generator,
    bound: float,
) -> None:
    """Let users act and embed them, in rounds, of which every second one has one action per user.

    Before each round, all memory that no embedding may depend on is filled with NaN.
    """
    users = [user(rng, i, config, int(rng.integers(1, 60))) for i in range(30)]
    for number in range(50):
        among, most = (users[:12], rng.choice([1, 3, 12])) if number % 2 else (users, rng.integers(1, 30))
        picked = [among[i] for i in rng.permutation(len(among))[:most]]
        for one in picked:
            one.append(rng, 1) if number % 2 else disturb(one, runtime, rng)
        for buffers in (forward_pass.buffers, *(single.buffers for single in forward_pass.singles)):
            buffers.scribble()
        for slab in slabs(forward_pass):
            slab[-1].fill_(torch.nan if slab.is_floating_point() else 1 << 62)
        batch = sequences(picked)
        assert np.abs(runtime.embed(batch) - expected(batch)).max() <= bound


def counted(single: SingleTokenPass) -> list[int]:
    """Return a list to which each run of the pass appends its number of users."""
    used: list[int] = []
    run = single.run

    def counting(rows: Any) -> Tensor:
        used.append(len(rows[0]))
        return run(rows)

    single.run = counting  # type: ignore[method-assign]
    return used


def slabs(forward_pass: CudaForwardPass) -> list[Tensor]:
    """Return the slabs of keys, values and event times."""
    return [*forward_pass.kernel.keys, *forward_pass.kernel.values, forward_pass.kernel.times_ms]


def simulated(config: EncoderConfig, device: torch.device = CUDA) -> Release:
    """Return a release of random weights on the simulated GPU."""
    with unset_fake_temporarily():
        release = random_release(config, 1)
        assert release.version  # computed and cached now, because weights on a simulated device have no values
    release.model.to(device)
    return release
