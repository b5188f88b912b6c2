"""Run folders -> one CSV of their evaluations; that CSV -> its table in the README or in docs/.

python benchmark/collect.py --runs runs/* --csv benchmark/results/small_setting.csv
python benchmark/collect.py --runs out/*/runs/* --csv benchmark/results/small_setting.csv --add
python benchmark/collect.py --csv benchmark/results/small_setting.csv --write-readme

A run without evaluations, still running or failed, is named and left out.
It needs neither the scripts' libraries nor a GPU: a script's defaults are read from its source. Only
baselines/diffusion_continuous_action.py, whose defaults are its methods', is imported.
"""

import ast
import csv
import functools
import importlib.util
import json
import re
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ROOT / "README.md", DOCS / "som.md", DOCS / "results.md", DOCS / "bandit.md", DOCS / "baselines.md"
FOLDERS = "", "benchmark/", "baselines/"  # where scripts lie
RENAMED = {"benchmark/sac.py": "benchmark/sb3.py"}  # rows and run folders from before name the old one
# what the tables' own flags leave out: a run's name, and where and how it was computed
NOT_SHOWN = "--exp-name", "--env-id", "--seed", "--save-model", "--device", "--compile", "--no-compile"
COLUMNS = (
    "script setting env_id seed global_step return_mean return_std num_updates wall_time_s "
    "versions commit hardware command"
).split()


@dataclass
class CollectArgs:
    csv: Path
    """table of evaluations, one row each"""
    runs: tuple[Path, ...] = ()
    """run folders to collect into it; without any, the table is read"""
    add: bool = False
    """keep the rows that the table has of other runs"""
    write_readme: bool = False
    """put the table into the README or a page of docs/, between its two comments"""


