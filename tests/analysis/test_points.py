import math
from pathlib import Path

import polars as pl
import pytest

from analysis import points
from analysis.errors import BadInput

TABLE = pl.DataFrame(
    {
        "name": ["a", "b", "c"],
        "params": [1e6, 1e7, 1e8],
        "step": [100, 100, 100],
        "loss": [4.0, 3.5, 3.0],
    }
)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_tables_of_every_format_read_alike(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        path.write_text("# read off a figure\n" + TABLE.write_csv())
    elif suffix == ".tsv":
        TABLE.write_csv(path, separator="\t")
    elif suffix == ".parquet":
        TABLE.write_parquet(path)
    else:
        TABLE.write_ndjson(path)
    assert points.read(path).cast({"params": pl.Float64, "loss": pl.Float64}).equals(TABLE)


def test_a_table_that_ships_is_found_by_name() -> None:
    table = points.read(Path("law.csv"))
    assert table.filter(model="pythia-14m", kind="final")["loss"].item() == 4.363


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such table, and no sweep of that name"),
        ("t.xlsx", "", "a table is one of .csv"),
        ("t.csv", "a,b\n", "has no rows"),
        ("t.csv", "", "cannot be read"),
        ("t.jsonl", "{a", "cannot be read"),
        ("t.parquet", "nothing", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_says_so_in_a_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        points.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_variables_are_found_by_usual_names_or_made_from_an_expression() -> None:
    found = points.named(TABLE, ["N", "D", "loss"], {"D": "step * 2097152"})
    assert found["N"].to_list() == TABLE["params"].to_list()
    assert found["D"].to_list() == [100 * 2097152] * 3
    assert found["loss"].to_list() == TABLE["loss"].to_list()
    shouted = points.named(TABLE.rename({"loss": "Loss", "params": "n"}), ["loss"], {})
    assert shouted["loss"].to_list() == TABLE["loss"].to_list()
    assert points.usual(shouted, "N") is None


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        ("D", {}, "no column for D among name, params, step, loss; say which: --column D=NAME"),
        ("D", {"D": "nope"}, '--column D=nope: .*"nope"'),
        ("D", {"D": "step ** "}, "--column D=step"),
        ("D", {"D": "name * 2"}, "--column D=name"),
    ],
)
def test_a_variable_that_is_not_there_says_so(
    wanted: str, given: dict[str, str], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        points.named(TABLE, [wanted], given)
    assert "\n" not in str(caught.value)


def test_rows_are_chosen_in_sql() -> None:
    kept = points.where(TABLE, "params >= 1e7 and name <> 'c'", "--where")
    assert kept["name"].to_list() == ["b"]
    for condition in ("params > 1e9", "nope > 1", "params >", "name > 3", "params"):
        with pytest.raises(BadInput, match=r"^--where: ") as caught:
            points.where(TABLE, condition, "--where")
        assert "\n" not in str(caught.value)


def checked(table: pl.DataFrame) -> pl.DataFrame:
    return points.check(points.numbered(points.named(table, ["N", "loss"], {})), ["N"])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, None])
def test_a_loss_that_is_no_positive_number_is_named_by_its_row(bad: float | None) -> None:
    with pytest.raises(BadInput, match="column loss: positive numbers are needed; row 2 has"):
        checked(TABLE.with_columns(loss=pl.Series([4.0, bad, 3.0])))
    with pytest.raises(BadInput, match="column N: positive numbers are needed; row 2 has"):
        checked(TABLE.with_columns(params=pl.Series([4.0, bad, 3.0])))
    with pytest.raises(BadInput, match="column loss: numbers are needed, not String"):
        checked(TABLE.with_columns(pl.col("loss").cast(pl.String)))


def test_points_that_are_alike_and_disagree_are_refused_and_seeds_are_not() -> None:
    twice = pl.concat([TABLE, TABLE.head(1)])
    assert checked(twice).height == 3
    differing = pl.concat([TABLE, TABLE.head(1).with_columns(loss=4.1)])
    with pytest.raises(BadInput, match=r"rows 1, 4 are the same point .* with different losses"):
        checked(differing)
    assert checked(differing.with_columns(seed=pl.Series([0, 0, 0, 1]))).height == 4


@pytest.mark.parametrize(
    ("table", "doubt"),
    [
        (
            TABLE.with_columns(pl.col("params") / 1e6),
            "N goes down to 1: parameters, or millions of them",
        ),
        (TABLE.with_columns(params=pl.Series([70.0, 1e8, 1e9])), "jumps from 70 to 1e[+]08"),
        (TABLE.with_columns(pl.col("loss").exp()), "a loss of 54.* above that of a uniform guess"),
        (TABLE.with_columns(loss=5.0, V=pl.lit(64)), "a loss of 5 is above"),
        (TABLE.rename({"loss": "bits"}), "bits is fitted as nats"),
    ],
)
def test_other_units_are_doubted(table: pl.DataFrame, doubt: str) -> None:
    given = {"loss": "bits"} if "bits" in table.columns else {}
    names = ["N", "loss", *(["V"] if "V" in table.columns else [])]
    doubts = points.doubts(points.named(table, names, given), given)
    assert any(pl.Series([d]).str.contains(doubt)[0] for d in doubts), doubts
    assert points.doubts(points.named(TABLE, ["N", "loss"], {}), {}) == []


def test_points_along_runs_are_told_from_ends_of_runs() -> None:
    named = points.named(TABLE, ["N", "model"], {})
    assert not points.steps_within(named)
    assert points.steps_within(pl.concat([named, named.with_columns(step=pl.col("step") * 2)]))
