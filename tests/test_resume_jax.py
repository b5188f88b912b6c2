"""Runs of the JAX script that survive: resumed, killed, stopped, damaged and poisoned."""

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_jax import SCRIPT, TINY, SeededEnv, pair, run_loop, scalars  # noqa: F401

FORMAT = "som_continuous_action_jax.py, checkpoints of version 2"


class PoisonedEnv(SeededEnv):
    """At its 13th step, or the 12th, the last of an episode, the fourth instance's `what` is not a number."""

    made = 0

    def __init__(self, what):
        PoisonedEnv.made += 1
        self.what, self.number_made, self.total = what, PoisonedEnv.made, 0

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.total += 1
        if self.number_made == 4 and self.total == (12 if self.what == "last observation" else 13):
            obs, reward = (obs, np.nan) if self.what == "reward" else (obs * np.nan, reward)
        return obs, reward, *rest


for what in "reward", "observation", "last observation":
    name = f"PoisonedSeed{what.title().replace(' ', '')}-v0"
    gym.register(name, PoisonedEnv, kwargs={"what": what}, disable_env_checker=True)
gym.register("SeededToo-v0", SeededEnv, disable_env_checker=True)


@pytest.fixture
def finished(pair, tmp_path):  # noqa: F811
    """Folder of the first seed of a finished run of 200 steps, with checkpoints at 192 and 200, a copy."""
    shutil.copytree(pair.folders[0].parent, tmp_path / "runs")
    return tmp_path / "runs" / pair.folders[0].name


def checkpoints(folder):
    return sorted(folder.glob("checkpoint_*.npz"))


def second(folder):
    return folder.with_name(folder.name.replace("__1__", "__2__"))


def evaluations(folder):
    with (folder / "evaluations.csv").open() as file:
        return [
            (int(row["global_step"]), row["return_mean"], float(row["wall_time_s"])) for row in csv.DictReader(file)
        ]


def contents(folder):
    return {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}


def refused(capsys, tmp_path, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, *flags)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1
    return message


def assert_equal(tree, other):
    for leaf, x in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, x)  # NaN equals NaN


def test_updates_after_a_resume_are_bit_equal(pair, finished, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tqdm.tqdm", lambda steps, **_: iter(()))  # it is loaded, and that is all
    again = run_loop(tmp_path, "--resume", finished, "--total-timesteps", "260")
    assert again.state is not pair.state and again.num_added == 200 > pair.buffer.shape[1]  # the ring is full
    assert again.num_updates == pair.num_updates == 160
    assert_equal((again.state, again.buffer, again.update_keys), (pair.state, pair.buffer, pair.update_keys))
    after = []
    for run in pair, again:
        state = jax.tree.map(jnp.copy, run.state)
        for number in range(160, 180, 2):
            state, _ = run.agents.update(state, run.buffer, run.num_added, number, run.update_keys)
        after.append(state)
    assert_equal(*after)
    assert not np.array_equal(after[0].critic[0][0], pair.state.critic[0][0])
    assert not set(again.env_seeds.tolist()) & set(pair.env_seeds.tolist())  # a resumed run sees other episodes
    assert again.eval_seeds == pair.eval_seeds and len(set(pair.env_seeds.tolist())) == 4


def test_a_resumed_run_continues_its_curves(finished, tmp_path):
    folders = finished, second(finished)
    tables, first = [evaluations(folder) for folder in folders], [scalars(folder) for folder in folders]
    before, last = checkpoints(finished)
    last.unlink()  # as if killed after the last evaluation, before its checkpoint was there
    run = run_loop(tmp_path, "--resume", before, "--total-timesteps", "260")
    assert run.steps[0] == 194 and [folder.samefile(x) for folder, x in zip(folders, run.folders, strict=True)]
    assert [path.stem for path in checkpoints(finished)] == ["checkpoint_0000000256", "checkpoint_0000000260"]
    assert run.num_updates == 220 and run.num_added == 260
    np.testing.assert_array_equal(run.disk.swapaxes(0, 1), run.buffer)
    for k, folder in enumerate(folders):
        rows = evaluations(folder)
        assert [row for row, *_ in rows] == [100, 200, 260] and rows[0] == tables[k][0]  # no gap and no doubled row
        times = [seconds for *_, seconds in rows]
        assert times == sorted(times)
        logged = scalars(folder)
        assert logged.keys() == first[k].keys()
        for tag, events in logged.items():
            assert [e for e in events if e[0] <= 192] == [e for e in first[k][tag] if e[0] <= 192]
        assert [step for step, _ in logged["charts/eval_return"]] == [100, 200, 260]
        # two environments, episodes of four steps of both
        assert [step for step, _ in logged["charts/episodic_return"]] == [x for x in range(8, 260, 8) for _ in "ab"]
        config = json.loads((folder / "config.json").read_text())
        assert (config["total_timesteps"], config["resume"], config["seed"], config["num_envs"]) == (
            260,
            None,
            k + 1,
            2,
        )


def test_evaluate_prints_the_returns_and_changes_nothing(finished, tmp_path, capsys):
    before, printed = contents(finished), []
    for _ in range(2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_loop(tmp_path, "--evaluate", finished)
        assert not stop.value.code
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    returns = json.loads(printed[0].split("by seed and episode ")[1])
    assert np.shape(returns) == (2, 10)
    final = [
        float(evaluations(folder)[-1][1]) for folder in (finished, second(finished))
    ]  # of the same seeds and weights
    np.testing.assert_allclose(np.mean(returns, axis=1), final, atol=0.1)
    assert before == contents(finished)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    """One bit in the weights."""
    data = bytearray(path.read_bytes())
    position = data.find(np.load(path)[".critic[1][0]"].tobytes()[:64])
    assert position > 0
    data[position + 40] ^= 1
    path.write_bytes(data)


def rewrite(change):
    def damage(path):
        arrays = change(dict(np.load(path)))
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return damage


def other_format(name):
    return rewrite(lambda arrays: {name if key == FORMAT else key: x for key, x in arrays.items()})


class Executed:
    def __reduce__(self):
        return print, ("executed",)


DAMAGES = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint\n" * 100),
    "array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "pickle": rewrite(lambda arrays: arrays | {".critic[0][0]": np.array([Executed()], object)}),
    "foreign": rewrite(lambda arrays: {"weights": np.ones(3)}),
    "older": other_format("som_continuous_action_jax.py, checkpoints of version 1"),
    "newer": other_format("som_continuous_action_jax.py, checkpoints of version 3"),
    "other script": other_format("ppo_continuous_action.py, checkpoints of version 2"),
}


def test_a_bad_checkpoint_is_refused_and_the_good_one_before_it_named(finished, tmp_path, capsys):
    before, last = checkpoints(finished)
    whole = last.read_bytes()
    for name, damage in DAMAGES.items():
        last.write_bytes(whole)
        damage(last)
        for flag in "--resume", "--evaluate":
            message = refused(capsys, tmp_path, flag, finished)
            assert f"/{last.name} " in message and message.endswith(f"before it: {before}"), name
    truncate(before)
    assert refused(capsys, tmp_path, "--resume", finished).endswith("before it: None")
    assert "missing" in refused(capsys, tmp_path, "--resume", "runs/nowhere")
    assert "missing" in refused(capsys, tmp_path, "--resume", second(finished))


def test_a_finished_run_says_so(finished, tmp_path, capsys):
    files = contents(finished)
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, "--resume", finished)
    assert not stop.value.code and "is finished at step 200; --total-timesteps MORE" in capsys.readouterr().out
    assert files == contents(finished)


