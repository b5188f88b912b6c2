"""Tables of evaluations, as collect.py makes them -> learning curves, aggregates and the results table.

python benchmark/plot.py --csvs benchmark/results/small_setting.csv --out plots --env-ids HalfCheetah-v4

curves.png, .svg   mean return and its 95 % interval over seeds (Student's t) per environment, of two seeds the seeds;
                   then, over more than one environment, the mean min-max-normalised return as in the paper's Figure 2
aggregate.png, .svg, from two settings on: mean and interquartile mean of normalised final returns
results.md         final returns, mean +- 95 % interval, and the aggregates
Returns are normalised by the lowest and the highest evaluation that any run drawn has in that environment (the paper
does not say what its minimum and maximum are of), so a number changes with the settings it is drawn beside. Intervals
of aggregates: stratified bootstrap, which draws seeds anew within each environment; of three seeds in one environment
it is too narrow.
"""

import csv
import dataclasses
import math
import pathlib
import sys

import numpy as np
import tyro
from scipy import stats


@dataclasses.dataclass
class PlotArgs:
    csvs: tuple[pathlib.Path, ...]
    """tables of evaluations"""
    out: pathlib.Path = pathlib.Path("plots")
    """folder of the pictures and the table"""
    env_ids: tuple[str, ...] = ()
    """environments, in this order (default: all)"""
    settings: tuple[str, ...] = ()
    """settings, in this order (default: all)"""
    rename: tuple[str, ...] = ()
    """"OLD=NEW" names of settings, before all else; two of the same new name become one"""
    bootstraps: int = 10_000
    """resamples of the stratified bootstrap"""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read(paths, rename=()):
    """{setting: {environment: (steps (T,), returns (seeds, T))}}, at the steps that all seeds of it have."""
    names, runs, scripts, rows = {}, {}, {}, []
    for text in rename:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            fail(f'--rename {text!r} is not "OLD=NEW"')
        names[old] = new
    for path in paths:
        try:
            with path.open() as file:
                rows += csv.DictReader(file)
        except OSError as error:
            fail(f"{path}: {error.strerror}")
    try:
        for row in rows:
            script = row.get("script") or row["command"].split()[1]
            key = names.get(row["setting"], row["setting"]), script
            curve = runs.setdefault((*key, row["env_id"]), {}).setdefault(int(row["seed"]), {})
            step, value = int(row["global_step"]), float(row["return_mean"])
            if curve.setdefault(step, value) != value:
                fail(f"two returns of {' '.join(key)} {row['env_id']}, seed {row['seed']}, step {step}")
            scripts.setdefault(key[0], set()).add(script)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        fail(f"no table of evaluations: {type(error).__name__} {error}")
    for old in names:
        if old not in {row["setting"] for row in rows}:
            fail(f"--rename: there is no setting {old}")
    curves = {}
    for (setting, script, env_id), seeds in runs.items():
        steps = sorted(set.intersection(*map(set, seeds.values())))
        if not steps:
            fail(f"the seeds of {setting} in {env_id} have no step of evaluation in common")
        label = setting if len(scripts[setting]) == 1 else f"{setting} ({pathlib.Path(script).stem})"
        returns = np.array([[seeds[seed][step] for step in steps] for seed in sorted(seeds)])
        curves.setdefault(label, {})[env_id] = np.array(steps), returns
    return curves


def select(curves, env_ids, settings):
    found = list(dict.fromkeys(env_id for of_setting in curves.values() for env_id in of_setting))
    for flag, wanted, known in ("--env-ids", env_ids, found), ("--settings", settings, list(curves)):
        for name in wanted:
            if name not in known:
                fail(f"{flag} {name} is not in the tables; they have {', '.join(known) or 'no rows'}")
    env_ids = list(env_ids) or found
    chosen = {name: {e: curves[name][e] for e in env_ids if e in curves[name]} for name in settings or curves}
    chosen = {name: of_setting for name, of_setting in chosen.items() if of_setting}
    if not chosen:
        fail("nothing to draw: the tables have no rows of these environments and settings")
    return chosen, env_ids


def interval(returns):
    """Mean over seeds (first axis) and half the width of its 95 % interval by Student's t; NaN from a single seed."""
    mean, seeds = returns.mean(axis=0), len(returns)
    if seeds == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, stats.t.ppf(0.975, seeds - 1) * returns.std(axis=0, ddof=1) / math.sqrt(seeds)


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
    ends = {}
    for of_setting in curves.values():
        for env_id, (_, returns) in of_setting.items():
            low, high = ends.get(env_id, (math.inf, -math.inf))
            ends[env_id] = min(low, returns.min()), max(high, returns.max())

    def scaled(env_id, returns):
        low, high = ends[env_id]
        return (returns - low) / (high - low or 1.0)

    return {
        name: {env_id: (steps, scaled(env_id, returns)) for env_id, (steps, returns) in of_setting.items()}
        for name, of_setting in curves.items()
    }


def aggregate(curves, env_ids, bootstraps):
    """{setting: numbers} of those that were run in every environment: curve and final aggregates."""
    aggregates = {}
    for name, of_setting in normalise(curves).items():
        if set(of_setting) != set(env_ids):
            continue
        final = [returns[:, -1] for _, returns in of_setting.values()]
        numbers = {}
        for kind, statistic in ("mean", mean_over_environments), ("IQM", interquartile_mean_over_all):
            numbers[kind] = float(statistic(final)), *stratified_bootstrap(final, statistic, bootstraps).tolist()
        steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in of_setting.values())))
        if steps:
            scores = [returns[:, np.isin(at, steps)].T for at, returns in of_setting.values()]  # each (T, seeds)
            bands = [
                stratified_bootstrap(at_step, mean_over_environments, bootstraps)
                for at_step in zip(*scores, strict=True)
            ]
            numbers["curve"] = np.array(steps), mean_over_environments(scores), *np.transpose(bands)
        aggregates[name] = numbers
    return aggregates


