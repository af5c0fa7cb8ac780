from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schelix_scale.errors import TrainingError
from schelix_scale.training.checkpoint import (
    TrainState,
    checkpoint_name,
    clear_checkpoints,
    final_checkpoint,
    latest_checkpoint,
    save_checkpoint,
)


def state_at(phase: int, step: int) -> TrainState:
    """A state whose every number tells where it belongs."""
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(100 * phase + step)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    torch.autograd.backward(layer(torch.ones(4, 3)).sum())
    optimizer.step()
    weights = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    best = {name: value + 1 for name, value in weights.items()}
    return TrainState(phase, step, f"op-{phase}", 0.1 * step, 2, weights, best, optimizer.state_dict())


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(same, one, two))
    return one == two


def check(found: TrainState | None, phase: int, step: int) -> None:
    assert found is not None
    assert same(vars(found), vars(state_at(phase, step)))


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_at(1, 250), "abc")
    assert path.is_dir()
    check(latest_checkpoint(tmp_path, "abc"), 1, 250)
    assert not list(tmp_path.rglob("*.partial*"))


def test_states_without_an_optimizer_or_a_loss(tmp_path: Path) -> None:
    state = state_at(0, 0)
    state.optimizer, state.best_loss = None, float("inf")
    save_checkpoint(tmp_path, state, "abc")
    found = latest_checkpoint(tmp_path, "abc")
    assert found is not None
    assert same(vars(found), vars(state))


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none", "abc") is None
    with pytest.raises(TrainingError, match="is damaged or of another training"):
        final_checkpoint(tmp_path / checkpoint_name(2, 0), "abc")


@pytest.mark.parametrize(
    "order", [[(0, 50), (0, 100), (0, 1000)], [(0, 999_950), (1, 0)], [(0, 400), (1, 50), (1, 100), (2, 0)]]
)
def test_the_newest_counts_and_two_are_kept(tmp_path: Path, order: list[tuple[int, int]]) -> None:
    for count, (phase, step) in enumerate(order, 1):
        path = save_checkpoint(tmp_path, state_at(phase, step), "abc")
        check(latest_checkpoint(tmp_path, "abc"), phase, step)
        assert path.is_dir()
        assert len(list(tmp_path.iterdir())) == min(count, 2)


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(0, 50), "abc")
    again = state_at(0, 50)
    again.stale = 7
    save_checkpoint(tmp_path, again, "abc")
    found = latest_checkpoint(tmp_path, "abc")
    assert found is not None
    assert found.stale == 7


def spoil(path: Path, how: str) -> None:
    file = path / "state.pt"
    content = file.read_bytes()
    match how:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "zeros":
            file.write_bytes(bytes(len(content)))
        case "text":
            file.write_text("not a checkpoint\n")
        case _:
            file.write_bytes(content[: int(float(how) * len(content))])


TORN = ["missing", "empty", "zeros", "0.1", "0.5", "0.9", "0.999"]


@pytest.mark.parametrize("how", [*TORN, "text"])
def test_a_spoiled_checkpoint_gives_way_to_the_one_before(tmp_path: Path, how: str) -> None:
    save_checkpoint(tmp_path, state_at(0, 50), "abc")
    newest = save_checkpoint(tmp_path, state_at(0, 100), "abc")
    check(final_checkpoint(newest, "abc"), 0, 100)
    spoil(newest, how)
    check(latest_checkpoint(tmp_path, "abc"), 0, 50)
    with pytest.raises(TrainingError, match="is damaged or of another training"):
        final_checkpoint(newest, "abc")


@pytest.mark.parametrize("how", TORN)
def test_nothing_readable_is_nothing(tmp_path: Path, how: str) -> None:
    spoil(save_checkpoint(tmp_path, state_at(0, 50), "abc"), how)
    assert latest_checkpoint(tmp_path, "abc") is None


def test_checkpoints_of_another_training_are_passed_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_at(0, 50), "abc")
    save_checkpoint(tmp_path, state_at(1, 0), "xyz")
    check(latest_checkpoint(tmp_path, "abc"), 0, 50)
    check(latest_checkpoint(tmp_path, "xyz"), 1, 0)
    assert latest_checkpoint(tmp_path, "ab") is None


def test_checkpoints_of_another_training_do_not_push_ours_out(tmp_path: Path) -> None:
    """A finished training's checkpoints lie there, settings change, the new training starts over in its folder."""
    save_checkpoint(tmp_path, state_at(1, 400), "abc")
    save_checkpoint(tmp_path, state_at(2, 0), "abc")
    clear_checkpoints(tmp_path)
    assert save_checkpoint(tmp_path, state_at(0, 50), "xyz").is_dir()
    check(latest_checkpoint(tmp_path, "xyz"), 0, 50)
