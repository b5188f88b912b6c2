"""Runs of the JAX script that survive: resumed, killed, stopped, damaged and poisoned."""

import csv
import functools
import json
import math
import pathlib
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
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from test_jax import SCRIPT, TINY, SeededEnv, pair, run_loop, scalars, stored  # noqa: F401

import som_continuous_action_jax as somx

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


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
            if self.what == "error":
                raise ZeroDivisionError
            obs, reward = (obs, np.nan) if self.what == "reward" else (obs * np.nan, reward)
        return obs, reward, *rest


class ClockEnv(SeededEnv):
    """All of its episodes begin alike. In the step stop_at, counted over all instances, a signal arrives."""

    stop_at = math.inf

    def step(self, action):
        ClockEnv.stop_at -= 1
        if ClockEnv.stop_at == 0:
            signal.raise_signal(TERM)
        return super().step(action)

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed, options=options)
        self.number = 0
        return np.zeros(3), info


gym.register("ClockJax-v0", ClockEnv, disable_env_checker=True, max_episode_steps=100)
for what in "reward", "observation", "last observation", "error":
    name = f"PoisonedSeed{what.title().replace(' ', '')}-v0"
    gym.register(name, PoisonedEnv, kwargs={"what": what}, disable_env_checker=True, max_episode_steps=100)
gym.register("SeededToo-v0", SeededEnv, disable_env_checker=True, max_episode_steps=100)


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
    """Of all files but the lock, which is empty."""
    return {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file() and path.name != "lock"}


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


def no_steps(monkeypatch):
    """A resumed run is loaded, and that is all."""
    monkeypatch.setattr("tqdm.tqdm", lambda steps, **_: iter(()))


def test_n_steps_a_signal_a_resume_and_m_steps_are_bit_equal_to_n_plus_m(tmp_path, capsys):
    # episodes of two environments last four steps and begin alike: the resumed run has nothing that is new
    flags = [*TINY, "--env-id", "ClockJax-v0", "--num-seeds", "2", "--eval-frequency", "1000"]
    whole = run_loop(tmp_path, *flags)
    ClockEnv.stop_at = 4 * 52 - 1  # in step 104, two environments of two seeds
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, *flags)
    folder = max((tmp_path / "runs").glob("*__1__*"), key=lambda path: path.name)
    assert stop.value.code == 128 + TERM
    assert f"stopped at step 104; go on with --resume runs/{folder.name}" in capsys.readouterr().err
    assert checkpoints(folder)[-1].name == "checkpoint_0000000104.npz"
    resumed = run_loop(tmp_path, "--resume", folder)
    assert resumed.steps[0] == 106 and resumed.num_updates == whole.num_updates == 160
    assert_equal((resumed.state, resumed.act_keys), (whole.state, whole.act_keys))
    np.testing.assert_array_equal(stored(resumed), stored(whole))


def test_updates_after_a_resume_are_bit_equal(pair, finished, tmp_path, monkeypatch):  # noqa: F811
    no_steps(monkeypatch)
    again = run_loop(tmp_path, "--resume", finished, "--total-timesteps", "260")
    assert again.state is not pair.state and again.num_added == 200 > pair.ring.rows.shape[1]  # the ring is full
    assert again.num_updates == pair.num_updates == 160
    np.testing.assert_array_equal(stored(again), stored(pair))
    assert_equal((again.state, again.act_keys), (pair.state, pair.act_keys))
    after = []
    for run in pair, again:  # the rows of the last step are in its inbox
        state, ring, keys = jax.tree.map(jnp.copy, (run.state, run.ring, run.act_keys))
        actions = []
        for due in True, False, True:
            ring, keys, a = run.add_and_act_all(ring, keys, run.acting_part(state), run.inbox_by_seed)
            state, _ = run.updates[due](state, ring, run.lr_factor)
            actions.append(a)
        after.append((state, keys, actions))
    # the observations in the inboxes are not the same: a resumed run begins new episodes
    assert_equal(after[0][1], after[1][1])
    assert not np.array_equal(after[0][0].critic[0][0], pair.state.critic[0][0])
    assert not set(again.env_seeds.tolist()) & set(pair.env_seeds.tolist())  # a resumed run sees other episodes
    assert again.eval_seeds == pair.eval_seeds and len(set(pair.env_seeds.tolist())) == 4


