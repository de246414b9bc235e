"""The MovieLens comparison: when a stored release is used again, and the error of a paired difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from encoder.evaluation.next_item import Scores
from encoder.release import make_release
from encoder.training.recipe import LogConfig, parse_recipe, read_recipe
from infra.bench.training.ml1m import RUNS, Evaluated, paired, same
from tests.unit.encoder.test_model import STREAMING, random_model, vocabularies


def evaluated(ranks: list[int]) -> Evaluated:
    """Return the evaluation of a random release with the given ranks."""
    release = make_release(random_model(STREAMING), vocabularies(), metrics={}, training={})
    return Evaluated("one", release, Scores.of(np.array(ranks)), None)


def test_a_stored_release_is_used_only_if_its_recipe_is_the_same() -> None:
    """Recipes that differ only in the path of the log are the same; another seed, budget or size is not."""
    recipe = read_recipe(RUNS / "ml1m_streaming.toml")
    assert same(recipe, replace(recipe, log=LogConfig(path="elsewhere.parquet")))
    assert not same(recipe, replace(recipe, seed=recipe.seed + 1))
    assert not same(recipe, parse_recipe({}))


def test_both_recipes_have_one_budget_and_size() -> None:
    """The recipes of the window and the streaming encoder differ only in the encoder, with the same width and depth."""
    one, other = (read_recipe(RUNS / f"ml1m_{name}.toml") for name in ("streaming", "window"))
    assert one.encoder.d_model == other.encoder.d_model
    assert len(one.encoder.windows) == len(other.encoder.windows)
    assert replace(one, encoder=other.encoder) == other


def test_a_paired_difference_by_hand() -> None:
    """Hits 1, 1, 0, 0 against 1, 0, 0, 1 differ by 0, 1, 0, -1: the mean is 0, the standard error sqrt(2/3) / 2."""
    result = paired(evaluated([0, 3, 10, 99]), evaluated([9, 10, 11, 1]))
    assert result["difference"] == 0
    assert result["standard_error"] == pytest.approx((2 / 3) ** 0.5 / 2)
