"""The policy analysis of the SOM paper's Section 5.1 (Figures 3, 4, 10-12; Appendices D and E) from two checkpoints.

    python benchmark/policy_analysis.py --som runs/SOM_RUN --mfp runs/MFP_RUN --out analysis

Both are runs of one environment; their newest checkpoints are read. SOM's may be of the JAX script: of several seeds
the one whose folder is given, or --som-seed. SOM's critic, as SOM acts by it, judges the actions of both.
Written are box_plots.png, tsne.png and policy_analysis.json with the numbers of both. Without --mfp there are no
pictures, only the spread.

- Box plots (Appendix D): SOM acts for 800 steps; in 50 of the states met, each policy proposes 32 actions, and the mean
  and the std of their Q are one point of a box. (Figure 3's caption says 1000 actions: --num-candidates.)
- t-SNE (Appendix E): in 5 consecutive states from a reset, 100 actions of each policy, all in one embedding. The heat
  map is a Gaussian kernel density weighted by Q, less the lowest Q in that state. So it is hot where actions are many,
  not only where they are good, and t-SNE shows tight clusters as wide as loose ones: the JSON also has mean Q and the
  spread of the actions themselves.
- The spread, taken apart (not in the paper): in the states of the box plots, and from one noise, SOM's actions in one
  step; its network in more steps; the probability-flow ODE of the field that it is regressed on, with the run's K and
  with K = 100; an ascent of Q from the one-step actions, and from uniform ones; uniform actions; MFP's.
  Wide in one step and tight in 16: the one-step fit is. Wide in 16 and tight by the ODE: the regression is.
  Wide by the ODE: with the run's K alone its estimate, with both the field. Ascents that end in unlike Q: Q has many
  maxima. Tight in one step alone: the network is no flow.
"""

import csv
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import collect

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

JAX_CHECKPOINT_FORMAT = "som_continuous_action_jax.py, checkpoints of version 4"
NETWORK_STEPS = (1, 2, 4, 16)
MANY_MC_SAMPLES = 100  # the paper's K


@dataclass
class AnalysisArgs:
    som: Path
    """run folder of SOM, or a checkpoint in it, of either script"""
    out: Path
    """folder for the pictures and the JSON"""
    mfp: Path | None = None
    """run folder of MFP, or a checkpoint in it, of the same environment"""
    som_seed: int | None = None
    """of a JAX run of several seeds, the one to analyse; by default that of the folder"""
    csv: Path | None = None
    """table of spreads, to which this run's is added"""
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
    ode_steps: int = 64
    """Euler steps of the probability-flow ODE"""
    ascent_steps: int = 50
    """steps of the ascent of Q"""
    ascent_step: float = 0.1
    """length of the first of them, RMS over the action's coordinates"""


def load_agent(script, path):
    """The agent of a run's newest checkpoint, whose global_step is the checkpoint's."""
    try:
        checkpoint = script.load_checkpoint(path)
    except ValueError as error:  # one of the other script, too
        som.exit_with_error(str(error))
    args = replace(script.Args(**checkpoint["args"]), compile=False)
    low, _, _ = checkpoint["action_box"]
    agent = script.Agent(args, checkpoint["obs_dim"], len(low), torch.device("cpu"))
    agent.load_state_dict(checkpoint["agent"])
    agent.global_step = checkpoint["global_step"]
    return agent


def load_som(path, seed=None):
    """SOM's agent, of a run of either script."""
    folder, seed_of_folder = find_jax_run(path)
    archives = [path] if path.suffix == ".npz" else sorted(folder.glob("checkpoint_*.npz"))
    if archives:
        return load_jax_agent(archives[-1], seed_of_folder if seed is None else seed)
    agent = load_agent(som, path)
    if seed not in (None, agent.args.seed):
        som.exit_with_error(f"--som-seed must be {agent.args.seed}, the only one in {path}, got {seed}")
    return agent


def find_jax_run(path):
    """The folder of a JAX run's checkpoints, its first seed's; and the seed whose folder path is, if one tells."""
    config_file = path / "config.json"
    if not config_file.exists():
        return path, None
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        som.exit_with_error(f"{config_file} cannot be used: {error}")
    if any(path.glob("checkpoint_*.npz")) or "first_folder" not in config:
        return path, config.get("seed")
    return path.resolve().with_name(config["first_folder"]), config["seed"]


