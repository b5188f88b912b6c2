"""The policy analysis of the SOM paper's Section 5.1 (Figures 3, 4, 10-12; Appendices D and E) from two checkpoints.

    python benchmark/policy_analysis.py --som runs/SOM_RUN --mfp runs/MFP_RUN --out analysis

Both are runs with --save-model, of one environment. SOM's critic, as SOM acts by it, judges the actions of both.
Written are box_plots.png, tsne.png and policy_analysis.json with the numbers of both.

- Box plots (Appendix D): SOM acts for 800 steps; in 50 of the states met, each policy proposes 32 actions, and the mean
  and the std of their Q are one point of a box. (Figure 3's caption says 1000 actions: --num-candidates.)
- t-SNE (Appendix E): in 5 consecutive states from a reset, 100 actions of each policy, all in one embedding. The heat
  map is a Gaussian kernel density weighted by Q, less the lowest Q in that state. So it is hot where actions are many,
  not only where they are good, and t-SNE shows tight clusters as wide as loose ones: the JSON also has mean Q and the
  spread of the actions themselves.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import mfp_continuous_action as mfp
import som_continuous_action as som

try:
    import matplotlib
    from scipy.stats import gaussian_kde
    from sklearn.manifold import TSNE
except ImportError as error:
    som.fail(f"{error}; pip install -r benchmark/requirements.txt")
matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass
class AnalysisArgs:
    som: pathlib.Path
    """run folder of SOM with model.pt"""
    mfp: pathlib.Path
    """run folder of MFP with model.pt, of the same environment"""
    out: pathlib.Path
    """folder for the pictures and the JSON"""
    seed: int = 1
    """seed of environment, noise, sampled states and embedding"""
    rollout_steps: int = 800
    """steps of SOM whose states are the pool of the box plots"""
    num_states: int = 50
    """states in a box"""
    num_candidates: int = 32
    """actions of each policy in such a state"""
    tsne_steps: int = 5
    """consecutive states of the t-SNE picture"""
    tsne_candidates: int = 100
    """actions of each policy in such a state"""


def load_agent(script, run, only_here):
    """The agent of a run as it was at its end; only_here: a flag that tells the script's runs from the other's."""
    path = run / "model.pt"
    if not path.is_file():
        som.fail(f"{path} is missing: train with --save-model and give the run's folder")
    try:
        model = torch.load(path, weights_only=True, map_location="cpu")
        config = model["config"]
        if only_here not in config:
            som.fail(f"{path} is not of {script.__name__}.py")
        fields = {field.name for field in dataclasses.fields(script.Args)}
        known = {name: value for name, value in config.items() if name in fields}
        args = script.Args(**known | {"cuda": False, "compile": False})
        env = script.make_env(args.env_id)
        agent = script.Agent(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
        env.close()
        agent.acting_actor.load_state_dict(model["actor"])
        agent.critic.load_state_dict(model["critic"])
    except Exception as error:
        som.fail(f"{path} is no checkpoint of {script.__name__}.py: {' '.join(str(error).split())[:200]}")
    return agent


def as_tensor(obs):
    return torch.as_tensor(np.asarray(obs), dtype=torch.float32)


def rollout(agent, steps, seed):
    """The states in which the agent acts, (steps, O); an episode that ends is followed by another."""
    env, states = som.make_env(agent.args.env_id), []
    obs, _ = env.reset(seed=seed)
    for _ in range(steps):
        states.append(obs)
        a, _ = agent.act(as_tensor(obs[None]))
        obs, _, terminated, truncated, _ = env.step(a[0].numpy())
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    return as_tensor(states)


@torch.no_grad()
def propose(agents, obs, num_candidates):
    """Each policy's actions (S, N, A) in states (S, O), and what SOM's critic says of them (S, N)."""
    proposals = {}
    for name, agent in agents.items():
        agent.args.best_of_n, kept = num_candidates, agent.args.best_of_n
        _, candidates = agent.act(obs)
        agent.args.best_of_n = kept
        proposals[name] = candidates.numpy(), agents["SOM"].q_fn(obs, candidates).numpy()
    return proposals


def summary(values):
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"mean": float(values.mean()), "quartiles": [low, median, high], "values": values.tolist()}


def box_plots(proposals, title, path):
    """Mean and std of Q over each state's candidates, (S,), as boxes and as numbers."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), constrained_layout=True)
    numbers = {}
    for axis, (label, reduce) in zip(axes, {"mean of Q": np.mean, "std of Q": np.std}.items(), strict=True):
        values = {name: reduce(q, axis=1) for name, (_, q) in proposals.items()}
        boxes = axis.boxplot([*values.values()], widths=0.5, patch_artist=True, medianprops={"color": "black"})
        for box, color in zip(boxes["boxes"], ("tab:orange", "lightgray"), strict=True):
            box.set_facecolor(color)
        axis.set_xticks([1, 2], [*values])
        axis.set_ylabel(f"{label} over a state's candidates")
        difference = values["SOM"] - values["MFP"]  # in the same state: most of a box's height is between states
        numbers[label] = {name: summary(x) for name, x in values.items()} | {"SOM - MFP": summary(difference)}
        numbers[label]["share of states where SOM's is higher"] = float((difference > 0).mean())
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return numbers


