"""benchmark/best_of_n.py on runs of a few steps."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import best_of_n
import collect

FLAGS = "--env-id Pendulum-v1 --num-envs 2 --learning-starts 20 --total-timesteps 60 --num-episodes 2"
FLAGS = f"{FLAGS} --hidden-dim 8 --num-mc-samples 2 --best-of-n 2 --batch-size 8 --device cpu".split()
# sixteen seeds: their returns are longer than a printed line
SCRIPTS = {"som_continuous_action.py": ["--no-compile"], "som_continuous_action_jax.py": ["--num-seeds=16"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: folder of the first seed}"""
    folder = tmp_path_factory.mktemp("runs")
    for script, flags in SCRIPTS.items():
        command = [sys.executable, str(collect.ROOT / script), *FLAGS, *flags]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return {script: next(folder.glob(f"runs/*__{Path(script).stem}__1__*")) for script in SCRIPTS}


def final_returns(run, first_seed=1):
    """Of all seeds that were trained beside this run's, rounded as --evaluate prints them and then as the table."""
    name, _, ending = run.name.partition(f"__{first_seed}__")
    returns = []
    for seed in range(1, 17):
        path = run.parent / f"{name}__{seed}__{ending}" / "evaluations.csv"
        if path.is_file():
            with path.open() as file:
                mean = float(list(csv.DictReader(file))[-1]["return_mean"])
            returns.append(f"{round(mean, 1):.0f}")
    return returns


def test_with_its_own_n_a_run_has_the_return_of_its_last_evaluation(runs, tmp_path, capsys):
    path = tmp_path / "table.csv"
    (tmp_path / "refused").mkdir()
    args = best_of_n.BestOfNArgs(runs=(tmp_path / "refused", *runs.values()), csv=path, best_of_n=(1, 2))
    best_of_n.main(args)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["script"] for row in rows] == list(SCRIPTS)
    assert [len(row["N = 1"].split()) for row in rows] == [1, 16]
    for row, run in zip(rows, runs.values(), strict=True):
        assert row["N = 2"].split() == final_returns(run)
        assert row["trained with"] == "2" and row["steps"] == "60" and row["episodes"] == "2"
        assert row["N = 1"] != row["N = 2"] and row["noise 0"] not in (row["N = 1"], row["N = 2"])
        for k, mean in enumerate(row["noise 0"].split()):
            script = importlib.import_module(row["script"].removesuffix(".py"))
            folder = next(run.parent.glob(f"*__{k + 1}__{run.name.split('__')[-1]}"))
            policy = script.load_policy(folder, deterministic=True)
            eval_seed = int(np.random.SeedSequence([k + 1, 0, 1]).generate_state(1)[0])
            returns = script.evaluate(policy, "Pendulum-v1", 2, eval_seed)
            assert float(mean) == pytest.approx(returns.mean(), abs=0.56)
    assert [len(row["noise 0"].split()) for row in rows] == [1, 16]
    assert capsys.readouterr().err == f"note: {tmp_path}/refused is left out: it has no config.json\n"
    run = runs["som_continuous_action.py"]
    best_of_n.main(best_of_n.BestOfNArgs(runs=(run,), csv=path, best_of_n=(2,), num_episodes=3))
    with path.open() as file:
        (more,) = csv.DictReader(file)
    assert more["episodes"] == "3" and more["N = 2"].split() != final_returns(run)


def test_the_step_is_that_of_the_newest_checkpoint(tmp_path):
    script = "som_continuous_action_jax.py"
    assert best_of_n.last_step(tmp_path, script) == 0
    for step in 40, 9_000, 400:  # a run that was ended before its total_timesteps
        (tmp_path / f"checkpoint_{step:010d}.npz").touch()
    assert best_of_n.last_step(tmp_path, script) == 9_000


def test_sac_and_ppo_have_one_action(tmp_path, capsys):
    command = [sys.executable, "-W", "ignore", str(collect.ROOT / best_of_n.SB3), "--env-id", "Pendulum-v1"]
    command += "--total-timesteps 60 --num-envs 2 --hidden-dim 8 --num-episodes 2 --device cpu".split()
    for flags in (["--learning-starts", "20", "--seed", "3"], "--algo ppo --batch-size 20".split()):
        subprocess.run([*command, *flags], cwd=tmp_path, check=True, capture_output=True)
    names = "Pendulum-v1__sac__3__*", "Pendulum-v1__ppo__1__*"
    runs = tuple(next((tmp_path / "runs").glob(name)) for name in names)
    path = tmp_path / "table.csv"
    best_of_n.main(best_of_n.BestOfNArgs(runs=runs, csv=path, best_of_n=(1, 4)))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["sac", "ppo"]
    for row, run in zip(rows, runs, strict=True):
        (last,) = final_returns(run, row["first_seed"])
        assert row["N = 1"] == last and row["N = 4"] == "" and row["trained with"] == "1" and row["steps"] == "60"
        assert row["script"] == "benchmark/sb3.py" and row["episodes"] == "2" and row["noise 0"] == ""
    capsys.readouterr()
    message = refusal(capsys, runs=runs, csv=tmp_path / "none.csv", best_of_n=(4,))
    assert "has one action in a state: --best-of-n must have a 1" in message


def refusal(capsys, **options):
    with pytest.raises(SystemExit) as stop:
        best_of_n.main(best_of_n.BestOfNArgs(**options))
    assert stop.value.code == 2
    assert not options["csv"].exists()
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    return message


def test_bad_input_is_refused(runs, tmp_path, capsys):
    path = tmp_path / "table.csv"
    assert "not the folder of a run" in refusal(capsys, runs=(Path("runs/nowhere"),), csv=path)
    assert "--runs and --best-of-n need" in refusal(capsys, runs=(), csv=path)
    # the script's own message
    som_run = runs["som_continuous_action.py"]
    assert "--best-of-n cannot be 0" in refusal(capsys, runs=(som_run,), csv=path, best_of_n=(0,))
    assert "--num-episodes cannot be 0" in refusal(capsys, runs=(som_run,), csv=path, num_episodes=0)
    (tmp_path / "copied").mkdir()
    config = (som_run / "config.json").read_text().replace("som_continuous_action.py", "my_som.py")
    (tmp_path / "copied/config.json").write_text(config)
    assert "is of my_som.py, which is not in" in refusal(capsys, runs=(tmp_path / "copied",), csv=path)
