"""Real gloo processes train together as one does; killed anywhere, they go on, on any number of ranks."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from subprocess import CompletedProcess

import anndata
import numpy as np
import pytest
import torch

from schelix_scale.config import TrainConfig
from schelix_scale.training.batches import TOGETHER_STEPS
from schelix_scale.training.checkpoint import latest_checkpoint
from schelix_scale.training.dist import ALONE
from schelix_scale.training.loop import split_rows
from tests.training.rank_program import SPLITS, embed, gradients, start, train_recorded
from tests.training.tools import CONFIG, Interrupted, N, logged

SETTINGS = CONFIG.model_copy(update={"checkpoint_every": 3, "checkpoints_kept": 3})
BUDGETS = (CONFIG.align_steps, CONFIG.refine_steps)


def begin(
    world: int,
    folder: Path,
    attempt: str,
    what: str = "train",
    stop: int = -1,
    victim: int = -1,
    settings: TrainConfig = SETTINGS,
) -> list[CompletedProcess[str]]:
    folder.mkdir(exist_ok=True)
    return start(world, what, folder, attempt, stop, victim, settings.model_dump_json())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that nothing interrupts; they have also computed gradients."""
    folder = tmp_path_factory.mktemp("two")
    ended = begin(2, folder, "a", "gradients")
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return folder


def state(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / f"weights-{rank}.pt")
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def curve(folder: Path) -> np.ndarray:
    """Phase, step and losses of all evaluations and of what was logged in between."""
    entries = [entry for entry in logged(folder / "checkpoints") if entry["event"] != "end"]
    return np.array(
        [
            [entry["phase"] == "align", entry["step"], entry.get("loss", 0.0), entry.get("validation_loss", 0.0)]
            for entry in entries
        ],
        float,
    )


def test_two_ranks_have_the_gradients_of_one(two: Path) -> None:
    for split, found in zip(SPLITS, torch.load(two / "gradients.pt"), strict=True):
        expected = gradients(ALONE, *split)
        assert set(found) == set(expected)
        assert split[2] == 1 or any(value.abs().max() > 1e-3 for value in expected.values())
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{split} {name}")
    unlabelled, labelled = (gradients(ALONE, "refine", "asymmetric", 47, more) for more in ("", "labels"))
    assert any((labelled[name] - value).abs().max() > 1e-3 for name, value in unlabelled.items()), "labels must matter"


def test_two_ranks_train_as_one(two: Path, tmp_path: Path) -> None:
    model = train_recorded(tmp_path, "a", SETTINGS, ALONE, lambda _: None)
    assert same(state(two, 0), state(two, 1))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state(two)[name], value, rtol=1e-3, atol=1e-4)
    found, expected = curve(two), curve(tmp_path)
    assert len(found) > 10
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.ptp(expected[expected[:, 0] == 1, 3]) > 0.01, "losses must change for this to mean anything"


def asked(folder: Path, attempt: str, rank: int) -> list[tuple[str, list[int]]]:
    lines = (folder / f"rows-{attempt}-{rank}.jsonl").read_text().splitlines()
    return [(name, rows) for name, rows in map(json.loads, lines)]


def trained(
    folder: Path, attempt: str, world: int, first: tuple[int, int], ranks: int | None = None
) -> dict[tuple[int, int], list[int]]:
    """Rows of each (phase, step) that the first ranks got ready from ``first`` on: of each two calls, the own cells.

    The first two calls of a phase are those of validation. Steps are read in groups, the first one from its beginning.
    """
    found: dict[tuple[int, int], list[int]] = {}
    rows_of_a_step = [*[SETTINGS.batch_size] * 4, len(split_rows(N, 0)[0]) - 4 * SETTINGS.batch_size]
    for rank in range(world if ranks is None else ranks):
        calls = asked(folder, attempt, rank)
        for phase, name in enumerate(("first", "second")):
            own = [row for rows in [rows for operator, rows in calls if operator == name][2::2] for row in rows]
            start = first[1] if phase == first[0] else 0
            step = start - start % TOGETHER_STEPS
            while own:
                m = rows_of_a_step[step % 5]
                share = m * (rank + 1) // world - m * rank // world
                if step >= start:
                    found.setdefault((phase, step), []).extend(own[:share])
                own, step = own[share:], step + 1
    return found


def resumed_at(folder: Path) -> tuple[int, int]:
    found = latest_checkpoint(folder / "checkpoints", "abc")
    assert found is not None
    return found.phase, found.step