def test_without_its_buffer_a_run_collects_before_it_learns_on(finished, tmp_path):
    (finished / "replay_buffer.bin").unlink()
    flags = "--total-timesteps", "260", "--no-checkpoint-buffer", "--learning-starts", "40"
    run = run_loop(tmp_path, "--resume", finished, *flags)
    assert run.num_added == 60 and not (finished / "replay_buffer.bin").exists()
    # two environments: 20 of the 60 rows came after learning_starts; the policy, not chance, acted for all of them
    assert run.num_updates == 160 + 10 * run.args.updates_per_step
    np.testing.assert_array_equal(run.disk.swapaxes(0, 1), run.buffer)
    (finished / "replay_buffer.bin").write_bytes(b"")  # the next one has no rows to read either
    assert run_loop(tmp_path, "--resume", finished, "--total-timesteps", "280", "--checkpoint-buffer").num_added == 20


def test_the_networks_are_saved_at_the_end(finished, tmp_path):
    run = run_loop(tmp_path, "--resume", finished, "--total-timesteps", "202", "--save-model")
    for k, folder in enumerate((finished, second(finished))):
        with np.load(folder / "model.npz") as model:
            assert json.loads(str(model["config"]))["seed"] == k + 1
            for network in "acting_actor", "critic":
                leaves = {name for name in model if name.startswith(f".{network}")}
                assert len(leaves) == len(jax.tree.leaves(getattr(run.state, network)))
            np.testing.assert_array_equal(model[".acting_actor[0][0]"], run.state.acting_actor[0][0][k])


def test_a_bad_replay_buffer_is_refused(finished, tmp_path, capsys):
    file = finished / "replay_buffer.bin"
    rows = file.read_bytes()
    for data in rows[:-4], b"", None:
        file.unlink() if data is None else file.write_bytes(data)
        assert "replay_buffer.bin" in refused(capsys, tmp_path, "--resume", finished, "--total-timesteps", "260")
    assert not file.exists()


def test_what_cannot_change_is_refused(finished, tmp_path, capsys):
    files = contents(finished)
    for flag, value in {
        "--env-id": "SeededToo-v0", "--hidden-dim": "32", "--num-layers": "2", "--seed": "2", "--num-seeds": "1",
        "--num-envs": "3", "--buffer-size": "100", "--num-frequencies": "3",
    }.items():  # fmt: skip
        message = refused(capsys, tmp_path, "--resume", finished, "--total-timesteps", "260", flag, value)
        assert flag in message and "cannot change" in message
    assert files == contents(finished)


