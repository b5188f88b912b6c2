"""The script as a user runs it: the real loop over toy environments, a short run of Walker2d-v4, bad input."""

import ast
import csv
import dataclasses
import importlib
import json
import math
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import som_continuous_action as som

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "som_continuous_action.py"
TINY = (
    "--no-cuda --no-compile --hidden-dim 16 --num-mc-samples 4 --best-of-n 3 --batch-size 32 --num-envs 2 "
    "--learning-starts 40 --total-timesteps 200 --eval-frequency 100 --buffer-size 1000"
).split()


class CountingEnv(gym.Env):
    """The observation is (episode number, step in the episode, end); the reward is the step's number."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-2.0, 2.0, (2,))
    instances = 0

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
        assert np.abs(action).max() <= 2 + 1e-6
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
    "DiscreteActions-v0": lambda: SpacesEnv(BOX, gym.spaces.Discrete(3)),
    "DictObservations-v0": lambda: SpacesEnv(gym.spaces.Dict(x=BOX), BOX),
    "Images-v0": lambda: SpacesEnv(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "Unbounded-v0": lambda: SpacesEnv(BOX, gym.spaces.Box(-np.inf, np.inf, (2,))),
}
for name, make in TOYS.items():
    gym.register(name, make, disable_env_checker=True)


def run_loop(monkeypatch, folder, *flags):
    """Run the script as __main__ in this process, where the toy environments are; returns its variables."""
    monkeypatch.chdir(folder)
    CountingEnv.instances = 0
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *flags])
    return types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))


def scalars(run_folder):
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def stored(buffer):
    """The columns of all rows in a buffer."""
    *columns, rewards, terminated = buffer.rows[: buffer.num_added].split(buffer.widths, dim=1)
    return som.Batch(*columns, rewards.squeeze(1), terminated.squeeze(1))


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
    rows = som.Batch(*(column.numpy() for column in stored(run.rb)))
    assert run.rb.num_added == 200
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
        rows = stored(run.rb)
        batch = som.Batch(*(column[rows.next_obs[:, 2] == 1] for column in rows))

        def q_dist(obs, a):
            return torch.full((2, len(obs), 1), 100.0), torch.ones(2, len(obs), 1)

        mean_std = torch.full((2, 1), math.nan)
        args = (q_dist, q_dist, batch, batch.actions, torch.zeros(len(batch.obs)), mean_std)
        losses[env_id] = float(som.critic_loss(*args, dataclasses.replace(run.args, reward_scale=1.0))[0])
    assert losses["Terminates-v0"] == pytest.approx(2 * (3 - 100) ** 2)
    assert losses["Truncates-v0"] == pytest.approx(2 * (4 + 0.99 * 100 - 100) ** 2)


def test_evaluation_leaves_the_training_stream_alone(monkeypatch, tmp_path, runs):
    often, seldom = (
        run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", "--eval-frequency", "20"),
        runs[0]["Truncates-v0"],
    )
    torch.testing.assert_close(often.agent.actor.state_dict(), seldom.agent.actor.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(stored(often.rb).actions, stored(seldom.rb).actions, rtol=0, atol=0)


def test_evaluation_on_the_cpu_asks_for_no_gpu(monkeypatch, runs):
    """fork_rng without devices starts CUDA on every GPU of the machine."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: pytest.fail(f"it has started CUDA on {device}"))
    run = runs[0]["Truncates-v0"]
    assert som.evaluate(run.agent, run.eval_seed, num_episodes=2).tolist() == [10, 10]  # 1 + 2 + 3 + 4


# of shapes without values: to read a value or to mix it with another device (but for an index) is an error
META = torch.device("meta")


def check_devices(script, **changes):
    """All that the learner computes is on the training device, and nothing waits for a value."""
    sizes = {"hidden_dim": 16, "best_of_n": 3, "batch_size": 8, "cuda": False, "compile": False}
    agent = script.Agent(args := script.Args(**(sizes | changes)), 3, 2, META)
    for group in agent.optimizer.param_groups:
        group["fused"] = False  # the fused one does not know this device
    rb = script.ReplayBuffer(20, 3, 2, META)
    for _ in range(3):  # around the ring's end
        rb.add(np.zeros((8, 3)), np.zeros((8, 3)), np.zeros((8, 2)), np.zeros(8), np.zeros(8))
    actions, candidates = agent.act(torch.zeros(5, 3, device=META), explore=True)
    info = [agent.update(rb.sample(args.batch_size)) for _ in range(2)][-1]
    assert "losses/actor_loss" in info and "losses/qf_loss" in info
    assert {x.device.type for x in (actions, candidates, *info.values(), *agent.state_dict().values())} == {"meta"}


@pytest.mark.parametrize("reference", ["uniform", "prior"])
@pytest.mark.parametrize("critic_loss", ["mse", "distributional"])
def test_everything_is_computed_on_the_training_device(reference, critic_loss):
    check_devices(som, reference=reference, critic_loss=critic_loss, num_mc_samples=4, alpha_delay=1)


def test_same_seed_same_run_and_other_seed_another(monkeypatch, tmp_path, runs):
    others = [run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", "--seed", seed) for seed in ("1", "2")]
    runs = runs[0]["Truncates-v0"], *others
    first, again, other = (stored(run.rb).actions for run in runs)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)
    assert len({run.run_folder for run in runs}) == 3


@pytest.mark.parametrize(
    "flags",
    [
        "--reference prior --q-norm state",
        "--sde ve --critic-loss distributional",
        "--policy-frequency 2 --updates-per-step 2 --policy-q min --no-autotune --zero-r-ratio 0",
    ],
)
def test_every_variant_trains(monkeypatch, tmp_path, flags):
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Truncates-v0", *flags.split())
    logged = scalars(run.run_folder)
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert "losses/actor_loss" in logged
    updates = 80 * run.args.updates_per_step
    assert run.agent.num_updates == updates
    fresh = som.Agent(run.args, 3, 2, torch.device("cpu"))
    moved = zip(run.agent.target_critic.parameters(), fresh.critic.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


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
        ("--env-id DiscreteActions-v0", "Discrete(3); supported are flat continuous"),
        ("--env-id DictObservations-v0", "supported are flat continuous"),
        ("--env-id Images-v0", "supported are flat continuous"),
        ("--env-id Unbounded-v0", "bounded for actions"),
        ("--env-id Pusher-v4", "Pusher-v5"),
        ("--env-id Truncates-v0 --learning-starts 199", "--learning-starts"),
        ("--env-id Truncates-v0 --reference prior --sde ve", "--sde vp"),
        ("--env-id Truncates-v0 --track", "pip install wandb"),
        ("--env-id Rendered-v0 --capture-video", "pip install moviepy"),
        ("--env-id Truncates-v0 --cuda", "--no-cuda"),
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
        som.check_args(som.Args(env_id="HalfCheetah-v4"))
        assert capsys.readouterr().err == ""
        som.check_args(som.Args(env_id="Hopper-v4"))
        assert "warning: mujoco >= 3.5" in capsys.readouterr().err
    monkeypatch.setattr(som.metadata, "version", lambda package: "3.4.1")
    som.check_args(som.Args(env_id="Hopper-v4"))
    assert capsys.readouterr().err == ""


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(som.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(som.Args):
        assert field.name in read, f"{field.name} has no reader"
        hint = hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            assert field.default in typing.get_args(hint)
        else:
            assert isinstance(field.default, hint), field.name
            assert type(field.default) in (hint, type(None)), field.name


def test_script_is_short_enough_to_be_read():
    assert len(SCRIPT.read_text().splitlines()) <= 500


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
