"""Run folders -> one CSV of their evaluations; that CSV -> its table in the README or in docs/.

python benchmark/collect.py --runs runs/* --csv benchmark/results/small_setting.csv
python benchmark/collect.py --runs out/*/runs/* --csv benchmark/results/small_setting.csv --add
python benchmark/collect.py --csv benchmark/results/small_setting.csv --write-readme

It needs neither the scripts' libraries nor a GPU: a script's defaults are read from its source.
"""

import ast
import csv
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import sys

import tyro

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / "README.md", ROOT / "docs" / "som.md"
NOT_SHOWN = "--exp-name", "--env-id", "--seed", "--save-model"  # in the table's own_flags
COLUMNS = (
    "script setting env_id seed global_step return_mean return_std num_updates wall_time_s "
    "versions commit hardware command"
).split()


@dataclasses.dataclass
class CollectArgs:
    csv: pathlib.Path
    """table of evaluations, one row each"""
    runs: tuple[pathlib.Path, ...] = ()
    """run folders to collect into it; without any, the table is read"""
    add: bool = False
    """keep the rows that the table has of other runs"""
    write_readme: bool = False
    """put the table into the README or docs/som.md, between its two comments"""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def script_of(config):
    """Path of a run's script from the repository's root; runs from before scripts named themselves are told apart."""
    name = config.get("script") or ("mfp" if "ivc_coef" in config else "som") + "_continuous_action.py"
    return next((f"{folder}{name}" for folder in ("", "benchmark/") if (ROOT / folder / name).is_file()), name)


@functools.cache
def defaults_of(script):
    """The literal defaults of a script's Args."""
    defaults = {}
    if (ROOT / script).is_file():
        classes = [node for node in ast.parse((ROOT / script).read_text()).body if getattr(node, "name", "") == "Args"]
        for field in classes[0].body:
            try:
                defaults[field.target.id] = ast.literal_eval(field.value)
            except (AttributeError, ValueError):  # a docstring; a default that is computed
                continue
    return defaults


def command_of(config):
    """The command line that makes a run: every field whose value is not the default."""
    script = script_of(config)
    config = config | {"seed": config.get("first_seed", config["seed"])}  # a run of several seeds has one command
    words = [f"python {script}"]
    for name, value in config.items():
        flag = name.replace("_", "-")
        if name in defaults_of(script) and name != "resume" and value != defaults_of(script)[name]:
            words.append(
                f"--{flag} {value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}"
            )
    return " ".join(words)


def collect(runs):
    """The rows of a table, run after run."""
    folders = {}
    for run in runs:
        for name in "config.json", "evaluations.csv":
            if not (run / name).is_file():
                fail(f"{run}/{name} is missing")
        try:
            config = json.loads((run / "config.json").read_text())
            columns = {
                "script": script_of(config),
                "setting": config["exp_name"],
                "env_id": config["env_id"],
                "seed": str(config["seed"]),
                "versions": " ".join(f"{name}={version}" for name, version in config["versions"].items()),
                "command": command_of(config),
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fail(f"{run}/config.json is not that of a run: {type(error).__name__} {error}")
        if folders.setdefault(run_of(columns), run) != run:
            fail(f"{run} and {folders[run_of(columns)]} are both {' '.join(map(str, run_of(columns)))}")
        attempts = run.resolve().parent.parent / "attempts.jsonl"  # of launch.py, which knows commit and hardware
        lines = [json.loads(line) for line in attempts.read_text().splitlines()] if attempts.is_file() else []
        for name in "commit", "hardware":
            columns[name] = " + ".join(dict.fromkeys(line[name] for line in lines))
        with (run / "evaluations.csv").open() as file:
            for row in csv.DictReader(file):
                yield row | columns


def run_of(row):
    return row["env_id"], row["setting"], row["script"], int(row["seed"])


def read(path):
    """A table of evaluations; in older ones the script is the second word of the command."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        fail(f"{path} has no rows")
    for row in rows:
        if "return_mean" in row:
            row.setdefault("script", row["command"].split()[1])
            row.setdefault("commit", "")
            row.setdefault("hardware", "")
    return rows


def flags_of(command):
    """The flags of a command, with their values."""
    flags = (flag.strip() for flag in re.split(r" (?=--)", command)[1:])
    return [flag for flag in flags if not flag.startswith(NOT_SHOWN)]


def markdown(path):
    """A CSV as the pages show it: final returns seed by seed where it holds evaluations, else as it stands.

    own flags: those that not every run of the script has.
    """
    rows = read(path)
    if "return_mean" not in rows[0]:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        if len(rows) < 3:  # few and long: on its side
            lines = [[column, *(row[column] for row in rows)] for column in rows[0]]
            lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    final, common, own = {}, {}, {}
    for row in rows:
        seeds = final.setdefault(run_of(row)[:3], {})
        seeds[int(row["seed"])] = (int(row["global_step"]), float(row["return_mean"]))
        common[row["script"]] = common.get(row["script"], set(flags_of(row["command"]))) & set(flags_of(row["command"]))
    for row in rows:
        flags = [flag for flag in flags_of(row["command"]) if flag not in common[row["script"]]]
        own.setdefault(run_of(row)[:3], dict.fromkeys(flags)).update(dict.fromkeys(flags))
    lines = [
        "| environment | script | setting | own flags | steps | final return, seed by seed | mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for (env_id, setting, script), seeds in final.items():
        returns = [seeds[seed][1] for seed in sorted(seeds)]
        cells = ", ".join(f"{value:,.0f}" for value in returns)
        steps = max(step for step, _ in seeds.values())
        flags = f"`{' '.join(own[env_id, setting, script])}`" if own[env_id, setting, script] else ""
        mean = f"{statistics.mean(returns):,.0f}"
        stem = pathlib.Path(script).stem.replace("_continuous_action", "")
        lines.append(f"| {env_id} | {stem} | {setting} | {flags} | {steps:,} | {cells} | {mean} |")
    return "\n".join(lines)


def write(path, rows, columns=None):
    """Rows, dictionaries, as a CSV file in a folder that need not exist; columns: all of the first row's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or rows[0])
        writer.writeheader()
        writer.writerows(rows)


def with_table(text, path, table):
    """A page's text with the table between its two comments; None where it has no place for it."""
    pattern = rf"(<!-- {re.escape(path.name)} -->\n)(?:(?!<!-- ).*\n)*(<!-- end -->)"
    if not re.search(pattern, text):
        return None
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text)


if __name__ == "__main__":
    args = tyro.cli(CollectArgs)
    if args.runs:
        rows = list(collect(args.runs))
        if args.add and args.csv.is_file():
            collected = {run_of(row) for row in rows}
            rows += [row for row in read(args.csv) if run_of(row) not in collected]
        rows.sort(key=run_of)
        write(args.csv, rows, COLUMNS)
    elif not args.csv.is_file():
        fail(f"{args.csv} is missing; --runs makes it")
    table = markdown(args.csv)
    print(table)
    if args.write_readme:
        pages = [page for page in PAGES if with_table(page.read_text(), args.csv, table)]
        if not pages:
            fail(
                f"neither README.md nor docs/som.md has a place <!-- {args.csv.name} --> ... <!-- end --> for the table"
            )
        for page in pages:
            page.write_text(with_table(page.read_text(), args.csv, table))
