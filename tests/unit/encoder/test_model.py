"""The encoders: causality, padding, positions, windows, and incremental computation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from encoder.actions.columns import ACTION_DTYPE, Actions, item_key, name_code
from encoder.attention import attend, log_minutes, rope_at, time_bias
from encoder.features import Features, Tokenizer, Vocabularies, padded_rows, sequence_positions
from encoder.items import TrainedItems
from encoder.model import AnyEncoder, EncoderConfig, StreamingEncoder, TimeEncoding, build_encoder, initialize

SEED = 20_260_101
ITEMS, ACTIONS, SURFACES = 50, ("save", "click"), ("home",)
STREAMING = EncoderConfig(
    d_model=32, heads=4, kv_heads=2, windows=(5, 7), embedding_dim=16, item_dim=12, sequence_length=24, read_out=True
)
WINDOW = EncoderConfig(
    kind="window",
    d_model=32,
    heads=4,
    kv_heads=4,
    windows=(24, 24),
    embedding_dim=16,
    item_dim=12,
    sequence_length=24,
    time_bias=False,
)
both = pytest.mark.parametrize("config", [STREAMING, WINDOW], ids=["streaming", "window"])


def vocabularies() -> Vocabularies:
    """Return a small vocabulary."""
    keys = np.sort(np.array([item_key(str(i)) for i in range(ITEMS)], np.uint64))
    return Vocabularies(keys, ACTIONS, SURFACES)


def random_model(config: EncoderConfig) -> AnyEncoder:
    """Return an encoder with all parameters random, so that no effect is hidden by weights initialized to zero."""
    generator = torch.Generator().manual_seed(SEED)
    model = build_encoder(config, TrainedItems(ITEMS, config.item_dim), actions=len(ACTIONS), surfaces=len(SURFACES))
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def random_actions(count: int, rng: np.random.Generator) -> Actions:
    """Return `count` random actions in the order of their times."""
    actions = np.zeros(count, ACTION_DTYPE)
    keys = vocabularies().item_keys
    actions["item"] = rng.choice(keys, count)
    actions["action"] = rng.choice([name_code(name) for name in ACTIONS], count)
    actions["surface"] = rng.choice([0, name_code("home")], count)
    actions["timestamp_ms"] = 1_700_000_000_000 + np.cumsum(rng.exponential(1e6, count) ** 1.3).astype(np.int64)
    actions["duration_ms"] = rng.integers(0, 60_000, count)
    return actions


def batch(sequences: list[Actions], firsts: list[int] | None = None) -> tuple[Features, Tensor]:
    """Return the padded features and lengths of several sequences; `firsts` are the positions of their first rows."""
    lengths = np.array([len(s) for s in sequences])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    counts = lengths + np.array(firsts or [0] * len(sequences))
    tokens = Tokenizer(vocabularies()).tokenize(np.concatenate(sequences), starts, sequence_positions(starts, counts))
    return tokens.features(padded_rows(starts)), torch.from_numpy(lengths)


def run(model: AnyEncoder, features: Features, lengths: Tensor) -> Tensor:
    """Return the outputs at every position."""
    out: Tensor = model.head(model(features, lengths))
    return out


@both
def test_no_earlier_output_changes_with_a_later_action(config: EncoderConfig) -> None:
    """Changing a later action, or one of its columns, leaves earlier outputs identical."""
    rng = np.random.default_rng(SEED)
    model = random_model(config)
    actions = random_actions(20, rng)
    whole = run(model, *batch([actions]))
    changed = actions.copy()
    changed[12:] = random_actions(8, rng)
    changed["timestamp_ms"][12:] = actions["timestamp_ms"][12:]  # the window encoder reads the newest action's time
    assert torch.equal(run(model, *batch([changed]))[:, :12], whole[:, :12])
    assert not torch.allclose(run(model, *batch([changed]))[:, 12:], whole[:, 12:], atol=1e-3)


def test_streaming_outputs_do_not_depend_on_later_times() -> None:
    """In the streaming encoder, the time of a later action does not change an earlier output either."""
    rng = np.random.default_rng(SEED)
    model = random_model(STREAMING)
    actions = random_actions(20, rng)
    changed = actions.copy()
    changed["timestamp_ms"][12:] += 86_400_000
    assert torch.equal(run(model, *batch([changed]))[:, :12], run(model, *batch([actions]))[:, :12])


@both
def test_padding_and_company_change_nothing(config: EncoderConfig) -> None:
    """A user's embedding is the same alone and in a padded batch of others, to 1e-6."""
    rng = np.random.default_rng(SEED)
    model = random_model(config)
    sequences = [random_actions(n, rng) for n in (3, 24, 1, 17)]
    together = model.embed(*batch(sequences))
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(model.embed(*batch([sequence]))[0], together[row], rtol=0, atol=1e-6)


