"""What choosing among N candidates is worth: finished runs evaluated with other N than they were trained with.

    python benchmark/best_of_n.py --runs runs/RUN1 runs/RUN2 --csv benchmark/results/best_of_n.csv

Of a run of the JAX script with several seeds give the first seed's folder; a cell holds the returns of all its seeds.
A run of benchmark/sb3.py stands in the column N = 1: SAC and PPO have one action, the mean of their normal.
The column "noise 0" is the one action that SOM and MFP make of noise 0, --deterministic.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import collect
import tyro

SB3 = "benchmark/sb3.py"
ONE_STEP = "som_continuous_action.py", "som_continuous_action_jax.py", "mfp_continuous_action.py"


@dataclass
class BestOfNArgs:
    runs: tuple[Path, ...]
    """run folders with checkpoints"""
    csv: Path
    """table to write"""
    best_of_n: tuple[int, ...] = (1, 4, 16, 64)
    """candidates of an evaluation (N)"""
    num_episodes: int | None = None
    """episodes of an evaluation (default: the run's own number); a larger number begins with the same ones"""


def read_configs(runs):
    """{run: its configuration}; a folder in which nothing has begun is named and left out."""
    configs = {}
    for run in runs:
        if run.is_dir() and not (run / "config.json").exists():
            print(f"note: {run} is left out: it has no config.json", file=sys.stderr)
            continue
        try:
            configs[run] = json.loads((run / "config.json").read_text())
        except (OSError, ValueError) as error:
            collect.exit_with_error(f"{run} is not the folder of a run: {error}")
    return configs


def last_step(run, script):
    """Environment steps of the networks that --evaluate loads: of the newest checkpoint; 0 without any."""
    if script == SB3:  # it keeps them at the end of a run
        last_line = (run / "evaluations.csv").read_text().splitlines()[-1]
        return int(last_line.split(",")[0])
    return max((int(path.stem.removeprefix("checkpoint_")) for path in run.glob("checkpoint_*")), default=0)


def evaluate(run, script, num_episodes, flags):
    """Mean returns of all seeds without exploration noise, by the script's --evaluate with these flags."""
    command = [sys.executable, str(collect.ROOT / script), "--evaluate", str(run)]
    command += ["--num-episodes", str(num_episodes), "--device", "auto", *flags]  # of a run made on a GPU too
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        ending = result.stderr[-500:].strip()
        print(f"error: {' '.join(command)} ended with {result.returncode}: {ending}", file=sys.stderr)
        sys.exit(result.returncode)
    means = re.findall(r"^return (\S+) \+-", result.stdout, re.MULTILINE)
    return " ".join(f"{float(mean):.0f}" for mean in means)


def main(args):
    configs = read_configs(args.runs)
    if not (configs and args.best_of_n):
        collect.exit_with_error("--runs and --best-of-n need at least one value each")
    scripts = {run: collect.script_of(config) for run, config in configs.items()}
    for run, script in scripts.items():
        if not (collect.ROOT / script).is_file():
            collect.exit_with_error(f"{run} is of {script}, which is not in {collect.ROOT}")
        if script == SB3 and 1 not in args.best_of_n:
            collect.exit_with_error(f"{run} has one action in a state: --best-of-n must have a 1")
    rows = []
    for run, config in configs.items():
        script = scripts[run]
        num_episodes = config["num_episodes"] if args.num_episodes is None else args.num_episodes
        row = {
            "env_id": config["env_id"],
            "script": script,
            "setting": config["exp_name"],
            "first_seed": config["seed"],
            "steps": last_step(run, script),
            "trained with": config.get("best_of_n", 1),
            "episodes": num_episodes,
        }
        for n in args.best_of_n:
            row[f"N = {n}"] = ""
            if script != SB3:
                row[f"N = {n}"] = evaluate(run, script, num_episodes, ["--best-of-n", str(n)])
            elif n == 1:
                row[f"N = {n}"] = evaluate(run, script, num_episodes, [])
        row["noise 0"] = ""
        if script in ONE_STEP:
            row["noise 0"] = evaluate(run, script, num_episodes, ["--deterministic"])
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(BestOfNArgs, description=__doc__))
