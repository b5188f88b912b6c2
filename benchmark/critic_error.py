"""The critic's error at the actions that a policy chooses: Q minus the discounted return that followed.

    python benchmark/critic_error.py --runs runs/RUN1 runs/RUN2 --csv benchmark/results/critic_error.csv

The policy acts as it does in evaluations, best of N without exploration, which is also the policy that the critic's
targets bootstrap from; with --target-smoothing they bootstrap from one with noise, whose return is lower.
Of a run of the JAX script with several seeds give one seed's folder: all are measured. A row also has what the
candidates are worth by the same critic, in the same states.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import collect
import numpy as np
import policy_analysis
import torch
import tyro
from policy_analysis import som


@dataclass
class CriticErrorArgs:
    runs: tuple[Path, ...]
    """run folders of SOM with checkpoints, of either script"""
    csv: Path
    """table to write"""
    num_episodes: int = 5
    """episodes of each seed"""
    seed: int = 1
    """seed of environment and noise"""


def discounted_returns(rewards, gamma):
    """sum_j gamma^j r_(i+j) from each step i on: (T,) of rewards (T,)."""
    returns = np.zeros(len(rewards))
    following = 0.0
    for i in reversed(range(len(rewards))):
        following = rewards[i] + gamma * following
        returns[i] = following
    return returns


def num_known(num_steps, terminated, gamma):
    """The first steps of an episode whose discounted return is known to 1 % of what constant rewards would give.

    All, if the episode has terminated. A time limit hides the rest.
    """
    if terminated:
        return num_steps
    hidden = math.ceil(math.log(0.01) / math.log(gamma)) if gamma > 0 else 1
    return max(num_steps - hidden, 0)


def play(agent, env, seed):
    """One episode: of each step what Q says of the chosen action, of the candidates, (T,); the discounted returns."""
    of_chosen, of_candidates, rewards = [], [], []
    obs, _ = env.reset(seed=seed)
    terminated = truncated = False
    while not (terminated or truncated):
        obs = torch.as_tensor(obs, dtype=torch.float32)[None]
        actions, candidates = agent.act(obs)
        with torch.no_grad():
            of_chosen.append(agent.q_fn(obs, actions[:, None]).item())
            of_candidates.append(agent.q_fn(obs, candidates).mean().item())
        obs, reward, terminated, truncated, _ = env.step(som.to_box(actions[0].numpy(), env.action_space))
        rewards.append(reward * agent.args.reward_scale)
    known = num_known(len(rewards), terminated, agent.args.gamma)
    returns = discounted_returns(np.array(rewards), agent.args.gamma)
    return np.array(of_chosen)[:known], np.array(of_candidates)[:known], returns[:known]


def measure(agent, num_episodes, seed):
    """The numbers of an agent's row."""
    torch.manual_seed(seed)
    env = som.make_env(agent.args.env_id)
    episodes = [play(agent, env, seed + i) for i in range(num_episodes)]
    env.close()
    of_chosen, of_candidates, returns = map(np.concatenate, zip(*episodes, strict=True))
    if not len(returns):
        som.exit_with_error(
            f"{agent.args.env_id} ends its episodes too early: with gamma {agent.args.gamma} no step's return is known"
        )
    error = of_chosen - returns
    return {
        "states": len(error),
        "discounted return": returns.mean(),
        "Q of the chosen": of_chosen.mean(),
        "mean error": error.mean(),
        "std of the error": error.std(),
        "mean Q of the candidates": of_candidates.mean(),
    }


def load_seeds(run):
    """The agents of all seeds that were trained in one process."""
    folder, _ = policy_analysis.find_jax_run(run)
    if not any(folder.glob("checkpoint_*.npz")):
        return [policy_analysis.load_som(run)]
    config = json.loads((folder / "config.json").read_text())
    seeds = range(config["seed"], config["seed"] + config["num_seeds"])
    return [policy_analysis.load_som(folder, seed) for seed in seeds]


def main(args):
    if not args.runs:
        som.exit_with_error("--runs needs at least one folder")
    if args.num_episodes < 1:
        som.exit_with_error(f"--num-episodes must be >= 1, got {args.num_episodes}")
    if args.seed < 0:
        som.exit_with_error(f"--seed must be >= 0, got {args.seed}")
    rows = []
    for agent in (agent for run in args.runs for agent in load_seeds(run)):
        trained_with = agent.args
        row = {
            "env_id": trained_with.env_id,
            "setting": trained_with.exp_name,
            "seed": trained_with.seed,
            "steps": agent.global_step,
            "N": trained_with.best_of_n,
        }
        for label, value in measure(agent, args.num_episodes, args.seed).items():
            row[label] = value if label == "states" else round(float(value), 2)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(CriticErrorArgs, description=__doc__))