def check_coverage(steps: dict[tuple[int, int], list[int]]) -> None:
    """Every cell exactly once in every whole epoch of five steps."""
    train, _ = split_rows(N, 0)
    assert set(steps) == {(phase, step) for phase, budget in enumerate(BUDGETS) for step in range(budget)}
    for phase, budget in enumerate(BUDGETS):
        for epoch in range(budget // 5):
            rows = [row for step in range(5 * epoch, 5 * epoch + 5) for row in steps[phase, step]]
            assert sorted(rows) == train.tolist()


def test_every_cell_once_an_epoch_over_both_ranks(two: Path) -> None:
    steps = trained(two, "a", 2, (0, 0))
    check_coverage(steps)
    mine = trained(two, "a", 2, (0, 0), ranks=1)
    assert all(len(mine[key]) in (len(rows) // 2, -(-len(rows) // 2)) for key, rows in steps.items())


def test_the_embedding_does_not_depend_on_the_ranks(two: Path, tmp_path: Path) -> None:
    embed(ALONE, tmp_path / "embedding.zarr")
    found, expected = (anndata.read_zarr(path / "embedding.zarr") for path in (two, tmp_path))
    for key, values in expected.obsm.items():
        np.testing.assert_array_equal(found.obsm[key], values)
        assert np.abs(values).sum(axis=1).min() > 0, "every row must be written for this to mean anything"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of which the second one is killed after 13 steps."""
    folder = tmp_path_factory.mktemp("killed")
    ended = begin(2, folder, "a", stop=13, victim=1)
    assert [process.returncode for process in ended] == [1, -signal.SIGKILL]
    assert "one of 2 ranks has ended" in ended[0].stderr
    assert resumed_at(folder) == (0, 12), "the last checkpoint is between two evaluations"
    return folder


def go_on(folder: Path, whole: Path) -> None:
    """Two ranks go on to the same bits as two that nothing interrupted."""
    ended = begin(2, folder, "b")
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert same(state(folder), state(whole))
    np.testing.assert_array_equal(curve(folder)[:, [0, 1, 3]], curve(whole)[:, [0, 1, 3]])


def test_ranks_that_diverge_end_after_the_main_one_has_said_so(tmp_path: Path) -> None:
    """All find it in the same step; torchrun would end the main rank as soon as another one has ended."""
    ended = begin(2, tmp_path, "a", "diverge", settings=SETTINGS.model_copy(update={"learning_rate": 1e37}))
    assert [process.returncode for process in ended] == [1, 1]
    assert "The last good checkpoint is" in (tmp_path / "said").read_text()
    assert (tmp_path / "ended-1").read_text() == "RankLost  True"


def test_an_error_that_all_ranks_find_is_said_by_the_main_one(tmp_path: Path) -> None:
    """Each would say it, or be ended by torchrun before it does; the others wait until the main rank has ended."""
    main, other = begin(2, tmp_path, "a", "err", victim=-1)
    assert main.stderr.endswith("GraphError: there is no graph\n")
    assert other.stderr.endswith("schelix_scale.errors.RankLost\n")


def test_an_error_of_one_rank_is_its_own(tmp_path: Path) -> None:
    main, other = begin(2, tmp_path, "a", "err", victim=1)
    assert other.stderr.endswith("GraphError: there is no graph\n")
    assert "one of 2 ranks has ended" in main.stderr


@pytest.mark.slow
def test_after_one_rank_was_killed(two: Path, killed: Path, tmp_path: Path) -> None:
    go_on(Path(shutil.copytree(killed, tmp_path / "killed")), two)


@pytest.mark.slow
def test_after_all_ranks_were_killed(two: Path, tmp_path: Path) -> None:
    ended = begin(2, tmp_path, "a", stop=31, victim=-1)
    assert [process.returncode for process in ended] == [-signal.SIGKILL] * 2
    assert resumed_at(tmp_path)[0] == 1
    go_on(tmp_path, two)


@pytest.mark.slow
def test_two_then_one_then_three_ranks_cover_exactly_what_is_left(two: Path, killed: Path, tmp_path: Path) -> None:
    tmp_path = Path(shutil.copytree(killed, tmp_path / "killed"))
    steps: dict[tuple[int, int], list[int]] = {}
    first, at = trained(tmp_path, "a", 2, (0, 0)), resumed_at(tmp_path)
    steps |= {key: rows for key, rows in first.items() if key < at}

    def interrupt(step: int) -> None:
        if step == 5:
            raise Interrupted("killed")

    with pytest.raises(Interrupted, match="killed"):
        train_recorded(tmp_path, "b", SETTINGS, ALONE, interrupt)
    second, after = trained(tmp_path, "b", 1, at), resumed_at(tmp_path)
    assert at < after
    steps |= {key: rows for key, rows in second.items() if at <= key < after}
    ended = begin(3, tmp_path, "c")
    assert [process.returncode for process in ended] == [0, 0, 0], "".join(process.stderr for process in ended)
    steps |= {key: rows for key, rows in trained(tmp_path, "c", 3, after).items() if key >= after}
    check_coverage(steps)
    for name, value in state(two).items():
        torch.testing.assert_close(state(tmp_path)[name], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(curve(tmp_path)[:, 3], curve(two)[:, 3], rtol=1e-4)


def test_a_torn_checkpoint_is_passed_over_and_said(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two / "checkpoints", tmp_path / "checkpoints"))
    newest, before = sorted(folder.glob("step-*"))[:-3:-1]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-100])
    said: list[str] = []
    found = latest_checkpoint(folder, "abc", said.append)
    assert found is not None
    assert before.name == f"step-{found.phase:02d}-{found.step:06d}"
    assert said == [f"the checkpoint {newest} is torn or altered: its checksum is another one; it is passed over"]
