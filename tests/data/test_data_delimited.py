"""Text tables: the meaning of the first row, names, separators, missing values and numbers."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from ndm.data import Table
from ndm.data.other import read_like
from ndm.errors import UserError

BODY = "0.5,1.25,-3.5\n1.5,2.25,0.5\n2.5,-1.75,1.5\n"
ROWS = [[0.5, 1.25, -3.5], [1.5, 2.25, 0.5], [2.5, -1.75, 1.5]]


def read(folder: Path, text: str | bytes, name: str = "t.csv", **options):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Table(str(folder / name), **options).read(str(folder / name))


@pytest.mark.parametrize(
    ("first", "header", "names"),
    [
        ("a,b,c", "auto", ["a", "b", "c"]),
        ("0,1,2", "auto", ["0", "1", "2"]),
        ("1,2,3", "auto", ["1", "2", "3"]),
        (" a ,b,2020", "auto", ["a", "b", "2020"]),
        ("7.5,8.5,9.5", "auto", None),
        ("+0,+1,+2", "auto", None),
        ("0,1,2", False, None),
        ("7.5,8.5,9.5", True, ["7.5", "8.5", "9.5"]),
        ("a,0.5,1.0", True, ["a", "0.5", "1.0"]),
    ],
)
def test_the_first_row_is_names_or_data_and_the_version_tells(
    tmp_path: Path, first: str, header, names
) -> None:
    rows = read(tmp_path, f"{first}\n{BODY}", header=header)
    assert rows.names == names and len(rows.values) == (3 if names else 4)
    np.testing.assert_array_equal(rows.values[-3:], ROWS)
    source = Table(str(tmp_path / "t.csv"), header=header, test_fraction=0.4)
    assert f"first row: {'names' if names else 'data'}" in source.describe().version


@pytest.mark.parametrize(
    "text",
    [
        f"a,0.5,1.0\n{BODY}",  # a name above numbers and numbers with decimals
        "0,1\n1,0\n0,0\n",  # names, or counts
        "1\n2\n1\n",
        "x,5\ny,4\nz,3\n",  # a name above categories, or a category
    ],
)
def test_a_first_row_that_may_be_both_must_be_declared(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"--data.header true.*header=false"):
        read(tmp_path, text, num_values=6 if "." not in text else None)


@pytest.mark.parametrize("cell", ["", "NA", "null", "nan", "?"])
def test_a_first_row_with_a_missing_value_is_data(tmp_path: Path, cell: str) -> None:
    with pytest.raises(UserError, match=r"row 0 .*column 1"):
        read(tmp_path, f"7.5,{cell},8.5\n{BODY}")


def test_a_first_row_of_numbers_and_categories_is_data(tmp_path: Path) -> None:
    iris = "5.1,0.2,setosa\n4.9,0.4,setosa\n6.1,1.3,virginica\n"
    with pytest.raises(UserError, match=r"row 0 .*column 2 .*'setosa'.*--data.columns '\[0, 1\]'"):
        read(tmp_path, iris)
    assert len(read(tmp_path, iris, columns=[0, 1]).values) == 3


def test_new_rows_of_pandas_are_read_like_those_of_training(tmp_path: Path) -> None:
    """pandas names the columns of an array 0, 1, 2, ..."""
    values = np.random.default_rng(0).normal(size=(20, 3))
    np.save(tmp_path / "x.npy", values)
    source = Table(str(tmp_path / "x.npy"))
    lines = ["0,1,2", *(",".join(map(repr, row)) for row in values.tolist())]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    expected, found = (
        read_like(source, str(tmp_path / name), source.describe()).splits["all"]
        for name in ("x.npy", "x.csv")
    )
    assert torch.equal(found[:], expected[:])


@pytest.mark.parametrize(
    ("names", "columns", "culprit"),
    [
        ("a,b,a", None, r"\[0, 2\] have the same name 'a'"),
        ("a,b, a ", None, r"\[0, 2\] have the same name 'a'"),
        ("a,b,a", ["a", "b"], r"the same name 'a'"),
        ("a,b,a", [2], r"the same name 'a'"),
        ("a,,b", None, r"column 1 has no name.*--data.columns '\[a, b\]'"),
        (",a,b", None, r"column 0 has no name"),
        ("a,b,c", ["a", 0], "column 0 .* twice"),
    ],
)
def test_names_that_do_not_name_one_column_are_rejected(
    tmp_path: Path, names: str, columns, culprit: str
) -> None:
    with pytest.raises(UserError, match=culprit):
        read(tmp_path, f"{names}\n{BODY}", columns=columns)


def test_columns_without_a_unique_name_can_be_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, f",a,b\n{BODY}", columns=["a", "b"]).names == ["a", "b"]
    assert read(tmp_path, f"a,b,a\n{BODY}", columns=["b"]).names == ["b"]


@pytest.mark.parametrize(
    ("column", "position"),
    [
        ("3", 1),
        (2020, 4),
        (False, 3),
        ("no", 3),
        (2, 2),  # the name is at this position
        (0, 0),
        (1.5, 5),
        (None, 6),
    ],
)
def test_a_value_of_yaml_that_is_a_name_means_the_name(tmp_path: Path, column, position) -> None:
    """YAML reads the names 2020, no, 1.5 and null as values of other types."""
    header = "k,3,2,no,2020,1.5,null"
    rows = ["0.5,1.5,2.5,3.5,4.5,5.5,6.5", "1.5,2.5,3.5,4.5,5.5,6.5,7.5"]
    text = "\n".join([header, *rows])
    found = read(tmp_path, text, columns=[column], header=True)
    assert found.values[0, 0] == position + 0.5
    assert found.names == [header.split(",")[position]]


@pytest.mark.parametrize(("header", "column"), [("k,3,2,z", 3), ("no,off,z,k", False)])
def test_a_value_of_yaml_that_may_be_two_columns_is_rejected(tmp_path, header, column) -> None:
    with pytest.raises(UserError, match=r"may be any of the columns .*quotes"):
        read(tmp_path, f"{header}\n0.5,1.5,2.5,3.5\n", columns=[column])


@pytest.mark.parametrize("text", ["1.5\n\n2.5\n", "a\n\n1.5\n", "1.5\n2.5\n\n", "a\n1.5\n \n2.5"])
def test_an_empty_line_in_a_table_of_one_column_is_a_missing_value(tmp_path, text: str) -> None:
    lines = text.split("\n")
    row = next(i for i, line in enumerate(lines) if not line.strip()) - (lines[0] == "a")
    with pytest.raises(UserError, match=f"row {row} .*a missing value; drop or fill the row"):
        read(tmp_path, text)


def test_empty_lines_between_rows_of_several_columns_are_no_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, f"\na,b,c\n\n{BODY}\n\n")
    np.testing.assert_array_equal(rows.values, ROWS)


@pytest.mark.parametrize(
    ("name", "convert", "options"),
    [
        ("t.tsv", lambda text: text.replace(",", "\t"), {}),
        ("t.csv", lambda text: text.replace(",", "\t"), {}),
        ("t.csv", lambda text: text.replace(",", ";"), {}),
        ("t.csv", lambda text: text.replace(",", "|"), {"separator": "|"}),
        ("t.csv", lambda text: text.replace(",", ";").replace(".", ","), {"decimal": ","}),
        ("t.tsv", lambda text: text.replace(",", "\t").replace(".", ","), {"decimal": ","}),
        ("t.csv", lambda text: text.replace("\n", "\r\n"), {}),
        ("t.csv", lambda text: "\ufeff" + text.replace(",", ' , "').replace("\n", '"\n'), {}),
        ("t.csv", lambda text: text.replace("1.5", "+1.5").replace("0.5", "5E-1"), {}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_separators_decimal_marks_and_compression(tmp_path, name, convert, options, packed) -> None:
    text = convert(f"a,b,c\n{BODY}")
    if '"' in text:
        text = f"a,b,c\n{BODY}".replace(",", '" , "').replace("\n", '"\n"')[:-1]
        text = '\ufeff"' + text.replace('" ,', '",').replace(', "', ',"')
    data = gzip.compress(text.encode()) if packed else text.encode()
    rows = read(tmp_path, data, name + (".gz" if packed else ""), **options)
    assert rows.names == ["a", "b", "c"]
    np.testing.assert_array_equal(rows.values, ROWS)


@pytest.mark.parametrize(
    ("text", "options", "culprit"),
    [
        ("1,5;2,5\n3,5;4,5\n", {}, "separator="),
        ("a;b\n1,5;2,5\n", {}, "--data.decimal ','"),
        ("a\n1,5\n", {"decimal": ",", "separator": ","}, "another separator"),
        ("a\n1.5\n", {"separator": "ab"}, "separator='ab'"),
        ("a\n1.5\n", {"decimal": "x"}, "decimal='x'"),
        ("a\n1.5\n", {"header": 1}, "header=1"),
        ("a,b\n1_0,2.5\n", {}, "'1_0', not a number"),
        ("a,b\n1.5,2.5,\n", {}, "row 0 .*3 cells instead of 2"),
    ],
)
def test_faulty_text_is_rejected_in_one_line(tmp_path, text, options, culprit) -> None:
    with pytest.raises(UserError, match=culprit):
        read(tmp_path, text, **options)


def test_a_damaged_compressed_table_is_rejected(tmp_path: Path) -> None:
    packed = gzip.compress(f"a,b,c\n{BODY * 1000}".encode())
    for data in (packed[: len(packed) // 2], b"hello", packed[:-4] + b"\0\0\0\1"):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path, data, "t.csv.gz")


def test_all_unusable_columns_are_listed_with_the_line_to_paste(tmp_path: Path) -> None:
    text = "id,a,sort,on,b\nx1,0.5,p,1.5,\nx2,1.5,q,2.5,3.5\n"
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    message = str(error.value)
    assert "'id' holds 'x1'" in message and "'sort' ('p')" in message and "'b' ('')" in message
    assert message.endswith("--data.columns '[a, \"on\"]'") and len(message) <= 300


def test_a_column_of_long_names_still_gives_a_short_message(tmp_path: Path) -> None:
    names = [f"{'n' * 500}{index}" for index in range(50)]
    text = "\n".join([",".join(names), ",".join(["y" * 1000, *["x"] * 48, "1.5"])])
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert len(str(error.value)) - len(str(tmp_path)) <= 300
