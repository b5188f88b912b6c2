"""The policy analysis of the SOM paper's Section 5.1 (Figures 3, 4, 10-12; Appendices D and E) from two checkpoints.

    python benchmark/policy_analysis.py --som runs/SOM_RUN --mfp runs/MFP_RUN --out analysis

Both are runs of one environment; their newest checkpoints are read. SOM's critic, as SOM acts by it, judges the actions
of both.
Written are box_plots.png, tsne.png and policy_analysis.json with the numbers of both.

- Box plots (Appendix D): SOM acts for 800 steps; in 50 of the states met, each policy proposes 32 actions, and the mean
  and the std of their Q are one point of a box. (Figure 3's caption says 1000 actions: --num-candidates.)
- t-SNE (Appendix E): in 5 consecutive states from a reset, 100 actions of each policy, all in one embedding. The heat
  map is a Gaussian kernel density weighted by Q, less the lowest Q in that state. So it is hot where actions are many,
  not only where they are good, and t-SNE shows tight clusters as wide as loose ones: the JSON also has mean Q and the
  spread of the actions themselves.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import mfp_continuous_action as mfp
import som_continuous_action as som

try:
    import matplotlib
    from scipy.stats import gaussian_kde
    from sklearn.manifold import TSNE
except ImportError as error:
    som.exit_with_error(f"{error}; pip install -r benchmark/requirements.txt")
matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class AnalysisArgs:
    som: Path
    """run folder of SOM, or a checkpoint in it"""
    mfp: Path
    """run folder of MFP, or a checkpoint in it, of the same environment"""
    out: Path
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


def load_agent(script, path):
    """The agent of a run's newest checkpoint."""
    try:
        checkpoint = script.load_checkpoint(path)
    except ValueError as error:  # one of the other script, too
        som.exit_with_error(str(error))
    args = replace(script.Args(**checkpoint["args"]), compile=False)
    low, _, _ = checkpoint["action_box"]
    agent = script.Agent(args, checkpoint["obs_dim"], len(low), torch.device("cpu"))
    agent.load_state_dict(checkpoint["agent"])
    return agent


def rollout(agent, steps, seed):
    """The states in which the agent acts, (steps, O); an episode that ends is followed by another."""
    env = som.make_training_env(agent.args.env_id)
    states = np.zeros((steps, *env.observation_space.shape), np.float32)
    obs, _ = env.reset(seed=seed)
    for step in range(steps):
        states[step] = obs
        actions, _ = agent.act(torch.from_numpy(states[step : step + 1]))
        obs, _, terminated, truncated, _ = env.step(actions[0].numpy())
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    return torch.from_numpy(states)


@torch.no_grad()
def propose(agents, obs, num_candidates):
    """Each policy's actions (S, N, A) in states (S, O), and what SOM's critic says of them (S, N)."""
    proposals = {}
    for name, agent in agents.items():
        trained_with = agent.args
        agent.args = replace(trained_with, best_of_n=num_candidates)
        _, candidates = agent.act(obs)
        agent.args = trained_with
        q = agents["SOM"].q_fn(obs, candidates)
        proposals[name] = (candidates.numpy(), q.numpy())
    return proposals


def summary(values):
    quartiles = np.percentile(values, [25, 50, 75]).tolist()
    return {"mean": float(values.mean()), "quartiles": quartiles, "values": values.tolist()}


def box_plots(proposals, title, path):
    """Mean and std of Q over each state's candidates, (S,), as boxes and as numbers."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), constrained_layout=True)
    reductions = {"mean of Q": np.mean, "std of Q": np.std}
    numbers = {}
    for axis, (label, reduce) in zip(axes, reductions.items(), strict=True):
        values = {name: reduce(q, axis=1) for name, (_, q) in proposals.items()}
        style = {"widths": 0.5, "patch_artist": True, "medianprops": {"color": "black"}}
        boxes = axis.boxplot([*values.values()], **style)
        for box, color in zip(boxes["boxes"], ("tab:orange", "lightgray"), strict=True):
            box.set_facecolor(color)
        axis.set_xticks([1, 2], [*values])
        axis.set_ylabel(f"{label} over a state's candidates")
        difference = values["SOM"] - values["MFP"]  # in the same state: most of a box's height is between states
        numbers[label] = {name: summary(of_policy) for name, of_policy in values.items()}
        numbers[label]["SOM - MFP"] = summary(difference)
        numbers[label]["share of states where SOM's is higher"] = float((difference > 0).mean())
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return numbers


def embed(proposals, seed):
    """All candidates of both policies in one t-SNE plane, (n, 2)."""
    actions = [candidates.reshape(-1, candidates.shape[-1]) for candidates, _ in proposals.values()]
    actions = np.concatenate(actions)
    perplexity = min(30.0, (len(actions) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="random", random_state=seed, n_jobs=1)
    return tsne.fit_transform(actions)


def heat_map(embedding, weights):
    """Coordinates (200,) and (200,), and the points' weighted density (200, 200) there."""
    low = embedding.min(axis=0)
    high = embedding.max(axis=0)
    margin = 0.08 * (high - low)
    x, y = np.linspace(low - margin, high + margin, 200).T
    grid = np.stack(np.meshgrid(x, y))  # (2, 200, 200)
    density = gaussian_kde(embedding.T, weights=weights)
    return x, y, density(grid.reshape(2, -1)).reshape(grid.shape[1:])


