"""Tables with known columns: they are read, standardized and checked like the others."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.commands import rejected, run_command
from ndm.data import Table
from ndm.data.other import read_like
from ndm.errors import UserError
from ndm.serialize import read_json
from ndm.train.run import Run

NAMES = ["a", "b", "c", "d"]


def values(count: int = 60) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, 4)) * [1, 10, 0.1, 5] + [0, 3, -2, 100]
    rows[:, 3] += 4 * rows[:, 0]
    return rows


def write(path: Path, rows: np.ndarray, names: list[str] | None = None) -> Path:
    lines = [] if names is None else [",".join(names)]
    lines += [",".join(repr(float(cell)) for cell in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("known", [["b", "d"], [1, 3]])
@pytest.mark.parametrize("columns", [None, ["c", "a"]])
def test_known_columns_are_those_of_the_whole_table(
    tmp_path: Path, known: list[Any], columns: list[Any] | None
) -> None:
    path = str(write(tmp_path / "rows.csv", values(), NAMES))
    table = Table(path, columns=columns, condition=known)
    order = [*(columns or ["a", "c"]), "b", "d"]
    whole = Table(path, columns=order)
    description, of_whole = table.describe(), whole.describe()
    assert description.event_shape == (2,) and description.columns == tuple(order[:2])
    assert description.sha256 == of_whole.sha256
    assert description.log_scale == pytest.approx(math.fsum(map(math.log, of_whole.scale[:2])))
    for split in ("train", "test"):
        both = whole.split(split)[:]
        assert torch.equal(table.split(split)[:], both[:, :2])
        c = table.split(split).conditions([3, 0])
        assert c is not None and torch.equal(c, both[[3, 0], 2:])
    assert torch.allclose(table.to_source_units(table.split("test")[:]).float(),
                          whole.to_source_units(whole.split("test")[:])[:, :2].float())  # fmt: skip


def test_a_table_without_names_has_known_columns_by_number(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", values())
    table = Table(str(tmp_path / "rows.npy"), condition=[0])
    whole = Table(str(tmp_path / "rows.npy"))
    c = table.split("train").conditions([5])
    assert c is not None and torch.equal(c, whole.split("train")[[5]][:, :1])
    assert torch.equal(table.split("train")[5], whole.split("train")[5][1:])
    trained = table.describe()
    assert trained.known_columns == ("0",) and trained.scale == whole.describe().scale[1:]
    new = values(7) + 0.5
    np.save(tmp_path / "new.npy", new)
    for source in (table, None):
        rows = read_like(source, str(tmp_path / "new.npy"), trained).splits["all"]
        known = rows.conditions(range(7))
        assert known is not None
        back = known.double().numpy() * trained.known_scale + trained.known_offset
        np.testing.assert_allclose(back[:, 0], new[:, 0], rtol=1e-6)


def test_new_rows_bring_their_known_columns(tmp_path: Path) -> None:
    """In any order of the file, and standardized as in training."""
    table = Table(str(write(tmp_path / "rows.csv", values(), NAMES)), condition=["b"])
    trained = table.describe()
    new = values(7) + 0.5
    shuffled = write(tmp_path / "new.csv", new[:, [3, 1, 0, 2]], ["d", "b", "a", "c"])
    for source in (table, None):
        loaded = read_like(source, str(shuffled), trained)
        rows = loaded.splits["all"]
        c = rows.conditions(range(7))
        assert c is not None and loaded.description.event_shape == (3,)
        back = c.double().numpy() * trained.known_scale + trained.known_offset
        np.testing.assert_allclose(back[:, 0], new[:, 1], rtol=1e-6)
        np.testing.assert_allclose(
            loaded.description.to_source_units(rows[:]).numpy(), new[:, [0, 2, 3]], rtol=1e-6
        )


def test_known_columns_that_do_not_exist_are_rejected(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.csv", values(), NAMES))
    cases: list[tuple[str, Any]] = [
        ("e", {"condition": ["e"]}),
        ("some columns", {"condition": NAMES}),
        ("not one of columns=", {"columns": ["a", "b"], "condition": ["b"]}),
        ("give a list", {"condition": "b"}),
        ("each once", {"condition": ["b", "b"]}),
        ("each once", {"condition": []}),
    ]
    for message, arguments in cases:
        with pytest.raises(UserError, match=message):
            Table(path, **arguments).describe()


def test_a_regression_learns_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """p(d|a) of d = 4 a + noise, from the command line, against the exact conditional density."""
    generator = np.random.default_rng(1)
    a = generator.normal(size=3000)
    d = 2 * a + 0.5 * generator.normal(size=3000)
    table = write(tmp_path / "rows.csv", np.stack([a, d], 1), ["a", "d"])
    net = "ndm.nn.MLP"
    run = tmp_path / "run"
    run_command(
        "train --config table --data.path", table, "--data.condition [a]",
        "--model.condition ndm.VectorCondition --model.condition.dims 1",
        f"--model.predictor.network {net} --model.predictor.network.dims 1",
        "--model.predictor.network.condition_dims 1 --model.predictor.network.hidden 32",
        f"--model.transform.network {net} --model.transform.network.dims 1",
        "--train.steps 400 --train.batch_size 128 --train.learning_rate 3e-3 --out", run,
    )  # fmt: skip
    found = tmp_path / "found.json"
    run_command("evaluate", run, "--nll --limit 200 --json", found)
    record = read_json(found)
    assert record["condition"] == "vector"
    exact = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    marginal = 0.5 * math.log(2 * math.pi * math.e * 4.25)
    assert float(str(record["nll_nats_source_units"])) == pytest.approx(exact, abs=0.25)
    assert float(str(record["nll_unconditional_nats_source_units"])) == pytest.approx(
        marginal, abs=0.3
    )
    out = tmp_path / "x.npy"
    run_command("sample", run, "--condition 1.5 --n 400 --steps 30 --out", out)
    drawn = np.load(out)
    assert drawn.mean() == pytest.approx(3.0, abs=0.25) and drawn.std() < 0.9
    points = tmp_path / "points.csv"
    points.write_text("-1.5\n1.5\n")
    run_command("sample", run, "--condition", points, "--steps 30 --out", tmp_path / "y.npy")
    low, high = np.load(tmp_path / "y.npy")[:, 0]
    assert low < 0 < high
    run_command("sample", run, "--n 5 --steps 5 --out", tmp_path / "z.npy")
    new = write(tmp_path / "new.csv", np.array([[0.0, 0.0], [0.0, 6.0]]), ["a", "d"])
    run_command("evaluate", run, "--nll --given condition --data", new, "--csv", tmp_path / "s.csv")
    likely, unlikely = (
        float(line.split(",")[1]) for line in (tmp_path / "s.csv").read_text().splitlines()[1:]
    )
    assert unlikely > likely + 3
    rejected(capsys, ["sample", run, "--condition 1,2 --out", tmp_path / "w.npy"], "known columns")
    assert Run(run).model().condition is not None
