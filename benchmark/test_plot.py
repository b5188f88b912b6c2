"""benchmark/plot.py: its statistics against scipy and by hand, its files and its table as a user gets them."""

import csv
import importlib.util
import itertools
import math
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

SCRIPT = pathlib.Path(__file__).parent / "plot.py"
spec = importlib.util.spec_from_file_location("plot", SCRIPT)
plot = importlib.util.module_from_spec(spec)
sys.modules["plot"] = plot
spec.loader.exec_module(plot)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 8, 10, 25])
def test_interquartile_mean(n):
    scores = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(plot.interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=1))


def test_interquartile_mean_by_hand():
    assert plot.interquartile_mean(np.array([100.0, 1, 3, 2, -50, 4, 5, 0])) == (1 + 2 + 3 + 4) / 4
    two = [np.array([0.0, 4.0]), np.array([10.0, 2.0])]
    assert plot.interquartile_mean_over_all(two) == 3 and plot.mean_over_environments(two) == 4


def test_environments_count_alike_in_the_mean():
    assert plot.mean_over_environments([np.zeros(1), np.ones(9)]) == 0.5


def test_mean_return_by_hand():
    steps = np.array([10, 20, 40])
    returns = np.array([[0.0, 6.0, 6.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(plot.mean_return(steps, returns), [(3 * 10 + 6 * 20) / 30, 1])
    assert plot.mean_return(steps[:1], returns[:, :1]).tolist() == [0, 1]


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_interval_is_that_of_scipy(seeds):
    returns = np.random.default_rng(seeds).normal(100, 30, size=(seeds, 4))
    mean, half = plot.interval(returns)
    result = stats.ttest_1samp(returns, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], [result.low, result.high])


def test_interval_of_two_and_of_one_by_hand():
    mean, half = plot.interval(np.array([[1.0], [3.0]]))
    assert mean == 2 and half == pytest.approx(12.706, abs=1e-3)  # std sqrt(2) / sqrt(2) = 1, times t with 1 degree
    mean, half = plot.interval(np.array([[7.0]]))
    assert mean == 7 and math.isnan(half[0])


def test_bootstrap_against_all_resamples():
    """Two environments of three and two seeds: 27 x 4 equally likely resamples, drawn within each environment."""
    scores = [np.array([0.0, 1.0, 5.0]), np.array([10.0, 30.0])]
    means = [
        (np.mean(first) + np.mean(second)) / 2
        for first in itertools.product(scores[0], repeat=3)
        for second in itertools.product(scores[1], repeat=2)
    ]
    drawn = []

    def statistic(resamples):
        drawn.append(plot.mean_over_environments(resamples))
        return drawn[-1]

    low, high = plot.stratified_bootstrap(scores, statistic, 200_000)
    variance = (np.var(scores[0]) / 3 + np.var(scores[1]) / 2) / 4
    assert np.var(means) == pytest.approx(variance)
    assert drawn[0].var() == pytest.approx(variance, rel=0.02)
    assert drawn[0].mean() == pytest.approx(np.mean(means), rel=0.005)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.35)  # its neighbours are a third apart
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.35)


