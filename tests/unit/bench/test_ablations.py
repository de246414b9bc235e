"""The ablation tables: masked features have no influence, SASRec has its own data and loss, differences are paired."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
import typer
from torch import Tensor

from encoder.data.log import ActionLog, LogColumns, log_from_table
from encoder.data.split import make_split
from encoder.evaluation.queries import embeddings_after
from encoder.features import Tokens
from encoder.model import EncoderConfig
from encoder.training.objectives import make_pairs
from encoder.training.recipe import ItemConfig, Recipe
from encoder.training.run import train_release
from infra.bench.training.ablation_tables import LEFT_OUT, Table, features, rows_of, sasrec
from infra.bench.training.ablation_trainer import Ablation, AblationTrainer, last_actions, train, without
from infra.bench.training.ablations import AblationScores, evaluator_of, main, measured, seed_numbers, summary
from tests.unit.encoder.test_model import STREAMING, WINDOW, random_actions, random_model, vocabularies
from tests.unit.encoder.walks import small_recipe, walks, walks_table

SEED = 20_261_128
COLUMNS = Tokens.__slots__


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe(tokens: int = 800) -> Recipe:
    """Return a small recipe with a leave-one-out split."""
    loss = {"kind": "sampled", "random_negatives": 8, "batch_negatives_max": 8, "log_q": "exact"}
    return small_recipe(budget={"tokens_max": tokens}, split={"kind": "leave_one_out"}, loss=loss)


def table_of_everything() -> pa.Table:
    """Return walks with two action types, two languages and durations."""
    table, rng = walks_table(SEED, users=20, items=30, length=20, follows=0.9), np.random.default_rng(SEED)
    seconds = pa.array(table["timestamp_ms"].to_numpy() // 1_000)
    return (
        table.drop_columns(["action"])
        .append_column("action", pa.array(rng.choice(["view", "save"], table.num_rows)))
        .append_column("language", pa.array(rng.choice(["en", "de"], table.num_rows)))
        .append_column("duration_ms", pa.array(rng.integers(1, 60_000, table.num_rows)))
        .append_column("timestamp", seconds)
    )


def embeddings(config: EncoderConfig, tokens: Tokens) -> Tensor:
    """Return the embeddings of two users with 9 and 21 actions, by a random encoder."""
    return embeddings_after(random_model(config), tokens, np.array([0, 9, 30]), np.array([8, 29]))


def some_tokens(*, slower_ms: int = 0) -> Tokens:
    """Return 30 actions of two users, with `slower_ms` added to every gap."""
    actions = random_actions(30, np.random.default_rng(SEED))
    actions["timestamp_ms"] += np.arange(30) * slower_ms
    return ActionLog(np.array(["a", "b"]), np.array([0, 9, 30]), actions, (), (), np.array([])).tokens(vocabularies())


def changed(tokens: Tokens, column: str) -> Tokens:
    """Return the tokens with other values in one column; ids stay within their vocabulary."""
    values = getattr(tokens, column)
    return replace(tokens, **{column: np.roll(values, 1) if column in ("item", "action", "surface") else 2 * values})


@pytest.mark.parametrize("masked", [(), *LEFT_OUT.values()], ids=["all features", *LEFT_OUT])
def test_an_embedding_depends_on_all_features_but_those_left_out(masked: tuple[str, ...]) -> None:
    """Changing one column changes the embeddings if and only if the column is not masked."""
    config, tokens = replace(STREAMING, time_bias=False, read_out=False), some_tokens()
    before = embeddings(config, without(tokens, masked))
    for column in COLUMNS:
        after = embeddings(config, without(changed(tokens, column), masked))
        assert torch.equal(before, after) == (column in masked), column


def test_without_any_time_the_order_alone_is_left() -> None:
    """With all times masked, other times in the same order give the same embeddings; the gap or the clock would not."""
    config = replace(STREAMING, time_bias=False, read_out=False)
    both = (some_tokens(), some_tokens(slower_ms=1_234_567))
    for name in ("any time", "the gap", "the clock"):
        masked = LEFT_OUT[name]
        equal = torch.equal(*(embeddings(config, without(tokens, masked)) for tokens in both))
        assert equal == (name == "any time"), name


def test_sasrec_sees_items_alone_and_in_order() -> None:
    """The SASRec row depends on the items and on no other column; its positions are indices, not a column."""
    masked, tokens = sasrec(recipe())["SASRec, binary cross-entropy"].masked, some_tokens()
    before = embeddings(WINDOW, without(tokens, masked))
    for column in COLUMNS:
        after = embeddings(WINDOW, without(changed(tokens, column), masked))
        assert torch.equal(before, after) == (column != "item"), column


@pytest.mark.parametrize("name", ["all features", "without the clock"])
def test_training_and_evaluation_mask_the_same_feature(name: str) -> None:
    """If all times are shifted by days, weights and query vectors stay the same only without the clock."""
    log = walks(SEED, users=20, length=20)
    later = replace(log, actions=log.actions.copy())
    later.actions["timestamp_ms"] += np.arange(20).repeat(20) * 7_654_321_000
    ablation = features(recipe(), log)[name]
    splits = [make_split(each, ablation.recipe.split, seed=SEED) for each in (log, later)]
    one, other = (train(split.train, ablation, torch.float32) for split in splits)
    equal = name == "without the clock"
    assert torch.equal(one.model.project.weight, other.model.project.weight) == equal
    assert torch.equal(*(evaluator_of(split, one).query_vectors(one.model) for split in splits)) == equal


def test_a_plain_ablation_is_trained_like_a_release(tmp_path: Path) -> None:
    """An ablation that only sets a recipe ends with the weights of `train_release`, to the last bit."""
    log, plain = walks(SEED, users=20, length=20), recipe()
    released = train_release(log, plain, out_dir=tmp_path, threads=1).model.state_dict()
    trained = train(make_split(log, plain.split, seed=plain.seed).train, Ablation(plain), torch.float32)
    for name, values in trained.model.state_dict().items():
        assert torch.equal(values, released[name]), name


def test_masking_changes_neither_targets_nor_times() -> None:
    """Masked columns are constant for the encoder; items and times for everything else are those of the log."""
    trainer = AblationTrainer(walks(SEED), Ablation(recipe(), masked=("item", "time_ms", "gap_ms")), torch.float32)
    seen = trainer.tokens_of_log.features(np.arange(9))
    assert len(seen.time_ms.unique()) == len(seen.item.unique()) == len(seen.gap_ms.unique()) == 1
    log = walks(SEED)
    np.testing.assert_array_equal(trainer.tokens_of_log.time_ms, log.actions["timestamp_ms"])
    np.testing.assert_array_equal(trainer.tokens_of_log.item, trainer.vocabularies.item_rows(log.actions["item"]))


def test_only_what_the_log_has_is_left_out() -> None:
    """A log with one action type and neither surfaces nor durations has no row for them."""
    everything = log_from_table(table_of_everything(), LogColumns(surface="language", duration_ms="duration_ms"))
    assert list(features(recipe(), everything)) == ["all features", *(f"without {name}" for name in LEFT_OUT)]
    absent = {"without action type", "without surface", "without duration"}
    assert set(features(recipe(), everything)) - set(features(recipe(), walks(SEED))) == absent


def test_sasrec_is_trained_on_the_last_actions_in_one_piece() -> None:
    """With `last=7`, every sequence of an epoch is the last seven of one user's 20 actions."""
    log = walks(SEED, users=20, length=20)
    assert np.diff(last_actions(log, 7).starts).tolist() == [7] * 20
    np.testing.assert_array_equal(last_actions(log, 7).actions[:7], log.actions[13:20])
    trainer = AblationTrainer(log, Ablation(recipe(), last=7), torch.float32)
    epoch = np.concatenate(list(takewhile(lambda _: trainer.epoch == 0, trainer.batches())))
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 140, 7))
    np.testing.assert_array_equal(epoch[:, :7] - epoch[:, :1], np.tile(np.arange(7), (20, 1)))
    assert (epoch[:, 7:] == -1).all()


