"""Embeddings as they stood after given actions of a log: what every evaluation asks for.

Shapes: Q queries, L actions, E embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import I64
from encoder.features import Tokens, padded_rows
from encoder.model import AnyEncoder, StreamingEncoder, newest

BATCH_TOKENS = 16_384


@torch.inference_mode()
def embeddings_after(model: AnyEncoder, tokens: Tokens, starts: I64, rows: I64, since_ms: I64 | None = None) -> Tensor:
    """[Q, E]: for each row of the log, the embedding of its user when that row was the newest action.

    `since_ms` [Q], where given, is the time from that action to the request and goes through the read-out. Computed
    where the model is; what is returned is on the CPU.
    """
    hidden = torch.empty(len(rows), model.config.d_model, device=model.device)
    if isinstance(model, StreamingEncoder):
        _fill_streaming(hidden, model, tokens, starts, rows)
    else:
        _fill_window(hidden, model, tokens, starts, rows)
    if since_ms is not None:
        assert isinstance(model, StreamingEncoder)
        hidden = model.read_out(hidden, torch.from_numpy(since_ms).to(model.device))
    embedded = torch.cat([model.head(part) for part in torch.split(hidden, BATCH_TOKENS)]) if len(rows) else hidden
    return embedded.cpu()


def _fill_streaming(hidden: Tensor, model: StreamingEncoder, tokens: Tokens, starts: I64, rows: I64) -> None:
    """One pass over each asked user's history gives all of its positions, for what was computed never changes.

    It begins as far before the first asked row as that row can see.
    """
    user = np.searchsorted(starts, rows, side="right") - 1
    asked, inverse = np.unique(user, return_inverse=True)
    last, first = np.zeros(len(asked), np.int64), np.full(len(asked), np.iinfo(np.int64).max)
    np.maximum.at(last, inverse, rows)
    np.minimum.at(first, inverse, rows)
    first = np.maximum(starts[asked], first + 1 - model.config.receptive_field)
    order = np.argsort(last - first, kind="stable")
    place = np.empty(len(asked), np.int64)
    place[order] = np.arange(len(asked))
    lengths = (last - first + 1)[order]
    for begin, end in _batches(lengths):
        members = order[begin:end]
        at = np.arange(int(lengths[end - 1]))
        matrix = np.where(at < lengths[begin:end, None], first[members, None] + at, -1)
        out = model(tokens.features(matrix).to(model.device), torch.from_numpy(lengths[begin:end]))
        mine = np.flatnonzero((place[inverse] >= begin) & (place[inverse] < end))
        line = place[inverse[mine]] - begin
        hidden[mine] = out[torch.from_numpy(line), torch.from_numpy(rows[mine] - first[inverse[mine]])]


def _fill_window(hidden: Tensor, model: AnyEncoder, tokens: Tokens, starts: I64, rows: I64) -> None:
    """Each query is a pass of its own over its last M actions."""
    user = np.searchsorted(starts, rows, side="right") - 1
    lengths = np.minimum(rows + 1 - starts[user], model.config.sequence_length)
    order = np.argsort(lengths, kind="stable")
    for begin, end in _batches(lengths[order]):
        members = order[begin:end]
        bounds = np.concatenate([[0], np.cumsum(lengths[members])])
        shift = np.repeat(rows[members] + 1 - lengths[members] - bounds[:-1], lengths[members])
        flat = np.arange(bounds[-1]) + shift
        at = padded_rows(bounds)
        matrix = np.where(at >= 0, flat[at], -1)
        sizes = torch.from_numpy(lengths[members]).to(model.device)
        out = model(tokens.features(matrix).to(model.device), sizes)
        hidden[torch.from_numpy(members)] = newest(out, sizes)


class NewestRows:
    """Finds each user's newest row before a time; users and times are packed into one sorted column."""

    def __init__(self, starts: I64, time_ms: I64) -> None:
        self._starts, self._origin = starts, int(time_ms.min(initial=0))
        self._span = int(time_ms.max(initial=0)) - self._origin + 2
        user = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        self._keys = user * self._span + (time_ms - self._origin)

    def before(self, user: I64, time_ms: I64) -> I64:
        """[Q] the newest row of each user with an event time below the given one, -1 where there is none."""
        time = np.clip(time_ms - self._origin, 0, self._span - 1)
        rows = np.searchsorted(self._keys, user * self._span + time) - 1
        return np.where(rows >= self._starts[user], rows, -1)


def _batches(lengths: I64) -> list[tuple[int, int]]:
    """Bounds of groups of ascending lengths within `BATCH_TOKENS` padded tokens, at least one each."""
    bounds, begin = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - begin) * int(lengths[end]) > BATCH_TOKENS:
            bounds.append((begin, end))
            begin = end
    return bounds


def items_before(tokens: Tokens, starts: I64, rows: I64) -> tuple[I64, I64]:
    """Pairs (query, item row) of the known items in each row's user's history up to and with that row, by query."""
    user = np.searchsorted(starts, rows, side="right") - 1
    lengths = rows + 1 - starts[user]
    query = np.repeat(np.arange(len(rows)), lengths)
    at = np.arange(len(query)) - np.repeat(np.cumsum(lengths) - lengths - starts[user], lengths)
    return query, tokens.item[at]
