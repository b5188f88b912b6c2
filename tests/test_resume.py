"""Runs that survive: resumed, killed, stopped, damaged and poisoned, in both PyTorch scripts."""

import csv
import fcntl
import json
import pathlib
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "som_continuous_action.py", ROOT / "mfp_continuous_action.py"
TINY = (
    "--device cpu --no-compile --hidden-dim 16 --best-of-n 3 --batch-size 32 --num-envs 2 --learning-starts 40 "
    "--total-timesteps 120 --eval-frequency 20 --buffer-size 90 --checkpoint-frequency 64 --num-episodes 2"
).split()


class WalkEnv(gym.Env):
    """Random observations, episodes of 5 steps; at step `poisoned` of this environment its `what` is not a number."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, what: str = "", poisoned: int = 30):
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


class ClockEnv(WalkEnv):
    """Its observations are the time and the last action: all its episodes begin alike."""

    def reset(self, *, seed=None, options=None):
        return 0 * super().reset(seed=seed)[0], {}

    def step(self, action):
        _, *others = super().step(action)
        return np.array([self.t, *action]), *others


class StepsEnv(WalkEnv):
    """Its observations are (episode seed, steps of this environment so far, 1): every row tells which it is."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first = seed % 1000 if seed is not None else self.first
        return np.array([self.first, self.total, 1]), {}

    def step(self, action):
        _, reward, *others = super().step(action)
        return np.array([self.first, self.total, 1]), reward, *others


for name, env in {"Clock-v0": ClockEnv, "Steps-v0": StepsEnv}.items():
    gym.register(name, env, disable_env_checker=True, max_episode_steps=100)
for name, what in {"Walk-v0": "", "WalkToo-v0": "", "PoisonedReward-v0": "reward"}.items():
    gym.register(name, WalkEnv, kwargs={"what": what}, disable_env_checker=True, max_episode_steps=100)
# an observation in the middle and one at the end of an episode
for name, poisoned in {"PoisonedObservation-v0": 28, "PoisonedLast-v0": 30}.items():
    gym.register(
        name,
        WalkEnv,
        kwargs={"what": "observation", "poisoned": poisoned},
        disable_env_checker=True,
        max_episode_steps=100,
    )


@pytest.fixture(autouse=True)
def handlers():
    """The script, run in this process, takes over SIGINT and SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda path: path.stem)
def script(request):
    return request.param


def run_main(folder, script, *flags):
    """Runs the script as __main__ in this process; returns its variables."""
    locked, flock = [], fcntl.flock
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(script), *flags])
        patch.setattr(fcntl, "flock", lambda file, operation: (locked.append(file), flock(file, operation)))
        try:
            run = types.SimpleNamespace(**runpy.run_path(str(script), run_name="__main__"))
            run.writer.close()
        finally:
            for file in locked:  # as at the end of a process
                file.close()
    return run


@pytest.fixture
def run_loop(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: run_main(tmp_path, script, *flags)


@pytest.fixture(scope="module")
def finished_once(script, tmp_path_factory):
    run = run_main(folder := tmp_path_factory.mktemp("finished"), script, *TINY, "--env-id", "Walk-v0")
    return folder / run.run_folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """Folder of a finished run of 120 steps, with checkpoints at 64 and 120."""
    return pathlib.Path(shutil.copytree(finished_once, tmp_path / "runs" / finished_once.name))


MORE = "--total-timesteps", "200"


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


def contents(folder):
    """The files of a run; the lock has nothing in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "lock"}


