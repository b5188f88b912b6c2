"""Tables of evaluations, as collect.py makes them -> learning curves, aggregates and the results table.

python benchmark/plot.py --csvs benchmark/results/small_setting.csv --out plots --env-ids HalfCheetah-v4

curves.png, .svg   per environment a thin line for each seed, and a thick one for their mean; then, over more than one
                   environment, the mean min-max-normalised return and its interval as in the paper's Figure 2
aggregate.png, .svg, from two settings on: mean and interquartile mean of normalised final returns
results.md         final returns, mean +- 95 % interval (Student's t), and the aggregates; the same of the mean return
                   over the run, which is the area under its curve over its length
A run's final return is its last evaluation, or the mean of its last --final-evaluations.
Returns are normalised by the lowest and the highest evaluation that any run drawn has in that environment (the paper
does not say what its minimum and maximum are of), so a number changes with the settings it is drawn beside. Intervals
of aggregates: stratified bootstrap, which draws seeds anew within each environment; of three seeds in one environment
it is too narrow.
"""

import csv
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import collect
import numpy as np
import tyro
from scipy import stats


@dataclass
class PlotArgs:
    csvs: tuple[Path, ...]
    """tables of evaluations"""
    out: Path = Path("plots")
    """folder of the pictures and the table"""
    env_ids: tuple[str, ...] = ()
    """environments, in this order (default: all)"""
    settings: tuple[str, ...] = ()
    """settings, in this order (default: all)"""
    rename: tuple[str, ...] = ()
    """"OLD=NEW" names of settings, before all else; two of the same new name become one"""
    table: Path | None = None
    """CSV to write the final returns to, as collect.py puts it on a page"""
    area_table: Path | None = None
    """CSV to write the mean returns over the run to"""
    final_evaluations: int = 1
    """evaluations at the end of a run whose mean is its final return"""
    bootstraps: int = 10_000
    """resamples of the stratified bootstrap"""


