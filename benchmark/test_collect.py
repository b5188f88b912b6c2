"""benchmark/collect.py: the commands of its rows, and run folders as they are found."""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import collect

HEADER = "global_step,num_updates,return_mean,return_std,wall_time_s"
CONFIG = {
    "script": "som_continuous_action.py",
    "exp_name": "x",
    "seed": 2,
    "preset": None,
    "env_id": "Hopper-v4",
    "num_envs": 5,
    "gamma": 0.99,
    "target_entropy": -0.9,
    "autotune": True,
    "resume": None,
    "versions": {"torch": "2.13"},
}


def make_run(folder, evaluations=(), **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "evaluations.csv").write_text("\n".join([HEADER, *evaluations]) + "\n")
    return folder


def run(*words, cwd=None):
    command = [sys.executable, collect.__file__, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_run_without_evaluations_is_left_out(tmp_path):
    make_run(tmp_path / "runs/good", ["100,20,7.5,1,2.5", "200,40,8.5"])  # killed while it wrote the second
    make_run(tmp_path / "runs/begun", seed=3)
    (tmp_path / "runs/refused").mkdir()
    (tmp_path / "runs/half").mkdir()
    (tmp_path / "runs/half/config.json").write_text('{"seed')
    result = run("--csv", "table.csv", "--runs", *sorted((tmp_path / "runs").iterdir()), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["global_step"], row["return_mean"]) for row in rows] == [("2", "100", "7.5")]
    notes = result.stderr.splitlines()
    assert len(notes) == 3
    for name, note in zip(("begun", "half", "refused"), notes, strict=True):
        assert note.startswith(f"note: {tmp_path}/runs/{name} is left out: ")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["nowhere"], "--runs nowhere is not a folder"),
        (["begun"], "none of --runs has an evaluation"),
        (["good", "twin"], "good are both Hopper-v4 x som_continuous_action.py 2"),
    ],
)
def test_bad_input_is_refused(tmp_path, runs, message):
    make_run(tmp_path / "good", ["100,20,7.5,1,2.5"])
    make_run(tmp_path / "twin", ["100,20,9.5,1,2.5"])
    make_run(tmp_path / "begun")
    result = run("--csv", "table.csv", "--runs", *runs, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "table.csv").exists()


def words_of_command(config):
    python, script, *words = shlex.split(collect.command_of(config))
    assert python == "python"
    return script, words


@pytest.mark.parametrize("name", ["x --gamma 1", "it's", "a  b", "$HOME", "--x", "-x"])
def test_a_command_is_read_back_as_it_was_meant(name):
    """By a shell and by argparse, which tyro is built on."""
    config = CONFIG | {"exp_name": name, "target_entropy": -1.5}
    script, words = words_of_command(config)
    assert script == "som_continuous_action.py"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--exp-name", "--env-id"):
        parser.add_argument(flag)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--target-entropy", type=float)
    read = parser.parse_args(words)
    assert vars(read) == {"exp_name": name, "env_id": "Hopper-v4", "seed": 2, "target_entropy": -1.5}
    assert collect.flags_of(collect.command_of(config)) == ["--target-entropy -1.5"]


@pytest.mark.parametrize(
    ("script", "method"),
    [
        ("som_continuous_action.py", {}),
        ("baselines/dacer_continuous_action.py", {}),
        ("baselines/diffusion_continuous_action.py", {"method": "sdac"}),
    ],
)
def test_a_command_says_where_and_how_a_run_was_computed_and_a_table_does_not(script, method):
    """Whether a run is compiled depends on the machine that it begins on, so no default tells it."""
    for compiled, flag in ((True, "--compile"), (False, "--no-compile")):
        config = CONFIG | method | {"script": script, "device": "gpu", "compile": compiled, "gamma": 0.9}
        command = collect.command_of(config)
        assert {flag, "--device", "gpu"} <= set(command.split())
        assert collect.flags_of(command) == [f"--{name} {value}" for name, value in ({"gamma": 0.9} | method).items()]


def test_only_what_is_not_the_default_is_given():
    _, words = words_of_command(CONFIG | {"num_envs": 4, "autotune": False})
    assert words == "--exp-name x --seed 2 --env-id Hopper-v4 --num-envs 4 --no-autotune".split()


def test_a_preset_stands_for_its_values():
    laptop = collect.defaults_of("som_continuous_action.py", "laptop")
    assert laptop["hidden_dim"] == 64 and laptop["num_mc_samples"] == 8 and laptop["gamma"] == 0.99
    _, words = words_of_command(laptop | {"preset": "laptop", "seed": 2, "gamma": 0.9, "num_envs": 5})
    assert words == "--seed 2 --preset laptop --num-envs 5 --gamma 0.9".split()


def test_a_preset_that_is_made_of_another():
    peaks = collect.defaults_of("som_continuous_action.py", "peaks")
    assert peaks["hidden_dim"] == 64 and peaks["num_mc_samples"] == 4 and peaks["reference"] == "box"
    _, words = words_of_command(peaks | {"preset": "peaks", "seed": 1, "climb_steps": 2})
    assert words == "--preset peaks --climb-steps 2".split()
    smooth = collect.defaults_of("som_continuous_action.py", "smooth")
    assert smooth["climb_steps"] == 3 and smooth["target_smoothing"] is True


@pytest.mark.parametrize("preset", [None, "laptop"])
@pytest.mark.parametrize("method", ["sdac", "dipo"])
def test_a_method_stands_for_its_values(method, preset):
    script = "baselines/diffusion_continuous_action.py"
    defaults = collect.defaults_of_method(script, method, preset)
    assert defaults["schedule"] == {"sdac": "linear", "dipo": "cosine"}[method]
    assert defaults["hidden_dim"] == (64 if preset == "laptop" else 256)
    config = {"script": Path(script).name, "method": method, "preset": preset, "seed": 2, "gamma": 0.9}
    script, words = words_of_command(defaults | config)
    assert script == "baselines/diffusion_continuous_action.py"
    for_preset = ["--preset", "laptop"] if preset else []
    assert words == ["--method", method, "--seed", "2", *for_preset, "--gamma", "0.9"]


def test_a_script_that_was_copied_elsewhere_keeps_its_flags():
    script, words = words_of_command(CONFIG | {"script": "my_som.py", "num_envs": 4, "autotune": False})
    assert script == "my_som.py"
    assert words == (
        "--exp-name x --seed 2 --env-id Hopper-v4 --num-envs 4 --gamma 0.99 --target-entropy -0.9 --no-autotune".split()
    )
