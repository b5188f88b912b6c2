# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "numpy>=2", "tyro>=1,<2", "tqdm>=4.66", "matplotlib>=3.8", "scipy>=1.11"]
# ///
"""SOM and MFP (https://arxiv.org/abs/2605.23365 and 2602.13810) on two-dimensional bandits, in one file.

Run it: python som_bandit_2d.py --task eight-gaussians
SOM: the score of p_0 ~ exp(alpha Q), diffused, is estimated from Q; its probability-flow ODE is
distilled into one step by MeanFlow. MFP: the same network imitates the best of its own N actions.
Both are trained online, as in RL: actions come from the policy, the reward of each is queried once,
and a critic is regressed on these rewards (--oracle-critic: the true reward in its place). The
paper's Figures 5, 6 and 13 to 18 go to runs/<run name>/, with their numbers in results.json. The
functions of the method are those of the other scripts, to the letter.

Conventions: t = 1 is noise, t = 0 is the action, 0 <= r <= t <= 1; alpha is an INVERSE temperature.
Actions live in [-BOX, BOX]^2. A bandit has no state: the networks get a zero, (B, 1).
Shapes: B states, N actions in each of them, 2 coordinates: (B, N, 2); without states (M, 2).
"""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

plt.switch_backend("Agg")  # draws without a display
BOX = 2.5  # half the width of the box of actions
RADIUS = 0.5  # an action counts for a mode within this distance of a centre (Appendix H.3)
NUM_SAMPLES = 2000  # one-step actions behind every number
NUM_ODE_STEPS = 100  # Euler steps of the probability-flow ODE
FILM_SHARES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)  # of the training, at the frames of training.png
AXIS = torch.linspace(-BOX, BOX, 81)
GRID = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="xy"), dim=-1)  # (81, 81, 2)


@dataclass
class Args:
    exp_name: str = "som_bandit_2d"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise and rewards
    task: Literal["eight-gaussians", "two-moons", "checkerboard"] = "eight-gaussians"  # the reward
    oracle_critic: bool = False  # the true reward in the critic's place, hence no error of the critic
    reward_noise: float = 0.0  # std of the noise on each reward (Appendix H.1), adds robustness.png
    bump_scale: float = 0.0  # height of a bump in the reward at 0 (Appendix H.2, c); robustness.png too
    bump_std: float = 0.5  # width of the bump (Appendix H.2, sigma)
    # Algorithm specific arguments
    total_updates: int = 2_000  # updates of each policy
    num_envs: int = 64  # actions tried before each update, one reward query each
    learning_starts: int = 2_000  # uniform random actions before learning
    batch_size: int = 256  # actions in an update (B)
    policy_lr: float = 4e-3  # learning rate of the policy, falls linearly to 0
    q_lr: float = 2e-2  # learning rate of the critic, falls linearly to 0
    q_updates: int = 4  # updates of the critic per policy update, each on a batch of its own
    hidden_dim: int = 128  # width of the policy's 3 hidden layers
    q_hidden_dim: int = 32  # width of the critic's 2 hidden layers
    num_frequencies: int = 1  # w of sin and cos of w t and w (t - r), from 1 to 3; one alone has 1 rad
    policy_tau: float = 0.005  # rate of the moving average of the policy that acts
    noise_scale: float = 0.1  # std of the exploration noise
    zero_r_ratio: float = 0.5  # share of a batch with r = 0, the r of acting
    # p_0 ~ reference(a) exp(alpha Q): 1 everywhere, N(0, I), or 1 in [-BOX, BOX]^2 and 0 outside
    reference: Literal["uniform", "prior", "box"] = "prior"  # differs from the paper: uniform there
    inverse_temperature: float = 10.0  # alpha
    num_mc_samples: int = 128  # Monte-Carlo samples of the score (K)
    estimator: Literal["mixed", "gradient"] = "mixed"  # of the score  # differs from the paper: gradient
    score_scale: float = 10.0  # w of Eq 8, uniform only  # differs from the paper: 25 there
    beta_max: float = 1.0  # beta(1) of the VP schedule, uniform only; beta(0) is 0.1
    best_of_n: int = 32  # MFP: candidate actions in acting and imitation (N)


# A task is a mixture: its centres (modes, 2), weights (modes,), std, and indices of its high modes
def eight_gaussians():
    angles = torch.arange(8) * math.pi / 4
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    weights = torch.tensor(4 * [2.0, 1.0])
    high_modes = {"N": [2], "E": [0], "S": [6], "W": [4]}
    return math.sqrt(2) * circle, weights, 0.3, high_modes


def two_moons():
    angles = torch.linspace(0, math.pi, 12)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    upper = 1.2 * (circle - torch.tensor([0.5, 0.25]))
    high_modes = {
        "upper W": list(range(6, 12)),
        "upper E": list(range(6)),
        "lower W": list(range(12, 18)),
        "lower E": list(range(18, 24)),
    }
    return torch.cat([upper, -upper]), torch.ones(24), 0.2, high_modes


