"""The numbers of the 2D bandit in the README: som_bandit_2d.py on the eight Gaussians, three seeds of every setting.

    python benchmark/bandit.py --out runs/bandit --csv benchmark/results/bandit.csv

A run that is already in --out is not repeated. Cells hold the seeds in order; shares are of 2,000 one-step actions.
"""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys

import collect
import tyro

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = (
    "--oracle-critic",
    "--oracle-critic --reference uniform",
    "",
    "--reference uniform --policy-lr 2e-3",
    "--oracle-critic --total-updates 10000 --num-mc-samples 256",
)


@dataclasses.dataclass
class BanditArgs:
    out: pathlib.Path
    """folder of the runs, one subfolder for each setting and seed"""
    csv: pathlib.Path
    """table to write"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of every setting"""
    settings: tuple[str, ...] = SETTINGS
    """flags of som_bandit_2d.py, one string for each setting"""


def folder_of(args, flags, seed):
    return args.out / f"{flags.replace('--', '').replace(' ', '_') or 'default'}_seed{seed}"


def result_of(args, flags, seed):
    """results.json of a finished run of this setting and seed, or None."""
    found = sorted(folder_of(args, flags, seed).glob("runs/*/results.json"))
    return json.loads(found[-1].read_text()) if found else None


def rows_of(flags, results):
    """A row for each policy whose numbers this setting adds: SOM, and in the default settings MFP and the PF-ODE."""

    def cell(value_of, digits=3):
        return " ".join(f"{value_of(result):.{digits}f}" for result in results)

    for policy in ("som", "mfp", "pf_ode"):
        if policy == "mfp" and ("--reference" in flags or "--total-updates" in flags):
            continue  # its training does not read them, or has had enough updates
        yield {
            "flags": flags or "(none)",
            "policy": policy,
            "mean_reward": cell(lambda result: result[policy]["mean_reward"]),  # noqa: B023
            "least_high_mode": cell(lambda result: min(result[policy]["high_mode_share"])),  # noqa: B023
            "most_high_mode": cell(lambda result: max(result[policy]["high_mode_share"])),  # noqa: B023
            "low_modes": cell(lambda result: result[policy]["low_mode_share"]),  # noqa: B023
            "w2_to_pf_ode": cell(lambda result: result[policy]["w2_to_pf_ode"]),  # noqa: B023
            "seconds": cell(lambda result: result["seconds"], 0),
        }


def main(args):
    rows = []
    for flags in args.settings:
        for seed in args.seeds:
            if result_of(args, flags, seed) is None:
                folder = folder_of(args, flags, seed)
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, ROOT / "som_bandit_2d.py", "--seed", str(seed), *shlex.split(flags)]
                subprocess.run(command, cwd=folder, check=True)
        rows += rows_of(flags, [result_of(args, flags, seed) for seed in args.seeds])
        collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(BanditArgs))
