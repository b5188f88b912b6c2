"""The numbers of docs/bandit.md: som_bandit_2d.py on the eight Gaussians, three seeds of every setting.

    python benchmark/bandit.py --out runs/bandit --csv benchmark/results/bandit.csv

A run that is already in --out is not repeated. Cells hold the seeds in order; shares are of 2,000 one-step actions.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import collect
import tyro

SCRIPT = Path(__file__).parents[1] / "som_bandit_2d.py"
SETTINGS = (
    "--oracle-critic",
    "--oracle-critic --reference uniform",
    "",
    "--reference uniform --policy-lr 2e-3",
    "--oracle-critic --total-updates 10000 --num-mc-samples 256",
)


@dataclass
class BanditArgs:
    out: Path
    """folder of the runs, one subfolder for each setting and seed"""
    csv: Path
    """table to write"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of every setting"""
    settings: tuple[str, ...] = SETTINGS
    """flags of som_bandit_2d.py, one string for each setting"""


def folder_of(args, flags, seed):
    setting = flags.replace("--", "").replace(" ", "_") or "default"
    return args.out / f"{setting}_seed{seed}"


def result_of(args, flags, seed):
    """results.json of a finished run of this setting and seed, or None."""
    paths = sorted(folder_of(args, flags, seed).glob("runs/*/results.json"))
    return json.loads(paths[-1].read_text()) if paths else None


def run(args, flags, seed):
    folder = folder_of(args, flags, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, SCRIPT, "--seed", str(seed), *shlex.split(flags)]
    finished = subprocess.run(command, cwd=folder)
    if finished.returncode != 0:  # the script has said why
        sys.exit(finished.returncode)


def cell(values, digits=3):
    return " ".join(f"{value:.{digits}f}" for value in values)


def rows_of(flags, results):
    """A row for each policy whose numbers this setting adds, of its results seed by seed."""
    policies = ["som", "mfp", "pf_ode"]
    if "--reference" in flags or "--total-updates" in flags:
        policies.remove("mfp")  # its training does not read them, or has had enough updates
    for policy in policies:
        numbers = [result[policy] for result in results]
        yield {
            "flags": flags or "(none)",
            "policy": policy,
            "mean_reward": cell([x["mean_reward"] for x in numbers]),
            "least_high_mode": cell([min(x["high_mode_share"]) for x in numbers]),
            "most_high_mode": cell([max(x["high_mode_share"]) for x in numbers]),
            "low_modes": cell([x["low_mode_share"] for x in numbers]),
            "w2_to_pf_ode": cell([x["w2_to_pf_ode"] for x in numbers]),
            "seconds": cell([result["seconds"] for result in results], 0),
        }


def main(args):
    rows = []
    for flags in args.settings:
        for seed in args.seeds:
            if result_of(args, flags, seed) is None:
                run(args, flags, seed)
        rows += rows_of(flags, [result_of(args, flags, seed) for seed in args.seeds])
        collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(BanditArgs))
