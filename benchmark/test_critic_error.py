"""benchmark/critic_error.py: closed forms, a critic that is right, and runs of a few steps."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import collect
import critic_error

FLAGS = "--env-id MountainCarContinuous-v0 --num-envs 2 --learning-starts 20 --total-timesteps 60 --num-episodes 1"
FLAGS = f"{FLAGS} --hidden-dim 8 --num-mc-samples 2 --best-of-n 2 --batch-size 8 --device cpu".split()


class Countdown(gym.Env):
    """Reward 1 a step; the state is the number of steps left. It terminates, or is truncated, at 0."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, length=100, truncates=False):
        self.length, self.truncates = length, truncates

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length
        return np.array([self.left], np.float32), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        return np.array([self.left], np.float32), 1.0, over and not self.truncates, over and self.truncates, {}


def agent_with(q_fn, env_id, gamma, reward_scale=1.0):
    """An agent of three candidates, the first of which it takes."""
    candidates = torch.tensor([[[0.5, 0.5], [0.0, 0.0], [-0.5, -0.5]]])
    return SimpleNamespace(
        args=SimpleNamespace(env_id=env_id, gamma=gamma, reward_scale=reward_scale),
        act=lambda obs: (candidates[:, 0], candidates),
        q_fn=q_fn,
    )


def test_discounted_returns_of_constant_rewards():
    gamma = 0.9
    returns = critic_error.discounted_returns(np.ones(50), gamma)
    np.testing.assert_allclose(returns, (1 - gamma ** np.arange(50, 0, -1)) / (1 - gamma), rtol=1e-12)
    np.testing.assert_array_equal(critic_error.discounted_returns(np.array([1.0, 2.0, 4.0]), 0.5), [3.0, 4.0, 4.0])


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_a_time_limit_hides_at_most_a_hundredth(gamma):
    assert critic_error.num_known(1000, True, gamma) == 1000
    known = critic_error.num_known(1000, False, gamma)
    assert gamma ** (1000 - known) <= 0.01
    assert gamma ** (1000 - known - 1) > 0.01
    assert critic_error.num_known(3, False, 0.99) == 0


def test_the_error_of_a_critic_that_is_off_by_a_known_amount():
    gamma, reward_scale = 0.9, 0.5
    gym.register("Countdown-v0", Countdown)

    def q_fn(obs, actions):  # right but for 3, and 2 more where the action is positive
        true = reward_scale * (1 - gamma ** obs.double()) / (1 - gamma)  # (B, 1)
        return true + 3 + 2 * (actions[..., 0] > 0)

    numbers = critic_error.measure(agent_with(q_fn, "Countdown-v0", gamma, reward_scale), num_episodes=2, seed=1)
    true = reward_scale * (1 - gamma ** np.arange(1, 101)) / (1 - gamma)
    assert numbers["states"] == 200
    assert numbers["discounted return"] == pytest.approx(true.mean())
    assert numbers["Q of the chosen"] == pytest.approx(true.mean() + 5)
    assert numbers["mean error"] == pytest.approx(5)
    assert numbers["std of the error"] == pytest.approx(0, abs=1e-6)
    assert numbers["mean Q of the candidates"] == pytest.approx(true.mean() + 3 + 2 / 3)


def test_steps_close_to_a_time_limit_are_left_out(capsys):
    gym.register("TimeLimit-v0", Countdown, kwargs={"truncates": True})
    agent = agent_with(lambda obs, actions: torch.zeros(actions.shape[:2]), "TimeLimit-v0", 0.9)
    numbers = critic_error.measure(agent, num_episodes=1, seed=1)
    assert numbers["states"] == 100 - 44  # 0.9^44 = 0.0097
    agent.args.gamma = 0.99
    with pytest.raises(SystemExit) as exit_:
        critic_error.measure(agent, num_episodes=1, seed=1)
    assert exit_.value.code == 2
    assert "TimeLimit-v0 ends its episodes too early" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["som_continuous_action.py", "som_continuous_action_jax.py"])
def test_on_a_run(script, tmp_path):
    flags = ["--num-seeds=2"] if "jax" in script else ["--no-compile"]
    command = [sys.executable, str(collect.ROOT / script), *FLAGS, *flags]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    runs = sorted(tmp_path.glob("runs/*"))
    table = tmp_path / "table.csv"
    # of two seeds any folder stands for both
    critic_error.main(critic_error.CriticErrorArgs(runs=(runs[-1],), csv=table, num_episodes=1))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(1, len(runs) + 1)]
    for row in rows:
        assert (row["env_id"], row["steps"], row["N"]) == ("MountainCarContinuous-v0", "60", "2")
        error = float(row["Q of the chosen"]) - float(row["discounted return"])
        assert float(row["mean error"]) == pytest.approx(error, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": ()}, "--runs needs at least one folder"),
        ({"num_episodes": 0}, "--num-episodes must be >= 1, got 0"),
        ({"seed": -1}, "--seed must be >= 0, got -1"),
        ({}, "nowhere"),
    ],
)
def test_bad_input(options, message, tmp_path, capsys):
    args = {"runs": (tmp_path / "nowhere",), "csv": tmp_path / "table.csv"} | options
    with pytest.raises(SystemExit) as exit_:
        critic_error.main(critic_error.CriticErrorArgs(**args))
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "table.csv").exists()
