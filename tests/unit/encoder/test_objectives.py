"""Objectives against a plain search over the actions of a user."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.features import padded_rows
from encoder.training.objectives import DAY_MS, ObjectiveConfig, Positives, make_pairs

SEED = 20_260_103


class Log:
    """A small random log with equal times, and a plain search for the positives after a row."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 30, 12)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.time_ms = np.concatenate([np.sort(rng.integers(0, 40, n)) * DAY_MS for n in lengths])
        self.is_positive = rng.random(len(self.time_ms)) < 0.4
        self.positives = Positives(starts=self.starts, time_ms=self.time_ms, is_positive=self.is_positive)

    def later(self, row: int) -> list[int]:
        """Return the user's positives in later rows."""
        stop = self.starts[np.searchsorted(self.starts, row, side="right")]
        return [r for r in range(row + 1, stop) if self.is_positive[r]]

    def within(self, row: int, days: int) -> list[int]:
        """Return the user's positives that are later by at most `days`."""
        stop_ms = self.time_ms[row] + days * DAY_MS
        return [r for r in self.later(row) if self.time_ms[row] < self.time_ms[r] <= stop_ms]


def pairs_of(log: Log, kind: str, **options: object) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the sequences of a log and the pairs (row, target row) of an objective."""
    config = ObjectiveConfig(shares={kind: 1.0}, window_days=7, **options)  # type: ignore[arg-type, dict-item]
    sequences = padded_rows(log.starts)
    pairs = make_pairs(sequences, log.positives, config, np.random.default_rng(SEED))
    rows = sequences[pairs.sequence, pairs.position]
    return sequences, list(zip(rows.tolist(), pairs.target.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_sasrec_predicts_the_next_positive_after_every_position(seed: int) -> None:
    """Each position with a later positive is paired with the first one; no other position is paired."""
    log = Log(seed)
    _, found = pairs_of(log, "sasrec")
    expected = [(row, log.later(row)[0]) for row in range(len(log.time_ms)) if log.later(row)]
    assert sorted(found) == expected


def test_next_action_predicts_after_the_newest_alone() -> None:
    """Only the newest action of a sequence is paired, with the next positive of the log."""
    log = Log(1)
    sequences = padded_rows(log.starts)
    cut = np.where(np.arange(sequences.shape[1]) < 5, sequences, -1)
    config = ObjectiveConfig(shares={"next_action": 1.0})
    pairs = make_pairs(cut, log.positives, config, np.random.default_rng(SEED))
    newest = [int(line[line >= 0][-1]) for line in cut if (line >= 0).any()]
    expected = [(row, log.later(row)[0]) for row in newest if log.later(row)]
    assert list(zip(cut[pairs.sequence, pairs.position].tolist(), pairs.target.tolist(), strict=True)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_dense_all_action_stays_in_its_window(seed: int) -> None:
    """Every position with a positive within the next 7 days gets exactly one of them."""
    log = Log(seed)
    _, found = pairs_of(log, "dense_all_action")
    assert sorted(row for row, _ in found) == [r for r in range(len(log.time_ms)) if log.within(r, 7)]
    assert all(target in log.within(row, 7) for row, target in found)


def test_dense_all_action_reaches_the_whole_window() -> None:
    """Over many draws, all positives of a window are drawn about equally often."""
    log = Log(2)
    row = max(range(len(log.time_ms)), key=lambda r: len(log.within(r, 7)))
    config = ObjectiveConfig(shares={"dense_all_action": 1.0}, window_days=7)
    rng = np.random.default_rng(SEED)
    drawn = [int(make_pairs(np.array([[row]]), log.positives, config, rng).target[0]) for _ in range(2_000)]
    counts = np.array([drawn.count(target) for target in log.within(row, 7)])
    assert counts.sum() == 2_000
    assert counts.min() > 2_000 / len(counts) * 0.7


def test_all_action_takes_the_window_of_the_newest_up_to_a_limit() -> None:
    """The newest action is paired with all positives of its window, or with `targets_max` distinct ones."""
    log = Log(2)
    sequences = padded_rows(log.starts)
    cut = np.where(np.arange(sequences.shape[1]) < 4, sequences, -1)
    for limit in (2, 32):
        config = ObjectiveConfig(shares={"all_action": 1.0}, window_days=7, targets_max=limit)
        pairs = make_pairs(cut, log.positives, config, np.random.default_rng(SEED))
        for line, rows in enumerate(cut):
            if not (rows >= 0).any():
                continue
            targets = pairs.target[pairs.sequence == line].tolist()
            window = log.within(int(rows[rows >= 0][-1]), 7)
            assert len(targets) == len(set(targets)) == min(limit, len(window))
            assert set(targets) <= set(window)


def test_sampled_positions_are_bounded() -> None:
    """With `positions_max`, a sequence has at most that many pairs, at distinct positions."""
    sequences, found = pairs_of(Log(3), "sasrec", positions_max=3)
    line = {int(row): number for number, rows in enumerate(sequences) for row in rows if row >= 0}
    counts = np.bincount([line[row] for row, _ in found])
    assert counts.max() == 3
    assert len({row for row, _ in found}) == len(found)


def test_a_mix_gives_each_sequence_one_objective() -> None:
    """With equal shares, about half of the sequences are trained on their newest position only."""
    log = Log(4)
    user = int(np.diff(log.starts).argmax())
    first = int(log.starts[user])
    sequences = np.tile(np.arange(first, log.later(first)[-1]), (1_000, 1))
    config = ObjectiveConfig(shares={"next_action": 0.5, "sasrec": 0.5})
    pairs = make_pairs(sequences, log.positives, config, np.random.default_rng(SEED))
    counts = np.bincount(pairs.sequence, minlength=1_000)
    assert set(counts) == {1, sequences.shape[1]}
    assert 400 < (counts == 1).sum() < 600
