"""Other data for a trained model: preprocessed as its training data were."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ndm.data import DataDescription, DataSource, Digits, ImageFolder, Table, TwoMoons
from ndm.data.other import read_like
from ndm.errors import UserError


def table(folder: Path) -> Table:
    rows = np.random.default_rng(0).normal(3, 2, (20, 3))
    lines = ["a,b,c", *(",".join(map(repr, row.tolist())) for row in rows)]
    (folder / "t.csv").write_text("\n".join(lines))
    return Table(str(folder / "t.csv"), columns=["c", "a"])


def photos(folder: Path, count: int = 10, size: tuple[int, int] = (9, 7)) -> ImageFolder:
    for index in range(count):
        (folder / "photos").mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index:02d}.png")
    return ImageFolder(str(folder / "photos"), size=6)


def export(source: DataSource, folder: Path) -> str:
    """Write the test split to a file in the units of the source."""
    test = source.split("test")
    x = test.__getitems__(range(len(test))).double()
    np.save(folder / "x.npy", source.to_source_units(x).numpy())
    return str(folder / "x.npy")


@pytest.mark.parametrize("make", [Digits, TwoMoons])
def test_an_exported_split_is_read_back(make: Callable[[], DataSource], tmp_path: Path) -> None:
    source = make()
    other = read_like(source, export(source, tmp_path), source.describe())
    test = source.split("test")
    x = test.__getitems__(range(len(test)))
    torch.testing.assert_close(other.splits["all"].__getitems__(range(len(test))), x)
    assert other.description.splits == {"all": len(test)}
    assert other.description.log_scale == source.describe().log_scale
    assert other.description.sha256 != source.describe().sha256


def test_other_tables_use_the_columns_and_scales_of_training(tmp_path: Path) -> None:
    """The mean and spread of the new rows are not used."""
    source = table(tmp_path)
    trained = source.describe()
    steps = torch.arange(4.0)
    c, a = trained.offset[0] + steps.double() * trained.scale[0], steps + 0.25
    rows = [f"{c[n].item()},0.5,{a[n].item()}" for n in range(4)]
    (tmp_path / "new.csv").write_text("\n".join(["c,b,a", *rows]))
    x = read_like(source, str(tmp_path / "new.csv"), trained).splits["all"].__getitems__(range(4))
    torch.testing.assert_close(x[:, 0], steps)
    torch.testing.assert_close(x[:, 1], (a - trained.offset[1]) / trained.scale[1])


def test_columns_are_matched_by_name(tmp_path: Path) -> None:
    """Names also decide when training used all columns, so their order does not matter."""
    source = Table(table(tmp_path).path)
    trained = source.describe()
    assert trained.columns == ("a", "b", "c")
    rows = np.random.default_rng(1).normal(3, 2, (5, 3))
    np.save(tmp_path / "plain.npy", rows)
    csv = {"delimiter": ",", "header": "c,b,a", "comments": "", "fmt": "%.17g"}
    np.savetxt(tmp_path / "reversed.csv", rows[:, ::-1], **csv)  # type: ignore[arg-type]
    plain, reordered = (
        read_like(source, str(tmp_path / name), trained).splits["all"].__getitems__(range(5))
        for name in ("plain.npy", "reversed.csv")
    )
    torch.testing.assert_close(reordered, plain)
    restored = DataDescription.from_dict(trained.to_dict())
    again = read_like(None, str(tmp_path / "reversed.csv"), restored)
    torch.testing.assert_close(again.splits["all"].__getitems__(range(5)), plain)
    (tmp_path / "other.csv").write_text("c,b,x\n0.5,1.5,2.5\n")
    with pytest.raises(UserError, match="no column 'a'"):
        read_like(source, str(tmp_path / "other.csv"), trained)


def test_other_images_are_cropped_and_scaled_as_in_training(tmp_path: Path) -> None:
    source = photos(tmp_path)
    other = read_like(source, str(tmp_path / "photos"), source.describe()).splits["all"]
    assert len(other) == 10 and other.where(3).endswith("03.png")  # type: ignore[attr-defined]
    images: dict[str, torch.Tensor] = {}
    for split in (source.split("train"), source.split("test")):
        files = map(str, split.files)  # type: ignore[attr-defined]
        images |= zip(files, split, strict=False)
    for index in range(10):
        assert torch.equal(other[index], images[other.where(index)])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "file", "culprit"),
    [
        (table, "none.csv", "does not exist"),
        (table, ".", "is a folder, for images with 256 values"),
        (lambda _: TwoMoons(), "wide.npy", "event_shape=\\(2,\\)"),
        (lambda _: Digits(), "wide.npy", "wide.npy"),
        (photos, "empty", "has no images"),
        (photos, "wide.npy", "wide.npy"),
    ],
)
def test_unsuitable_data_are_rejected(
    make: Callable[[Path], DataSource], file: str, culprit: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(4, 5)))
    source = make(tmp_path)
    with pytest.raises(UserError, match=culprit):
        read_like(source, str(tmp_path / file), source.describe())


def test_rows_too_far_away_are_named_and_all_others_kept(tmp_path: Path) -> None:
    source = table(tmp_path)
    trained = source.describe()
    rows = np.random.default_rng(1).normal(3, 2, (6, 3))
    rows[1, 0], rows[4, 2] = 1e300, -9.97e36
    csv = {"delimiter": ",", "header": "a,b,c", "comments": "", "fmt": "%.17g"}
    np.savetxt(tmp_path / "new.csv", rows, **csv)  # type: ignore[arg-type]
    np.savetxt(tmp_path / "good.csv", rows[[0, 2, 3, 5]], **csv)  # type: ignore[arg-type]
    new, good = (
        read_like(source, str(tmp_path / name), trained).splits["all"]
        for name in ("new.csv", "good.csv")
    )
    assert torch.equal(new[[0, 2, 3, 5]], good[:])
    assert new.unusable == {  # type: ignore[attr-defined]
        1: "row 1 (the first is 0), column 'a' holds 1e+300",
        4: "row 4 (the first is 0), column 'c' holds -9.97e+36",
    }
    np.savetxt(tmp_path / "bad.csv", rows[[1, 4]], **csv)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"row 0 .* check the units"):
        read_like(source, str(tmp_path / "bad.csv"), trained)


def test_columns_of_training_without_names_are_found_by_number_or_by_count(tmp_path: Path) -> None:
    """``ndm sample`` writes only the columns of the model; other files have all."""
    values = np.random.default_rng(0).normal(size=(30, 3))
    np.save(tmp_path / "x.npy", values)
    source = Table(str(tmp_path / "x.npy"), columns=[2, 0])
    np.save(tmp_path / "chosen.npy", values[:, [2, 0]])
    whole, chosen = (
        read_like(source, str(tmp_path / name), source.describe()).splits["all"]
        for name in ("x.npy", "chosen.npy")
    )
    assert torch.equal(whole[:], chosen[:])
    with pytest.raises(UserError, match="only reorders the columns"):
        Table(str(tmp_path / "x.npy"), columns=[2, 0, 1]).describe()


def test_the_separator_and_decimal_mark_of_training_are_tried_first(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    plain = "\n".join(["a,b", *(",".join(map(repr, row)) for row in values.tolist())])
    (tmp_path / "plain.csv").write_text(plain)
    (tmp_path / "x.csv").write_text(plain.replace(",", ";").replace(".", ","))
    source = Table(str(tmp_path / "x.csv"), separator=";", decimal=",")
    first, second = (
        read_like(source, str(tmp_path / name), source.describe()).splits["all"]
        for name in ("x.csv", "plain.csv")
    )
    assert torch.equal(first[:], second[:])