def test_both_kept_checkpoints_have_their_rows_when_the_ring_has_turned(tmp_path, monkeypatch):
    """30 rows are sampled from, and a checkpoint comes every 30 steps; the run ends just before its next one."""
    flags = "--buffer-size", "30", "--checkpoint-frequency", "30", "--eval-frequency", "1000"
    flags = [*TINY, "--env-id", "Seeded-v0", "--num-seeds", "2", *flags]
    whole = run_loop(tmp_path, *flags, "--total-timesteps", "178")
    folder = tmp_path / whole.run_folder
    assert len(whole.rb.on_host) == 2 * 94 < 2 * 178
    checkpoints(folder)[-1].unlink()  # of the end
    with np.load(checkpoints(folder)[0]) as last:
        earlier = {name: last[name] for name in last}
    entries = json.loads(str(earlier["entries"]))
    assert entries["global_step"] == 150
    for step in 150, 120:  # what a checkpoint at 120 counts is still there, too
        with monkeypatch.context() as patch:
            no_steps(patch)
            entries |= {"global_step": step, "num_added": step}
            np.savez(folder / "checkpoint_0000000150.npz", **earlier | {"entries": json.dumps(entries)})
            resumed = run_loop(tmp_path, "--resume", folder)
        then = run_loop(tmp_path, *flags, "--total-timesteps", step)
        np.testing.assert_array_equal(stored(resumed), stored(then))


def test_a_resumed_run_continues_its_curves(finished, tmp_path):
    folders = finished, second(finished)
    tables, first = [evaluations(folder) for folder in folders], [scalars(folder) for folder in folders]
    before, last = checkpoints(finished)
    last.unlink()  # as if killed after the last evaluation, before its checkpoint was there
    run = run_loop(tmp_path, "--resume", before, "--total-timesteps", "260")
    assert run.steps[0] == 194 and [folder.samefile(x) for folder, x in zip(folders, run.run_folders, strict=True)]
    assert [path.stem for path in checkpoints(finished)] == ["checkpoint_0000000256", "checkpoint_0000000260"]
    assert run.num_updates == 220 and run.num_added == 260
    stored(run)  # the rows on the device are those on the host
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
    lines = printed[0].splitlines()
    assert len(lines) == 2
    for k, (line, folder) in enumerate(zip(lines, (finished, second(finished)), strict=True)):
        head, episodes = line.split(", by episode ")
        returns = json.loads(episodes)
        mean, std = float(evaluations(folder)[-1][1]), np.std(returns)
        assert len(returns) == 3 and np.mean(returns) == pytest.approx(mean, abs=0.1)  # of the same seeds and weights
        assert head.endswith(f", seed {k + 1}")
        _, printed_mean, _, printed_std = head.removesuffix(f", seed {k + 1}").split()
        assert float(printed_mean) == pytest.approx(mean, abs=0.051)  # its rounding
        assert float(printed_std) == pytest.approx(std, abs=0.11)  # that of the episodes too
    assert before == contents(finished)
    with pytest.raises(SystemExit):
        run_loop(tmp_path, "--evaluate", second(finished), "--num-episodes", "2", "--best-of-n", "1")
    returns = json.loads(capsys.readouterr().out.splitlines()[0].split(", by episode ")[1])
    assert len(returns) == 2
    flags = "--evaluate", finished, "--deterministic", "--best-of-n"
    for n in "1", "3":  # the action of noise 0 is the only candidate
        with pytest.raises(SystemExit):
            run_loop(tmp_path, *flags, n)
        printed.append(capsys.readouterr().out)
    assert printed[2] == printed[3] != printed[0]


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
    def change(arrays):
        entries = json.loads(str(arrays["entries"]))
        return arrays | {"entries": json.dumps(entries | {"format": name})}

    return rewrite(change)


