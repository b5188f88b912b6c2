# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "numpy>=2", "tyro>=1,<2", "tqdm>=4.66", "matplotlib>=3.8", "scipy>=1.11"]
# ///
"""SOM and MFP (https://arxiv.org/abs/2605.23365 and 2602.13810) on two-dimensional bandits, in one file.

Run it: python som_bandit_2d.py --task eight-gaussians
Both are trained fully online, as in RL: actions come from the policy, each has its reward queried once, and a critic
is regressed on them (--oracle-critic: the true reward in its place). The paper's Figures 5, 6 and 13 to 18 and
results.json with every number in them go to runs/<run name>/. The method's functions are those of the other scripts.

Conventions: t = 1 is noise, t = 0 is the action, 0 <= r <= t <= 1; alpha is an INVERSE temperature. Actions live in
[-BOX, BOX]^2. The only state is a zero: B copies of it, (B, 1); networks take N actions in each, (B, N, A), A = 2.
"""

import copy
import json
import math
import os
import pathlib
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import tyro
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

plt.switch_backend("Agg")  # draws without a display
BOX = 2.5  # half-width of the action box
RADIUS = 0.5  # an action counts for a mode within this distance of a centre (Appendix H.3)
NUM_SAMPLES = 2000  # one-step actions behind every number
NUM_ODE_STEPS = 100  # Euler steps of the probability-flow ODE
GRID = torch.stack(torch.meshgrid(2 * [torch.linspace(-BOX, BOX, 81)], indexing="xy"), dim=-1)  # (81, 81, 2)


@dataclass
class Args:
    exp_name: str = "som_bandit_2d"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise and rewards
    task: Literal["eight-gaussians", "two-moons", "checkerboard"] = "eight-gaussians"  # the reward (Appendix F)
    oracle_critic: bool = False  # the true reward in the critic's place: what is left is not the critic's error
    reward_noise: float = 0.0  # std of the noise on each queried reward (Appendix H.1); draws the robustness grid
    bump_scale: float = 0.0  # height of a bump added to the reward at the origin (Appendix H.2, c); draws it too
    bump_std: float = 0.5  # its width (Appendix H.2, sigma)
    # Algorithm specific arguments
    total_updates: int = 2_000  # updates of each policy
    num_envs: int = 64  # actions tried before each update, one reward query each
    learning_starts: int = 2_000  # uniform random actions before learning
    batch_size: int = 256  # actions in an update (B)
    policy_lr: float = 4e-3  # learning rate of the policy, falls linearly to 0
    q_lr: float = 2e-2  # learning rate of the critic, falls linearly to 0
    q_updates: int = 4  # updates of the critic for each of the policy, each on a batch of its own
    hidden_dim: int = 128  # width of the policy's 3 hidden layers
    q_hidden_dim: int = 32  # width of the critic's 2 hidden layers
    num_frequencies: int = 1  # sines and cosines of time: 1 rad alone; 8 fill 1 to 3 rad
    policy_tau: float = 0.005  # rate of the moving average of the policy that acts
    noise_scale: float = 0.1  # std of the exploration noise
    zero_r_ratio: float = 0.5  # share of the batch with r = 0, as in one-step acting
    reference: Literal["uniform", "prior"] = "prior"  # p_0 ~ exp(alpha Q), the paper's; or ~ N(0, I) exp(alpha Q)
    inverse_temperature: float = 10.0  # alpha
    num_mc_samples: int = 128  # Monte-Carlo samples of the score (K)
    estimator: Literal["mixed", "gradient"] = "mixed"  # see mix_score; # differs from the paper: gradient
    score_scale: float = 10.0  # norm of the rescaled score of Eq 8 (w), uniform only; # differs from the paper: 25
    beta_max: float = 1.0  # beta(1) of the VP schedule, uniform only; beta(0) is 0.1
    best_of_n: int = 32  # MFP: candidate actions in acting and imitation (N)


