"""Tables with known columns: they are read, standardized and checked like the others."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli.commands import rejected, run_command
from ndm.data import ImageFolder, Table
from ndm.data.other import read_like
from ndm.decoder import from_grid
from ndm.errors import UserError
from ndm.serialize import read_json
from ndm.train.batches import WithFlips
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


def test_known_columns_of_integers_are_on_the_grid_of_the_model(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(1, 7, size=(50, 3))
    np.save(tmp_path / "rows.npy", rows)
    table = Table(str(tmp_path / "rows.npy"), num_values=6, low=1, condition=[2])
    description, train = table.describe(), table.split("train")
    c = train.conditions(range(len(train)))
    assert c is not None
    units = from_grid(c, 6) + 1
    torch.testing.assert_close(description.known_to_model(units.double()), c)
    for wrong in (0.0, 7.0, 1.5):
        with pytest.raises(UserError, match="whole numbers from 1 to 6"):
            description.known_to_model(torch.tensor([[wrong]], dtype=torch.float64))


def test_a_file_without_names_does_not_say_which_columns_are_known(tmp_path: Path) -> None:
    table = Table(str(write(tmp_path / "rows.csv", values(), NAMES)), condition=["b"])
    np.save(tmp_path / "new.npy", values(5))
    with pytest.raises(UserError, match="no names of columns"):
        read_like(table, str(tmp_path / "new.npy"), table.describe())


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


def write_pairs(folder: Path, split: str, names: list[str], side: int = 12) -> None:
    """Images whose value is their number, and partners of its double, gray and in color."""
    for kind in ("images", "known"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        ramp = np.arange(side * (side + 2)).reshape(side, side + 2) % 100
        pixels = (ramp + number).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / f"{name}.png")
        doubled = np.stack([2 * pixels] * 3, -1)
        Image.fromarray(doubled).save(folder / "known" / split / f"{name}.bmp")


@pytest.mark.parametrize("crop", [None, "random", "grid"])
def test_pairs_of_images_are_cropped_and_flipped_alike(tmp_path: Path, crop: Any) -> None:
    write_pairs(tmp_path, "train", ["b", "a", "c"])
    write_pairs(tmp_path, "test", ["x"])
    source = ImageFolder(
        str(tmp_path / "images"),
        channels=1,
        crop=crop,
        size=None if crop is None else 8,
        condition=str(tmp_path / "known"),
        condition_channels=3,
    )
    train = source.split("train")
    data = WithFlips(train)
    chosen = [0, len(train) - 1, len(train) + 1, 2 * len(train) - 1]
    x, c = from_grid(data.__getitems__(chosen), 256), data.conditions(chosen)
    assert c is not None and c.shape[1] == 3
    for channel in from_grid(c, 256).unbind(1):
        assert torch.equal(channel, 2 * x[:, 0])
    description = source.describe()
    assert description.event_shape[0] == 1 and "known" in description.version
    other = ImageFolder(str(tmp_path / "images"), channels=1, crop=crop, size=source.size)
    assert description.sha256 == other.describe().sha256
    assert description.condition_sha256 and not other.describe().condition_sha256


def test_pairs_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train", ["a", "b"])
    write_pairs(tmp_path, "test", ["x"])
    arguments: dict[str, Any] = {"channels": 1, "condition": str(tmp_path / "known")}
    path = str(tmp_path / "images")
    (tmp_path / "known/train/b.bmp").rename(tmp_path / "known/train/c.bmp")
    with pytest.raises(UserError, match="'train/b' is missing there"):
        ImageFolder(path, **arguments).describe()
    (tmp_path / "known/train/c.bmp").rename(tmp_path / "known/train/b.bmp")
    for wrong, message in (
        ({"condition": ""}, "folder of the known"),
        ({"condition": None, "condition_channels": 1}, "needs condition="),
    ):
        with pytest.raises(UserError, match=message):
            ImageFolder(path, **{**arguments, **wrong})
    with pytest.raises(UserError, match="on_error"):
        ImageFolder(path, on_error="skip", **arguments)
    with pytest.raises(UserError, match="not a folder"):
        ImageFolder(path, channels=1, condition=str(tmp_path / "nowhere")).describe()
    for file in (tmp_path / "known").rglob("*.bmp"):
        Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(file)
    with pytest.raises(UserError, match="9 x 9 and the others 12 x 14"):
        ImageFolder(path, **arguments).describe()


def test_pairs_of_other_shapes_or_changed_images_are_noticed(tmp_path: Path) -> None:
    """As many crops in all, but other ones; and classes do not hide known images."""
    sizes = {"images": [(16, 24), (24, 16)], "known": [(24, 16), (16, 24)]}
    for kind, shapes in sizes.items():
        for split in ("train", "test"):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            for number, shape in enumerate(shapes):
                Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(folder / f"{number}.png")
    arguments: dict[str, Any] = {"channels": 1, "size": 8, "condition": str(tmp_path / "known")}
    for crop in ("grid", "random", "center"):
        with pytest.raises(UserError, match="different sizes"):
            ImageFolder(str(tmp_path / "images"), crop=crop, **arguments).describe()

    checksums = []
    for value in (10, 20):
        for kind in ("x", "c"):
            for split in ("train", "test"):
                for name in ("a", "b"):
                    folder = tmp_path / "classes" / kind / split / name
                    folder.mkdir(parents=True, exist_ok=True)
                    pixels = np.full((8, 8), value if kind == "c" else 5, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "0.png")
        source = ImageFolder(
            str(tmp_path / "classes/x"), channels=1, condition=str(tmp_path / "classes/c")
        )
        assert source.describe().classes == ("a", "b")
        checksums.append(source.describe().condition_sha256)
    assert checksums[0] != checksums[1]


def test_a_model_of_images_given_images_trains_and_samples(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train", [f"{i}" for i in range(12)], 8)
    write_pairs(tmp_path, "test", ["x", "y"], 8)
    run, net = tmp_path / "run", "--model.predictor.network"
    run_command(
        "train --config images-small --data.path", tmp_path / "images",
        "--data.condition", tmp_path / "known", "--data.channels 1 --data.crop random",
        "--data.size 8 --model.condition ndm.ImageCondition --model.condition.channels 1",
        f"--model.condition.dropout 0 {net}.image_channels 1 {net}.attention false",
        f"{net}.condition_channels 1 {net}.channels 4 {net}.multiples [1]",
        "--model.transform ndm.Identity --train.steps 3 --train.batch_size 4",
        "--train.sample_steps 2 --train.evaluation_draws 1 --train.warmup 0 --out", run,
    )  # fmt: skip
    metrics = read_json(run / "metrics.json")
    assert metrics["condition"] == "image" and "nelbo_unconditional_bpd" not in metrics
    run_command("sample", run, "--n 3 --steps 2 --out", tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy").shape == (3, 1, 8, 8)
