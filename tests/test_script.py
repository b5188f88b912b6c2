"""The script as a user runs it: the real loop over toy environments, a short run of Walker2d-v4, bad input."""

import ast
import csv
import dataclasses
import fcntl
import importlib.util
import io
import json
import math
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tokenize
import tomllib
import types
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import som_continuous_action as som

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "som_continuous_action.py"
TINY = (
    "--device cpu --no-compile --hidden-dim 16 --num-mc-samples 4 --best-of-n 3 --batch-size 32 --num-envs 2 "
    "--learning-starts 40 --total-timesteps 200 --eval-frequency 100 --buffer-size 1000"
).split()


class CountingEnv(gym.Env):
    """The observation is (episode number, step in the episode, end); the reward is the step's number."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-2.0, 2.0, (2,))
    instances = 0
    events: typing.ClassVar = []

    def __init__(self, length: int, terminates: bool, broken_at: int | None = None):
        self.length, self.terminates, self.broken_at = length, terminates, broken_at
        CountingEnv.instances += 1
        self.episode = 1000 * CountingEnv.instances  # no two episodes share a number

    def observe(self, end: bool = False):
        return np.array([self.episode, self.t, end], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        CountingEnv.events.append("step")
        self.t += 1
        end = self.t == self.length
        observation = self.observe(end)
        if self.broken_at is not None and self.episode % 1000 * self.length > self.broken_at:
            observation = observation * np.nan
        return observation, float(self.t), end and self.terminates, end and not self.terminates, {}


class RenderedEnv(CountingEnv):
    metadata: typing.ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None):
        super().__init__(4, False)
        self.render_mode = render_mode

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


class AsymmetricEnv(CountingEnv):
    """Actions around 20, of which each episode's return is the mean."""

    action_space = gym.spaces.Box(np.float32([15, -0.1]), np.float32([30, 0.3]))

    def __init__(self):
        super().__init__(4, False)

    def observe(self, end: bool = False):
        return np.array([0, self.t, end], np.float32)

    def step(self, action):
        observation, _, *ends = super().step(action)
        return observation, float(action[0]) / 4, *ends


