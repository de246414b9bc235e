"""Parity of the runtimes: whether cached or not, an embedding is the model's own forward pass over the kept actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from encoder.inference import load_runtime
from encoder.inference.forward import ForwardPass
from encoder.inference.incremental import IncrementalRuntime
from encoder.inference.kernel import Geometry, Precision
from encoder.inference.reference import TorchKernel
from encoder.inference.runtime import kernel_bytes, make_incremental, slopes
from encoder.inference.slots import SlotTable
from encoder.model import EncoderConfig
from encoder.release import Release
from tests.unit.inference.histories import User, forward, random_actions, random_release, sequences

WINDOW = EncoderConfig(
    kind="window",
    d_model=32,
    heads=4,
    kv_heads=4,
    windows=(20, 20),
    embedding_dim=16,
    item_dim=12,
    sequence_length=20,
    time_bias=False,
)
SMALL = EncoderConfig(
    d_model=32, heads=4, kv_heads=2, windows=(5, 9, 7), embedding_dim=16, item_dim=12, sequence_length=24
)
SHAPES = {
    "grouped heads, mixed windows, time bias": SMALL,
    "no time bias, one key head": EncoderConfig(
        d_model=24,
        heads=2,
        kv_heads=1,
        windows=(6, 6),
        embedding_dim=8,
        item_dim=8,
        sequence_length=16,
        time_bias=False,
    ),
    "every head its own keys, window of one": EncoderConfig(
        d_model=16, heads=2, kv_heads=2, windows=(1, 12), embedding_dim=8, item_dim=8, sequence_length=20
    ),
    "one layer, odd window": EncoderConfig(
        d_model=40, heads=4, kv_heads=4, windows=(11,), embedding_dim=8, item_dim=8, sequence_length=12
    ),
}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_incremental_equals_forward(shape: str, native: bool) -> None:
    """After appends, late events, evictions and forgetting, fp32 embeddings are within 1e-5 of the model's forward."""
    config, seed = SHAPES[shape], int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    release = random_release(config, seed)
    runtime = make_incremental(
        release, cache_bytes_max=bytes_for(release, 12, native=native), precision=Precision(), native=native
    )
    users = [
        User(f"u{i}".encode(), random_actions(rng, int(rng.integers(1, 60))), config.sequence_length) for i in range(30)
    ]
    for _ in range(40):
        picked = [users[i] for i in rng.permutation(len(users))[: rng.integers(1, len(users))]]
        for user in picked:
            disturb(user, runtime, rng)
        batch = sequences(picked)
        worst = np.abs(runtime.embed(batch) - forward(release, batch)).max()
        assert worst <= 1e-5
    assert runtime.extensions > 20
    assert runtime.prefills > 20


def test_full_equals_forward_for_both_encoders(tmp_path: Path) -> None:
    """Full passes of the streaming and of the published encoder equal the forward pass, for ragged batches too."""
    rng = np.random.default_rng(5)
    for name, config in (("streaming", SMALL), ("window", WINDOW)):
        release = random_release(config, 5)
        release.save(tmp_path / name)
        runtime = load_runtime(tmp_path / name, kind="full", cache_bytes_max=1 << 20, dtype="fp32")
        batch = sequences([user(rng, i, config, int(rng.integers(1, 60))) for i in range(300)])
        assert np.abs(runtime.embed(batch) - forward(release, batch)).max() <= 1e-5
        assert (runtime.version, runtime.embedding_dim) == (release.version, config.embedding_dim)
        assert runtime.sequence_length == config.sequence_length


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_actions_needed_is_the_least_that_makes_the_cache_invisible(shape: str, missing: int) -> None:
    """With `actions_needed` kept actions a cached user has the embedding of a cold one; with one fewer it has not."""
    rng = np.random.default_rng(9)
    release = random_release(SHAPES[shape], 9)
    cached, cold = (
        make_incremental(release, cache_bytes_max=1 << 20, precision=Precision(), native=False) for _ in range(2)
    )
    one = User(b"u", random_actions(rng, 60), cached.actions_needed - missing)
    worst = 0.0
    for _ in range(30):
        one.append(rng, 1)
        cold.clear()
        worst = max(worst, float(np.abs(cached.embed(sequences([one])) - cold.embed(sequences([one]))).max()))
    assert (worst <= 1e-5) is (missing == 0)