def test_bootstrap_of_one_environment_is_that_of_scipy():
    scores = np.random.default_rng(0).normal(size=12)
    ours = plot.stratified_bootstrap([scores], plot.interquartile_mean_over_all, 20_000)

    def trimmed(x, axis):
        return stats.trim_mean(x, 0.25, axis=axis)

    theirs = stats.bootstrap((scores,), trimmed, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_bootstrap_of_one_seed_has_no_width():
    assert plot.stratified_bootstrap([np.array([3.0])], plot.mean_over_environments, 10).tolist() == [3, 3]


COLUMNS = "setting,env_id,seed,global_step,return_mean,command"


def table(path, *rows):
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return path


@pytest.fixture
def results(tmp_path):
    rows = []
    for env_id, scale in (("A-v0", 1), ("B-v0", 1000)):
        for setting, final in (("low", (0, 2)), ("high", (6, 10))):
            for seed, top in enumerate(final, 1):
                for step in 10_000, 20_000:
                    rows.append(f"{setting},{env_id},{seed},{step},{scale * top * step / 20_000},python x.py")
    rows.append("only,A-v0,1,20000,5,python x.py")
    return table(tmp_path / "results.csv", *rows)


def run(*flags):
    words = [sys.executable, SCRIPT, *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True)


def test_the_plots_as_a_user_makes_them(results, tmp_path):
    made = run("--csvs", results, "--out", tmp_path / "a/b")
    assert made.returncode == 0, made.stderr
    names = {"curves.png", "curves.svg", "aggregate.png", "aggregate.svg", "results.md"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == names
    for path in (tmp_path / "a/b").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    for path in (tmp_path / "a/b").glob("*.svg"):
        assert "</svg>" in path.read_text()
    assert (tmp_path / "a/b/results.md").read_text() == made.stdout
    # half widths: 12.706 x half the difference of two seeds; normalised by 0 and 10: 0.1 of 0, 0.2 and 0.8 of 0.6, 1
    assert made.stdout.splitlines()[4:7] == [
        "| `low` | 1 ± 13 (2) | 1,000 ± 12,706 (2) | 0.10 [0.00, 0.20] | 0.10 [0.00, 0.20] |",
        "| `high` | **8 ± 25** (2) | **8,000 ± 25,412** (2) | 0.80 [0.60, 1.00] | 0.80 [0.60, 1.00] |",
        "| `only` | 5 (1) | - | - | - |",
    ]
    heads = "| setting | A-v0, 20,000 steps | B-v0, 20,000 steps | normalised mean | normalised IQM |"
    assert made.stdout.startswith(f"Final return\n\n{heads}\n")
    # each curve goes from a half to the whole of its final return: its mean is three quarters
    assert made.stdout.splitlines()[10:] == [
        heads,
        "| --- | --- | --- | --- | --- |",
        "| `low` | 1 ± 10 (2) | 750 ± 9,530 (2) | 0.08 [0.00, 0.15] | 0.08 [0.00, 0.15] |",  # of 0.075
        "| `high` | **6 ± 19** (2) | **6,000 ± 19,059** (2) | 0.60 [0.45, 0.75] | 0.60 [0.45, 0.75] |",
        "| `only` | 5 (1) | - | - | - |",
    ]
    before = (tmp_path / "a/b/curves.svg").read_bytes()
    tables = ["--table", tmp_path / "table.csv", "--area-table", tmp_path / "area.csv"]
    run("--csvs", results, "--out", tmp_path / "a/b", *tables)
    for path, expected in (("table.csv", "**8,000 ± 25,412** (2)"), ("area.csv", "**6,000 ± 19,059** (2)")):
        with (tmp_path / path).open() as file:
            rows = list(csv.DictReader(file))
        assert [row["setting"] for row in rows] == ["low", "high", "only"]
        assert rows[1]["B-v0, 20,000 steps"] == expected and rows[2]["normalised IQM"] == "-"
    assert (tmp_path / "a/b/curves.svg").read_bytes() == before
    # the mean of both evaluations is three quarters of the last
    tables = ["--final-evaluations", "2", "--table", tmp_path / "late.csv"]
    late = run("--csvs", results, "--out", tmp_path / "a/b", *tables)
    assert late.stdout.startswith("Final return, the mean of the last 2 evaluations\n")
    assert (tmp_path / "late.csv").read_bytes() == (tmp_path / "area.csv").read_bytes()


@pytest.mark.parametrize("name", ["summary", "million", "million_late", "baselines_summary"])
def test_the_pages_tables_are_those_of_their_commands(name, tmp_path, monkeypatch):
    """The commands stand on the pages; their numbers are those of grid.csv, field.csv and baselines.csv."""
    root = SCRIPT.parents[1]
    page = (root / "docs/results.md").read_text() + (root / "docs/baselines.md").read_text()
    page = page.replace("\\\n", " ")
    (command,) = re.findall(rf"python benchmark/plot\.py (.*--table benchmark/results/{name}\.csv.*)", page)
    words = shlex.split(command)
    words[words.index("--table") + 1] = str(tmp_path / f"{name}.csv")
    words[words.index("--out") + 1] = str(tmp_path)
    tables = [f"{name}.csv"]
    if "--area-table" in words:
        words[words.index("--area-table") + 1] = str(tmp_path / f"{name}_area.csv")
        tables.append(f"{name}_area.csv")
    monkeypatch.chdir(root)
    plot.main(plot.tyro.cli(plot.PlotArgs, args=words))
    for made in tables:
        assert (tmp_path / made).read_bytes() == (root / "benchmark/results" / made).read_bytes()


def test_every_setting_is_in_the_legend_as_it_is_called(tmp_path):
    names = ["_under", "$dollars$", r"$\broken$", "plain"]
    path = table(tmp_path / "t.csv", *(f"{name},A-v0,1,10,1,python a.py" for name in names))
    made = run("--csvs", path, "--out", tmp_path)
    assert made.returncode == 0, made.stderr
    assert "Warning" not in made.stderr
    picture = (tmp_path / "curves.svg").read_text()
    for name in names:  # letters are drawn as paths, below a comment with the text
        assert f"<!-- {name} -->" in picture


def test_curves_are_those_of_the_table(results):
    curves = plot.read([results])
    steps, returns = curves["high"]["B-v0"]
    assert steps.tolist() == [10_000, 20_000] and returns.tolist() == [[3000, 6000], [5000, 10_000]]
    chosen, env_ids = plot.select(curves, ("B-v0", "A-v0"), ("high", "low"))
    aggregates = plot.aggregate(chosen, env_ids, 100)
    steps, mean, low, high = aggregates["high"]["curve"]
    assert steps.tolist() == [10_000, 20_000] and np.allclose(mean, [0.4, 0.8])
    assert np.allclose([low, high], [[0.3, 0.6], [0.5, 1.0]])


def test_steps_that_only_some_seeds_have_are_left_out(tmp_path):
    rows = ["x,A-v0,1,10,1,python x.py", "x,A-v0,1,20,2,python x.py", "x,A-v0,2,10,3,python x.py"]
    steps, returns = plot.read([table(tmp_path / "t.csv", *rows)])["x"]["A-v0"]
    assert steps.tolist() == [10] and returns.tolist() == [[1], [3]]


def test_scripts_with_a_setting_of_one_name_are_kept_apart(tmp_path):
    path = table(tmp_path / "t.csv", "x,A-v0,1,10,1,python a.py --y", "x,A-v0,1,10,2,python b.py")
    assert set(plot.read([path])) == {"x (a)", "x (b)"}
    path = table(tmp_path / "t.csv", "x,A-v0,1,10,1,python a.py", "y,B-v0,1,10,2,python a.py")
    assert set(plot.read([path], ("y=x",))["x"]) == {"A-v0", "B-v0"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--csvs nowhere.csv", "nowhere.csv: No such file or directory"),
        ("--csvs empty.csv", "the tables have no rows"),
        ("--csvs other.csv", "no table of evaluations"),
        ("--csvs text.csv", "no table of evaluations: ValueError"),
        ("--csvs twice.csv", "two returns of x a.py A-v0, seed 1, step 10"),
        ("--csvs nan.csv", "the return of x a.py A-v0, seed 1, step 10 is nan"),
        ("--csvs infinite.csv", "the return of x a.py A-v0, seed 1, step 10 is -inf"),
        ("--csvs short.csv", "no table of evaluations"),
        ("--csvs apart.csv", "have no step of evaluation in common"),
        ("--env-ids C-v0", "--env-ids C-v0 is not in the tables; they have A-v0, B-v0"),
        ("--settings none", "--settings none is not in the tables"),
        ("--env-ids B-v0 --settings only", "nothing to draw"),
        ("--rename low", "--rename 'low' is not \"OLD=NEW\""),
        ("--rename none=low", "--rename: there is no setting none"),
        ("--rename low=high", "two returns of high x.py A-v0, seed 1"),
        ("--bootstraps 0", "--bootstraps must be >= 1"),
        ("--final-evaluations 0", "--final-evaluations must be >= 1"),
        ("--out results.csv", "--out results.csv is not a folder"),
    ],
)
def test_bad_input_is_refused(results, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    table(tmp_path / "text.csv", "x,A-v0,1,10,high,python a.py")
    table(tmp_path / "twice.csv", "x,A-v0,1,10,1,python a.py", "x,A-v0,1,10,2,python a.py")
    table(tmp_path / "nan.csv", "x,A-v0,1,10,nan,python a.py")
    table(tmp_path / "infinite.csv", "x,A-v0,1,10,-inf,python a.py")
    table(tmp_path / "short.csv", "x,A-v0,1,10")
    table(tmp_path / "apart.csv", "x,A-v0,1,10,1,python a.py", "x,A-v0,2,20,2,python a.py")
    default = [] if "--csvs" in flags else ["--csvs", "results.csv"]
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.tyro.cli(plot.PlotArgs, args=[*default, *flags.split()]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1
