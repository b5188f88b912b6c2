"""benchmark/best_of_n.py on runs of a few steps."""

import csv
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, __file__.rpartition("/")[0])
import best_of_n

FLAGS = "--env-id Pendulum-v1 --num-envs 2 --learning-starts 20 --total-timesteps 60 --num-episodes 10"
FLAGS = f"{FLAGS} --hidden-dim 8 --num-mc-samples 2 --best-of-n 2 --batch-size 8".split()
SCRIPTS = {"som_continuous_action.py": ["--no-cuda", "--no-compile"], "som_continuous_action_jax.py": ["--num-seeds=2"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for script, flags in SCRIPTS.items():
        command = [sys.executable, str(best_of_n.ROOT / script), *FLAGS, *flags]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return sorted(folder.glob("runs/*__1__*"))


def final_returns(run):
    """Of all seeds that were trained beside this run's."""
    for folder in sorted(run.parent.glob(run.name.split("__1__")[0] + "__?__*")):
        with (folder / "evaluations.csv").open() as file:
            yield f"{float(list(csv.DictReader(file))[-1]['return_mean']):.0f}"


def test_with_its_own_n_a_run_has_the_return_of_its_last_evaluation(runs, tmp_path):
    path = tmp_path / "table.csv"
    best_of_n.main(best_of_n.BestOfNArgs(runs=tuple(runs), csv=path, best_of_n=(1, 2)))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["script"] for row in rows] == list(SCRIPTS) and [len(row["N = 1"].split()) for row in rows] == [1, 2]
    for row, run in zip(rows, runs, strict=True):
        assert row["N = 2"].split() == list(final_returns(run)) and row["trained with"] == "2"
        assert row["N = 1"] != row["N = 2"]


def test_what_is_not_a_run_is_told(runs, tmp_path, capsys):
    args = best_of_n.BestOfNArgs(runs=(pathlib.Path("runs/nowhere"),), csv=tmp_path / "table.csv")
    with pytest.raises(SystemExit) as stop:
        best_of_n.main(args)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "not the folder of a run" in message and len(message.splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        best_of_n.main(best_of_n.BestOfNArgs(runs=(), csv=tmp_path / "table.csv"))
    assert stop.value.code == 2 and "--runs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:  # the script's own message
        best_of_n.main(best_of_n.BestOfNArgs(runs=tuple(runs), csv=tmp_path / "table.csv", best_of_n=(0,)))
    assert stop.value.code == 2 and "--best-of-n must be in" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()
