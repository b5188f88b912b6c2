"""How far the estimated velocities are from the true ones, on a target that quadrature knows.

    python benchmark/field_error.py --csv benchmark/results/field_error.csv

Q is a sum over the coordinates of an action, each with two hills, the lower one at a face of the box. So p_t and its
score are products, and a grid in one dimension gives them. All estimates take the cosine path and K evaluations of Q
and its gradient. The table has the mean length of the error over that of the true velocity. Each estimate is measured
against its own target: exp(alpha Q) inside the box, N(0, I) exp(alpha Q), or exp(alpha Q) with the constant Q outside
of the box that the clip of Eq 5's samples means. The peaks are no estimate at moderate alpha, but its limit at large
alpha: a quarter of the samples, which take three steps.
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

# the references' own targets, on a grid this wide
HALF_WIDTHS = {"uniform": 400.0, "prior": 8.0, "box": 1.0}
# box: the mixed estimate as in the script, each of its two parts, and the peaks
LOCAL_VARIANCES = {"mixed": 0.1, "weighted mean": 0.0, "slope": math.inf}
ESTIMATES = [("uniform", "gradient of log sum exp"), ("prior", "gradient of log sum exp")]
ESTIMATES += [("box", estimate) for estimate in (*LOCAL_VARIANCES, "peaks")]
CLIMB_STEPS = 3


@dataclass
class ErrorArgs:
    csv: Path
    """table to write"""
    act_dim: int = 6
    """coordinates of an action (A)"""
    num_states: int = 256
    """noised actions that the error is the mean of"""
    num_mc_samples: tuple[int, ...] = (16,)
    """Monte-Carlo samples of the score (K)"""
    alphas: tuple[float, ...] = (2.0, 10.0, 50.0)
    """inverse temperatures"""
    times: tuple[float, ...] = (0.05, 0.2, 0.5, 0.8)
    """times t"""
    seed: int = 1
    """seed of the noise"""


def q_of_coordinate(a):
    return torch.sin(3 * a) + 0.3 * a


def q_fn(obs, a):
    return q_of_coordinate(a).sum(dim=-1)


def true_velocity(reference, a_t, mu, sigma, f, g2, alpha, num_points=2001):
    """Velocity (B, A) of the probability-flow ODE, by the mean of a_0 given a_t on a grid."""
    # the grid follows the proposals, which are narrow at small t: they are the same for every coordinate
    if reference == "prior":
        center, std = mu * a_t, sigma
    else:
        center, std = a_t / mu, sigma / mu
    half_width = HALF_WIDTHS[reference]
    low = (center - 8 * std).clamp(-half_width, half_width).unsqueeze(-1)  # (B, A, 1)
    high = (center + 8 * std).clamp(-half_width, half_width).unsqueeze(-1)
    share = (torch.arange(num_points) + 0.5) / num_points
    a_0 = low + (high - low) * share  # (B, A, num_points)
    log_weights = alpha * q_of_coordinate(a_0.clamp(-1, 1))
    log_weights = log_weights - 0.5 * ((a_0 - center.unsqueeze(-1)) / std.unsqueeze(-1)).square()
    weights = log_weights.softmax(dim=-1)
    mean = (weights * a_0).sum(dim=-1)
    return som.pf_ode_velocity(a_t, (mu * mean - a_t) / sigma**2, f, g2)


def estimated_velocity(reference, estimate, a_t, mu, sigma, f, g2, mc_eps, alpha):
    inputs = (q_fn, None, a_t, mu, sigma, mc_eps, alpha)
    if estimate == "peaks":
        score, _ = som.estimate_peak_score(*inputs, CLIMB_STEPS)
    elif reference == "box":
        score, _ = som.estimate_box_score(*inputs, local_variance=LOCAL_VARIANCES[estimate])
    else:
        score, _ = som.estimate_score(*inputs, reference)
    return som.pf_ode_velocity(a_t, score, f, g2)


def noise_of(kind, B, K, A):
    if kind == "normal":
        return torch.randn(B, K, A)
    points = torch.quasirandom.SobolEngine(A, scramble=True, seed=0).draw(K).to(torch.float64)
    return som.lattice_noise(points, torch.rand(B, 1, A))


def main(args):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    B, A = args.num_states, args.act_dim
    # as in a replay buffer: half of the coordinates at the box's faces
    actions = (4 * torch.rand(B, A) - 2).clamp(-1, 1)
    eps = torch.randn(B, A)
    rows = []
    kinds = ("normal", "lattice")
    for alpha, K, (reference, estimate), kind in product(args.alphas, args.num_mc_samples, ESTIMATES, kinds):
        if estimate == "peaks":
            K = K // (1 + CLIMB_STEPS)
        row = {"alpha": alpha, "K": K, "reference": reference, "estimate": estimate, "noise": kind}
        for t in args.times:
            mu, sigma, f, g2 = som.cosine_schedule(torch.full((B, 1), t))
            path = (mu * actions + sigma * eps, mu, sigma, f, g2)
            exact = true_velocity(reference, *path, alpha)
            v = estimated_velocity(reference, estimate, *path, noise_of(kind, B, K, A), alpha)
            error = (v - exact).norm(dim=1).mean() / exact.norm(dim=1).mean()
            row[f"t = {t}"] = round(error.item(), 2)
        rows.append(row)
        print(*row.values(), flush=True)
    torch.set_default_dtype(torch.float32)
    collect.write(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(ErrorArgs))
