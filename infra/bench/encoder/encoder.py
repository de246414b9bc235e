"""`make bench-encoder`: the cost of one new action, compared with full passes and with the bare matrix products.

Reference size: d 256, 4 layers, 8 heads, 2 key/value heads, windows of 64, full sequences of 256 actions, random
weights, one thread. 20,000 hot users are embedded in random order, features included. The baselines run in the same
rounds:

- `nn.TransformerEncoder` in float32 over 256 actions, at its best batch size. This comparison is unfair in two ways: a
  cache saves 255 of 256 tokens by construction, and `nn.TransformerEncoder` computes no features. Only the rest of the
  ratio is due to our code.
- Our own full pass of the same release, the incremental runtime on plain torch, and the model's products alone.
- For cold users, a plain pass with scaled_dot_product_attention in the better of bfloat16 and float32.

Rounds are interleaved, rates are medians of five rounds, and CPU seconds are those of the process.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from encoder.actions.columns import ACTION_DTYPE, Actions, SequenceBatch, item_key, name_code
from encoder.arrays import F32, I64
from encoder.features import Vocabularies, padded_rows, sequence_positions
from encoder.inference.forward import ForwardPass
from encoder.inference.incremental import TOKENS_MAX, IncrementalRuntime
from encoder.inference.kernel import Kernel, Precision
from encoder.inference.native import NativeKernel
from encoder.inference.plan import offsets_of, suffixes
from encoder.inference.reference import TorchKernel
from encoder.inference.runtime import choose_precision, kernel_bytes, make_full, make_incremental, make_kernel
from encoder.inference.slots import SlotTable
from encoder.items import TrainedItems
from encoder.model import EncoderConfig, build_encoder, initialize
from encoder.release import Release, make_release
from infra.bench.encoder.baselines import Products, peak_flops, plain_pass, transformer_encoder
from infra.harness.reporting import Spread, agreed_ratio, machine, print_result, print_table

REFERENCE = EncoderConfig()
PAPER = EncoderConfig(d_model=768, heads=12, kv_heads=2, windows=(42,) * 6)
SMALL = EncoderConfig(
    d_model=32, heads=4, kv_heads=2, windows=(5, 9, 7), embedding_dim=64, item_dim=16, sequence_length=24
)
"""Size for parity over many histories; at the reference size, 100 users take a forward pass of one second."""
ROUNDS = 5
SLICE_S = 0.5
"""CPU seconds of each function in each round."""
BATCH_USERS = TOKENS_MAX
ORDERS = 4
"""Number of random orders of the hot users, used one after another."""
KEPT = 8
"""Rows per hot user in a batch; the runtime reads the newest two."""
ITEMS = 10_000
NAMES = ("click", "save", "hide")
START_MS = 1_700_000_000_000


def main(
    users: Annotated[int, typer.Option(min=BATCH_USERS, help="Hot users.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of weights and histories.")] = 1,
    histories: Annotated[int, typer.Option(min=1_000, help="Random histories to check parity on.")] = 100_000,
) -> None:
    """Measure the encoder runtime and print a table and one JSON line."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    rounds = [measure(REFERENCE, precision, users, seed, rng) for precision in precisions(REFERENCE)]
    for figures in rounds:
        show(figures)
    best = max(rounds, key=lambda figures: figures["updates"].cpu.median)
    fp32, bf16 = (
        [parity(*sized, p, seed) for sized in ((SMALL, histories), (REFERENCE, 1_000))] for p in precisions(SMALL)
    )
    print_result(
        {"bench": "encoder", "machine": machine()}
        | summary(best)
        | {
            "paper_size_fraction_of_products": round(fraction_at_paper_size(seed, rng).median, 3),
            "parity_fp32": max(difference for difference, _ in fp32),
            "parity_bf16_cosine": min(cosine for _, cosine in bf16),
            "histories": histories,
            "cache": str(best["precision"].cache),
            "seed": seed,
        }
    )


