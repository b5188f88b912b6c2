"""A grid of runs, scripts x environments x settings x seeds, on Ray: on this machine, or on a cluster.

python benchmark/launch.py --out out --scripts som_continuous_action.py mfp_continuous_action.py benchmark/sac.py \\
    --env-ids HalfCheetah-v4 Hopper-v4 Walker2d-v4 --seeds 1 2 3 \\
    --settings "som_continuous_action:prior=--reference prior" "som_continuous_action:w5=--score-scale 5" \\
    --script-flags "som_continuous_action: --num-mc-samples 8 --no-autotune" "mfp_continuous_action: --best-of-n 4" \\
    --cpus-per-run 1 -- --total-timesteps 160000 --num-envs 4 --learning-starts 5000 --hidden-dim 64

What follows the lone -- is for every script. Each run has a folder of its own, OUT/SCRIPT__ENV__SETTING__SEED, where
its output.log, its attempts.jsonl (command, commit, hardware) and its runs/NAME lie; on a cluster OUT is on a disk
that all machines share. The same command again skips what is finished, and resumes the rest from its checkpoints;
with a larger --total-timesteps it extends what is finished. Ctrl-C ends the runs with SIGTERM, so that they write one.
--seeds 1 with --num-seeds 3 among the flags of the JAX script makes one job of three seeds.
Then: python benchmark/collect.py --csv results.csv --runs OUT/*/runs/*
"""

import csv
import ctypes
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import tyro


@dataclasses.dataclass
class LaunchArgs:
    out: pathlib.Path
    """folder of the runs' folders"""
    scripts: tuple[pathlib.Path, ...]
    """training scripts"""
    env_ids: tuple[str, ...]
    """Gymnasium ids"""
    seeds: tuple[int, ...] = (1,)
    """seeds of each run"""
    settings: tuple[str, ...] = ()
    """"NAME=FLAGS" of every script, or "SCRIPT:NAME=FLAGS" of one; a script without any runs as it stands"""
    script_flags: tuple[str, ...] = ()
    """"SCRIPT: FLAGS" in all settings of one script"""
    cpus_per_run: float = 1
    """CPUs of a run, also its OMP_NUM_THREADS"""
    gpus_per_run: float = 0
    """GPUs of a run: 0.25 puts four runs on each, 0 hides them"""
    retries: int = 2
    """attempts after the first, from the run's last checkpoint; exit code 2, wrong flags, is final"""
    grace_s: float = 120
    """seconds that a run has to write its checkpoint, once it is told to end"""
    address: str | None = None
    """a Ray cluster ("auto": the one of this machine) instead of this machine alone"""
    num_cpus: int | None = None
    """CPUs that Ray may use of this machine (default: all)"""
    dry_run: bool = False
    """print the commands and end"""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@dataclasses.dataclass
class Job:
    script: str  # absolute path
    env_id: str
    setting: str
    seed: int
    flags: list[str]
    out: str  # absolute path
    commit: str = ""
    state: str = "waiting"  # running, finished, failed or stopped
    attempts: int = 0  # of this launch
    began: float | None = None  # the present attempt
    message: str = ""

    @property
    def name(self):
        return "__".join([pathlib.Path(self.script).stem, self.env_id, self.setting, str(self.seed)]).replace("/", "_")

    @property
    def folder(self):
        return pathlib.Path(self.out, self.name)

    @property
    def words(self):
        words = ["--env-id", self.env_id, "--seed", str(self.seed)]
        return words + ["--exp-name", self.setting] * (self.setting != "default") + self.flags

    @property
    def total_timesteps(self):
        """The value of that flag, None where the script's default counts."""
        return next((int(value) for name, value in pairs(self.flags) if name == "--total-timesteps"), None)

    def run(self):
        """The furthest of the folder's runs: its path, step, number of steps, last return, and whether it is over."""
        runs = []
        for path in sorted(self.folder.glob("runs/*/config.json")):
            try:
                config = json.loads(path.read_text())
                total, num_envs = self.total_timesteps or config["total_timesteps"], config["num_envs"]
            except (KeyError, ValueError):  # killed while it was written
                continue
            saved = [int(re.search(r"\d+", file.name)[0]) for file in checkpoints(path.parent)]
            evaluated, last_return = last_evaluation(path.parent / "evaluations.csv")
            over = evaluated >= total - total % num_envs  # the last of range(num_envs, total + 1, num_envs)
            runs.append((path.parent, max([evaluated, *saved]), total, last_return, over, bool(saved)))
        # several seeds of one process have their checkpoints in one of the folders
        none = None, 0, self.total_timesteps, None, False, False
        return max(runs, key=lambda run: (run[4], run[1], run[5]), default=none)[:5]

    def command(self, python):
        """What brings the run to its end from where it is."""
        run, *_ = self.run()
        if run is None or not checkpoints(run):
            return [python, self.script, *self.words]
        extend = ["--total-timesteps", str(self.total_timesteps)] if self.total_timesteps else []
        return [python, self.script, "--resume", f"runs/{run.name}", *extend]