def test_more_cold_users_than_slots() -> None:
    """A batch of more users than slots is still embedded, in the order of the batch."""
    rng = np.random.default_rng(7)
    release = random_release(SMALL, 7)
    runtime = make_incremental(release, cache_bytes_max=bytes_for(release, 3), precision=Precision())
    batch = sequences([user(rng, i, SMALL, 1 + i) for i in range(40)])
    assert np.abs(runtime.embed(batch) - forward(release, batch)).max() <= 1e-5


def test_nothing_new_repeats_the_embedding() -> None:
    """A user embedded again without a new action gets the same embedding, and the next action continues from it."""
    rng = np.random.default_rng(8)
    release = random_release(SMALL, 8)
    runtime = make_incremental(release, cache_bytes_max=1 << 20, precision=Precision())
    one = user(rng, 0, SMALL, 50)
    first = runtime.embed(sequences([one]))
    again = runtime.embed(sequences([one]))
    assert np.abs(first - again).max() <= 1e-6
    one.append(rng, 1)
    assert np.abs(runtime.embed(sequences([one])) - forward(release, sequences([one]))).max() <= 1e-5
    assert (runtime.prefills, runtime.extensions) == (1, 2)


def test_a_sequence_that_went_back_is_computed_from_scratch() -> None:
    """A user with fewer actions than its slot has seen (state restored to an earlier offset) does not use the slot."""
    rng = np.random.default_rng(13)
    release = random_release(SMALL, 13)
    runtime = make_incremental(release, cache_bytes_max=1 << 20, precision=Precision())
    one = user(rng, 0, SMALL, 20)
    before = sequences([one])
    one.append(rng, 3)
    runtime.embed(sequences([one]))
    assert np.abs(runtime.embed(before) - forward(release, before)).max() <= 1e-5
    assert runtime.extensions == 0


def test_other_users_do_not_matter() -> None:
    """A user's embedding is the same alone as in a batch of three hundred users, whether hot or cold."""
    rng = np.random.default_rng(14)
    release = random_release(SMALL, 14)
    alone, crowd = (make_incremental(release, cache_bytes_max=1 << 22, precision=Precision()) for _ in range(2))
    users = [user(rng, i, SMALL, int(rng.integers(1, 40))) for i in range(300)]
    for _ in range(2):
        together = crowd.embed(sequences(users))
        for i in (0, 17, 299):
            assert np.abs(alone.embed(sequences([users[i]])) - together[i]).max() <= 1e-6
        for one in users:
            one.append(rng, 2)


def test_reused_buffers_never_show() -> None:
    """Embeddings do not change when all scratch buffers and all slabs are full of NaN."""
    rng = np.random.default_rng(9)
    release = random_release(SMALL, 9)
    geometry = Geometry.of(SMALL, Precision())
    kernel = TorchKernel(geometry, 50, slopes(release))
    forward_pass = ForwardPass(release, kernel, torch.float32)
    runtime = IncrementalRuntime(release.version, SMALL, forward_pass, SlotTable(50))
    for slab in (*kernel.keys, *kernel.values):
        slab.fill_(float("nan"))
    users = [user(rng, i, SMALL, int(rng.integers(1, 40))) for i in range(40)]
    for _ in range(3):
        batch = sequences(users)
        assert np.abs(runtime.embed(batch) - forward(release, batch)).max() <= 1e-5
        forward_pass.buffers.scribble()
        for one in users:
            one.append(rng, int(rng.integers(1, 4)))


