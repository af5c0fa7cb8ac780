"""Where features lie and how the model computes: with a GPU if there is one, and as far as it goes without."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schelix_scale.errors import ConfigError
from schelix_scale.model.streams import DualStream
from schelix_scale.training.batches import Batches
from schelix_scale.training.data import CachedFeatures, Cells
from schelix_scale.training.dist import ALONE, Ranks
from schelix_scale.training.expression import Expressed
from schelix_scale.training.loop import build_model, train
from schelix_scale.training.optimizer import make_optimizer, set_rate
from schelix_scale.training.step import ALIGN, REFINE, StepCells, StepLoss
from tests.training.tools import CONFIG, Cache, Counting, N, cached, logged, run, same_weights, training_in

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch sees none here")


def losses(folder: Path) -> np.ndarray:
    return np.array([e["validation_loss"] for e in logged(folder) if e["event"] == "evaluate"], float)


def test_features_kept_on_a_device_are_the_same() -> None:
    features, rows = cached(), np.array([5, 2, 2, 230])
    kept = features.kept_on(CPU)
    expressed = Expressed(np.ones((4, 6), np.float32), np.full((4, 5), 2, np.float32))
    for read in (None, expressed):
        found, expected = kept.cells(rows, CPU, read), features.cells(rows, CPU, read)
        for name in ("anchor", "variant", "batch"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert torch.equal(found.anchor[:, 0], torch.ones(4, 6))
    np.testing.assert_array_equal(found.anchor[:, 1:], features.anchor_nta[rows, 1:])
    np.testing.assert_array_equal(kept.resident[0][rows], features.anchor_nta[rows])
    assert features.nbytes == N * (3 * 6 * 4 + 3 * 5 * 4 + 8)


def test_features_stay_where_they_are_without_a_gpu() -> None:
    features = cached()
    assert features.on(CPU, "auto") is features
    with pytest.raises(ConfigError, match=r'train\.cache_device = "cuda": the model is on cpu'):
        features.on(CPU, "cuda")


def test_ranks_share_threads_and_take_a_gpu_each() -> None:
    assert [Ranks(rank, 3, rank, 3).threads(8) for rank in range(3)] == [2, 2, 2]
    assert Ranks(1, 2, 1, 2).threads(1) == 1
    assert Ranks().device("cuda:1") == torch.device("cuda:1")
    alone_on_its_machine = Ranks(1, 2, 0, 1)
    for ranks in (Ranks(), alone_on_its_machine):  # torch refuses to work on a GPU without its number
        assert ranks.device("cuda") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"device=mps: 2 ranks train on CPUs or on CUDA GPUs"):
        alone_on_its_machine.device("mps")
    assert Ranks(1, 2, 1, 2).device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"2 ranks need a GPU each\. Use device=cuda"):
        Ranks(1, 2, 1, 2).device("cuda:0")
    with pytest.raises(ConfigError, match=r"99 ranks need a GPU each, and there are \d+ here. Start fewer"):
        Ranks(1, 99, 1, 99).device("cuda")


def test_bfloat16_learns_nearly_the_same(tmp_path: Path) -> None:
    whole, _, _ = run(tmp_path / "float32")
    half, _, _ = run(tmp_path / "bfloat16", precision="bfloat16")
    assert not same_weights(whole, half)
    np.testing.assert_allclose(losses(tmp_path / "bfloat16"), losses(tmp_path / "float32"), rtol=0.02)
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit._script")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit._script")
def test_a_compiled_model_learns_the_same(tmp_path: Path) -> None:
    changed = {"align_steps": 7, "refine_steps": 7}
    run(tmp_path / "plain", **changed)
    run(tmp_path / "compiled", compile=True, **changed)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_gpu_learns_what_a_cpu_does(tmp_path: Path, where: str) -> None:
    run(tmp_path / "cpu")
    cache = Cache(cached())
    training = training_in(tmp_path / "gpu", cache, CONFIG.model_copy(update={"cache_device": where}))
    training = replace(training, device=Ranks().device("cuda"))
    train(training, cache.reopen("first"), Counting())
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=1e-3)


@needs_gpu
@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu() -> None:
    device = Ranks().device("cuda")
    resident = cached().on(device, "auto")
    assert resident.resident is not None
    assert resident.resident[0].is_cuda
    for phase, features in [(ALIGN, resident), (REFINE, resident), (REFINE, cached())]:
        model = build_model(features, CONFIG, 0).to(device)
        step = Step(model, phase)
        step(ready(features, phase, device))  # the first one makes the state of the optimiser
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(ready(features, phase, device))
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Step:
    """A step of a phase as `Phase.run` makes it."""

    def __init__(self, model: DualStream, phase: str) -> None:
        self.loss, self.optimizer = StepLoss(model, phase, CONFIG, ALONE), make_optimizer(model, phase == ALIGN, CONFIG)

    def __call__(self, cells: StepCells, watched: AbstractContextManager[object] | None = None) -> None:
        with watched or nullcontext():
            loss = self.loss(cells)
        set_rate(self.optimizer, 0.3)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()


def ready(features: CachedFeatures, phase: str, device: torch.device) -> StepCells:
    return Batches(features, device, ALONE, phase, 6, None, 0.5).cells(np.arange(47), [1])


class FromNowhere(TorchDispatchMode):
    """Notes tensors that no operation has made and that are none of the known: copied from the host, as by a wait."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known, self.found = list(known), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        self.found += [str(func) for part in given if not any(part is known for known in self.known)]
        made = func(*args, **(kwargs or {}))
        self.known += [part for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
        return made


@pytest.mark.parametrize("phase", [ALIGN, REFINE])
def test_a_step_never_asks_what_a_tensor_holds(phase: str) -> None:
    """It runs on tensors that hold nothing: whoever asks for a number, or which are true, would wait for a GPU."""
    meta, features = torch.device("meta"), cached()
    on_cpu = ready(features, phase, CPU)
    own, other = (
        Cells(cells.anchor.to(meta), cells.variant.to(meta), cells.batch.to(meta))
        for cells in (on_cpu.own, on_cpu.other)
    )
    model = build_model(features, CONFIG, 0).to(meta)
    step = Step(model, phase)
    known = [*model.parameters(), *model.buffers()]
    watched = FromNowhere(
        known + [part for cells in (own, other) for part in (cells.anchor, cells.variant, cells.batch)]
    )
    step(StepCells(own, other, on_cpu.total), watched)
    assert watched.found == []
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        float(step.loss(StepCells(own, other, on_cpu.total)))