def load_jax_agent(path, seed=None):
    """One seed of a JAX run as an agent of the PyTorch script; by default the first. JAX is not needed."""
    try:
        with np.load(path) as file:  # it compares checksums, and refuses pickled objects
            arrays = dict(file)
        checkpoint = json.loads(str(arrays.pop("entries", "{}")))
        if checkpoint.get("format") != JAX_CHECKPOINT_FORMAT:
            raise ValueError(f"it is not of {JAX_CHECKPOINT_FORMAT}")
    except Exception as error:
        som.exit_with_error(f"{path} cannot be used: {error}")
    trained_with = checkpoint["args"]
    num_seeds = trained_with.pop("num_seeds")
    first_seed = trained_with["seed"]
    seed = first_seed if seed is None else seed
    last_seed = first_seed + num_seeds - 1
    if not first_seed <= seed <= last_seed:
        som.exit_with_error(f"--som-seed must be in [{first_seed}, {last_seed}], the seeds in {path}, got {seed}")
    args = som.Args(**trained_with | {"seed": seed, "compile": False})
    low, _, _ = checkpoint["action_box"]
    agent = som.Agent(args, checkpoint["obs_dim"], len(low), torch.device("cpu"))
    agent.load_state_dict(to_torch(arrays, seed - first_seed, agent.state_dict()))
    agent.global_step = checkpoint["global_step"]
    return agent


def to_torch(arrays, k, state_dict):
    """The arrays of seed number k, such as .critic[0][1], by the names of a state_dict, such as critic.biases.0."""
    converted = {}
    for name, tensor in state_dict.items():
        owner, *rest = name.split(".")
        if rest == ["frequencies"]:  # constants, which the JAX script makes anew in every call
            converted[name] = tensor
        elif rest:
            kind, layer = rest
            number = ("weights", "biases").index(kind)
            converted[name] = torch.tensor(arrays[f".{owner}[{layer}][{number}]"][k])
        else:
            converted[name] = torch.tensor(arrays[f".{owner}"][k])
    return converted


def rollout(agent, steps, seed):
    """The states in which the agent acts, (steps, O); an episode that ends is followed by another."""
    env = som.make_env(agent.args.env_id)
    states = np.zeros((steps, *env.observation_space.shape), np.float32)
    obs, _ = env.reset(seed=seed)
    for step in range(steps):
        states[step] = obs
        actions, _ = agent.act(torch.from_numpy(states[step : step + 1]))
        obs, _, terminated, truncated, _ = env.step(som.to_box(actions[0].numpy(), env.action_space))
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()
    return torch.from_numpy(states)


def candidates_of(agent, obs, num_candidates):
    """A policy's actions (S, N, A) in states (S, O), as it proposes them when it acts."""
    trained_with = agent.args
    agent.args = replace(trained_with, best_of_n=num_candidates)
    _, candidates = agent.act(obs)
    agent.args = trained_with
    return candidates


@torch.no_grad()
def propose(agents, obs, num_candidates):
    """Each policy's actions (S, N, A) in states (S, O), and what SOM's critic says of them (S, N)."""
    proposals = {}
    for name, agent in agents.items():
        candidates = candidates_of(agent, obs, num_candidates)
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


def schedule(t, args):
    """The run's, as in som.actor_loss."""
    if args.reference != "uniform":
        return som.cosine_schedule(t)
    if args.sde == "vp":
        return som.vp_schedule(t, args.beta_min, args.beta_max)
    return som.ve_schedule(t)


def velocity(q_fn, obs, a_t, t, mc_eps, alpha, args):
    """What som.actor_loss regresses u(a_t, t, t, s) on (B, A), and the logits alpha Q (B, K).

    a_t: (B, A). t: (B, 1). mc_eps: (B, K, A) normal.
    """
    mu, sigma, f, g2 = schedule(t, args)
    inputs = (q_fn, obs, a_t, mu, sigma, mc_eps, alpha)
    if args.reference == "box" and args.climb_steps > 0:
        score, logits = som.estimate_peak_score(*inputs, args.climb_steps, args.q_norm)
    elif args.reference == "box":
        score, logits = som.estimate_box_score(*inputs, args.q_norm)
    else:
        score, logits = som.estimate_score(*inputs, args.reference, args.q_norm)
    score_scale = args.score_scale if args.reference == "uniform" else None
    return som.pf_ode_velocity(a_t, score, f, g2, score_scale), logits


def mc_noise(B, K, A, kind):
    """The noise of the score (B, K, A), as in som.Agent.update_actor. The lattice of a JAX run has other points."""
    if kind == "normal":
        return torch.randn(B, K, A)
    points = torch.quasirandom.SobolEngine(A, scramble=True, seed=0).draw(K)
    return som.lattice_noise(points, torch.rand(B, 1, A))


