"""The CUDA path: padded steps are the ordinary ones, and everything lies where it must, told on simulated tensors.

What only a GPU can tell is compared with the CPU where there is one.
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
from encoder.inference.cuda import COLUMNS, CudaSteps, SingleStep
from encoder.inference.forward import Steps
from encoder.inference.incremental import IncrementalRuntime
from encoder.inference.kernel import Geometry, Precision
from encoder.inference.plan import plan_tokens
from encoder.inference.reference import TorchKernel, _Block
from encoder.inference.runtime import choose, kernel_bytes, make_full, make_incremental, make_kernel, slopes
from encoder.inference.slots import SlotTable
from encoder.model import EncoderConfig
from encoder.release import Release
from tests.unit.inference.histories import forward, random_release, sequences
from tests.unit.inference.test_runtimes import SHAPES, SMALL, WINDOW, disturb, user

CUDA = torch.device("cuda", 0)
HALF = Precision(torch.bfloat16, torch.bfloat16)
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Placed(TorchDispatchMode):
    """Refuses an operation on several devices, scalars too; a copy to the GPU must be one that nobody waits for."""

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
    """A column of features as the host has it; a tensor of the host would be a simulated one."""

    def __init__(self, values: np.ndarray) -> None:
        self.numpy = lambda: values


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """A simulated CUDA device, whose tensors have shapes and no values; and what is fetched from it."""
    fetched: list[Tensor] = []

    def fetch(rows: Tensor) -> np.ndarray:
        fetched.append(rows)
        return np.zeros(rows.shape, np.float32)

    def features(*args: Any) -> Features:
        with unset_fake_temporarily():
            made = of_steps(*args)
            return Features(*(Column(getattr(made, name).numpy()) for name in COLUMNS))

    of_steps = Steps._features
    monkeypatch.setattr(Steps, "_features", features)
    monkeypatch.setattr(cuda, "fetched", fetch)
    monkeypatch.setattr(full, "fetched", fetch)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield fetched


class Tape(TorchDispatchMode):
    """A CUDA graph in slow motion: what was recorded runs again, on the same tensors and without Python between."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        for func, args, kwargs, results in self.recorded:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, tapes are recorded instead of CUDA graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def cuda_runtime(release: Release, precision: Precision, slots: int) -> tuple[IncrementalRuntime, CudaSteps]:
    """The incremental runtime as on a GPU, without recorded steps, wherever the model is."""
    geometry = Geometry.of(release.config, precision)
    kernel = TorchKernel(geometry, slots + 1, slopes(release), release.model.device)
    steps = CudaSteps(release, kernel, precision.products)
    return IncrementalRuntime(release.version, release.config, steps, SlotTable(slots)), steps


@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, "read-out"])
def test_steps_run_on_their_device(shape: str, precision: Precision, gpu: list[Tensor]) -> None:
    """Prefills, several tokens and single ones meet no tensor of another device, and ask the device for nothing."""
    rng = np.random.default_rng(1)
    release = simulated(SHAPES.get(shape, replace(SMALL, read_out=True)))
    assert choose("auto", 32, release.model.device) == HALF
    runtime, steps = cuda_runtime(release, precision, 20)
    users = [user(rng, i, release.config, 1 + 3 * i) for i in range(12)]
    used = counted(steps.singles[0])
    for choices in ([1], [1, 2, 5], [1]):
        with Placed({CPU, CUDA}):
            runtime.embed(sequences(users))
        for one in users:
            one.append(rng, int(rng.choice(choices)))
    assert used[:2] == [1, 12]
    assert 0 < used[2] < 12
    assert {(rows.device, rows.dtype) for rows in gpu} == {(CUDA, torch.float32)}
    assert {slab.dtype for slab in steps.kernel.keys} == {precision.cache}
    assert (runtime.prefills, runtime.extensions, steps.dtype) == (12, 24, str(precision.products)[6:])


@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("gpu")
def test_what_is_recorded_stays_on_the_device(shape: str, precision: Precision) -> None:
    """A padded step takes its inputs from the device and makes nothing elsewhere, and no shape depends on a value."""
    _, steps = cuda_runtime(simulated(SHAPES[shape]), precision, 20)
    for single in steps.singles:
        with torch.no_grad(), Placed({CUDA}) as placed:
            embeddings = single.compute()
        assert (embeddings.shape, embeddings.device) == ((single.size, SHAPES[shape].embedding_dim), CUDA)
        assert placed.operations > 100