def markdown(curves, env_ids, aggregates):
    """Final returns, mean +- 95 % interval (seeds), the highest mean of a column in bold."""
    heads = []
    for env_id in env_ids:
        steps = sorted({int(of_setting[env_id][0][-1]) for of_setting in curves.values() if env_id in of_setting})
        heads.append(f"{env_id}, {' or '.join(f'{step:,}' for step in steps)} steps")
    shown = ["mean", "IQM"] if aggregates else []
    lines = [["setting", *heads, *(f"normalised {kind}" for kind in shown)]]
    lines.append(["---"] * len(lines[0]))
    best = {e: max(c[e][1][:, -1].mean() for c in curves.values() if e in c) for e in env_ids}
    for name, of_setting in curves.items():
        cells = [f"`{name}`"]
        for env_id in env_ids:
            if env_id not in of_setting:
                cells.append("-")
                continue
            final = of_setting[env_id][1][:, -1]
            mean, half = interval(final)
            text = f"{mean:,.0f}" + ("" if len(final) == 1 else f" ± {half:,.0f}")
            text = f"**{text}**" if mean == best[env_id] and len(curves) > 1 else text
            cells.append(f"{text} ({len(final)})")
        for kind in shown:
            value = aggregates.get(name, {}).get(kind)
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*value) if value else "-")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def styles_of(names):
    """Colours that colour-blind readers tell apart (Okabe and Ito); after eight, other strokes."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
    strokes = ["-", "--", ":", "-."]
    return {n: {"color": colours[i % 8], "linestyle": strokes[i // 8 % 4]} for i, n in enumerate(names)}


def save(figure, path):
    for suffix in ".png", ".svg":
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def thousands(step, _=None):
    return "0" if not step else f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k"


def draw_curves(plt, curves, env_ids, aggregates, path):
    styles, with_aggregate = styles_of(curves), len(env_ids) > 1 and any("curve" in a for a in aggregates.values())
    titles = env_ids + ["normalised, mean over environments"] * with_aggregate
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    size = (max(5.5, 3.7 * columns), 2.9 * rows + 0.25 * math.ceil(len(curves) / 4) + 0.2)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title)
        for name, style in styles.items():
            if title in curves[name]:
                steps, returns = curves[name][title]
                mean, half = interval(returns)
                low, high = mean - half, mean + half
            elif title not in env_ids and "curve" in aggregates.get(name, {}):
                steps, mean, low, high = aggregates[name]["curve"]
            else:
                continue
            axis.plot(steps, mean, label=name, marker="." if len(steps) < 30 else "", **style)
            if title in env_ids and len(returns) == 2:  # their interval, nine standard deviations, would hide all else
                axis.plot(steps, returns.T, **style, linewidth=0.7, alpha=0.5)
                continue
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if title in env_ids:  # a wide interval of two seeds leaves the picture rather than flattening it
            shown = np.concatenate(
                [of_setting[title][1].ravel() for of_setting in curves.values() if title in of_setting]
            )
            margin = 0.08 * (np.ptp(shown) or 1.0)
            axis.set_ylim(shown.min() - margin, shown.max() + margin)
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
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    in_order = [handles[name] for name in styles if name in handles]
    per_row = min(len(in_order), 3 if columns == 1 else 4)
    figure.legend(in_order, [h.get_label() for h in in_order], loc="outside lower center", ncols=per_row, frameon=False)
    save(figure, path)


def draw_aggregates(plt, curves, env_ids, aggregates, path):
    """Point and interval of each setting's normalised final returns."""
    styles, names = styles_of(curves), list(aggregates)[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.34 * len(names) + 1.4), sharey=True, layout="constrained")
    for axis, kind, title in zip(axes, ("mean", "IQM"), ("mean", "interquartile mean"), strict=True):
        for height, name in enumerate(names):
            value, low, high = aggregates[name][kind]
            axis.plot(
                [low, high],
                [height, height],
                color=styles[name]["color"],
                linewidth=6,
                alpha=0.35,
                solid_capstyle="butt",
            )
            axis.plot(value, height, "o", color=styles[name]["color"])
        axis.set_title(title)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    over = env_ids[0] if len(env_ids) == 1 else f"{len(env_ids)} environments"
    figure.supxlabel(f"normalised final return, {over}", fontsize="medium")
    save(figure, path)


def main(args):
    if args.bootstraps < 1:
        fail("--bootstraps must be >= 1")
    if args.out.exists() and not args.out.is_dir():
        fail(f"--out {args.out} is not a folder")
    if not args.csvs:
        fail("--csvs needs at least one table")
    curves, env_ids = select(read(args.csvs, args.rename), args.env_ids, args.settings)
    aggregates = aggregate(curves, env_ids, args.bootstraps)
    if not aggregates:
        print("note: no setting was run in all environments, so there is no aggregate", file=sys.stderr)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "som", "font.size": 9}
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style):
        draw_curves(plt, curves, env_ids, aggregates, args.out / "curves")
        if len(aggregates) > 1:
            draw_aggregates(plt, curves, env_ids, aggregates, args.out / "aggregate")
    table = markdown(curves, env_ids, aggregates)
    (args.out / "results.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(PlotArgs, description=__doc__))
