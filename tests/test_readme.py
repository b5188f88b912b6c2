"""The README's numbers are those of the CSV files in benchmark/results."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "benchmark" / "results").glob("*.csv"))
spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmark" / "collect.py")
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_table_in_the_readme_is_that_of_the_csv(path):
    assert collect.with_table(README, path, collect.markdown(path)) == README


def test_every_table_has_its_csv_and_every_csv_is_shown():
    assert re.findall(r"<!-- (\w+\.csv) -->", README)
    assert set(re.findall(r"<!-- (\w+\.csv) -->", README)) == {path.name for path in RESULTS}


def test_readme_is_short():
    assert len(README.splitlines()) <= 150
