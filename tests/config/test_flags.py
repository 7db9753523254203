"""The published command line: names, defaults, types, spellings, --config_file."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import shlex
from pathlib import Path

import pytest

from training.config import flags, parser
from training.config.given import Refusal
from training.config.parser import read

PUBLISHED = list(csv.DictReader((Path(__file__).parents[1] / "assets/upstream_flags.tsv").open(), delimiter="\t"))
NEW = {
    "--channels_last",
    "--csv_encoding",
    "--csv_quoting",
    "--deterministic",
    "--dry_run",
    "--epoch_policy",
    "--dataset_reinforcement",
    "--eval_data_dir",
    "--eval_tasks",
    "--global_batch_size",
    "--gather_error_bound",
    "--grad_compression",
    "--image_key",
    "--json_key",
    "--keep_last",
    "--lanes",
    "--loss",
    "--max_bad_fraction",
    "--max_skipped_steps",
    "--powersgd_rank",
    "--ref_features_cache_mb",
    "--ref_features_dtype",
    "--ref_features_error_bound",
    "--ref_features_views",
    "--requeue_on_preempt",
    "--sample_index",
    "--sample_state_device",
    "--sample_state_dtype",
    "--save_every_minutes",
    "--save_every_n_steps",
    "--save_published_state",
    "--step_timeout",
    "--syn_texts_ratio",
    "--tau_gradient",
    "--text_key",
    "--u_format",
}
# Our kind for a published type, where the words differ.
KINDS = {"yaml/json file": "str", "key=value list": "pairs"}
SAMPLES = {
    "str": ["some"],
    "int": ["7"],
    "float": ["0.25"],
    "switch": [],
    "pairs": ["scale=(0.5,1.0)"],
    "sizes": ["9"],
}


def sample_words(flag: flags.Flag) -> list[str]:
    return [next(c for c in flag.choices if c != flag.default)] if flag.choices else SAMPLES[flag.kind]


@pytest.mark.parametrize("row", PUBLISHED, ids=[row["flag"] for row in PUBLISHED])
def test_published_flag(row):
    flag = next(f for f in flags.ALL.values() if f.name == row["flag"])
    assert flag.default == ast.literal_eval(row["default"])
    assert type(flag.default) is type(ast.literal_eval(row["default"]))
    kind = KINDS.get(row["type"], row["type"])
    assert flag.kind == ("sizes" if flag.name == "--data_size" else kind)  # an int, or several joined with ::
    assert (flag.nargs or "") == row["nargs"]
    assert set(flag.choices or ()) == set(row["choices"].split("|")) - {""}


def test_the_published_flags_and_ours_are_all_there_are():
    assert {flag.name for flag in flags.ALL.values()} == {row["flag"] for row in PUBLISHED} | NEW
    assert len(PUBLISHED) == 132


def test_nothing_given_is_every_default():
    given = read([])
    assert given.values == {key: flag.default for key, flag in flags.ALL.items()}
    assert not given.explicit


@pytest.mark.parametrize("flag", flags.ALL.values(), ids=flags.ALL)
def test_spellings(flag, tmp_path):
    words = sample_words(flag)
    if flag.key == "config_file":
        words = [str(tmp_path / "empty.yaml")]
        Path(words[0]).write_text("")
    hyphens, underscores = "--" + flag.key.replace("_", "-"), "--" + flag.key
    readings = [read([spelling, *words]) for spelling in (flag.name, hyphens, underscores)]
    if words and flag.nargs != "*":
        readings += [read([f"{spelling}={words[0]}"]) for spelling in (flag.name, hyphens, underscores)]
    assert all(reading == readings[0] for reading in readings)
    assert readings[0].explicit == {flag.key}
    assert readings[0].values[flag.key] != flag.default


def test_values_are_converted():
    line = "--lr 1e-3 --epochs 3 --data_size 12 --image-mean 0.5 0.25 0 --force-image-size 32 --lr_tau -1.0"
    given = read(shlex.split(line))
    assert (given.lr, given.epochs, given.data_size, given.image_mean) == (1e-3, 3, 12, [0.5, 0.25, 0.0])
    assert given.force_image_size == [32]
    assert given.lr_tau == -1.0
    assert read(["--data_size", "5::7"]).data_size == [5, 7]


def test_pairs_are_python_literals_or_strings():
    given = read(["--aug-cfg", "scale=(0.4,1.0)", "use_timm=True", "color_jitter=0.2", "mode=bicubic", "x=a=b"])
    assert given.aug_cfg == {
        "scale": (0.4, 1.0),
        "use_timm": True,
        "color_jitter": 0.2,
        "mode": "bicubic",
        "x": "a=b",
    }
    assert read(["--aug-cfg"]).aug_cfg == {}


@pytest.mark.parametrize("argv", [["--", "--epochs", "3"], ["--epochs", "3", "--"], ["--", "--", "--epochs", "3"]])
def test_bare_separators_of_torchrun_are_ignored(argv):
    assert read(argv) == read(["--epochs", "3"])


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--epoch", "3"], "--epoch: not a flag of this program; did you mean --epochs?"),
        (["--zzz"], "--zzz: not a flag of this program; see --help"),
        (["stray"], "stray: not a flag"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--epochs", "2.5"], "--epochs: '2.5' is not an integer"),
        (["--data_size", "3:4"], "--data_size: '3:4' is neither an integer nor integers joined with ::"),
        (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["--name"], "--name: expected one argument"),
        (["--image-mean"], "--image-mean: expected at least one argument"),
        (["--aug-cfg", "scale"], "--aug-cfg: 'scale' is not of the form key=value"),
        (["--fastclip=yes"], "--fastclip: ignored explicit argument 'yes'"),
        (["--data-size", "x"], "--data_size: 'x' is neither an integer"),
    ],
)
def test_bad_words(argv, expected):
    with pytest.raises(Refusal) as refusal:
        read(argv)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def write(folder: Path, name: str, content) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


CONTENT = {
    "batch-size": 8,
    "lr_tau": 1,
    "fastclip": True,
    "aug_cfg": {"scale": [0.5, 1.0]},
    "image-mean": [0.5, 0, 0.25],
    "force_image_size": 32,
    "data_size": "3::4",
    "train_data": None,
    "dist_port": 1234,
}


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])  # JSON is YAML
def test_config_file_sets_what_the_command_line_leaves(tmp_path, name):
    given = read(["--config_file", write(tmp_path, name, CONTENT), "--batch_size", "16", "--name", "line"])
    assert given.batch_size == 16
    assert given.name == "line"
    assert given.lr_tau == 1.0 and type(given.lr_tau) is float
    assert given.fastclip is True
    assert given.aug_cfg == {"scale": (0.5, 1.0)}
    assert given.image_mean == [0.5, 0.0, 0.25]
    assert given.force_image_size == [32]
    assert given.data_size == [3, 4]
    assert given.dist_port == "1234"
    assert given.explicit == {key.replace("-", "_") for key in CONTENT} | {"name", "config_file"}


def test_config_file_and_command_line_read_the_same(tmp_path):
    text = (
        'lr: 1e-4\nepochs: 3\naug_cfg: ["scale=(0.5,1.0)"]\nmultiply-tau: true\nref_features_usage: ref,select\n'
    )
    from_file = read(["--config_file", write(tmp_path, "run.yaml", text)])
    line = "--lr 1e-4 --epochs 3 --aug-cfg scale=(0.5,1.0) --multiply_tau --ref_features_usage ref,select"
    from_line = read(shlex.split(line))
    assert {**from_file.values, "config_file": None} == from_line.values


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"batch-sizes": 8}, "there is no flag 'batch-sizes' to set; did you mean --batch-size?"),
        ({"config_file": "x"}, "there is no flag 'config_file' to set"),
        ({"batch-size": 8, "batch_size": 8}, "'batch_size' is set twice"),
        ({"batch_size": "8"}, "batch_size: expected an integer, found '8'"),
        ({"batch_size": 8.0}, "batch_size: expected an integer, found 8.0"),
        ({"batch_size": True}, "batch_size: expected an integer, found True"),
        ({"lr": "fast"}, "lr: could not convert"),
        ({"lr": [1.0]}, "lr: expected a number"),
        ({"fastclip": 1}, "fastclip: expected true or false, found 1"),
        ({"name": 1.5}, "name: expected a string, found 1.5"),
        ({"model": None}, "model: expected a string, found None"),
        ({"precision": "fp8"}, "precision: 'fp8' is not one of amp, amp_bf16"),
        ({"image_mean": ["x"]}, "image_mean: could not convert"),
        ({"aug_cfg": ["scale"]}, "aug_cfg: 'scale' is not of the form key=value"),
        ({"data_size": "a"}, "data_size: "),
        (["--lr", "1"], "expected flags and values ('lr: 0.001'), found a list"),
        ("lr: [1", "not valid YAML"),
    ],
)
def test_bad_config_file(tmp_path, content, expected):
    path = write(tmp_path, "run.yaml", content)
    with pytest.raises(Refusal) as refusal:
        read(["--config_file", path])
    assert str(refusal.value).startswith(f"--config_file {path}: ")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_unreadable_config_file(tmp_path):
    with pytest.raises(Refusal, match=r"--config_file \S*nowhere.yaml: the file cannot be read"):
        read(["--config_file", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(Refusal, match="not valid JSON"):
        read(["--config_file", write(tmp_path, "run.json", "{lr: 1}")])


def test_help_shows_every_flag_once_in_its_group(capsys):
    with pytest.raises(SystemExit) as ended:
        read(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    sections = {title: shown.index(f"\n{title}:\n") for title in flags.GROUPS}
    for title, members in flags.GROUPS.items():
        later = [start for start in sections.values() if start > sections[title]]
        section = shown[sections[title] : min(later, default=len(shown))]
        for flag in members:
            assert f"\n  {flag.name}" in section
            assert flag.help and "\n" not in flag.help


def test_argparse_keeps_no_default_of_its_own():
    actions = [a for a in parser.build_parser()._actions if a.dest != "help"]
    assert {a.dest for a in actions} == set(flags.ALL)
    assert all(a.default is argparse.SUPPRESS for a in actions)