def pairs(flags):
    """(--flag-name, value) of a command line's words, as tyro reads them; the value is "" where none follows."""
    for word, after in itertools.zip_longest(flags, flags[1:], fillvalue="--"):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name.replace("_", "-"), value if equals else "" if after.startswith("--") else after


def checkpoints(run):
    return [path for path in run.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+\.(pt|npz|zip)", path.name)]


def last_evaluation(path):
    """Step and mean return of the last whole row, (0, None) without one."""
    try:
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["wall_time_s"]]
        return int(rows[-1]["global_step"]), float(rows[-1]["return_mean"])
    except (OSError, LookupError, TypeError, ValueError):
        return 0, None


def grid(args, common):
    """The jobs, script by script, environment by environment, setting by setting, seed by seed."""
    if not (args.scripts and args.env_ids and args.seeds):
        fail("--scripts, --env-ids and --seeds need at least one value each")
    stems = [script.stem for script in args.scripts]
    for script in args.scripts:
        if not script.is_file():
            fail(f"--scripts {script} is missing")
        if stems.count(script.stem) > 1:
            fail(f"--scripts has two of the name {script.stem}")
    settings, script_flags = {stem: {} for stem in stems}, {stem: [] for stem in stems}

    def split(flag, words):
        try:
            return shlex.split(words)
        except ValueError as error:
            fail(f"{flag} {words!r}: {error}")

    for text in args.settings:
        match = re.fullmatch(r"(?:([^:= ]+):)?([\w.+-]+)=(.*)", text, re.DOTALL)
        if not match:
            fail(f'--settings {text!r} is not "NAME=FLAGS" or "SCRIPT:NAME=FLAGS"')
        only = match[1] and pathlib.Path(match[1]).stem
        if only and only not in stems:
            fail(f"--settings {text!r}: {match[1]} is not among --scripts")
        for stem in [only] if only else stems:
            if match[2] in settings[stem]:
                fail(f"--settings {text!r}: the name is taken")
            settings[stem][match[2]] = split("--settings", match[3])
    for text in args.script_flags:
        stem, colon, words = text.partition(":")
        if not colon or pathlib.Path(stem.strip()).stem not in stems:
            fail(f'--script-flags {text!r} is not "SCRIPT: FLAGS" with one of --scripts')
        script_flags[pathlib.Path(stem.strip()).stem] += split("--script-flags", words)
    jobs = []
    for script in args.scripts:
        commit, of_script = commit_of(script), settings[script.stem] or {"default": []}
        for env_id, (setting, flags), seed in itertools.product(args.env_ids, of_script.items(), args.seeds):
            words = common + script_flags[script.stem] + flags
            job = Job(str(script.resolve()), env_id, setting, seed, words, str(args.out.resolve()), commit)
            names = [name for name, _ in pairs(words)]
            for name in names:
                if name in ("--env-id", "--seed", "--exp-name", "--resume"):
                    fail(f"{name} of {job.name} is not yours to give: the grid does")
                if names.count(name) > 1:
                    fail(f"{name} is given twice to {job.name}")
            try:
                _ = job.total_timesteps
            except ValueError as error:
                fail(f"--total-timesteps of {job.name}: {error}")
            jobs.append(job)
    for job, other in itertools.combinations(jobs, 2):
        if job.name == other.name:
            fail(f"{job.name} is twice in the grid")
    return jobs


