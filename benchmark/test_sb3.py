"""benchmark/sb3.py: the run folder, the number of steps and updates, and the evaluation of the other scripts."""

import csv
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import collect
import sb3

ROOT = Path(__file__).parents[1]
FEW = "--total-timesteps 222 --learning-starts 100 --eval-frequency 100 --hidden-dim 8 --batch-size 16"
FEW = f"{FEW} --device cpu".split()
PPO = "--algo ppo --total-timesteps 240 --batch-size 80 --eval-frequency 100 --hidden-dim 8 --device cpu".split()


def run(script, folder, *flags):
    words = [sys.executable, "-W", "ignore", ROOT / script, "--env-id", "InvertedPendulum-v4", *flags]
    finished = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (made,) = (folder / "runs").iterdir()
    with (made / "evaluations.csv").open() as file:
        return made, list(csv.DictReader(file))


def collected(folder, run_folder):
    """The last row that collect.py makes of a run."""
    words = [sys.executable, ROOT / "benchmark/collect.py", "--csv", folder / "x.csv", "--runs", run_folder]
    subprocess.run(words, check=True, capture_output=True)
    with (folder / "x.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def test_run_is_like_that_of_som(tmp_path):
    (tmp_path / "som").mkdir()
    (tmp_path / "sac").mkdir()
    small = "--num-envs 4 --num-mc-samples 2 --best-of-n 1 --no-compile".split()
    _, of_som = run("som_continuous_action.py", tmp_path / "som", *FEW, *small)
    made, of_sac = run("benchmark/sb3.py", tmp_path / "sac", *FEW, "--seed", "2")
    assert list(of_som[0]) == list(of_sac[0])
    columns = "global_step", "num_updates"
    assert [[row[name] for name in columns] for row in of_som] == [[row[name] for name in columns] for row in of_sac]
    assert [row["global_step"] for row in of_sac] == ["100", "200", "220"]
    assert of_sac[-1]["num_updates"] == "30"
    config = json.loads((made / "config.json").read_text())
    assert config["script"] == "sb3.py" and config["algo"] == "sac" and config["seed"] == 2
    assert "stable-baselines3" in config["versions"] and list(made.glob("events.out.tfevents.*"))

    row = collected(tmp_path, made)
    assert row["script"] == "benchmark/sb3.py" and row["setting"] == "sac"
    command = "python benchmark/sb3.py --seed 2 --device cpu --env-id InvertedPendulum-v4 --total-timesteps 222"
    assert row["command"].startswith(command)

    # a run folder from when the script was sac.py
    del config["algo"]
    (made / "config.json").write_text(json.dumps(config | {"script": "sac.py"}))
    row = collected(tmp_path, made)
    assert row["script"] == "benchmark/sac.py" and row["setting"] == "sac"
    assert row["command"].startswith(command.replace("sb3.py", "sac.py"))

    (tmp_path / "again").mkdir()
    _, again = run("benchmark/sb3.py", tmp_path / "again", *FEW, "--seed", "2")
    assert [row["return_mean"] for row in again] == [row["return_mean"] for row in of_sac]


def test_run_of_ppo(tmp_path):
    made, rows = run("benchmark/sb3.py", tmp_path, *PPO)
    assert made.name.startswith("InvertedPendulum-v4__ppo__1__")
    assert [row["global_step"] for row in rows] == ["160", "240"]  # after the rollout that passes 100, and at the end
    assert all(0 < int(row["num_updates"]) <= int(row["global_step"]) for row in rows)  # at most 80 on each 80 steps
    assert all(1 <= float(row["return_mean"]) <= 1000 for row in rows)
    config = json.loads((made / "config.json").read_text())
    assert config["exp_name"] == "ppo" and config["learning_rate"] == 1e-4 and config["batch_size"] == 80
    row = collected(tmp_path, made)
    assert row["setting"] == "ppo"
    flags = "--algo ppo --device cpu --env-id InvertedPendulum-v4 --total-timesteps 240 --batch-size 80"
    assert row["command"] == f"python benchmark/sb3.py {flags} --hidden-dim 8 --eval-frequency 100"


def evaluated(run_folder, num_episodes, *flags):
    words = [sys.executable, "-W", "ignore", ROOT / "benchmark/sb3.py", "--evaluate", run_folder, *flags]
    words += ["--num-episodes", str(num_episodes)]
    finished = subprocess.run(words, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("flags", [[*FEW, "--seed", "2"], PPO])
def test_a_finished_run_is_evaluated_again(tmp_path, flags):
    """A SAC and a PPO whose networks were stored: the episodes of the last evaluation come first."""
    made, rows = run("benchmark/sb3.py", tmp_path, *flags, "--num-episodes", "3")
    before = sorted(path.name for path in made.iterdir())
    mean, std = (float(rows[-1][name]) for name in ("return_mean", "return_std"))
    same = evaluated(made, 3)
    assert same.startswith(f"return {mean:.1f} +- {std:.1f}, seed {2 if '--seed' in flags else 1}, by episode [")
    more = evaluated(made, 5, "--device", "cpu")
    episodes = [json.loads(text.partition("by episode ")[2]) for text in (same, more)]
    assert len(episodes[1]) == 5 and episodes[1][:3] == episodes[0]
    assert evaluated(made, 3) == same
    assert sorted(path.name for path in made.iterdir()) == before and len(list((tmp_path / "runs").iterdir())) == 1


def test_bad_input_of_evaluate_is_refused(tmp_path):
    made, _ = run("benchmark/sb3.py", tmp_path, *PPO)

    def refusal(folder, *flags):
        words = [sys.executable, "-W", "ignore", ROOT / "benchmark/sb3.py", "--evaluate", folder, *flags]
        finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        *warnings, error = finished.stderr.splitlines()  # the library of environments warns of old ones
        assert finished.returncode == 2 and error.startswith("error: "), finished.stderr
        assert not any("error" in line for line in warnings), finished.stderr
        return error

    assert "nowhere is not the folder of a run" in refusal("nowhere")
    assert "not the folder of a run" in refusal("")
    takes = "--evaluate takes --num-episodes and --device alone"
    assert takes in refusal(made, "--hidden-dim", "16")
    assert takes in refusal(made, "--algo", "sac")
    assert "--num-episodes cannot be 0" in refusal(made, "--num-episodes", "0")
    weights = (made / "policy.pt").read_bytes()
    (made / "policy.pt").write_bytes(weights[:1000])
    assert "policy.pt cannot be read" in refusal(made)
    (made / "policy.pt").unlink()
    assert "has no policy.pt: a run writes it at its end" in refusal(made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"script": "som_continuous_action.py"}))
    assert "is of som_continuous_action.py, and this is sb3.py" in refusal(made)
    (made / "config.json").write_text("[]")
    assert "not the folder of a run" in refusal(made)