def test_only_the_receptive_field_matters() -> None:
    """The newest embedding depends on each of the last `receptive_field` actions, and on no other."""
    rng = np.random.default_rng(SEED)
    model = random_model(STREAMING)
    field = STREAMING.receptive_field
    assert field == 11
    actions = random_actions(24, rng)
    expected = model.embed(*batch([actions], [100]))
    older = actions.copy()
    older[: 24 - field - 1] = random_actions(24 - field - 1, rng)
    older["timestamp_ms"] = actions["timestamp_ms"]
    torch.testing.assert_close(model.embed(*batch([older], [100])), expected, rtol=0, atol=1e-6)
    tail = actions[-field - 1 :]
    torch.testing.assert_close(model.embed(*batch([tail], [100 + 24 - len(tail)])), expected, rtol=0, atol=1e-5)
    inside = actions.copy()
    inside["item"][-field] = next(key for key in vocabularies().item_keys if key != actions["item"][-field])
    assert not torch.allclose(model.embed(*batch([inside], [100])), expected, atol=1e-6)


def step_by_step(model: StreamingEncoder, features: Features) -> Tensor:
    """Compute embeddings one token at a time; each layer keeps lists of its keys, values and times."""
    caches: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in model.layers]
    outputs = []
    for at in range(features.item.shape[1]):
        token = Features(*(getattr(features, name)[:, at : at + 1] for name in Features.__slots__))
        x = model.inputs(token)
        rope = rope_at(token.position, model.config.head_dim)
        for block, cache in zip(model.layers, caches, strict=True):
            q, k, v = block.project(x, rope)
            cache.append((k, v, token.time_ms))
            keys, values, times = (torch.cat(column, dim=1) for column in zip(*cache[-block.window :], strict=True))
            mask = torch.ones(1, 1, 1, keys.shape[1], dtype=torch.bool)
            if block.slope is not None:
                mask = time_bias(block.slope, token.time_ms, times)
            x = block.finish(x, attend(q, keys, values, mask))
        outputs.append(model.head(x))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("first", [0, 5_000_000])
@pytest.mark.parametrize("bias", [True, False])
def test_token_by_token_equals_the_full_pass(bias: bool, first: int) -> None:
    """Token by token over cached keys and values gives the embeddings of a full pass to 1e-5."""
    rng = np.random.default_rng(SEED)
    config = replace(STREAMING, time_bias=bias)
    model = random_model(config)
    assert isinstance(model, StreamingEncoder)
    features, lengths = batch([random_actions(24, rng), random_actions(24, rng)], [first, first])
    torch.testing.assert_close(step_by_step(model, features), run(model, features, lengths), rtol=0, atol=1e-5)


def test_rope_depends_on_distance_only() -> None:
    """Adding 10,000,000 to all positions changes the streaming embedding by at most 1e-5."""
    rng = np.random.default_rng(SEED)
    model = random_model(STREAMING)
    actions = random_actions(20, rng)
    torch.testing.assert_close(
        model.embed(*batch([actions], [10_000_000])), model.embed(*batch([actions], [0])), rtol=0, atol=1e-5
    )


