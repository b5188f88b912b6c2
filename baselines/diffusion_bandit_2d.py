# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "numpy>=2", "tyro>=1,<2", "tqdm>=4.66", "matplotlib>=3.8", "scipy>=1.11"]
# ///
"""SDAC and DACER (https://arxiv.org/abs/2502.00361 and 2405.15177) on two-dimensional bandits, in one file.

Run it: python diffusion_bandit_2d.py --task eight-gaussians
The two diffusion policies that SOM's paper has beside SOM and MFP in its Figures 5, 6, 13 and 14, on the tasks and by
the protocol of som_bandit_2d.py: actions come from the policy, the reward of each is queried once, and a critic is
regressed on these rewards (--oracle-critic: the true reward in its place). Pictures go to runs/<run name>/, with
their numbers in results.json. The functions of the methods are those of the other scripts, to the letter.

SDAC aims at exp(alpha Q) on the box of actions: its actions are compared with a sample of that. DACER aims at the
maximum of Q; the noise on its actions is fixed here, because its regulator moves once in 10,000 updates. The critic is
the same for both, a mean-squared one: nothing is bootstrapped, and DACER's distribution of returns has no use.

Conventions: k = T is noise, k = 0 is the action; alpha is an INVERSE temperature. Actions live in [-BOX, BOX]^2.
A bandit has no state: the networks get a zero, (B, 1).
Shapes: B states, N actions in each of them, 2 coordinates: (B, N, 2); without states (M, 2). Noise of the T steps:
(T, M, 2).
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
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
NUM_SAMPLES = 2000  # actions behind every number
FILM_SHARES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)  # of the training, at the frames of training.png
AXIS = torch.linspace(-BOX, BOX, 81)
GRID = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="xy"), dim=-1)  # (81, 81, 2)
TIMES = (0.75, 0.5, 0.25, 0.0)  # of the chains in robustness.png
SCHEDULES = {"sdac": "linear", "dacer": "vp"}  # of the noise, as each method has it


@dataclass
class Args:
    exp_name: str = "diffusion_bandit_2d"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise and rewards
    methods: tuple[Literal["sdac", "dacer"], ...] = ("sdac", "dacer")  # which policies to train
    task: Literal["eight-gaussians", "two-moons", "checkerboard"] = "eight-gaussians"  # the reward
    oracle_critic: bool = False  # the true reward in the critic's place, hence no error of the critic
    reward_noise: float = 0.0  # std of the noise on each reward (Appendix H.1), adds robustness.png
    bump_scale: float = 0.0  # height of a bump in the reward at 0 (Appendix H.2, c), adds it too
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
    num_frequencies: int = 8  # sines and cosines of the step k, from 1 rad per step down
    num_diffusion_steps: int = 10  # steps from noise to action (T)
    noise_scale: float = 0.1  # std of the exploration noise
    policy_tau: float = 0.005  # SDAC: rate of the moving average of the policy that acts
    inverse_temperature: float = 10.0  # SDAC: alpha
    num_samples: int = 128  # SDAC: noises in the weighted mean (K)
    # SDAC's K actions are drawn inside the box, or clipped to it
    proposals: Literal["truncated", "clipped"] = "truncated"  # SDAC  # differs from the released code: clipped


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


class DiffusionActor(EnsembleMLP):
    """The noise eps (B, N, A) in actions a_k (B, N, A), at steps k (B, N, 1) = 1..T."""

    def __init__(self, obs_dim, act_dim, hidden_dim, num_layers, num_frequencies=8):
        super().__init__(1, obs_dim, act_dim + 2 * num_frequencies, act_dim, hidden_dim, num_layers)
        # radians a step: 1 and down, geometrically, to some 1 / 3,000 (as in a Transformer)
        exponents = torch.arange(num_frequencies) / num_frequencies
        self.register_buffer("frequencies", 10_000.0**-exponents)

    def forward(self, obs, a_k, k):
        phase = k * self.frequencies  # (B, N, num_frequencies)
        x = torch.cat([a_k, phase.sin(), phase.cos()], dim=-1)
        return super().forward(obs, x).squeeze(0)


# ALGO LOGIC: the method
# mu, sigma: a_k = mu[k] a_0 + sigma[k] eps. a_{k-1} = c0[k] a_0 + c1[k] a_k + std[k] z given both.
# Each is (T + 1,), and k = 0 the action. Actions live in [-bound, bound]^A
Diffusion = namedtuple("Diffusion", "mu sigma c0 c1 std bound")
# all that is random in a regression of R rows: steps k (R, 1), noise eps (R, A), uniform (B, M, A) for the K
# noises of SDAC or the M uniform actions of QVPO, and chains (T, B, K, A) for QVPO's own actions. R is B, of
# QVPO B (1 + M)
Draws = namedtuple("Draws", "k eps uniform chains")
# what moves while an agent learns: lambda, DPMD's running mean and std of Q (2,), the share of the run that is over
State = namedtuple("State", "lam q_stats progress")
# what a method is: states (R, O), actions with noise (R, A) at steps k (R, 1), targets eps (R, A), weights (R,)
Regression = namedtuple("Regression", "obs a_k k eps weight")
Batch = namedtuple("Batch", "obs actions")


def diffusion(num_steps, schedule, scale=0.8, bound=1.0, device=None):
    """The coefficients of num_steps denoising steps (DDPM, https://arxiv.org/abs/2006.11239, Eq 4 and 7).

    schedule: "linear" in beta, up to scale (SDAC, DPMD); "vp", the VP SDE in T steps (QSM, DACER;
    https://arxiv.org/abs/2011.13456, Eq 11); or "cosine" (DIPO, QVPO; https://arxiv.org/abs/2102.09672,
    Eq 17).
    """
    k = torch.arange(1, num_steps + 1, dtype=torch.float64, device=device)
    share = torch.arange(num_steps + 1, dtype=torch.float64, device=device) / num_steps
    if schedule == "linear":
        beta = scale * torch.linspace(1e-4, 0.999, num_steps, dtype=torch.float64, device=device)
    elif schedule == "vp":
        beta_min = 0.1
        beta_max = 10.0
        # 1 - exp(-integral over step k) of a beta(t) that rises linearly from beta_min to beta_max
        rise = 0.5 * (beta_max - beta_min) * (2 * k - 1) / num_steps**2
        beta = -torch.expm1(-beta_min / num_steps - rise)
    else:
        f = torch.cos((share + 0.008) / 1.008 * math.pi / 2).square()
        ratio = f[1:] / f[:-1]
        beta = (1 - ratio).clamp(max=0.999)
    abar = F.pad((1 - beta).cumprod(dim=0), (1, 0), value=1.0)  # (T + 1,)
    before = abar[:-1]  # that of k - 1
    var = 1 - abar[1:]
    tables = [abar.sqrt(), (1 - abar).sqrt()]
    c0 = beta * before.sqrt() / var
    c1 = (1 - before) * (1 - beta).sqrt() / var
    std = (beta * (1 - before) / var).sqrt()
    for steps in (c0, c1, std):
        tables.append(F.pad(steps, (1, 0)))  # there is no step from k = 0
    dtype = torch.get_default_dtype()
    return Diffusion(*[table.to(dtype) for table in tables], bound)


def noised(a_0, eps, k, d):
    """a_k (R, A) of actions a_0 and their noise eps (R, A) at the steps k (R, 1)."""
    return d.mu[k] * a_0 + d.sigma[k] * eps


def ddpm_sample(eps_fn, obs, noise, d):
    """Actions (B, N, A) by T steps of a_{k-1} given a_k and the a_0 that eps_fn tells, clipped (DDPM, Eq 6).

    eps_fn: (B, O), (B, N, A), (B, N, 1) -> (B, N, A). noise: (T, B, N, A) standard normal, of which
    the first is a_T. The last step adds none: it returns a_0.
    """
    num_steps = len(noise)
    a = noise[0]
    for k in range(num_steps, 0, -1):
        eps = eps_fn(obs, a, torch.full_like(a[..., :1], k))
        a_0 = (a - d.sigma[k] * eps) / d.mu[k]
        a_0 = a_0.clamp(-d.bound, d.bound)
        a = d.c0[k] * a_0 + d.c1[k] * a
        if k > 1:
            a = a + d.std[k] * noise[num_steps - k + 1]
    return a


def propose(a_k, mu, sigma, uniform, bound=1.0, truncated=True):
    """Pairs (eps, a_0), each (B, K, A), that lead to a_k (B, A): a_k = mu a_0 + sigma eps, eps normal.

    uniform: (B, K, A) in [0, 1), float64. truncated: normal on condition that a_0 is in the box.
    Otherwise, as in the released code, a_0 is clipped into it, and does not lead to a_k any more.
    """
    a_k64 = a_k.double().unsqueeze(1)
    mu = mu.unsqueeze(1)
    sigma = sigma.unsqueeze(1)
    if truncated:
        low = (a_k64 - mu * bound) / sigma  # (B, 1, A)
        high = (a_k64 + mu * bound) / sigma
        flip = low > 0  # in the lower tail the distribution function has more digits
        bottom = torch.where(flip, -high, low)
        top = torch.where(flip, -low, high)
        mass = torch.special.ndtr(top) - torch.special.ndtr(bottom)
        eps = torch.special.ndtri(torch.special.ndtr(bottom) + uniform * mass)  # (B, K, A)
        eps = torch.clamp(eps, bottom, top)
        eps = torch.where(flip, -eps, eps)
    else:
        eps = torch.special.ndtri(uniform.clamp(min=1e-12))
    a_0 = ((a_k64 - sigma * eps) / mu).clamp(-bound, bound)
    return eps.to(a_k.dtype), a_0.to(a_k.dtype)


def sdac(q_fn, eps_fn, batch, draws, state, d, args):
    """Denoising of exp(alpha Q) (https://arxiv.org/abs/2502.00361): E[eps | a_k], estimated from Q alone.

    Its loss has K terms w_j ||eps_theta - eps_j||^2 a state, sum_j w_j = 1. Their gradient is that of
    one term, with the target sum_j w_j eps_j: one evaluation of the policy instead of K.
    """
    # differs from the released code: there a_0 is an action of the policy, with a chain of its own
    a_k = noised(batch.actions, draws.eps, draws.k, d)
    mu = d.mu[draws.k]  # (B, 1)
    sigma = d.sigma[draws.k]
    truncated = args.proposals == "truncated"
    eps, a_0 = propose(a_k, mu, sigma, draws.uniform, d.bound, truncated)  # (B, K, A)
    alpha = args.inverse_temperature / state.lam
    w = (alpha * q_fn(batch.obs, a_0)).softmax(dim=1)  # (B, K)
    eps_hat = (w.unsqueeze(-1) * eps).sum(dim=1)  # (B, A)
    sample_size = 1 / w.square().sum(dim=1)
    info = {"regression/effective_sample_size": sample_size.mean()}
    weight = a_k.new_ones(len(a_k))
    return Regression(batch.obs, a_k, draws.k, eps_hat, weight), info


def denoising_loss(eps_fn, regression):
    """The loss of all five: weighted squared error of eps_fn(a_k, k, s), mean over rows and coordinates."""
    obs, a_k, k, eps, weight = regression
    prediction = eps_fn(obs, a_k.unsqueeze(1), k.unsqueeze(1))  # (R, 1, A)
    errors = (prediction.squeeze(1) - eps).square().mean(dim=1)  # (R,)
    loss = (weight * errors).mean()
    info = {
        "losses/actor_loss": loss.detach(),
        "losses/denoising_error": errors.detach().mean(),
        "regression/weight": weight.mean(),
        "regression/target_rms": eps.square().mean().sqrt(),
    }
    return loss, info


def dacer_loss(eps_fn, q_fn, obs, noise, perturbation, d):
    """-Q of the policy's actions, differentiated through all denoising steps, and diagnostics.

    eps_fn: (B, O), (B, N, A), (B, N, 1) -> (B, N, A). q_fn: (B, O), (B, N, A) -> (B, N).
    noise: (T, B, N, A) standard normal. perturbation: (B, N, A), the noise on the actions.
    """
    a_0 = ddpm_sample(eps_fn, obs, noise, d)
    a = (a_0 + perturbation).clamp(-d.bound, d.bound)
    loss = -q_fn(obs, a).mean()
    is_saturated = a_0.detach().abs() > 0.99 * d.bound
    info = {
        "losses/actor_loss": loss.detach(),
        "actions/saturated": is_saturated.float().mean(),
    }
    return loss, info


class Agent:
    """A policy and its critic, trained by method "sdac" or "dacer"."""

    def __init__(self, args, method, bandit):
        self.args = args
        self.method = method
        self.bandit = bandit
        self.num_updates = 0
        self.diffusion = diffusion(args.num_diffusion_steps, SCHEDULES[method], bound=BOX)
        self.actor = DiffusionActor(1, 2, args.hidden_dim, 3, args.num_frequencies)
        # SDAC acts by the moving average of its policy, DACER by the policy
        self.acting_actor = self.actor
        if method == "sdac":
            self.acting_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = EnsembleMLP(1, 1, 2, 1, args.q_hidden_dim, 2)
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), fused=True),
            "critic": torch.optim.Adam(self.critic.parameters(), fused=True),
        }
        self.learning_rates = {"actor": args.policy_lr, "critic": args.q_lr}  # at the start

    def q_fn(self, obs, a):
        """Q (B, N) of actions (B, N, 2). The critic is asked inside the box only."""
        if self.args.oracle_critic:
            return self.bandit.reward(a)
        return self.critic(obs, a.clamp(-BOX, BOX))[0, :, :, 0]

    @torch.no_grad()
    def act(self, noise):
        """Actions (M, 2) made from noise (T, M, 2)."""
        obs = torch.zeros(noise.shape[1], 1)
        a = ddpm_sample(self.acting_actor, obs, noise.unsqueeze(2), self.diffusion)
        return a.squeeze(1)

    @torch.no_grad()
    def denoise(self, noise, t):
        """Where the chains (M, 2) of noise (T, M, 2) are at time t of 1, at step k = T t, rounded up."""
        chain = {}

        def eps_fn(obs, a, k):
            chain[int(k.max())] = a
            return self.acting_actor(obs, a, k)

        obs = torch.zeros(noise.shape[1], 1)
        chain[0] = ddpm_sample(eps_fn, obs, noise.unsqueeze(2), self.diffusion)
        k = math.ceil(t * self.args.num_diffusion_steps)
        return chain[k].squeeze(1)

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
        if self.method == "sdac":
            loss = self.sdac_actor_loss(actions)
        else:
            loss = self.dacer_actor_loss(actions)
        self.descend("actor", loss)
        if self.method == "sdac":
            # larger at first: the first networks are forgotten sooner
            tau = max(self.args.policy_tau, 9 / (self.num_updates + 9))
            soft_update(self.acting_actor, self.actor, tau)
        return loss.item()

    def sdac_actor_loss(self, actions):
        """Denoising of exp(alpha Q), around actions (B, 2) of the past."""
        args = self.args
        B = len(actions)
        draws = Draws(
            k=torch.randint(1, args.num_diffusion_steps + 1, (B, 1)),
            eps=torch.randn(B, 2),
            uniform=torch.rand(B, args.num_samples, 2, dtype=torch.float64),
            chains=None,
        )
        batch = Batch(torch.zeros(B, 1), actions)
        state = State(lam=1.0, q_stats=None, progress=None)
        with torch.no_grad():
            regression, _ = sdac(self.q_fn, self.actor, batch, draws, state, self.diffusion, args)
        loss, _ = denoising_loss(self.actor, regression)
        return loss

    def dacer_actor_loss(self, actions):
        """-Q of as many actions of the policy as there are in a batch (B, 2), noise included."""
        obs = torch.zeros(len(actions), 1)
        noise = torch.randn(self.args.num_diffusion_steps, len(actions), 1, 2)
        perturbation = self.args.noise_scale * torch.randn_like(noise[0])
        loss, _ = dacer_loss(self.actor, self.q_fn, obs, noise, perturbation, self.diffusion)
        return loss

    def descend(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()


def soft_update(target, source, tau):
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def train(args, method, bandit, position):
    """A trained agent, and its actions of the same noise at six times of the training."""
    torch.manual_seed(args.seed)
    agent = Agent(args, method, bandit)
    film = []
    film_noise = torch.randn(args.num_diffusion_steps, 500, 2)
    film_updates = [math.ceil(args.total_updates * share) for share in FILM_SHARES]
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
        a = agent.act(torch.randn(args.num_diffusion_steps, args.num_envs, 2))
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


def sample_target(bandit, alpha, num_samples):
    """Actions (num_samples, 2) of exp(alpha reward): a cell of GRID, then a point in it at random."""
    a = GRID.reshape(-1, 2)
    probabilities = (alpha * bandit.reward(a)).softmax(dim=0)  # (6561,)
    cells = torch.multinomial(probabilities, num_samples, replacement=True)
    width = AXIS[1] - AXIS[0]
    jitter = width * (torch.rand(num_samples, 2) - 0.5)
    return (a[cells] + jitter).clamp(-BOX, BOX)


def measure(bandit, a, target):
    """The numbers of results.json for actions (M, 2), beside M of exp(alpha reward)."""
    counts = bandit.mode_counts(a)
    cost = torch.cdist(a.double(), target.double()).square()  # (M, M)
    matching = linear_sum_assignment(cost)  # the best one of the two samples
    return {
        "mean_reward": bandit.reward(a).mean().item(),
        "mode_counts": counts,
        "high_mode_share": [counts[name] / len(a) for name in bandit.high_modes],
        "low_mode_share": counts["low"] / len(a),
        "w2_to_target": cost[matching].mean().sqrt().item(),
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
    A chain is no map: it has noise of its own in the steps after the first.
    """
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003, "color": "0.45"}
    figure, axes = plt.subplots(1, len(samples), figsize=(4 * len(samples), 4.6), layout="constrained")
    for ax, (name, a) in zip(np.atleast_1d(axes), samples.items(), strict=True):
        label = caption(bandit, a)
        if name == "target":
            draw_panel(ax, bandit.reward(GRID), a, "exp(alpha r)", label)
            continue
        draw_panel(ax, bandit.reward(GRID), title=name.upper(), label=label)
        ax.quiver(*noise.T, *(ends[name] - noise).T, **arrow)
        ax.scatter(*noise.T, s=8, c="black", zorder=3)
        ax.scatter(*ends[name].T, s=14, c="crimson", zorder=4)
    figure.savefig(path, dpi=90)


def draw_film(path, bandit, films):
    """Actions of the same noise in the course of training, a row for each method."""
    size = (12, 2.3 * len(films))
    figure, axes = plt.subplots(len(films), 6, figsize=size, layout="constrained", squeeze=False)
    for row, (name, film) in zip(axes, films.items(), strict=True):
        for ax, (update, a) in zip(row, film, strict=True):
            draw_panel(ax, bandit.reward(GRID), a, f"{name.upper()}, update {update:,}")
    figure.savefig(path, dpi=90)


def draw_robustness(path, bandit, landscapes, chains):
    """Figures 6, 16 to 18: Q (81, 81), and chains (4, M, 2) at four times, clean and perturbed, by policy."""
    bump = f"a bump of height {bandit.bump_scale}, std {bandit.bump_std}"
    size = (11, 2.4 * len(chains))
    figure, axes = plt.subplots(len(chains), 5, figsize=size, layout="constrained")
    for row, name in zip(axes, chains, strict=True):
        draw_panel(row[0], landscapes[name], title=f"Q of {name.upper()}", cmap="viridis")
        for ax, t, a in zip(row[1:], TIMES, chains[name], strict=True):
            label = caption(bandit, a) if t == 0 else ""
            draw_panel(ax, bandit.reward(GRID), a, f"t = {t}", label)
    figure.suptitle(f"Perturbed: noise of std {bandit.noise}, {bump}", fontsize=10)
    figure.savefig(path, dpi=90)


def exit_with_error(message, code=2):
    print("error:", " ".join(message.split()), file=sys.stderr)  # on one line
    sys.exit(code)


def check_args(args):
    """An error for values that cannot work."""
    may_be_zero = ["seed", "learning_starts", "noise_scale", "reward_noise", "bump_scale"]
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            lowest = {"total_updates": 100}.get(name, 0)
            highest = 1 if name == "policy_tau" else 2**63 - 1
            flag = f"--{name.replace('_', '-')}"
            if not lowest <= value <= highest:
                exit_with_error(f"{flag} must be in [{lowest}, {highest}], got {value}")
            if value == 0 and name not in may_be_zero:
                exit_with_error(f"{flag} cannot be 0")
    is_perturbed = args.reward_noise > 0 or args.bump_scale > 0
    of_sdac = ("policy_tau", "num_samples", "proposals")
    has_default_sdac = all(getattr(args, name) == getattr(Args, name) for name in of_sdac)
    rules = {
        "--methods needs sdac, dacer or both": 0 < len(args.methods) == len(set(args.methods)),
        "--policy-tau, --num-samples, --proposals are of --methods sdac": ("sdac" in args.methods or has_default_sdac),
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
    for method in args.methods:
        for suffix, bandit in bandits.items():
            jobs[method + suffix] = pool.submit(train, args, method, bandit, len(jobs))
    agents = {}
    films = {}
    for name, job in jobs.items():
        agents[name], films[name] = job.result()

    # actions of every policy, and two samples of exp(alpha reward)
    torch.manual_seed(args.seed + 2**31)
    T = args.num_diffusion_steps
    noise = torch.randn(T, NUM_SAMPLES, 2)
    side = torch.linspace(-2, 2, 7)
    grid = torch.cartesian_prod(side, side)  # (49, 2)
    grid_noise = torch.randn(T, len(grid), 2)
    grid_noise[0] = grid
    samples = {}
    ends = {}
    landscapes = {}
    chains = {}
    for name, agent in agents.items():
        samples[name] = agent.act(noise)
        ends[name] = agent.act(grid_noise)
        q = agent.q_fn(torch.zeros(len(GRID), 1), GRID)  # a row of the grid as N actions
        landscapes[name] = q.detach()
        chains[name] = torch.stack([agent.denoise(noise, t) for t in TIMES])
    samples["target"] = sample_target(clean, args.inverse_temperature, NUM_SAMPLES)
    reference = sample_target(clean, args.inverse_temperature, NUM_SAMPLES)
    results = {name: measure(clean, a, reference) for name, a in samples.items()}

    with writing(run_folder):
        draw_arrows(run_folder / "arrows.png", clean, grid, ends, samples)
        draw_film(run_folder / "training.png", clean, films)
        if is_perturbed:
            draw_robustness(run_folder / "robustness.png", perturbed, landscapes, chains)
            np.savez_compressed(run_folder / "landscapes.npz", **landscapes)
            np.savez_compressed(run_folder / "chains.npz", **chains)
        np.savez_compressed(run_folder / "samples.npz", target_reference=reference, **samples)
        np.savez_compressed(run_folder / "arrows.npz", noise=grid, **ends)
        packages = ("torch", "numpy", "scipy", "matplotlib")
        results["seconds"] = time.time() - start_time
        results["config"] = asdict(args)
        results["versions"] = {package: metadata.version(package) for package in packages}
        (run_folder / "results.json").write_text(json.dumps(results, indent=2))
    for name, a in samples.items():
        print(f"{name}: {caption(clean, a)}".replace("\n", "; "))
    print(f"{results['seconds']:.0f} s, pictures and results.json in {run_folder}")