def checkerboard():
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # (16, 2)
    row, column = cells[cells.sum(dim=1) % 2 == 0].T  # of the dark ones
    centres = torch.stack([column - 1.5, row - 1.5], dim=1)
    weights = torch.where(row % 2 == 0, 2.0, 1.0)
    high_modes = {"NW": [4], "NE": [5], "SW": [0], "SE": [1]}
    return centres, weights, 0.25, high_modes


TASKS = {"eight-gaussians": eight_gaussians, "two-moons": two_moons, "checkerboard": checkerboard}


class Bandit:
    """The reward: a mixture of Gaussians over its maximum (Appendix F), perturbed or not (H)."""

    def __init__(self, task, noise=0.0, bump_scale=0.0, bump_std=0.5):
        self.noise = noise
        self.bump_scale = bump_scale
        self.bump_std = bump_std
        self.centres, self.weights, self.std, self.high_modes = TASKS[task]()
        is_low = self.weights < self.weights.max()
        self.low_modes = torch.nonzero(is_low).flatten().tolist()
        self.max_density = 1.0
        peak = self.centres
        for _ in range(200):  # mean shift climbs from the centres to the maximum
            peak = self.log_components(peak).softmax(dim=1) @ self.centres
        self.max_density = self.reward(peak).max().item()

    def log_components(self, a):
        """log(w_i exp(-|a - m_i|^2 / 2 std^2) / max_density) (..., modes) of actions (..., 2)."""
        scaled = a / self.std
        centres = self.centres / self.std
        log_weights = self.weights.log() - math.log(self.max_density)
        # the square is expanded: one matrix product in place of all differences
        constant = log_weights - 0.5 * centres.square().sum(dim=1)  # (modes,)
        square = scaled.square().sum(dim=-1, keepdim=True)  # (..., 1)
        return scaled @ centres.T + (constant - 0.5 * square)

    def log_reward(self, a):
        return self.log_components(a).logsumexp(dim=-1)

    def reward(self, a):
        """Rewards in [0, 1] of any number of actions (..., 2)."""
        return self.log_components(a).exp().sum(dim=-1)

    def query(self, a):
        """An answer for each action (M, 2): the reward, with bump and noise (Appendix H)."""
        distance = a.norm(dim=1) / self.bump_std
        bump = self.bump_scale * torch.exp(-0.5 * distance.square())
        noise = self.noise * torch.randn(len(a))
        return self.reward(a) + bump + noise

    def mode_counts(self, a):
        """How many actions (M, 2) are near each high mode, and near a low one (Appendix H.3)."""
        distances = (a.unsqueeze(1) - self.centres).norm(dim=-1)  # (M, modes)
        counts = {}
        for name, modes in [*self.high_modes.items(), ("low", self.low_modes)]:
            is_near = (distances[:, modes] <= RADIUS).any(dim=1)
            counts[name] = int(is_near.sum())
        return counts


