"""Runs that survive: resumed, killed, stopped, damaged and poisoned, in both PyTorch scripts."""

import csv
import json
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "som_continuous_action.py", ROOT / "mfp_continuous_action.py"
TINY = (
    "--no-cuda --no-compile --hidden-dim 16 --best-of-n 3 --batch-size 32 --num-envs 2 --learning-starts 40 "
    "--total-timesteps 120 --eval-frequency 20 --buffer-size 90 --checkpoint-frequency 64"
).split()


class WalkEnv(gym.Env):
    """A random walk of 5 steps; at step `poisoned` of this environment its `what` is not a number."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, what: str = "", poisoned: int = 60):
        self.what, self.poisoned, self.total = what, poisoned, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.standard_normal(3), {}

    def step(self, action):
        self.t, self.total = self.t + 1, self.total + 1
        obs, reward = self.np_random.standard_normal(3), float(action.sum())
        if self.total == self.poisoned:
            obs, reward = (
                (obs * np.nan, reward) if self.what == "observation" else (obs, np.nan if self.what else reward)
            )
        return obs, reward, False, self.t == 5, {}


for name, what in {"Walk-v0": "", "WalkToo-v0": "", "PoisonedReward-v0": "reward"}.items():
    gym.register(name, WalkEnv, kwargs={"what": what}, disable_env_checker=True)
# an observation in the middle and one at the end of an episode
for name, poisoned in {"PoisonedObservation-v0": 58, "PoisonedLast-v0": 60}.items():
    gym.register(name, WalkEnv, kwargs={"what": "observation", "poisoned": poisoned}, disable_env_checker=True)


@pytest.fixture(autouse=True)
def handlers():
    """The script, run in this process, takes over SIGINT and SIGTERM."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def run_loop(request, monkeypatch, tmp_path):
    """Runs the script as __main__ in this process; returns its variables."""

    def run(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(request.param), *flags])
        return types.SimpleNamespace(**runpy.run_path(str(request.param), run_name="__main__"))

    return run


@pytest.fixture
def finished(run_loop, tmp_path):
    """Folder of a finished run of 120 steps, with checkpoints at 64 and 120."""
    run_loop(*TINY, "--env-id", "Walk-v0")
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def checkpoints(folder):
    return sorted(folder.glob("checkpoint_*.pt"))


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def evaluations(folder):
    with (folder / "evaluations.csv").open() as file:
        return [(int(row["global_step"]), float(row["wall_time_s"])) for row in csv.DictReader(file)]


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.state_dict().items()}


