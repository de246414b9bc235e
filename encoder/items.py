"""Item vectors: trained in place, read from a file, or computed from the text of the items.

All three are modules with one interface: `forward(rows [...]) -> [..., V]` and `table() -> [I + 1, V]`. Row 0 is a
learned vector that all unknown items share. A release stores only the table, so serving is always a lookup.

Shapes: I items, V item vector, G n-grams of all texts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from xxhash import xxh3_64_intdigest

from encoder.actions.columns import item_key
from encoder.arrays import F32, I64, U64
from encoder.errors import StreamformerError

Keys = U64

TEXT_BUCKETS = 1 << 16
"""Number of rows of the hashed n-gram table (ItemSage also hashes its tokens: arXiv 2205.11728)."""


class ItemError(StreamformerError):
    """Item vectors or texts that cannot be used; the text says why and what to do."""


class TrainedItems(nn.Module):
    """One trained vector per known item, and row 0 for the unknown ones."""

    def __init__(self, items: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(items + 1, dim))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors [..., V] of item rows [...]."""
        return F.embedding(rows, self.weight)

    def table(self) -> Tensor:
        """Return the table [I + 1, V]."""
        return self.weight


class FixedItems(nn.Module):
    """Vectors that training does not change (such as PinSage); only the unknown row is trained."""

    vectors: Tensor

    def __init__(self, vectors: F32) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.from_numpy(np.ascontiguousarray(vectors, np.float32)))
        self.unknown = nn.Parameter(torch.zeros(1, vectors.shape[1]))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors [..., V] of item rows [...]."""
        return F.embedding(rows, self.table())

    def table(self) -> Tensor:
        """Return the table [I + 1, V]."""
        return torch.cat([self.unknown, self.vectors])


class TextItems(nn.Module):
    """Vectors computed from the hashed n-grams of an item's text, with a learned importance per n-gram.

    vector = sum over the n-grams g of the text: sigmoid(importance_g) * weight_g / sqrt(number of n-grams)
    """

    grams: Tensor
    offsets: Tensor

    def __init__(self, texts: Sequence[str], dim: int) -> None:
        super().__init__()
        grams = [text_grams(text) for text in texts]
        ends = np.cumsum([0, 0] + [len(g) for g in grams])  # row 0 has no text: its vector is `unknown`
        self.register_buffer("grams", torch.from_numpy(np.concatenate([*grams, np.zeros(0, np.int64)])))
        self.register_buffer("offsets", torch.from_numpy(ends))
        self.weight = nn.Parameter(torch.zeros(TEXT_BUCKETS, dim))
        self.importance = nn.Parameter(torch.zeros(TEXT_BUCKETS, 1))
        self.unknown = nn.Parameter(torch.zeros(1, dim))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors [..., V] of item rows [...]."""
        return F.embedding(rows, self.table())

    def table(self) -> Tensor:
        """Return the table [I + 1, V]."""
        weights = torch.sigmoid(F.embedding(self.grams, self.importance)).squeeze(-1)  # [G]
        total = F.embedding_bag(
            self.grams,
            self.weight,
            self.offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
        counts = (self.offsets[1:] - self.offsets[:-1]).unsqueeze(-1)  # [I + 1, 1] n-grams of each item
        has_text = (counts > 0).to(total.dtype)
        return total / counts.clamp(min=1).sqrt() + (1 - has_text) * self.unknown


ItemVectors = TrainedItems | FixedItems | TextItems


def text_grams(text: str) -> I64:
    """Return the hash buckets of the words, word pairs and character trigrams of a text, in lower case."""
    words = re.findall(r"\w+", text.lower())
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    trigrams = [f"#{padded[i : i + 3]}" for padded in (f"^{w}$" for w in words) for i in range(len(padded) - 2)]
    return np.array([xxh3_64_intdigest(gram.encode()) % TEXT_BUCKETS for gram in (*words, *pairs, *trigrams)], np.int64)


def read_vectors(path: Path) -> tuple[Keys, F32]:
    """Read strictly increasing keys [I] and vectors [I, V] from a file. Raises `ItemError`.

    The file is either `x.safetensors` with the tensors `vectors` [I, V] and `keys` [I] (unsigned 64-bit), or `x.npy`
    [I, V] next to `x.ids.txt` with one item id per line.
    """
    keys, vectors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npy(path)
    if vectors.ndim != 2 or len(keys) != len(vectors):
        raise ItemError(f"item vectors do not match their ids: {len(keys)} ids, shape {vectors.shape}; rewrite {path}")
    if not np.isfinite(vectors).all():
        raise ItemError(f"item vectors are not finite: {path}; remove the rows with NaN or infinity")
    order = np.argsort(keys)
    keys, vectors = keys[order], vectors[order].astype(np.float32)
    if (keys[1:] == keys[:-1]).any():
        raise ItemError(f"an item id occurs twice in {path}; keep one row per item")
    return keys, vectors


def _read_safetensors(path: Path) -> tuple[Keys, F32]:
    try:
        tensors = load_file(path)
        return tensors["keys"].astype(np.uint64), tensors["vectors"]
    except Exception as error:
        raise ItemError(f"item vectors cannot be read: {path} ({error}); it needs tensors keys and vectors") from error


def _read_npy(path: Path) -> tuple[Keys, F32]:
    try:
        ids = path.with_suffix(".ids.txt").read_text(encoding="utf-8").splitlines()
        vectors: F32 = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ItemError(f"item vectors cannot be read: {path} ({error}); it needs a .npy and an .ids.txt") from error
    return np.array([item_key(text) for text in ids], np.uint64), vectors


def texts_by_key(texts: Mapping[str, str], keys: Keys) -> list[str]:
    """Return the text of each key, in order; empty if `texts` (item id -> text) has none."""
    by_key = {item_key(item): text for item, text in texts.items()}
    return [by_key.get(int(key), "") for key in keys]
