"""Sources of item vectors: a file, texts or training; and errors for files that do not match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from encoder.actions.columns import item_key
from encoder.distributed import ProcessGroup
from encoder.features import UNKNOWN
from encoder.items import FixedItems, ItemError, TextItems, text_grams
from encoder.training.run import make_trainer, train_release
from encoder.training.sources import make_items
from tests.unit.encoder.walks import small_recipe, walks

SEED = 20_260_605


def vectors_file(path: Path, items: int, dim: int = 32) -> np.ndarray:
    """Write random vectors of i0 to i{items - 1} as .npy, next to their ids."""
    vectors = np.random.default_rng(SEED).normal(size=(items, dim)).astype(np.float32)
    np.save(path, vectors)
    path.with_suffix(".ids.txt").write_text("\n".join(f"i{number}" for number in range(items)))
    return vectors


def test_vectors_of_a_file_are_served_unchanged(tmp_path: Path) -> None:
    """Training does not change vectors from a file, which are in key order; items without actions have theirs too."""
    given = vectors_file(tmp_path / "items.npy", 40)  # the log knows i0 to i29
    recipe = small_recipe(items={"source": "file", "path": str(tmp_path / "items.npy")})
    release = train_release(walks(SEED), recipe, out_dir=tmp_path / "release", threads=1)
    keys, served = release.item_vectors()
    assert len(keys) == 40
    place = {int(key): row for row, key in enumerate(keys)}
    assert all(np.array_equal(served[place[item_key(f"i{number}")]], given[number]) for number in range(40))


def test_safetensors_and_npy_give_the_same_items(tmp_path: Path) -> None:
    """Both file formats of vectors give the same vocabulary and table."""
    given = vectors_file(tmp_path / "items.npy", 30)
    keys = np.array([item_key(f"i{number}") for number in range(30)], np.uint64)
    save_file({"keys": keys, "vectors": given}, tmp_path / "items.safetensors")
    made = [
        make_items(walks(SEED), small_recipe(items={"source": "file", "path": str(tmp_path / name)}))
        for name in ("items.npy", "items.safetensors")
    ]
    (one, first), (other, second) = made
    assert isinstance(first, FixedItems)
    assert isinstance(second, FixedItems)
    assert np.array_equal(one.item_keys, other.item_keys)
    assert torch.equal(first.vectors, second.vectors)


def test_texts_make_vectors_of_items_without_an_action(tmp_path: Path) -> None:
    """An item with a text but no action is in the vocabulary, and training changes its vector through shared words."""
    lines = [
        "item_id,title",
        *(f"i{number},number {number} of the circle" for number in range(30)),
        "new,of the circle",
    ]
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    recipe = small_recipe(items={"source": "text", "path": str(tmp_path / "texts.csv"), "text_columns": ["title"]})
    trainer = make_trainer(walks(SEED), recipe, ProcessGroup())
    assert isinstance(trainer.model.items, TextItems)
    row = trainer.vocabularies.item_rows(np.array([item_key("new")], np.uint64))[0]
    assert row != UNKNOWN
    before = trainer.model.items.table()[row].detach().clone()
    trainer.train_step(next(trainer.batches()), 0.0)
    assert not torch.equal(trainer.model.items.table()[row], before)


def test_grams_share_what_texts_share() -> None:
    """Texts that differ in one word share the n-grams of the other words, in any case."""
    one, other = (set(text_grams(text).tolist()) for text in ("List open Files", "list open ports"))
    assert len(one & other) >= 8
    assert one != other


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        ("file", "absent.npy", None, "cannot be read"),
        ("file", "items.npy", "narrow", "set encoder.item_dim"),
        ("text", "absent.csv", None, "cannot be read"),
        ("text", "texts.csv", "id,title\na,b\n", "check the path and the columns"),
    ],
)
def test_sources_that_do_not_fit_say_so(
    tmp_path: Path, source: str, name: str, content: str | None, message: str
) -> None:
    """A missing file, a wrong width and a missing column give errors that name them and what to do."""
    if content == "narrow":
        vectors_file(tmp_path / name, 30, dim=8)
    elif content:
        (tmp_path / name).write_text(content)
    recipe = small_recipe(items={"source": source, "path": str(tmp_path / name), "text_columns": ["title"]})
    with pytest.raises(ItemError, match=message):
        make_items(walks(SEED), recipe)
