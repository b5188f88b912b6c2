"""The numbers of README.md and of the pages in docs/ are those of the CSV files in benchmark/results."""

import csv
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmark" / "results").glob("*.csv"))
spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmark" / "collect.py")
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)
PAGES = [page.read_text() for page in collect.PAGES]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_table_on_the_page_is_that_of_the_csv(path):
    pages = [page for page in PAGES if f"<!-- {path.name} -->" in page]
    assert len(pages) == 1  # every CSV is shown, once
    assert collect.with_table(pages[0], path, collect.markdown(path)) == pages[0]


def test_every_table_has_its_csv():
    assert {name for page in PAGES for name in re.findall(r"<!-- ([\w-]+\.csv) -->", page)} == {p.name for p in RESULTS}


def returns_on_the_way(path):
    """What the text may say of runs: every evaluation, the mean of a run's last ten, and means over runs of both."""
    at_step = {}
    of_run = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            setting = row["setting"].replace("sac_980k", "sac_1m")  # SAC's first seed was ended earlier
            script = collect.RENAMED.get(row["script"], row["script"])
            value = float(row["return_mean"])
            for name in {setting, setting.removesuffix("_again")}:  # SAC's later runs alone, and with the first ones
                at_step.setdefault((script, name, row["env_id"], row["global_step"]), []).append(value)
            of_run.setdefault((script, setting, row["env_id"], row["seed"]), []).append(value)
    late = {}
    for (script, setting, env_id, _), values in of_run.items():
        if len(values) >= 10:
            for name in {setting, setting.removesuffix("_again")}:
                late.setdefault((script, name, env_id), []).append(sum(values[-10:]) / 10)
    returns = [x for runs in (*at_step.values(), *late.values()) for x in (*runs, sum(runs) / len(runs))]
    return " ".join(f"{x:,.0f}" for x in returns)


def returns_with_other_n(path):
    """Every seed's return, and the means over the seeds of a row and of a setting, of a table of best_of_n.py."""
    of_runs = {}  # SAC's runs have a row each, in which all but N = 1 is empty
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if (name.startswith("N = ") or name == "noise 0") and cell:
                    setting = (row["env_id"], row["setting"], name)
                    for run in setting, (*setting, row["first_seed"]):
                        of_runs.setdefault(run, []).extend(float(x) for x in cell.split())
    returns = [x for seeds in of_runs.values() for x in (*seeds, sum(seeds) / len(seeds))]
    return " ".join(f"{x:,.0f}" for x in returns)


def test_returns_in_the_text_are_those_of_the_table():
    table = collect.markdown(ROOT / "benchmark/results/small_setting.csv")
    runs = "grid.csv paper_rates.csv second_edition.csv field.csv fresh.csv baselines.csv"
    summaries = "summary.csv summary_area.csv million.csv million_late.csv million_area.csv baselines_summary.csv"
    for name in f"{runs} {summaries}".split():
        table += collect.markdown(ROOT / "benchmark/results" / name)
    for name in "best_of_n_million.csv", "best_of_n_gpu.csv":
        table += " " + returns_with_other_n(ROOT / "benchmark/results" / name)
    for name in "field.csv", "fresh.csv", "second_edition.csv", "gpu_run.csv":
        table += " " + returns_on_the_way(ROOT / "benchmark/results" / name)
    sections = (
        ("docs/som.md", "Deviations from the paper", 10),
        ("README.md", None, 10),
        ("README.md", "Results", 4),
        ("README.md", "Deviations from the paper", 5),
        ("docs/results.md", None, 20),
        ("docs/baselines.md", None, 10),
    )
    for name, title, fewest in sections:
        section = PAGES[collect.PAGES.index(ROOT / name)]
        if title is not None:
            section = re.search(rf"## {title}\n(.*?)\n## ", section, re.DOTALL)[1]
        numbers, known = (re.findall(r"\d[\d,]*\d", text) for text in (section, table))  # whole: 1,000 is not 1,000,000
        returns = [number for number in numbers if re.fullmatch(r"\d,\d{3}", number)]
        assert len(returns) > fewest and set(returns) <= set(known)


def test_readme_is_short():
    assert len(collect.PAGES[0].read_text().splitlines()) <= 150