def q_divisor(agent, pool, K, num_updates=20):
    """som.q_scale, which divides Q, in updates on the states that SOM meets: one number.

    It is a mean over all times. In an ODE all candidates have one time, and would have a divisor of their own, which
    is small near t = 0, where the samples are close together.
    """
    of_samples = replace(agent.args, q_norm=None, climb_steps=0)
    divisors = []
    for _ in range(num_updates):
        obs = pool[torch.randint(len(pool), (agent.args.batch_size,))]
        actions, _ = agent.act(obs, explore=True)  # what the replay buffer gets in these states
        _, t = som.sample_r_t(torch.rand(len(obs), 2))
        mu, sigma, _, _ = schedule(t, agent.args)
        a_t = mu * actions + sigma * torch.randn_like(actions)
        eps = mc_noise(len(obs), K, agent.act_dim, agent.args.mc_noise)
        _, q = velocity(agent.score_q_fn, obs, a_t, t, eps, 1.0, of_samples)  # with alpha = 1 the logits are Q
        divisors.append(float(som.q_scale(q, agent.args.q_norm)))
    return np.mean(divisors)


def follow(u_fn, a_t, num_steps):
    """Noise at t = 1 taken to t = 0 by a_r = a_t - (t - r) u_fn(a_t, r, t), into the box as SOM's actions are."""
    times = torch.linspace(1, 0, num_steps + 1).tolist()
    for time, next_time in pairwise(times):
        t = torch.full_like(a_t[..., :1], time)
        r = torch.full_like(t, next_time)
        a_t = a_t - (t - r) * u_fn(a_t, r, t)
    return a_t.clamp(-1, 1)


def pf_ode(agent, obs, noise, pool, K, num_steps):
    """Actions (S, N, A) at the end of the probability-flow ODE of the field that the actor is regressed on.

    The Monte-Carlo noise is new in every step: the regression learns the field's mean over it.
    """
    without_norm = replace(agent.args, q_norm=None)
    alpha = agent.args.inverse_temperature / agent.log_lambda.exp() / q_divisor(agent, pool, K)

    def u_fn(a_t, r, t):
        eps = mc_noise(*a_t.shape[:1], K, agent.act_dim, agent.args.mc_noise)
        v, _ = velocity(agent.score_q_fn, states, a_t, t, eps, alpha, without_norm)
        return v

    actions = []
    for i in range(len(obs)):  # the samples of all states at once would take gigabytes
        states = obs[i].expand(noise.shape[1], -1)  # (N, O)
        actions.append(follow(u_fn, noise[i], num_steps))
    return torch.stack(actions)


def ascend(q_fn, obs, a, num_steps, step):
    """Each action (S, N, A) at the highest Q that it meets on its way up Q, inside the box.

    A step has this RMS over the action's coordinates; its length falls linearly to 0, so that it ends in a maximum.
    What pushes against a face of the box has no part in it.
    """

    def total_q(a):
        return q_fn(obs, a).sum()

    best = a
    best_q = q_fn(obs, a)
    for i in range(num_steps):
        gradient = torch.func.grad(total_q)(a)
        gradient = torch.where((a.abs() >= 1) & (a * gradient > 0), 0, gradient)
        length = gradient.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6
        a = (a + (1 - i / num_steps) * step * gradient / length).clamp(-1, 1)
        q = q_fn(obs, a)
        best = torch.where((q > best_q).unsqueeze(-1), a, best)
        best_q = torch.maximum(q, best_q)
    return best


@torch.no_grad()
def take_apart(agents, obs, pool, num_candidates, ode_steps, ascent_steps, ascent_step):
    """Actions (S, N, A) by the name of what proposes them in states (S, O)."""
    agent = agents["SOM"]
    noise = torch.randn(len(obs), num_candidates, agent.act_dim)  # shared by all that start from noise
    rows = {}
    for num_steps in NETWORK_STEPS:
        name = "one step" if num_steps == 1 else f"{num_steps} steps"
        rows[name] = follow(partial(agent.acting_actor, obs), noise, num_steps)
    for K in sorted({agent.args.num_mc_samples, MANY_MC_SAMPLES}):
        rows[f"PF-ODE, K = {K}"] = pf_ode(agent, obs, noise, pool, K, ode_steps)
    rows["uniform actions"] = 2 * torch.rand_like(noise) - 1
    for start in ("one step", "uniform actions"):
        rows[f"{start}, ascent"] = ascend(agent.q_fn, obs, rows[start], ascent_steps, ascent_step)
    if "MFP" in agents:
        rows["MFP, one step"] = candidates_of(agents["MFP"], obs, num_candidates)
    return rows