class Bandit:
    """A mixture of Gaussians as the reward, divided by its maximum (Appendix F), and its perturbations (Appendix H)."""

    def __init__(self, task: str, noise: float = 0.0, bump_scale: float = 0.0, bump_std: float = 0.5):
        self.noise, self.bump_scale, self.bump_std = noise, bump_scale, bump_std
        if task == "eight-gaussians":
            angles = torch.arange(8) * math.pi / 4
            self.centres, self.std = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], dim=1), 0.3
            self.weights = torch.tensor([2.0, 1.0] * 4)
            self.high_modes = {"N": [2], "E": [0], "S": [6], "W": [4]}
        elif task == "two-moons":
            angles, shift = torch.linspace(0, math.pi, 12), torch.tensor([0.5, 0.25])
            upper = 1.2 * (torch.stack([angles.cos(), angles.sin()], dim=1) - shift)
            self.centres, self.std, self.weights = torch.cat([upper, -upper]), 0.2, torch.ones(24)
            names = "upper W", "upper E", "lower W", "lower E"
            self.high_modes = {name: [*range(i, i + 6)] for name, i in zip(names, (6, 0, 12, 18), strict=True)}
        else:
            row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
            row, column = row[(row + column) % 2 == 0], column[(row + column) % 2 == 0]
            self.centres, self.std = torch.stack([column - 1.5, row - 1.5], dim=1), 0.25
            self.weights = torch.where(row % 2 == 0, 2.0, 1.0)
            self.high_modes = {"NW": [4], "NE": [5], "SW": [0], "SE": [1]}
        self.low_modes = torch.nonzero(self.weights < self.weights.max()).flatten().tolist()
        self.max_density, peak = 1.0, self.centres
        for _ in range(200):  # mean shift climbs from the centres to the maximum
            peak = self.log_components(peak).softmax(dim=1) @ self.centres
        self.max_density = self.reward(peak).max().item()

    def log_components(self, a: torch.Tensor) -> torch.Tensor:
        """log w_i exp(-|a - m_i|^2 / 2 std^2) (M, modes) of actions (M, 2); the square is expanded: one product."""
        scaled, centres = a / self.std, self.centres / self.std
        offset = self.weights.log() - 0.5 * centres.square().sum(dim=1) - math.log(self.max_density)
        return torch.addmm(offset, scaled, centres.T) - 0.5 * scaled.square().sum(dim=1, keepdim=True)

    def reward(self, a: torch.Tensor) -> torch.Tensor:
        """Rewards in [0, 1] of any number of actions (..., 2)."""
        return self.log_components(a.reshape(-1, 2)).exp().sum(dim=1).reshape(a.shape[:-1])

    def query(self, a: torch.Tensor) -> torch.Tensor:
        """One answer for each of the actions (M, 2): the reward, the bump at the origin and noise (Appendix H)."""
        bump = self.bump_scale * torch.exp(-0.5 * (a / self.bump_std).square().sum(dim=1))
        return self.reward(a) + bump + self.noise * torch.randn(len(a))

    def mode_counts(self, a: torch.Tensor) -> dict[str, int]:
        """How many of the actions (M, 2) are within RADIUS of each high mode, and of any low one (Appendix H.3)."""
        near = (a.unsqueeze(1) - self.centres).norm(dim=-1) <= RADIUS  # (M, modes)
        groups = (self.high_modes | {"low": self.low_modes}).items()
        return {name: int(near[:, group].any(dim=1).sum()) for name, group in groups}