def test_binary_cross_entropy_by_hand() -> None:
    """The loss is -log sigma(positive) - log(1 - sigma(negative)) per pair; an item acted on is not a negative."""
    log = walks(SEED, users=5, length=15)
    plain = replace(recipe(), loss=replace(recipe().loss, equal_users=False))
    trainer = AblationTrainer(log, Ablation(plain, binary=True), torch.float32)
    rows = next(trainer.batches())
    pairs = make_pairs(rows, trainer.positives, plain.objective, np.random.default_rng(SEED))
    users = torch.randn(len(pairs.target), 32, generator=torch.Generator().manual_seed(SEED)) * 9
    loss = trainer.pooled_loss(users, pairs, np.random.default_rng(SEED))
    table, item = trainer.model.item_embeddings().detach(), trainer.tokens_of_log.item
    negatives = np.random.default_rng(SEED).integers(1, len(table), len(pairs.target))
    total, left_out = 0.0, 0
    for user, target, negative in zip(users, pairs.target, negatives, strict=True):
        total -= math.log(torch.sigmoid(user @ table[int(item[target])]))
        owner = target // 15
        if negative in item[owner * 15 : owner * 15 + 15]:
            left_out += 1
        else:
            total -= math.log(1 - torch.sigmoid(user @ table[int(negative)]))
    assert 0 < left_out < len(negatives)
    assert loss.item() == pytest.approx(total / len(pairs.target), rel=1e-4)