def error_line(capsys, stop, code):
    message = capsys.readouterr().err.strip()
    assert stop.value.code == code and message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def refused(run_loop, capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_loop(*flags)
    return error_line(capsys, stop, 2)


def sampled_rows(run):
    """The rows that a run samples from, the oldest first."""
    last = range(max(0, run.num_added - run.rb.size), run.num_added)
    return run.rb.on_host[[i % len(run.rb.on_host) for i in last]]


def test_n_steps_a_resume_and_m_steps_are_bit_equal_to_n_plus_m(run_loop):
    # episodes begin alike, and none is cut by the checkpoint at 60: the resumed run has nothing that is new
    flags = "--env-id", "Clock-v0", "--checkpoint-frequency", "20", "--total-timesteps", "180"
    whole = run_loop(*TINY, *flags)
    first = run_loop(*TINY, *flags, "--total-timesteps", "100")
    before = weights(first.agent)
    torch.manual_seed(12345)
    again = run_loop("--resume", str(first.run_folder), "--total-timesteps", "180")
    assert again.run_folder.samefile(first.run_folder) and again.agent is not first.agent
    assert again.num_updates == whole.num_updates == 70 > first.num_updates
    torch.testing.assert_close(weights(again.agent), weights(whole.agent), rtol=0, atol=0, equal_nan=True)
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(again.agent).items())
    for name, optimizer in again.agent.optimizers.items():
        moments, expected = optimizer.state_dict()["state"], whole.agent.optimizers[name].state_dict()["state"]
        torch.testing.assert_close(moments, expected, rtol=0, atol=0)
    assert again.num_added == whole.num_added == 180 > len(whole.rb.rows) > 90  # the ring is full
    np.testing.assert_array_equal(sampled_rows(again), sampled_rows(whole))
    assert len(sampled_rows(whole)) == 90
    rows = [[line.split(",")[:4] for line in run.evaluations] for run in (again, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == 10


def test_a_run_that_anneals_goes_on_where_it_was(tmp_path):
    run_loop = partial(run_main, tmp_path, ROOT / "som_continuous_action.py")
    flags = "--env-id", "Clock-v0", "--checkpoint-frequency", "20", "--total-timesteps", "180", "--anneal-steps", "100"
    whole = run_loop(*TINY, *flags)
    run_folder = tmp_path / whole.run_folder
    expected = {name: tensor.clone() for name, tensor in weights(whole.agent).items()}
    at_160, _ = checkpoints(run_folder)
    torch.manual_seed(12345)
    again = run_loop("--resume", str(at_160))
    assert again.start_step == 160 and again.num_updates == whole.num_updates == 70
    torch.testing.assert_close(weights(again.agent), expected, rtol=0, atol=0, equal_nan=True)
    # a finished run learns on at its own rates, and anneals only if it is told to
    more = run_loop("--resume", str(run_folder), "--total-timesteps", "220", "--anneal-steps", "0")
    assert more.start_step == 180 and more.num_updates == 90
    assert not torch.equal(weights(more.agent)["actor.weights.0"], expected["actor.weights.0"])
    for optimizer in more.agent.optimizers.values():
        assert optimizer.param_groups[0]["lr"] in (more.args.q_lr, more.args.policy_lr, more.args.alpha_lr)


def test_a_resumed_run_continues_its_curves(run_loop, finished):
    times = dict(evaluations(finished))
    first = scalars(finished)
    checkpoints(finished)[-1].unlink()  # what is later than the checkpoint at 100 is done again
    (path,) = checkpoints(finished)
    step = int(path.stem.split("_")[1])
    assert step == 100
    run = run_loop("--resume", str(finished), "--total-timesteps", "200")
    assert run.steps[0] == 102 and run.run_folder.samefile(finished)
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
    assert episodes == [s for s in range(10, 201, 10) for _ in range(2)]
    config = json.loads((finished / "config.json").read_text())
    assert config["total_timesteps"] == 200 and config["resume"] is None and config["num_envs"] == 2
    assert config["script"] in {script.name for script in SCRIPTS}
    assert [int(path.stem.split("_")[1]) for path in checkpoints(finished)] == [192, 200]


@pytest.mark.parametrize("step", [100, 120])
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(run_loop, finished, step):
    """Its checkpoint was there. At the end of the run too, which else has no result."""
    for path in checkpoints(finished):
        if int(path.stem.split("_")[1]) > step:
            path.unlink()
    file = finished / "evaluations.csv"
    before = file.read_text().splitlines()
    file.write_text("\n".join(line for line in before if not line.startswith(f"{step},")))
    run = run_loop("--resume", str(finished))
    after = file.read_text().splitlines()
    assert [row for row, _ in evaluations(finished)] == list(range(20, 121, 20))
    at_step = [[line.split(",")[:4] for line in lines if line.startswith(f"{step},")] for lines in (before, after)]
    assert at_step[0] == at_step[1] and len(at_step[0]) == 1  # with the result that it would have had
    assert run.start_step == step
    assert sorted({event for event, _ in scalars(finished)["charts/eval_return"]}) == list(range(20, 121, 20))


@pytest.mark.parametrize("name", ["evaluations.csv", "config.json"])
def test_a_file_is_whole_at_every_moment(run_loop, finished, monkeypatch, capsys, name):
    """A write that is cut short, by a kill or a full disk, leaves what was there."""
    before = (finished / name).read_text()
    write = pathlib.Path.write_bytes

    def write_half(self, data):
        if not self.name.startswith(name.split(".")[0]):
            return write(self, data)
        write(self, bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_half)
    monkeypatch.setattr(pathlib.Path, "write_text", lambda self, text: write_half(self, text.encode()))
    with pytest.raises(SystemExit) as stop:
        run_loop("--resume", str(finished), *MORE)
    assert "No space left" in error_line(capsys, stop, 1)
    assert (finished / name).read_text() == before


def test_a_resumed_run_sees_new_episodes(run_loop, finished):
    """Their seeds are functions of seed and step: nothing is drawn twice, and always the same."""
    firsts, reset = [], WalkEnv.reset

    def record(self, *, seed=None, options=None):
        firsts.append((obs := reset(self, seed=seed, options=options)[0]).tolist())
        return obs, {}

    WalkEnv.reset = record
    seen = []
    try:
        copy = shutil.copytree(finished, finished.parent / "copy")
        for flags in (["--resume", str(finished)], ["--resume", str(copy)], [*TINY, "--env-id", "Walk-v0"]):
            firsts.clear()
            run = run_loop(*flags, "--total-timesteps", "130", "--num-episodes", "1")
            seen.append([tuple(obs) for obs in firsts])
            assert run.global_step == 130
    finally:
        WalkEnv.reset = reset
    again, copied, new = seen
    assert again == copied and len(set(again[:2])) == 2
    training = [obs for obs in again if obs != new[-1]]  # without that of the evaluation
    assert not set(training) & set(new)


def test_a_run_moves_between_devices(run_loop, finished, capsys):
    """What a GPU's run has written goes on on the CPU."""
    path = sorted(finished.glob("checkpoint_*.pt"))[-1]
    checkpoint = torch.load(path, weights_only=True)
    for optimizer in checkpoint["optimizers"].values():
        optimizer["param_groups"][0] |= {"fused": None, "foreach": True, "capturable": True}
    of_gpu = {"args": checkpoint["args"] | {"device": "gpu"}, "gpu_generator": torch.zeros(16).byte()}
    torch.save(checkpoint | of_gpu, path)
    if not torch.cuda.is_available():
        assert "--device gpu" in refused(run_loop, capsys, "--resume", str(finished), *MORE)
    run = run_loop("--resume", str(finished), "--device", "cpu", *MORE)
    assert run.start_step == 120 and run.global_step == 200
    last = torch.load(checkpoints(finished)[-1], weights_only=True)
    assert last["args"]["device"] == "cpu" and last["gpu_generator"] is None
    for optimizer in last["optimizers"].values():
        (group,) = optimizer["param_groups"]
        assert group["fused"] and not group["foreach"] and not group["capturable"]


def test_evaluate_prints_the_returns_and_changes_nothing(run_loop, finished, capsys):
    before = contents(finished)
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
    _, mean, _, std = head.split()
    assert [float(mean), float(std)] == pytest.approx([np.mean(returns), np.std(returns)], abs=0.11)
    assert before == contents(finished)


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
    "older": change(format="som_continuous_action.py, checkpoints of version 3"),
    "newer": change(format="som_continuous_action.py, checkpoints of version 5"),
    "other script": change(format="ppo_continuous_action.py, checkpoints of version 1"),
}


def test_a_bad_checkpoint_is_refused_and_the_one_before_it_named(run_loop, finished, capsys):
    before, last = checkpoints(finished)
    whole, good = last.read_bytes(), before.read_bytes()
    for damage in DAMAGES.values():
        last.write_bytes(whole)
        damage(last)
        for flag in "--resume", "--evaluate":
            message = refused(run_loop, capsys, flag, str(finished))
            assert f"{last} cannot be used" in message and message.endswith(f"the newest good one is {before}")
    truncate(before)
    message = refused(run_loop, capsys, "--resume", str(finished))
    assert f"{before} cannot be used" in message and message.endswith("there is no good one")
    before.write_bytes(good)
    run = run_loop("--resume", str(before), "--total-timesteps", "130")
    assert run.steps[0] == 102 and run.run_folder.samefile(finished)


def test_a_users_copy_of_a_checkpoint_is_left_alone(run_loop, finished):
    shutil.copy(checkpoints(finished)[0], finished / "checkpoint_best.pt")
    run = run_loop("--resume", str(finished), *MORE)
    assert run.start_step == 120 and run.global_step == 200
    assert [path.stem for path in checkpoints(finished)] == [
        "checkpoint_0000000192",
        "checkpoint_0000000200",
        "checkpoint_best",
    ]


def test_what_cannot_change_is_refused(run_loop, script, finished, capsys):
    files = contents(finished)
    of_som = {"--initial-lambda": "2"} if "som" in script.stem else {}
    for flag, value in (of_som | {
        "--env-id": "WalkToo-v0", "--hidden-dim": "32", "--num-layers": "2", "--seed": "2", "--num-envs": "3",
        "--buffer-size": "100", "--num-frequencies": "3", "--policy-lr": "1", "--q-lr": "1",
        "--checkpoint-frequency": "100", "--preset": "laptop",
    }).items():  # fmt: skip
        message = refused(run_loop, capsys, "--resume", str(finished), "--total-timesteps", "200", flag, value)
        assert flag in message and "cannot change" in message
    assert "No such file" in refused(run_loop, capsys, "--resume", "runs/nowhere")
    assert not pathlib.Path("runs/nowhere").exists()
    pathlib.Path("not a run").mkdir()
    assert "has no checkpoint" in refused(run_loop, capsys, "--resume", "not a run")
    assert not any(pathlib.Path("not a run").iterdir())
    assert files == contents(finished)


def test_a_lost_replay_buffer_is_refused_and_can_be_left_behind(run_loop, finished, capsys):
    file, row = finished / "replay_buffer.bin", 4 * 5 * 4  # five columns of at most 4 numbers
    assert 120 * row <= file.stat().st_size <= 130 * row
    file.write_bytes(file.read_bytes()[: 120 * row - 1])
    assert f"{file} is missing or short" in refused(run_loop, capsys, "--resume", str(finished), *MORE)
    file.unlink()
    assert "--no-checkpoint-buffer" in refused(run_loop, capsys, "--resume", str(finished), *MORE)
    assert not file.exists()
    run = run_loop("--resume", str(finished), *MORE, "--no-checkpoint-buffer")
    assert run.num_added == 80 and run.num_updates == 40 + 20 and not file.exists()


def test_without_its_buffer_a_resumed_run_fills_it_anew_before_it_learns(run_loop, monkeypatch):
    run = run_loop(*TINY, "--env-id", "Walk-v0", "--no-checkpoint-buffer")
    assert run.num_added == 120 and run.num_updates == 40
    assert not (run.run_folder / "replay_buffer.bin").exists()
    seen = weights(run.agent)
    again = run_loop("--resume", str(run.run_folder), "--total-timesteps", "160")
    # learning_starts steps, of the policy's own actions, and not one update
    assert again.num_added == 40 and again.num_updates == 40
    torch.testing.assert_close(weights(again.agent), seen, rtol=0, atol=0, equal_nan=True)
    again = run_loop("--resume", str(run.run_folder), "--total-timesteps", "220", "--checkpoint-buffer")
    assert again.num_added == 60 and again.num_updates == 50
    file = run.run_folder / "replay_buffer.bin"
    again = run_loop("--resume", str(run.run_folder), "--total-timesteps", "222")  # now it has been kept
    assert again.num_added == 62 and again.num_updates == 51 and file.exists()
    assert again.rb.rows[:62].abs().sum(dim=1).all()


def test_a_finished_run_says_so(run_loop, finished, capsys):
    before = contents(finished)
    with pytest.raises(SystemExit) as stop:
        run_loop("--resume", str(finished))
    assert not stop.value.code
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{finished} is finished at step 120" in line and "--total-timesteps MORE" in line
    assert before == contents(finished)


def test_a_finished_run_can_still_save_its_model(run_loop, finished):
    run_loop("--resume", str(finished), "--save-model")
    saved = torch.load(finished / "model.pt", weights_only=True)
    last = torch.load(checkpoints(finished)[-1], weights_only=True)["agent"]
    assert saved["critic"]
    for name, weight in saved["critic"].items():
        torch.testing.assert_close(weight, last[f"critic.{name}"], rtol=0, atol=0)


def change_args(run_folder, **changes):
    """Write other arguments into the newest checkpoint of a run."""
    path = sorted(run_folder.glob("checkpoint_*.pt"))[-1]
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"args": checkpoint["args"] | changes}, path)


