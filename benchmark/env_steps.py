"""Environment steps per second of whole runs of the scripts, learning included; several seeds of JAX beside one.

    python benchmark/env_steps.py --csv benchmark/results/env_steps.csv

Each script is run twice, for a short and a longer time: in the difference of their wall times, starting, compiling and
the evaluation at the end cancel out. What counts are the ratios: rounds take the scripts in turn.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import collect
import torch
import tyro

# flags, and the environment steps by which the longer run is longer
SIZES = {
    "paper": ("--num-envs 5 --learning-starts 500".split(), 250),
    "small": ("--preset laptop --learning-starts 500".split(), 6_000),
}
SHORT = 600  # steps of the short run
GPU_STEPS = 20_000  # by which the longer run is longer on a GPU, where fewer would be lost in the noise of starting

Run = namedtuple("Run", "script flags num_seeds")


@dataclass
class EnvStepsArgs:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id, with episodes of one length: evaluations must take as long in both runs"""
    sizes: tuple[Literal["paper", "small"], ...] = ("paper", "small")
    """Table 3's sizes, and those of --preset laptop"""
    num_seeds: int = 5
    """agents side by side in the JAX script's second run (S)"""
    rounds: int = 1
    """rounds; the median is reported"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where to run; auto: on a GPU if there is one"""
    matmul_precision: Literal["high", "highest"] = "high"
    """of products on a GPU, in both frameworks: TF32 or float32"""
    csv: Path | None = None
    """also write the table to this file"""


def seconds_of(script, flags, total):
    """Wall time of a run, as the script says it with its last evaluation; of several seeds the last one's."""
    command = [sys.executable, str(collect.ROOT / script), *flags]
    command += ["--total-timesteps", str(total), "--eval-frequency", str(total)]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"error: {' '.join(command)} ended with {result.returncode}: {result.stderr[-500:]}")
        tables = [path.read_text().splitlines() for path in Path(folder).glob("runs/*/evaluations.csv")]
    return max(float(rows[-1].rpartition(",")[2]) for rows in tables)


def measure(sizes, runs, args, on_gpu):
    """The rows of one size."""
    flags_of_size, longer = SIZES[sizes]
    flags_of_size = ["--env-id", args.env_id, *flags_of_size]
    longer = GPU_STEPS if on_gpu else longer
    for run in runs.values():  # what has been compiled is found again by the runs that count
        seconds_of(run.script, flags_of_size + run.flags, SHORT)
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            flags = flags_of_size + run.flags
            short = seconds_of(run.script, flags, SHORT)
            seconds[name].append(seconds_of(run.script, flags, SHORT + longer) - short)
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    hardware = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {threads} threads"
    rows = []
    for name, run in runs.items():
        median = statistics.median(seconds[name])
        ratios = [one / own for one, own in zip(seconds["JAX"], seconds[name], strict=True)]
        row = {
            "sizes": sizes,
            "env_id": args.env_id,
            "hardware": hardware,
            "run": name,
            "seconds": round(median, 2),
            "env steps/s of each agent": round(longer / median, 1),
            "env steps/s in all": round(run.num_seeds * longer / median, 1),
            "in all / JAX": round(run.num_seeds * statistics.median(ratios), 2),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main(args):
    if args.device == "gpu" and not torch.cuda.is_available():
        collect.exit_with_error("--device gpu: PyTorch finds no GPU")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    common = ["--device", "gpu" if on_gpu else "cpu", "--matmul-precision", args.matmul_precision]
    seeds = ["--num-seeds", str(args.num_seeds)]
    runs = {
        "PyTorch, eager": Run("som_continuous_action.py", [*common, "--no-compile"], 1),
        "PyTorch, compiled": Run("som_continuous_action.py", [*common, "--compile"], 1),
        "JAX": Run("som_continuous_action_jax.py", common, 1),
        f"JAX, {args.num_seeds} seeds": Run("som_continuous_action_jax.py", common + seeds, args.num_seeds),
    }
    rows = []
    for sizes in args.sizes:
        rows += measure(sizes, runs, args, on_gpu)
    if args.csv is not None:
        collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(EnvStepsArgs, description=__doc__))
