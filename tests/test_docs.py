"""What docs/som.md and docs/results.md name exists: functions, flags, tags, files, rows; no tag is left out."""

import ast
import csv
import pathlib
import re
from functools import cache

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = "\n".join((ROOT / "docs" / name).read_text() for name in ("som.md", "results.md"))
PAGE = re.sub(r"^<!-- [\w-]+\.csv -->.*?^<!-- end -->", "", PAGE, flags=re.DOTALL | re.MULTILINE)  # tables of results
SCRIPTS = "som_continuous_action.py", "mfp_continuous_action.py"
TOOLS = (
    "benchmark/launch.py",
    "benchmark/collect.py",
    "benchmark/plot.py",
    "benchmark/film.py",
    "benchmark/sb3.py",
    "benchmark/step_time.py",
)
TOOLS += "benchmark/best_of_n.py", "benchmark/policy_analysis.py", "benchmark/critic_error.py", "benchmark/metrics.py"
TOOLS += ("som_continuous_action_jax.py",)
TAG = r"(?:losses|score|velocity|actions|charts)/\w+"

fences = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
text = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
spans = sorted(set(re.findall(r"`([^`\n]+)`", text)))


@cache
def names_of(path, kinds):
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, kinds)}


@cache
def args_of(path):
    tree = ast.parse((ROOT / path).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Args")]
    return {field.target.id for field in classes[0].body if isinstance(field, ast.AnnAssign)}


@cache
def words_of(path):
    """All identifiers, attributes, parameters and short strings of a script."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        values = (getattr(node, name, None) for name in ("id", "attr", "arg", "name", "value"))
        found |= {value for value in values if isinstance(value, str)}
    return found


@cache
def tags_of(path):
    source = (ROOT / path).read_text()
    tags = set(re.findall(rf'"({TAG})"', source))
    for tag in re.findall(rf'f"({TAG}){{i}}"', source):
        assert "for i in range(4)" in source
        tags |= {f"{tag}{i}" for i in range(4)}
    return tags


@cache
def rows_of_results():
    names = set()
    for table in "small_setting.csv", "grid.csv", "field.csv", "gpu_run.csv":
        with (ROOT / "benchmark/results" / table).open() as file:
            names |= {row["setting"] for row in csv.DictReader(file)}
    return names


def flags_of(paths):
    fields = set.union(*(args_of(path) for path in paths))
    return {f"--{no}{name.replace('_', '-')}" for name in fields for no in ("", "no-")}


def test_the_tests_see_the_page():
    assert len(spans) > 80 and len(fences) >= 5
    assert tags_of(SCRIPTS[0]) >= {"losses/actor_loss_t3", "charts/SPS", "score/norm"}


@pytest.mark.parametrize("span", spans)
def test_name_exists(span):
    flag = re.fullmatch(r"(--[\w-]+)( \S+)?", span)
    if span == "# differs from the paper:":
        assert span in (ROOT / SCRIPTS[0]).read_text()
    elif flag:
        assert flag[1] in flags_of(SCRIPTS)
        if flag[2] and not re.fullmatch(r" [\d.e-]+", flag[2]):
            assert flag[2].strip() in words_of(SCRIPTS[0])
    elif re.fullmatch(TAG, span):
        assert span in tags_of(SCRIPTS[0]) | tags_of(SCRIPTS[1])
    elif span.endswith("()"):
        assert span[:-2] in names_of(SCRIPTS[0], ast.FunctionDef)
    elif span == "evaluations.csv":
        assert span in (ROOT / SCRIPTS[0]).read_text()
    elif "/" in span or span.endswith(".py"):
        assert (ROOT / span).is_file()
    elif span.startswith("torch."):
        assert span in (ROOT / SCRIPTS[0]).read_text()
    else:
        assert span in words_of(SCRIPTS[0]) | rows_of_results()


def test_no_tag_is_left_out():
    assert tags_of(SCRIPTS[0]) <= set(spans)
    assert tags_of(SCRIPTS[1]) <= set(spans)


def test_every_method_function_has_its_equation():
    source = (ROOT / SCRIPTS[0]).read_text()
    method = source[source.index("# ALGO LOGIC: the method") : source.index("class ReplayBuffer")]
    table = text[text.index("## The equations") : text.index("**The prior as reference**")]
    functions = set(re.findall(r"^def (\w+)", method, re.MULTILINE))
    assert functions and functions <= set(re.findall(r"`(\w+)\(\)`", table))


def test_deviations_are_those_that_the_script_marks():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", text[text.index("## Deviations") :], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) == 5
    source = (ROOT / SCRIPTS[0]).read_text()
    classes = [node for node in ast.parse(source).body if getattr(node, "name", "") == "Args"]
    marked = {
        field.target.id
        for field in classes[0].body
        if any("# differs" in line for line in source.splitlines()[field.lineno - 1 : field.end_lineno])
    }
    flags = [{flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)", cell)} for _, cell in rows]
    assert all(of_row & marked for of_row in flags)
    assert marked <= set.union(*flags)


def test_commands_have_known_flags_and_files():
    commands = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    for line in commands:
        for path in re.findall(r"[\w/]+\.(?:py|txt)", line):
            assert (ROOT / path).is_file()
        flags = set(re.findall(r"--[\w-]+", line)) - {"--help", "--logdir"}
        assert flags <= flags_of(SCRIPTS + TOOLS)