def test_an_evaluation_needs_nothing_that_only_training_needs(run_loop, finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    change_args(finished, track=True, capture_video=True)
    assert "--track needs wandb" in refused(run_loop, capsys, "--resume", str(finished), *MORE)
    with pytest.raises(SystemExit) as stop:
        run_loop("--evaluate", str(finished))
    assert not stop.value.code and capsys.readouterr().out.startswith("return ")
    assert not (finished / "videos").exists()


def test_a_start_that_fails_loses_nothing(run_loop, finished, monkeypatch):
    """wandb without a login, where an older checkpoint is to be gone on with."""
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = object()

    def init(**options):
        raise RuntimeError("no login")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    older = sorted(finished.glob("checkpoint_*.pt"))[0]
    before = contents(finished)
    with pytest.raises(RuntimeError, match="no login"):
        run_loop("--resume", str(older), "--track")
    left = contents(finished)
    assert left.keys() == before.keys()
    assert all(left[name] == data for name, data in before.items() if name != "replay_buffer.bin")


def test_the_changes_of_load_policy_may_name_any_argument(script, finished):
    script = runpy.run_path(str(script))
    policy = script["load_policy"](finished, compile=False, best_of_n=2)
    assert policy(np.zeros(3)).shape == (2,)


def unwritable(run_loop, capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_loop(*flags)
    return error_line(capsys, stop, 1)


def test_a_folder_that_cannot_be_written_is_named(run_loop, finished, capsys):
    (finished / "config.json").unlink()
    files = contents(finished)
    (finished / "config.json").mkdir()  # cannot be written, by root neither
    assert str(finished) in unwritable(run_loop, capsys, "--resume", str(finished), *MORE)
    left = contents(finished)
    assert all(left[name] == data for name, data in files.items() if name != "replay_buffer.bin")
    shutil.rmtree("runs")
    pathlib.Path("runs").write_text("a file")
    assert "Not a directory: 'runs/Walk" in unwritable(run_loop, capsys, *TINY, "--env-id", "Walk-v0")


def test_two_runs_never_share_a_folder(run_loop, monkeypatch, capsys):
    monkeypatch.setattr(time, "time_ns", lambda: 17)
    name = run_loop(*TINY, "--env-id", "Walk-v0", "--total-timesteps", "44").run_folder
    files = contents(name)
    assert "File exists" in unwritable(run_loop, capsys, *TINY, "--env-id", "Walk-v0")
    assert files == contents(name)


def poison(monkeypatch):
    """The 10th step of Adam puts a NaN into a weight of the acting networks."""
    calls, step = [], torch.optim.Adam.step

    def poisoned(self, closure=None):
        step(self, closure)
        calls.append(1)
        if len(calls) == 10:
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
    # Adam steps twice in each step from 42 on: its 10th step is in the 5th of these
    step = {"reward": 60, "observation": 56, "last observation": 60, "weight": 50}[what]
    assert f"not finite at step {step}" in message and str(folder.name) in message
    path = checkpoints(folder)[-1]
    assert path.name == f"checkpoint_{step - 2:010d}.pt"
    agent = torch.load(path, weights_only=True)["agent"]
    # mean_std is NaN before the first update of the distributional loss
    assert all(tensor.isfinite().all() for name, tensor in agent.items() if name != "mean_std")


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
        step = torch.load(last, weights_only=True)["global_step"]
        assert last.name == f"checkpoint_{step:010d}.pt"
        known = {path.name for path in checkpoints(folder)}
        flags = ["--resume", str(folder)]
    run = run_main(tmp_path, script, *flags, "--total-timesteps", str(step + 60))
    assert run.steps[0] == step + 2 and checkpoints(folder)[-1].name == f"checkpoint_{step + 60:010d}.pt"
    assert evaluations(folder)[-1][0] == step + 60


KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, {tests!r})
from test_resume import StepsEnv

step = StepsEnv.step

def step_or_die(self, action):
    if self.total == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, action)