def exit_with_error(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_rows(paths):
    rows = []
    for path in paths:
        try:
            with path.open() as file:
                rows += csv.DictReader(file)
        except OSError as error:
            exit_with_error(f"{path}: {error.strerror}")
    return rows


def new_names(rename, rows):
    """{old: new} name of settings."""
    names = {}
    for text in rename:
        old, _, new = text.partition("=")
        if not (old and new):
            exit_with_error(f'--rename {text!r} is not "OLD=NEW"')
        if all(row.get("setting") != old for row in rows):
            exit_with_error(f"--rename: there is no setting {old}")
        names[old] = new
    return names


def read(paths, rename=()):
    """{setting: {environment: (steps (T,), returns (seeds, T))}}, at the steps that all seeds of it have."""
    rows = read_rows(paths)
    names = new_names(rename, rows)
    runs = {}  # {(setting, script, environment): {seed: {step: return}}}
    scripts = {}  # {setting: its scripts}
    try:
        for row in rows:
            setting = names.get(row["setting"], row["setting"])
            script = row.get("script") or row["command"].split()[1]
            script = collect.RENAMED.get(script, script)
            scripts.setdefault(setting, set()).add(script)
            curve = runs.setdefault((setting, script, row["env_id"]), {}).setdefault(int(row["seed"]), {})
            step = int(row["global_step"])
            value = float(row["return_mean"])
            place = f"{setting} {script} {row['env_id']}, seed {row['seed']}, step {step}"
            if not math.isfinite(value):
                exit_with_error(f"the return of {place} is {value}")
            if curve.setdefault(step, value) != value:
                exit_with_error(f"two returns of {place}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        exit_with_error(f"no table of evaluations: {type(error).__name__} {error}")
    curves = {}
    for (setting, script, env_id), seeds in runs.items():
        steps = sorted(set.intersection(*map(set, seeds.values())))
        if not steps:
            exit_with_error(f"the seeds of {setting} in {env_id} have no step of evaluation in common")
        label = setting if len(scripts[setting]) == 1 else f"{setting} ({Path(script).stem})"
        returns = [[seeds[seed][step] for step in steps] for seed in sorted(seeds)]
        curves.setdefault(label, {})[env_id] = (np.array(steps), np.array(returns))
    return curves


def select(curves, env_ids, settings):
    """The curves of these environments and settings, all if none are named; the environments."""
    found = list(dict.fromkeys(env_id for of_setting in curves.values() for env_id in of_setting))
    for flag, wanted, known in (("--env-ids", env_ids, found), ("--settings", settings, list(curves))):
        for name in wanted:
            if name not in known:
                exit_with_error(f"{flag} {name} is not in the tables; they have {', '.join(known) or 'no rows'}")
    env_ids = list(env_ids) or found
    chosen = {}
    for name in settings or curves:
        of_setting = {env_id: curves[name][env_id] for env_id in env_ids if env_id in curves[name]}
        if of_setting:
            chosen[name] = of_setting
    if not chosen:
        exit_with_error("nothing to draw: the tables have no rows of these environments and settings")
    return chosen, env_ids


def interval(returns):
    """Mean over seeds (first axis) and half the width of its 95 % interval by Student's t; NaN from a single seed."""
    mean, seeds = returns.mean(axis=0), len(returns)
    if seeds == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, stats.t.ppf(0.975, seeds - 1) * returns.std(axis=0, ddof=1) / math.sqrt(seeds)


def final_return(steps, returns, evaluations=1):
    """Each seed's mean of its last evaluations (seeds,)."""
    return returns[:, -evaluations:].mean(axis=1)


def mean_return(steps, returns):
    """Each seed's area under its curve, by trapezoids, over the curve's length (seeds,): its return on the way."""
    if len(steps) == 1:
        return returns[:, 0]
    return np.trapezoid(returns, steps, axis=1) / (steps[-1] - steps[0])


def interquartile_mean(scores):
    """Mean (...) of the middle half of the scores (..., n); a quarter, rounded down, is cut off at each end."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def stratified_bootstrap(scores, statistic, bootstraps, seed=0):
    """95 % interval of statistic, which takes the scores (..., seeds) of all environments side by side.

    scores: one array (seeds,) per environment. Seeds are drawn with replacement within each environment.
    """
    rng = np.random.default_rng(seed)
    drawn = [of_env[rng.integers(len(of_env), size=(bootstraps, len(of_env)))] for of_env in scores]
    return np.quantile(statistic(drawn), [0.025, 0.975])


def mean_over_environments(scores):
    """Environments count alike, however many seeds they have. scores: one array (..., seeds) per environment."""
    return np.mean([of_env.mean(axis=-1) for of_env in scores], axis=0)


def interquartile_mean_over_all(scores):
    return interquartile_mean(np.concatenate(scores, axis=-1))


def normalise(curves):
    """Every environment's returns with its lowest evaluation at 0 and its highest at 1."""
    low = {}
    high = {}
    for of_setting in curves.values():
        for env_id, (_, returns) in of_setting.items():
            low[env_id] = min(low.get(env_id, math.inf), returns.min())
            high[env_id] = max(high.get(env_id, -math.inf), returns.max())
    normalised = {}
    for name, of_setting in curves.items():
        normalised[name] = {}
        for env_id, (steps, returns) in of_setting.items():
            width = high[env_id] - low[env_id]
            normalised[name][env_id] = (steps, (returns - low[env_id]) / (width or 1.0))
    return normalised


def aggregate(curves, env_ids, bootstraps, return_of=final_return):
    """{setting: numbers} of those that were run in every environment: curve, and aggregates of return_of each seed."""
    statistics = {"mean": mean_over_environments, "IQM": interquartile_mean_over_all}
    aggregates = {}
    for name, of_setting in normalise(curves).items():
        if set(of_setting) != set(env_ids):
            continue
        values = [return_of(*curve) for curve in of_setting.values()]
        numbers = {}
        for kind, statistic in statistics.items():
            low, high = stratified_bootstrap(values, statistic, bootstraps).tolist()
            numbers[kind] = (float(statistic(values)), low, high)
        steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in of_setting.values())))
        if steps:
            scores = [returns[:, np.isin(at, steps)].T for at, returns in of_setting.values()]  # each (T, seeds)
            bands = []
            for at_step in zip(*scores, strict=True):
                bands.append(stratified_bootstrap(at_step, mean_over_environments, bootstraps))
            numbers["curve"] = (np.array(steps), mean_over_environments(scores), *np.transpose(bands))
        aggregates[name] = numbers
    return aggregates


