"""What the logged metrics are in runs that went well: their means between two steps, from the runs' TensorBoard files.

    python benchmark/metrics.py --csv benchmark/results/metrics.csv --runs out/*/runs/* --steps 150000 200000
    python benchmark/metrics.py --csv table.csv --runs out/*/runs/* --steps 0 100000 900000 1000000

A row is a metric, a column a setting, and an environment or a range of steps where there are several: the mean over its
runs of their means. docs/som.md shows the table beside what else the numbers can be, and what to do then.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import collect
import numpy as np
import tyro

TAGS = (
    "losses/qf_values losses/td_error losses/actor_loss losses/actor_loss_t0 losses/actor_loss_t3 losses/alpha "
    "score/norm score/effective_sample_size velocity/norm velocity/dudt_ratio actions/candidate_std actions/saturated"
).split()


@dataclass
class MetricsArgs:
    csv: Path
    """table to write"""
    runs: tuple[Path, ...]
    """run folders of SOM"""
    steps: tuple[tuple[int, int], ...] = ((150_000, 200_000),)
    """first and last environment step of the mean, or of several"""


def read_metrics(run):
    """{tag: (steps, values)} of a run, from all of its TensorBoard files; a resumed run has several."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = {}
    for path in sorted(run.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            points.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return {tag: np.transpose(of_tag) for tag, of_tag in points.items()}


def mean_between(points, first, last):
    """Mean of the values whose steps are in [first, last]; NaN without any."""
    steps, values = points
    inside = (steps >= first) & (steps <= last)
    return values[inside].mean() if inside.any() else np.nan


def column_of(config, span, env_ids, spans):
    """The setting, with what distinguishes its columns."""
    words = [config["exp_name"]]
    if len(env_ids) > 1:
        words.append(config["env_id"])
    if len(spans) > 1:
        words.append(f"{span[0]:,} to {span[1]:,}")
    return " ".join(words)


def main(args):
    if not args.runs:
        collect.exit_with_error("--runs needs at least one folder")
    for first, last in args.steps:
        if not 0 <= first <= last:
            collect.exit_with_error(f"--steps must be 0 <= first <= last, got {first} and {last}")
    configs = {}
    for run in args.runs:
        try:
            config = json.loads((run / "config.json").read_text())
            configs[run] = {name: config[name] for name in ("exp_name", "env_id")}
        except (OSError, ValueError, KeyError) as error:
            collect.exit_with_error(f"{run} is not the folder of a run: {error}")
    env_ids = {config["env_id"] for config in configs.values()}
    columns = {}  # {title: {tag: means of its runs}}
    for run, config in configs.items():
        metrics = read_metrics(run)
        for span in args.steps:
            column = columns.setdefault(column_of(config, span, env_ids, args.steps), {tag: [] for tag in TAGS})
            for tag in TAGS:
                mean = mean_between(metrics[tag], *span) if tag in metrics else np.nan
                if np.isnan(mean):
                    collect.exit_with_error(f"{run} has no {tag} between the steps {span[0]} and {span[1]}")
                column[tag].append(mean)
    rows = []
    for tag in TAGS:
        means = {title: np.mean(column[tag]) for title, column in columns.items()}
        rows.append({"metric": tag, **{title: f"{mean:.3g}" for title, mean in means.items()}})
    collect.write(args.csv, rows)
    print(collect.markdown(args.csv))


if __name__ == "__main__":
    main(tyro.cli(MetricsArgs, description=__doc__))
