"""Training on a CUDA device: placement is tested with simulated tensors, results with a real GPU if there is one.

Other tests compare trainings bit by bit, which only CPUs reproduce: on a machine with a GPU, run those with
CUDA_VISIBLE_DEVICES="".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encoder.data.split import make_split
from encoder.distributed import ProcessGroup, join_process_group
from encoder.evaluation.next_item import NextItemEvaluator, known_items
from encoder.hardware import CPU, DeviceError
from encoder.release import load_release
from encoder.training import trainer as trainer_module
from encoder.training.checkpoint import TrainingState, save_checkpoint
from encoder.training.recipe import Recipe
from encoder.training.run import make_trainer, train_release
from encoder.training.sources import make_items
from encoder.training.trainer import Trainer
from tests.unit.encoder.walks import small_recipe, walks

SEED = 20_261_128
CUDA = torch.device("cuda", 0)
SAMPLED = {"kind": "sampled", "random_negatives": 16, "batch_negatives_max": 8}
STREAMING = small_recipe(
    encoder={"time_bias": True, "read_out": True, "item_tower": "mlp"}, loss=SAMPLED, optimizer={"dropout": 0.2}
)
WINDOW = small_recipe(encoder={"kind": "window", "windows": [20, 20], "time_bias": False}, optimizer={"dropout": 0.2})
both = pytest.mark.parametrize("recipe", [STREAMING, WINDOW], ids=["streaming, sampled", "window, full"])


class OneDeviceOnly(TorchDispatchMode):
    """Rejects operations on tensors of two devices; Torch itself allows some, slowly, such as indexing from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        devices = {each.device for each in given if each.dim()}
        assert len(devices) < 2, f"{func} on {devices}"
        return func(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate a CUDA device, on which tensors have shapes but no values."""

    class Generator(torch.Generator):
        def __new__(cls, device: object = CPU) -> Any:
            return super().__new__(cls)

    def build(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return build_encoder(*args, **kwargs)

    build_encoder = trainer_module.build_encoder
    monkeypatch.setattr(trainer_module, "build_encoder", build)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def backward(loss: Tensor) -> None:
    """Do the work of autograd's engine, which would query the driver of the GPU even for simulated tensors."""
    pending: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    while pending:
        node = max(pending, key=lambda each: each._sequence_nr())
        gradients = pending.pop(node)
        if hasattr(node, "variable"):
            node.variable.grad = gradients[0]
            continue
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        result = call(*(gradients.get(index) for index in range(len(node._input_metadata))))
        results = result if isinstance(result, tuple) else (result,)
        for (following, index), gradient in zip(node.next_functions, results, strict=False):
            if following is not None and gradient is not None:
                like, known = following._input_metadata[index], pending.setdefault(following, {})
                gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                known[index] = known[index] + gradient if index in known else gradient


def simulated(recipe: Recipe, precision: torch.dtype) -> Trainer:
    """Return a trainer on the simulated device."""
    log = walks(SEED, users=8, length=24)
    with unset_fake_temporarily():
        vocabularies, items = make_items(log, recipe)
    return Trainer(log, recipe, vocabularies, items, group=ProcessGroup(device=CUDA), precision=precision)


def losses(trainer: Trainer, steps: int) -> list[float]:
    """Return the losses of the first steps."""
    return [trainer.train_step(rows, 0.0) for rows, _ in zip(trainer.batches(), range(steps), strict=False)]


@both
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("gpu")
def test_a_step_runs_on_its_device(recipe: Recipe, precision: torch.dtype) -> None:
    """Forward, loss, backward and optimizer use tensors of one device only and do not synchronize before the end."""
    trainer, computed = simulated(recipe, precision), []
    trainer.model.head.down.register_forward_hook(lambda module, given, out: computed.append(out.dtype))
    with OneDeviceOnly(), pytest.raises(DataDependentOutputException):
        trainer.train_step(next(trainer.batches()), 0.0)  # only float(loss) asks for a value
    assert computed == [precision]
    for parameter in (*trainer.model.parameters(), trainer.log_scale):
        assert parameter.device == CUDA
        assert trainer.optimizer.state[parameter]["exp_avg"].device == CUDA


@both
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("gpu")
def test_results_are_on_the_cpu(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Embeddings, item vectors and all tensors of a checkpoint are on the CPU, also if the model is on a GPU."""
    trainer, saved = simulated(recipe, torch.float32), []
    split = make_split(walks(SEED, users=8, length=24), recipe.split, seed=1)
    evaluator = NextItemEvaluator(split.log, trainer.vocabularies, split.validation, mask_seen=False)
    assert evaluator.query_vectors(trainer.model, time_given=recipe.encoder.read_out).device == CPU
    assert known_items(trainer.model).device == CPU
    with pytest.raises(DataDependentOutputException):
        trainer.train_step(next(trainer.batches()), 0.0)
    monkeypatch.setattr(torch, "save", lambda content, path: (saved.append(content), path.touch()))
    save_checkpoint(tmp_path, trainer, TrainingState(best_weights=trainer.model.state_dict()), "of")
    tensors = [each for each in tree_leaves(saved) if isinstance(each, Tensor)]
    assert len(tensors) > 4 * len(list(trainer.model.parameters()))
    assert {each.device for each in tensors} == {CPU}


def test_each_process_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process with local rank n uses device n, or the CPU without devices; a surplus process is rejected."""
    taken: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", taken.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert join_process_group() == ProcessGroup(device=CUDA)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert join_process_group() == ProcessGroup(3, 4, torch.device("cuda", 1))
    assert taken == [0, 1, "nccl"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match="process 3 of this machine finds 2 CUDA devices"):
        join_process_group()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert join_process_group() == ProcessGroup(3, 4, CPU)
    assert taken[3:] == ["gloo"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path) -> None:
    """Without dropout, the first losses on a GPU equal those on the CPU up to rounding, and the release is as good."""
    log, recipe = walks(SEED), small_recipe(encoder={"read_out": True}, loss=SAMPLED)
    cpu, gpu = (losses(make_trainer(log, recipe, group), 20) for group in (ProcessGroup(), ProcessGroup(device=CUDA)))
    assert gpu == pytest.approx(cpu, rel=1e-2)
    release = train_release(log, replace(recipe, precision="auto"), out_dir=tmp_path, threads=1)
    assert release.training["device"] == torch.cuda.get_device_name(0)
    assert release.metrics["validation_hr10"] > 0.8
    assert load_release(tmp_path).version == release.version