def precisions(config: EncoderConfig) -> list[Precision]:
    """Return what the settings fp32 and bf16 mean on this machine."""
    return [choose_precision("fp32", config.d_model), choose_precision("bf16", config.d_model)]


@dataclass(frozen=True, slots=True)
class Rate:
    """Users per second, one value per round."""

    cpu: Spread
    wall: Spread


Figures = dict[str, Any]
"""Rates by function, and what is needed to interpret them."""


def measure(config: EncoderConfig, precision: Precision, users: int, seed: int, rng: np.random.Generator) -> Figures:
    """Time the runtime and every baseline in interleaved rounds."""
    release = random_release(config, seed)
    hot = HotUsers(release, precision, users, rng)
    reference = HotUsers(release, precision, 2 * BATCH_USERS, rng, native=False)
    products = Products(release, precision.products)
    full = make_full(release, cache_bytes_max=1 << 30, precision=precision)
    cold = cold_users(rng, 4, config.sequence_length)
    functions: dict[str, Callable[[], int]] = {
        "updates": hot.step,
        "products": products.step,
        "reference": reference.step,
        "own full pass": lambda: len(full.embed(cold)),
        **{f"TransformerEncoder, {b} users": transformer_encoder(config, b) for b in (1, 4)},
        **{f"plain pass, {name}": plain_pass(config, dtype) for name, dtype in PLAIN.items()},
    }
    return time_in_rounds(functions) | {
        "precision": precision,
        "peak": max(peak_flops(precision.products) for _ in range(3)),
        "flops": products.flops + 4 * config.d_model * sum(config.windows),
    }


def cold_users(rng: np.random.Generator, users: int, length: int) -> SequenceBatch:
    """Return users with full sequences and without slots."""
    names = [b"cold-%d" % user for user in range(users)]
    counts = np.full(users, length, np.int64)
    return SequenceBatch(names, random_actions(rng, users * length), offsets_of(counts), counts, 0 * counts)


PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


def time_in_rounds(functions: dict[str, Callable[[], int]]) -> dict[str, Any]:
    """Return the rate of each function, which returns how many users it has served per call.

    In a round every function runs once, so that anything that slows the machine for a while slows all of them.
    """
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    for step in functions.values():
        step()
    for _ in range(ROUNDS):
        for name, step in functions.items():
            start, start_cpu, units = time.perf_counter(), time.process_time(), 0
            while time.process_time() - start_cpu < SLICE_S:
                units += step()
            cpu[name].append(units / (time.process_time() - start_cpu))
            wall[name].append(units / (time.perf_counter() - start))
    return {name: Rate(Spread(tuple(cpu[name])), Spread(tuple(wall[name]))) for name in functions}


class HotUsers:
    """Users with full rings in their slots, who act once each in random order.

    The rings begin with filler, because computing 20,000 sequences would take minutes and change no speed.
    """

    def __init__(
        self, release: Release, precision: Precision, users: int, rng: np.random.Generator, *, native: bool = True
    ) -> None:
        bytes_per_user = kernel_bytes(release, precision, native=native)
        kernel, slots = make_kernel(release, precision, users * bytes_per_user, native=native)
        fill(kernel, precision)
        self._names = [f"user-{number}".encode() for number in range(users)]
        self._counts = np.full(users, release.config.sequence_length, np.int64)
        table = SlotTable(slots)
        zeros = np.zeros(users, np.int64)
        table.seal(table.take(self._names), self._counts, zeros, zeros)
        self._runtime = IncrementalRuntime(
            release.version, release.config, ForwardPass(release, kernel, precision.products), table
        )
        self._actions = random_actions(rng, KEPT * BATCH_USERS)
        self._starts = np.arange(BATCH_USERS + 1) * KEPT
        self._revisions = np.zeros(BATCH_USERS, np.int64)
        self._turns = itertools.cycle(self._random_turns(rng))

    def _random_turns(self, rng: np.random.Generator) -> list[tuple[I64, list[bytes]]]:
        """Return the users of each step, for several random orders of all users, before any time is measured."""
        whole = len(self._names) // BATCH_USERS * BATCH_USERS
        orders = [rng.permutation(len(self._names))[:whole].reshape(-1, BATCH_USERS) for _ in range(ORDERS)]
        return [(users, [self._names[user] for user in users.tolist()]) for order in orders for users in order]

    def step(self) -> int:
        """Let the next users of a random order act once, embed them, and return their number."""
        users, names = next(self._turns)
        self._counts[users] += 1
        self._runtime.embed(SequenceBatch(names, self._actions, self._starts, self._counts[users], self._revisions))
        if self._runtime.prefills:
            raise RuntimeError("a hot user was computed from scratch, so the rates are not those of updates")
        return len(users)