def test_from_sasrec_to_streaming_one_thing_changes_at_a_time() -> None:
    """Each row differs from the one before in only one of loss, data, initial items, inputs and encoder."""
    begun = replace(recipe(), items=ItemConfig("trained", "cooccurrence"))
    parts = [
        {name: getattr(row, name) for name in ("binary", "last", "masked")} | asdict(row.recipe)
        for row in sasrec(begun).values()
    ]
    changes = [[name for name in one if one[name] != other[name]] for one, other in itertools.pairwise(parts)]
    assert changes == [["binary"], ["loss"], ["last"], ["items"], ["masked"], ["encoder"]]


@pytest.mark.parametrize("table", [Table.OBJECTIVES, Table.NEGATIVES, Table.SASREC, Table.ENCODERS])
def test_every_row_of_a_table_trains_and_is_compared(table: Table) -> None:
    """Every row of a table gets its figures, and the first row differs from itself by zero."""
    log = walks(SEED, users=20, length=20)
    figures = measured(log, table, recipe(400), [1, 2], torch.float32)
    assert list(figures) == list(rows_of(table, recipe(400), log))
    for number, each in enumerate(figures.values()):
        assert 0 <= each["ndcg10"] <= each["hr10"] <= 1
        assert 0 < each["p90_coverage10"] <= 1
        assert len(each["difference_of_seeds"]) == 2
        if number == 0:
            assert each["difference"] == each["standard_error"] == 0


def test_the_command_ends_with_its_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command reads a log in the format of tldr-pages, uses languages as surfaces, and ends with the JSON line."""
    pyarrow.csv.write_csv(table_of_everything().drop_columns(["timestamp_ms"]), tmp_path / "log.csv")
    main(Table.FEATURES, tokens=300, seeds="1,2", log=tmp_path / "log.csv")
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (result["bench"], result["table"], result["seeds"]) == ("variants", "features", [1, 2])
    assert {"all features", "without surface", "without any time"} <= set(result)
    assert "without duration" not in result


def test_differences_are_paired_by_seed_and_query() -> None:
    """Two seeds and four queries: mean differences 1, 0, -0.5 and 0, hence 0.125, with their deviation over sqrt(4)."""
    first = [AblationScores(np.array(hits), 0.1, 0.5) for hits in ([0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0])]
    other = [AblationScores(np.array(hits), 0.3, 0.7) for hits in ([1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0])]
    result = summary(other, first)
    assert result["hr10"] == 0.5
    assert result["difference"] == 0.125
    assert result["standard_error"] == pytest.approx(np.std([1, 0, -0.5, 0], ddof=1) / 2)
    assert result["difference_of_seeds"] == [0.25, 0.0]


def test_seeds_are_whole_numbers() -> None:
    """Seeds are separated by commas, with or without spaces; anything else is rejected."""
    assert seed_numbers("1, 2,30") == [1, 2, 30]
    for wrong in ("", "1,,2", "-1", "one"):
        with pytest.raises(typer.BadParameter, match="whole numbers"):
            seed_numbers(wrong)
