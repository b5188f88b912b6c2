"""Where the paper's field (Eq 8) ends, by w and beta: its PF-ODE on the eight-Gaussian bandit (Appendix F), 200 steps.

    python benchmark/beta_on_bandit.py --csv benchmark/results/beta_on_bandit.csv

No network is involved: what is measured is the field that the policy would be trained on, with the true reward as Q.
"""

import dataclasses
import math
import pathlib
import sys

import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import collect

import som_continuous_action as som

ANGLES = torch.arange(8) * math.pi / 4
CENTRES = math.sqrt(2) * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (8, 2)
WEIGHTS = torch.tensor([2.0, 1.0] * 4)
STD = 0.3


def mixture(a):
    return (WEIGHTS * torch.exp(-(a.unsqueeze(-2) - CENTRES).square().sum(-1) / (2 * STD**2))).sum(-1)


MAX_REWARD = mixture(CENTRES).max()


def reward(obs, a):
    """Rewards in [0, 1] of actions (B, N, 2)."""
    return mixture(a) / MAX_REWARD


@dataclasses.dataclass
class SweepArgs:
    csv: pathlib.Path
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
    torch.manual_seed(args.seed)
    a, dt = torch.randn(args.num_samples, 2), 1 / args.num_steps
    obs = torch.zeros(args.num_samples, 1)
    for step in range(args.num_steps, 0, -1):
        t = torch.full((args.num_samples, 1), step * dt)
        if w is None:
            mu, sigma, f, g2 = som.cosine_schedule(t)
        else:
            mu, sigma, f, g2 = som.vp_schedule(t, 0.1, beta_max)
        eps = torch.randn(args.num_samples, args.num_mc_samples, 2)
        reference = "prior" if w is None else "uniform"
        score, _ = som.estimate_score(reward, obs, a, mu, sigma, eps, args.alpha, reference, clip=False)
        a = a - dt * som.pf_ode_velocity(a, score, f, g2, w)
    return a


def main(args):
    rows = []
    settings = [(w, beta_max) for w in (5.0, 10.0, 25.0) for beta_max in (0.32, 1.0, 2.0, 5.0, 20.0)]
    for w, beta_max in [*settings, (None, None)]:
        a = end_points(args, w, beta_max)
        near = (a.unsqueeze(1) - CENTRES).norm(dim=-1) < 0.5  # (num_samples, 8)
        shares = near.float().mean(dim=0)
        row = {"w": w or "prior-matched", "beta_max": beta_max or "cosine"}
        row["reach"] = round(0.5 * w * (0.1 + 0.5 * (beta_max - 0.1)), 2) if w else ""
        row["mean_reward"] = round(reward(None, a.unsqueeze(1)).mean().item(), 3)
        row["high_modes"] = round(shares[::2].sum().item(), 3)
        row["smallest_high_mode"] = round(shares[::2].min().item(), 3)
        row["low_modes"] = round(shares[1::2].sum().item(), 3)
        row["std"] = round(a.std().item(), 2)
        rows.append(row)
        print(row)
    collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(SweepArgs))