def tsne_picture(proposals, title, seed, path):
    """All candidates in one t-SNE plane, on the heat map of Q; numbers of each policy."""
    q_of_all = np.concatenate([q for _, q in proposals.values()], axis=1)  # (S, 2 N)
    lowest = q_of_all.min(axis=1, keepdims=True)
    advantage = np.concatenate([(q - lowest).ravel() for _, q in proposals.values()])
    embedding = embed(proposals, seed)
    x, y, heat = heat_map(embedding, advantage + 1e-6 * (1 + advantage.max()))

    figure, axis = plt.subplots(figsize=(6, 5), constrained_layout=True)
    image = axis.pcolormesh(x, y, heat, cmap="viridis", shading="auto", rasterized=True)
    axis.contour(x, y, heat, levels=8, colors="white", linewidths=0.5, alpha=0.6)
    points = dict(zip(proposals, np.split(embedding, 2), strict=True))
    style = {"s": 14, "edgecolors": "black", "linewidths": 0.3}
    axis.scatter(*points["MFP"].T, marker="^", c="darkgray", label="MFP", **style)
    axis.scatter(*points["SOM"].T, marker="o", c="white", label="SOM", **style)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(loc="upper right", facecolor="lightgray")
    figure.colorbar(image, ax=axis, label="kernel density weighted by Q", format="%.0e")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)

    median = np.median(q_of_all, axis=1, keepdims=True)
    numbers = {}
    for name, (candidates, q) in proposals.items():
        spread = candidates.std(axis=1).mean()
        saturated = np.abs(candidates) > 0.99
        numbers[name] = {
            "mean of Q": float(q.mean()),
            "share above the state's median Q": float((q > median).mean()),
            "std of an action coordinate over a state's candidates": float(spread),
            "share of saturated coordinates": float(saturated.mean()),
        }
    return numbers


def check_args(args):
    """Both agents; one line and exit code 2 where there is nothing to analyse."""
    lowest = {"seed": 0, "num_candidates": 2, "tsne_candidates": 2}
    for name, value in vars(args).items():
        if isinstance(value, int) and value < lowest.get(name, 1):
            flag = name.replace("_", "-")
            som.exit_with_error(f"--{flag} must be >= {lowest.get(name, 1)}, got {value}")
    if args.num_states > args.rollout_steps:
        som.exit_with_error("--num-states must be <= --rollout-steps")
    if args.out.exists() and not args.out.is_dir():
        som.exit_with_error(f"--out {args.out} is not a folder")
    agents = {"SOM": load_agent(som, args.som), "MFP": load_agent(mfp, args.mfp)}
    of_som = agents["SOM"].args.env_id
    of_mfp = agents["MFP"].args.env_id
    if of_som != of_mfp:
        som.exit_with_error(f"SOM was trained on {of_som}, MFP on {of_mfp}: give two runs of one environment")
    return agents


if __name__ == "__main__":
    args = tyro.cli(AnalysisArgs)
    agents = check_args(args)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    acting = agents["SOM"].args
    env_id = acting.env_id
    pool = rollout(agents["SOM"], args.rollout_steps, args.seed)
    states = np.random.default_rng(args.seed).choice(len(pool), args.num_states, replace=False)
    for_boxes = propose(agents, pool[states], args.num_candidates)
    consecutive = rollout(agents["SOM"], args.tsne_steps, args.seed)
    for_tsne = propose(agents, consecutive, args.tsne_candidates)
    options = {name: value if isinstance(value, int) else str(value) for name, value in vars(args).items()}
    numbers = {
        "env_id": env_id,
        "options": options,
        "Q": f"SOM's critic, {acting.policy_q} of the twins, of rewards times {acting.reward_scale}",
        "box plots": box_plots(for_boxes, f"{env_id}, {args.num_states} states", args.out / "box_plots.png"),
        "t-SNE": tsne_picture(for_tsne, f"{env_id}, {args.tsne_steps} states", args.seed, args.out / "tsne.png"),
    }
    (args.out / "policy_analysis.json").write_text(json.dumps(numbers, indent=2))
    for label, values in numbers["box plots"].items():
        print(f"{label:10} SOM {values['SOM']['mean']:.4g}, MFP {values['MFP']['mean']:.4g}")
    print(f"written to {args.out}")