def first_edition(arrays):
    """It had the format as the name of the JSON text."""
    return {
        "som_continuous_action_jax.py, checkpoints of version 3" if x == "entries" else x: arrays[x] for x in arrays
    }


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
    "older": rewrite(first_edition),
    "newer": other_format("som_continuous_action_jax.py, checkpoints of version 5"),
    "other script": other_format("som_continuous_action.py, checkpoints of version 3"),
}


def test_a_bad_checkpoint_is_refused_and_the_good_one_before_it_named(finished, tmp_path, capsys):
    before, last = checkpoints(finished)
    whole = last.read_bytes()
    for name, damage in DAMAGES.items():
        last.write_bytes(whole)
        damage(last)
        for flag in "--resume", "--evaluate":
            message = refused(capsys, tmp_path, flag, finished)
            assert f"/{last.name} cannot be used" in message and message.endswith(f"good one is {before}"), name
            if name in ("foreign", "older", "newer", "other script"):
                assert "it is not of som_continuous_action_jax.py, checkpoints of version 4" in message
        with pytest.raises(ValueError, match="cannot be used"):
            somx.load_policy(finished)
    assert somx.load_policy(before)(np.zeros(3)).shape == (1,)
    truncate(before)
    assert refused(capsys, tmp_path, "--resume", finished).endswith("there is no good one")
    assert "cannot be used" in refused(capsys, tmp_path, "--resume", "runs/nowhere")
    assert "cannot be used" in refused(capsys, tmp_path, "--resume", second(finished))
    for flags in (["--resume="], ["--evaluate="], ["--resume", finished, "--evaluate", finished]):
        assert "give the folder of a run" in refused(capsys, tmp_path, *flags)


def test_a_renamed_run_goes_on_and_a_missing_part_is_told(finished, tmp_path, capsys):
    obs = np.ones((4, 3))
    expected = [somx.load_policy(folder)(obs) for folder in (finished, second(finished))]
    assert not np.array_equal(*expected)
    renamed = finished.rename(finished.with_name("a name of my own"))
    np.testing.assert_array_equal(somx.load_policy(renamed)(obs), expected[0])
    other = second(finished)
    hidden = other.rename(tmp_path / "elsewhere")
    before = contents(renamed)
    message = refused(capsys, tmp_path, "--resume", renamed, "--total-timesteps", "260")
    assert f"{other} is missing" in message and before == contents(renamed)
    hidden.rename(other)
    run = run_loop(renamed, "--resume", ".", "--total-timesteps", "208")
    assert [*run.run_folders] == [renamed, other]
    assert [path.name for path in checkpoints(renamed)][-1] == "checkpoint_0000000208.npz"
    for folder in renamed, other:
        assert [row[0] for row in evaluations(folder)] == [100, 200, 208]
    # the second folder knows the new name, and leads to the same run
    policy = somx.make_policy(somx.part_of_seed(1, somx.acting_part(run.state)), run.args, run.box, run.eval_seeds[1])
    np.testing.assert_array_equal(somx.load_policy(other)(obs), policy(obs))
    assert run_loop(tmp_path, "--resume", other, "--total-timesteps", "210").run_folder == renamed
    assert not (tmp_path / "runs" / finished.name).exists()


def test_two_processes_never_write_one_run(finished, tmp_path, capsys):
    lock, before = somx.lock_run(finished), contents(finished)
    for folder in finished, second(finished):
        message = refused(capsys, tmp_path, "--resume", folder, "--total-timesteps", "260")
        assert "is being written by another process" in message
    assert before == contents(finished)
    lock.close()


def test_an_evaluation_that_was_interrupted_is_made_when_the_run_goes_on(finished, tmp_path):
    """The first seed's was written, the second's was not."""
    file = second(finished) / "evaluations.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    first = contents(finished)[finished / "evaluations.csv"]
    run = run_loop(tmp_path, "--resume", finished)
    assert not run.steps and first == contents(finished)[finished / "evaluations.csv"]
    again = file.read_text().splitlines()
    assert again[:-1] == lines[:-1] and again[-1].split(",")[:4] == lines[-1].split(",")[:4]


