"""A grid of runs, scripts x environments x settings x seeds, on Ray: on this machine, or on a cluster.

python benchmark/launch.py --out out --scripts som_continuous_action.py mfp_continuous_action.py benchmark/sb3.py \\
    --env-ids HalfCheetah-v4 Hopper-v4 Walker2d-v4 --seeds 1 2 3 \\
    --settings "som_continuous_action:prior=--reference prior" "som_continuous_action:w5=--score-scale 5" \\
    --script-flags "som_continuous_action: --preset laptop" "mfp_continuous_action: --preset laptop" \\
    --cpus-per-run 1 -- --total-timesteps 160000 --eval-frequency 40000

What follows the lone -- is for every script. Each run has a folder of its own, OUT/SCRIPT__ENV__SETTING__SEED, where
its output.log, its attempts.jsonl (command, commit, hardware) and its runs/NAME lie; on a cluster OUT is on a disk
that all machines share. The same command again skips what is finished, and resumes the rest from its checkpoints;
with a larger --total-timesteps it extends what is finished. Ctrl-C ends the runs with SIGTERM, so that they write one.
--seeds 1 with --num-seeds 3 among the flags of the JAX script makes one job of three seeds.
Then: python benchmark/collect.py --csv results.csv --runs OUT/*/runs/*
"""

import csv
import ctypes
import fcntl
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import tyro

# Where a job's run stands: its folder, step, number of steps, last return, and whether it is over
Standing = namedtuple("Standing", "run step total last_return over")


@dataclass
class LaunchArgs:
    out: Path
    """folder of the runs' folders"""
    scripts: tuple[Path, ...]
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


