"""Tables: formats agree, standardization inverts, and each fault has a message."""

import math
import pickle
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ndm.data import Table
from ndm.errors import UserError

VALUES = np.random.default_rng(0).normal(size=(40, 3)) * [1.0, 20.0, 0.01] + [0.0, 5.0, -3.0]
NAMES = ["a", "b", "c"]


def write_csv(path, values=VALUES, names=NAMES):
    lines = [",".join(names)] if names else []
    lines += [",".join(repr(float(cell)) for cell in row) for row in values]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_npy(path, values):
    np.save(path, values, allow_pickle=values.dtype == object)
    return str(path)


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def all_examples(source, split):
    examples = source.split(split)
    return examples.__getitems__(range(len(examples)))


def test_all_formats_give_the_same_tensors(tmp_path):
    np.savez(tmp_path / "t.npz", first=VALUES, other=np.zeros(3))
    sources = [
        Table(write_npy(tmp_path / "t.npy", VALUES)),
        Table(str(tmp_path / "t.npz"), key="first"),
        Table(write_csv(tmp_path / "t.csv")),
        Table(write_csv(tmp_path / "bare.csv", names=None)),
        Table(write_parquet(tmp_path / "t.parquet", dict(zip(NAMES, VALUES.T, strict=True)))),
    ]
    for source in sources[1:]:
        assert source.describe().sha256 == sources[0].describe().sha256
        for split in ("train", "test"):
            assert torch.equal(all_examples(source, split), all_examples(sources[0], split))


