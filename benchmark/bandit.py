"""The numbers and the pictures of docs/bandit.md: the scripts of the 2D bandit, seeds of every setting.

    python benchmark/bandit.py --out runs/bandit --csv benchmark/results/bandit.csv
    python benchmark/bandit.py --script diffusion --out runs/bandit --csv benchmark/results/diffusion_bandit.csv
    python benchmark/bandit.py --out runs/bandit --figures docs/images

A run that is already in --out is not repeated. Cells hold the seeds in order; shares are of 2,000 actions. The third
command draws all four policies on the three tasks (the paper's Figures 5, 13 and 14: bandit_policies.png), and SDAC
under perturbed rewards (its rows of Figures 6 and 16: bandit_robustness_sdac.png): learned critic, seed 1.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import collect
import tyro

ROOT = Path(__file__).parents[1]
SCRIPTS = {"som": ROOT / "som_bandit_2d.py", "diffusion": ROOT / "baselines" / "diffusion_bandit_2d.py"}
SETTINGS = (
    "--oracle-critic",
    "--oracle-critic --reference uniform",
    "",
    "--reference uniform --policy-lr 2e-3",
    "--oracle-critic --total-updates 10000 --num-mc-samples 256",
)
TASKS = {"eight-gaussians": "", "two-moons": "--task two-moons", "checkerboard": "--task checkerboard"}
PERTURBATIONS = {f"noise {std}": f"--methods sdac --reward-noise {std}" for std in (0.2, 0.3)}
PERTURBATIONS |= {"bump": "--methods sdac --bump-scale 1.0 --bump-std 0.5"}
OF_ONE_SEED = ("--oracle-critic", "--task two-moons", "--task checkerboard", *PERTURBATIONS.values())
DIFFUSION_SETTINGS = ("", *OF_ONE_SEED)


@dataclass
class BanditArgs:
    out: Path
    """folder of the runs, one subfolder for each setting and seed"""
    csv: Path | None = None
    """table to write"""
    figures: Path | None = None
    """folder of the pictures to draw"""
    script: Literal["som", "diffusion"] = "som"
    """of the table: som_bandit_2d.py or baselines/diffusion_bandit_2d.py"""
    seeds: tuple[int, ...] = ()
    """seeds of every setting (default: 1 2 3, but 1 alone of the diffusion script with flags)"""
    settings: tuple[str, ...] = ()
    """flags of the script, one string for each setting: --settings="--oracle-critic" (default: those of the page)"""


def seeds_of_settings(args):
    """{flags: seeds} of the table."""
    settings = args.settings
    if not settings:
        settings = SETTINGS if args.script == "som" else DIFFUSION_SETTINGS
    is_alone = {flags: args.script == "diffusion" and flags in OF_ONE_SEED for flags in settings}
    return {flags: args.seeds or ((1,) if is_alone[flags] else (1, 2, 3)) for flags in settings}


def folder_of(args, flags, seed):
    setting = flags.replace("--", "").replace(" ", "_") or "default"
    prefix = "" if args.script == "som" else f"{args.script}_"
    return args.out / f"{prefix}{setting}_seed{seed}"


def run_of(args, flags, seed):
    """Folder of a finished run of this setting and seed, or None."""
    paths = sorted(folder_of(args, flags, seed).glob("runs/*/results.json"))
    return paths[-1].parent if paths else None


def result_of(args, flags, seed):
    """results.json of a finished run of this setting and seed, or None."""
    path = run_of(args, flags, seed)
    return json.loads((path / "results.json").read_text()) if path else None


def run(args, flags, seed):
    folder = folder_of(args, flags, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, SCRIPTS[args.script], "--seed", str(seed), *shlex.split(flags)]
    finished = subprocess.run(command, cwd=folder)
    if finished.returncode != 0:  # the script has said why
        sys.exit(finished.returncode)


def cell(values, digits=3):
    return " ".join(f"{value:.{digits}f}" for value in values)


def rows_of(flags, results):
    """A row for each policy whose numbers this setting adds, of its results seed by seed."""
    policies = [name for name in ("som", "mfp", "pf_ode", "sdac", "dacer", "target") if name in results[0]]
    if "mfp" in policies and ("--reference" in flags or "--total-updates" in flags):
        policies.remove("mfp")  # its training does not read them, or has had enough updates
    w2 = "w2_to_pf_ode" if "pf_ode" in policies else "w2_to_target"
    for policy in policies:
        numbers = [result[policy] for result in results]
        yield {
            "flags": flags or "(none)",
            "policy": policy,
            "mean_reward": cell([x["mean_reward"] for x in numbers]),
            "least_high_mode": cell([min(x["high_mode_share"]) for x in numbers]),
            "most_high_mode": cell([max(x["high_mode_share"]) for x in numbers]),
            "low_modes": cell([x["low_mode_share"] for x in numbers]),
            w2: cell([x[w2] for x in numbers]),
            "seconds": cell([result["seconds"] for result in results], 0),
        }


def write_table(args):
    rows = []
    for flags, seeds in seeds_of_settings(args).items():
        for seed in seeds:
            if result_of(args, flags, seed) is None:
                run(args, flags, seed)
        rows += rows_of(flags, [result_of(args, flags, seed) for seed in seeds])
        collect.write(args.csv, rows)


def run_with(args, script, flags, file):
    """Folder of seed 1's run of a script that has a file, made now if there is none."""
    args = replace(args, script=script)
    folder = run_of(args, flags, 1)
    if folder is None or not (folder / file).is_file():  # earlier scripts kept fewer files
        run(args, flags, 1)
        folder = run_of(args, flags, 1)
    return folder


