"""Environment steps per second of whole runs of the scripts, learning included; several seeds of JAX beside one.

    python benchmark/env_steps.py --csv benchmark/results/env_steps.csv

Each script is run twice, for a short and a longer time: in the difference of their wall times, starting, compiling and
the evaluation at the end cancel out. What counts are the ratios: rounds take the scripts in turn.
"""

import dataclasses
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Literal

import collect
import torch
import tyro

ROOT = pathlib.Path(__file__).parents[1]
# flags, and the environment steps by which the longer run is longer
SIZES = {
    "paper": ("--num-envs 5".split(), 250),
    "small": ("--num-envs 4 --hidden-dim 64 --num-mc-samples 8 --best-of-n 4 --batch-size 128".split(), 6_000),
}
SHORT = 600  # steps of the short run
GPU_STEPS = 20_000  # by which the longer run is longer on a GPU, where fewer would be lost in the noise of starting


@dataclasses.dataclass
class EnvStepsArgs:
    env_id: str = "HalfCheetah-v4"
    """Gymnasium id, with episodes of one length: evaluations must take as long in both runs"""
    sizes: tuple[Literal["paper", "small"], ...] = ("paper", "small")
    """Table 3's sizes, and those of the README's small setting"""
    num_seeds: int = 5
    """agents side by side in the JAX script's second run (S)"""
    rounds: int = 1
    """rounds; the median is reported"""
    cuda: bool = False
    """run on the GPU"""
    csv: pathlib.Path | None = None
    """also write the table to this file"""


def seconds_of(script, flags, total):
    """Wall time of a run, as the script says it with its last evaluation; of several seeds the last one's."""
    command = [sys.executable, str(ROOT / script), "--learning-starts", "500", *flags]
    command += ["--total-timesteps", str(total), "--eval-frequency", str(total)]
    env = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}  # as in PyTorch; JAX's own choice on a GPU is TF32
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"error: {' '.join(command)} ended with {result.returncode}: {result.stderr[-500:]}")
        tables = [path.read_text().splitlines() for path in pathlib.Path(folder).glob("runs/*/evaluations.csv")]
    return max(float(rows[-1].rpartition(",")[2]) for rows in tables)


def main(args):
    if args.cuda and not torch.cuda.is_available():
        collect.fail("--cuda: PyTorch finds no GPU here")
    device = ["--cuda"] if args.cuda else ["--no-cuda"]
    jax_device = ["--platform", "gpu" if args.cuda else "cpu"]
    torch_script, jax_script = "som_continuous_action.py", "som_continuous_action_jax.py"
    runs = {
        "PyTorch, eager": (torch_script, [*device, "--no-compile"], 1),
        "PyTorch, compiled": (torch_script, [*device, "--compile"], 1),
        "JAX": (jax_script, jax_device, 1),
        f"JAX, {args.num_seeds} seeds": (jax_script, [*jax_device, "--num-seeds", str(args.num_seeds)], args.num_seeds),
    }
    rows = []
    for sizes in args.sizes:
        size_flags, longer = SIZES[sizes]
        longer = GPU_STEPS if args.cuda else longer
        size_flags = ["--env-id", args.env_id, *size_flags]
        for script, flags, _ in runs.values():  # what has been compiled is found again by the runs that count
            seconds_of(script, size_flags + flags, SHORT)
        seconds = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, (script, flags, _) in runs.items():
                times = [seconds_of(script, size_flags + flags, total) for total in (SHORT, SHORT + longer)]
                seconds[name].append(times[1] - times[0])
        threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
        hardware = torch.cuda.get_device_name() if args.cuda else f"{platform.machine()}, {threads} threads"
        for name, (*_, num_seeds) in runs.items():
            ratios = [one / own for one, own in zip(seconds["JAX"], seconds[name], strict=True)]
            row = {"sizes": sizes, "env_id": args.env_id, "hardware": hardware}
            row |= {"run": name, "seconds": round(statistics.median(seconds[name]), 2)}
            row["env steps/s of each agent"] = round(longer / statistics.median(seconds[name]), 1)
            row["env steps/s in all"] = round(num_seeds * longer / statistics.median(seconds[name]), 1)
            row["in all / JAX"] = round(num_seeds * statistics.median(ratios), 2)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.csv:
        collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(EnvStepsArgs, description=__doc__))
