"""benchmark/launch.py with a script that takes no time, on a local Ray: failures, kills, resuming, Ctrl-C."""

import csv
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parent / "launch.py"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and not os.environ.get("CI"), reason="Ray is not installed"
)

# As the training scripts behave towards launch.py. A checkpoint holds the process ids of all that worked on the run.
FAKE = """
import argparse, json, os, pathlib, signal, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--env-id", default="A-v0")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--exp-name", default="fake")
parser.add_argument("--total-timesteps", type=int, default=103)
parser.add_argument("--num-envs", type=int, default=4)
parser.add_argument("--pause", type=float, default=0)
parser.add_argument("--resume")
parser.add_argument("--short", action="store_true")
args = parser.parse_args()
step, workers, steps_wanted = 0, [], args.total_timesteps
if args.resume:
    run = pathlib.Path(args.resume)
    resume, given = args.resume, "--total-timesteps" in sys.argv
    vars(args).update(json.loads((run / "config.json").read_text()))
    args.total_timesteps = steps_wanted if given else args.total_timesteps
    saved = max(run.glob("checkpoint_*"), key=lambda path: int(path.stem.split("_")[1]))
    step, workers = json.loads(saved.read_text())
else:
    run = pathlib.Path(f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{os.getpid()}")
    run.mkdir(parents=True)
    (run / "evaluations.csv").write_text("global_step,num_updates,return_mean,return_std,wall_time_s\\n")
config = vars(args) | {"script": "fake.py", "versions": {"threads": os.environ["OMP_NUM_THREADS"]}}
(run / "config.json").write_text(json.dumps(config))
workers.append(os.getpid())

def checkpoint():
    (run / f"checkpoint_{step}.pt").write_text(json.dumps([step, workers]))

def stop(number, _):
    checkpoint()
    print("stopped by a signal", flush=True)
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("training", "resumed" if len(workers) > 1 else "begun", flush=True)  # from here on a signal is handled
total = args.total_timesteps - args.total_timesteps % args.num_envs
while step < total:
    time.sleep(args.pause)
    step += args.num_envs
    if args.env_id == "B-v0" and args.seed == 2 and step == 60:
        print("error: the action is not finite\\nat step 60", file=sys.stderr)
        sys.exit(1)
    if args.env_id == "A-v0" and args.seed == 2 and step == 60 and len(workers) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if step % 20 == 0 or step == total:
        checkpoint()
        if not (args.short and step == total):
            with (run / "evaluations.csv").open("a") as file:
                print(step, step // 4, 10 * step + len(workers), 0, 1.5, sep=",", file=file)
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "other.py").write_text(FAKE)
    return tmp_path


def words(*flags, common=()):
    grid = ["--out", "out", "--scripts", "fake.py", "--num-cpus", "2"]
    return [sys.executable, SCRIPT, *grid, *map(str, flags), "--", *common]


def launch(folder, *flags, common=()):
    return subprocess.run(words(*flags, common=common), cwd=folder, capture_output=True, text=True, timeout=300)


def evaluations(folder, name):
    (run,) = (folder / "out" / name / "runs").iterdir()
    with (run / "evaluations.csv").open() as file:
        return [(int(row["global_step"]), float(row["return_mean"])) for row in csv.DictReader(file)]


@needs_ray
def test_grid_with_a_failure_and_a_kill(fake):
    grid = "--env-ids A-v0 B-v0 --seeds 1 2 --retries 1".split()
    result = launch(fake, *grid)
    assert result.returncode == 1, result.stderr
    for name in "fake__A-v0__default__1", "fake__B-v0__default__1":
        assert evaluations(fake, name) == [(step, 10 * step + 1) for step in (20, 40, 60, 80, 100)]
    # killed at step 60, resumed from 40: a second process
    killed = [(20, 201), (40, 401), (60, 602), (80, 802), (100, 1002)]
    assert evaluations(fake, "fake__A-v0__default__2") == killed
    attempts = (fake / "out/fake__A-v0__default__2/attempts.jsonl").read_text().splitlines()
    assert ["--resume" in json.loads(line)["command"] for line in attempts] == [False, True]
    assert json.loads(attempts[0])["hardware"].endswith("1 CPU")
    # the failure: its last lines and the number of attempts
    assert "failed: fake__B-v0__default__2, exit code 1 (2 attempts)" in result.stderr
    assert "    error: the action is not finite\n    at step 60\n" in result.stderr
    assert "fake__A-v0" not in result.stderr and "Traceback" not in result.stderr
    last = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert len(last) == 4 and "100 / 103  return   1002.0  attempt 2" in last["fake__A-v0__default__2"]
    assert "finished  [##########]" in last["fake__B-v0__default__1"] and "failed" in last["fake__B-v0__default__2"]

    # again: what is finished is left alone, what is not goes on
    before = {path: path.stat().st_mtime_ns for path in fake.glob("out/*__1/**/*")}
    result = launch(fake, *grid[:-1], 0)
    assert result.returncode == 1 and "(1 attempt)" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in fake.glob("out/*__1/**/*")} == before
    # and with more steps it is extended, in the same folder
    result = launch(fake, "--env-ids", "B-v0", common=("--total-timesteps", "120"))
    assert result.returncode == 0, result.stderr
    assert evaluations(fake, "fake__B-v0__default__1")[-1] == (120, 1202)

    collected = fake / "collected.csv"
    collect = [sys.executable, SCRIPT.parent / "collect.py", "--csv", collected, "--runs", *fake.glob("out/*/runs/*")]
    subprocess.run(collect, check=True, capture_output=True)
    with collected.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["script"] for row in rows} == {"fake.py"} and all("CPU" in row["hardware"] for row in rows)
    assert len(rows) == 5 + 5 + 6 + 2


def leads_to(path, folder):
    try:
        return path.readlink() == folder
    except OSError:  # the process has ended
        return False


@needs_ray
@pytest.mark.skipif(not pathlib.Path("/proc/self/cwd").exists(), reason="finds the process in /proc")
def test_a_real_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path):
    flags = ["--scripts", SCRIPT.parents[1] / "som_continuous_action.py", "--env-ids", "Pendulum-v1", "--retries", "1"]
    common = "--total-timesteps 3000 --num-envs 1 --learning-starts 100 --hidden-dim 8 --num-layers 1 --batch-size 8 "
    common += "--num-mc-samples 2 --best-of-n 2 --eval-frequency 1000 --checkpoint-frequency 200 --device cpu"
    command = [sys.executable, SCRIPT, "--out", "out", "--num-cpus", "1", *flags, "--", *common.split()]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=errors)
        folder, deadline = tmp_path / "out/som_continuous_action__Pendulum-v1__default__1", time.time() + 200
        while len(list(folder.glob("runs/*/checkpoint_*.pt"))) < 2:
            assert process.poll() is None and time.time() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.05)
        (run,) = (folder / "runs").iterdir()
        (script,) = [path.parent.name for path in pathlib.Path("/proc").glob("[0-9]*/cwd") if leads_to(path, folder)]
        os.kill(int(script), signal.SIGKILL)
        assert process.wait(200) == 0, (tmp_path / "errors").read_text()
    commands = [json.loads(line)["command"] for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert ["--resume" in command for command in commands] == [False, True]
    assert f"--resume runs/{run.name} --total-timesteps 3000" in commands[1]
    with (run / "evaluations.csv").open() as file:
        assert [int(row["global_step"]) for row in csv.DictReader(file)] == [1000, 2000, 3000]


@needs_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_launcher_lets_the_runs_write_checkpoints(fake, number):
    flags = words("--env-ids", "A-v0", "--seeds", 1, 3, 4, common=("--pause", "0.5"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if number == signal.SIGTERM else signal.SIG_DFL)
    with (fake / "errors").open("w") as errors:  # SIGINT is inherited ignored, as by `launch.py &` in a script, or not
        process = subprocess.Popen(flags, cwd=fake, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        signal.signal(signal.SIGINT, before)
        deadline = time.time() + 120
        while len(list(fake.glob("out/*/output.log"))) < 2 or not all(
            "training" in path.read_text() for path in fake.glob("out/*/output.log")
        ):
            assert process.poll() is None and time.time() < deadline, (fake / "errors").read_text()
            time.sleep(0.2)
        if number == signal.SIGINT:  # as a terminal does: the launcher and all of its own group
            os.killpg(process.pid, number)
        if number == signal.SIGTERM:
            process.terminate()
        if number in (signal.SIGINT, signal.SIGTERM):
            assert process.wait(60) == 128 + number
            assert (fake / "errors").read_text() == "ending the runs; they write their checkpoints\n"
        else:
            process.kill()
            process.wait()
    # a run that was just being started gets its signal when its worker ends, a moment after the launcher
    logs, deadline = list(fake.glob("out/*/output.log")), time.time() + 60
    while not all(path.read_text().endswith("stopped by a signal\n") for path in logs):
        assert time.time() < deadline, [path.read_text() for path in logs]
        time.sleep(0.2)
    assert len(logs) == len(list(fake.glob("out/*/runs/*/checkpoint_*.pt"))) == 2
    result = launch(fake, "--env-ids", "A-v0", "--seeds", 1, 3, 4, "--dry-run", common=("--pause", "0.5"))
    assert result.stdout.count("--resume runs/") == 2 and result.stdout.count("--pause 0.5") == 1


@needs_ray
def test_wrong_flags_are_not_tried_again_and_a_lying_exit_code_is_seen(fake):
    result = launch(fake, "--env-ids", "A-v0", "--settings", "wrong=--nonsense", "short=--short")
    assert result.returncode == 1
    assert "failed: fake__A-v0__wrong__1, exit code 2 (1 attempt)" in result.stderr
    assert "unrecognized arguments: --nonsense" in result.stderr
    assert "fake__A-v0__short__1, exit code 0, but its evaluations end before step 103 (3 attempts)" in result.stderr


def test_dry_run(fake):
    flags = ["--scripts", "fake.py", "other.py", "--env-ids", "A-v0", "a/B-v0", "--seeds", 1, 2, "--cpus-per-run", 2]
    flags += ["--settings", "fake:plain=", "fake.py:w=--w 'a b'", "--script-flags", "other: --num-envs 8", "--dry-run"]
    result = launch(fake, *flags, common=("--total-timesteps", "10"))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * 2 * (2 + 1)
    folder = fake / "out/fake__a_B-v0__w__2"
    assert lines[7] == (
        f"mkdir -p {folder} && cd {folder} && OMP_NUM_THREADS=2 {sys.executable} {fake}/fake.py "
        "--env-id a/B-v0 --seed 2 --exp-name w --total-timesteps 10 --w 'a b'"
    )
    assert lines[8].endswith("other.py --env-id A-v0 --seed 1 --total-timesteps 10 --num-envs 8")
    assert not (fake / "out").exists()


def make_run(folder, step, checkpoint=None, seed=1, name="x"):
    run = folder / f"out/fake__A-v0__default__{seed}/runs/{name}"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"total_timesteps": 103, "num_envs": 4}')
    rows = ["global_step,num_updates,return_mean,return_std,wall_time_s", f"{step},1,2.5,0,1", "120,1,2"]
    (run / "evaluations.csv").write_text("\n".join(rows))
    if checkpoint:
        (run / checkpoint).touch()


def test_where_a_run_stands(fake):
    make_run(fake, step=96, checkpoint="checkpoint_40.npz", seed=1)
    make_run(fake, step=100, seed=2)
    make_run(fake, step=96, checkpoint="checkpoint_96.pt.tmp", seed=3)
    make_run(fake, step=20, checkpoint="checkpoint_20.pt", seed=4, name="older")
    make_run(fake, step=60, checkpoint="checkpoint_60.pt", seed=4, name="newer")
    make_run(fake, step=60, seed=4, name="a_second_seed_beside_newer")
    (fake / "out/fake__A-v0__default__4/runs/half").mkdir()
    (fake / "out/fake__A-v0__default__4/runs/half/config.json").write_text('{"total_')
    lines = launch(fake, "--env-ids", "A-v0", "--seeds", 1, 2, 3, 4, "--dry-run").stdout.splitlines()
    assert lines[0].endswith("fake.py --resume runs/x")
    assert lines[1] == f"# finished: {fake}/out/fake__A-v0__default__2"
    assert lines[2].endswith("--env-id A-v0 --seed 3")
    assert lines[3].endswith("--resume runs/newer")
    longer = ("--total-timesteps", "104")
    lines = launch(fake, "--env-ids", "A-v0", "--seeds", 1, 2, "--dry-run", common=longer).stdout.splitlines()
    assert lines[0].endswith("--resume runs/x --total-timesteps 104")
    assert lines[1].endswith("--env-id A-v0 --seed 2 --total-timesteps 104")  # no checkpoint to extend


@pytest.mark.parametrize(
    ("flags", "common", "message"),
    [
        ("--scripts nowhere.py", "", "--scripts nowhere.py is missing"),
        ("--scripts fake.py fake.py", "", "--scripts has two of the name fake"),
        ("--settings w", "", "'w' is not \"NAME=FLAGS\""),
        ("--settings w=1 w=2", "", "the name is taken"),
        ("--settings x:w=1", "", "x is not among --scripts"),
        ("--settings w='", "", "No closing quotation"),
        ("--script-flags other:1", "", "with one of --scripts"),
        ("", "--seed 1", "--seed of fake__A-v0__default__1 is not yours to give"),
        ("", "--exp_name=x", "--exp-name of fake__A-v0__default__1 is not yours to give"),
        ("--settings w=--num-envs=1", "--num-envs 2", "--num-envs is given twice to fake__A-v0__w__1"),
        ("", "--total-timesteps x", "invalid literal for int"),
        ("--seeds 1 1", "", "fake__A-v0__default__1 is twice in the grid"),
        ("--seeds", "", "--seeds"),
        ("--cpus-per-run 0", "", "--cpus-per-run must be > 0"),
        ("--cpus-per-run 1.5", "", "--cpus-per-run above 1 must be whole"),
        ("--gpus-per-run -1", "", "--gpus-per-run must be >= 0"),
        ("--retries -1", "", "--retries must be >= 0"),
        ("--out fake.py", "", "--out fake.py is not a folder"),
        ("--address auto", "", "--num-cpus is of this machine"),
        ("", "--num-envs 8", "was started with other flags"),
    ],
)
def test_bad_input_is_refused(fake, flags, common, message):
    if "started with" in message:
        (fake / "out/fake__A-v0__default__1").mkdir(parents=True)
        (fake / "out/fake__A-v0__default__1/job.json").write_text('{"flags": [["--num-envs", "4"]]}')
    result = launch(fake, "--env-ids", "A-v0", "--dry-run", *flags.split(), common=common.split())
    assert result.returncode == 2
    if flags != "--seeds":  # tyro's own message
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@needs_ray
def test_more_than_ray_has_is_refused(fake):
    result = launch(fake, "--env-ids", "A-v0", "--cpus-per-run", 3)
    assert result.returncode == 2 and result.stderr == "error: a run asks for 3 CPU, Ray has 2\n"