def tsne_picture(proposals, title, seed, path):
    """All candidates in one t-SNE plane, on the heat map of Q."""
    actions = np.concatenate([candidates.reshape(-1, candidates.shape[-1]) for candidates, _ in proposals.values()])
    lowest = np.minimum(*(q.min(axis=1, keepdims=True) for _, q in proposals.values()))  # of each state, (S, 1)
    advantage = np.concatenate([(q - lowest).ravel() for _, q in proposals.values()])
    perplexity = min(30.0, (len(actions) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="random", random_state=seed, n_jobs=1).fit_transform(actions)
    points = dict(zip(proposals, np.split(embedding, 2), strict=True))

    low, high = embedding.min(axis=0), embedding.max(axis=0)
    margin = 0.08 * (high - low)
    x, y = (np.linspace(*bounds, 200) for bounds in zip(low - margin, high + margin, strict=True))
    grid = np.stack(np.meshgrid(x, y))  # (2, 200, 200)
    density = gaussian_kde(embedding.T, weights=advantage + 1e-6 * (1 + advantage.max()))
    heat = density(grid.reshape(2, -1)).reshape(grid.shape[1:])

    figure, axis = plt.subplots(figsize=(6, 5), constrained_layout=True)
    image = axis.pcolormesh(x, y, heat, cmap="viridis", shading="auto", rasterized=True)
    axis.contour(x, y, heat, levels=8, colors="white", linewidths=0.5, alpha=0.6)
    axis.scatter(*points["MFP"].T, s=14, marker="^", c="darkgray", edgecolors="black", linewidths=0.3, label="MFP")
    axis.scatter(*points["SOM"].T, s=14, marker="o", c="white", edgecolors="black", linewidths=0.3, label="SOM")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(loc="upper right", facecolor="lightgray")
    figure.colorbar(image, ax=axis, label="kernel density weighted by Q", format="%.0e")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)

    best = np.median(np.concatenate([q for _, q in proposals.values()], axis=1), axis=1, keepdims=True)
    return {
        name: {
            "mean of Q": float(q.mean()),
            "share above the state's median Q": float((q > best).mean()),
            "std of an action coordinate over a state's candidates": float(candidates.std(axis=1).mean()),
            "share of saturated coordinates": float((np.abs(candidates) > 0.99).mean()),
        }
        for name, (candidates, q) in proposals.items()
    }


def check_args(args):
    """Both agents; one line and exit code 2 where there is nothing to analyse."""
    for field in dataclasses.fields(args):
        value, lowest = getattr(args, field.name), {"seed": 0, "num_candidates": 2, "tsne_candidates": 2}
        if field.type is int and value < lowest.get(field.name, 1):
            som.fail(f"--{field.name.replace('_', '-')} must be >= {lowest.get(field.name, 1)}, got {value}")
    if args.num_states > args.rollout_steps:
        som.fail("--num-states must be <= --rollout-steps")
    if args.out.exists() and not args.out.is_dir():
        som.fail(f"--out {args.out} is not a folder")
    agents = {"SOM": load_agent(som, args.som, "score_scale"), "MFP": load_agent(mfp, args.mfp, "ivc_coef")}
    env_ids = [agent.args.env_id for agent in agents.values()]
    if env_ids[0] != env_ids[1]:
        som.fail(f"SOM was trained on {env_ids[0]}, MFP on {env_ids[1]}: give two runs of one environment")
    return agents


if __name__ == "__main__":
    args = tyro.cli(AnalysisArgs)
    agents = check_args(args)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    env_id = agents["SOM"].args.env_id
    pool = rollout(agents["SOM"], args.rollout_steps, args.seed)
    states = np.random.default_rng(args.seed).choice(len(pool), args.num_states, replace=False)
    boxes = propose(agents, pool[states], args.num_candidates)
    few = propose(agents, rollout(agents["SOM"], args.tsne_steps, args.seed), args.tsne_candidates)
    acting = agents["SOM"].args
    options = {name: value if isinstance(value, int) else str(value) for name, value in vars(args).items()}
    numbers = {
        "env_id": env_id,
        "options": options,
        "Q": f"SOM's critic, {acting.policy_q} of the twins, of rewards times {acting.reward_scale}",
        "box plots": box_plots(boxes, f"{env_id}, {args.num_states} states", args.out / "box_plots.png"),
        "t-SNE": tsne_picture(few, f"{env_id}, {args.tsne_steps} states", args.seed, args.out / "tsne.png"),
    }
    (args.out / "policy_analysis.json").write_text(json.dumps(numbers, indent=2))
    for label, values in numbers["box plots"].items():
        print(f"{label:10} SOM {values['SOM']['mean']:.4g}, MFP {values['MFP']['mean']:.4g}")
    print(f"written to {args.out}")