def test_a_slot_behind_a_nan_is_not_used() -> None:
    """A user whose embedding was NaN is computed from scratch the next time."""
    rng = np.random.default_rng(10)
    release = random_release(SMALL, 10)
    runtime = make_incremental(release, cache_bytes_max=1 << 20, precision=Precision())
    one = user(rng, 0, SMALL, 30)
    weight = release.model.head.norm.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    assert np.isnan(runtime.embed(sequences([one]))).all()
    weight.copy_(kept)
    one.append(rng, 1)
    assert np.abs(runtime.embed(sequences([one])) - forward(release, sequences([one]))).max() <= 1e-5
    assert runtime.extensions == 0


class _Faulty(TorchKernel):
    """A kernel that fails in the last layer, after the others have written, while `broken` is true."""

    broken = False

    def attend(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        if self.broken and layer == len(self.geometry.windows) - 1:
            raise RuntimeError("kernel failed")
        super().attend(layer, qkv, out)


def test_a_failed_pass_leaves_no_trace() -> None:
    """After a pass that failed half-way, the same request succeeds and equals the forward pass."""
    rng = np.random.default_rng(15)
    release = random_release(SMALL, 15)
    kernel = _Faulty(Geometry.of(SMALL, Precision()), 4, slopes(release))
    forward_pass = ForwardPass(release, kernel, torch.float32)
    runtime = IncrementalRuntime(release.version, SMALL, forward_pass, SlotTable(4))
    one = user(rng, 0, SMALL, 40)
    runtime.embed(sequences([one]))
    one.append(rng, 3)
    kernel.broken = True
    with pytest.raises(RuntimeError, match="kernel failed"):
        runtime.embed(sequences([one]))
    kernel.broken = False
    assert np.abs(runtime.embed(sequences([one])) - forward(release, sequences([one]))).max() <= 1e-5


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_bf16_stays_close(products: torch.dtype, native: bool) -> None:
    """The cosine to the float32 forward pass is at least 0.9999 with a bfloat16 cache and products in either type."""
    rng = np.random.default_rng(11)
    config = EncoderConfig(
        d_model=64, heads=4, kv_heads=2, windows=(16, 16), embedding_dim=64, item_dim=32, sequence_length=40
    )
    release = random_release(config, 11)
    runtime = make_incremental(
        release, cache_bytes_max=1 << 20, precision=Precision(products, torch.bfloat16), native=native
    )
    users = [user(rng, i, config, int(rng.integers(1, 60))) for i in range(50)]
    for _ in range(3):
        batch = sequences(users)
        cosines = (runtime.embed(batch) * forward(release, batch)).sum(axis=1)
        assert cosines.min() >= 0.9999
        for one in users:
            one.append(rng, 1)


def test_unusable_input_is_rejected() -> None:
    """A user without actions and a cache that is too small for one user are named errors."""
    rng = np.random.default_rng(12)
    release = random_release(SMALL, 12)
    with pytest.raises(ValueError, match="cache is too small for one user"):
        make_incremental(release, cache_bytes_max=100, precision=Precision())
    runtime = make_incremental(release, cache_bytes_max=1 << 20, precision=Precision())
    empty = user(rng, 0, SMALL, 1)
    empty.actions = empty.actions[:0]
    with pytest.raises(ValueError, match="sequence cannot be embedded: 0 rows"):
        runtime.embed(sequences([empty]))


def user(rng: np.random.Generator, number: int, config: EncoderConfig, actions: int) -> User:
    """Return a user with a history of this many actions."""
    return User(f"u{number}".encode(), random_actions(rng, actions), config.sequence_length)


def disturb(user: User, runtime: IncrementalRuntime, rng: np.random.Generator) -> None:
    """Choose at random: nothing, some new actions, a late action, or the runtime forgets the user."""
    what = rng.random()
    if what < 0.7:
        user.append(rng, int(rng.choice([1, 1, 1, 2, 5, 30])))
    elif what < 0.8:
        user.late(rng)
    elif what < 0.85:
        runtime.forget([user.name])


def bytes_for(release: Release, users: int, *, native: bool = True) -> int:
    """Return the cache bytes of this many users in float32, which depend on the vector width of the processor."""
    return users * kernel_bytes(release, Precision(), native=native)
