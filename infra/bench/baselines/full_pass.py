"""The weights of a release in torch's own encoder: one full pass over the kept actions per embedding.

Rotation, windows and time bias are left out, because `nn.TransformerEncoder` has none; each key/value head is copied
for every query head that shares it. Input features and head are those of the release.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from encoder.actions.columns import ACTION_DTYPE, item_key, name_code
from encoder.features import padded_rows, sequence_positions
from encoder.release import load_release
from infra.bench.encoder.baselines import torch_encoder

torch.set_num_threads(1)


class FullPass:
    """An encoder that embeds one user at a time."""

    def __init__(self):
        self.release = load_release(Path(os.environ["RELEASE"]))
        config, model = self.release.config, self.release.model
        self.encoder = torch_encoder(config)
        for mine, theirs in zip(self.encoder.layers, model.layers, strict=True):
            take(mine, theirs)
        self.mask = nn.Transformer.generate_square_subsequent_mask(config.sequence_length)

    @torch.inference_mode()
    def embed(self, kept):
        """Return the embedding, little-endian float32, of a full sequence of `row`s."""
        actions = np.array([tuple(row) + (0,) * (len(ACTION_DTYPE) - len(row)) for row in kept], ACTION_DTYPE)
        starts = np.array([0, len(kept)], np.int64)
        positions = sequence_positions(starts, np.array([len(kept)], np.int64))
        features = self.release.tokenizer.tokenize(actions, starts, positions).features(padded_rows(starts))
        hidden = self.encoder(self.release.model.inputs(features), mask=self.mask, is_causal=True)
        return self.release.model.head(hidden[:, -1])[0].numpy().tobytes()


def row(action):
    """Return the part of an action that a baseline keeps: the fields of `ACTION_DTYPE` that features are made of."""
    values = {
        "item": item_key(action["item_id"]),
        "action": name_code(action["action"]),
        "surface": name_code(action["surface"]),
        "timestamp_ms": action["timestamp_ms"],
        "duration_ms": action["duration_ms"],
    }
    return [values.get(name, 0) for name in ACTION_DTYPE.names]


@torch.no_grad()
def take(mine, theirs):
    """Copy a block's weights into a `TransformerEncoderLayer`."""
    heads, kv_heads, size = theirs.heads, theirs.kv_heads, theirs.head_dim
    for name in ("weight", "bias"):
        q, k, v = getattr(theirs.qkv, name).unflatten(0, (-1, size)).split([heads, kv_heads, kv_heads])
        shared = [part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v)]
        getattr(mine.self_attn, f"in_proj_{name}").copy_(torch.cat([q, *shared]).flatten(0, 1))
    pairs = (
        (mine.self_attn.out_proj, theirs.out),
        (mine.linear1, theirs.up),
        (mine.linear2, theirs.down),
        (mine.norm1, theirs.norm_attention),
        (mine.norm2, theirs.norm_ffn),
    )
    for ours, other in pairs:
        ours.load_state_dict(other.state_dict())