def cells_of(values, is_best):
    """Mean +- 95 % interval (seeds), in bold if it is the best."""
    mean, half = interval(values)
    text = f"{mean:,.0f}"
    if len(values) > 1:
        text += f" ± {half:,.0f}"
    if is_best:
        text = f"**{text}**"
    return f"{text} ({len(values)})"


def table_of(curves, env_ids, statistic, aggregates):
    """A row for each setting, a column for each environment: statistic(steps (T,), returns (seeds, T)) of its seeds.

    The highest mean of a column is in bold. With aggregates, of the same statistic, two columns more. The first row
    has the names of the columns.
    """
    heads = ["setting"]
    best = {}
    for env_id in env_ids:
        drawn = [of_setting[env_id] for of_setting in curves.values() if env_id in of_setting]
        last_steps = sorted({int(steps[-1]) for steps, _ in drawn})
        heads.append(f"{env_id}, {' or '.join(f'{step:,}' for step in last_steps)} steps")
        best[env_id] = max(statistic(*curve).mean() for curve in drawn)
    shown = ["mean", "IQM"] if aggregates else []
    heads += [f"normalised {kind}" for kind in shown]
    lines = [heads]
    for name, of_setting in curves.items():
        cells = [name]
        for env_id in env_ids:
            if env_id in of_setting:
                values = statistic(*of_setting[env_id])
                is_best = values.mean() == best[env_id] and len(curves) > 1
                cells.append(cells_of(values, is_best))
            else:
                cells.append("-")
        for kind in shown:
            value = aggregates.get(name, {}).get(kind)
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*value) if value else "-")
        lines.append(cells)
    return lines


