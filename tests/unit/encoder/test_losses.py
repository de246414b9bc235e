"""Losses and negative pools against direct computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from encoder.training.losses import CHUNK, equal_user_weights, softmax_loss
from encoder.training.negatives import CountMinSketch, LossConfig, NegativeSampler, expected_count_log_q

SEED = 20_260_102
PAIRS, ITEMS, DIM = CHUNK + 37, 40, 8


def inputs() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Return random user vectors, an item table, user ids and target rows."""
    generator = torch.Generator().manual_seed(SEED)
    users = torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(ITEMS + 1, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    rng = np.random.default_rng(SEED)
    return users, table, rng.integers(0, 9, PAIRS), rng.integers(1, ITEMS + 1, PAIRS)


def our_loss(users: Tensor, table: Tensor, user_ids: np.ndarray, targets: np.ndarray, config: LossConfig) -> Tensor:
    """Return the loss under test."""
    sampler = NegativeSampler(config, np.bincount(targets, minlength=ITEMS + 1), seed=SEED)
    pool = sampler.pool(user_ids, targets, np.random.default_rng(SEED))
    return softmax_loss(
        users,
        table[torch.from_numpy(targets)],
        table[pool.rows],
        equal_user_weights(user_ids).double(),
        target_log_q=pool.target_log_q.double(),
        pool_log_q=pool.log_q.double(),
        mask=pool.mask,
    )


def gradients(loss: Tensor, users: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a loss with respect to users and items."""
    return torch.autograd.grad(loss, (users, table))


def test_full_softmax_is_cross_entropy() -> None:
    """The chunked loss over the whole catalogue has the value and the gradients of plain cross entropy."""
    users, table, user_ids, targets = inputs()
    ours = our_loss(users, table, user_ids, targets, LossConfig(kind="full"))
    plain = F.cross_entropy(users @ table[1:].T, torch.from_numpy(targets) - 1, reduction="none")
    plain_loss = (plain * equal_user_weights(user_ids).double()).sum()
    torch.testing.assert_close(ours, plain_loss)
    for mine, theirs in zip(gradients(ours, users, table), gradients(plain_loss, users, table), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("log_q", ["none", "exact", "sketch"])
def test_sampled_softmax_equals_a_loop_over_pairs(log_q: str) -> None:
    """The sampled loss equals a loop over pairs that masks the user's own positives and corrects every logit."""
    users, table, user_ids, targets = inputs()
    config = LossConfig(kind="sampled", random_negatives=30, batch_negatives_max=50, log_q=log_q)  # type: ignore[arg-type]
    ours = our_loss(users, table, user_ids, targets, config)
    sampler = NegativeSampler(config, np.bincount(targets, minlength=ITEMS + 1), seed=SEED)
    pool = sampler.pool(user_ids, targets, np.random.default_rng(SEED))
    assert len(pool.rows) == 80
    weights = equal_user_weights(user_ids).double()
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(PAIRS):
        own = set(targets[user_ids == user_ids[pair]].tolist())
        kept = [n for n, row in enumerate(pool.rows.tolist()) if row not in own]
        positive = users[pair] @ table[targets[pair]] - pool.target_log_q[pair]
        negatives = table[pool.rows[kept]] @ users[pair] - pool.log_q[kept]
        total = total + weights[pair] * (torch.cat([positive[None], negatives]).logsumexp(0) - positive)
    torch.testing.assert_close(ours, total)
    for mine, theirs in zip(gradients(ours, users, table), gradients(total, users, table), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rounded_factors_leave_value_and_gradients_close() -> None:
    """With factors in bfloat16, the loss and the gradients differ only by rounding."""
    users, table, user_ids, targets = (
        x.detach().float().requires_grad_() if isinstance(x, Tensor) else x for x in inputs()
    )
    sampler = NegativeSampler(LossConfig(kind="full"), np.bincount(targets, minlength=ITEMS + 1), seed=SEED)
    pool = sampler.pool(user_ids, targets, np.random.default_rng(SEED))

    def loss(precision: torch.dtype) -> Tensor:
        return softmax_loss(
            users,
            table[torch.from_numpy(targets)],
            table[pool.rows],
            equal_user_weights(user_ids),
            target_log_q=pool.target_log_q,
            pool_log_q=pool.log_q,
            mask=pool.mask,
            precision=precision,
        )

    whole, rounded = loss(torch.float32), loss(torch.bfloat16)
    torch.testing.assert_close(rounded, whole, rtol=2e-3, atol=0)
    for mine, theirs in zip(gradients(rounded, users, table), gradients(whole, users, table), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-2
    assert torch.get_float32_matmul_precision() == "highest"


def test_every_user_weighs_the_same() -> None:
    """A user with three pairs has the weight of one with a single pair."""
    assert equal_user_weights(np.array([7, 7, 7, 2])).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_exact_log_q_is_the_expected_count() -> None:
    """Over many pools, the mean count of an item is exp(log-Q), within three standard errors."""
    print(f"seed {SEED}")
    counts = np.array([0, 50, 30, 15, 5])
    config = LossConfig(kind="sampled", random_negatives=6, batch_negatives_max=100, log_q="exact")
    sampler = NegativeSampler(config, counts, seed=SEED)
    rng = np.random.default_rng(SEED)
    seen, pools, batch = np.zeros(5), 4_000, 20
    for _ in range(pools):
        targets = rng.choice(5, batch, p=counts / counts.sum())
        pool = sampler.pool(np.arange(batch), targets, rng)
        seen += np.bincount(pool.rows.numpy(), minlength=5)
    expected = torch.exp(sampler._log_q(np.arange(5), batch)).numpy()[1:]
    assert np.abs(seen[1:] / pools - expected).max() < 3 * np.sqrt(expected.max() / pools)


def test_the_sketch_never_counts_too_little_and_is_near_the_truth() -> None:
    """On a skewed stream, estimates are at least the exact counts and exceed them by at most e / width of the total."""
    rng = np.random.default_rng(SEED)
    ids = np.minimum(rng.zipf(1.3, 50_000), 1 << 40)
    sketch = CountMinSketch(width=1 << 12, depth=4, seed=SEED)
    for part in np.array_split(ids, 7):
        sketch.add(part)
    distinct, counts = np.unique(ids, return_counts=True)
    estimated = np.exp(sketch.log_frequency(distinct).numpy().astype(np.float64)) * len(ids)
    assert (estimated - counts).min() > -0.01 * counts.max() / 1_000
    assert np.mean(estimated - counts > np.e / (1 << 12) * len(ids) + 0.5) < np.exp(-4) + 0.01
    wide = CountMinSketch(seed=SEED)
    wide.add(ids)
    exact = np.log(counts / len(ids))
    assert np.abs(wide.log_frequency(distinct).numpy() - exact).mean() < 0.01


def test_a_sketch_is_updated_before_it_is_used() -> None:
    """The sketch is updated before it is used: the first batch is corrected by its own frequencies."""
    config = LossConfig(kind="sampled", random_negatives=1, batch_negatives_max=10, log_q="sketch")
    sampler = NegativeSampler(config, np.ones(5, np.int64), seed=SEED)
    pool = sampler.pool(np.arange(4), np.array([1, 1, 1, 2]), np.random.default_rng(SEED))
    expected = expected_count_log_q(torch.log(torch.tensor([0.75, 0.25])), batch=4, uniform=1, items=4)
    torch.testing.assert_close(pool.target_log_q[[0, 3]], expected)


def test_a_cap_bounds_the_negatives_of_a_batch() -> None:
    """At most `batch_negatives_max` positives of the batch enter the pool."""
    config = LossConfig(kind="sampled", random_negatives=3, batch_negatives_max=10)
    sampler = NegativeSampler(config, np.ones(9, np.int64), seed=SEED)
    targets = np.random.default_rng(SEED).integers(1, 9, 200)
    assert len(sampler.pool(np.arange(200), targets, np.random.default_rng(SEED)).rows) == 13