def draw_policies(path, runs):
    """Arrows from noise to actions, a row for each task and a panel for each policy.

    runs: {task: (run folder of SOM and MFP, run folder of SDAC and DACER)}.
    """
    sys.path.insert(0, str(SCRIPTS["diffusion"].parent))
    import diffusion_bandit_2d as diffusion
    import numpy as np
    import torch

    titles = {"som": "SOM, 1 step", "sdac": "SDAC, 10 steps", "dacer": "DACER, 10 steps", "mfp": "MFP, 1 step"}
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003, "color": "0.45"}
    size = (16, 4.6 * len(runs))
    figure, axes = diffusion.plt.subplots(len(runs), 4, figsize=size, layout="constrained", squeeze=False)
    for row, (task, folders) in zip(axes, runs.items(), strict=True):
        bandit = diffusion.Bandit(task)
        arrows = {}
        samples = {}
        for folder in folders:
            arrows |= np.load(folder / "arrows.npz")
            samples |= np.load(folder / "samples.npz")
        noise = arrows["noise"]
        for ax, (name, title) in zip(row, titles.items(), strict=True):
            label = diffusion.caption(bandit, torch.from_numpy(samples[name]))
            diffusion.draw_panel(ax, bandit.reward(diffusion.GRID), title=title, label=label)
            ax.quiver(*noise.T, *(arrows[name] - noise).T, **arrow)
            ax.scatter(*noise.T, s=8, c="black", zorder=3)
            ax.scatter(*arrows[name].T, s=14, c="crimson", zorder=4)
    figure.savefig(path, dpi=70)


def draw_robustness(path, runs):
    """SDAC's critic and chains at four times, a row for each perturbation. runs: {its name: run folder}."""
    sys.path.insert(0, str(SCRIPTS["diffusion"].parent))
    import diffusion_bandit_2d as diffusion
    import numpy as np
    import torch

    bandit = diffusion.Bandit("eight-gaussians")
    size = (11, 2.2 * len(runs))
    figure, axes = diffusion.plt.subplots(len(runs), 5, figsize=size, layout="constrained", squeeze=False)
    for row, (title, folder) in zip(axes, runs.items(), strict=True):
        q = torch.from_numpy(np.load(folder / "landscapes.npz")["sdac"])
        chains = torch.from_numpy(np.load(folder / "chains.npz")["sdac"])  # (4, M, 2)
        diffusion.draw_panel(row[0], q, title=f"Q of SDAC, {title}", cmap="viridis")
        for ax, t, a in zip(row[1:], diffusion.TIMES, chains, strict=True):
            label = diffusion.caption(bandit, a) if t == 0 else ""
            diffusion.draw_panel(ax, bandit.reward(diffusion.GRID), a, f"t = {t}", label)
    figure.savefig(path, dpi=90)


def draw_figures(args):
    policies = {}
    for task, flags in TASKS.items():
        policies[task] = [run_with(args, script, flags, "arrows.npz") for script in SCRIPTS]
    perturbed = {}
    for name, flags in PERTURBATIONS.items():
        perturbed[name] = run_with(args, "diffusion", flags, "chains.npz")
    args.figures.mkdir(parents=True, exist_ok=True)
    draw_policies(args.figures / "bandit_policies.png", policies)
    draw_robustness(args.figures / "bandit_robustness_sdac.png", perturbed)


def main(args):
    if args.csv is None and args.figures is None:
        collect.exit_with_error("give --csv, --figures or both")
    if args.csv is not None:
        write_table(args)
    if args.figures is not None:
        draw_figures(args)


if __name__ == "__main__":
    main(tyro.cli(BanditArgs))