def test_time_bias_only_takes_away_and_learns() -> None:
    """The event-time bias is 0 at distance 0, grows with distance, is never positive, and has a gradient."""
    times = torch.tensor([0, 60_000, 3_600_000])
    bias = time_bias(torch.zeros(2), times, times)
    assert bias.shape == (2, 3, 3)
    assert bias.max() == 0
    assert math.isclose(bias[0, 2, 0].item(), -math.log(2) * math.log(61), rel_tol=1e-5)
    assert log_minutes(times, times)[0, 2] == 0
    model = random_model(STREAMING).requires_grad_(True)
    model.embed(*batch([random_actions(20, np.random.default_rng(SEED))]))[0, 0].backward()  # type: ignore[no-untyped-call]
    assert all(block.slope is not None and block.slope.grad is not None for block in model.layers)
    assert model.layers[0].slope.grad.abs().sum() > 0  # type: ignore[union-attr]


@both
def test_training_in_bfloat16_attends_alike(config: EncoderConfig) -> None:
    """Under autocast, attention uses other operations and gives the float32 result up to rounding."""
    model, rng = random_model(config), np.random.default_rng(SEED)
    lengths = [20, 3, 24]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    actions = np.concatenate([random_actions(length, rng) for length in lengths])
    tokens = Tokenizer(vocabularies()).tokenize(actions, starts, sequence_positions(starts, np.array(lengths)))
    features, sizes = tokens.features(padded_rows(starts)), torch.tensor(lengths)
    whole = model(features, sizes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(features, sizes).float()
    for row, length in enumerate(lengths):
        cosines = torch.cosine_similarity(whole[row, :length], rounded[row, :length], dim=-1)
        assert float(cosines.min()) > 0.999


def test_time_encoding_is_finite_and_exact_in_float32() -> None:
    """The encoding is finite at 0 and distinguishes epoch times a quarter of a period apart, to 1e-5."""
    encoding = TimeEncoding((900_000.0,)).requires_grad_(False)
    assert torch.isfinite(encoding(torch.zeros(1, dtype=torch.int64))).all()
    now = 1_700_000_100_000
    at = encoding(torch.tensor([now, now + 225_000]))
    phase = 2 * math.pi * ((now / 900_000) % 1)
    expected = torch.tensor([[math.cos(phase), math.sin(phase)], [-math.sin(phase), math.cos(phase)]])
    torch.testing.assert_close(at[:, :2], expected, rtol=0, atol=1e-5)


def test_read_out_enters_after_the_last_layer() -> None:
    """The read-out depends on the hidden state and the time since, and is the identity after initialization."""
    config = STREAMING
    model = build_encoder(config, TrainedItems(ITEMS, 12), actions=2, surfaces=1)
    initialize(model, torch.Generator().manual_seed(SEED))
    assert isinstance(model, StreamingEncoder)
    hidden = torch.randn(4, config.d_model)
    assert torch.equal(model.read_out(hidden, torch.tensor([0, 1, 10_000, 86_400_000])), hidden)
    model = random_model(config)
    assert isinstance(model, StreamingEncoder)
    assert not torch.allclose(model.read_out(hidden, torch.tensor(0)), model.read_out(hidden, torch.tensor(60_000)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "multiple of twice the heads"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"windows": (20, 20)}, "sum to at most M"),
        ({"windows": (24,)}, "one action more"),
        ({"windows": ()}, "one entry"),
        ({"item_tower": "identity"}, "needs V = E"),
        ({"kind": "window"}, "windows are M"),
    ],
)
def test_a_configuration_that_cannot_work_is_rejected(change: dict[str, object], message: str) -> None:
    """An inconsistent configuration raises an error that names the reason."""
    with pytest.raises(ValueError, match=message):
        replace(STREAMING, **change)  # type: ignore[arg-type]