def refused(run_loop, capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_loop(*flags)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def test_updates_after_a_resume_are_bit_equal(run_loop):
    run = run_loop(*TINY, "--env-id", "Walk-v0")  # ends with a checkpoint
    assert run.rb.num_added == 120 > len(run.rb.rows)  # the ring is full
    rows = run.rb.rows.clone()
    for _ in range(20):
        run.agent.update(run.rb.sample(32))
    expected = weights(run.agent)
    torch.manual_seed(12345)
    again = run_loop("--resume", str(run.run_folder))  # at its last step already: it is loaded, and that is all
    assert again.agent is not run.agent and again.agent.num_updates == run.agent.num_updates - 20
    assert again.rb.num_added == run.rb.num_added  # the next row takes the oldest one's place
    torch.testing.assert_close(again.rb.rows, rows, rtol=0, atol=0)
    before = weights(again.agent)
    for _ in range(20):
        again.agent.update(again.rb.sample(32))
    torch.testing.assert_close(weights(again.agent), expected, rtol=0, atol=0, equal_nan=True)
    assert any(not torch.equal(before[name], expected[name]) for name in before)


def test_a_resumed_run_continues_its_curves(run_loop, finished):
    times = dict(evaluations(finished))
    first = scalars(finished)
    checkpoints(finished)[-1].unlink()  # as if killed after the last evaluation, before its checkpoint was there
    (path,) = checkpoints(finished)
    step = int(path.stem.split("_")[1])
    assert step == 64
    run = run_loop("--resume", str(finished), "--total-timesteps", "200")
    assert run.steps[0] == 66 and run.run_folder.samefile(finished)
    rows = evaluations(finished)
    assert [row for row, _ in rows] == list(range(20, 201, 20))  # no gap and no doubled row
    assert [time for _, time in rows] == sorted(time for _, time in rows)
    assert all(times[row] == time for row, time in rows if row <= step)
    logged = scalars(finished)
    for tag, events in logged.items():
        if tag.startswith("charts/eval"):
            assert [event for event, _ in events] == list(range(20, 201, 20))
        assert [e for e in events if e[0] <= step] == [e for e in first.get(tag, []) if e[0] <= step]
    episodes = [event for event, _ in logged["charts/episodic_return"]]
    # two environments, episodes of 5 vector steps; those that ran at the checkpoint are not continued
    assert episodes == [s for s in (*range(10, 61, 10), *range(74, 201, 10)) for _ in range(2)]
    config = json.loads((finished / "config.json").read_text())
    assert config["total_timesteps"] == 200 and config["resume"] is None and config["num_envs"] == 2
    assert config["script"] in {script.name for script in SCRIPTS}
    assert [int(path.stem.split("_")[1]) for path in checkpoints(finished)] == [192, 200]


def test_a_resumed_run_sees_other_episodes(run_loop, finished):
    seeds = []
    reset = WalkEnv.reset

    def record(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    WalkEnv.reset = record
    try:
        run_loop("--resume", str(finished), "--total-timesteps", "130")
        again, seeds = seeds[:2], []
        run_loop(*TINY, "--env-id", "Walk-v0")
    finally:
        WalkEnv.reset = reset
    assert None not in again and not set(again) & set(seeds[:2])


def test_evaluate_prints_the_returns_and_changes_nothing(run_loop, finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    printed = []
    for _ in range(2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_loop("--evaluate", str(finished), "--num-episodes", "3")
        assert not stop.value.code
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    head, episodes = printed[0].split(", by episode ")
    returns = json.loads(episodes)
    assert len(returns) == 3
    assert head == f"return {np.mean(returns):.1f} +- {np.std(returns):.1f}" or len(head.split()) == 4
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    """One bit in the weights, which torch.load does not notice."""
    state, data = torch.load(path, weights_only=True), bytearray(path.read_bytes())
    position = data.find(state["agent"]["critic.weights.1"].numpy().tobytes()[:64])
    assert position > 0
    data[position + 40] ^= 1
    path.write_bytes(data)


def change(**values):
    return lambda path: torch.save(torch.load(path, weights_only=True) | values, path)


DAMAGES = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint\n" * 100),
    "pickle": lambda path: torch.save({"format": print}, path),
    "foreign": lambda path: torch.save({"weights": torch.ones(3)}, path),
    "newer": change(format="som_continuous_action.py, checkpoints of version 2"),
    "other script": change(format="ppo_continuous_action.py, checkpoints of version 1"),
}


def test_a_bad_checkpoint_is_refused_and_the_one_before_it_named(run_loop, finished, capsys):
    before, last = checkpoints(finished)
    whole = last.read_bytes()
    for damage in DAMAGES.values():
        last.write_bytes(whole)
        damage(last)
        for flag in "--resume", "--evaluate":
            message = refused(run_loop, capsys, flag, str(finished))
            assert last.name in message and before.name in message
    run = run_loop("--resume", str(before), "--total-timesteps", "130")
    assert run.steps[0] == 66 and run.run_folder.samefile(finished)


def test_what_cannot_change_is_refused(run_loop, finished, capsys):
    files = {path.name: path.read_bytes() for path in finished.iterdir()}
    for flag, value in {
        "--env-id": "WalkToo-v0", "--hidden-dim": "32", "--num-layers": "2", "--seed": "2", "--num-envs": "3",
        "--buffer-size": "100", "--policy-lr": "1", "--q-lr": "1",
    }.items():  # fmt: skip
        message = refused(run_loop, capsys, "--resume", str(finished), "--total-timesteps", "200", flag, value)
        assert flag in message and "cannot change" in message
    assert "No such file" in refused(run_loop, capsys, "--resume", "runs/nowhere")
    assert files == {path.name: path.read_bytes() for path in finished.iterdir()}


def poison(monkeypatch):
    """The 30th step of Adam puts a NaN into a weight of the acting networks."""
    calls, step = [], torch.optim.Adam.step

    def poisoned(self, closure=None):
        step(self, closure)
        calls.append(1)
        if len(calls) == 30:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[5] = np.nan

    monkeypatch.setattr(torch.optim.Adam, "step", poisoned)


@pytest.mark.parametrize("what", ["reward", "observation", "last observation", "weight"])
def test_what_is_not_finite_never_reaches_a_checkpoint(run_loop, monkeypatch, tmp_path, capsys, what):
    names = {"reward": "PoisonedReward-v0", "observation": "PoisonedObservation-v0", "weight": "Walk-v0"}
    if what == "weight":
        poison(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        every_step = "--total-timesteps", "400", "--checkpoint-frequency", "2", "--eval-frequency", "400"
        run_loop(*TINY, "--env-id", names.get(what, "PoisonedLast-v0"), *every_step)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    (folder,) = (tmp_path / "runs").iterdir()
    assert stop.value.code == 1 and what.split()[-1] in message and "seed 1" in message
    # Adam steps twice from 42 on: its 30th step is in the 15th
    step = {"reward": 120, "observation": 116, "last observation": 120, "weight": 70}[what]
    assert f"not finite at step {step}" in message and str(folder.name) in message
    path = checkpoints(folder)[-1]
    assert path.name == f"checkpoint_{step - 2:010d}.pt"
    agent = torch.load(path, weights_only=True)["agent"]
    assert all(tensor.isfinite().all() for name, tensor in agent.items())


# The real script, killed
def command(script, *flags):
    return [sys.executable, "-W", "ignore", str(script), *flags]


def start(folder, *flags):
    errors = (folder / "errors").open("w")
    return subprocess.Popen(command(*flags), cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def wait_for_new_checkpoint(folder, known, process):
    """The names of the run's checkpoints, when there is one more; one is written at the first step."""
    began = time.time()
    while process.poll() is None and time.time() - began < 120:
        names = {path.name for path in folder.glob("runs/*/checkpoint_*.pt")}
        if names - known:
            return names
        time.sleep(0.005)
    raise AssertionError((folder / "errors").read_text())


FLAGS = [*TINY, "--env-id", "Pendulum-v1", "--eval-frequency", "1000000", "--checkpoint-frequency", "2"]


@pytest.mark.parametrize(
    ("seed", "moments"), [(1, 2), *(pytest.param(seed, 5, marks=pytest.mark.slow) for seed in (2, 3, 4, 5))]
)
def test_a_killed_run_always_goes_on(tmp_path, seed, moments):
    script, rng, known = SCRIPTS[seed % 2], random.Random(seed), set()
    flags = [*FLAGS, "--total-timesteps", "1000000"]
    for _ in range(moments):
        process = start(tmp_path, script, *flags)
        known = wait_for_new_checkpoint(tmp_path, known, process)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        (folder,) = (tmp_path / "runs").iterdir()
        last = checkpoints(folder)[-1]  # whatever the moment was, it can be read
        step = torch.load(last, weights_only=True)["progress"][0]
        assert last.name == f"checkpoint_{step:010d}.pt"
        known = {path.name for path in checkpoints(folder)}
        flags = ["--resume", str(folder)]
    ended = subprocess.run(
        command(script, *flags, "--total-timesteps", str(step + 10)), cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert checkpoints(folder)[-1].name == f"checkpoint_{step + 10:010d}.pt"
    assert evaluations(folder)[-1][0] == step + 10


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_writes_a_checkpoint(tmp_path, number):
    process = start(tmp_path, SCRIPTS[0], *FLAGS, "--total-timesteps", "1000000", "--checkpoint-frequency", "1000000")
    wait_for_new_checkpoint(tmp_path, set(), process)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    (folder,) = (tmp_path / "runs").iterdir()
    first, last = checkpoints(folder)
    step = int(last.stem.split("_")[1])
    assert first.name == "checkpoint_0000000002.pt" and step > 2
    message = (tmp_path / "errors").read_text().strip().splitlines()[-1]
    assert f"stopped at step {step}" in message and f"--resume runs/{folder.name}" in message