@pytest.mark.parametrize("kind", ["incremental", "full", "window"])
def test_loaded_where_the_device_is(kind: str, gpu: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime is on this process's device with its model and slabs; only the incremental one records its steps."""
    config = WINDOW if kind == "window" else SMALL
    recorded: list[CudaSteps] = []
    monkeypatch.setattr(CudaSteps, "capture", lambda steps: recorded.append(steps))
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


def test_embeddings_come_in_the_order_asked() -> None:
    """Users with one new token and with several, in any order, get their own embeddings."""
    rng, release = np.random.default_rng(3), random_release(SMALL, 3)
    _, steps = cuda_runtime(release, Precision(), 20)
    fresh = np.array([3, 1, 2, 1, 1, 9, 1])
    batch = sequences([user(rng, i, SMALL, count) for i, count in enumerate(fresh.tolist())])
    every = np.arange(len(fresh))
    ours = steps.run(batch, every, every, fresh, 0 * fresh)
    assert np.abs(ours - forward(release, batch)).max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_nothing(shape: str) -> None:
    """A padded step gives the embeddings of the ordinary one and writes what that writes, and to the spare slot."""
    config, seed = SHAPES[shape], int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng, release = np.random.default_rng(seed), random_release(SHAPES[shape], seed)
    (_, padded), (_, plain) = (cuda_runtime(release, Precision(), 50) for _ in range(2))
    single = SingleStep(padded, 16)
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
def test_histories_by_padded_steps_equal_forward(shape: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps padded to several sizes, recorded or not, mixed with ordinary ones: the model's forward pass."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    monkeypatch.setattr(cuda, "SIZES", (1, 4, 16))
    config, release = SHAPES[shape], random_release(SHAPES[shape], seed)
    runtime, steps = cuda_runtime(release, Precision(), 20)
    if recorded:
        steps.capture()
        for single in steps.singles:
            monkeypatch.setattr(single, "compute", None)
    used = [counted(single) for single in steps.singles]
    rng, addresses = np.random.default_rng(seed), []
    for _ in range(2):
        runtime.clear()
        follow(config, runtime, steps, lambda batch: forward(release, batch), rng, 1e-5)
        held = [each for single in steps.singles for each in (single.inputs, *single.buffers._held.values())]
        addresses.append([each.data_ptr() for each in held])
    assert addresses[0] == addresses[1]  # what a recorded step goes on using
    assert min(map(len, used)) >= 3
    assert runtime.prefills > 20


def test_no_cell_is_written_twice() -> None:
    """However many tokens a user has, a layer writes each place of a ring once: a GPU writes in no certain order."""
    rng = np.random.default_rng(4)
    fresh = np.array([1, 30, 5, 2, 30, 11])
    counts = fresh + rng.integers(0, 50, len(fresh))
    plan = plan_tokens(rng.permutation(9)[: len(fresh)], counts, fresh, 0 * fresh, (5, 21, 7))
    for layer, window in enumerate((5, 21, 7)):
        block = _Block.of(plan, CPU, layer, window)
        cells = block.slots[block.users[block.stay]] * window + block.offsets[block.stay] % window
        assert len(cells.unique()) == len(cells) > 10


def test_the_spare_slot_is_within_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the slots of users and the spare one together take no more than the cache's bytes."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose("auto", 32, CUDA) == Precision()
    assert choose("bf16", 32, CUDA) == Precision(cache=torch.bfloat16)
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
        """Recorded and other steps in turn, evictions, late events, full passes: the CPU's float32 embeddings."""
        seed = int(np.random.default_rng().integers(1 << 30))
        print(f"seed {seed}")
        monkeypatch.setattr(cuda, "SIZES", (1, 4, 16))
        config, release = SHAPES[shape], random_release(SHAPES[shape], seed)
        there = copy.deepcopy(release)
        there.model.to(CUDA)
        cache_bytes = 21 * kernel_bytes(there, precision)
        runtime = make_incremental(there, cache_bytes_max=cache_bytes, precision=precision)
        steps = runtime._steps
        assert isinstance(steps, CudaSteps)
        assert all(single._graph is not None for single in steps.singles)
        rng, used = np.random.default_rng(seed), [counted(single) for single in steps.singles]
        bound = 1e-5 if precision == Precision() else 0.05  # at these widths a CPU's own bfloat16 is off by 0.02
        here = make_incremental(release, cache_bytes_max=1 << 20, precision=Precision())
        follow(config, runtime, steps, here.embed, rng, bound)
        assert min(map(len, used)) >= 3
        assert runtime.prefills > 20
        batch = sequences([user(rng, i, config, int(rng.integers(1, 60))) for i in range(300)])
        passes = make_full(there, cache_bytes_max=cache_bytes, precision=precision)
        assert np.abs(passes.embed(batch) - here.embed(batch)).max() <= bound


def follow(
    config: EncoderConfig,
    runtime: IncrementalRuntime,
    steps: CudaSteps,
    truth: Callable[[SequenceBatch], np.ndarray],
    rng: np.random.Generator,
    bound: float,
) -> None:
    """Users act, once each in half of the rounds, and are embedded; what no user may see is NaN before each round."""
    users = [user(rng, i, config, int(rng.integers(1, 60))) for i in range(30)]
    for number in range(50):
        among, most = (users[:12], rng.choice([1, 3, 12])) if number % 2 else (users, rng.integers(1, 30))
        picked = [among[i] for i in rng.permutation(len(among))[:most]]
        for one in picked:
            one.append(rng, 1) if number % 2 else disturb(one, runtime, rng)
        for buffers in (steps.buffers, *(single.buffers for single in steps.singles)):
            buffers.scribble()
        for slab in slabs(steps):
            slab[-1].fill_(torch.nan if slab.is_floating_point() else 1 << 62)
        batch = sequences(picked)
        assert np.abs(runtime.embed(batch) - truth(batch)).max() <= bound


def counted(single: SingleStep) -> list[int]:
    """A list that grows by the number of users whenever the step runs."""
    used: list[int] = []
    run = single.run

    def counting(rows: Any) -> Tensor:
        used.append(len(rows[0]))
        return run(rows)

    single.run = counting  # type: ignore[method-assign]
    return used


def slabs(steps: CudaSteps) -> list[Tensor]:
    return [*steps.kernel.keys, *steps.kernel.values, steps.kernel.times_ms]


def simulated(config: EncoderConfig, device: torch.device = CUDA) -> Release:
    """A release of random weights, on the simulated GPU."""
    with unset_fake_temporarily():
        release = random_release(config, 1)
        assert release.version  # read from the weights, which on a simulated device have no values
    release.model.to(device)
    return release
