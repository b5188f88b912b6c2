"""Where the paper's field (Eq 8) ends, by w and beta: its PF-ODE on the eight-Gaussian bandit (Appendix F), 200 steps.

    python benchmark/beta_on_bandit.py --csv benchmark/results/beta_on_bandit.csv

No network is involved: what is measured is the field that the policy would be trained on, with the true reward as Q.
"""

import math
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import collect

import som_continuous_action as som

ANGLES = torch.arange(8) * math.pi / 4
CENTRES = math.sqrt(2) * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (8, 2)
WEIGHTS = torch.tensor(4 * [2.0, 1.0])
STD = 0.3
RADIUS = 0.5  # an action counts for a mode within this distance of its centre


def mixture(a):
    distance = (a.unsqueeze(-2) - CENTRES).norm(dim=-1) / STD
    return (WEIGHTS * torch.exp(-0.5 * distance.square())).sum(dim=-1)


MAX_REWARD = mixture(CENTRES).max()


def reward(obs, a):
    """Rewards in [0, 1] of actions (B, N, 2)."""
    return mixture(a) / MAX_REWARD


@dataclass
class SweepArgs:
    csv: Path
    """table to write"""
    alpha: float = 10.0
    """inverse temperature"""
    num_samples: int = 2000
    """trajectories"""
    num_mc_samples: int = 100
    """Monte-Carlo samples of the score"""
    num_steps: int = 200
    """Euler steps of the PF-ODE"""
    seed: int = 1
    """seed of the noise"""


def end_points(args, w, beta_max):
    """Ends (num_samples, 2) of the PF-ODE; without w, of the prior-matched field on the cosine schedule."""
    torch.manual_seed(args.seed)
    a = torch.randn(args.num_samples, 2)
    obs = torch.zeros(args.num_samples, 1)
    for step in range(args.num_steps, 0, -1):
        t = torch.full((args.num_samples, 1), step / args.num_steps)
        if w is None:
            reference = "prior"
            mu, sigma, f, g2 = som.cosine_schedule(t)
        else:
            reference = "uniform"
            mu, sigma, f, g2 = som.vp_schedule(t, 0.1, beta_max)
        eps = torch.randn(args.num_samples, args.num_mc_samples, 2)
        path = (a, mu, sigma, eps)
        score, _ = som.estimate_score(reward, obs, *path, args.alpha, reference, clip=False)
        a = a - som.pf_ode_velocity(a, score, f, g2, w) / args.num_steps
    return a


def row_of(w, beta_max, a):
    """A row of the table for the ends a (num_samples, 2)."""
    is_near = (a.unsqueeze(1) - CENTRES).norm(dim=-1) < RADIUS  # (num_samples, 8)
    shares = is_near.float().mean(dim=0)
    high_shares = shares[::2]
    low_shares = shares[1::2]
    row = {"w": "prior-matched", "beta_max": "cosine", "reach": ""}
    if w is not None:
        mean_beta = 0.1 + 0.5 * (beta_max - 0.1)
        row = {"w": w, "beta_max": beta_max, "reach": round(0.5 * w * mean_beta, 2)}
    row["mean_reward"] = round(reward(None, a).mean().item(), 3)
    row["high_modes"] = round(high_shares.sum().item(), 3)
    row["smallest_high_mode"] = round(high_shares.min().item(), 3)
    row["low_modes"] = round(low_shares.sum().item(), 3)
    row["std"] = round(a.std().item(), 2)
    return row


def main(args):
    rows = []
    settings = list(product((5.0, 10.0, 25.0), (0.32, 1.0, 2.0, 5.0, 20.0)))
    for w, beta_max in [*settings, (None, None)]:
        rows.append(row_of(w, beta_max, end_points(args, w, beta_max)))
        print(rows[-1])
    collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(SweepArgs))