@pytest.mark.parametrize("what", ["reward", "observation", "last observation"])
def test_what_is_not_finite_never_reaches_a_checkpoint(tmp_path, capsys, what):
    PoisonedEnv.made = 0  # the first is made to see its spaces, then two for each seed
    env_id, every_step = f"PoisonedSeed{what.title().replace(' ', '')}-v0", ("--checkpoint-frequency", "2")
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, *TINY, "--env-id", env_id, "--num-seeds", "2", *every_step)
    message, (first,) = capsys.readouterr().err.strip().splitlines()[-1], (tmp_path / "runs").glob("*__1__*")
    step = 24 if what == "last observation" else 26
    assert stop.value.code == 1 and f"the {what.split()[-1]} is not finite at step {step}, seed 2" in message
    assert second(first).name in message and checkpoints(first)[-1].name == f"checkpoint_{step - 2:010d}.npz"
    rows = np.fromfile(first / "replay_buffer.bin", np.float32)
    assert np.isfinite(rows).all()


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(finished, tmp_path, capsys):
    def poison(arrays):
        arrays[".critic[1][0]"][1].flat[5] = np.nan
        return arrays

    rewrite(poison)(checkpoints(finished)[-1])
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, "--resume", finished, "--total-timesteps", "260")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and second(finished).name in message
    assert "error: weight ." in message and "is not finite at step 202, seed 2" in message
    assert len(checkpoints(finished)) == 2 and checkpoints(finished)[-1].name == "checkpoint_0000000200.npz"


def test_a_folder_or_disk_that_takes_no_more_ends_the_run(finished, tmp_path):
    """In a process of its own, as its files may have 100 kB only: a checkpoint is larger, the buffer is not."""
    before = contents(finished)
    code = f"""
import resource, sys
sys.path[:0] = {[str(SCRIPT.parent / "tests"), str(SCRIPT.parent)]}
import test_jax
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
test_jax.run_loop({str(tmp_path)!r}, "--resume", {str(finished)!r}, "--total-timesteps", "260")
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stderr.strip().splitlines()[-1].startswith("error: "), ended.stderr
    assert "File too large" in ended.stderr and "Traceback" not in ended.stderr
    after = contents(finished)
    assert all(after[path] == before[path] for path in checkpoints(finished)) and len(checkpoints(finished)) == 2


def test_a_folder_that_cannot_be_made_ends_the_run_with_a_line(tmp_path):
    (tmp_path / "runs").touch()
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *TINY, "--env-id", "Pendulum-v1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stderr.strip().splitlines()[-1].startswith("error: "), ended.stderr
    assert "runs/Pendulum-v1" in ended.stderr and "Traceback" not in ended.stderr


# The real script, killed
def start(folder, *flags):
    with (folder / "errors").open("w") as errors:
        command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, flags)]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def wait_for_new_checkpoint(folder, known, process):
    """The names of the run's checkpoints, when there is one more; one is written at the first step."""
    began = time.time()
    while process.poll() is None and time.time() - began < 300:
        names = {path.name for path in folder.glob("runs/*/checkpoint_*.npz")}
        if names - known:
            return names
        time.sleep(0.005)
    raise AssertionError((folder / "errors").read_text())


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
SLOW = [pytest.param(seed, [KILL] * 5 + [last], marks=pytest.mark.slow) for seed, last in enumerate([TERM, INT] * 2, 2)]


@pytest.mark.parametrize(("seed", "signals"), [(1, [KILL, TERM]), *SLOW])
def test_a_killed_or_stopped_run_always_goes_on(tmp_path, seed, signals):
    rng, known = random.Random(seed), set()
    flags = [*TINY, "--env-id", "Pendulum-v1", "--num-seeds", "2", "--eval-frequency", "10000000"]
    flags += ["--checkpoint-frequency", "2", "--total-timesteps", "1000000"]
    for number in signals:
        process = start(tmp_path, *flags)
        known = wait_for_new_checkpoint(tmp_path, known, process)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(number)
        assert process.wait(60) == (-number if number == KILL else 128 + number)
        folder, other = sorted((tmp_path / "runs").iterdir())
        last = checkpoints(folder)[-1]  # whatever the moment was, it can be read
        step, num_updates, num_added, *_ = json.loads(str(np.load(last)[FORMAT]))["progress"]
        assert last.name == f"checkpoint_{step:010d}.npz" and num_added == step and not checkpoints(other)
        assert num_updates == max(0, step - 40)  # two at each step of the two environments
        known = {path.name for path in checkpoints(folder)}
        flags = ["--resume", folder]
    message = (tmp_path / "errors").read_text().strip().splitlines()[-1]
    assert f"stopped at step {step}; go on with --resume {folder}" in message
    process = start(tmp_path, *flags, "--total-timesteps", step + 10)
    assert process.wait(300) == 0, (tmp_path / "errors").read_text()
    assert checkpoints(folder)[-1].name == f"checkpoint_{step + 10:010d}.npz"
    assert evaluations(folder)[-1][0] == evaluations(other)[-1][0] == step + 10