# ALGO LOGIC: initialize agent here
class EnsembleMLP(nn.Module):
    """GELU networks in one batched product: B states (B, O), N inputs for each (B, N, D) -> (size, B, N, out)."""

    def __init__(self, size: int, obs_dim: int, in_dim: int, out_dim: int, hidden_dim: int, num_layers: int):
        super().__init__()
        dims = [obs_dim + in_dim, *num_layers * [hidden_dim], out_dim]  # weights (size, in, out), biases (size, 1, out)
        init = [(torch.empty(size, i + 1, o).uniform_(-1, 1) / i**0.5).split([i, 1], 1) for i, o in pairwise(dims)]
        self.weights, self.biases = (nn.ParameterList(x.clone() for x in xs) for xs in zip(*init, strict=True))

    def forward(self, obs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        w_obs, w_x = self.weights[0].split([obs.shape[1], x.shape[2]], dim=1)
        h_obs = torch.baddbmm(self.biases[0], obs.expand(len(w_obs), -1, -1), w_obs)  # (size, B, H), once for N inputs
        h = (h_obs.unsqueeze(2) + (x.flatten(0, 1) @ w_x).unflatten(1, x.shape[:2])).flatten(1, 2)  # (size, B * N, H)
        for w, b in list(zip(self.weights, self.biases, strict=True))[1:]:
            h = torch.baddbmm(b, nn.functional.gelu(h), w)
        return h.unflatten(1, x.shape[:2])


class MeanFlowActor(EnsembleMLP):
    """Average velocity u(a_t, r, t, s): N actions (B, N, A) at times r, t (B, N, 1) in B states (B, O) -> (B, N, A)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, num_layers: int, num_frequencies: int = 8):
        super().__init__(1, obs_dim, act_dim + 4 * num_frequencies, act_dim, hidden_dim, num_layers)
        # radians over t in [0, 1]: the loss multiplies du/dt, and much higher frequencies keep MeanFlow from training
        self.register_buffer("frequencies", torch.linspace(1.0, 3.0, num_frequencies))

    def forward(self, obs: torch.Tensor, a_t: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        phase_t, phase_dt = t * self.frequencies, (t - r) * self.frequencies  # (B, N, num_frequencies)
        embedding = phase_t.sin(), phase_t.cos(), phase_dt.sin(), phase_dt.cos()
        return super().forward(obs, torch.cat([a_t, *embedding], dim=-1)).squeeze(0)


# ALGO LOGIC: the method. Forward SDE da = f a dt + g dW, a_t = mu a_0 + sigma eps; schedules return mu, sigma, f, g^2.
def vp_schedule(t, beta_min, beta_max):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min) (Eq 1)."""
    beta = beta_min + t * (beta_max - beta_min)
    int_beta = beta_min * t + 0.5 * t**2 * (beta_max - beta_min)
    return torch.exp(-0.5 * int_beta), torch.sqrt(-torch.expm1(-int_beta)), -0.5 * beta, beta


def cosine_schedule(t):
    """Variance preserving, mu = cos(pi t / 2); its beta = pi tan(pi t / 2) is unbounded: the last 1e-3 is cut off."""
    angle = 0.5 * math.pi * t.clamp(max=0.999)
    beta = math.pi * torch.tan(angle)
    return torch.cos(angle), torch.sin(angle), -0.5 * beta, beta


def estimate_score(q_fn, obs, a_t, mu, sigma, eps, alpha, reference="uniform", q_norm=None, clip=True):
    """Monte-Carlo score grad log p_t(a_t|s) (B, A) (Eq 4 and 5), and the logits alpha Q (B, K) of its samples.

    q_fn: (B, O), (B, K, A) -> (B, K). a_t: (B, A). mu, sigma: (B, 1). eps: (B, K, A) standard normal.
    reference: p_0 ~ exp(alpha Q) ("uniform") or p_0 ~ N(0, I) exp(alpha Q) ("prior", beyond the paper).
    q_norm: Q is divided by its std over all samples ("batch"), or by the mean over states of that of K ("state").
    clip: Q is asked inside [-1, 1]^A only, where it was trained; outside, the gradient is zero."""

    def log_sum_exp(a_t):
        # prior: the square of N(a_0; 0, I) N(a_t; mu a_0, sigma^2 I) completed
        center, std = (a_t / mu, sigma / mu) if reference == "uniform" else (mu * a_t, sigma)
        a_0 = center.unsqueeze(1) + std.unsqueeze(1) * eps  # (B, K, A)
        q = q_fn(obs, a_0.clamp(-1, 1) if clip else a_0)  # (B, K)
        if q_norm is not None:
            q = q / ((q.std() if q_norm == "batch" else q.std(dim=1).mean()).detach() + 1e-6)
        return torch.logsumexp(alpha * q, dim=1).sum(), alpha * q

    with torch.no_grad():  # the gradient with respect to a_t alone: none to the critic's weights
        score, logits = torch.func.grad(log_sum_exp, has_aux=True)(a_t)
    return (score if reference == "uniform" else score - a_t), logits


def mix_score(score, logits, a_t, mu, sigma, eps, reference, local_var):
    """The score (B, A) of estimate_score mixed with a second estimate of it from the same samples and logits.

    Integrated by parts, the gradient of log E exp(alpha Q) is also the softmax-weighted mean of eps, times 1/sigma
    (prior: mu/sigma, minus a_t). That has little variance at large sigma, the gradient of Q at small; the mixture
    has none at all where exp(alpha Q) is one Gaussian of variance local_var.
    """
    eps_mean = (logits.softmax(dim=1).unsqueeze(-1) * eps).sum(dim=1)  # (B, A)
    total = sigma.square() + (local_var if reference == "prior" else local_var * mu.square())  # (B, 1)
    share = sigma.square() / total
    if reference == "prior":
        return (1 - share) * score + mu * sigma / total * eps_mean - share * a_t
    return (1 - share) * score + sigma / total * eps_mean


def pf_ode_velocity(a_t, score, f, g2, score_scale=None):
    """Velocity f a_t - g^2/2 score (B, A) of the probability-flow ODE (Eq 2, 6, B.2); score_scale is w of Eq 8."""
    if score_scale is not None:
        score = score_scale * score / (score.norm(dim=-1, keepdim=True) + 1e-6)
    return f * a_t - 0.5 * g2 * score


def sample_r_t(uniform, zero_r_ratio=0.0):
    """Two uniform numbers (B, 2) as times r <= t, each (B, 1) (Algorithm 1); r = 0 in a share of the rows."""
    r, t = uniform.amin(dim=1, keepdim=True), uniform.amax(dim=1, keepdim=True)
    return r * (torch.arange(len(r), device=r.device).unsqueeze(1) >= zero_r_ratio * len(r)), t


def meanflow_loss(u_fn, a_t, r, t, v):
    """Squared error (B, N) of u_fn(a_t, r, t) against stopgrad(v - (t - r) du/dt) (Eq 7), and du/dt (B, N, A)."""
    u, dudt = torch.func.jvp(u_fn, (a_t, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))  # along the flow
    u_tgt = (v - (t - r) * dudt).detach()
    return (u - u_tgt).square().sum(dim=-1), dudt.detach()


def mfp_loss(u_fn, a_t, r, t, v, tangent="marginal"):
    """L_MF and L_IVC (B, N) of u_fn(a_t, r, t), and du/dt (B, N, A) along the flow.

    tangent: the flow's direction is u_fn's own velocity u(a_t, t, t) ("marginal"), or the path's v ("conditional").
    """
    u_tt = u_fn(a_t, t, t)
    velocity = u_tt.detach() if tangent == "marginal" else v
    u, dudt = torch.func.jvp(u_fn, (a_t, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))
    u_tgt = (v - (t - r) * dudt).detach()
    return (u - u_tgt).square().sum(dim=-1), (u_tt - v).square().sum(dim=-1), dudt.detach()


def best_of_n(u_fn, q_fn, obs, noise):
    """One-step actions noise - u(noise, 0, 1, s): the one of highest Q (B, A), and all N (B, N, A) (Algorithm 1)."""
    r = torch.zeros_like(noise[..., :1])
    candidates = (noise - u_fn(obs, noise, r, r + 1)).clamp(-1, 1)
    return candidates[torch.arange(len(obs), device=obs.device), q_fn(obs, candidates).argmax(dim=1)], candidates


class Agent:  # a policy and its critic, trained by method "som" or "mfp"
    def __init__(self, args: Args, method: str, bandit: Bandit):
        self.args, self.method, self.bandit, self.num_updates = args, method, bandit, 0
        self.actor = MeanFlowActor(1, 2, args.hidden_dim, 3, args.num_frequencies)
        self.acting_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = EnsembleMLP(1, 1, 2, 1, args.q_hidden_dim, 2)
        groups = (self.actor, args.policy_lr), (self.critic, args.q_lr)
        self.optimizer = torch.optim.Adam([{"params": [*net.parameters()], "lr": lr} for net, lr in groups], fused=True)
        self.decay = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, args.total_updates)
        self.sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=args.seed).draw(args.num_mc_samples)  # (K, 2)
        vp_beta = partial(vp_schedule, beta_min=0.1, beta_max=args.beta_max)
        self.schedule = cosine_schedule if args.reference == "prior" else vp_beta

    def q_fn(self, obs: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Q (B, N) of actions (B, N, 2); the critic is asked inside the box only."""
        return self.bandit.reward(a) if self.args.oracle_critic else self.critic(obs, a.clamp(-BOX, BOX))[0, :, :, 0]

    @torch.no_grad()
    def act(self, noise: torch.Tensor) -> torch.Tensor:
        """Of the one-step actions of noise (B, N, 2) the best (B, 2); best_of_n works in units of BOX."""
        obs, u_fn = torch.zeros(len(noise), 1), lambda obs, a, r, t: self.acting_actor(obs, BOX * a, r, t) / BOX
        return BOX * best_of_n(u_fn, lambda obs, a: self.q_fn(obs, BOX * a), obs, noise / BOX)[0]

    def denoise(self, noise: torch.Tensor, t: float) -> torch.Tensor:
        """Where noise (M, 2) is at time t: eps - (1 - t) u(eps, t, 1), one network evaluation too."""
        end = torch.ones(len(noise), 1, 1)
        return noise - (1 - t) * self.acting_actor(end[:, 0] - 1, noise.unsqueeze(1), t * end, end).squeeze(1)

    def velocity(self, a_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Velocity (B, 2) of the probability-flow ODE of exp(alpha Q), at a_t (B, 2) and t (B, 1)."""
        args, (mu, sigma, f, g2) = self.args, self.schedule(t)
        # differs from the paper: Sobol points, for each row shifted around the torus, in place of independent ones
        eps = torch.special.ndtri((self.sobol + torch.rand(len(a_t), 1, 2)).frac().clamp(1e-5, 1 - 1e-5))  # (B, K, 2)
        alpha, reference, obs = args.inverse_temperature, args.reference, torch.zeros(len(a_t), 1)
        score, logits = estimate_score(self.q_fn, obs, a_t, mu, sigma, eps, alpha, reference, clip=False)
        if args.estimator == "mixed":
            local_var = self.bandit.std**2 / alpha  # of exp(alpha Q) around a mode
            score = mix_score(score, logits, a_t, mu, sigma, eps, reference, local_var)
        return pf_ode_velocity(a_t, score, f, g2, args.score_scale if reference == "uniform" else None)

    def actor_loss(self, actions: torch.Tensor) -> torch.Tensor:
        """SOM: regression on the velocity field around actions (B, 2). MFP: on straight paths to its best of N."""
        args, B, obs = self.args, len(actions), torch.zeros(len(actions), 1)
        (r, t), eps = sample_r_t(torch.rand(B, 2), args.zero_r_ratio), torch.randn(B, 2)
        if self.method == "som":
            mu, sigma, _, _ = self.schedule(t)
            a_t = mu * actions + sigma * eps
            inputs = (x.unsqueeze(1) for x in (a_t, r, t, self.velocity(a_t, t)))
            return meanflow_loss(partial(self.actor, obs), *inputs)[0].mean()
        best = self.act(torch.randn(B, args.best_of_n, 2))  # (B, 2)
        a_t, v = (1 - t) * best + t * eps, eps - best
        mf, ivc, _ = mfp_loss(partial(self.actor, obs), *(x.unsqueeze(1) for x in (a_t, r, t, v)))
        return (mf + ivc).mean()

    def update(self, actions: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
        """One policy step on actions (S, B, 2), a critic step for each of S batches with rewards (S, B); the losses."""
        self.num_updates += 1
        actor_loss = self.actor_loss(actions[0])
        for i, (a, reward) in enumerate(zip(actions, rewards, strict=True)):
            q = self.q_fn(torch.zeros(len(a), 1), a.unsqueeze(1)).squeeze(1)
            qf_loss = (q - reward).square().mean()  # an oracle has no gradient, and no weights to move
            self.optimizer.zero_grad()
            (qf_loss if i else qf_loss + actor_loss).backward()
            self.optimizer.step()
        self.decay.step()
        tau = max(self.args.policy_tau, 9 / (self.num_updates + 9))  # forgets the first networks sooner
        with torch.no_grad():
            torch._foreach_lerp_([*self.acting_actor.parameters()], [*self.actor.parameters()], tau)
        return actor_loss.item(), qf_loss.item()


def train(args: Args, method: str, bandit: Bandit, position: int) -> tuple[Agent, list]:
    """A trained agent, and its one-step actions of the same noise at six times in training."""
    torch.manual_seed(args.seed)
    agent, film, film_noise = Agent(args, method, bandit), [], torch.randn(500, 1, 2)
    rows = args.learning_starts + args.total_updates * args.num_envs
    actions, rewards = BOX * (2 * torch.rand(rows, 2) - 1), torch.empty(rows)
    rewards[: args.learning_starts] = bandit.query(actions[: args.learning_starts])
    frames = {math.ceil(args.total_updates * share) for share in (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)}
    progress = tqdm(range(1, args.total_updates + 1), method, unit="update", position=position, disable=None)
    for update in progress:
        # ALGO LOGIC: put action logic here
        a = agent.act(torch.randn(args.num_envs, args.best_of_n if method == "mfp" else 1, 2))
        a = (a + args.noise_scale * torch.randn_like(a)).clamp(-BOX, BOX)
        end = args.learning_starts + update * args.num_envs
        actions[end - args.num_envs : end], rewards[end - args.num_envs : end] = a, bandit.query(a)
        # ALGO LOGIC: training.
        slots = torch.randint(end, (1 if args.oracle_critic else args.q_updates, args.batch_size))
        actor_loss, qf_loss = agent.update(actions[slots], rewards[slots])
        if not math.isfinite(actor_loss + qf_loss):
            fail(f"a loss of {method} is not finite at update {update}, seed {args.seed}", code=1)
        if update % 100 == 0:
            progress.set_postfix(reward=bandit.reward(a).mean().item(), actor_loss=actor_loss, q=qf_loss)
        if update in frames:
            film.append((update, agent.act(film_noise)))
    return agent, film


@torch.no_grad()
def integrate(agent: Agent, a: torch.Tensor, seed: int) -> torch.Tensor:
    """Ends of the probability-flow ODE from noise a (M, 2): Euler steps with the field the policy is trained on."""
    torch.manual_seed(seed)
    for t in torch.linspace(1, 1 / NUM_ODE_STEPS, NUM_ODE_STEPS):  # split: a part fits into the processor's cache
        a = torch.cat([x - agent.velocity(x, t.expand(len(x), 1)) / NUM_ODE_STEPS for x in a.split(256)])
    return a


def measure(bandit: Bandit, a: torch.Tensor, ode: torch.Tensor) -> dict:
    """The numbers of results.json for actions (M, 2); ode are M ends of the probability-flow ODE."""
    counts, cost = bandit.mode_counts(a), torch.cdist(a.double(), ode.double()).square()
    return {
        "mean_reward": bandit.reward(a).mean().item(),
        "mode_counts": counts,
        "high_mode_share": [counts[name] / len(a) for name in bandit.high_modes],
        "low_mode_share": counts["low"] / len(a),
        "w2_to_pf_ode": cost[linear_sum_assignment(cost)].mean().sqrt().item(),  # the best matching of the two samples
    }


def panel(ax, values, a=None, title="", label="", cmap="Blues", **kwargs):
    """A landscape (81, 81) over GRID, and actions (M, 2) on it."""
    image = ax.imshow(values.numpy(), cmap, extent=2 * (-BOX, BOX), origin="lower", interpolation="bilinear", **kwargs)
    if a is not None:
        ax.scatter(*a.T, s=2, c="crimson", alpha=0.5, linewidths=0)
    ax.set(xlim=(-BOX, BOX), ylim=(-BOX, BOX), xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(label, fontsize=8)
    return image


def caption(bandit: Bandit, a: torch.Tensor) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in bandit.mode_counts(a).items())
    return f"mean reward {bandit.reward(a).mean():.2f}\n{counts}"


def draw_arrows(path: pathlib.Path, bandit: Bandit, noise: torch.Tensor, ends: dict, samples: dict):
    """Figures 5, 13, 14: from the 7x7 grid of noise (black) to the actions (red), over the reward."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    titles = "SOM, one step", "MFP, one step", f"PF-ODE of SOM's field, {NUM_ODE_STEPS} steps"
    for ax, title, (name, end) in zip(axes, titles, ends.items(), strict=True):
        panel(ax, bandit.reward(GRID), title=title, label=caption(bandit, samples[name]))
        ax.quiver(*noise.T, *(end - noise).T, angles="xy", scale_units="xy", scale=1, width=0.003, color="0.45")
        ax.scatter(*noise.T, s=8, c="black", zorder=3)
        ax.scatter(*end.T, s=14, c="crimson", zorder=4)
    figure.savefig(path, dpi=90)


def draw_film(path: pathlib.Path, bandit: Bandit, films: dict):
    """One-step actions of the same noise in the course of training, a row for each method."""
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.5), layout="constrained")
    for row, (method, film) in zip(axes, films.items(), strict=True):
        for ax, (update, a) in zip(row, film, strict=True):
            panel(ax, bandit.reward(GRID), a, f"{method.upper()}, update {update:,}")
    figure.savefig(path, dpi=90)


def draw_scores(path: pathlib.Path, bandit: Bandit, sigma: float = 0.3, num_mc_samples: int = 200):
    """Figure 15: magnitude of the estimated and the true score on the VE path at sigma(t) = sigma."""
    a_t, one = GRID.reshape(-1, 2), torch.ones(len(GRID) ** 2, 1)
    eps = torch.randn(len(a_t), num_mc_samples, 2)
    log_r = lambda a: bandit.log_components(a.flatten(0, 1)).logsumexp(dim=1).unflatten(0, a.shape[:2])  # noqa: E731
    energies = lambda _, a: log_r(a), lambda _, a: 10 * bandit.reward(a)
    right, paper = (estimate_score(q, one, a_t, one, sigma * one, eps, 1.0, clip=False)[0] for q in energies)
    wide = copy.copy(bandit)  # the noised mixture in closed form: the same centres, a larger variance
    wide.std = math.sqrt(bandit.std**2 + sigma**2)
    true = torch.func.grad(lambda a: wide.log_components(a).logsumexp(dim=1).sum())(a_t)
    scores = {"estimated from log r": right, "true, of the density r": true, "the paper's estimate, from 10 r": paper}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    for ax, (title, score) in zip(axes, scores.items(), strict=True):
        top = (paper if score is paper else true).norm(dim=1).max().item()
        image = panel(ax, score.norm(dim=1).reshape(81, 81), None, title, cmap="viridis", vmin=0, vmax=top)
        ax.scatter(*bandit.centres.T, marker="x", s=20, c="white", linewidths=0.8)
        figure.colorbar(image, ax=ax, shrink=0.8)
    text = f"||score|| at sigma(t) = {sigma}. Left and middle are the same on one scale, up to sampling error alone."
    text += "\nThe right one is the score of exp(10 r), another distribution than r: it differs, however good it is."
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path, dpi=90)


def draw_robustness(path: pathlib.Path, bandit: Bandit, agents: dict, noise: torch.Tensor, title: str):
    """Figures 6, 16 to 18: Q and the distribution at four times of the one-step map, clean and perturbed."""
    figure, axes = plt.subplots(4, 5, figsize=(11, 9.5), layout="constrained")
    for row, (name, agent) in zip(axes, agents.items(), strict=True):
        panel(row[0], agent.q_fn(torch.zeros(81, 1), GRID).detach(), None, f"Q of {name.upper()}", cmap="viridis")
        for ax, t in zip(row[1:], (0.75, 0.5, 0.25, 0.0), strict=True):
            a = agent.denoise(noise, t)
            panel(ax, bandit.reward(GRID), a, f"t = {t}", "" if t else caption(bandit, a))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=90)


def fail(message: str, code: int = 2):
    print("error:", *message.split(), file=sys.stderr)  # one line
    sys.exit(code)


def check_args(args: Args):
    """One line and exit code 2 where the run cannot start."""
    zero_too = "seed", "learning_starts", "noise_scale", "zero_r_ratio", "reward_noise", "bump_scale"
    for name, value in vars(args).items():
        high = 1 if name in ("policy_tau", "zero_r_ratio") else 2**63
        if type(value) in (int, float) and not (0 < value <= high or (value == 0 and name in zero_too)):
            fail(f"--{name.replace('_', '-')} must be in {'[' if name in zero_too else '('}0, {high}], got {value}")
    perturbed, field = args.reward_noise + args.bump_scale > 0, (args.score_scale, args.beta_max)
    rules = {
        "--beta-max must be >= 0.1, beta(0)": args.beta_max >= 0.1,
        "--total-updates must be >= 100: the film has six frames": args.total_updates >= 100,
        "--score-scale, --beta-max need --reference uniform": field == (10, 1) or args.reference == "uniform",
        "--reward-noise and --bump-scale need the learned critic": not (args.oracle_critic and perturbed),
        "--bump-std needs --bump-scale": args.bump_scale or args.bump_std == 0.5,
    }
    for rule in [rule for rule, holds in rules.items() if not holds]:
        fail(rule)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_args(args)
    start = time.time()
    name = f"{args.task}__{args.exp_name}__{args.seed}__{int(start)}_{os.getpid()}".replace("/", "_")
    os.makedirs(folder := pathlib.Path("runs", name))
    clean, noisy = Bandit(args.task), Bandit(args.task, args.reward_noise, args.bump_scale, args.bump_std)
    bandits = {"_clean": clean, "": noisy} if args.reward_noise + args.bump_scale > 0 else {"": clean}
    # a thread each: the same numbers on every machine, and two cores train two policies at once
    pool = ProcessPoolExecutor(2, torch.multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    kinds = [(method, suffix) for method in ("som", "mfp") for suffix in bandits]
    jobs = {m + suffix: pool.submit(train, args, m, bandits[suffix], i) for i, (m, suffix) in enumerate(kinds)}
    agents, films = ({name: job.result()[part] for name, job in jobs.items()} for part in (0, 1))
    torch.manual_seed(args.seed + 2**31)
    noise, grid = torch.randn(NUM_SAMPLES, 2), torch.cartesian_prod(*2 * [torch.linspace(-2, 2, 7)])  # (49, 2)
    samples = {name: agent.act(noise.unsqueeze(1)) for name, agent in agents.items()}
    parts = torch.cat([noise, torch.randn(NUM_SAMPLES, 2), grid]).chunk(8)
    ode = torch.cat([*pool.map(integrate, 8 * [agents["som"]], parts, range(args.seed, args.seed + 8))])
    samples["pf_ode"], reference, ode_ends = ode.split([NUM_SAMPLES, NUM_SAMPLES, len(grid)])
    results = {name: measure(clean, a, reference) for name, a in samples.items()}
    np.savez_compressed(folder / "samples.npz", pf_ode_reference=reference, **samples)
    ends = {method: agents[method].act(grid.unsqueeze(1)) for method in ("som", "mfp")} | {"pf_ode": ode_ends}
    draw_arrows(folder / "arrows.png", clean, grid, ends, samples)
    draw_film(folder / "training.png", clean, {method: films[method] for method in ("som", "mfp")})
    draw_scores(folder / "scores.png", clean)
    if len(bandits) > 1:
        title = f"Perturbed: noise of std {args.reward_noise}, a bump of height {args.bump_scale}, std {args.bump_std}"
        draw_robustness(folder / "robustness.png", clean, agents, noise, title)
    versions = {package: metadata.version(package) for package in ("torch", "numpy", "scipy", "matplotlib")}
    results |= {"seconds": time.time() - start, "config": asdict(args), "versions": versions}
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    print(*(f"{name}: {caption(clean, a)}".replace("\n", "; ") for name, a in samples.items()), sep="\n")
    print(f"{results['seconds']:.0f} s, pictures and results.json in {folder}")