def fill(kernel: Kernel, precision: Precision) -> None:
    """Fill every slab with the number 0.01."""
    if isinstance(kernel, NativeKernel):
        cells = np.float32(0.01) if precision.cache is torch.float32 else np.uint16(0x3C24)  # 0.01 as bfloat16
        kernel.slab[: kernel.slab.nbytes // 4 * 4].view(cells.dtype).fill(cells)
    elif isinstance(kernel, TorchKernel):
        for slab in (*kernel.keys, *kernel.values):
            slab.fill_(0.01)


def fraction_at_paper_size(seed: int, rng: np.random.Generator) -> Spread:
    """Return our rate divided by that of the bare products, at d 768 and 6 layers."""
    release = random_release(PAPER, seed)
    precision = precisions(PAPER)[-1]
    hot = HotUsers(release, precision, 4 * BATCH_USERS, rng)
    rates = time_in_rounds({"updates": hot.step, "products": Products(release, precision.products).step})
    return agreed_ratio(rates["updates"].cpu.values, rates["products"].cpu.values)


def random_release(config: EncoderConfig, seed: int) -> Release:
    """Return a release of random weights in which no residual branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    keys = np.sort(np.array([item_key(f"item-{number}") for number in range(ITEMS)], np.uint64))
    model = build_encoder(config, TrainedItems(ITEMS, config.item_dim), actions=len(NAMES), surfaces=0)
    initialize(model, generator)
    for block in model.layers:
        for linear in (block.out, block.down):
            nn.init.normal_(linear.weight, 0, linear.in_features**-0.5, generator=generator)
    return make_release(model, Vocabularies(keys, NAMES, ()), metrics={}, training={})


def random_actions(rng: np.random.Generator, count: int) -> Actions:
    """Return actions in event-time order, with gaps of 0.4 s to 2.5 h."""
    actions = np.zeros(count, ACTION_DTYPE)
    actions["item"] = [item_key(f"item-{number}") for number in rng.integers(0, ITEMS, count)]
    actions["action"] = [name_code(NAMES[number]) for number in rng.integers(0, len(NAMES), count)]
    actions["duration_ms"] = rng.integers(0, 60_000, count)
    actions["timestamp_ms"] = START_MS + np.cumsum(np.exp(rng.uniform(6, 16, count)).astype(np.int64))
    return actions


def parity(config: EncoderConfig, histories: int, precision: Precision, seed: int) -> tuple[float, float]:
    """Return the largest difference and the smallest cosine between incremental embeddings and full forward passes.

    Users append a few actions at a time, receive late ones, and evict each other, because there are slots for two
    thirds of them only. Every embedding of every round counts as one history.
    """
    rng = np.random.default_rng(seed)
    release = random_release(config, seed)
    users = min(300, histories // 4)
    slot_bytes = kernel_bytes(release, precision, native=True)
    runtime = make_incremental(release, cache_bytes_max=slot_bytes * (2 * users // 3), precision=precision)
    pool = random_actions(rng, 100_000)
    starts = rng.integers(0, len(pool) // 2, users)
    counts = rng.integers(1, 2 * config.sequence_length, users)
    revisions = np.zeros(users, np.int64)
    worst, least = 0.0, 1.0
    for _ in range(-(-histories // (users // 2))):
        some = rng.permutation(users)[: users // 2]
        counts[some] += rng.choice([0, 1, 1, 1, 2, 7], len(some))
        corrected = some[rng.random(len(some)) < 0.1]
        starts[corrected] += 1  # every kept action changes, as after a late event near the oldest
        revisions[corrected] += 1
        batch = kept_of(some, pool, starts, counts, revisions, config.sequence_length)
        ours, theirs = runtime.embed(batch), forward(release, batch)
        worst = max(worst, float(np.abs(ours - theirs).max()))
        least = min(least, float((ours * theirs).sum(axis=1).min()))
    if not (runtime.extensions and runtime.prefills):
        raise RuntimeError("the histories did not cover both cached and evicted users")
    return worst, least


def kept_of(some: I64, pool: Actions, starts: I64, counts: I64, revisions: I64, kept_max: int) -> SequenceBatch:
    """Return the newest `kept_max` actions of each user, whose actions are `counts` rows of the pool from `starts`."""
    kept = np.minimum(counts[some], kept_max)
    rows = suffixes(np.append(0, starts[some] + counts[some]), kept)
    names = [b"%d" % user for user in some.tolist()]
    return SequenceBatch(names, pool[rows], offsets_of(kept), counts[some], revisions[some])


@torch.inference_mode()
def forward(release: Release, batch: SequenceBatch) -> F32:
    """Return the model's own forward pass over all kept actions, [U, E]."""
    positions = sequence_positions(batch.starts, batch.counts)
    tokens = release.tokenizer.tokenize(batch.actions, batch.starts, positions)
    lengths = torch.from_numpy(np.diff(batch.starts))
    return release.model.embed(tokens.features(padded_rows(batch.starts)), lengths).numpy()


def summary(figures: Figures) -> dict[str, Any]:
    """Return the keys of the JSON line that come from the rounds."""
    updates, products = figures["updates"], figures["products"].cpu.values
    encoders = [name for name in figures if name.startswith("TransformerEncoder")]
    encoder = max((figures[name] for name in encoders), key=lambda rate: rate.cpu.median)
    plain = max((figures[f"plain pass, {name}"] for name in PLAIN), key=lambda rate: rate.cpu.median)
    ours = updates.cpu.values
    outside = Spread(tuple(1e6 / our - 1e6 / bare for our, bare in zip(ours, products, strict=True)))
    return {
        "updates_per_second": round(updates.wall.median),
        "updates_per_cpu_second": round(updates.cpu.median),
        "twin_updates_per_cpu_second": round(figures["reference"].cpu.median),
        "ratio_transformer_encoder": round(agreed_ratio(ours, encoder.cpu.values).median, 1),
        "ratio_own_full_pass": round(agreed_ratio(ours, figures["own full pass"].cpu.values).median, 1),
        "fraction_of_products": round(agreed_ratio(ours, products).median, 3),
        "fraction_of_peak": round(updates.cpu.median * figures["flops"] / figures["peak"], 3),
        "non_product_us": round(outside.median, 1),
        "prefill_ratio": round(agreed_ratio(figures["own full pass"].cpu.values, plain.cpu.values).median, 2),
    }


def show(figures: Figures) -> None:
    """Print the tables of one precision."""
    precision = figures["precision"]
    rates = {name: rate for name, rate in figures.items() if isinstance(rate, Rate)}
    print_table(
        f"one thread; products {precision.products}, cache {precision.cache}",
        ["users embedded", "per CPU second", "per second"],
        [[name, str(rate.cpu), str(rate.wall)] for name, rate in rates.items()],
    )
    print_table(
        "compared with the baselines",
        ["figure", "median"],
        [[name, f"{value:,}"] for name, value in summary(figures).items()],
    )