StepsEnv.step = step_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_with_a_full_ring_goes_on_with_exactly_its_rows(script, tmp_path):
    """The rows of both checkpoints are those of an uninterrupted run of the same seed."""
    flags = [*TINY, "--env-id", "Steps-v0", "--checkpoint-frequency", "30", "--eval-frequency", "1000"]
    # just before the next checkpoint, when most has been overwritten
    code = KILLED.format(tests=str(ROOT / "tests"), step=238 // 2)
    code = f"import sys; sys.argv[0] = {str(script)!r}\n{code}"
    killed = [sys.executable, "-W", "ignore", "-c", code, *flags, "--total-timesteps", "400"]
    assert subprocess.run(killed, cwd=tmp_path, capture_output=True).returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "runs").iterdir()
    whole = run_main(tmp_path, script, *flags, "--total-timesteps", "240")
    older, newer = checkpoints(folder)
    for path, step in (newer, 210), (older, 180):
        assert path.name == f"checkpoint_{step:010d}.pt"
        copy = shutil.copytree(folder, folder.parent / f"copy{step}")
        flags = "--resume", str(copy / path.name), "--total-timesteps", str(step + 2)
        run = run_main(tmp_path, script, *flags)
        assert run.num_added == step + 2 > len(run.rb.on_host)  # the ring is full
        counted = range(step - 90, step)
        rows, expected = (r.rb.on_host[[i % len(r.rb.on_host) for i in counted]] for r in (run, whole))
        np.testing.assert_array_equal(rows, expected)
        # the last update was on these rows alone, whose second number tells their step
        assert set(run.rb.sample(3000).obs[:, :2].unique(dim=0)[:, 1].int().tolist()) == {i // 2 for i in counted}


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


def test_a_full_disk_ends_the_run_with_a_clear_line(tmp_path):
    flags = *FLAGS, "--total-timesteps", "1000000"
    process = start(tmp_path, SCRIPTS[0], *flags)
    wait_for_new_checkpoint(tmp_path, set(), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4000, 4000))  # no file can grow beyond it
    assert process.wait(60) == 1
    (folder,) = (tmp_path / "runs").iterdir()
    errors = [line for line in (tmp_path / "errors").read_text().splitlines() if "warning" not in line and line]
    assert len(errors) == 1
    (message,) = errors
    assert message.startswith("error: ") and "File too large" in message and folder.name in message
    assert "make room" in message
    path = checkpoints(folder)[-1]
    step = torch.load(path, weights_only=True)["global_step"]
    assert path.name == f"checkpoint_{step:010d}.pt"
    run = run_main(tmp_path, SCRIPTS[0], "--resume", str(folder), "--total-timesteps", str(step + 60))
    assert run.steps[0] == step + 2 and checkpoints(folder)[-1].name == f"checkpoint_{step + 60:010d}.pt"


def test_a_disk_without_room_for_the_buffer_refuses_the_run(run_loop, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        assert "File too large" in unwritable(run_loop, capsys, *TINY, "--env-id", "Walk-v0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