def test_a_signal_in_that_evaluation_ends_the_run_before_a_step(finished, tmp_path, monkeypatch, capsys):
    file = second(finished) / "evaluations.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], ""]))
    before = {path: path.read_bytes() for path in (file, *checkpoints(finished))}
    step = SeededEnv.step
    arrived = []

    def step_with_a_signal(env, action):
        if not arrived:
            arrived.append(TERM)
            signal.raise_signal(TERM)
        return step(env, action)

    with monkeypatch.context() as patch:
        patch.setattr(SeededEnv, "step", step_with_a_signal)
        with pytest.raises(SystemExit) as stop:
            run_loop(tmp_path, "--resume", finished, "--total-timesteps", "260")
    assert stop.value.code == 128 + TERM and f"--resume {finished}" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (file, *checkpoints(finished))}
    run_loop(tmp_path, "--resume", finished, "--total-timesteps", "202")
    assert file.read_text().splitlines()[len(lines) - 1].startswith("200,")


def test_lambda_is_one_where_autotune_is_turned_off(finished, tmp_path, monkeypatch):
    no_steps(monkeypatch)
    run = run_loop(tmp_path, "--resume", finished, "--total-timesteps", "260", "--no-autotune")
    assert run.state.log_lambda.tolist() == [0, 0] and somx.Args().autotune


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, *TINY, "--env-id", "Seeded-v0", "--num-seeds", "2")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "--no-checkpoint-buffer needs none" in message
    assert not list(tmp_path.rglob("replay_buffer.bin"))


def test_the_curves_survive_an_error(tmp_path, monkeypatch):
    """The environment's own error is told as it is. What waits to be written is written as the process ends."""
    closed, close = [], EventFileWriter.close

    @functools.wraps(close)
    def close_and_tell(writer):
        closed.append(pathlib.Path(writer.get_logdir()).name)
        close(writer)

    monkeypatch.setattr(EventFileWriter, "close", close_and_tell)
    PoisonedEnv.made = 0
    with pytest.raises(ZeroDivisionError):
        run_loop(tmp_path, *TINY, "--env-id", "PoisonedSeedError-v0", "--num-seeds", "2")
    folders = sorted((tmp_path / "runs").iterdir())
    assert sorted(closed) == [folder.name for folder in folders]
    for folder in folders:  # the 13th step of both environments: three episodes each
        assert [step for step, _ in scalars(folder)["charts/episodic_return"]] == [8, 8, 16, 16, 24, 24]


def test_a_finished_run_says_so(finished, tmp_path, capsys):
    files = contents(finished)
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, "--resume", finished)
    assert not stop.value.code and "is finished at step 200; --total-timesteps MORE goes on" in capsys.readouterr().out
    assert files == contents(finished)


def test_without_its_buffer_a_run_collects_before_it_learns_on(finished, tmp_path):
    (finished / "replay_buffer.bin").unlink()
    flags = "--total-timesteps", "260", "--no-checkpoint-buffer", "--learning-starts", "40"
    run = run_loop(tmp_path, "--resume", finished, *flags)
    assert run.num_added == 60 and not (finished / "replay_buffer.bin").exists()
    # two environments: 20 of the 60 rows came after learning_starts; the policy, not chance, acted for all of them
    assert run.num_updates == 160 + 10 * run.args.updates_per_step
    assert stored(run).shape == (2, 60, 9)
    (finished / "replay_buffer.bin").write_bytes(b"")  # the next one has no rows to read either
    assert run_loop(tmp_path, "--resume", finished, "--total-timesteps", "280", "--checkpoint-buffer").num_added == 20


