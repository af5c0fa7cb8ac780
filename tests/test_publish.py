"""Publishing: whole or not at all, also when the process is killed or the disk is full."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import schelix_scale.publish as publishing
from schelix_scale.arrays import create_array
from schelix_scale.config import Config
from schelix_scale.errors import RunError
from schelix_scale.publish import publish
from schelix_scale.run import Run, RunDirectory
from tests.run_tools import PRELUDE, SOURCE, child, fill, killed, tree

FULL = Path("/dev/full")


def test_partial_keeps_the_suffix_that_writers_look_at(tmp_path: Path) -> None:
    with publish(tmp_path / "a" / "x.npy") as path:
        np.save(path, np.arange(3))
        assert not (tmp_path / "a" / "x.npy").exists()
    assert sorted(tree(tmp_path)) == ["a/x.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "x.npy"), [0, 1, 2])


def test_a_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for names in [("a", "b"), ("b", "c")]:
        with publish(tmp_path / "t.zarr") as path:
            path.mkdir()
            for name in names:
                (path / name).write_text(name * len(names[0]))
    assert tree(tmp_path) == {"t.zarr/b": b"b", "t.zarr/c": b"c"}
    with publish(tmp_path / "t.zarr") as path:
        path.write_text("now a file")
    assert tree(tmp_path) == {"t.zarr": b"now a file"}
    with publish(tmp_path / "t.zarr") as path:
        path.mkdir()
        (path / "d").write_text("d")
    assert tree(tmp_path) == {"t.zarr/d": b"d"}


REPLACE_A_DIRECTORY = """
root = Path(sys.argv[1])
from schelix_scale.publish import publish
for content in ("old", "new"):
    with publish(root / "t.zarr") as path:
        path.mkdir()
        (path / "a").write_text(content)
        if content == "new":
            rename = Path.rename
            def once(path, target):
                rename(path, target)
                os.kill(os.getpid(), signal.SIGKILL)
            Path.rename = once
"""


@pytest.mark.parametrize("way", ["publish", "sweep"])
def test_what_stepped_aside_comes_back_after_a_kill(tmp_path: Path, way: str) -> None:
    killed(REPLACE_A_DIRECTORY, tmp_path)
    assert tree(tmp_path) == {"t.zarr.old.partial/a": b"old", "t.partial.zarr/a": b"new"}
    if way == "sweep":
        publishing.remove_partials(tmp_path)
    else:
        with pytest.raises(RunError, match="nothing was written"), publish(tmp_path / "t.zarr"):
            assert (tmp_path / "t.zarr" / "a").read_text() == "old"
    assert tree(tmp_path) == {"t.zarr/a": b"old"}


def test_what_stepped_aside_comes_back_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a").write_text("old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "t.partial":
            raise PermissionError("refused")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="refused"), publish(tmp_path / "t") as path:
        path.mkdir()
    assert tree(tmp_path) == {"t/a": b"old"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failure_leaves_the_old_artifact(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "x.bin").write_text("old")

    def write() -> None:
        with publish(tmp_path / "x.bin") as path:
            path.write_text("new")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert tree(tmp_path) == {"x.bin": b"old"}


def test_publishing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing was written"), publish(tmp_path / "x.bin"):
        pass


def test_checksum_of_a_tree_sees_names_and_content(tmp_path: Path) -> None:
    run = RunDirectory.claim(tmp_path, Config(), SOURCE)

    def sha_of(files: dict[str, str]) -> str:
        with run.publish("t") as path:
            for name, text in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_text(text)
        return run.finish("embed", "f", ["t"], 0.0).artifacts[0].sha256

    lines = [f"{name}\0{hashlib.sha256(text).hexdigest()}\n" for name, text in [("a/b", b"1"), ("c", b"2")]]
    assert sha_of({"c": "2", "a/b": "1"}) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert len({sha_of({"c": "2", "a/b": "1"}), sha_of({"c": "1", "a/b": "2"}), sha_of({"c": "2", "a/c": "1"})}) == 3


def test_reserved_arrays_are_plain_npy(tmp_path: Path) -> None:
    array = create_array(tmp_path / "x.npy", (4, 3), np.float32)
    array[:] = np.arange(12).reshape(4, 3)
    array.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.arange(12, dtype="f4").reshape(4, 3))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 48


@pytest.mark.parametrize(
    ("moment", "left_behind"),
    [
        ("with run.publish('genes.bin') as path:\n    path.write_bytes(b'01'); DIE", {"genes.partial.bin"}),
        ("with run.publish('genes.bin') as path:\n    path.write_bytes(b'0123456789')\nDIE", {"genes.bin"}),
        (
            "with run.publish('genes.bin') as path:\n    path.mkdir(); (path / 'x').write_bytes(b'1'); DIE",
            {"genes.partial.bin/x"},
        ),
    ],
    ids=["writing", "published, not recorded", "writing a directory"],
)
def test_a_stage_killed_half_way_is_done_again(tmp_path: Path, moment: str, left_behind: set[str]) -> None:
    start = "run = RunDirectory.claim(sys.argv[1], Config(), SOURCE)\nrun.begin('genes')\n"
    killed(start + moment.replace("DIE", "os.kill(os.getpid(), signal.SIGKILL)"), tmp_path)
    assert set(tree(tmp_path)) == {".lock", "run.json", *left_behind}
    with RunDirectory.claim(tmp_path, Config(), SOURCE) as run:
        assert not run.is_done("genes", run.fingerprint("genes", 1, {"content": "0123456789"}))
        done = fill(run)
        assert run.is_done("genes", done)
    assert set(tree(tmp_path)) == {".lock", "run.json", "genes.bin", "stages/genes.json"}


def test_a_rebuild_killed_before_its_record_does_not_pass_for_the_old_one(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path, Config(), SOURCE) as run:
        old = fill(run, content=b"old genes!")
        run.finish_run({})
    killed(
        """
        run = RunDirectory.claim(sys.argv[1], Config(), SOURCE)
        run.begin('genes')
        with run.publish('genes.bin') as path:
            path.write_bytes(b'new genes!')
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    with RunDirectory.claim(tmp_path, Config(), SOURCE) as run:
        assert not run.is_done("genes", old)
    with pytest.raises(RunError, match="is not finished"):
        Run.open(tmp_path)


