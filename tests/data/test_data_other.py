"""Other data are seen by a trained model as its own are."""

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


def exported(source: DataSource, folder: Path) -> str:
    """The test split of a source as a file in its own units."""
    test = source.split("test")
    np.save(
        folder / "x.npy",
        source.to_source_units(test.__getitems__(range(len(test))).double()).numpy(),
    )
    return str(folder / "x.npy")


@pytest.mark.parametrize("make", [Digits, TwoMoons])
def test_what_was_exported_comes_back(make: Callable[[], DataSource], tmp_path: Path) -> None:
    source = make()
    other = read_like(source, exported(source, tmp_path), source.describe())
    test = source.split("test")
    x = test.__getitems__(range(len(test)))
    torch.testing.assert_close(other.splits["all"].__getitems__(range(len(test))), x)
    assert other.description.splits == {"all": len(test)}
    assert other.description.log_scale == source.describe().log_scale
    assert other.description.sha256 != source.describe().sha256


def test_columns_and_scales_are_those_of_the_training(tmp_path: Path) -> None:
    """Not those of the other rows, whose mean and spread are what is to be judged."""
    source = table(tmp_path)
    trained = source.describe()
    (tmp_path / "new.csv").write_text(
        "c,b,a\n"
        + "\n".join(f"{trained.offset[0] + n * trained.scale[0]},0.5,{n + 0.25}" for n in range(4))
    )
    x = read_like(source, str(tmp_path / "new.csv"), trained).splits["all"].__getitems__(range(4))
    torch.testing.assert_close(x[:, 0], torch.arange(4.0))
    torch.testing.assert_close(
        x[:, 1], torch.tensor([(n + 0.25 - trained.offset[1]) / trained.scale[1] for n in range(4)])
    )


def test_columns_are_found_by_their_names(tmp_path: Path) -> None:
    """Also where the training took all of them: another order would be another distribution."""
    source = Table(table(tmp_path).path)
    trained = source.describe()
    assert trained.columns == ("a", "b", "c")
    rows = np.random.default_rng(1).normal(3, 2, (5, 3))
    np.save(tmp_path / "plain.npy", rows)
    np.savetxt(
        tmp_path / "turned.csv",
        rows[:, ::-1],
        delimiter=",",
        header="c,b,a",
        comments="",
        fmt="%.17g",
    )
    plain, turned = (
        read_like(source, str(tmp_path / name), trained).splits["all"].__getitems__(range(5))
        for name in ("plain.npy", "turned.csv")
    )
    torch.testing.assert_close(turned, plain)
    again = read_like(
        None, str(tmp_path / "turned.csv"), DataDescription.from_dict(trained.to_dict())
    )
    torch.testing.assert_close(again.splits["all"].__getitems__(range(5)), plain)
    (tmp_path / "other.csv").write_text("c,b,x\n0.5,1.5,2.5\n")
    with pytest.raises(UserError, match="no column 'a'"):
        read_like(source, str(tmp_path / "other.csv"), trained)


def test_images_of_a_folder_are_cut_and_scaled_as_those_of_the_training(tmp_path: Path) -> None:
    source = photos(tmp_path)
    other = read_like(source, str(tmp_path / "photos"), source.describe()).splits["all"]
    assert len(other) == 10 and other.where(3).endswith("03.png")  # type: ignore[attr-defined]
    theirs = {
        str(file): x
        for split in ("train", "test")
        for file, x in zip(source.split(split).files, source.split(split), strict=False)
    }  # type: ignore[attr-defined]
    for index in range(10):
        assert torch.equal(other[index], theirs[other.where(index)])  # type: ignore[attr-defined]


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
def test_what_does_not_fit_is_refused(
    make: Callable[[Path], DataSource], file: str, culprit: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(4, 5)))
    source = make(tmp_path)
    with pytest.raises(UserError, match=culprit):
        read_like(source, str(tmp_path / file), source.describe())
