"""YAML from strangers: one line within bounded time and memory, and no key is lost."""

import time
from pathlib import Path

import pytest
import yaml

from cli.commands import rejected, run_command
from conftest import TINY
from ndm.cli.main import main
from ndm.train.yaml_reader import parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 30_000))
HOSTILE = {
    "lists": "[" * 100_000,
    "closed lists": "seed: " + "[" * 50_000 + "]" * 50_000,
    "mappings": "{a: " * 100_000,
    "block lists": "- " * 100_000 + "x",
    "block keys": "? " * 100_000 + "x",
    "indented": "\n".join(" " * i + "a:" for i in range(5_000)),
    "aliases": LAUGHS,
    "merges": "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "chain of aliases": CHAIN,
    "self": "seed: &a [*a]",
    "self in a mapping": "data: &a {b: *a}",
    "int": "seed: !!int abc",
    "float": "seed: !!float abc",
    "bool": "seed: !!bool abc",
    "date": "seed: 2024-02-31",
    "time": "seed: !!timestamp abc",
    "binary": "seed: !!binary '\xff'",
    "object": "seed: !!python/object/apply:os.getcwd []",
    "digits": "seed: " + "9" * 5_000,
    "hexadecimal": "seed: 0x" + "f" * 100_000,
    "base 60": "seed: 1" + ":59" * 50_000,
    "digits of a key": "9" * 5_000 + ": 1",
    "float of digits": "seed: " + "9" * 5_000 + ".0",
    "list as a key": "[1]: 2",
    "text of lists": "seed: '" + "[" * 100_000 + "'",
    "text of text": "train: {steps: '" + "[" * 100_000 + "'}",
    "text as a path": "model: '" + "[" * 100_000 + "'",
    "int in text": "seed: '!!int abc'",
    "int in text of a part": "train: {steps: '!!int abc'}",
    "no alias": "seed: *nothing",
    "two documents": "seed: 1\n---\nseed: 2",
    "control": "seed: \x07",
    "surrogate": 'seed: "\\ud800"',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_configurations_are_rejected_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(HOSTILE[kind], encoding="utf-8")
    start = time.perf_counter()
    line = rejected(capsys, ["train --config", config, "--out", tmp_path / "run"])
    assert len(line) <= 300 + len(str(tmp_path))
    rejected(capsys, ["compare --config", config, "--out", tmp_path / "compared"])
    assert time.perf_counter() - start < 10
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.parametrize("option", ["--seed", "--train.steps", "--model", "--data"])
def test_hostile_options_are_rejected_in_one_line(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("[" * 100_000, "{a: " * 100_000, "- " * 50_000 + "x", "&a [*a]", "!!int abc"):
        capsys.readouterr()
        words = ["train", "--config", "two_moons", "--out", str(tmp_path / "run"), option, text]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("ndm: error: ") and error.count("\n") == 1
        assert len(error) <= 302
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntrain: {steps: 7}\nseed: 2\n", "'seed' is given twice, in line 1 and in line 3"),
        ("train:\n  steps: 7\n\ntrain:\n  ema: 0\n", "'train' is given twice, in line 1 and in"),
        ("train: {steps: 7, steps: 8}", "'steps' is given twice, in line 1 and in line 1"),
        ("train: {'steps': 7, \"steps\": 8}", "'steps' is given twice"),
        ("a: [{b: {c: 1,\n c: 2}}]", "'c' is given twice, in line 1 and in line 2"),
        ("rows: {1: {}, 0x1: {}}", "'0x1' is given twice"),
        ("a: &x {b: 1, b: 2}\nc: *x", "'b' is given twice"),
    ],
)
def test_a_key_given_twice_is_rejected_with_both_lines(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(text)
    for command in (["train --config", config], ["compare --config", config]):
        rejected(capsys, [*command, "--out", tmp_path / "out"], str(config), message)
    assert not (tmp_path / "out").exists()


def test_a_key_given_twice_is_rejected_wherever_yaml_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "x.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(TINY))
    capsys.readouterr()
    words = [
        "train",
        "--config",
        str(config),
        "--out",
        str(out),
        "--model={class_path: a, class_path: b}",
    ]
    assert main(words) == 2
    assert "--model: the key 'class_path' is given twice" in capsys.readouterr().err
    part = tmp_path / "model.yaml"
    part.write_text("class_path: ndm.NDM\nclass_path: ndm.NFDM\n")
    rejected(capsys, ["train --config", config, "--out", out, "--model", part])
    assert not out.exists()
    run_command("train --config", config, "--out", out, "--train.steps 1")
    stored = out / "config.yaml"
    stored.write_text(stored.read_text() + "seed: 1\n")
    (out / "metrics.json").unlink()
    for command in (["train --out", out], ["quality", out]):
        rejected(capsys, command, "'seed' is given twice")


def test_aliases_merges_and_dates_are_read_as_before() -> None:
    text = "a: &a {b: 1, c: [x]}\nd: {<<: *a, b: 2}\ne: *a\nf: 1e-3\ng: 0x10\nh: 1:30\n"
    text += "i: 2024-02-29\nj: yes\nk: ~\nl: 1.5e+3\nm: |\n  text\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None
    for path in Path(__file__).parents[2].joinpath("src/ndm/configs").glob("*.yaml"):
        assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())