def test_a_start_killed_before_run_json_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "run.partial.json").write_text("{")
    RunDirectory.claim(tmp_path, Config(), SOURCE).close()
    assert set(tree(tmp_path)) == {".lock", "run.json"}


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "behind another error"])
def test_full_device_is_explained(tmp_path: Path, hidden: bool) -> None:
    (tmp_path / "x.bin").write_text("old")

    def write() -> None:
        with publish(tmp_path / "x.bin") as path:
            path.write_text("partial")
            try:
                FULL.write_bytes(b"x" * 100_000)
            except OSError as error:
                if hidden:
                    raise RuntimeError("writer failed") from error
                raise

    with pytest.raises(RunError, match=r"no space left on /.* GB free\) while writing .*x\.bin\. Free some space"):
        write()
    assert tree(tmp_path) == {"x.bin": b"old"}


def test_file_size_limit_is_explained_and_the_rest_survives(tmp_path: Path) -> None:
    code = """
    run = RunDirectory.claim(sys.argv[1], Config(), SOURCE)
    fill(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for write in (
        lambda path: path.write_bytes(bytes(200_000)),
        lambda path: np.save(path, np.zeros(200_000)),
        lambda path: create_array(path, (200_000,), np.float32),
    ):
        try:
            with run.publish('big.npy') as path:
                write(path)
        except Exception as error:
            print(type(error).__name__, isinstance(error.__cause__, OSError), error)
    """
    done = child(code, tmp_path)
    messages = done.stdout.splitlines()
    assert len(messages) == 3, done.stderr
    for message in messages:
        assert re.match(r"RunError True (a file is larger than allowed|not all could be written) \(", message), message
        assert re.search(r"while writing .*big(\.partial)?\.npy", message), message
    assert set(tree(tmp_path)) == {".lock", "run.json", "genes.bin", "stages/genes.json"}


def test_full_disk_is_explained_and_the_run_goes_on_with_space(tmp_path: Path) -> None:
    """A real file system of 1 MB, in a mount namespace of its own."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, *mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets users mount no file system")
    code = """
    root = Path(sys.argv[1])
    run = RunDirectory.claim(root / 'run', Config(), SOURCE)
    fill(run)
    def many(path):
        path.mkdir()
        for i in range(40): (path / str(i)).write_bytes(bytes(50_000))
    writes = [
        lambda path: path.write_bytes(bytes(2_000_000)),
        lambda path: np.save(path, np.zeros(500_000)),
        lambda path: create_array(path, (500_000,), np.float32),
        many,
    ]
    for write in writes:
        try:
            with run.publish('big.npy') as path:
                write(path)
        except Exception as error:
            print(type(error).__name__, error)
    (root / 'filler').write_bytes(bytes(1_000_000 - 50_000))
    try:
        while True:
            with open(root / 'filler', 'ab') as file: file.write(bytes(4096))
    except OSError:
        pass
    try:
        run.finish('genes', 'f', ['genes.bin'], 1.0)
    except Exception as error:
        print(type(error).__name__, error)
    (root / 'filler').unlink()
    assert sorted(p.name for p in root.joinpath('run').iterdir()) == ['.lock', 'genes.bin', 'run.json', 'stages']
    fill(run)
    run.finish_run({})
    print(run.verify())
    """
    script = tmp_path.parent / "full_disk.py"
    script.write_text(PRELUDE + textwrap.dedent(code))
    shell = f"{' '.join(mount)} && exec {sys.executable} {script} {tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*inside, "sh", "-c", shell], capture_output=True, text=True, check=False, env=environment)
    *messages, verified = done.stdout.splitlines() or [""]
    assert len(messages) == 5, done.stdout + done.stderr
    for message in messages:
        assert message.startswith(f"RunError no space left on {tmp_path} (0.00"), message
    assert verified == "[]"