class SpacesEnv(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


BOX = gym.spaces.Box(-1.0, 1.0, (2,))
TOYS = {
    "Terminates-v0": lambda: CountingEnv(3, True),
    "Truncates-v0": lambda: CountingEnv(4, False),
    "Breaks-v0": lambda: CountingEnv(5, False, broken_at=100),
    "Rendered-v0": RenderedEnv,
    "Asymmetric-v0": AsymmetricEnv,
    "DiscreteActions-v0": lambda: SpacesEnv(BOX, gym.spaces.Discrete(3)),
    "DictObservations-v0": lambda: SpacesEnv(gym.spaces.Dict(x=BOX), BOX),
    "Images-v0": lambda: SpacesEnv(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "Unbounded-v0": lambda: SpacesEnv(BOX, gym.spaces.Box(-np.inf, np.inf, (2,))),
}
for name, make in TOYS.items():
    gym.register(name, make, disable_env_checker=True, max_episode_steps=1000)


@pytest.fixture(autouse=True)
def handlers():
    """The script, run in this process, takes over SIGINT and SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_loop(monkeypatch, folder, *flags):
    """Run the script as __main__ in this process, where the toy environments are; returns its variables."""
    monkeypatch.chdir(folder)
    CountingEnv.instances = 0
    CountingEnv.events.clear()
    locked, flock = [], fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: (locked.append(file), flock(file, operation)))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *flags])
    try:
        run = types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))
    finally:
        monkeypatch.setattr(fcntl, "flock", flock)
        for file in locked:  # as at the end of a process
            file.close()
    run.writer.close()
    return run


def scalars(run_folder):
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def stored(run):
    """The columns of all rows that a run has added, from the host's copy."""
    rows = torch.from_numpy(run.rb.on_host[: run.num_added])
    columns = rows.split(run.rb.padded_widths, dim=1)
    columns = [column[:, :width] for column, width in zip(columns, run.rb.widths, strict=True)]
    return som.Batch(*columns[:3], columns[3].squeeze(1), columns[4].squeeze(1))


def run_script(folder, *flags):
    return subprocess.run([sys.executable, "-W", "ignore", SCRIPT, *flags], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run in each of two environments, read by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        names, folder = ("Terminates-v0", "Truncates-v0"), tmp_path_factory.mktemp("runs")
        return {name: run_loop(patch, folder, "--env-id", name) for name in names}, folder


@pytest.mark.parametrize(("env_id", "length"), [("Terminates-v0", 3), ("Truncates-v0", 4)])
def test_rows_and_episodes_of_the_real_loop(runs, env_id, length):
    run, folder = runs[0][env_id], runs[1]
    rows = som.Batch(*(column.numpy() for column in stored(run)))
    assert run.num_added == 200
    np.testing.assert_array_equal(rows.obs[:, 0], rows.next_obs[:, 0])  # no row crosses episodes
    np.testing.assert_array_equal(rows.obs[:, 1] + 1, rows.next_obs[:, 1])  # nor skips or repeats a step
    np.testing.assert_array_equal(rows.rewards, rows.next_obs[:, 1])
    ends = rows.next_obs[:, 2] == 1
    np.testing.assert_array_equal(ends, rows.next_obs[:, 1] == length)
    np.testing.assert_array_equal(rows.terminated, ends if env_id == "Terminates-v0" else 0 * ends)
    pairs = list(zip(rows.obs[:, 0], rows.obs[:, 1], strict=True))
    assert len(set(pairs)) == len(pairs)  # every transition is stored once
    assert np.abs(rows.actions).max() <= 1
    logged = scalars(folder / run.run_folder)
    assert len(logged["charts/episodic_return"]) == ends.sum() == 2 * (100 // length)
    assert {event.value for event in logged["charts/episodic_return"]} == {length * (length + 1) / 2}
    assert {event.value for event in logged["charts/episodic_length"]} == {length}


def test_truncation_bootstraps_and_termination_does_not(runs):
    # a constant critic Q = 100: the target at the last row is r + gamma 100 if truncated, r if terminated
    losses = {}
    for env_id in ("Terminates-v0", "Truncates-v0"):
        run = runs[0][env_id]
        rows = stored(run)
        batch = som.Batch(*(column[rows.next_obs[:, 2] == 1] for column in rows))

        def q_twins(obs, a):
            return torch.full((2, len(obs), 1), 100.0)

        args = dataclasses.replace(run.args, reward_scale=1.0)
        losses[env_id] = float(som.critic_loss(q_twins, q_twins, batch, batch.actions, args)[0])
    assert losses["Terminates-v0"] == pytest.approx(2 * (3 - 100) ** 2)
    assert losses["Truncates-v0"] == pytest.approx(2 * (4 + 0.99 * 100 - 100) ** 2)


def test_evaluation_leaves_the_training_stream_alone(monkeypatch, tmp_path, runs):
    often, seldom = (
        run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", "--eval-frequency", "20"),
        runs[0]["Truncates-v0"],
    )
    torch.testing.assert_close(often.agent.actor.state_dict(), seldom.agent.actor.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(stored(often).actions, stored(seldom).actions, rtol=0, atol=0)


def test_evaluation_on_the_cpu_asks_for_no_gpu(monkeypatch, runs):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in "get_rng_state", "set_rng_state", "manual_seed", "synchronize", "_lazy_init":
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args: pytest.fail("it has started CUDA"))
    run = runs[0]["Truncates-v0"]
    policy = som.make_policy(run.agent, run.box, run.eval_seed)
    assert som.evaluate(policy, "Truncates-v0", 2, run.eval_seed).tolist() == [10, 10]  # 1 + 2 + 3 + 4


def test_learning_rates_fall_to_0_in_the_last_steps(monkeypatch, tmp_path, runs):
    plain = runs[0]["Truncates-v0"]
    rates = []  # of an update's two steps of Adam, in turn
    adam_step = torch.optim.Adam.step

    def step(self, closure=None):
        (group,) = self.param_groups
        rates.append(float(group["lr"]))
        return adam_step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    flags = "--env-id", "Truncates-v0", "--anneal-steps", "50", "--q-lr", "3e-4", "--policy-lr", "1e-4", "--no-autotune"
    run = run_loop(monkeypatch, tmp_path, *flags)
    # updates begin in step 42, and the rates fall from step 150 on
    factors = [min(1, (200 - step) / 50) for step in range(42, 201, 2)]
    assert rates[::2] == pytest.approx([3e-4 * factor for factor in factors])
    assert rates[1::2] == pytest.approx([1e-4 * factor for factor in factors])
    assert som.lr_factor_at(150, run.args) == 1 and som.lr_factor_at(200, plain.args) == 1
    assert som.lr_factor_at(190, run.args) == pytest.approx(0.2)


def test_an_environment_that_has_finished_is_not_stepped_on(runs):
    """Its second episode may be poisoned, and its time is lost."""
    lengths = iter((2, 5, 3))
    gym.register("Lengths-v0", lambda: CountingEnv(next(lengths), True), disable_env_checker=True)
    CountingEnv.events.clear()
    returns = som.evaluate(lambda obs: np.zeros((len(obs), 2), np.float32), "Lengths-v0", 3, seed=1)
    assert returns.tolist() == [3, 15, 6]
    assert len(CountingEnv.events) == 2 + 5 + 3


def test_an_update_comes_before_the_environments_step_and_does_not_see_that_step(monkeypatch, tmp_path):
    adam_step = torch.optim.Adam.step

    def step(self, closure=None):
        CountingEnv.events.append("update")
        return adam_step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    # the evaluation's steps come last
    flags = "--total-timesteps", "60", "--num-episodes", "1", "--no-autotune"
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", *flags)
    assert run.num_updates == 10 and run.num_added == 60
    # the first 40 steps are random; then critic and actor learn, and both environments step
    assert CountingEnv.events[:80] == 40 * ["step"] + 10 * ["update", "update", "step", "step"]
    assert run.rb.num_added.item() == 58  # what the last update could sample from
    newest = stored(run).obs[-2:]
    seen = run.rb.sample(5000).obs
    assert not any((seen == row).all(dim=1).any() for row in newest)
    assert all((seen == row).all(dim=1).any() for row in stored(run).obs[-4:-2])


# of shapes without values: to read a value or to mix it with another device (but for an index) is an error
META = torch.device("meta")


class OnlyMeta(TorchDispatchMode):
    """No operation gets or returns a tensor of another device, not even one number."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", operation
        return result


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": reference, "critic_loss": loss, "mc_noise": noise, "score_dtype": dtype}
        for reference in ("uniform", "prior")
        for loss in ("mse", "distributional")
        for noise, dtype in (("normal", "float32"), ("lattice", "bfloat16"))
    ],
    ids=lambda changes: " ".join(changes.values()),
)
def test_everything_is_computed_on_the_training_device(changes):
    """The two functions of a step, as a GPU records them: nothing waits for a value, nothing comes from the host."""
    sizes = {"hidden_dim": 16, "best_of_n": 3, "batch_size": 8, "num_mc_samples": 4, "num_envs": 4, "buffer_size": 20}
    args = som.Args(**sizes, device="cpu", compile=False, **changes)
    agent = som.Agent(args, 3, 2, META)
    rb = som.ReplayBuffer(args, 3, 2, META, None, 0)
    for optimizer in agent.optimizers.values():
        optimizer.param_groups[0]["fused"] = False  # the fused one does not know this device
    inbox = torch.zeros(args.num_envs, rb.row_width + 3, device=META)
    actions = som.add_and_act(agent, rb, inbox)
    info = som.sample_and_update(agent, rb, True)
    agent.update_lambda()
    assert "losses/actor_loss" in info and "losses/qf_loss" in info
    assert "losses/actor_loss" not in som.sample_and_update(agent, rb, False)
    tensors = actions, *info.values(), *agent.state_dict().values(), rb.rows, rb.num_added, rb.step_rows, agent.sobol
    assert {x.device.type for x in tensors} == {"meta"}
    agent.optimizers = {name: types.SimpleNamespace(zero_grad=int, step=int) for name in agent.optimizers}
    with OnlyMeta():
        som.add_and_act(agent, rb, inbox)
        som.sample_and_update(agent, rb, True)
        agent.update_lambda()


def test_same_seed_same_run_and_other_seed_another(monkeypatch, tmp_path, runs):
    others = [run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", "--seed", seed) for seed in ("1", "2")]
    runs = runs[0]["Truncates-v0"], *others
    first, again, other = (stored(run).actions for run in runs)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)
    assert len({run.run_folder for run in runs}) == 3


@pytest.mark.parametrize(
    "flags",
    [
        "--reference prior --q-norm state",
        "--sde ve --critic-loss distributional",
        "--policy-frequency 2 --updates-per-step 2 --policy-q min --no-autotune --zero-r-ratio 0",
        "--mc-noise lattice --score-dtype bfloat16 --q-norm batch --no-checkpoint-buffer",
    ],
)
def test_every_variant_trains(monkeypatch, tmp_path, flags):
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", *flags.split())
    logged = scalars(run.run_folder)
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert "losses/actor_loss" in logged
    updates = 80 * run.args.updates_per_step
    assert run.num_updates == updates
    fresh = som.Agent(run.args, 3, 2, torch.device("cpu"))
    moved = zip(run.agent.target_critic.parameters(), fresh.critic.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_num_episodes_counts_in_training(monkeypatch, tmp_path):
    run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", "--num-episodes", "3")
    assert CountingEnv.instances == 1 + 2 + 2 * 3  # to look at it, two to train in, two evaluations


def test_the_actors_tags_are_at_every_logged_step(monkeypatch, tmp_path):
    flags = "--updates-per-step", "3", "--policy-frequency", "2"
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", *flags)
    assert run.num_updates == 240
    logged = scalars(run.run_folder)
    steps = [event.step for event in logged["losses/qf_loss"]]
    assert steps == [40 + 2 * 67, 200]  # at 200 updates, in the 67th step of learning, and at the end
    for tag in "losses/actor_loss", "losses/alpha", "score/norm", "velocity/norm":
        assert [event.step for event in logged[tag]] == steps


def test_policy_and_lambda_are_updated_when_they_are_due(monkeypatch, tmp_path):
    flags = "--policy-frequency", "3", "--alpha-delay", "20"
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", *flags)
    states = {name: optimizer.state.values() for name, optimizer in run.agent.optimizers.items()}
    steps = {name: {state["step"].item() for state in values} for name, values in states.items()}
    assert steps == {"critic": {80}, "actor": {80 // 3}, "lambda": {80 // 20}}
    assert run.agent.log_lambda.item() == pytest.approx(math.log(5) - 4 * 7e-3, abs=1e-5)


PRESET = {
    "num_layers": 3, "hidden_dim": 64, "num_mc_samples": 8, "best_of_n": 16, "batch_size": 128, "policy_lr": 1e-3,
    "q_lr": 1e-3, "num_envs": 4, "learning_starts": 5000, "autotune": False, "total_timesteps": 200_000,
    "eval_frequency": 20_000,
}  # fmt: skip
PEAKS = {
    "reference": "box", "climb_steps": 3, "num_mc_samples": 4, "mc_noise": "lattice", "policy_q": "min",
    "inverse_temperature": 60.0, "initial_lambda": 3.0, "alpha_delay": 1_000, "autotune": True,
}  # fmt: skip

SMOOTH = PEAKS | {
    "noise_scale": 0.2, "target_entropy": -0.19, "initial_lambda": 1.5, "target_smoothing": True,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "own"), [("laptop", {"autotune": True}), ("peaks", PEAKS), ("smooth", SMOOTH)])
def test_preset_and_the_flags_beside_it(monkeypatch, tmp_path, capsys, preset, own):
    monkeypatch.setattr(sys.modules[__name__], "TINY", [])
    # some of them are the values that hold without a preset
    changed = {"batch_size": 256, "num_envs": 5, "hidden_dim": 8, "total_timesteps": 400, "learning_starts": 200}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    flags = ["--env-id", "Truncates-v0", *flags[:2], "--preset", preset, "--autotune", *flags[2:]]
    run = run_loop(monkeypatch, tmp_path, *flags)
    config = json.loads((run.run_folder / "config.json").read_text())
    expected = dataclasses.asdict(som.Args(env_id="Truncates-v0", preset=preset))
    expected |= PRESET | own | changed
    assert {name: config[name] for name in expected} == expected
    assert dataclasses.asdict(run.args) == expected
    assert "on this CPU" not in capsys.readouterr().out


def test_without_the_preset_a_cpu_says_how_long_it_takes(monkeypatch, tmp_path, capsys):
    run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "on this CPU" in line]
    assert re.search(r"takes \d+\.\d hours", line) and "--preset laptop takes minutes" in line


def test_the_defaults_of_the_sizes_and_rates():
    names = "num_envs updates_per_step batch_size buffer_size learning_starts hidden_dim gamma tau policy_lr q_lr"
    names = f"{names} best_of_n num_mc_samples score_scale noise_scale alpha_lr alpha_delay target_entropy"
    args = [getattr(som.Args(), name) for name in names.split()]
    assert args == [5, 1, 256, 1_000_000, 100_000, 256, 0.99, 0.005, 1e-4, 1e-4, 32, 100, 25.0, 0.1, 7e-3, 250, -0.9]
    assert (som.Args().initial_lambda, som.Args().inverse_temperature, som.Args().policy_tau) == (5.0, 5.0, 0.005)


def test_every_episode_of_an_evaluation_has_its_own_seed(monkeypatch):
    seeds, reset = [], CountingEnv.reset

    def recorded(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed)

    monkeypatch.setattr(CountingEnv, "reset", recorded)
    som.evaluate(lambda obs: np.zeros((len(obs), 2), np.float32), "Truncates-v0", 3, seed=7)
    assert seeds == [7, 8, 9]


def test_the_first_episode_of_every_evaluation_is_filmed(monkeypatch, tmp_path):
    films, find_spec = [], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "moviepy" or find_spec(name))
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, folder, **_: films.append(str(folder)) or env)
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Rendered-v0", "--capture-video")
    steps = [line.split(",")[0] for line in run.evaluations[1:]]
    assert len(steps) > 1 and films == [f"{run.run_folder}/videos/{step}" for step in steps]


def test_load_policy_acts_as_evaluate_does(monkeypatch, tmp_path, capsys):
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Asymmetric-v0")
    policy, box = som.load_policy(run.run_folder), AsymmetricEnv.action_space
    for shape in (3,), (1, 3), (7, 3):
        obs = np.random.default_rng(1).normal(size=shape)
        action = policy(obs)
        assert action.shape == (*shape[:-1], 2) and action.dtype == box.dtype
        assert all(box.contains(a) for a in action.reshape(-1, 2))
        torch.manual_seed(5)
        unit, _ = run.agent.act(torch.from_numpy(obs.reshape(-1, 3)).float())
        torch.manual_seed(5)
        np.testing.assert_array_equal(policy(obs), som.to_box(unit.numpy(), box).reshape(*shape[:-1], 2))
    policy(np.zeros(3).tolist())  # a list will do
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_loop(monkeypatch, tmp_path, "--evaluate", str(run.run_folder), "--num-episodes", "6")
    assert not stop.value.code
    printed = capsys.readouterr().out.splitlines()[-1]
    torch.manual_seed(run.eval_seed)  # the same noise and the same episodes
    returns = som.evaluate(policy, "Asymmetric-v0", 6, run.eval_seed)
    assert 15 <= returns.min() and returns.max() <= 30
    assert json.loads(printed.split(", by episode ")[1]) == returns.round(1).tolist()
    with pytest.raises(ValueError, match="no checkpoint"):
        som.load_policy(tmp_path)


def test_evaluate_of_a_finished_run_repeats_its_last_evaluation(monkeypatch, tmp_path, capsys):
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Asymmetric-v0")
    *_, last = csv.DictReader((run.run_folder / "evaluations.csv").open())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_loop(monkeypatch, tmp_path, "--evaluate", str(run.run_folder))
    printed = capsys.readouterr().out
    assert f"return {float(last['return_mean']):.1f} +- {float(last['return_std']):.1f}," in printed
    with pytest.raises(SystemExit):
        run_loop(monkeypatch, tmp_path, "--evaluate", str(run.run_folder), "--best-of-n", "1")
    assert capsys.readouterr().out != printed  # flags count
    printed = set()
    for n in "1", "3":  # the action of noise 0 is the only candidate
        with pytest.raises(SystemExit):
            run_loop(monkeypatch, tmp_path, "--evaluate", str(run.run_folder), "--deterministic", "--best-of-n", n)
        printed.add(capsys.readouterr().out)
    (line,) = printed
    policy = som.load_policy(run.run_folder, deterministic=True)
    obs = np.random.default_rng(1).normal(size=(7, 3))
    np.testing.assert_array_equal(policy(obs), policy(obs))
    returns = som.evaluate(policy, "Asymmetric-v0", run.args.num_episodes, run.eval_seed)
    assert json.loads(line.split(", by episode ")[1]) == returns.round(1).tolist()


def test_training_evaluates_the_deterministic_action_and_acts_as_before(monkeypatch, tmp_path):
    flags = "--env-id", "Asymmetric-v0"
    sampled, deterministic = (run_loop(monkeypatch, tmp_path, *flags, *more) for more in ((), ("--deterministic",)))
    states = sampled.agent.state_dict(), deterministic.agent.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(stored(sampled).actions, stored(deterministic).actions, rtol=0, atol=0)
    policy = som.load_policy(sampled.run_folder, deterministic=True)
    returns = som.evaluate(policy, "Asymmetric-v0", sampled.args.num_episodes, sampled.eval_seed)
    last = [run.evaluations[-1].split(",")[2] for run in (sampled, deterministic)]
    assert float(last[1]) == pytest.approx(returns.mean()) and last[0] != last[1]


def test_a_value_that_is_not_finite_stops_the_run(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_loop(monkeypatch, tmp_path, "--env-id", "Breaks-v0", "--total-timesteps", "2000", "--seed", "7")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1
    assert re.search(r"error: .* not finite at step \d+, seed 7", message)
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert str(run_folder.name) in message
    assert next(csv.reader((run_folder / "evaluations.csv").open()))[0] == "global_step"
    assert json.loads((run_folder / "config.json").read_text())["seed"] == 7


def test_walker2d_as_a_user_runs_it(tmp_path):
    flags = [*TINY, "--total-timesteps", "300", "--save-model"]
    finished = run_script(tmp_path, "--env-id", "Walker2d-v4", *flags)
    assert finished.returncode == 0, finished.stderr
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert {"config.json", "evaluations.csv", "model.pt"} <= {file.name for file in run_folder.iterdir()}
    config = json.loads((run_folder / "config.json").read_text())
    assert config["env_id"] == "Walker2d-v4" and config["hidden_dim"] == 16 and "torch" in config["versions"]
    rows = list(csv.DictReader((run_folder / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [100, 200, 300]
    logged = scalars(run_folder)
    expected = {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/eval_return", "losses/qf_loss",
        "losses/td_error", "losses/qf_values", "losses/actor_loss", "losses/actor_loss_t0", "losses/actor_loss_t3",
        "losses/alpha", "score/effective_sample_size", "score/norm", "velocity/norm", "velocity/dudt_ratio",
        "actions/candidate_std", "actions/saturated",
    }  # fmt: skip
    assert expected <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    evaluated = [event.value for event in logged["charts/eval_return"]]
    assert evaluated == pytest.approx([float(row["return_mean"]) for row in rows], rel=1e-5)
    model = torch.load(run_folder / "model.pt", weights_only=True)
    som.MeanFlowActor(17, 6, 16, 3).load_state_dict(model["actor"])
    som.QNetwork(2, 17, 6, 2, 16, 3).load_state_dict(model["critic"])


BAD_NUMBERS = {
    "--policy-tau": "2",
    "--total-timesteps": "0", "--num-envs": "-1", "--learning-starts": "-5", "--buffer-size": "0", "--batch-size": "0",
    "--updates-per-step": "0", "--policy-frequency": "0", "--gamma": "1.5", "--tau": "1.5", "--reward-scale": "0",
    "--policy-lr": "-1e-4", "--q-lr": "nan", "--hidden-dim": "0", "--num-layers": "0", "--num-mc-samples": "1",
    "--best-of-n": "0", "--inverse-temperature": "inf", "--score-scale": "0", "--beta-min": "3", "--beta-max": "-1",
    "--checkpoint-frequency": "0", "--num-episodes": "0", "--num-frequencies": "0",
    "--zero-r-ratio": "1.1", "--noise-scale": "0", "--initial-lambda": "0",
    "--climb-steps": "-1", "--anneal-steps": "-1",
    "--alpha-lr": "0", "--alpha-delay": "0", "--target-entropy": "nan", "--eval-frequency": "0", "--seed": "-1",
}  # fmt: skip


def refused(monkeypatch, tmp_path, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        run_loop(monkeypatch, tmp_path, *flags)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert not any(tmp_path.iterdir())  # nothing was created
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_bad_numbers_are_refused(monkeypatch, tmp_path, capsys, flag):
    message = refused(monkeypatch, tmp_path, capsys, "--env-id", "Truncates-v0", flag, BAD_NUMBERS[flag])
    assert flag in message


def test_every_number_has_a_bad_value_above():
    numbers = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(som.Args) if f.type in (int, float)}
    assert numbers == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Walker3d-v4", "Did you mean: `Walker2d`"),
        ("--env-id DiscreteActions-v0", "has actions Discrete(3); supported are flat vectors of real numbers"),
        ("--env-id DictObservations-v0", "gymnasium.wrappers.FlattenObservation"),
        ("--env-id Images-v0", "gymnasium.wrappers.FlattenObservation"),
        ("--env-id Unbounded-v0", "bounds low < high"),
        ("--env-id Pusher-v4", "Pusher-v5"),
        ("--env-id Truncates-v0 --learning-starts 199", "larger, by --num-envs or more, than --learning-starts"),
        ("--env-id Truncates-v0 --reference prior --sde ve", "--sde vp"),
        ("--env-id Truncates-v0 --climb-steps 3", "--climb-steps needs --reference box"),
        ("--env-id Truncates-v0 --anneal-steps 201", "--anneal-steps must be at most --total-timesteps"),
        ("--env-id Truncates-v0 --track", "--track needs wandb"),
        ("--env-id Rendered-v0 --capture-video", "--capture-video needs moviepy"),
        ("--env-id Truncates-v0 --device gpu", "--device gpu: PyTorch finds no GPU"),
    ],
)
def test_bad_input_is_refused(monkeypatch, tmp_path, capsys, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert words in refused(monkeypatch, tmp_path, capsys, *flags.split())


def test_bad_input_of_the_real_script(monkeypatch, tmp_path):
    finished = run_script(tmp_path, "--env-id", "Walker2d-v9")
    assert finished.returncode == 2 and finished.stderr and "Traceback" not in finished.stderr
    for flags in (["--no-such-flag"], ["--seed", "one"], ["--sde", "none"]):
        with pytest.raises(SystemExit) as stop:
            run_loop(monkeypatch, tmp_path, *flags)
        assert stop.value.code == 2
    assert not any(tmp_path.iterdir())


def test_new_mujoco_warns_where_it_changes_the_environment(monkeypatch, capsys):
    for new in ("3.5.0", "3.10.1", "4.0.0"):
        monkeypatch.setattr(som.metadata, "version", lambda package, new=new: new)
        som.env_dimensions(som.Args(env_id="HalfCheetah-v4"))
        assert capsys.readouterr().err == ""
        som.env_dimensions(som.Args(env_id="Hopper-v4"))
        assert "warning: mujoco >= 3.5" in capsys.readouterr().err
    monkeypatch.setattr(som.metadata, "version", lambda package: "3.4.1")
    som.env_dimensions(som.Args(env_id="Hopper-v4"))
    assert capsys.readouterr().err == ""


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(som.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(som.Args):
        assert field.name in read, f"{field.name} has no reader"
        hint = hints[field.name]
        choices = [x for x in (hint, *typing.get_args(hint)) if typing.get_origin(x) is typing.Literal]
        if choices:  # or None, where the field says so
            assert field.default in (*typing.get_args(choices[0]), *(typing.get_args(hint) and [None]))
        else:
            assert isinstance(field.default, hint), field.name
            assert type(field.default) in (hint, type(None)), field.name


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_script_is_easy_to_read(script):
    source = script.read_text()
    skipped = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
    per_line = {}  # code tokens; comments and docstrings do not count
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and not token.string.startswith('"""'):
            per_line[token.start[0]] = per_line.get(token.start[0], 0) + 1
    assert sum(per_line.values()) / len(per_line) <= 12
    assert sum(count >= 25 for count in per_line.values()) <= 35
    widths = [len(line) for line in source.splitlines()]
    assert max(widths) <= 120 and sum(width > 100 for width in widths) <= 70
    nodes = list(ast.walk(ast.parse(source)))
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    to_tuple = [node for node in assigned if isinstance(node.targets[0], ast.Tuple)]
    stops = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.BoolOp | ast.IfExp)]
    stops += [node for node in assigned if getattr(node.targets[0], "id", "") == "_"]
    stops += [node for node in to_tuple if isinstance(node.value, ast.GeneratorExp | ast.ListComp)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    stops += [node for node in calls if "exit" in ast.unparse(node.func) and "print(" in ast.unparse(node)]
    stops += [node for node in calls if getattr(node.func, "id", "") == "__import__"]
    assert [node.lineno for node in stops] == []
    assert sum(isinstance(node.value, ast.Tuple) for node in to_tuple) <= 6  # a, b = x, y


def readme_commands():
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("#")[0].split("&&") if part.strip())


def test_every_command_in_the_readme_parses():
    parsed = set()
    for command in readme_commands():
        words = shlex.split(command)
        for script in (word for word in words if re.fullmatch(r"\w+_continuous_action\.py", word)):
            flags = words[words.index(script) + 1 :]
            tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)
            parsed.add(script)
        for word in words:
            if word.endswith((".py", ".txt")):
                assert (ROOT / word).exists(), command
    assert parsed == {path.name for path in ROOT.glob("*_continuous_action.py")}


def test_the_readmes_policy_acts(monkeypatch, tmp_path):
    """Exactly its lines, with the folder of a tiny run in place of runs/NAME."""
    section = (ROOT / "README.md").read_text().split("\n## Use a trained policy\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    env_id = re.search(r'gym\.make\("([\w-]+)"', code)[1]
    with monkeypatch.context() as patch:
        run = run_loop(patch, tmp_path, "--env-id", env_id, "--total-timesteps", "60", "--num-episodes", "1")
    assert code.count("runs/NAME") == 1
    code = code.replace("runs/NAME", str(run.run_folder))
    steps = []
    step = gym.Wrapper.step
    monkeypatch.setattr(gym.Wrapper, "step", lambda self, action: (steps.append(action), step(self, action))[1])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert len(steps) > 100


def requirement_lines(lines):
    return {re.split(r"[\[<>=~!]", line)[0]: line.replace(" ", "") for line in lines}


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_inline_metadata_equals_requirements(script):
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = requirement_lines(line for line in lines if line)
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", script.read_text()).group(1)
    inline = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    inline = requirement_lines(inline["dependencies"])
    assert inline and all(required[name] == line for name, line in inline.items())
    # the third-party packages that the script imports
    tree = ast.parse(script.read_text())
    modules = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported = modules - set(sys.stdlib_module_names)
    assert imported <= inline.keys()
    assert inline.keys() - imported <= {"mujoco", "tensorboard"}  # gymnasium and torch import these