def markdown(table):
    heads, *rows = table
    lines = [heads, ["---"] * len(heads)] + [[f"`{name}`", *cells] for name, *cells in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def styles_of(names):
    """Colours that colour-blind readers tell apart (Okabe and Ito); after eight, other strokes."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
    strokes = ["-", "--", ":", "-."]
    styles = {}
    for i, name in enumerate(names):
        styles[name] = {"color": colours[i % 8], "linestyle": strokes[i // 8 % 4]}
    return styles


def save(figure, path):
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})  # the same file from the same tables


def thousands(step, _=None):
    if step == 0:
        return "0"
    return f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k"


def draw_environment(axis, curves, env_id, styles):
    """A thin line for each seed and a thick one for their mean, per setting; the thick ones, {setting: line}."""
    lines = {}
    for name, style in styles.items():
        if env_id not in curves[name]:
            continue
        steps, returns = curves[name][env_id]
        marker = "." if len(steps) < 30 else ""
        if len(returns) > 1:
            axis.plot(steps, returns.T, **style, linewidth=0.6, alpha=0.45)
        (lines[name],) = axis.plot(steps, returns.mean(axis=0), marker=marker, linewidth=2, **style)
    return lines


def draw_aggregate_curves(axis, aggregates, styles):
    for name, style in styles.items():
        if "curve" in aggregates.get(name, {}):
            steps, mean, low, high = aggregates[name]["curve"]
            axis.plot(steps, mean, marker="." if len(steps) < 30 else "", **style)
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def draw_curves(plt, curves, env_ids, aggregates, path):
    styles = styles_of(curves)
    titles = list(env_ids)
    if len(env_ids) > 1 and any("curve" in numbers for numbers in aggregates.values()):
        titles.append("normalised, mean over environments")
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    height = 2.9 * rows + 0.25 * math.ceil(len(curves) / 4) + 0.2
    size = (max(5.5, 3.7 * columns), height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    lines = {}
    for axis, title in zip(axes.flat, titles, strict=False):
        if title in env_ids:
            lines |= draw_environment(axis, curves, title, styles)
        else:
            draw_aggregate_curves(axis, aggregates, styles)
        axis.set_title(title)
        axis.xaxis.set_major_formatter(thousands)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis, title in zip(axes[:, 0], titles[::columns], strict=True):
        axis.set_ylabel("return of an evaluation" if title in env_ids else "normalised return")
    for column in range(columns):
        lowest = [axis for axis in axes[:, column] if axis.get_visible()][-1]
        lowest.set_xlabel("environment steps")
    names = [name for name in styles if name in lines]
    handles = [lines[name] for name in names]
    # matplotlib leaves labels that begin with _ out of a legend, so they are written into it afterwards
    place = {"loc": "outside lower center", "ncols": min(len(names), 3 if columns == 1 else 4)}
    legend = figure.legend(handles, len(names) * ["name"], **place, frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    save(figure, path)


def draw_aggregates(plt, curves, env_ids, aggregates, path):
    """Point and interval of each setting's normalised final returns."""
    styles = styles_of(curves)
    names = list(aggregates)[::-1]
    size = (8, 0.34 * len(names) + 1.4)
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    kinds = {"mean": "mean", "IQM": "interquartile mean"}
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        for height, name in enumerate(names):
            value, low, high = aggregates[name][kind]
            color = styles[name]["color"]
            axis.hlines(height, low, high, color=color, linewidth=6, alpha=0.35)
            axis.plot(value, height, "o", color=color)
        axis.set_title(title)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    over = env_ids[0] if len(env_ids) == 1 else f"{len(env_ids)} environments"
    figure.supxlabel(f"normalised final return, {over}", fontsize="medium")
    save(figure, path)


def main(args):
    if args.bootstraps < 1:
        exit_with_error("--bootstraps must be >= 1")
    if args.final_evaluations < 1:
        exit_with_error("--final-evaluations must be >= 1")
    if args.out.exists() and not args.out.is_dir():
        exit_with_error(f"--out {args.out} is not a folder")
    if not args.csvs:
        exit_with_error("--csvs needs at least one table")
    curves, env_ids = select(read(args.csvs, args.rename), args.env_ids, args.settings)
    final_return_of = partial(final_return, evaluations=args.final_evaluations)
    aggregates = aggregate(curves, env_ids, args.bootstraps, final_return_of)
    if not aggregates:
        print("note: no setting was run in all environments, so there is no aggregate", file=sys.stderr)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "som", "font.size": 9}
    style["text.parse_math"] = False  # a $ in a name is a $
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style):
        draw_curves(plt, curves, env_ids, aggregates, args.out / "curves")
        if len(aggregates) > 1:
            draw_aggregates(plt, curves, env_ids, aggregates, args.out / "aggregate")
    final = table_of(curves, env_ids, final_return_of, aggregates)
    area_aggregates = aggregate(curves, env_ids, args.bootstraps, mean_return)
    area = table_of(curves, env_ids, mean_return, area_aggregates)
    for path, (heads, *rows) in ((args.table, final), (args.area_table, area)):
        if path is not None:
            collect.write(path, [dict(zip(heads, row, strict=True)) for row in rows])
    areas = "Mean return over the run, the area under its curve"
    ending = "Final return"
    if args.final_evaluations > 1:
        ending += f", the mean of the last {args.final_evaluations} evaluations"
    text = f"{ending}\n\n{markdown(final)}\n\n{areas}\n\n{markdown(area)}\n"
    (args.out / "results.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(PlotArgs, description=__doc__))