def test_standardization_inverts_and_log_scale_moves_the_density(tmp_path):
    source = Table(write_csv(tmp_path / "t.csv"))
    x = all_examples(source, "train").double()
    assert torch.allclose(x.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(x.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)
    back = torch.cat(
        [
            source.to_source_units(all_examples(source, split).double())
            for split in ("train", "test")
        ]
    )
    by_first = back[back[:, 0].argsort()].numpy()
    np.testing.assert_allclose(by_first, VALUES[VALUES[:, 0].argsort()], rtol=1e-5, atol=1e-6)
    # the change of variables of a normal density
    description = source.describe()
    unit = torch.distributions.Normal(0.0, 1.0)
    ours = unit.log_prob(x).sum(1) - description.log_scale
    moved = torch.distributions.Normal(
        torch.tensor(description.offset, dtype=torch.float64),
        torch.tensor(description.scale, dtype=torch.float64),
    )
    assert torch.allclose(ours, moved.log_prob(source.to_source_units(x)).sum(1), atol=1e-6)


def test_columns_select_and_order(tmp_path):
    path = write_csv(tmp_path / "t.csv")
    chosen, whole = Table(path, columns=["c", "a"]), Table(path)
    assert torch.equal(all_examples(chosen, "test"), all_examples(whole, "test")[:, [2, 0]])
    assert torch.equal(
        all_examples(Table(path, columns=[2, 0]), "test"), all_examples(chosen, "test")
    )


def test_a_test_file_is_read_and_standardization_can_be_disabled(tmp_path):
    train = write_npy(tmp_path / "a.npy", VALUES[:30])
    test = write_npy(tmp_path / "b.npy", VALUES[30:])
    source = Table(train, test_path=test, standardize=False)
    assert torch.equal(all_examples(source, "test"), torch.from_numpy(VALUES[30:]).float())
    assert source.describe().log_scale == 0
    assert source.describe().splits == {"train": 30, "test": 10}
    standardized = Table(train, test_path=test)
    copied = pickle.loads(pickle.dumps(standardized))
    assert torch.equal(all_examples(standardized, "train"), all_examples(copied, "train"))


def test_the_split_is_a_partition_drawn_from_the_seed(tmp_path):
    path = write_npy(tmp_path / "a.npy", np.arange(50.0)[:, None])

    def draw(seed):
        source = Table(path, seed=seed, standardize=False)
        return [
            sorted(all_examples(source, split).flatten().tolist()) for split in ("train", "test")
        ]

    train, test = draw(0)
    assert sorted(train + test) == list(range(50)) and len(test) == 10
    assert draw(0) == [train, test] != draw(1)


@pytest.mark.parametrize(("num_values", "low"), [(256, None), (4096, None), (11, -5)])
def test_integer_arrays_of_any_rank_are_read_exactly(tmp_path, num_values, low):
    values = np.random.default_rng(0).integers(0, num_values, (20, 2, 3, 3)) + (low or 0)
    path = write_npy(tmp_path / "a.npy", values)
    source = Table(path, num_values=num_values, low=low, test_path=path)
    description = source.describe()
    least = low or 0
    assert description.kind == "image"
    assert (description.low, description.high) == (least, least + num_values - 1)
    x = all_examples(source, "train")
    assert torch.equal(source.integers(x), torch.from_numpy(values - least))
    assert torch.equal(source.to_source_units(x), torch.from_numpy(values).float())
    flat_path = write_npy(tmp_path / "flat.npy", values.reshape(20, -1))
    flat = Table(flat_path, num_values=num_values, low=low, event_shape=[2, 3, 3])
    assert flat.describe().sha256 == Table(path, num_values=num_values, low=low).describe().sha256


def test_whole_numbers_are_discrete_in_parquet_and_warned_about_in_csv(tmp_path):
    """Parquet files have column types, CSV files do not."""
    names, values = ["a", "b"], np.random.default_rng(0).integers(0, 5, (30, 2))
    columns = dict(zip(names, values.T, strict=True))
    parquet = Table(write_parquet(tmp_path / "t.parquet", columns), num_values=5)
    csv = Table(write_csv(tmp_path / "t.csv", values, names), num_values=5)
    assert parquet.describe().sha256 == csv.describe().sha256
    whole = VALUES.copy()
    whole[:, 1] = np.round(100 * whole[:, 1])
    with pytest.warns(UserWarning, match=r"\['b'\] all values are whole numbers"):
        Table(write_csv(tmp_path / "u.csv", whole)).describe()
    Table(write_csv(tmp_path / "u.csv", whole), columns=["a", "c"]).describe()
    Table(write_npy(tmp_path / "u.npy", whole)).describe()  # the dtype is floating point


def with_cell(row, column, value):
    values = VALUES.copy()
    values[row, column] = value
    return values


def write_text(path, content):
    path.write_text(content)
    return str(path)


def truncate(path, size):
    with Path(path).open("r+b") as file:
        file.truncate(size)
    return Table(path)


FAULTS = {
    "missing": (lambda d: Table(str(d / "none.csv")), ["none.csv", "does not exist"]),
    "suffix": (lambda d: Table(write_text(d / "t.xlsx", "")), ["'.xlsx'", ".parquet"]),
    "nan in csv": (
        lambda d: Table(write_csv(d / "t.csv", with_cell(4, 1, math.nan))),
        ["row 4", "'b'", "nan", "finite"],
    ),
    "inf in npy": (
        lambda d: Table(write_npy(d / "t.npy", with_cell(7, 2, -math.inf))),
        ["row 7", "column 2", "-inf"],
    ),
    "null in parquet": (
        lambda d: Table(
            write_parquet(d / "t.parquet", {"a": [1.5, 2.5, None], "b": [1.5, 2.5, 3.5]})
        ),
        ["row 2", "'a'", "nan"],
    ),
    "text column in csv": (
        lambda d: Table(write_text(d / "t.csv", "a,b\n1,x\n2,y\n")),
        ["'b'", "'x'", "row 0", "columns="],
    ),
    "empty cell in csv": (
        lambda d: Table(write_text(d / "t.csv", "a,b\n1,2\n2,\n")),
        ["'b'", "''", "row 1"],
    ),
    "text column in parquet": (
        lambda d: Table(write_parquet(d / "t.parquet", {"a": [1.0], "b": ["x"]})),
        ["'b'", "string", "columns="],
    ),
    "unknown column": (lambda d: Table(write_csv(d / "t.csv"), columns=["a", "z"]), ["'z'", "'c'"]),
    "unknown number": (
        lambda d: Table(write_npy(d / "t.npy", VALUES), columns=[3]),
        ["column 3", "0 to 2"],
    ),
    "ragged": (
        lambda d: Table(write_text(d / "t.csv", "1,2\n3,4\n5\n")),
        ["row 2", "1 cells", "2"],
    ),
    "no rows": (lambda d: Table(write_text(d / "t.csv", "a,b\n")), ["t.csv", "no rows"]),
    "no array rows": (lambda d: Table(write_npy(d / "t.npy", VALUES[:0])), ["(0, 3)"]),
    "one row": (lambda d: Table(write_npy(d / "t.npy", VALUES[:1])), ["test split", "empty"]),
    "not text": (
        lambda d: (d / "t.csv").write_bytes(b"\xff\xfe\x81") and Table(str(d / "t.csv")),
        ["t.csv", "UTF-8"],
    ),
    "not parquet": (
        lambda d: Table(write_text(d / "t.parquet", "hello")),
        ["t.parquet", "Parquet"],
    ),
    "not numpy": (lambda d: Table(write_text(d / "t.npy", "hello")), ["t.npy", "cannot be read"]),
    "truncated numpy": (
        lambda d: truncate(write_npy(d / "t.npy", VALUES), 200),
        ["t.npy", "cannot be read"],
    ),
    "truncated zip": (
        lambda d: np.savez(d / "t.npz", u=VALUES) or truncate(str(d / "t.npz"), 200),
        ["t.npz", "cannot be read"],
    ),
    "objects": (
        lambda d: Table(write_npy(d / "t.npy", np.array([[1, "x"]], dtype=object))),
        ["t.npy", "pickles"],
    ),
    "strings": (lambda d: Table(write_npy(d / "t.npy", np.array([["x"]]))), ["<U1"]),
    "keys": (
        lambda d: np.savez(d / "t.npz", u=VALUES, v=VALUES) or Table(str(d / "t.npz")),
        ["u, v", "key="],
    ),
    "wrong key": (
        lambda d: np.savez(d / "t.npz", u=VALUES) or Table(str(d / "t.npz"), key="w"),
        ["'w'", "u"],
    ),
    "integers": (
        lambda d: Table(write_npy(d / "t.npy", np.arange(6).reshape(3, 2))),
        ["int64", "num_values="],
    ),
    "integers in parquet": (
        lambda d: Table(write_parquet(d / "t.parquet", {"a": [1.5, 2.5], "b": [1, 2]})),
        ["'b'", "int64", "num_values="],
    ),
    "truth values": (
        lambda d: Table(write_parquet(d / "t.parquet", {"a": [1.5, 2.5], "b": [True, False]})),
        ["'b'", "bool", "columns="],
    ),
    "above num_values": (
        lambda d: Table(write_npy(d / "t.npy", np.array([[0, 1], [2, 16]])), num_values=16),
        ["16", "row 1", "column 1", "0 to 15"],
    ),
    "below low": (
        lambda d: Table(write_npy(d / "t.npy", VALUES), low=-1000, high=10),
        ["column 1", "-1000 to 10"],
    ),
    "not whole": (
        lambda d: Table(write_npy(d / "t.npy", np.array([[0.0], [1.5]])), num_values=4),
        ["row 1", "1.5", "num_values=4"],
    ),
    "constant": (
        lambda d: Table(write_csv(d / "t.csv", VALUES * [1, 0, 1] + [0, 7, 0])),
        ["'b'", "7", "standardize=False"],
    ),
    "constant pixel": (
        lambda d: Table(write_npy(d / "t.npy", VALUES.reshape(-1, 3, 1) * [[1], [0], [1]])),
        ["(1, 0)"],
    ),
    "shape": (
        lambda d: Table(write_npy(d / "t.npy", VALUES), event_shape=[2, 2]),
        ["(2, 2)", "4", "3"],
    ),
    "columns differ": (
        lambda d: Table(
            write_csv(d / "t.csv"), test_path=write_csv(d / "u.csv", names=["a", "b", "q"])
        ),
        ["u.csv", "'q'", "'c'"],
    ),
    "num_values": (lambda d: Table("t.csv", num_values=1), ["num_values=1"]),
    "num_values and high": (
        lambda d: Table("t.csv", num_values=16, high=16),
        ["num_values=16", "high=15"],
    ),
    "range": (lambda d: Table("t.csv", low=3, high=3), ["low=3", "high=3"]),
    "columns twice": (lambda d: Table("t.csv", columns=["a", "a"]), ["columns="]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_reported_in_one_line(tmp_path, fault):
    make, culprits = FAULTS[fault]
    with pytest.raises(UserError) as error:
        make(tmp_path).describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message


def test_pickles_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("x",))

    (tmp_path / "t.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="pickle"):
        Table(str(tmp_path / "t.npy")).describe()
    assert not (tmp_path / "sprung").exists()


JULIAN = 2460000.5 + 0.01 * np.random.default_rng(1).normal(size=(60, 1))
UNIX = 1.7e9 + np.random.default_rng(2).normal(size=(60, 1))


@pytest.mark.parametrize("values", [JULIAN, UNIX, VALUES * 1e-30, VALUES * 1e30])
def test_units_of_any_magnitude_are_restored_in_double_precision(tmp_path, values):
    """Single precision has steps of 0.25 at Julian dates and of 128 at Unix times."""
    path = write_npy(tmp_path / "t.npy", values)
    source = Table(path, test_path=path)
    back = source.to_source_units(all_examples(source, "train"))
    assert back.dtype == torch.float64
    np.testing.assert_allclose((back.numpy() - values) / values.std(axis=0), 0.0, atol=1e-5)


@pytest.mark.parametrize("low", [20260101, -(2**40), 2**53 - 28])
def test_whole_numbers_of_any_magnitude_are_restored_exactly(tmp_path, low):
    values = low + np.random.default_rng(0).integers(0, 28, (50, 2))
    path = write_npy(tmp_path / "t.npy", values)
    source = Table(path, num_values=28, low=low, test_path=path)
    back = source.to_source_units(all_examples(source, "train"))
    assert back.dtype == torch.int64
    assert np.array_equal(back.numpy(), values)
    outside = write_npy(tmp_path / "u.npy", np.append(values, [[low - 1, low]], axis=0))
    with pytest.raises(UserError, match=f"row 50 .*{low - 1}; allowed are {low} to {low + 27};"):
        Table(outside, num_values=28, low=low).describe()


@pytest.mark.parametrize(
    ("column", "options", "culprit"),
    [
        (VALUES[:, 0] * 1e300, {}, "'b' holds values up to .*e\\+300.*unit"),
        (VALUES[:, 0] * 1e-300, {}, "'b' holds values up to .*e-300"),
        (np.append(VALUES[1:, 0], 9.97e36), {}, "'b' holds 9.97e\\+36 .*half of its values"),
        (np.append(VALUES[1:, 0], 1e20), {"test": True}, "example 39 .*test split.*'b'.*1e\\+20"),
        (VALUES[:, 0] + 1e16, {"standardize": False}, "holds 1e\\+16"),
        (VALUES[:, 0] * 0.01 + 2460000.5, {"standardize": False}, "'b'.*single precision"),
    ],
)
def test_values_that_lose_all_others_are_rejected(tmp_path, column, options, culprit):
    values = VALUES.copy()
    values[:, 1] = column
    bad, good = write_csv(tmp_path / "bad.csv", values), write_csv(tmp_path / "good.csv")
    train, test = (good, bad) if "test" in options else (bad, good)
    standardize = options.get("standardize", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*whole numbers.*")
        with pytest.raises(UserError, match=culprit):
            Table(train, test_path=test, standardize=standardize).describe()


def test_heavy_tails_and_repeated_values_are_accepted(tmp_path):
    heavy = np.random.default_rng(0).standard_cauchy((2000, 2)) ** 3
    source = Table(write_npy(tmp_path / "heavy.npy", heavy), test_fraction=0.5)
    assert source.describe().splits == {"train": 1000, "test": 1000}
    zeros = np.where(np.random.default_rng(0).random((2000, 1)) < 0.9, 0.0, 1e8)
    x = Table(write_npy(tmp_path / "zeros.npy", zeros)).split("train")[:]
    assert len(x.unique()) == 2


def test_names_of_parquet_columns_are_stripped_and_unique(tmp_path):
    table = pa.table([VALUES[:, 0], VALUES[:, 1], VALUES[:, 2]], names=["a", " b", "a "])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"\[0, 2\] have the same name 'a'"):
        Table(str(tmp_path / "t.parquet")).describe()
    source = Table(str(tmp_path / "t.parquet"), columns=["b"])
    assert source.describe().columns == ("b",)


def test_all_unusable_columns_of_parquet_are_listed(tmp_path):
    columns = {"a": [1.5, 2.5], "s": ["x", "y"], "n": [1, 2], "b": [1.5, 2.5]}
    path = write_parquet(tmp_path / "t.parquet", columns)
    with pytest.raises(UserError, match=r"'s' .*'n' \(int64\).*--data.columns '\[a, b\]'"):
        Table(path).describe()


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "?"])
@pytest.mark.parametrize("options", [{}, {"columns": [3, 1]}, {"event_shape": [1, 2, 2]}])
def test_integers_stay_in_their_file_and_equal_those_in_memory(tmp_path, dtype, options):
    values = np.random.default_rng(0).integers(0, 2, (50, 4)).astype(dtype)
    path = write_npy(tmp_path / "t.npy", values)
    np.savez_compressed(tmp_path / "t.npz", values)
    whole = write_npy(tmp_path / "f.npy", values.astype(float))
    mapped, packed, memory = (
        Table(name, num_values=2, **options) for name in (path, str(tmp_path / "t.npz"), whole)
    )
    assert mapped.describe().sha256 == memory.describe().sha256 == packed.describe().sha256
    copied = pickle.loads(pickle.dumps(mapped.split("train")))
    assert len(pickle.dumps(mapped.split("train"))) < 2000
    for split in (mapped.split("train"), packed.split("train"), copied):
        assert torch.equal(split[:], memory.split("train")[:])


def test_a_table_of_bytes_needs_little_memory(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (4000, 4000), dtype=np.uint8)
    path = write_npy(tmp_path / "t.npy", values)
    del values
    tracemalloc.start()
    source = Table(path, num_values=256)
    source.split("train").__getitems__(range(100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6 * 1.5


def test_an_array_of_python_2_is_read_without_a_warning(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3L, 2L), }"
    header = header.ljust(117) + b"\n"
    values = np.arange(6.0).reshape(3, 2) + 0.5
    prefix = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    (tmp_path / "old.npy").write_bytes(prefix + header + values.tobytes())
    found = Table(str(tmp_path / "old.npy"), standardize=False, test_fraction=0.34).describe()
    assert found.splits == {"train": 2, "test": 1}
