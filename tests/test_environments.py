"""Environments and machines as people have them: each test is a fault that a run once had."""

import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
import tqdm
from test_resume import ROOT, SCRIPTS, checkpoints, contents, error_line, evaluations, handlers, run_main, script  # noqa: F401

TINY = (
    "--device cpu --no-compile --hidden-dim 16 --best-of-n 2 --batch-size 16 --num-envs 2 --learning-starts 40 "
    "--total-timesteps 60 --eval-frequency 60 --num-episodes 2"
).split()


class ToyEnv(gym.Env):
    """The observation is (t, last action, 1 at the start); the reward is 1, an episode has 20 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    instances: typing.ClassVar = []  # the first one is only looked at, then the training's, then the evaluations'

    def __init__(self):
        ToyEnv.instances.append(self)
        self.number = len(ToyEnv.instances)
        self.total = 0
        self.closed = False

    @property
    def evaluates(self):
        return self.number > 3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.0, 0.0, 1.0]), {}

    def step(self, action):
        self.t += 1
        self.total += 1
        return np.array([self.t, action[0], 0.0]), 1.0, False, self.t == 20, {}

    def close(self):
        self.closed = True


def register(name, env, **changes):
    gym.registry.pop(name, None)  # of another test
    gym.register(name, env, disable_env_checker=True, **({"max_episode_steps": 100} | changes))


@pytest.fixture
def run(script, tmp_path):  # noqa: F811
    """Runs the script with flags over an environment, in this process."""

    def run_env(env_id, *flags):
        ToyEnv.instances.clear()
        return run_main(tmp_path, script, *TINY, "--env-id", env_id, *flags)

    return run_env


@pytest.fixture
def resume(script, tmp_path):  # noqa: F811
    def resume_run(run_folder, *flags):
        ToyEnv.instances.clear()
        return run_main(tmp_path, script, "--resume", str(run_folder), *flags)

    return resume_run


def fails(capsys, code, function, *flags):
    """The one line of a run that ends with an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*flags)
    return error_line(capsys, stop, code)


# 1: the room for the replay buffer


def no_room(monkeypatch, free):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))


def sizes(folder):
    """Bytes of the files of a run: what is there, what is taken of the disk."""
    stats = [path.stat() for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats), sum(512 * stat.st_blocks for stat in stats)


LONGER = "--total-timesteps", "3000"  # 240 kB


def test_a_run_without_room_takes_none(run, tmp_path, monkeypatch, capsys):
    register("Toy-v0", ToyEnv)
    no_room(monkeypatch, 100_000)
    message = fails(capsys, 1, run, "Toy-v0", *LONGER, "--learning-starts", "2900")
    assert "0.1 MB are missing" in message and "--no-checkpoint-buffer" in message
    assert "--resume" not in message  # there is nothing to go on with
    assert max(sizes(tmp_path)) < 50_000
    run("Toy-v0", "--no-checkpoint-buffer")  # as it says


def test_a_run_whose_disk_fills_meanwhile_gives_back_what_it_took(run, tmp_path, monkeypatch, capsys):
    def fallocate(descriptor, start, size):
        os.ftruncate(descriptor, 20_000_000)
        raise OSError(errno.ENOSPC, "No space left on device")

    register("Toy-v0", ToyEnv)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert "No space left" in fails(capsys, 1, run, "Toy-v0")
    assert sizes(tmp_path)[0] < 50_000


def test_a_file_system_that_reserves_by_writing_is_enough(run, resume, tmp_path, monkeypatch):
    """Where a file system cannot reserve space the C library writes zeros, but never to a file open for appending."""
    import fcntl

    def fallocate(descriptor, start, size):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, "Bad file descriptor")
        missing = max(start + size - os.fstat(descriptor).st_size, 0)
        os.pwrite(descriptor, bytes(missing), start + size - missing)

    register("Toy-v0", ToyEnv)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    folder = run("Toy-v0").run_folder
    rows = (tmp_path / folder / "replay_buffer.bin").read_bytes()
    assert any(rows)
    assert resume(folder, *LONGER).global_step == 3000
    assert (tmp_path / folder / "replay_buffer.bin").read_bytes()[:2000] == rows[:2000]


