"""Settings: what a file and overrides mean, and what is refused in which words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from schelix_scale.config import Config, _cgroup_limits, memory_budget, parse_bytes
from schelix_scale.config_changes import config_differences
from schelix_scale.config_io import load_config
from schelix_scale.errors import ConfigError
from schelix_scale.mapping.settings import MapConfig, load_map_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("500MB", 500_000_000),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2_147_483_648),
        ("64KiB", 65_536),
        ("1tb", 1_000_000_000_000),
        (" 8 G ", 8_000_000_000),
        ("512", 512),
        ("512B", 512),
    ],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "-4GB", "4XB", "4 GB RAM", "1e9", "iB", "5iB", "0GB", "0.2B", "half", "٤GB"]
)
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"no memory at all|not an amount of memory"):
        parse_bytes(text)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "atlas.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_gives_the_defaults() -> None:
    assert load_config() == Config()


def test_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = toml(tmp_path, 'seed = 3\n[graph]\nk = 15\nhops = [0, 2]\n[data]\nprotect = ["age"]\n')
    loaded = load_config(path).model_dump()
    expected = Config().model_dump()
    expected["seed"] = 3
    expected["graph"] |= {"k": 15, "hops": (0, 2)}
    expected["data"] |= {"protect": ("age",)}
    assert loaded == expected


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "[graph]\nk = 15\ntheta = 0.5\n")
    graph = load_config(str(path), ["graph.k=20", "graph.k=25"]).graph
    assert (graph.k, graph.theta) == (25, 0.5)


@pytest.mark.parametrize(
    ("override", "table", "key", "expected"),
    [
        ("graph.k=12", "graph", "k", 12),
        (" graph.k = 12 ", "graph", "k", 12),
        ("graph.theta=2", "graph", "theta", 2.0),
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.enabled=false", "train", "enabled", False),
        ("graph.method=exact", "graph", "method", "exact"),
        ('graph.method="exact"', "graph", "method", "exact"),
        ("graph.hops=0,1,3", "graph", "hops", (0, 1, 3)),
        ("graph.hops=[0, 2]", "graph", "hops", (0, 2)),
        ("graph.hops=4", "graph", "hops", (4,)),
        ("data.protect=age,sex", "data", "protect", ("age", "sex")),
        ("data.protect=1,true", "data", "protect", ("1", "true")),
        ('data.protect=["a,b", "c"]', "data", "protect", ("a,b", "c")),
        ("data.protect=", "data", "protect", ()),
        ("data.obs_columns=age", "data", "obs_columns", ("age",)),
        ("data.obs_columns=none", "data", "obs_columns", None),
        ("data.batch_key=donor id", "data", "batch_key", "donor id"),
        ("data.batch_key=1", "data", "batch_key", "1"),
        ("data.batch_key=true", "data", "batch_key", "true"),
        ("data.batch_key=a=b", "data", "batch_key", "a=b"),
        ('data.batch_key="none"', "data", "batch_key", "none"),
        ("data.batch_key=2024-01-01", "data", "batch_key", "2024-01-01"),
    ],
)
def test_override_strings(override: str, table: str, key: str, expected: object) -> None:
    value = getattr(getattr(load_config(overrides=[override]), table), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("overrides", [{"graph.k": 12, "seed": 5}, {"graph": {"k": np.int64(12)}, "seed": np.uint8(5)}])
def test_override_mappings(overrides: dict[str, object]) -> None:
    loaded = load_config(overrides=overrides)
    assert (loaded.graph.k, loaded.seed) == (12, 5)


def test_mapping_may_hold_tuples_and_null() -> None:
    loaded = load_config(overrides={"graph.hops": (0, 2), "data.obs_columns": None, "threads": None})
    assert (loaded.graph.hops, loaded.data.obs_columns, loaded.threads) == ((0, 2), None, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["graph.n_neighbors=3"], r"unknown setting graph\.n_neighbors \(in an override\)"),
        (["graph.kk=3"], r"unknown setting graph\.kk .*Did you mean graph\.k"),
        (["n_hvg=3"], r"unknown setting n_hvg .*Did you mean genes\.n_hvg"),
        (["n_hvgs=3"], r"unknown setting n_hvgs .*Did you mean genes\.n_hvg"),
        (["genes.n_hgv=3"], r"Did you mean genes\.n_hvg"),
        ({"sed": 3}, r"unknown setting sed .*Did you mean seed"),
        (["xyzzy=3"], r"unknown setting xyzzy .*The settings are: seed,"),
        (["graph=3"], r"graph \(in an override\) is a table, not a setting\. Set one of graph\.k, "),
        (["graph.k.x=3"], r"unknown setting graph\.k\.x"),
        (["graph.k"], r"'graph\.k' is not an assignment; write overrides as key=value"),
        (["=3"], r"'=3' is not an assignment"),
        (["graph.k=1"], r"graph\.k = 1 \(in an override\) is not allowed: it should be greater than or equal to 2"),
        (["graph.k=many"], r"graph\.k = 'many' .* it should be a valid integer"),
        (["graph.k=none"], r"graph\.k = None .* it should be a valid integer"),
        (["graph.k=12.5"], r"graph\.k = 12\.5 "),
        (["graph.k=true"], r"graph\.k = True "),
        (["graph.method=fast"], r"graph\.method = 'fast' .*'auto', 'exact', 'ivf' or 'pynndescent'"),
        (["graph.hops=0,x"], r"graph\.hops = 'x' .* it should be a valid integer"),
        (["strength=1.5"], r"strength = 1\.5 .* less than or equal to 1"),
        (["strength=-0.1"], r"strength = -0\.1 .* greater than or equal to 0"),
        ({"strength": float("nan")}, r"strength = nan .* it should be"),
        (["genes.partition=some"], r"genes\.partition = 'some' .*'sensitivity', 'random' or 'all'"),
        (["max_memory=lots"], r"max_memory = 'lots' .* such as 500MB, 4GB or 2GiB"),
        (["device=gpu"], r"device = 'gpu' .*cuda"),
        (["graph.k=1", "genes.cut=best"], r"(?s)(?=.*graph\.k = 1 )(?=.*genes\.cut = 'best')"),
    ],
)
def test_refusals_name_the_key_and_what_is_allowed(overrides: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting grph\.k \(in .*atlas\.toml\).*graph\.k"):
        load_config(toml(tmp_path, "[grph]\nk = 3\n"))
    with pytest.raises(ConfigError, match=r"graph\.k = '3' \(in .*atlas\.toml\) is not allowed"):
        load_config(toml(tmp_path, '[graph]\nk = "3"\n'))
    with pytest.raises(ConfigError, match=r"graph \(in .*atlas\.toml\) is a table"):
        load_config(toml(tmp_path, "graph = 3\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[graph]\nk == 3\n", r"atlas\.toml is not valid TOML: .*line 2"),
        ("seed = 1\n[graph]\nk = [0,\n", r"atlas\.toml is not valid TOML: .*line 3"),
        ("seed = 1\nseed = 2\n", r"atlas\.toml is not valid TOML: .*line 2"),
    ],
)
def test_bad_toml_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(toml(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'# caf\xe9\ndevice = "cpu"\n')
    with pytest.raises(ConfigError, match=r"latin\.toml cannot be read .* UTF-8"):
        load_config(tmp_path / "latin.toml")


def test_every_shipped_settings_file_loads() -> None:
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.toml")):
        if path.name == "map.toml":
            assert load_map_config(path) == MapConfig()  # it says what the defaults are
        else:
            load_config(path)


def test_memory_budget_is_the_setting() -> None:
    assert memory_budget(load_config(overrides=["max_memory=3GiB"])) == 3 * 1024**3


def test_memory_budget_is_at_most_half_of_memory() -> None:
    kilobytes = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < memory_budget(Config()) <= int(kilobytes.split()[1]) * 1024 // 2


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "5000000"}, [5_000_000]),
        ("0::/\n", {"memory.max": "700\n"}, [700]),
        ("1:cpu:/x\n4:memory:/x/y\n0::/\n", {"memory/x/y/memory.limit_in_bytes": "900"}, [900]),
        ("4:memory:/not/mounted/here\n", {"memory/memory.limit_in_bytes": "800"}, [800]),
        ("0::/\n", {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, membership: str, files: dict[str, str], expected: list[int]) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "own").write_text(membership)
    assert list(_cgroup_limits(tmp_path / "fs", tmp_path / "own")) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(_cgroup_limits(tmp_path, tmp_path / "nothing")) == []


def test_differences_are_named_old_to_new() -> None:
    a = load_config(overrides={"graph.k": 30, "graph.hops": (0, 1), "train.enabled": True, "data.layer": "X"})
    b = load_config(
        overrides={"graph.k": 15, "graph.hops": (0, 2), "train.enabled": False, "data.layer": "raw", "threads": 2}
    )
    assert sorted(config_differences(a, b)) == [
        "data.layer: X -> raw",
        "graph.hops: [0, 1] -> [0, 2]",
        "graph.k: 30 -> 15",
        "threads: none -> 2",
        "train.enabled: true -> false",
    ]


def test_memory_is_no_difference_and_what_json_stores_is_equal() -> None:
    config = load_config(overrides=["max_memory=1GB"])
    assert config_differences(config, Config()) == []
    assert config_differences(config.model_dump(mode="json"), Config()) == []
    assert config_differences({"seed": 1, "old": 2}, {"seed": 1}) == ["old: 2 -> absent"]


def test_settings_do_not_depend_on_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(os.fspath(toml(tmp_path, "seed = 9"))).seed == 9


def test_settings_of_tiledb_have_dots_in_their_names(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('[data.tiledb]\n"vfs.s3.region" = "us-west-2"\n"vfs.s3.use_x" = true\n')
    config = load_config(tmp_path / "settings.toml", ["data.tiledb.sm.mem.total_budget=100"])
    expected = {"vfs.s3.region": "us-west-2", "vfs.s3.use_x": "true", "sm.mem.total_budget": "100"}
    assert config.data.tiledb == expected
    assert load_config(None, {"data.tiledb": expected}).data.tiledb == expected