def test_an_evaluation_needs_nothing_that_only_training_needs(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (path, *_) = sorted(finished.glob("checkpoint_*"), reverse=True)

    def track(arrays):
        entries = json.loads(str(arrays["entries"]))
        entries["args"] |= {"track": True, "capture_video": True}
        return arrays | {"entries": json.dumps(entries)}

    rewrite(track)(path)
    assert "--track needs wandb" in refused(capsys, tmp_path, "--resume", finished, "--total-timesteps", "300")
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, "--evaluate", finished)
    assert not stop.value.code and capsys.readouterr().out.startswith("return ")
    assert not (finished / "videos").exists()


@pytest.mark.parametrize("total", ["200", "202"])  # a finished run, and one that goes on
def test_the_networks_are_saved_at_the_end(finished, tmp_path, total):
    run = run_loop(tmp_path, "--resume", finished, "--total-timesteps", total, "--save-model")
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
        "--num-envs": "3", "--buffer-size": "100", "--num-frequencies": "3", "--checkpoint-frequency": "65",
        "--initial-lambda": "2", "--policy-lr": "1", "--q-lr": "1", "--alpha-lr": "1",
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
    assert stop.value.code == 1 and f"the {what} is not finite at step {step}, seed 2" in message
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
    assert "error: the weight ." in message and "is not finite at step 202, seed 2" in message
    assert len(checkpoints(finished)) == 2 and checkpoints(finished)[-1].name == "checkpoint_0000000200.npz"


def test_a_folder_or_disk_that_takes_no_more_ends_the_run(finished, tmp_path):
    """In a process of its own, as its files may have 40 kB only: a checkpoint is larger, the buffer is not."""
    before = contents(finished)
    assert checkpoints(finished)[-1].stat().st_size > 40_000 > (finished / "replay_buffer.bin").stat().st_size
    code = f"""
import resource, sys
sys.path[:0] = {[str(SCRIPT.parent / "tests"), str(SCRIPT.parent)]}
import test_jax
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
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
        entries = json.loads(str(np.load(last)["entries"]))
        step, num_updates, num_added = (entries[name] for name in ("global_step", "num_updates", "num_added"))
        assert last.name == f"checkpoint_{step:010d}.npz" and num_added == step and not checkpoints(other)
        assert num_updates == max(0, step - 40)  # two at each step of the two environments
        assert entries["folder_names"] == [folder.name, other.name]
        known = {path.name for path in checkpoints(folder)}
        flags = ["--resume", folder]
    message = (tmp_path / "errors").read_text().strip().splitlines()[-1]
    assert f"stopped at step {step}; go on with --resume {folder}" in message
    process = start(tmp_path, *flags, "--total-timesteps", step + 10)
    assert process.wait(300) == 0, (tmp_path / "errors").read_text()
    assert checkpoints(folder)[-1].name == f"checkpoint_{step + 10:010d}.npz"
    assert evaluations(folder)[-1][0] == evaluations(other)[-1][0] == step + 10


def test_after_a_kill_with_a_full_ring_the_rows_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    """60 rows are sampled from, and the ring of 68 has turned; an uninterrupted run has the same rows."""
    flags = [*TINY, "--env-id", "Pendulum-v1", "--num-seeds", "2", "--eval-frequency", "10000000"]
    flags += ["--checkpoint-frequency", "2"]
    process = start(tmp_path, *flags, "--total-timesteps", "1000000")
    known = set()
    while not known or max(known) < "checkpoint_0000000300":
        known = wait_for_new_checkpoint(tmp_path, known, process)
    process.send_signal(KILL)
    assert process.wait(60) == -KILL
    folder, _ = sorted((tmp_path / "runs").iterdir())
    step = json.loads(str(np.load(checkpoints(folder)[-1])["entries"]))["global_step"]
    with monkeypatch.context() as patch:
        no_steps(patch)
        resumed = run_loop(tmp_path, "--resume", folder)
    assert len(resumed.rb.on_host) == 2 * 68 < 2 * step
    whole = run_loop(tmp_path / "runs", *flags, "--total-timesteps", step)
    np.testing.assert_array_equal(stored(resumed), stored(whole))
    assert_equal(resumed.state, whole.state)
