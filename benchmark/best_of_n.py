"""What choosing among N candidates is worth: finished runs evaluated with other N than they were trained with.

    python benchmark/best_of_n.py --runs runs/RUN1 runs/RUN2 --csv benchmark/results/best_of_n.csv

Of a run of the JAX script with several seeds give the first seed's folder; a cell holds the returns of all its seeds.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import collect
import tyro

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class BestOfNArgs:
    runs: tuple[pathlib.Path, ...]
    """run folders with checkpoints"""
    csv: pathlib.Path
    """table to write"""
    best_of_n: tuple[int, ...] = (1, 4, 16, 64)
    """candidates of an evaluation (N)"""


def evaluate(run, script, n):
    """Mean return of each seed over ten episodes without exploration noise, by the script's --evaluate."""
    command = [sys.executable, str(ROOT / script), "--evaluate", str(run), "--best-of-n", str(n)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(f"error: {' '.join(command)} ended with {result.returncode}: {result.stderr[-500:]}", file=sys.stderr)
        sys.exit(result.returncode)
    return re.search(r"return (.*?) \+-", result.stdout).group(1).strip("[]").split()


def main(args):
    rows, configs = [], []
    for run in args.runs:
        try:
            configs.append(json.loads((run / "config.json").read_text()))
        except (OSError, ValueError) as error:
            collect.fail(f"{run} is not the folder of a run: {error}")
    if not (args.runs and args.best_of_n):
        collect.fail("--runs and --best-of-n need at least one value each")
    for run, config in zip(args.runs, configs, strict=True):
        row = {"env_id": config["env_id"], "script": config["script"], "setting": config["exp_name"]}
        row |= {"first_seed": config["seed"], "steps": config["total_timesteps"], "trained with": config["best_of_n"]}
        for n in args.best_of_n:
            row[f"N = {n}"] = " ".join(f"{float(x):.0f}" for x in evaluate(run, config["script"], n))
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(BestOfNArgs, description=__doc__))
