import re
from pathlib import Path

import polars as pl
import pytest

from analysis import records


def scalar(step: int, value: float, metric: str = "loss", layer: int | None = None) -> dict:
    return {
        "trial": "t",
        "step": step,
        "tokens": step * 10,
        "split": "held_out",
        "metric": metric,
        "layer": layer,
        "value": value,
        "stderr": None,
        "time": 0,
    }


def test_a_written_table_reads_back(tmp_path: Path) -> None:
    rows = [scalar(0, 1.0), scalar(0, 0.5, "anisotropy", -1), scalar(1, 2.0)]
    records.write(tmp_path, "scalars", "t", 1, rows)
    assert records.scan(tmp_path, "scalars").collect().to_dicts() == rows


def test_the_later_segment_counts(tmp_path: Path) -> None:
    records.write(tmp_path, "scalars", "t", 10, [scalar(5, 2.0), scalar(10, 3.0)])
    records.write(tmp_path, "scalars", "t", 9, [scalar(5, 1.0)])
    found = records.scan(tmp_path, "scalars").sort("step").collect()
    assert found["value"].to_list() == [2.0, 3.0]


def test_one_trial_is_scanned_alone(tmp_path: Path) -> None:
    records.write(tmp_path, "scalars", "t", 1, [scalar(1, 1.0)])
    records.write(tmp_path, "scalars", "u", 1, [{**scalar(1, 2.0), "trial": "u"}])
    assert records.scan(tmp_path, "scalars", "u").collect()["value"].to_list() == [2.0]


@pytest.mark.parametrize("table", records.TABLES)
def test_no_records_make_an_empty_table(tmp_path: Path, table: str) -> None:
    found = records.scan(tmp_path, table).collect()
    assert found.is_empty() and found.schema == pl.Schema(records.TABLES[table])


def test_rows_off_the_schema_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(pl.exceptions.PolarsError):
        records.write(tmp_path, "scalars", "t", 1, [{**scalar(1, 1.0), "value": "high"}])
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("table", records.KEYS)
def test_keys_are_columns(table: str) -> None:
    assert set(records.KEYS[table]) <= set(records.TABLES[table])


def test_every_table_and_column_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "records.md").read_text()
    for table, columns in records.TABLES.items():
        section = text.split(f"## {table}: ")[1].split("\n## ")[0]
        described = re.findall(r"^\| ([a-z_, ]+) \|", section, re.MULTILINE)
        assert set(columns) <= {name for cell in described for name in cell.split(", ")}, table


def test_a_trial_is_its_own_segments_and_a_sweep_all_that_are_segments(tmp_path: Path) -> None:
    row = {"trial": "ab", "step": 1, "matrix": "head", "index": 0, "sigma": 1.0}
    for trial, step in (("ab", 10), ("ab", 9), ("abc", 9)):
        file = records.write(tmp_path, "spectra", trial, step, [{**row, "trial": trial}])
        assert file
    (file.parents[1] / "stray.parquet").write_bytes(b"not a table")
    assert records.segments(tmp_path, "spectra", "ab") == {9, 10}
    assert records.scan(tmp_path, "spectra", "ab").collect()["trial"].to_list() == ["ab"]
    whole = records.scan(tmp_path, "spectra").collect()
    assert sorted(whole["trial"]) == ["ab", "abc"]
    assert records.segments(tmp_path, "softmax", "ab") == set()
