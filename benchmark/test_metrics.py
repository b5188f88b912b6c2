"""benchmark/metrics.py on TensorBoard files written by hand."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parent))
import metrics


def save_run(folder, setting, *files, env_id="A-v0"):
    """A run whose every metric has these (step, value) points, a TensorBoard file for each list."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"exp_name": setting, "env_id": env_id}))
    for k, points in enumerate(files):
        writer = SummaryWriter(str(folder), filename_suffix=str(k))
        for step, value in points:
            for tag in metrics.TAGS:
                writer.add_scalar(tag, value, step)
        writer.close()
    return folder


def test_means_of_runs_between_two_steps(tmp_path):
    """A resumed run has two files; settings are columns; what is outside of the steps does not count."""
    a = save_run(tmp_path / "a", "x", [(0, 100.0), (10, 1.0)], [(20, 3.0), (30, 100.0)])
    b = save_run(tmp_path / "b", "x", [(10, 4.0)])
    c = save_run(tmp_path / "c", "y", [(15, 0.5)])
    path = tmp_path / "table.csv"
    metrics.main(metrics.MetricsArgs(csv=path, runs=(a, b, c), steps=((10, 20),)))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == metrics.TAGS
    assert all((float(row["x"]), float(row["y"])) == (3.0, 0.5) for row in rows)  # ((1 + 3) / 2 + 4) / 2


def test_columns_of_several_environments_and_spans(tmp_path):
    a = save_run(tmp_path / "a", "x", [(10, 1.0), (2_000, 5.0)])
    b = save_run(tmp_path / "b", "x", [(10, 2.0), (2_000, 6.0)], env_id="B-v0")
    path = tmp_path / "table.csv"
    metrics.main(metrics.MetricsArgs(csv=path, runs=(a, b), steps=((0, 100), (1_000, 2_000))))
    with path.open() as file:
        row = next(csv.DictReader(file))
    assert row.pop("metric") == metrics.TAGS[0]
    assert {title: float(cell) for title, cell in row.items()} == {
        "x A-v0 0 to 100": 1.0,
        "x A-v0 1,000 to 2,000": 5.0,
        "x B-v0 0 to 100": 2.0,
        "x B-v0 1,000 to 2,000": 6.0,
    }


def test_mean_between():
    points = np.array([[0, 1, 2], [5.0, 6.0, 10.0]])
    assert metrics.mean_between(points, 1, 2) == 8
    assert np.isnan(metrics.mean_between(points, 3, 9))


@pytest.mark.parametrize(
    ("runs", "steps", "message"),
    [
        ([], (0, 1), "--runs needs at least one folder"),
        (["nowhere"], (0, 1), "nowhere is not the folder of a run"),
        (["run"], (1, 0), "--steps must be 0 <= first <= last, got 1 and 0"),
        (["run"], (20, 30), "run has no losses/qf_values between the steps 20 and 30"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, capsys, runs, steps, message):
    monkeypatch.chdir(tmp_path)
    save_run(Path("run"), "x", [(10, 1.0)])
    with pytest.raises(SystemExit) as stop:
        metrics.main(metrics.MetricsArgs(csv=Path("table.csv"), runs=tuple(map(Path, runs)), steps=(steps,)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1