def make_ppo(**changes):
    from stable_baselines3.common.vec_env import DummyVecEnv

    args = sb3.Args(algo="ppo", **(sb3.PPO | {"hidden_dim": 8, "num_envs": 2, "batch_size": 40} | changes))
    env = DummyVecEnv(2 * [lambda: sb3.make_training_env("InvertedPendulum-v4")])
    net = {"net_arch": 3 * [8], "activation_fn": torch.nn.GELU}
    return sb3.make_ppo({"env": env, "policy_kwargs": net, "seed": 1, "device": "cpu"}, args)


def test_sac_gets_its_arguments():
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv(2 * [lambda: sb3.make_training_env("InvertedPendulum-v4")])
    sizes = {"num_envs": 2, "batch_size": 32, "learning_starts": 7, "buffer_size": 100, "updates_per_step": 3}
    args = sb3.Args(learning_rate=2e-3, **sizes)
    model, optimizer = sb3.make_sac({"env": env, "seed": 1, "device": "cpu"}, args)
    given = (model.batch_size, model.learning_starts, model.gradient_steps, model.replay_buffer.buffer_size * 2)
    assert given == (32, 7, 3, 100) and model.gamma == 0.99 and model.tau == 0.005
    rates = [x.param_groups[0]["lr"] for x in (optimizer, model.actor.optimizer, model.ent_coef_optimizer)]
    assert rates == 3 * [2e-3]


