from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from schelix_scale.errors import RunError, TrainingError
from schelix_scale.training.checkpoint import (
    TrainState,
    checkpoint_name,
    clear_checkpoints,
    final_checkpoint,
    latest_checkpoint,
    newest,
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
    assert sorted(file.name for file in path.iterdir()) == ["state.pt", "state.sha256"]
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
    "order",
    [
        [(0, 50), (0, 100), (0, 1000)],
        [(0, 999_950), (0, 1_000_000)],
        [(0, 999_950), (1, 0)],
        [(0, 400), (1, 50), (1, 100), (2, 0)],
    ],
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
        case "a bit":  # of a weight: torch reads the file and says nothing
            at = content.index(state_at(0, 100).model["bias"].numpy().tobytes())
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        case "no checksum":
            (path / "state.sha256").unlink()
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


TORN = ["missing", "no checksum", "empty", "zeros", "0.1", "0.5", "0.9", "0.999"]


@pytest.mark.parametrize("how", [*TORN, "text", "a bit"])
def test_a_spoiled_checkpoint_gives_way_to_the_one_before(tmp_path: Path, how: str) -> None:
    save_checkpoint(tmp_path, state_at(0, 50), "abc")
    newest = save_checkpoint(tmp_path, state_at(0, 100), "abc")
    check(final_checkpoint(newest, "abc"), 0, 100)
    spoil(newest, how)
    check(latest_checkpoint(tmp_path, "abc"), 0, 50)
    with pytest.raises(TrainingError, match="is damaged or of another training"):
        final_checkpoint(newest, "abc")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_torn_checkpoint_that_was_passed_over_does_not_push_good_ones_out(tmp_path: Path, keep: int) -> None:
    save_checkpoint(tmp_path, state_at(0, 50), "abc")
    spoil(save_checkpoint(tmp_path, state_at(0, 100), "abc"), "0.5")
    for step in (60, 70):
        save_checkpoint(tmp_path, state_at(0, step), "abc", keep)
        check(latest_checkpoint(tmp_path, "abc"), 0, step)
    assert len(list(tmp_path.iterdir())) == keep


@pytest.mark.parametrize("how", TORN)
def test_nothing_readable_is_nothing(tmp_path: Path, how: str) -> None:
    spoil(save_checkpoint(tmp_path, state_at(0, 50), "abc"), how)
    assert latest_checkpoint(tmp_path, "abc") is None


def test_a_checkpoint_that_was_not_published_is_none(tmp_path: Path) -> None:
    """A kill leaves a partial folder behind: whole or not, it is not read, and does not count as one of the last."""
    for step in (50, 100):
        save_checkpoint(tmp_path, state_at(0, step), "abc")
    shutil.copytree(tmp_path / checkpoint_name(0, 100), tmp_path / f"{checkpoint_name(0, 150)}.partial")
    shutil.rmtree(tmp_path / checkpoint_name(0, 100))
    check(latest_checkpoint(tmp_path, "abc"), 0, 50)
    assert newest(tmp_path) == tmp_path / checkpoint_name(0, 50)
    save_checkpoint(tmp_path, state_at(0, 200), "abc")
    check(latest_checkpoint(tmp_path, "abc"), 0, 200)
    assert (tmp_path / checkpoint_name(0, 50)).is_dir()


def test_a_disk_that_does_not_answer_is_no_torn_checkpoint(tmp_path: Path) -> None:
    """Else training would begin anew, and remove days of work, because a file server was away for a moment."""
    save_checkpoint(tmp_path, state_at(0, 50), "abc")
    file = save_checkpoint(tmp_path, state_at(0, 100), "abc") / "state.pt"
    file.unlink()
    file.symlink_to(file)  # reading it fails with an errno that does not say that it is not there
    with pytest.raises(RunError, match=r"step-00-000100 cannot be read \(.*If that passes, run the same command again"):
        latest_checkpoint(tmp_path, "abc")


def test_checkpoints_of_the_format_before_are_read(tmp_path: Path) -> None:
    folder = tmp_path / checkpoint_name(2, 0)
    folder.mkdir()
    torch.save({"format": 2, "fingerprint": "abc", **vars(state_at(2, 0))}, folder / "state.pt")
    check(latest_checkpoint(tmp_path, "abc"), 2, 0)
    check(final_checkpoint(folder, "abc"), 2, 0)


@pytest.mark.parametrize("version", [1, 4])
def test_checkpoints_of_other_formats_are_not(tmp_path: Path, version: int) -> None:
    folder, said = tmp_path / checkpoint_name(0, 50), []
    folder.mkdir()
    torch.save({"format": version, "fingerprint": "abc", **vars(state_at(0, 50))}, folder / "state.pt")
    assert latest_checkpoint(tmp_path, "abc", said.append) is None
    assert said == [f"the checkpoint {folder} has format {version}, this version of schelix reads 3; it is passed over"]


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)


def test_nothing_is_executed_when_a_checkpoint_is_read(tmp_path: Path) -> None:
    folder = tmp_path / checkpoint_name(0, 50)
    folder.mkdir()
    content = {"format": 2, "fingerprint": "abc", **vars(state_at(0, 50)), "optimizer": Evil(tmp_path / "done")}
    torch.save(content, folder / "state.pt")
    assert latest_checkpoint(tmp_path, "abc") is None
    assert not (tmp_path / "done").exists()
    torch.load(folder / "state.pt", weights_only=False)
    assert (tmp_path / "done").exists(), "it must be evil for this to mean anything"


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
