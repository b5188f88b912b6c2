"""Run folders -> one CSV of their evaluations; that CSV -> the tables of the README.

python benchmark/collect.py --runs runs/* --csv benchmark/results/small_setting.csv
python benchmark/collect.py --csv benchmark/results/small_setting.csv --write-readme
"""

import csv
import dataclasses
import importlib
import json
import pathlib
import re
import statistics
import sys

import tyro

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
COLUMNS = "setting env_id seed global_step return_mean return_std num_updates wall_time_s versions command".split()


@dataclasses.dataclass
class CollectArgs:
    csv: pathlib.Path
    """table of evaluations, one row each"""
    runs: tuple[pathlib.Path, ...] = ()
    """run folders to collect into it; without any, the table is read"""
    write_readme: bool = False
    """put the table of final returns into the README, between its two comments"""


def command_of(config):
    """The command line that makes a run: every field whose value is not the default."""
    sys.path.insert(0, str(ROOT))
    script = "mfp_continuous_action" if "ivc_coef" in config else "som_continuous_action"
    defaults = dataclasses.asdict(importlib.import_module(script).Args())
    words = [f"python {script}.py"]
    for name, value in config.items():
        flag = name.replace("_", "-")
        if name in defaults and name not in ("cuda", "compile") and value != defaults[name]:
            words.append(
                f"--{flag} {value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"
            )
    return " ".join(words)


def collect(runs):
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        with (run / "evaluations.csv").open() as file:
            for row in csv.DictReader(file):
                yield row | {
                    "setting": config["exp_name"],
                    "env_id": config["env_id"],
                    "seed": config["seed"],
                    "versions": " ".join(f"{name}={version}" for name, version in config["versions"].items()),
                    "command": command_of(config),
                }


def markdown(path):
    """A CSV as the README shows it: final returns seed by seed where it holds evaluations, else as it stands."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    if list(rows[0]) != COLUMNS:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        if len(rows) < 3:  # few and long: on its side
            lines = [[column, *(row[column] for row in rows)] for column in rows[0]]
            lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    final = {}
    for row in rows:
        seeds = final.setdefault((row["env_id"], row["setting"]), {})
        seeds[int(row["seed"])] = (int(row["global_step"]), float(row["return_mean"]))
    lines = ["| environment | setting | steps | final return, seed by seed | mean |", "|---|---|---|---|---|"]
    for (env_id, setting), seeds in final.items():
        returns = [seeds[seed][1] for seed in sorted(seeds)]
        cells = ", ".join(f"{value:,.0f}" for value in returns)
        steps = max(step for step, _ in seeds.values())
        lines.append(f"| {env_id} | {setting} | {steps:,} | {cells} | {statistics.mean(returns):,.0f} |")
    return "\n".join(lines)


def with_table(text, path, table):
    """README text with the table between its two comments."""
    pattern = rf"(<!-- {re.escape(path.name)} -->\n)(?:(?!<!-- ).*\n)*(<!-- end -->)"
    if not re.search(pattern, text):
        sys.exit(f"error: README.md has no place <!-- {path.name} --> ... <!-- end --> for the table")
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text)


if __name__ == "__main__":
    args = tyro.cli(CollectArgs)
    if args.runs:
        rows = sorted(collect(args.runs), key=lambda row: (row["env_id"], row["setting"], int(row["seed"])))
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    table = markdown(args.csv)
    print(table)
    if args.write_readme:
        README.write_text(with_table(README.read_text(), args.csv, table))