def exit_with_error(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@dataclass
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
        name = f"{Path(self.script).stem}__{self.env_id}__{self.setting}__{self.seed}"
        return name.replace("/", "_")

    @property
    def folder(self):
        return Path(self.out, self.name)

    @property
    def words(self):
        words = ["--env-id", self.env_id, "--seed", str(self.seed)]
        if self.setting != "default":
            words += ["--exp-name", self.setting]
        return words + self.flags

    @property
    def total_timesteps(self):
        """The value of that flag, None where the script's default counts."""
        for name, value in pairs(self.flags):
            if name == "--total-timesteps":
                return int(value)
        return None

    def standing(self):
        """Where the furthest of the folder's runs stands."""
        found = []
        for path in sorted(self.folder.glob("runs/*/config.json")):
            run = path.parent
            try:
                config = json.loads(path.read_text())
                total = self.total_timesteps or config["total_timesteps"]
                last_step = total - total % config["num_envs"]
            except (KeyError, ValueError):  # killed while it was written
                continue
            saved = [int(re.search(r"\d+", file.name)[0]) for file in checkpoints(run)]
            evaluated, last_return = last_evaluation(run / "evaluations.csv")
            step = max([evaluated, *saved])
            found.append(Standing(run, step, total, last_return, over=evaluated >= last_step))
        if not found:
            return Standing(None, 0, self.total_timesteps, None, False)
        # several seeds of one process have their checkpoints in one of the folders
        return max(found, key=lambda standing: (standing.over, standing.step, bool(checkpoints(standing.run))))

    def command(self, python):
        """What brings the run to its end from where it is."""
        run = self.standing().run
        if run is None or not checkpoints(run):
            return [python, self.script, *self.words]
        words = [python, self.script, "--resume", f"runs/{run.name}"]
        if self.total_timesteps is not None:
            words += ["--total-timesteps", str(self.total_timesteps)]
        return words


def pairs(flags):
    """(--flag-name, value) of a command line's words, as tyro reads them; the value is "" where none follows."""
    for word, after in itertools.zip_longest(flags, flags[1:], fillvalue="--"):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            if not equals and not after.startswith("--"):
                value = after
            yield name.replace("_", "-"), value


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


def split_words(flag, words):
    try:
        return shlex.split(words)
    except ValueError as error:
        exit_with_error(f"{flag} {words!r}: {error}")


def settings_of(args):
    """{script's stem: {setting: its flags}} of --settings."""
    stems = [script.stem for script in args.scripts]
    settings = {stem: {} for stem in stems}
    for text in args.settings:
        match = re.fullmatch(r"(?:([^:= ]+):)?([\w.+-]+)=(.*)", text, re.DOTALL)
        if not match:
            exit_with_error(f'--settings {text!r} is not "NAME=FLAGS" or "SCRIPT:NAME=FLAGS"')
        script, name, words = match.groups()
        if script is not None:
            only = Path(script).stem
            if only not in stems:
                exit_with_error(f"--settings {text!r}: {script} is not among --scripts")
        for stem in stems if script is None else [only]:
            if name in settings[stem]:
                exit_with_error(f"--settings {text!r}: the name is taken")
            settings[stem][name] = split_words("--settings", words)
    return {stem: of_script or {"default": []} for stem, of_script in settings.items()}


def script_flags_of(args):
    """{script's stem: its flags} of --script-flags."""
    flags = {script.stem: [] for script in args.scripts}
    for text in args.script_flags:
        script, _, words = text.partition(":")
        stem = Path(script.strip()).stem
        if ":" not in text or stem not in flags:
            exit_with_error(f'--script-flags {text!r} is not "SCRIPT: FLAGS" with one of --scripts')
        flags[stem] += split_words("--script-flags", words)
    return flags


def check_flags(job):
    names = [name for name, _ in pairs(job.flags)]
    for name in names:
        if name in ("--env-id", "--seed", "--exp-name", "--resume"):
            exit_with_error(f"{name} of {job.name} is not yours to give: the grid does")
        if names.count(name) > 1:
            exit_with_error(f"{name} is given twice to {job.name}")
    for name, value in pairs(job.flags):
        if name == "--total-timesteps":
            try:
                int(value)
            except ValueError as error:
                exit_with_error(f"--total-timesteps of {job.name}: {error}")


def grid(args, common):
    """The jobs, script by script, environment by environment, setting by setting, seed by seed."""
    if not (args.scripts and args.env_ids and args.seeds):
        exit_with_error("--scripts, --env-ids and --seeds need at least one value each")
    stems = [script.stem for script in args.scripts]
    for script in args.scripts:
        if not script.is_file():
            exit_with_error(f"--scripts {script} is missing")
        if stems.count(script.stem) > 1:
            exit_with_error(f"--scripts has two of the name {script.stem}")
    settings = settings_of(args)
    script_flags = script_flags_of(args)
    out = str(args.out.resolve())
    jobs = {}
    for script in args.scripts:
        commit = commit_of(script)
        cells = itertools.product(args.env_ids, settings[script.stem].items(), args.seeds)
        for env_id, (setting, flags), seed in cells:
            flags = common + script_flags[script.stem] + flags
            job = Job(str(script.resolve()), env_id, setting, seed, flags, out, commit)
            check_flags(job)
            if job.name in jobs:
                exit_with_error(f"{job.name} is twice in the grid")
            jobs[job.name] = job
    return list(jobs.values())


def commit_of(script):
    """The commit that a script is from, marked where the file has been changed since; empty outside git."""

    def git(*words):
        command = ["git", "-C", str(script.resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        if git("status", "--porcelain", "--", script.name):
            commit += " with changes"
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit


def check_same(job):
    """A folder goes on with the flags that it was started with; only the number of steps may grow."""
    path = job.folder / "job.json"
    flags = [list(pair) for pair in pairs(job.words) if pair[0] != "--total-timesteps"]
    if path.is_file() and json.loads(path.read_text())["flags"] != flags:
        exit_with_error(
            f"{job.folder} was started with other flags, see its job.json: take another --out or name of the setting"
        )
    return {"script": job.script, "flags": flags}


def hardware(cpus, gpus):
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    text = f"{cpu}, {cpus:g} CPU"
    if gpus and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        if names:
            text += f", {gpus:g} {names[0]}"
    return text


def lock_folder(job, grace_s):
    """The lock of the job's folder, which the script inherits: two launches never write into one run."""
    lock = (job.folder / "lock").open("a")
    for _ in range(int(grace_s) + 1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(1)
    raise RuntimeError(f"another process is running in {job.folder}")


def before_exec():
    """In the new process: signals arrive, and one comes when Ray's worker dies."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # Ray blocks them
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def attempt(job, python, cpus, gpus, grace_s):
    """On the machine that Ray chose: the script to its end, in its folder. Returns its exit code."""
    lock = lock_folder(job, grace_s)
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
    record = {
        "command": shlex.join(words),
        "commit": job.commit,
        "hardware": hardware(cpus, gpus),
        "host": socket.gethostname(),
        "time": time.time(),
    }
    with (job.folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
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
    """The end of the last attempt's output, without what a progress bar has drawn over."""
    try:
        text = (job.folder / "output.log").read_text(errors="replace")
    except OSError:
        return []
    _, _, of_attempt = text.rpartition("\n$ ")
    lines = of_attempt.rstrip().splitlines()[1:]  # without the command
    return [line.rpartition("\r")[2] for line in lines[-number:]]


def describe(job, width, standing):
    """A job's line in the table."""
    done = min(1.0, standing.step / standing.total) if standing.total else 0.0
    bar = "#" * round(10 * done)
    steps = f"{standing.step:,} / {standing.total:,}" if standing.total else f"{standing.step:,}"
    cells = [f"{job.name:<{width}}", f"{job.state:<8}", f"[{bar:.<10}]", f"{steps:>23}"]
    if standing.last_return is None:
        cells.append("return        -")
    else:
        cells.append(f"return {standing.last_return:8.1f}")
    if job.state == "running" and job.began:
        minutes, seconds = divmod(int(time.time() - job.began), 60)
        cells.append(f"{minutes:3}:{seconds:02}")
    if job.attempts > 1:
        cells.append(f"attempt {job.attempts}")
    return "  ".join(cells)


class Table:
    """On a terminal all runs, drawn again and again; elsewhere one line whenever a run changes."""

    def __init__(self, jobs):
        self.jobs = jobs
        self.width = max(len(job.name) for job in jobs)
        self.on_terminal = sys.stdout.isatty()
        self.lines_drawn = 0
        self.shown = {}  # what the last line of each job said
        self.seen = {}  # the state and standing of each job when its files were read

    def standing(self, job):
        """The files are read of what is running or has changed, not of hundreds that are finished."""
        state, standing = self.seen.get(job.name, (None, None))
        if job.state == "running" or job.state != state:
            standing = job.standing()
            self.seen[job.name] = (job.state, standing)
        return standing

    def draw(self):
        if self.on_terminal:
            self.draw_on_terminal()
            return
        for job in self.jobs:
            standing = self.standing(job)
            news = (job.state, job.attempts, standing.last_return)
            has_begun = job.state != "waiting" or job.attempts > 0
            if has_begun and self.shown.get(job.name) != news:
                print(describe(job, self.width, standing), flush=True)
            self.shown[job.name] = news

    def draw_on_terminal(self):
        columns, height = shutil.get_terminal_size()
        order = ["running", "failed", "stopped", "waiting", "finished"]
        jobs = sorted(self.jobs, key=lambda job: order.index(job.state))
        states = [job.state for job in jobs]
        lines = [describe(job, self.width, self.standing(job)) for job in jobs[: max(1, height - 2)]]
        lines.append(", ".join(f"{states.count(state)} {state}" for state in order if state in states))
        up = f"\x1b[{self.lines_drawn}F" if self.lines_drawn else ""
        print(f"{up}\x1b[J" + "\n".join(line[: columns - 1] for line in lines), flush=True)
        self.lines_drawn = len(lines)


def start_ray(args):
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # when this process is killed, Ray's workers die, and Ray would kill the runs; so they get their SIGTERM instead
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
        import ray
    except ImportError:
        exit_with_error("Ray is missing: pip install -r benchmark/requirements.txt")
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address is None:  # None would join a cluster that happens to run here
        options |= {"address": "local", "num_cpus": args.num_cpus, "include_dashboard": False}
    else:
        options["address"] = args.address
    # workers that inherit it ignored, as by `launch.py &` in a script, feel no cancellation
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        exit_with_error(f"Ray does not start: {' '.join(str(error).split())}")
    for name, asked in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        found = ray.cluster_resources().get(name, 0)
        if asked > found:
            exit_with_error(f"a run asks for {asked:g} {name}, Ray has {found:g}")
    return ray


def attempts_begun(job):
    path = job.folder / "attempts.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


class Launch:
    """The jobs on Ray: what has been submitted, and what became of it."""

    def __init__(self, ray, jobs, args):
        self.ray = ray
        self.args = args
        self.tasks = {}  # {Ray's reference: job}
        self.begun_before = {}  # {job's name: attempts before the present one}
        self.signals = []  # received so far
        resources = {"num_cpus": args.cpus_per_run, "num_gpus": args.gpus_per_run}
        self.remote_attempt = ray.remote(**resources, max_retries=0)(attempt)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        for job in jobs:
            if job.state != "finished":
                self.submit(job)

    def receive(self, number, frame):
        self.signals.append(number)

    def submit(self, job):
        args = self.args
        job.state = "waiting"
        job.attempts += 1
        job.began = None
        self.begun_before[job.name] = attempts_begun(job)
        resources = (args.cpus_per_run, args.gpus_per_run)
        task = self.remote_attempt.remote(job, sys.executable, *resources, args.grace_s)
        self.tasks[task] = job

    def judge(self, job, task):
        """What became of an attempt."""
        exceptions = self.ray.exceptions
        code = None
        try:
            code = self.ray.get(task)
            job.message = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        except exceptions.TaskCancelledError:
            job.state = "stopped"
            return
        except exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            job.message = str(cause).strip().splitlines()[-1]
        standing = job.standing()
        if code == 0 and standing.over:
            job.state = "finished"
        elif self.signals:
            job.state = "stopped"
        else:
            job.state = "failed"
            if code == 0:
                job.message += f", but its evaluations end before step {standing.total}"
            if code != 2 and job.attempts <= self.args.retries:
                self.submit(job)

    def run(self, table):
        """Until every task has ended; on a signal the runs are told to end, on a second one Ray ends them."""
        signals_told = 0
        while self.tasks:
            ended, _ = self.ray.wait(list(self.tasks), timeout=1.0)
            for task in ended:
                self.judge(self.tasks.pop(task), task)
            for job in self.tasks.values():
                if job.began is None and attempts_begun(job) > self.begun_before[job.name]:
                    job.state = "running"
                    job.began = time.time()
            table.draw()
            if len(self.signals) > signals_told:
                if signals_told == 0:
                    print("ending the runs; they write their checkpoints", file=sys.stderr)
                for task in self.tasks:
                    self.ray.cancel(task, force=signals_told > 0)
                signals_told = len(self.signals)
        self.ray.shutdown()


def report(failed):
    for job in failed:
        times = "1 attempt" if job.attempts == 1 else f"{job.attempts} attempts"
        place = f"{job.folder}/output.log ends:"
        print(f"failed: {job.name}, {job.message} ({times}); {place}", file=sys.stderr)
        for line in last_lines(job):
            print(f"    {line}", file=sys.stderr)


def launch(jobs, args):
    """Runs the jobs that are not finished; returns the exit code."""
    definitions = [check_same(job) for job in jobs]  # all of them before a folder is made
    for job, definition in zip(jobs, definitions, strict=True):
        job.folder.mkdir(parents=True, exist_ok=True)
        if not (job.folder / "job.json").is_file():
            (job.folder / "job.json").write_text(json.dumps(definition, indent=2))
        if job.standing().over:
            job.state = "finished"
    table = Table(jobs)
    if all(job.state == "finished" for job in jobs):
        table.on_terminal = False
        table.draw()
        return 0
    launched = Launch(start_ray(args), jobs, args)
    launched.run(table)
    failed = [job for job in jobs if job.state == "failed"]
    report(failed)
    if launched.signals:
        return 128 + launched.signals[0]
    return 1 if failed else 0


def print_commands(jobs, args):
    for job in jobs:
        check_same(job)
        if job.standing().over:
            print(f"# finished: {job.folder}")
            continue
        folder = shlex.quote(str(job.folder))
        threads = f"OMP_NUM_THREADS={max(1, int(args.cpus_per_run))}"
        print(f"mkdir -p {folder} && cd {folder} && {threads} {shlex.join(job.command(sys.executable))}")


def main(words):
    end = words.index("--") if "--" in words else len(words)
    args = tyro.cli(LaunchArgs, args=words[:end], description=__doc__)
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
    for rule, holds in rules.items():
        if not holds:
            exit_with_error(rule)
    jobs = grid(args, common=words[end + 1 :])
    if not args.dry_run:
        return launch(jobs, args)
    print_commands(jobs, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