# ALGO LOGIC: initialize agent here
class EnsembleMLP(nn.Module):
    """GELU networks evaluated together: obs (B, O), N inputs (B, N, D) -> (size, B, N, out).

    The first layer's product with the state is computed once per state and shared by its N inputs.
    """

    def __init__(self, size, obs_dim, in_dim, out_dim, hidden_dim, num_layers):
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        widths = [obs_dim + in_dim] + num_layers * [hidden_dim] + [out_dim]
        for fan_in, fan_out in pairwise(widths):
            bound = fan_in**-0.5  # as in nn.Linear
            self.weights.append(torch.empty(size, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(size, 1, fan_out).uniform_(-bound, bound))

    def forward(self, obs, x):
        h = self.hidden(obs, x)
        out = h @ self.weights[-1] + self.biases[-1]
        return out.unflatten(1, x.shape[:2])

    def hidden(self, obs, x, dtype=None):
        """The hidden layers' output (size, B * N, H), of x's dtype. dtype: of their products."""
        B, N, D = x.shape
        dtype = dtype or x.dtype
        layers = list(zip(self.weights, self.biases, strict=True))
        w, b = layers[0]
        w_obs, w_x = w.to(dtype).split([obs.shape[1], D], dim=1)
        h_obs = obs.to(dtype) @ w_obs + b.to(dtype)  # (size, B, H)
        h_x = (x.to(dtype).flatten(0, 1) @ w_x).unflatten(1, (B, N))  # (size, B, N, H)
        h = (h_obs.unsqueeze(2) + h_x).flatten(1, 2)  # (size, B * N, H), before the activation
        for w, b in layers[1:-1]:
            h = F.gelu(h) @ w.to(dtype) + b.to(dtype)
        return F.gelu(h.to(x.dtype))


class MeanFlowActor(EnsembleMLP):
    """Average velocity u(a_t, r, t, s) (B, N, A) of actions (B, N, A) at times r, t (B, N, 1)."""

    def __init__(self, obs_dim, act_dim, hidden_dim, num_layers, num_frequencies=8):
        super().__init__(1, obs_dim, act_dim + 4 * num_frequencies, act_dim, hidden_dim, num_layers)
        # radians over t in [0, 1]. The target has du/dt in it, which high frequencies blow up
        self.register_buffer("frequencies", torch.linspace(1.0, 3.0, num_frequencies))

    def forward(self, obs, a_t, r, t):
        phase_t = t * self.frequencies  # (B, N, num_frequencies)
        phase_dt = (t - r) * self.frequencies
        times = [phase_t.sin(), phase_t.cos(), phase_dt.sin(), phase_dt.cos()]
        return super().forward(obs, torch.cat([a_t, *times], dim=-1)).squeeze(0)


# ALGO LOGIC: the method
# A schedule returns mu, sigma, f, g^2 of da = f(t) a dt + g(t) dW, a_t = mu(t) a_0 + sigma(t) eps
def vp_schedule(t, beta_min, beta_max):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min) (Eq 1)."""
    beta = beta_min + t * (beta_max - beta_min)
    int_beta = beta_min * t + 0.5 * t**2 * (beta_max - beta_min)
    sigma = torch.sqrt(-torch.expm1(-int_beta))
    return torch.exp(-0.5 * int_beta), sigma, -0.5 * beta, beta


def cosine_schedule(t):
    """Variance preserving, mu = cos(pi t / 2). beta = pi tan(pi t / 2) is unbounded: t <= 0.999."""
    angle = 0.5 * math.pi * t.clamp(max=0.999)
    beta = math.pi * torch.tan(angle)
    return torch.cos(angle), torch.sin(angle), -0.5 * beta, beta


def q_scale(q, q_norm):
    """What divides Q (B, K): one number.

    "batch": its std. "state": its std in each state, averaged. None: 1.
    """
    if q_norm == "batch":
        return q.std().detach() + 1e-6
    if q_norm == "state":
        return q.std(dim=1).mean().detach() + 1e-6
    return 1.0


def estimate_score(q_fn, obs, a_t, mu, sigma, eps, alpha, reference="uniform", q_norm=None, clip=True):
    """Monte-Carlo score grad log p_t(a_t|s) (B, A) (Eq 4, 5), and its samples' logits alpha Q (B, K).

    q_fn: (B, O), (B, K, A) -> (B, K). a_t: (B, A). mu, sigma: (B, 1). eps: (B, K, A) normal.
    reference: p_0 ~ exp(alpha Q) ("uniform") or N(0, I) exp(alpha Q) ("prior", beyond the paper).
    q_norm: as in q_scale. clip: evaluate Q inside [-1, 1]^A only, where it was trained; the gradient outside is zero.
    """

    def log_sum_exp(a_t):
        if reference == "uniform":
            center = a_t / mu
            std = sigma / mu
        else:
            # N(a_0; 0, I) N(a_t; mu a_0, sigma^2) = N(a_t; 0, I) N(a_0; mu a_t, sigma^2), as
            # mu^2 + sigma^2 = 1. So p_t(a_t) is N(a_t; 0, I) E exp(alpha Q(a_0)) for a_0 of N(mu a_t, sigma^2)
            center = mu * a_t
            std = sigma
        a_0 = center.unsqueeze(1) + std.unsqueeze(1) * eps  # (B, K, A)
        q = q_fn(obs, a_0.clamp(-1, 1) if clip else a_0)  # (B, K)
        logits = alpha * q / q_scale(q, q_norm)
        return torch.logsumexp(logits, dim=1).sum(), logits

    # no_grad: no graph to the critic's weights is built. func.grad differentiates all the same
    with torch.no_grad():
        score, logits = torch.func.grad(log_sum_exp, has_aux=True)(a_t)
    if reference == "prior":
        score = score - a_t  # of N(a_t; 0, I)
    return score, logits


def mix_score(score, logits, a_t, mu, sigma, eps, reference, local_var):
    """The score (B, 2) of estimate_score, mixed with a second estimate from the same samples.

    Integrated by parts, the score is also the mean of eps with the weights softmax(alpha Q), times
    1 / sigma (prior: times mu / sigma, minus a_t). This has little variance at large sigma, the
    first estimate, by the gradient of Q, at small sigma. In the mixture their dependence on eps
    cancels where exp(alpha Q) is one Gaussian of variance local_var.
    """
    weights = logits.softmax(dim=1).unsqueeze(-1)  # (B, K, 1)
    eps_mean = (weights * eps).sum(dim=1)  # (B, 2)
    # the second estimate has the share sigma^2 / total_var, multiplied in below
    if reference == "uniform":
        total_var = sigma.square() + mu.square() * local_var  # (B, 1)
        second = sigma / total_var * eps_mean
    else:
        total_var = sigma.square() + local_var
        second = mu * sigma / total_var * eps_mean - sigma.square() / total_var * a_t
    return (1 - sigma.square() / total_var) * score + second


def truncated_normal(eps, mean, std, half_width=1.0):
    """Standard normal eps (B, K, A) as samples of N(mean, std^2) inside the box; mean: (B, A), std: (B, 1)."""

    def cdf_of(x):
        return 0.5 * torch.special.erfc(-x / math.sqrt(2))  # torch.special.ndtr is 0 below -6

    low = ((-half_width - mean) / std).unsqueeze(1)  # (B, 1, A)
    high = ((half_width - mean) / std).unsqueeze(1)
    # by the inverse CDF. Floats resolve probabilities near 0, not near 1: a box above the mean is
    # mirrored to below it, sign = -1, and the samples in it are mirrored back
    sign = torch.where(low > 0, -1.0, 1.0)
    lower = torch.minimum(sign * low, sign * high)
    upper = torch.maximum(sign * low, sign * high)
    mass = cdf_of(upper) - cdf_of(lower)
    # sign * eps, which is as normal: mirrored with the box and back, it lets a_0 rise with eps for
    # both signs. So a_0 does not jump where the sign changes
    cdf = cdf_of(lower) + cdf_of(sign * eps) * mass  # (B, K, A)
    z = torch.special.ndtri(cdf.clamp(1e-37, 1 - 1e-7))
    z = sign * z
    a_0 = mean.unsqueeze(1) + std.unsqueeze(1) * z
    return a_0.clamp(-half_width, half_width)


def estimate_box_score(q_fn, obs, a_t, mu, sigma, eps, alpha, q_norm=None, half_width=1.0, local_variance=0.1):
    """As estimate_score, for p_0 ~ exp(alpha Q) inside the box and 0 outside (beyond the paper).

    By Tweedie's formula the score is (mu m - a_t) / sigma^2, where m is the mean of a_0 given a_t.
    With beta = pi sigma / mu, as in cosine_schedule, and mu^2 + sigma^2 = 1 the velocity
    -beta/2 (a_t + score) is -pi/2 (m - mu a_t) / sigma: m is in the box, so alpha cannot blow it up.

    m blends two estimates. Far from t = 0 it is the mean of the samples weighted by exp(alpha Q),
    which sees distant modes. Near t = 0, where m's error is divided by a small sigma, it is their
    plain mean, moved along the slope of alpha Q.
    """
    a_0 = truncated_normal(eps, a_t / mu, sigma / mu, half_width)  # (B, K, A)

    def log_sum_exp(a_0):
        q = q_fn(obs, a_0)  # (B, K)
        logits = alpha * q / q_scale(q, q_norm)
        return torch.logsumexp(logits, dim=1).sum(), logits

    with torch.no_grad():
        # the gradient by a_0[k] is its weight times its logit's slope: their sum is the mean slope
        gradients, logits = torch.func.grad(log_sum_exp, has_aux=True)(a_0)  # (B, K, A)
    weights = logits.softmax(dim=1).unsqueeze(-1)  # (B, K, 1)
    weighted_mean = (weights * a_0).sum(dim=1)  # (B, A)
    # exp(slope a) moves the mean of a distribution by its variance times slope, to first order
    slope = gradients.sum(dim=1)
    moved_mean = a_0.mean(dim=1) + a_0.var(dim=1) * slope
    moved_mean = moved_mean.clamp(-half_width, half_width)
    # from 0 at t = 0 to 1; 1/2 where sigma^2 / mu^2, the samples' variance but for the box, is
    # local_variance
    share = sigma**2 / (sigma**2 + local_variance * mu**2)
    m = share * weighted_mean + (1 - share) * moved_mean
    return (mu * m - a_t) / sigma.clamp(min=1e-3) ** 2, logits


def pf_ode_velocity(a_t, score, f, g2, score_scale=None):
    """Velocity f a_t - g^2/2 score (B, A) of the PF-ODE (Eq 2, 6, B.2). score_scale: w of Eq 8."""
    if score_scale is not None:
        score = score_scale * score / (score.norm(dim=-1, keepdim=True) + 1e-6)
    return f * a_t - 0.5 * g2 * score


def sample_r_t(uniform, zero_r_ratio=0.0):
    """Uniform numbers (B, 2) as times r <= t, each (B, 1) (Algorithm 1); r = 0 in a share of them."""
    r = uniform.amin(dim=1, keepdim=True)
    t = uniform.amax(dim=1, keepdim=True)
    row = torch.arange(len(r), device=r.device).unsqueeze(1)
    # the batch was drawn at random: its first rows will do
    return r * (row >= zero_r_ratio * len(r)), t


def meanflow_loss(u_fn, a_t, r, t, v):
    """Squared error (B, N) of u_fn(a_t, r, t) against stopgrad(v - (t - r) du/dt) (Eq 7).

    Also du/dt (B, N, A), the derivative of u along the flow.
    """
    tangents = (v, torch.zeros_like(r), torch.ones_like(t))  # along the flow, da_t/dt = v
    u, dudt = torch.func.jvp(u_fn, (a_t, r, t), tangents)
    u_tgt = (v - (t - r) * dudt).detach()
    return (u - u_tgt).square().sum(dim=-1), dudt.detach()


def mfp_loss(u_fn, a_t, r, t, v, tangent="marginal"):
    """L_MF and L_IVC (B, N) of u_fn(a_t, r, t), and du/dt (B, N, A) along the flow.

    du/dt is defined along the flow's velocity, the mean of v over all paths through a_t. tangent: what
    stands for it, u_fn's own u(a_t, t, t), which L_IVC trains to be that mean ("marginal"), or v itself,
    which is of one path ("conditional").
    """
    u_tt = u_fn(a_t, t, t)
    velocity = u_tt.detach() if tangent == "marginal" else v
    tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))  # along the flow
    u, dudt = torch.func.jvp(u_fn, (a_t, r, t), tangents)
    u_tgt = (v - (t - r) * dudt).detach()
    mf = (u - u_tgt).square().sum(dim=-1)
    ivc = (u_tt - v).square().sum(dim=-1)
    return mf, ivc, dudt.detach()


def best_of_n(u_fn, q_fn, obs, noise):
    """The candidate with the largest Q, (B, A), and all of them, (B, N, A) (Algorithm 1).

    Candidates are noise - u_fn(obs, noise, 0, 1), of noise (B, N, A).
    """
    r = torch.zeros_like(noise[..., :1])  # (B, N, 1)
    t = torch.ones_like(r)
    candidates = (noise - u_fn(obs, noise, r, t)).clamp(-1, 1)
    best = q_fn(obs, candidates).argmax(dim=1)  # (B,)
    return candidates[torch.arange(len(obs), device=obs.device), best], candidates


class Agent:
    """A policy and its critic, trained by method "som" or "mfp"."""

    def __init__(self, args, method, bandit):
        self.args = args
        self.method = method
        self.bandit = bandit
        self.num_updates = 0
        self.actor = MeanFlowActor(1, 2, args.hidden_dim, 3, args.num_frequencies)
        self.acting_actor = copy.deepcopy(self.actor).requires_grad_(False)  # its moving average
        self.critic = EnsembleMLP(1, 1, 2, 1, args.q_hidden_dim, 2)
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), fused=True),
            "critic": torch.optim.Adam(self.critic.parameters(), fused=True),
        }
        self.learning_rates = {"actor": args.policy_lr, "critic": args.q_lr}  # at the start
        sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=args.seed)
        self.points = sobol.draw(args.num_mc_samples)  # (K, 2)

    def schedule(self, t):
        if self.args.reference == "uniform":
            return vp_schedule(t, 0.1, self.args.beta_max)
        return cosine_schedule(t)

    def q_fn(self, obs, a):
        """Q (B, N) of actions (B, N, 2). The critic is asked inside the box only."""
        if self.args.oracle_critic:
            return self.bandit.reward(a)
        return self.critic(obs, a.clamp(-BOX, BOX))[0, :, :, 0]

    @torch.no_grad()
    def act(self, noise):
        """Of the one-step actions of noise (B, N, 2) the best by Q, (B, 2)."""

        def u_fn(obs, a, r, t):  # best_of_n clips to [-1, 1]: it gets everything in units of BOX
            return self.acting_actor(obs, BOX * a, r, t) / BOX

        def q_fn(obs, a):
            return self.q_fn(obs, BOX * a)

        obs = torch.zeros(len(noise), 1)
        best, _ = best_of_n(u_fn, q_fn, obs, noise / BOX)
        return BOX * best

    def denoise(self, noise, t):
        """Where noise (M, 2) is at time t, in one step as well: eps - (1 - t) u(eps, t, 1)."""
        obs = torch.zeros(len(noise), 1)
        one = torch.ones(len(noise), 1, 1)
        u = self.acting_actor(obs, noise.unsqueeze(1), t * one, one).squeeze(1)
        return noise - (1 - t) * u

    def velocity(self, a_t, t):
        """Velocity (B, 2) of the PF-ODE of exp(alpha Q) (Eq 5 to 8), at a_t (B, 2) and t (B, 1)."""
        args = self.args
        mu, sigma, f, g2 = self.schedule(t)
        # differs from the paper: the noise is evenly spread points, shifted modulo 1 for each row
        uniform = (self.points + torch.rand(len(a_t), 1, 2)) % 1.0  # (B, K, 2)
        eps = torch.special.ndtri(uniform.clamp(1e-5, 1 - 1e-5))  # standard normal
        obs = torch.zeros(len(a_t), 1)
        alpha = args.inverse_temperature
        path = (a_t, mu, sigma, eps)
        # at a mode of height 1 Q is 1 - d^2 / (2 std^2), so that exp(alpha Q) is a Gaussian of this variance
        local_var = self.bandit.std**2 / alpha
        if args.reference == "box":
            score, _ = estimate_box_score(self.q_fn, obs, *path, alpha, None, BOX, local_var)
        else:
            score, logits = estimate_score(self.q_fn, obs, *path, alpha, args.reference, clip=False)
            if args.estimator == "mixed":
                score = mix_score(score, logits, *path, args.reference, local_var)
        score_scale = args.score_scale if args.reference == "uniform" else None
        return pf_ode_velocity(a_t, score, f, g2, score_scale)

    def update(self, actions, rewards):
        """One step of the policy, and one of the critic for each of S batches; their losses.

        actions: (S, B, 2). rewards: (S, B). The policy's step is on the first batch.
        """
        remaining = 1 - self.num_updates / self.args.total_updates
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = remaining * self.learning_rates[name]
        self.num_updates += 1
        actor_loss = self.update_actor(actions[0])
        qf_loss = 0.0
        if not self.args.oracle_critic:
            for batch_actions, batch_rewards in zip(actions, rewards, strict=True):
                qf_loss = self.update_critic(batch_actions, batch_rewards)
        return actor_loss, qf_loss

    def update_critic(self, actions, rewards):
        obs = torch.zeros(len(actions), 1)
        q = self.q_fn(obs, actions.unsqueeze(1)).squeeze(1)  # (B,)
        loss = (q - rewards).square().mean()
        self.descend("critic", loss)
        return loss.item()

    def update_actor(self, actions):
        if self.method == "som":
            loss = self.som_actor_loss(actions)
        else:
            loss = self.mfp_actor_loss(actions)
        self.descend("actor", loss)
        # larger at first: the first networks are forgotten sooner
        tau = max(self.args.policy_tau, 9 / (self.num_updates + 9))
        soft_update(self.acting_actor, self.actor, tau)
        return loss.item()

    def som_actor_loss(self, actions):
        """Regression of the policy on the velocity field of exp(alpha Q) around actions (B, 2)."""
        r, t = sample_r_t(torch.rand(len(actions), 2), self.args.zero_r_ratio)
        eps = torch.randn_like(actions)
        mu, sigma, _, _ = self.schedule(t)
        a_t = mu * actions + sigma * eps
        v = self.velocity(a_t, t)
        obs = torch.zeros(len(actions), 1)
        points = [x.unsqueeze(1) for x in (a_t, r, t, v)]  # N = 1
        errors, _ = meanflow_loss(partial(self.actor, obs), *points)
        return errors.mean()

    def mfp_actor_loss(self, actions):
        """Regression on straight paths from noise to the best of N actions of the policy itself."""
        r, t = sample_r_t(torch.rand(len(actions), 2), self.args.zero_r_ratio)
        eps = torch.randn_like(actions)
        best = self.act(torch.randn(len(actions), self.args.best_of_n, 2))  # (B, 2)
        a_t = (1 - t) * best + t * eps
        v = eps - best
        obs = torch.zeros(len(actions), 1)
        points = [x.unsqueeze(1) for x in (a_t, r, t, v)]  # N = 1
        mf, ivc, _ = mfp_loss(partial(self.actor, obs), *points)
        return (mf + ivc).mean()

    def descend(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()


def soft_update(target, source, tau):
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def train(args, method, bandit, position):
    """A trained agent, and its one-step actions of the same noise at six times of the training."""
    torch.manual_seed(args.seed)
    agent = Agent(args, method, bandit)
    film = []
    film_noise = torch.randn(500, 1, 2)
    film_updates = [math.ceil(args.total_updates * share) for share in FILM_SHARES]
    num_candidates = args.best_of_n if method == "mfp" else 1
    num_batches = 1 if args.oracle_critic else args.q_updates

    # all actions so far and their rewards: first uniform ones, then those of the policy
    num_rows = args.learning_starts + args.total_updates * args.num_envs
    actions = BOX * (2 * torch.rand(num_rows, 2) - 1)
    rewards = torch.empty(num_rows)
    num_tried = args.learning_starts
    rewards[:num_tried] = bandit.query(actions[:num_tried])

    updates = range(1, args.total_updates + 1)
    progress = tqdm(updates, method, unit="update", position=position, disable=None)
    for update in progress:
        # ALGO LOGIC: put action logic here
        a = agent.act(torch.randn(args.num_envs, num_candidates, 2))
        a = (a + args.noise_scale * torch.randn_like(a)).clamp(-BOX, BOX)
        new_rows = slice(num_tried, num_tried + args.num_envs)
        actions[new_rows] = a
        rewards[new_rows] = bandit.query(a)
        num_tried += args.num_envs

        # ALGO LOGIC: training.
        rows = torch.randint(num_tried, (num_batches, args.batch_size))
        actor_loss, qf_loss = agent.update(actions[rows], rewards[rows])
        if not math.isfinite(actor_loss + qf_loss):
            message = f"a loss of {method} is not finite at update {update}, seed {args.seed}"
            exit_with_error(message, code=1)
        if update % 100 == 0:
            mean_reward = bandit.reward(a).mean().item()
            progress.set_postfix(reward=mean_reward, actor_loss=actor_loss, q=qf_loss)
        if update in film_updates:
            film.append((update, agent.act(film_noise)))
    return agent, film


@torch.no_grad()
def integrate(agent, a, seed):
    """Ends of the probability-flow ODE from noise a (M, 2), by Euler steps along agent.velocity."""
    torch.manual_seed(seed)
    for t in torch.linspace(1, 1 / NUM_ODE_STEPS, NUM_ODE_STEPS):
        parts = a.split(256)  # a part fits into the processor's cache
        velocities = [agent.velocity(part, t.expand(len(part), 1)) for part in parts]
        a = a - torch.cat(velocities) / NUM_ODE_STEPS
    return a


def measure(bandit, a, ode):
    """The numbers of results.json for actions (M, 2), beside M ends of the probability-flow ODE."""
    counts = bandit.mode_counts(a)
    cost = torch.cdist(a.double(), ode.double()).square()  # (M, M)
    matching = linear_sum_assignment(cost)  # the pairing of the two samples with the least cost
    return {
        "mean_reward": bandit.reward(a).mean().item(),
        "mode_counts": counts,
        "high_mode_share": [counts[name] / len(a) for name in bandit.high_modes],
        "low_mode_share": counts["low"] / len(a),
        "w2_to_pf_ode": cost[matching].mean().sqrt().item(),
    }


# What a reader of the method may skip: pictures, checks, processes
def draw_panel(ax, values, a=None, title="", label="", cmap="Blues", **kwargs):
    """A landscape of values (81, 81) over GRID, and actions (M, 2) on it."""
    limits = (-BOX, BOX)
    kwargs |= {"extent": 2 * limits, "origin": "lower", "interpolation": "bilinear"}
    image = ax.imshow(values.numpy(), cmap, **kwargs)
    if a is not None:
        ax.scatter(*a.T, s=2, c="crimson", alpha=0.5, linewidths=0)
    ax.set(xlim=limits, ylim=limits, xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(label, fontsize=8)
    return image


def caption(bandit, a):
    """Mean reward and mode counts of actions (M, 2), in two lines."""
    counts = [f"{name} {count}" for name, count in bandit.mode_counts(a).items()]
    return f"mean reward {bandit.reward(a).mean():.2f}\n{', '.join(counts)}"


def draw_arrows(path, bandit, noise, ends, samples):
    """Figures 5, 13, 14: arrows from a grid of noise (black) to the actions (red), over the reward.

    noise: (49, 2). ends: (49, 2) by policy. samples: (NUM_SAMPLES, 2) by policy, for the captions.
    """
    titles = {
        "som": "SOM, one step",
        "mfp": "MFP, one step",
        "pf_ode": f"PF-ODE of SOM's field, {NUM_ODE_STEPS} steps",
    }
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003, "color": "0.45"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    for ax, name in zip(axes, titles, strict=True):
        end = ends[name]
        label = caption(bandit, samples[name])
        draw_panel(ax, bandit.reward(GRID), title=titles[name], label=label)
        ax.quiver(*noise.T, *(end - noise).T, **arrow)
        ax.scatter(*noise.T, s=8, c="black", zorder=3)
        ax.scatter(*end.T, s=14, c="crimson", zorder=4)
    figure.savefig(path, dpi=90)


def draw_film(path, bandit, films):
    """One-step actions of the same noise in the course of training, a row for each method."""
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.5), layout="constrained")
    for row, method in zip(axes, ("som", "mfp"), strict=True):
        for ax, (update, a) in zip(row, films[method], strict=True):
            draw_panel(ax, bandit.reward(GRID), a, f"{method.upper()}, update {update:,}")
    figure.savefig(path, dpi=90)


def draw_scores(path, bandit, sigma=0.3, num_mc_samples=200):
    """Figure 15: norms of the estimated and the true score on the VE path at sigma(t) = sigma."""
    a_t = GRID.reshape(-1, 2)
    one = torch.ones(len(a_t), 1)
    eps = torch.randn(len(a_t), num_mc_samples, 2)

    def log_reward(obs, a):
        return bandit.log_reward(a)

    def ten_rewards(obs, a):
        return 10 * bandit.reward(a)

    inputs = (one, a_t, one, sigma * one, eps)
    estimated, _ = estimate_score(log_reward, *inputs, alpha=1, clip=False)
    papers, _ = estimate_score(ten_rewards, *inputs, alpha=1, clip=False)
    noised = copy.copy(bandit)  # the noised mixture in closed form has a larger variance
    noised.std = math.sqrt(bandit.std**2 + sigma**2)
    true = torch.func.grad(lambda a: noised.log_reward(a).sum())(a_t)

    top = true.norm(dim=1).max().item()
    papers_top = papers.norm(dim=1).max().item()
    panels = [
        ("estimated from log r", estimated, top),
        ("true, of the density r", true, top),
        ("the paper's estimate, from 10 r", papers, papers_top),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    for ax, (title, score, vmax) in zip(axes, panels, strict=True):
        norm = score.norm(dim=1).reshape(len(GRID), -1)
        image = draw_panel(ax, norm, title=title, cmap="viridis", vmin=0, vmax=vmax)
        ax.scatter(*bandit.centres.T, marker="x", s=20, c="white", linewidths=0.8)
        figure.colorbar(image, ax=ax, shrink=0.8)
    text = (
        f"||score|| at sigma(t) = {sigma}. Left and middle are the same on one scale, "
        "up to sampling error alone.\nThe right one is the score of exp(10 r), "
        "another distribution than r: it differs, however good it is."
    )
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path, dpi=90)


def draw_robustness(path, bandit, agents, noise):
    """Figures 6, 16 to 18: Q, and one-step maps of noise to four times, clean and perturbed."""
    bump = f"a bump of height {bandit.bump_scale}, std {bandit.bump_std}"
    figure, axes = plt.subplots(4, 5, figsize=(11, 9.5), layout="constrained")
    for row, (name, agent) in zip(axes, agents.items(), strict=True):
        q = agent.q_fn(torch.zeros(len(GRID), 1), GRID).detach()  # a row of the grid as N actions
        draw_panel(row[0], q, title=f"Q of {name.upper()}", cmap="viridis")
        for ax, t in zip(row[1:], (0.75, 0.5, 0.25, 0.0), strict=True):
            a = agent.denoise(noise, t)
            label = caption(bandit, a) if t == 0 else ""
            draw_panel(ax, bandit.reward(GRID), a, f"t = {t}", label)
    figure.suptitle(f"Perturbed: noise of std {bandit.noise}, {bump}", fontsize=10)
    figure.savefig(path, dpi=90)


def exit_with_error(message, code=2):
    print("error:", " ".join(message.split()), file=sys.stderr)  # on one line
    sys.exit(code)


def check_args(args):
    """An error for values that cannot work."""
    may_be_zero = ["seed", "learning_starts", "noise_scale", "zero_r_ratio"]
    may_be_zero += ["reward_noise", "bump_scale"]
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            lowest = {"total_updates": 100, "beta_max": 0.1, "num_mc_samples": 2}.get(name, 0)
            highest = 1 if name in ("policy_tau", "zero_r_ratio") else 2**63 - 1
            flag = f"--{name.replace('_', '-')}"
            if not lowest <= value <= highest:
                exit_with_error(f"{flag} must be in [{lowest}, {highest}], got {value}")
            if value == 0 and name not in may_be_zero:
                exit_with_error(f"{flag} cannot be 0")
    is_perturbed = args.reward_noise > 0 or args.bump_scale > 0
    has_default_field = (args.score_scale, args.beta_max) == (Args.score_scale, Args.beta_max)
    is_uniform = args.reference == "uniform"
    rules = {
        "--score-scale, --beta-max need --reference uniform": is_uniform or has_default_field,
        "--estimator gradient needs --reference uniform or prior": args.estimator == "mixed" or args.reference != "box",
        "--reward-noise, --bump-scale need the learned critic": not (is_perturbed and args.oracle_critic),
        "--bump-std needs --bump-scale": args.bump_scale > 0 or args.bump_std == Args.bump_std,
    }
    for rule, holds in rules.items():
        if not holds:
            exit_with_error(rule)


@contextlib.contextmanager
def writing(path):
    """An error in writing the run's own files ends it with one line."""
    try:
        yield
    except OSError as error:
        exit_with_error(f"{path} cannot be written: {error}; make room or mend the path", code=1)


