"""RecTools in training, in the style of its documentation: one slice of steps for each line read.

    python rectools_train.py SPEC.json

The specification names a CSV (user, item, rank in time), the size, and the path: "sasrec" is `SASRecModel` under
Lightning, "flat" is `FlatSASRecNet` of `rectools.fast_transformers` with its own sequences, in a plain loop. After two
steps to warm up the script prints `ready`. For each line on standard input it trains the steps of one slice and prints
their targets, CPU seconds and wall seconds. It ends with the input.
"""

import json
import sys
import time
import warnings

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.fast_transformers import FlatSASRecNet, SequenceBatchDataset, build_sequences
from rectools.models import SASRecModel
from torch.nn import functional as F
from torch.utils.data import DataLoader

WARM_UP = 2


class Slices:
    """A gate before each step: it waits for a line at the end of a slice, and counts targets and seconds of a slice."""

    def __init__(self, steps):
        self.steps, self.done, self.targets = steps, -WARM_UP, 0

    def before_step(self, y):
        """Count the targets of a step; wait if a slice has just ended."""
        if self.done == 0:
            print("ready", flush=True)
            self.wait()
        elif self.done == self.steps:
            wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
            print(json.dumps({"targets": self.targets, "cpu_s": cpu, "wall_s": wall}), flush=True)
            self.wait()
        self.targets += int((y != 0).sum())
        self.done += 1

    def wait(self):
        """Wait for a line, then begin a slice; end the program with the input."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.done = self.targets = 0
        self.wall, self.cpu = time.perf_counter(), time.process_time()


class SlicesCallback(Callback):
    """The gate as a callback of Lightning."""

    def __init__(self, slices):
        self.slices = slices

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Pass the gate before a step."""
        self.slices.before_step(batch["y"])


def train_sasrec(spec, table, slices):
    """Train `SASRecModel` under Lightning."""
    interactions = pd.DataFrame(
        {
            Columns.User: table["user"],
            Columns.Item: table["item"],
            Columns.Weight: 1,
            Columns.Datetime: pd.to_datetime(table["rank"], unit="s"),
        }
    )

    def trainer():
        return Trainer(
            max_epochs=1_000,
            precision={"fp32": "32-true", "bf16": "bf16-mixed"}[spec["precision"]],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SlicesCallback(slices)],
        )

    model = SASRecModel(
        n_factors=spec["d_model"],
        n_heads=spec["heads"],
        n_blocks=spec["layers"],
        session_max_len=spec["length"],
        batch_size=spec["batch"],
        loss="softmax",
        get_trainer_func=trainer,
    )
    model.fit(Dataset.construct(interactions))


def train_flat(spec, table, slices):
    """Train `FlatSASRecNet` in a plain loop."""
    user, item, rank = (torch.from_numpy(table[name].to_numpy()) for name in ("user", "item", "rank"))
    x, y, items, _ = build_sequences(user, item, rank, max_len=spec["length"])
    net = FlatSASRecNet(
        len(items), spec["d_model"], spec["layers"], spec["heads"], session_max_len=spec["length"], dropout=0.2
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    loader = DataLoader(SequenceBatchDataset(x, y), batch_size=spec["batch"], shuffle=True)
    while True:
        for batch in loader:
            slices.before_step(batch["y"])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec["precision"] == "bf16"):
                logits = net(batch)
                loss = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten() - 1, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main():
    """Train as the specification says, slice by slice."""
    warnings.filterwarnings("ignore")
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    train = {"sasrec": train_sasrec, "flat": train_flat}[spec["path"]]
    train(spec, pd.read_csv(spec["csv"]), Slices(spec["steps"]))


if __name__ == "__main__":
    main()
