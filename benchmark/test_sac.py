"""benchmark/sac.py: the run folder, the number of steps and updates, and the evaluation of the other scripts."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import collect

ROOT = Path(__file__).parents[1]
FEW = "--total-timesteps 222 --learning-starts 100 --eval-frequency 100 --hidden-dim 8 --batch-size 16"
FEW = f"{FEW} --device cpu".split()


def run(script, folder, *flags):
    words = [sys.executable, "-W", "ignore", ROOT / script, "--env-id", "InvertedPendulum-v4", *FEW, *flags]
    finished = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (made,) = (folder / "runs").iterdir()
    with (made / "evaluations.csv").open() as file:
        return made, list(csv.DictReader(file))


def test_run_is_like_that_of_som(tmp_path):
    (tmp_path / "som").mkdir()
    (tmp_path / "sac").mkdir()
    small = "--num-envs 4 --num-mc-samples 2 --best-of-n 1 --no-compile".split()
    _, of_som = run("som_continuous_action.py", tmp_path / "som", *small)
    made, of_sac = run("benchmark/sac.py", tmp_path / "sac", "--seed", "2")
    assert list(of_som[0]) == list(of_sac[0])
    columns = "global_step", "num_updates"
    assert [[row[name] for name in columns] for row in of_som] == [[row[name] for name in columns] for row in of_sac]
    assert [row["global_step"] for row in of_sac] == ["100", "200", "220"]
    assert of_sac[-1]["num_updates"] == "30"
    config = json.loads((made / "config.json").read_text())
    assert config["script"] == "sac.py" and config["seed"] == 2 and "stable-baselines3" in config["versions"]
    assert list(made.glob("events.out.tfevents.*"))

    words = [sys.executable, ROOT / "benchmark/collect.py", "--csv", tmp_path / "x.csv", "--runs", made]
    subprocess.run(words, check=True, capture_output=True)
    with (tmp_path / "x.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert row["script"] == "benchmark/sac.py" and row["setting"] == "sac"
    command = "python benchmark/sac.py --seed 2 --device cpu --env-id InvertedPendulum-v4 --total-timesteps 222"
    assert row["command"].startswith(command)

    (tmp_path / "again").mkdir()
    _, again = run("benchmark/sac.py", tmp_path / "again", "--seed", "2")
    assert [row["return_mean"] for row in again] == [row["return_mean"] for row in of_sac]


def test_the_defaults_are_those_of_the_preset():
    laptop = collect.defaults_of("som_continuous_action.py", "laptop")
    own = collect.defaults_of("benchmark/sac.py")
    shared = own.keys() & laptop.keys() - {"exp_name", "env_id"}
    assert len(shared) > 10
    assert {name: own[name] for name in shared} == {name: laptop[name] for name in shared}
    assert own["learning_rate"] == laptop["q_lr"] == laptop["policy_lr"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env-id HalfCheeta-v4", "HalfCheeta"),
        ("--learning-rate 0", "--learning-rate must be > 0"),
        ("--batch-size 0", "--batch-size cannot be 0"),
        ("--num-episodes 0", "--num-episodes cannot be 0"),
        ("--env-id CartPole-v1", "has actions Discrete"),
        (
            "--env-id HalfCheetah-v5 --total-timesteps 5000",
            "must be larger, by --num-envs or more",
        ),
    ],
)
def test_bad_input_is_refused(tmp_path, flags, message):
    words = [sys.executable, "-W", "ignore", ROOT / "benchmark/sac.py", *flags.split()]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 2
    assert message in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