@torch.no_grad()
def spread(q_fn, obs, actions):
    """Means over the states (S, O) of what Q and the actions (S, N, A) are over a state's candidates."""
    q = q_fn(obs, actions)  # (S, N)
    numbers = {
        "mean of Q": q.mean(),
        "std of Q": q.std(dim=1, correction=0).mean(),
        "Q of the best": q.amax(dim=1).mean(),
        "std of a coordinate": actions.std(dim=1, correction=0).mean(),
        "share saturated": (actions.abs() > 0.99).float().mean(),
    }
    return {label: value.item() for label, value in numbers.items()}


def add_to_table(path, agent, rows):
    """Write the spreads of an agent's actions into the table, in place of older ones of this agent at this step."""
    args = agent.args
    run = {"env_id": args.env_id, "setting": args.exp_name, "seed": str(args.seed), "steps": str(agent.global_step)}
    kept = []
    if path.exists():
        with path.open() as file:
            kept = [row for row in csv.DictReader(file) if not run.items() <= row.items()]
    new = []
    for name, numbers in rows.items():
        new.append({**run, "actions": name, **{label: round(value, 3) for label, value in numbers.items()}})
    collect.write(path, kept + new)


def print_table(rows):
    width = max(len(name) for name in rows)
    labels = list(next(iter(rows.values())))
    print(" " * width, *labels, sep="  ")
    for name, numbers in rows.items():
        cells = [f"{numbers[label]:{len(label)}.3f}" for label in labels]
        print(f"{name:{width}}", *cells, sep="  ")


def check_args(args):
    """The agents; one line and exit code 2 where there is nothing to analyse."""
    lowest = {"seed": 0, "som_seed": 0, "num_candidates": 2, "tsne_candidates": 2}
    for name, value in vars(args).items():
        if isinstance(value, int) and value < lowest.get(name, 1):
            flag = name.replace("_", "-")
            som.exit_with_error(f"--{flag} must be >= {lowest.get(name, 1)}, got {value}")
    if not args.ascent_step > 0:
        som.exit_with_error(f"--ascent-step must be > 0, got {args.ascent_step}")
    if args.num_states > args.rollout_steps:
        som.exit_with_error("--num-states must be <= --rollout-steps")
    if args.out.exists() and not args.out.is_dir():
        som.exit_with_error(f"--out {args.out} is not a folder")
    if args.csv is not None and args.csv.exists() and not args.csv.is_file():
        som.exit_with_error(f"--csv {args.csv} is not a file")
    agents = {"SOM": load_som(args.som, args.som_seed)}
    if args.mfp is None:
        return agents
    agents["MFP"] = load_agent(mfp, args.mfp)
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
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    numbers = {
        "env_id": env_id,
        "options": options,
        "Q": f"SOM's critic, {acting.policy_q} of the twins, of rewards times {acting.reward_scale}",
    }
    if "MFP" in agents:
        for_boxes = propose(agents, pool[states], args.num_candidates)
        consecutive = rollout(agents["SOM"], args.tsne_steps, args.seed)
        for_tsne = propose(agents, consecutive, args.tsne_candidates)
        title = f"{env_id}, {args.num_states} states"
        numbers["box plots"] = box_plots(for_boxes, title, args.out / "box_plots.png")
        title = f"{env_id}, {args.tsne_steps} states"
        numbers["t-SNE"] = tsne_picture(for_tsne, title, args.seed, args.out / "tsne.png")
        for label, values in numbers["box plots"].items():
            print(f"{label:10} SOM {values['SOM']['mean']:.4g}, MFP {values['MFP']['mean']:.4g}")
    torch.manual_seed(args.seed)  # the same noise with MFP and without
    lengths = (args.ode_steps, args.ascent_steps, args.ascent_step)
    rows = take_apart(agents, pool[states], pool, args.num_candidates, *lengths)
    numbers["spread"] = {name: spread(agents["SOM"].q_fn, pool[states], actions) for name, actions in rows.items()}
    (args.out / "policy_analysis.json").write_text(json.dumps(numbers, indent=2))
    print_table(numbers["spread"])
    if args.csv is not None:
        add_to_table(args.csv, agents["SOM"], numbers["spread"])
    print(f"written to {args.out}")
