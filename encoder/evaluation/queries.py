"""User embeddings as of given actions of a log: the input of every evaluation.

Shapes: N actions of a log, U users, Q queries, L actions of a sequence, B sequences of a batch, D model, E embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from encoder.arrays import I64
from encoder.features import Tokens, padded_rows
from encoder.model import AnyEncoder, StreamingEncoder, newest

BATCH_TOKENS = 16_384
"""Maximum number of padded tokens per batch."""


@torch.inference_mode()
def embeddings_after(model: AnyEncoder, tokens: Tokens, starts: I64, rows: I64, since_ms: I64 | None = None) -> Tensor:
    """Return, for each of `rows` [Q] of a log, its user's embedding [Q, E] when that row was the newest action.

    `since_ms` [Q], if given, is the time from that action to the request; it is applied by the read-out. The model
    computes on its own device and the result is on the CPU.
    """
    hidden = torch.empty(len(rows), model.config.d_model, device=model.device)  # [Q, D]
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
    """Fill `hidden` [Q, D] with one pass per queried user, because outputs of a streaming encoder never change.

    The pass over a user begins where the receptive field of the first queried row begins:

        user's rows    . . . . f . . . . q . . . q . . q . . .
                               |<-field->|             |
                               first                   last        hidden of every q comes from this one pass
    """
    user = np.searchsorted(starts, rows, side="right") - 1  # [Q]
    queried, inverse = np.unique(user, return_inverse=True)  # [S] distinct users; rows[i] is of queried[inverse[i]]
    last, first = np.zeros(len(queried), np.int64), np.full(len(queried), np.iinfo(np.int64).max)
    np.maximum.at(last, inverse, rows)
    np.minimum.at(first, inverse, rows)
    first = np.maximum(starts[queried], first + 1 - model.config.receptive_field)
    order = np.argsort(last - first, kind="stable")  # [S] users by length, so that batches have little padding
    rank = np.empty(len(queried), np.int64)  # [S] inverse permutation: rank[order[i]] = i
    rank[order] = np.arange(len(queried))
    lengths = (last - first + 1)[order]
    for begin, end in _batches(lengths):
        members = order[begin:end]  # [B]
        at = np.arange(int(lengths[end - 1]))  # [L]
        matrix = np.where(at < lengths[begin:end, None], first[members, None] + at, -1)  # [B, L]
        out = model(tokens.features(matrix).to(model.device), torch.from_numpy(lengths[begin:end]))  # [B, L, D]
        here = np.flatnonzero((rank[inverse] >= begin) & (rank[inverse] < end))  # queries of this batch
        sequence, position = rank[inverse[here]] - begin, rows[here] - first[inverse[here]]
        hidden[here] = out[torch.from_numpy(sequence), torch.from_numpy(position)]


def _fill_window(hidden: Tensor, model: AnyEncoder, tokens: Tokens, starts: I64, rows: I64) -> None:
    """Fill `hidden` [Q, D] with one pass per query over its last M actions."""
    user = np.searchsorted(starts, rows, side="right") - 1
    lengths = np.minimum(rows + 1 - starts[user], model.config.sequence_length)  # [Q]
    order = np.argsort(lengths, kind="stable")
    for begin, end in _batches(lengths[order]):
        members = order[begin:end]  # [B]
        # The sequences one after another: sequence b owns bounds[b]:bounds[b + 1] of `flat`, which ends at its row.
        bounds = np.concatenate([[0], np.cumsum(lengths[members])])  # [B + 1]
        shift = np.repeat(rows[members] + 1 - lengths[members] - bounds[:-1], lengths[members])
        flat = np.arange(bounds[-1]) + shift  # rows of the log
        at = padded_rows(bounds)  # [B, L] indices into `flat`, -1 for padding
        matrix = np.where(at >= 0, flat[at], -1)
        sizes = torch.from_numpy(lengths[members]).to(model.device)
        out = model(tokens.features(matrix).to(model.device), sizes)  # [B, L, D]
        hidden[torch.from_numpy(members)] = newest(out, sizes)


class NewestRows:
    """Finds each user's newest row before a time.

    User and time are packed into one ascending column, user * span + (time - origin), so that one `searchsorted`
    answers all queries.
    """

    def __init__(self, starts: I64, time_ms: I64) -> None:
        self._starts, self._origin = starts, int(time_ms.min(initial=0))
        self._span = int(time_ms.max(initial=0)) - self._origin + 2
        user = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        self._keys = user * self._span + (time_ms - self._origin)  # [N]

    def before(self, user: I64, time_ms: I64) -> I64:
        """Return the newest row [Q] of each user [Q] with an event time below `time_ms` [Q]; -1 if there is none.

        >>> NewestRows(np.array([0, 2, 3]), np.array([10, 20, 15])).before(np.array([0, 0, 1]), np.array([20, 99, 15]))
        array([ 0,  1, -1])
        """
        time = np.clip(time_ms - self._origin, 0, self._span - 1)  # stays within the keys of the user
        rows = np.searchsorted(self._keys, user * self._span + time) - 1
        return np.where(rows >= self._starts[user], rows, -1)


def _batches(lengths: I64) -> list[tuple[int, int]]:
    """Return the bounds of groups of ascending lengths, each within `BATCH_TOKENS` padded tokens or of one sequence."""
    bounds, begin = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - begin) * int(lengths[end]) > BATCH_TOKENS:
            bounds.append((begin, end))
            begin = end
    return bounds


def items_before(tokens: Tokens, starts: I64, rows: I64) -> tuple[I64, I64]:
    """Return pairs (query, item row), by query: the items in the history of each row's user up to and including it.

    rows = [4, 9], of users that start at 2 and 7:    query 0 0 0 1 1 1
                                                      at    2 3 4 7 8 9
    """
    user = np.searchsorted(starts, rows, side="right") - 1
    lengths = rows + 1 - starts[user]  # [Q]
    query = np.repeat(np.arange(len(rows)), lengths)
    at = np.arange(len(query)) - np.repeat(np.cumsum(lengths) - lengths - starts[user], lengths)
    return query, tokens.item[at]