def exit_with_error(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def script_of(config):
    """Path of a run's script from the repository's root; the first runs did not name theirs."""
    name = config.get("script")
    if name is None:
        name = "mfp_continuous_action.py" if "ivc_coef" in config else "som_continuous_action.py"
    for folder in FOLDERS:
        path = f"{folder}{name}"
        if (ROOT / RENAMED.get(path, path)).is_file():
            return path
    return name


def literal(node):
    """(True, value) of an expression that is a literal, else (False, None)."""
    try:
        return True, ast.literal_eval(node)
    except (TypeError, ValueError):
        return False, None


def dict_of(node, known):
    """The value of {...}, of a known name, or of two of them joined by |; None of anything else."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left = dict_of(node.left, known)
        right = dict_of(node.right, known)
        return None if left is None or right is None else left | right
    is_literal, value = literal(node)
    return value if is_literal and isinstance(value, dict) else None


@functools.cache
def defaults_of(script, preset=None):
    """The defaults of a script's Args, with those of a preset; None if the script is not here.

    A default that depends on the machine, as that of --compile, is None: a command always names the value.
    """
    path = ROOT / RENAMED.get(script, script)
    if not path.is_file():
        return None
    defaults = {}
    dicts = {}  # of the module, by their names
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                is_literal, value = literal(getattr(field, "value", None))
                if isinstance(field, ast.AnnAssign) and field.value is not None:
                    defaults[field.target.id] = value if is_literal else None
        # LAPTOP = {...}, LAPTOP |= {...}, PEAKS = LAPTOP | {...}; so does sb3.py with the name of an algorithm
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            name = getattr(target, "id", None)
            value = dict_of(node.value, dicts)
            if name is not None and value is not None:
                before = dicts.get(name, {}) if isinstance(node, ast.AugAssign) else {}
                dicts[name] = before | value
    for_preset = dicts.get(preset.upper(), {}) if preset is not None else {}
    return defaults | for_preset


def load_script(path):
    """A script as a module of its own: torch.compile keeps at most eight results for a function."""
    name = f"{path.stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # dataclasses look there
    spec.loader.exec_module(script)
    return script


@functools.cache
def defaults_of_method(script, method, preset=None):
    """As defaults_of, of a script of several methods, which knows itself what they differ in."""
    path = ROOT / script
    if not path.is_file():
        return None
    defaults = asdict(load_script(path).default_args(method, preset))
    return defaults | {"method": None, "preset": None, "compile": None}  # a command names them


def words_of(name, value):
    """A field of the configuration on the command line."""
    flag = name.replace("_", "-")
    if value is True:
        return [f"--{flag}"]
    if value is False:
        return [f"--no-{flag}"]
    if isinstance(value, str) and value.startswith("-"):  # else it would be read as a flag
        return [f"--{flag}={value}"]
    return [f"--{flag}", str(value)]


def command_of(config):
    """The command line that makes a run: every field whose value is not the default.

    Without a known default, as in a script that was copied elsewhere, every field that has a value.
    """
    script = script_of(config)
    if "method" in config:
        defaults = defaults_of_method(script, config["method"], config.get("preset"))
    else:
        defaults = defaults_of(script, config.get("preset") or config.get("algo"))
    config = config | {"seed": config.get("first_seed", config["seed"])}  # several seeds have one command
    words = ["python", script]
    for name, value in config.items():
        if defaults is None:
            is_given = value is not None and name not in ("script", "versions", "resume", "first_seed")
        else:
            is_given = name in defaults and name != "resume" and value != defaults[name]
        if is_given:
            words += words_of(name, value)
    return shlex.join(words)


def rows_of(run):
    """The rows of a run's evaluations. ValueError says why it has none."""
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
        with (run / "evaluations.csv").open() as file:
            evaluations = [row for row in csv.DictReader(file) if row["wall_time_s"]]  # whole rows
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from None
    if not evaluations:
        raise ValueError("no evaluation in evaluations.csv")
    attempts = []
    path = run.resolve().parent.parent / "attempts.jsonl"  # of launch.py, which knows commit and hardware
    if path.is_file():
        attempts = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("commit", "hardware"):
        columns[name] = " + ".join(dict.fromkeys(attempt[name] for attempt in attempts))
    return [row | columns for row in evaluations]


def collect(runs):
    """The rows of a table, run after run."""
    rows = []
    folders = {}
    for run in runs:
        if not run.is_dir():
            exit_with_error(f"--runs {run} is not a folder")
        try:
            rows_of_run = rows_of(run)
        except ValueError as error:
            print(f"note: {run} is left out: {error}", file=sys.stderr)
            continue
        key = run_of(rows_of_run[0])
        if folders.setdefault(key, run) != run:
            exit_with_error(f"{run} and {folders[key]} are both {' '.join(map(str, key))}")
        rows += rows_of_run
    if not rows:
        exit_with_error("none of --runs has an evaluation")
    return rows


def run_of(row):
    script = RENAMED.get(row["script"], row["script"])
    return row["env_id"], row["setting"], script, int(row["seed"])


def read(path):
    """A table of evaluations; in older ones the script is the second word of the command."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        exit_with_error(f"{path} has no rows")
    for row in rows:
        if "return_mean" in row:
            row.setdefault("script", row["command"].split()[1])
            row.setdefault("commit", "")
            row.setdefault("hardware", "")
    return rows


def flags_of(command):
    """The flags of a command, with their values."""
    flags = []
    for word in shlex.split(command):
        if word.startswith("--"):
            flags.append([word])
        elif flags:
            flags[-1].append(word)
    flags = [shlex.join(words) for words in flags]
    return [flag for flag in flags if not flag.startswith(NOT_SHOWN)]


def as_markdown(lines, rule=" --- "):
    """Lines of cells as a table; the first has its heads, and a rule is drawn under each."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    rows.insert(1, len(lines[0]) * f"|{rule}" + "|")
    return "\n".join(rows)


def markdown(path):
    """A CSV as the pages show it: final returns seed by seed if it holds evaluations, else as it stands.

    own flags: those that not every run of the script has.
    """
    rows = read(path)
    if "return_mean" in rows[0]:
        return table_of_returns(rows)
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    if len(rows) < 3:  # few and long: on its side
        lines = [list(column) for column in zip(*lines, strict=True)]
    return as_markdown(lines)


def table_of_returns(rows):
    final = {}
    common = {}
    own = {}
    scripts = {}  # as the rows name them
    for row in rows:
        scripts.setdefault(run_of(row)[:3], row["script"])
        seeds = final.setdefault(run_of(row)[:3], {})
        seeds[int(row["seed"])] = (int(row["global_step"]), float(row["return_mean"]))
        flags = set(flags_of(row["command"]))
        common[row["script"]] = common.get(row["script"], flags) & flags
    for row in rows:
        flags = [flag for flag in flags_of(row["command"]) if flag not in common[row["script"]]]
        own.setdefault(run_of(row)[:3], {}).update(dict.fromkeys(flags))
    lines = ["environment | script | setting | own flags | steps | final return, seed by seed | mean".split(" | ")]
    for key, seeds in final.items():
        env_id, setting, _ = key
        returns = [seeds[seed][1] for seed in sorted(seeds)]
        flags = " ".join(own[key])
        lines.append(
            [
                env_id,
                Path(scripts[key]).stem.replace("_continuous_action", ""),
                setting,
                f"`{flags}`" if flags else "",
                f"{max(step for step, _ in seeds.values()):,}",
                ", ".join(f"{value:,.0f}" for value in returns),
                f"{statistics.mean(returns):,.0f}",
            ]
        )
    return as_markdown(lines, rule="---")


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
        rows = collect(args.runs)
        if args.add and args.csv.is_file():
            collected = {run_of(row) for row in rows}
            rows += [row for row in read(args.csv) if run_of(row) not in collected]
        rows.sort(key=run_of)
        write(args.csv, rows, COLUMNS)
    elif not args.csv.is_file():
        exit_with_error(f"{args.csv} is missing; --runs makes it")
    table = markdown(args.csv)
    print(table)
    if args.write_readme:
        pages = [page for page in PAGES if with_table(page.read_text(), args.csv, table)]
        if not pages:
            place = f"<!-- {args.csv.name} --> ... <!-- end -->"
            exit_with_error(f"neither README.md nor docs/som.md has a place {place} for the table")
        for page in pages:
            page.write_text(with_table(page.read_text(), args.csv, table))