def test_a_resumed_run_without_room_leaves_the_buffer_as_it_was(run, resume, tmp_path, monkeypatch, capsys):
    register("Toy-v0", ToyEnv)
    folder = run("Toy-v0").run_folder
    before = contents(tmp_path / folder)
    no_room(monkeypatch, 1000)
    message = fails(capsys, 1, resume, folder, *LONGER)
    assert "0.2 MB are missing" in message and "--no-checkpoint-buffer" in message
    after = contents(tmp_path / folder)
    assert after["replay_buffer.bin"] == before["replay_buffer.bin"]
    assert checkpoints(tmp_path / folder)[-1].name == "checkpoint_0000000060.pt"
    assert resume(folder, "--total-timesteps", "62").global_step == 62  # needs no more than is there


# 2: an environment that returns its own state


class OwnStateEnv(ToyEnv):
    """Its state is [0, 0, 1] at reset, then [t, a, 0], changed in place."""

    def __init__(self):
        super().__init__()
        self.state = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        self.state[:] = super().reset(seed=seed)[0]
        return self.state, {}

    def step(self, action):
        observation, *others = super().step(action)
        self.state[:] = observation
        return self.state, *others


def test_the_last_observation_of_an_episode_is_its_own(run):
    register("OwnState-v0", OwnStateEnv)
    rb = run("OwnState-v0").rb
    rows = rb.on_host[:60].reshape(30, 2, -1)  # step, environment
    obs, next_obs = rows[..., 0:3], rows[..., 4:7]
    np.testing.assert_array_equal(next_obs[..., 0], np.stack(2 * [np.arange(30) % 20 + 1], 1))
    np.testing.assert_array_equal(next_obs[19, :, 2], 0)  # not [0, 0, 1], of the next episode
    np.testing.assert_array_equal(obs[20], [[0, 0, 1]] * 2)
    np.testing.assert_array_equal(obs[1:20], next_obs[:19])


# 3: environments with random numbers of another kind


class OldRandomEnv(ToyEnv):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        if seed is not None and self.kind == "RandomState":
            self.np_random = np.random.RandomState(seed % 2**32)
        elif seed is not None:
            self.np_random = np.random.Generator(getattr(np.random, self.kind)(seed))
        self.t = 0
        return self.np_random.normal(size=3), {}


@pytest.mark.parametrize("kind", ["RandomState", "MT19937", "Philox"])
def test_random_numbers_of_every_kind_can_be_resumed(run, resume, tmp_path, kind):
    register("OldRandom-v0", OldRandomEnv, kwargs={"kind": kind})
    folder = run("OldRandom-v0").run_folder
    again = resume(folder, "--total-timesteps", "100")
    assert again.start_step == 60 and again.global_step == 100
    firsts = again.rb.on_host[[60, 61], 0:3]  # of new episodes
    assert not (again.rb.on_host[:60, None, 0:3] == firsts).all(axis=2).any()


# 4: NaN in an evaluation


class PoisonedEvaluationEnv(ToyEnv):
    """In an evaluation an episode has 3 steps for the first environment and 6 for the second."""

    def __init__(self, episode: int):
        super().__init__()
        self.poisoned, self.episode = episode, 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.evaluates:
            truncated = self.t >= 3 * (self.number - 3)
            if self.episode >= self.poisoned or (self.poisoned > 1 and self.t > 3 * (self.number - 3)):
                reward = np.nan
        return observation, reward, terminated, truncated, info