def commit_of(script):
    """The commit that a script is from, marked where the file has been changed since; empty outside git."""
    git = ["git", "-C", str(script.resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", script.name], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def check_same(job):
    """A folder goes on with the flags that it was started with; only the number of steps may grow."""
    path = job.folder / "job.json"
    flags = [list(pair) for pair in pairs(job.words) if pair[0] != "--total-timesteps"]
    if path.is_file() and json.loads(path.read_text())["flags"] != flags:
        fail(f"{job.folder} was started with other flags, see its job.json: take another --out or name of the setting")
    return {"script": job.script, "flags": flags}


def hardware(cpus, gpus):
    try:
        cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    text = f"{cpu}, {cpus:g} CPU"
    if gpus and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        text += f", {gpus:g} {names[0]}" if names else ""
    return text


def attempt(job, python, cpus, gpus, grace_s):
    """On the machine that Ray chose: the script to its end, in its folder. Returns its exit code."""
    lock = (job.folder / "lock").open("a")  # the script inherits it: two launches never write into one run
    for wait in range(int(grace_s) + 1, -1, -1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not wait:
                raise RuntimeError(f"another process is running in {job.folder}") from None
            time.sleep(1)
    words = job.command(python)
    if "--resume" not in words:  # what has no checkpoint is begun anew, and out of the way of OUT/*/runs/*
        for run in job.folder.glob("runs/*"):
            (job.folder / "abandoned").mkdir(exist_ok=True)
            run.rename(job.folder / "abandoned" / run.name)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif gpus < 1:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    record = {"command": shlex.join(words), "commit": job.commit, "hardware": hardware(cpus, gpus)}
    with (job.folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(record | {"host": socket.gethostname(), "time": time.time()}) + "\n")

    def before_exec():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # Ray blocks them
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end when Ray's worker dies

    with (job.folder / "output.log").open("a") as log:
        log.write(f"$ {record['command']}\n")
        log.flush()
        process = subprocess.Popen(
            words,
            cwd=job.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
            preexec_fn=before_exec,
        )
    try:
        while process.poll() is None:
            time.sleep(0.2)
    except BaseException:  # Ray's cancellation comes as KeyboardInterrupt
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    return process.returncode


def last_lines(job, number=10):
    try:
        text = (job.folder / "output.log").read_text(errors="replace")
    except OSError:
        return []
    return [line.rpartition("\r")[2] for line in text.rpartition("\n$ ")[2].rstrip().splitlines()[1:]][-number:]


def describe(job, width, stands):
    _, step, total, last_return, _ = stands
    done = min(1.0, step / total) if total else 0.0
    bar = "#" * round(10 * done) + "." * (10 - round(10 * done))
    steps = f"{step:,} / {total:,}" if total else f"{step:,}"
    cells = [f"{job.name:<{width}}", f"{job.state:<8}", f"[{bar}]", f"{steps:>23}"]
    cells.append("return        -" if last_return is None else f"return {last_return:8.1f}")
    if job.state == "running" and job.began:
        minutes, seconds = divmod(int(time.time() - job.began), 60)
        cells.append(f"{minutes:3}:{seconds:02}")
    if job.attempts > 1:
        cells.append(f"attempt {job.attempts}")
    return "  ".join(cells)


class Table:
    """On a terminal all runs, drawn again and again; elsewhere one line whenever a run changes."""

    def __init__(self, jobs):
        self.jobs, self.live, self.drawn, self.shown = jobs, sys.stdout.isatty(), 0, {}
        self.width, self.seen = max(len(job.name) for job in jobs), {}

    def line(self, job):
        """The files are read of what is running or has changed, not of hundreds that are finished."""
        state, stands = self.seen.get(job.name, (None, None))
        if job.state == "running" or job.state != state:
            self.seen[job.name] = job.state, (stands := job.run())
        return describe(job, self.width, stands), stands

    def draw(self):
        if not self.live:
            for job in self.jobs:
                line, stands = self.line(job)
                now = job.state, job.attempts, stands[3]
                if self.shown.get(job.name) != now and (job.state != "waiting" or job.attempts):
                    print(line, flush=True)
                self.shown[job.name] = now
            return
        size = shutil.get_terminal_size()
        order = {"running": 0, "failed": 1, "stopped": 2, "waiting": 3, "finished": 4}
        rows = sorted(self.jobs, key=lambda job: order[job.state])[: max(1, size.lines - 2)]
        states = [job.state for job in self.jobs]
        counts = ", ".join(f"{states.count(state)} {state}" for state in order if state in states)
        lines = [line[: size.columns - 1] for line in [*(self.line(job)[0] for job in rows), counts]]
        print((f"\x1b[{self.drawn}F" if self.drawn else "") + "\x1b[J" + "\n".join(lines), flush=True)
        self.drawn = len(lines)


def launch(jobs, args):
    """Runs the jobs that are not finished; returns the exit code."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # when this process is killed, Ray's workers die, and Ray would kill the runs; so they get their SIGTERM instead
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
        import ray
    except ImportError:
        fail("Ray is missing: pip install -r benchmark/requirements.txt")
    for job, definition in [(job, check_same(job)) for job in jobs]:
        job.folder.mkdir(parents=True, exist_ok=True)
        if not (job.folder / "job.json").is_file():
            (job.folder / "job.json").write_text(json.dumps(definition, indent=2))
        if job.run()[4]:
            job.state = "finished"
    table = Table(jobs)
    if all(job.state == "finished" for job in jobs):
        table.live = False
        table.draw()
        return 0
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address is None:  # None would join a cluster that happens to run here
        options |= {"address": "local", "num_cpus": args.num_cpus, "include_dashboard": False}
    else:
        options["address"] = args.address
    signal.signal(signal.SIGINT, signal.default_int_handler)  # workers that inherit it ignored (&) feel no cancellation
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        fail(f"Ray does not start: {' '.join(str(error).split())}")
    for name, asked in ("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run):
        found = ray.cluster_resources().get(name, 0)
        if asked > found:
            fail(f"a run asks for {asked:g} {name}, Ray has {found:g}")
    remote = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=0)(attempt)
    tasks, lines_before, stop = {}, {}, []
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: stop.append(number))

    def attempts_begun(job):
        path = job.folder / "attempts.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def submit(job):
        job.state, job.attempts, job.began = "waiting", job.attempts + 1, None
        lines_before[job.name] = attempts_begun(job)
        tasks[remote.remote(job, sys.executable, args.cpus_per_run, args.gpus_per_run, args.grace_s)] = job

    def judge(job, task):
        """What became of an attempt."""
        try:
            code = ray.get(task)
        except ray.exceptions.TaskCancelledError:
            job.state = "stopped"
            return
        except ray.exceptions.RayError as error:
            code, job.message = None, str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        else:
            job.message = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        _, _, total, _, over = job.run()
        if code == 0 and over:
            job.state = "finished"
        elif stop:
            job.state = "stopped"
        else:
            job.state = "failed"
            job.message += f", but its evaluations end before step {total}" * (code == 0)
            if code != 2 and job.attempts <= args.retries:
                submit(job)

    for job in jobs:
        if job.state != "finished":
            submit(job)
    told = 0
    while tasks:
        for task in ray.wait(list(tasks), timeout=1.0)[0]:
            judge(tasks.pop(task), task)
        for job in tasks.values():
            if job.began is None and attempts_begun(job) > lines_before[job.name]:
                job.state, job.began = "running", time.time()
        table.draw()
        if len(stop) > told:
            if told == 0:
                print("ending the runs; they write their checkpoints", file=sys.stderr)
            for task in tasks:
                ray.cancel(task, force=told > 0)
            told = len(stop)
    ray.shutdown()
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        times = f"{job.attempts} attempt{'s' * (job.attempts > 1)}"
        print(f"failed: {job.name}, {job.message} ({times}); {job.folder}/output.log ends:", file=sys.stderr)
        for line in last_lines(job):
            print(f"    {line}", file=sys.stderr)
    return 128 + stop[0] if stop else 1 if failed else 0


def main(words):
    own, common = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = tyro.cli(LaunchArgs, args=own, description=__doc__)
    rules = {
        "--cpus-per-run must be > 0": args.cpus_per_run > 0,
        "--gpus-per-run must be >= 0": args.gpus_per_run >= 0,
        "--gpus-per-run above 1 must be whole": args.gpus_per_run <= 1 or args.gpus_per_run % 1 == 0,
        "--cpus-per-run above 1 must be whole": args.cpus_per_run <= 1 or args.cpus_per_run % 1 == 0,
        "--retries must be >= 0": args.retries >= 0,
        "--grace-s must be > 0": args.grace_s > 0,
        "--num-cpus must be >= 1": args.num_cpus is None or args.num_cpus >= 1,
        "--num-cpus is of this machine, not of a cluster": args.num_cpus is None or args.address is None,
        f"--out {args.out} is not a folder": args.out.is_dir() or not args.out.exists(),
    }
    for rule in [rule for rule, holds in rules.items() if not holds]:
        fail(rule)
    jobs = grid(args, common)
    if not args.dry_run:
        return launch(jobs, args)
    for job in jobs:
        check_same(job)
        if job.run()[4]:
            print(f"# finished: {job.folder}")
            continue
        folder, threads = shlex.quote(str(job.folder)), f"OMP_NUM_THREADS={max(1, int(args.cpus_per_run))}"
        print(f"mkdir -p {folder} && cd {folder} && {threads} {shlex.join(job.command(sys.executable))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