def start_worker():
    """A worker has one thread, for the same numbers everywhere, and ends with the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too
    threading.Thread(target=end_with_main_process, daemon=True).start()


def end_with_main_process():
    multiprocessing.parent_process().join()  # returns however it ended, even by SIGKILL
    os._exit(1)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_args(args)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, as SIGTERM does
    start_time = time.time()
    run_name = f"{args.task}__{args.exp_name}__{args.seed}__{int(start_time)}_{os.getpid()}"
    run_folder = Path("runs", run_name.replace("/", "_"))
    with writing(run_folder):
        run_folder.mkdir(parents=True)
    clean = Bandit(args.task)
    perturbed = Bandit(args.task, args.reward_noise, args.bump_scale, args.bump_std)
    is_perturbed = args.reward_noise > 0 or args.bump_scale > 0
    bandits = {"_clean": clean, "": perturbed} if is_perturbed else {"": clean}

    # two cores train two policies at once
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_worker)
    jobs = {}
    for method in ("som", "mfp"):
        for suffix, bandit in bandits.items():
            jobs[method + suffix] = pool.submit(train, args, method, bandit, len(jobs))
    agents = {}
    films = {}
    for name, job in jobs.items():
        agents[name], films[name] = job.result()

    # one-step actions of every policy, and two samples of the ODE of SOM's field
    torch.manual_seed(args.seed + 2**31)
    noise = torch.randn(NUM_SAMPLES, 2)
    more_noise = torch.randn(NUM_SAMPLES, 2)
    side = torch.linspace(-2, 2, 7)
    grid = torch.cartesian_prod(side, side)  # (49, 2)
    samples = {}
    ends = {}
    for name, agent in agents.items():
        samples[name] = agent.act(noise.unsqueeze(1))  # N = 1: MFP's too without its best of N
        ends[name] = agent.act(grid.unsqueeze(1))
    parts = torch.cat([noise, more_noise, grid]).chunk(8)
    seeds = range(args.seed, args.seed + 8)
    ode_parts = pool.map(integrate, 8 * [agents["som"]], parts, seeds)
    sizes = [NUM_SAMPLES, NUM_SAMPLES, len(grid)]
    samples["pf_ode"], reference, ends["pf_ode"] = torch.cat(list(ode_parts)).split(sizes)
    results = {name: measure(clean, a, reference) for name, a in samples.items()}

    with writing(run_folder):
        draw_arrows(run_folder / "arrows.png", clean, grid, ends, samples)
        draw_film(run_folder / "training.png", clean, films)
        draw_scores(run_folder / "scores.png", clean)
        if is_perturbed:
            draw_robustness(run_folder / "robustness.png", perturbed, agents, noise)
        np.savez_compressed(run_folder / "samples.npz", pf_ode_reference=reference, **samples)
        np.savez_compressed(run_folder / "arrows.npz", noise=grid, **ends)
        packages = ("torch", "numpy", "scipy", "matplotlib")
        results["seconds"] = time.time() - start_time
        results["config"] = asdict(args)
        results["versions"] = {package: metadata.version(package) for package in packages}
        (run_folder / "results.json").write_text(json.dumps(results, indent=2))
    for name, a in samples.items():
        print(f"{name}: {caption(clean, a)}".replace("\n", "; "))
    print(f"{results['seconds']:.0f} s, pictures and results.json in {run_folder}")