def test_ppo_has_the_tables_of_the_paper():
    model, _ = make_ppo()
    assert model.gamma == 0.995 and model.gae_lambda == 0.95 and model.target_kl == 0.01 and model.n_epochs == 80
    assert model.clip_range(1) == 0.2 and model.batch_size == model.n_steps * model.n_envs == 40
    assert sb3.PPO["batch_size"] == 4_000 and sb3.PPO["learning_rate"] == 1e-4
    layers = [type(layer).__name__ for layer in model.policy.mlp_extractor.policy_net]
    assert layers == 3 * ["Linear", "GELU"]


@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_steps_with_a_rate_of_its_own_for_the_value(seed):
    """The first step of Adam moves a weight by its rate, whatever the gradient is."""
    model, optimizer = make_ppo()
    model.set_random_seed(seed)
    policy = model.policy
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    model.n_epochs = 1
    model.learn(40)
    for name, weight in policy.named_parameters():
        rate = 1e-3 if "value" in name else 1e-4
        moved = (weight - before[name]).abs().max().item()
        assert 0.5 * rate < moved < 1.01 * rate, name  # less where the gradient is near Adam's epsilon
    in_groups = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(in_groups) == len({id(weight) for weight in in_groups}) == len(before)


def test_the_defaults_are_those_of_the_preset():
    laptop = collect.defaults_of("som_continuous_action.py", "laptop")
    own = collect.defaults_of("benchmark/sb3.py")
    shared = own.keys() & laptop.keys() - {"exp_name", "env_id"}
    assert len(shared) > 10
    assert {name: own[name] for name in shared} == {name: laptop[name] for name in shared}
    assert own["learning_rate"] == laptop["q_lr"] == laptop["policy_lr"]
    of_ppo = collect.defaults_of("benchmark/sb3.py", "ppo")
    assert {name for name in own if own[name] != of_ppo[name]} == sb3.PPO.keys()


def test_rows_of_before_the_renaming_are_sac(tmp_path):
    spec = importlib.util.spec_from_file_location("plot", ROOT / "benchmark/plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    columns = "script,setting,env_id,seed,global_step,return_mean,command"
    rows = [f"benchmark/{name}.py,sac,A-v0,{seed},10,{seed},python x" for seed, name in ((1, "sac"), (2, "sb3"))]
    (tmp_path / "t.csv").write_text("\n".join([columns, *rows, ""]))
    _, returns = plot.read([tmp_path / "t.csv"])["sac"]["A-v0"]
    assert returns.tolist() == [[1], [2]]
    old, new = collect.read(tmp_path / "t.csv")
    assert collect.run_of(old)[:3] == collect.run_of(new)[:3]
    table = collect.table_of_returns([old])
    assert "| A-v0 | sac | sac |" in table  # as it was made


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
        ("--algo ppo --learning-starts 5000", "--learning-starts is of --algo sac alone"),
        ("--algo ppo --buffer-size 1000", "--buffer-size is of --algo sac alone"),
        ("--algo ppo --updates-per-step 1", "--updates-per-step is of --algo sac alone"),
        ("--algo ppo --total-timesteps 5000", "--total-timesteps must be a multiple of --batch-size"),
        ("--algo ppo --num-envs 3", "--batch-size must be a multiple of --num-envs"),
        ("--algo ppo --num-envs 1 --batch-size 1", "--batch-size must be a multiple of --num-envs, and more than 1"),
        ("--algo ppo --env-id CartPole-v1", "has actions Discrete"),
    ],
)
def test_bad_input_is_refused(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sb3.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmark/sb3.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_bad_input_of_the_script_as_a_user_runs_it(tmp_path):
    words = [sys.executable, "-W", "ignore", ROOT / "benchmark/sb3.py", "--env-id", "HalfCheeta-v4"]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 2 and len(finished.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