def test_nan_in_an_evaluation_is_an_error(run, tmp_path, capsys):
    register("Poisoned-v0", PoisonedEvaluationEnv, kwargs={"episode": 1})
    message = fails(capsys, 1, partial(run, "Poisoned-v0"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert "the evaluation is not finite at step 60" in message and folder.name in message
    assert evaluations(folder) == []
    assert checkpoints(folder)[-1].name == "checkpoint_0000000060.pt"  # what was learned is not lost


def test_nan_after_an_episode_does_not_count(run):
    register("Poisoned-v0", PoisonedEvaluationEnv, kwargs={"episode": 2})
    (line,) = run("Poisoned-v0").evaluations[1:]
    assert [float(x) for x in line.split(",")[2:4]] == [4.5, 1.5]  # returns 3 and 6


# 7: actions in their box


class StrictEnv(ToyEnv):
    """It checks its actions. The observation is small, so that actions are not all on the bounds."""

    def __init__(self, box: gym.spaces.Box):
        super().__init__()
        self.action_space = box

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        return np.array([self.t / 20, 0.5, 0.0]), *super().step(action)[1:]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_action_is_in_its_box_and_of_its_dtype(run, dtype):
    bounds = np.array([[15, 30], [0.1, 0.3], [-0.7, 0.9], [-6e4, -1e-3], [0.3, 1.1]], dtype)
    register("Strict-v0", StrictEnv, kwargs={"box": gym.spaces.Box(bounds[:, 0], bounds[:, 1], dtype=dtype)})
    # to the bounds of all boxes: the noise is larger than they are
    rb = run("Strict-v0", "--noise-scale", "2").rb
    actions = rb.on_host[:60, 8:13]
    assert (actions == -1).any() and (actions == 1).any() and np.abs(actions).max() == 1
    # the first ones are uniform, and no policy's
    first, later = actions[:40], actions[40:]
    assert np.abs(first).max() < 1 and first.min() < -0.8 and first.max() > 0.8
    assert (np.abs(later) == 1).any()


# 8: actions that are no real numbers


@pytest.mark.parametrize(
    "box",
    [
        gym.spaces.Box(0, 5, (2,), np.int64),
        gym.spaces.Box(0, 1, (2,), np.uint8),
        gym.spaces.Box(np.float32([0, 1]), np.float32([1, 1])),
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Box(np.float32([0, 0]), np.float32([1, np.inf])),
    ],
    ids=["integers", "bytes", "low = high", "two dimensions", "unbounded"],
)
def test_actions_that_are_not_supported_are_refused(run, tmp_path, capsys, box):
    register("Strict-v0", StrictEnv, kwargs={"box": box})
    message = fails(capsys, 2, run, "Strict-v0")
    assert "supported are flat vectors of real numbers with bounds low < high" in message
    assert not any(tmp_path.iterdir())


# 9: what float32 cannot hold


class HugeEnv(ToyEnv):
    """From step 7 of an episode on, or in its first observation, a number is too large."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return (observation + 1e200 if self.what == "first observation" else observation), info

    def step(self, action):
        observation, reward, *others = super().step(action)
        if self.t == 7 and self.what == "observation":
            observation[1] = 1e200
        if self.t == 7 and self.what == "reward":
            reward = 1e39
        return observation, reward, *others


@pytest.mark.parametrize(("what", "step"), [("observation", 14), ("reward", 14), ("first observation", 2)])
def test_what_float32_cannot_hold_is_told_at_once(run, tmp_path, capsys, what, step):
    register("Huge-v0", HugeEnv, kwargs={"what": what})
    message = fails(capsys, 1, run, "Huge-v0")
    assert f"the {what.split()[-1]} is not finite at step {step}, seed 1" in message
    (folder,) = (tmp_path / "runs").iterdir()
    rows = np.fromfile(folder / "replay_buffer.bin", np.float32)
    assert np.isfinite(rows).all()  # nothing of it was stored


def test_what_float32_can_hold_is_stored(run):
    register("Huge-v0", HugeEnv, kwargs={"what": ""})
    assert run("Huge-v0").global_step == 60


# 10: no time limit

ENDLESS = """
import pathlib
import gymnasium as gym
import numpy as np

class EndlessEnv(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1.0, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    instances = 0

    def __init__(self):
        EndlessEnv.instances += 1
        self.evaluates = EndlessEnv.instances > 3  # one is looked at, two train

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        if self.evaluates:
            pathlib.Path("evaluates").touch()
        return np.zeros(3, np.float32), 0.0, False, False, {}

gym.register("Endless-v0", EndlessEnv, disable_env_checker=True)
"""


def in_a_process(script, folder, *flags, **environment):  # noqa: F811
    """The script as a process of its own, with the modules in the folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-W", "ignore", str(script), *flags]
    out, errors = (folder / "out").open("w"), (folder / "errors").open("w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=errors)


def wait_until(condition, process, folder):
    began = time.time()
    while not condition():
        if process.poll() is not None or time.time() - began > 120:
            process.kill()
            raise AssertionError((folder / "errors").read_text())
        time.sleep(0.01)


def error_lines(folder):
    return [line for line in (folder / "errors").read_text().splitlines() if line.strip() and "step/s" not in line]


def test_an_evaluation_without_end_is_announced_and_can_be_stopped(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    process = in_a_process(SCRIPTS[0], tmp_path, *TINY, "--env-id", "endless:Endless-v0")
    wait_until((tmp_path / "evaluates").exists, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    first, last = error_lines(tmp_path)
    assert first == "warning: endless:Endless-v0 has no time limit; an evaluation lasts until its episodes end"
    (folder,) = (tmp_path / "runs").iterdir()
    assert last.startswith("error: stopped at step 60") and folder.name in last
    assert checkpoints(folder)[-1].name == "checkpoint_0000000060.pt"  # all that was learned
    assert evaluations(folder) == []


# 11: errors that are not of the run's own files


class PortEnv(ToyEnv):
    """A simulator that loses its connection, in training or in an evaluation."""

    def __init__(self, fails_in: str):
        super().__init__()
        self.fails_in = fails_in

    def step(self, action):
        if self.t == 5 and self.evaluates == (self.fails_in == "evaluation"):
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return super().step(action)


def told(error, capsys):
    """What the interpreter prints of an error."""
    capsys.readouterr()
    sys.excepthook(error.type, error.value, error.tb)
    return capsys.readouterr().err


@pytest.mark.parametrize("fails_in", ["training", "evaluation"])
def test_an_environments_oserror_keeps_its_traceback(run, capsys, fails_in):
    register("Port-v0", PortEnv, kwargs={"fails_in": fails_in})
    with pytest.raises(OSError, match="Address already in use") as error:
        run("Port-v0")
    message = told(error, capsys)
    assert "Traceback" in message and 'raise OSError(errno.EADDRINUSE, "Address already in use")' in message
    assert "make room" not in message


def test_a_reader_that_has_gone_is_not_told_as_a_full_disk(run, monkeypatch, capsys):
    """... | head -1"""

    def write(line):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    register("Toy-v0", ToyEnv)
    monkeypatch.setattr(tqdm.tqdm, "write", write)
    with pytest.raises(BrokenPipeError) as error:
        run("Toy-v0")
    assert "make room" not in told(error, capsys)


# 12: an empty name; one run resumed twice


@pytest.mark.parametrize("flag", ["--resume=", "--evaluate="])
def test_an_empty_name_is_refused(run, tmp_path, capsys, flag):
    register("Toy-v0", ToyEnv)
    message = fails(capsys, 2, run, "Toy-v0", flag)
    assert flag.strip("=") in message
    assert not any(tmp_path.iterdir())


def test_a_run_is_written_by_one_process(tmp_path, capsys):
    resume = partial(run_main, tmp_path, SCRIPTS[1], "--resume")
    flags = (
        "--env-id",
        "Pendulum-v1",
        "--eval-frequency",
        "100000000",
        "--checkpoint-frequency",
        "20",
        "--buffer-size",
        "500",
    )
    folder = run_main(tmp_path, SCRIPTS[1], *TINY, *flags).run_folder
    process = in_a_process(SCRIPTS[1], tmp_path, "--resume", str(folder), "--total-timesteps", "100000000")
    last = checkpoints(tmp_path / folder)[-1]
    wait_until(lambda: checkpoints(tmp_path / folder)[-1] > last, process, tmp_path)
    try:
        step = int(checkpoints(tmp_path / folder)[-1].stem.split("_")[1])
        message = fails(capsys, 2, resume, str(folder), "--total-timesteps", str(step + 400))
        assert str(folder) in message and "written by another process" in message
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    step = int(checkpoints(tmp_path / folder)[-1].stem.split("_")[1])
    run = resume(str(folder), "--total-timesteps", str(step + 20))
    assert run.global_step == step + 20  # the lock ended with it


# 13: lambda without autotune


def test_lambda_is_one_from_where_autotune_is_left_out(tmp_path):
    register("Toy-v0", ToyEnv)
    first = run_main(tmp_path, SCRIPTS[0], *TINY, "--env-id", "Toy-v0", "--initial-lambda", "5")
    assert first.agent.log_lambda.exp().item() == pytest.approx(5, rel=0.1)
    flags = "--resume", str(first.run_folder), "--total-timesteps", "80", "--no-autotune"
    again = run_main(tmp_path, SCRIPTS[0], *flags)
    assert again.agent.log_lambda.item() == 0
    assert again.info["losses/alpha"].item() == again.args.inverse_temperature
    more = run_main(tmp_path, SCRIPTS[0], *flags[:2], "--total-timesteps", "100", "--autotune", "--alpha-delay", "1")
    assert 0 < abs(more.agent.log_lambda.item()) < 0.2  # it goes on from there


# 15: machines without a compiler, without a display


def test_without_a_compiler_compile_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "bin").mkdir()
    environment = {
        "PATH": str(tmp_path / "bin"),
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c"),
    }
    process = in_a_process(SCRIPTS[0], tmp_path, *TINY, "--env-id", "Pendulum-v1", "--compile", **environment)
    assert process.wait(120) == 2
    (message,) = error_lines(tmp_path)
    assert message.startswith("error: ") and "--no-compile" in message
    assert not (tmp_path / "runs").exists()


class HeadlessEnv(ToyEnv):
    metadata: typing.ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        raise RuntimeError("an OpenGL platform library has not been loaded")


def test_a_video_without_a_display_names_what_works(run, tmp_path, monkeypatch, capsys):
    register("Headless-v0", HeadlessEnv)
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if name == "moviepy" else find_spec(name))
    message = fails(capsys, 2, run, "Headless-v0", "--capture-video")
    assert "MUJOCO_GL=egl" in message and "OpenGL platform library" in message
    assert not any(tmp_path.iterdir())


# 17: messages


class DictEnv(ToyEnv):
    observation_space = gym.spaces.Dict(x=gym.spaces.Box(-1.0, 1.0, (2,)))


def test_messages_are_true_and_name_the_way_out(run, tmp_path, capsys):
    register("Toy-v0", ToyEnv)
    register("Dict-v0", DictEnv)
    message = fails(capsys, 2, run, "Toy-v0", "--total-timesteps", "101", "--learning-starts", "100")
    assert "--total-timesteps must be larger, by --num-envs or more, than --learning-starts" in message
    message = fails(capsys, 2, run, "Dict-v0")
    assert "Dict(" in message and "gymnasium.wrappers.FlattenObservation" in message
    assert "module:Env-v0" in fails(capsys, 2, run, "OfAnotherPackage-v0")
    assert "no_such_module" in fails(capsys, 2, run, "no_such_module:Env-v0")
    assert not any(tmp_path.iterdir())


def test_no_noise_needs_no_autotune(tmp_path, capsys):
    register("Toy-v0", ToyEnv)
    flags = *TINY, "--env-id", "Toy-v0", "--noise-scale", "0"
    assert "--noise-scale 0 needs --no-autotune" in fails(capsys, 2, partial(run_main, tmp_path, SCRIPTS[0]), *flags)
    run = run_main(tmp_path, SCRIPTS[0], *flags, "--no-autotune", "--policy-tau", "1")
    assert run.global_step == 60


def test_environments_are_closed(run):
    register("Toy-v0", ToyEnv)
    run("Toy-v0")
    assert len(ToyEnv.instances) == 1 + 2 + 2
    assert [env.number for env in ToyEnv.instances if not env.closed] == []


class EpisodeInfoEnv(ToyEnv):
    """It has an info of the name that a wrapper of Gymnasium uses, too."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"episode": 7}

    def step(self, action):
        *others, _ = super().step(action)
        return *others, {"episode": 7}


def test_an_info_of_the_environments_own_called_episode(run):
    register("EpisodeInfo-v0", EpisodeInfoEnv)
    assert run("EpisodeInfo-v0").global_step == 60


# Your own environment, as the page shows it


def test_the_example_of_an_environment_of_ones_own_trains(tmp_path):
    section = (ROOT / "docs" / "som.md").read_text().split("\n## Your own environment\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module, env_id = re.search(r"\.py --env-id (\w+):([\w-]+)", section).groups()
    (tmp_path / f"{module}.py").write_text(code)
    finished = in_a_process(SCRIPTS[0], tmp_path, *TINY, "--env-id", f"{module}:{env_id}")
    assert finished.wait(120) == 0, (tmp_path / "errors").read_text()
    assert error_lines(tmp_path) == []
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{module}_{env_id}__")  # not every disk takes a colon
    ((step, _),) = evaluations(folder)
    assert step == 60
    agent = torch.load(checkpoints(folder)[-1], weights_only=True)["agent"]
    assert all(tensor.isfinite().all() for name, tensor in agent.items() if name != "mean_std")
