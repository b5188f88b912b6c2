# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2", "tyro>=1,<2",
#   "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""SDAC, DPMD, QSM, DIPO and QVPO, five diffusion policies and their critics, in one file, as one regression.

Run it: python diffusion_continuous_action.py --method sdac --env-id Walker2d-v4 (on a laptop: add --preset laptop)
Five of the six diffusion baselines of SOM (https://arxiv.org/abs/2605.23365) are the same regression,

    mean weight (eps_theta(a_k, k, s) - eps)^2,     a_k = mu_k a_0 + sigma_k noise,

and differ only in where (s, a_0), the target eps and the weight come from. So a method is a function that
returns a Regression(obs, a_k, k, eps, weight), and the five stand side by side:

    sdac   (s, a_0) of the buffer; eps the mean of K noises eps_j, weighted by exp(alpha Q(s, a_j)), where
           a_j is the action that eps_j turns into a_k
    dpmd   (s', a'), the action of the TD target; eps its noise; weight exp(Q / lambda), Q standardised
    qsm    (s, a_0) of the buffer; eps = -c sigma_k grad Q(s, a_k), grad Q in units of its mean size
    dipo   the buffer's s, and its action moved up Q, again and again; eps its noise
    qvpo   s, and the best of K own actions; eps its noise; weight its advantage; a few uniform actions

The rest is one, SOM's protocol (its Table 3). What else differs is data, in the table PRESETS.

    act    a = argmax_i Q(s, a_i) of N chains of T denoising steps from N(0, I), then exploration noise
    critic y = scaled reward + gamma (1 - terminated) min Q'(s', a'), Q' the critics' moving averages,
           a' made as a is. sdac and dpmd act with the policy's moving average; dipo and qvpo make a' with it

The sixth, DACER, differentiates its critic through the chain instead, and has a file of its own. Elsewhere
here one file is one method; this one breaks that rule, so that the five can be read against each other.

Conventions: k = T is noise, k = 0 is the action. Inside the learner actions live in [-1, 1]^A.
alpha is an INVERSE temperature, lambda a temperature. The policy's score is -eps_theta / sigma_k.
Shapes: B states, N actions in each of them, A coordinates: (B, N, A). Twins come first: (2, B, N).
"""

import atexit
import contextlib
import copy
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata, util
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT_FORMAT = "diffusion_continuous_action.py, checkpoints of version 1"
# slots: rows of the buffer. best_actions: DIPO's, of those rows. next_actions: those of the TD target
Batch = namedtuple(
    "Batch",
    "obs next_obs actions rewards terminated slots best_actions next_actions",
    defaults=[None, None, None],
)


@dataclass
class Args:
    method: Literal["sdac", "dpmd", "qsm", "dipo", "qvpo"] = "sdac"  # which regression
    exp_name: str = "sdac"  # name of the experiment, a part of the run's folder (default: the method)
    seed: int = 1  # seed of networks, noise, environments and evaluation
    preset: Literal["laptop"] | None = None  # small networks, a short run; other flags override it
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to train; auto: on a GPU if there is one
    compile: bool = torch.cuda.is_available()  # compile acting and updates (default: on a GPU)
    matmul_precision: Literal["high", "highest"] = "high"  # of products on a GPU: TF32 or float32
    track: bool = False  # also log to Weights and Biases
    capture_video: bool = False  # record one episode of every evaluation in the run's folder
    save_model: bool = False  # write actor, critic and configuration to model.pt at the end
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints
    checkpoint_buffer: bool = True  # keep the replay buffer; else --resume fills a new one
    resume: str | None = None  # folder of a run, or a checkpoint, to go on with
    evaluate: str | None = None  # folder of a run, or a checkpoint, to evaluate
    num_episodes: int = 10  # episodes of an evaluation
    # Algorithm specific arguments. The defaults are SDAC's, PRESETS has those of the other methods
    env_id: str = "Walker2d-v4"  # Gymnasium id; flat observations, bounded continuous actions
    total_timesteps: int = 5_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments stepped together (E)
    learning_starts: int = 30_000  # environment steps with random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in an update (B)
    updates_per_step: int = 1  # critic updates per step of all environments
    policy_frequency: int = 2  # critic updates per policy update
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the networks' moving averages; they move with the policy
    reward_scale: float = 0.2  # factor on the reward
    policy_lr: float = 3e-4  # learning rate of the policy
    q_lr: float = 3e-4  # learning rate of the critics
    hidden_dim: int = 256  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    num_frequencies: int = 8  # sines and cosines of the step k, from 1 rad per step down
    num_diffusion_steps: int = 20  # steps from noise to action (T)
    schedule: Literal["linear", "vp", "cosine"] = "linear"  # of the noise
    best_of_n: int = 32  # candidate actions in exploring and bootstrapping (N)
    eval_best_of_n: int = 32  # candidate actions in evaluation
    policy_q: Literal["mean", "min"] = "min"  # of the twins, in the regression and best-of-N
    acting: Literal["online", "target"] = "target"  # policy that acts; target: the moving average
    bootstrap: Literal["online", "target"] = "online"  # networks that a' and its best-of-N are of
    noise_scale: float = 0.1  # of exploration and a': the noise's std is noise_scale lambda
    autotune: bool = True  # move lambda, from initial_lambda on; without, it is 1 throughout
    initial_lambda: float = 5.0  # lambda at the start, if it moves
    alpha_lr: float = 7e-3  # learning rate of log lambda
    alpha_delay: int = 250  # critic updates per update of log lambda
    target_entropy: float = -0.9  # of the exploration noise, nats per action coordinate: its std ends at 0.098
    num_samples: int = 64  # SDAC: noises in the weighted mean; QVPO: own actions to choose from (K)
    inverse_temperature: float = 5.0  # SDAC: alpha = inverse_temperature / lambda
    # SDAC's K actions are drawn inside the box, or clipped to it
    proposals: Literal["truncated", "clipped"] = "truncated"  # SDAC  # differs from the released code: clipped
    dpmd_norm: Literal["standard", "released"] = "standard"  # DPMD: (Q - m) / s; released code: Q - m / s
    qsm_scale: float = 10.0  # QSM: alpha, with the gradient in units of its mean size
    action_steps: int = 30  # DIPO: steps up the critic, each time that a row is drawn
    action_lr: float = 0.03  # DIPO: their length in every coordinate
    entropy_samples: int = 10  # QVPO: uniform actions for every best one
    entropy_coef: float = 0.02  # QVPO: their weight over the best one's, at the start of the run
    final_entropy_coef: float = 0.002  # QVPO: floor of that weight, which falls linearly towards 0
    eval_frequency: int = 100_000  # environment steps between evaluations; the last is at the end


# What the methods differ in besides their regression. All else is SOM's protocol, its Table 3.
# differs from the released codes. There QSM has T = 5, and clips a_k in every step, not a_0. DIPO and QVPO
# clip the norm of their gradients there. DIPO draws a batch of its own to move actions, and evaluates
# without noise after a_T. SDAC and DPMD start from noise of std 0.5; their policy's learning rate falls
PRESETS = {
    "sdac": dict(schedule="linear", acting="target", bootstrap="online", best_of_n=32),
    "dpmd": dict(schedule="linear", acting="target", bootstrap="online", best_of_n=32),
    "qsm": dict(schedule="vp", acting="online", bootstrap="online", best_of_n=32),
    "dipo": dict(schedule="cosine", acting="online", bootstrap="target", best_of_n=1),
    "qvpo": dict(schedule="cosine", acting="online", bootstrap="target", best_of_n=4),
}
PRESETS["qsm"] |= dict(autotune=False, policy_frequency=1, policy_q="mean")
PRESETS["dipo"] |= dict(autotune=False, policy_frequency=1, noise_scale=0.0)
PRESETS["dipo"] |= dict(num_diffusion_steps=100, eval_best_of_n=1)
PRESETS["qvpo"] |= dict(autotune=False, noise_scale=0.0)

LAPTOP = {"total_timesteps": 200_000, "learning_starts": 5_000, "eval_frequency": 20_000}
LAPTOP |= {"hidden_dim": 64, "batch_size": 128, "policy_lr": 1e-3, "q_lr": 1e-3, "num_envs": 4}
LAPTOP |= {"num_diffusion_steps": 10, "best_of_n": 4, "eval_best_of_n": 4, "num_samples": 16}
LAPTOP |= {"action_steps": 10, "policy_frequency": 1, "autotune": False}
# DPMD imitates its own actions, and improves by their noise: with lambda = 1 throughout they grow alike, and
# it learns nothing. DIPO never chooses among actions: one chain of 40 steps costs as much as the others'
# four of 10. QSM's last step has the length of its noise's variance, with T = 10 it jumps over whole hills
LAPTOP_OWN = {
    "dpmd": dict(autotune=True, alpha_delay=125),
    "dipo": dict(best_of_n=1, eval_best_of_n=1, num_diffusion_steps=40),
    "qsm": dict(num_diffusion_steps=20),
}


def default_args(method, preset=None):
    """The defaults of a method, and on top of them those of a preset."""
    defaults = {"method": method, "exp_name": method, **PRESETS[method]}
    if preset == "laptop":
        defaults |= LAPTOP | LAPTOP_OWN.get(method, {}) | {"preset": preset}
    return Args(**defaults)


def make_env(env_id, video_folder=None):
    if video_folder is None:
        env = gym.make(env_id)
    else:
        env = gym.make(env_id, render_mode="rgb_array")
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: episode == 0)
    # some environments have an info["episode"] of their own
    env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="episode_statistics")
    # np.array copies: some environments return their state itself, and change it in the next step
    return gym.wrappers.TransformObservation(env, np.array, env.observation_space)


def to_box(actions, box):
    """Actions in [-1, 1]^A as actions of an environment, never outside its box, of its dtype."""
    low = box.low.astype(np.float64)
    high = box.high.astype(np.float64)
    share = (np.clip(actions, -1, 1).astype(np.float64) + 1) / 2  # of the way from low to high
    return np.clip(low * (1 - share) + high * share, low, high).astype(box.dtype)


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


class QNetwork(EnsembleMLP):
    """Twin critics: the return, (2, B, N), of N actions (B, N, A) in each state."""

    def forward(self, obs, a):
        return super().forward(obs, a).squeeze(-1)


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


def best_of_n(eps_fn, q_fn, obs, noise, d):
    """Of the actions made from noise (T, B, N, A) the best by Q, (B, A); and all, (B, N, A)."""
    candidates = ddpm_sample(eps_fn, obs, noise, d)
    best = q_fn(obs, candidates).argmax(dim=1)  # (B,)
    return candidates[torch.arange(len(obs), device=obs.device), best], candidates


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


def q_gradient(q_fn, obs, a):
    """grad_a Q(s, a) (B, A) at actions (B, A)."""

    def total(a):
        return q_fn(obs, a.unsqueeze(1)).sum()

    # update_actor's no_grad spares the graph to the critic's weights. func.grad differentiates all the same
    return torch.func.grad(total)(a)


def draw(args, num_states, act_dim, device):
    """The random numbers of a regression. A method that does without a kind of them gets none."""
    T = args.num_diffusion_steps
    num_rows = num_states
    num_uniform = args.num_samples if args.method == "sdac" else 0
    num_chains = 0
    if args.method == "qvpo":
        num_uniform = args.entropy_samples
        num_rows = num_states * (1 + num_uniform)
        num_chains = args.num_samples
    uniform = (num_states, num_uniform, act_dim)
    return Draws(
        k=torch.randint(1, T + 1, (num_rows, 1), device=device),
        eps=torch.randn(num_rows, act_dim, device=device),
        uniform=torch.rand(uniform, dtype=torch.float64, device=device),
        chains=torch.randn(T, num_states, num_chains, act_dim, device=device),
    )


# The five methods have one signature, and return a Regression and diagnostics:
# q_fn: (B, O), (B, N, A) -> (B, N). eps_fn: the policy, (B, O), (B, N, A), (B, N, 1) -> (B, N, A).
# batch: Batch. draws: Draws. state: State. d: Diffusion. Nothing here is differentiated by the policy
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


def dpmd(q_fn, eps_fn, batch, draws, state, d, args):
    """Policy mirror descent, pi exp(Q / lambda) (https://arxiv.org/abs/2502.00361), in the next states."""
    a = batch.next_actions
    q = q_fn(batch.next_obs, a.unsqueeze(1)).squeeze(1)  # (B,)
    mean, std = state.q_stats
    if args.dpmd_norm == "standard":
        n = (q - mean) / (std + 1e-6)
    else:  # all weights are equal as soon as every Q exceeds 3 + mean / std
        n = q - mean / std
    weight = (n.clamp(-3, 3) / state.lam).exp()
    batch_stats = torch.stack([q.mean(), q.std(correction=0)])
    info = {
        "regression/effective_sample_size": weight.sum().square() / weight.square().sum(),
        "q_stats": state.q_stats.lerp(batch_stats, 1e-3),
    }
    a_k = noised(a, draws.eps, draws.k, d)
    return Regression(batch.next_obs, a_k, draws.k, draws.eps, weight), info


def qsm(q_fn, eps_fn, batch, draws, state, d, args):
    """Q-score matching (https://arxiv.org/abs/2312.11752): the score of a_k is alpha grad Q there."""
    a_k = noised(batch.actions, draws.eps, draws.k, d)
    gradient = q_gradient(q_fn, batch.obs, a_k.clamp(-d.bound, d.bound))
    size = gradient.abs().mean()
    # differs from the paper: there eps_hat is -M_q grad Q(s, a_k) with a constant M_q, without sigma, without
    # the gradient's size, and outside the box as well
    eps_hat = -args.qsm_scale * d.sigma[draws.k] * gradient / (size + 1e-6)
    info = {"regression/q_gradient": size}
    weight = a_k.new_ones(len(a_k))
    return Regression(batch.obs, a_k, draws.k, eps_hat, weight), info


def dipo(q_fn, eps_fn, batch, draws, state, d, args):
    """Imitation of the buffer's actions, moved up Q by Adam (https://arxiv.org/abs/2305.13122).

    They are kept beside the rows, whose own actions stay: info["best_actions"] is written back there,
    and the next time that a row is drawn its action moves on from there.
    """
    a = batch.best_actions
    mean = torch.zeros_like(a)
    square = torch.zeros_like(a)
    beta1 = 0.9
    beta2 = 0.999
    for step in range(1, args.action_steps + 1):
        gradient = q_gradient(q_fn, batch.obs, a)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient.square()
        rms = (square / (1 - beta2**step)).sqrt()
        a = a + args.action_lr * mean / (1 - beta1**step) / (rms + 1e-8)
        a = a.clamp(-d.bound, d.bound)
    info = {
        "regression/distance": (a - batch.actions).abs().mean(),
        "best_actions": a,
    }
    a_k = noised(a, draws.eps, draws.k, d)
    weight = a_k.new_ones(len(a_k))
    return Regression(batch.obs, a_k, draws.k, draws.eps, weight), info


def qvpo(q_fn, eps_fn, batch, draws, state, d, args):
    """Imitation of the best of K own actions, weighted by advantage (https://arxiv.org/abs/2405.16173).

    Uniform actions, at a small share of that weight, keep the policy's entropy up.
    """
    candidates = ddpm_sample(eps_fn, batch.obs, draws.chains, d)  # (B, K, A)
    q = q_fn(batch.obs, candidates)  # (B, K)
    q_best, best = q.max(dim=1)
    actions = candidates[torch.arange(len(best), device=best.device), best]  # (B, A)
    advantage = q_best - q.mean(dim=1)  # (B,), never negative
    lowest = min(args.entropy_coef, args.final_entropy_coef)
    coef = (args.entropy_coef * (1 - state.progress)).clamp(min=lowest)
    M = draws.uniform.shape[1]  # uniform actions in each state
    uniform = d.bound * (2 * draws.uniform.flatten(0, 1) - 1)  # (B M, A)
    actions = torch.cat([actions, uniform.to(actions.dtype)])  # (B + B M, A)
    a_k = noised(actions, draws.eps, draws.k, d)
    # every uniform action has state and weight of the best action that it accompanies
    obs = torch.cat([batch.obs, batch.obs.repeat_interleave(M, dim=0)])
    weight = torch.cat([advantage, coef * advantage.repeat_interleave(M)])
    info = {"regression/advantage": advantage.mean()}
    return Regression(obs, a_k, draws.k, draws.eps, weight), info


METHODS = {"sdac": sdac, "dpmd": dpmd, "qsm": qsm, "dipo": dipo, "qvpo": qvpo}


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


def critic_loss(q_twins, target_q_twins, batch, next_actions, args):
    """Squared temporal differences of the twins, against the smaller of the target twins.

    q_twins, target_q_twins: (B, O), (B, 1, A) -> return (2, B, 1). next_actions: (B, A).
    """
    with torch.no_grad():
        next_q = target_q_twins(batch.next_obs, next_actions.unsqueeze(1))  # (2, B, 1)
        next_q = next_q.squeeze(-1).amin(dim=0)  # (B,)
        y = args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminated) * next_q
    q = q_twins(batch.obs, batch.actions.unsqueeze(1)).squeeze(-1)  # (2, B)
    loss = (q - y).square().mean(dim=1).sum()
    info = {
        "losses/qf_loss": loss.detach(),
        "losses/qf_values": q.detach().mean(),
        "losses/td_error": (y - q).detach().square().mean(),
    }
    return loss, info


class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, device):
        super().__init__()
        self.args = args
        self.act_dim = act_dim
        self.device = device
        sizes = (args.hidden_dim, args.num_layers)
        self.actor = DiffusionActor(obs_dim, act_dim, *sizes, args.num_frequencies)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = QNetwork(2, obs_dim, act_dim, 1, *sizes)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("q_stats", torch.tensor([0.0, 1.0]))  # DPMD's running mean and std of Q
        self.register_buffer("progress", torch.tensor(0.0), persistent=False)
        # lambda scales the exploration noise up and the inverse temperature down
        initial_lambda = args.initial_lambda if args.autotune else 1.0
        self.log_lambda = nn.Parameter(torch.tensor(math.log(initial_lambda)))
        self.to(device)
        self.diffusion = diffusion(args.num_diffusion_steps, args.schedule, device=device)
        adam = partial(make_adam, on_gpu=device.type == "cuda", compiled=args.compile)
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr=args.policy_lr),
            "critic": adam(self.critic.parameters(), lr=args.q_lr),
            "lambda": adam([self.log_lambda], lr=args.alpha_lr, compiled=False),  # it steps rarely
        }
        # almost all of the time is spent in these. Without fullgraph a break would be silent, and slow
        compile_ = partial(torch.compile, dynamic=False, fullgraph=True, disable=not args.compile)
        self.best_of_n = compile_(best_of_n)
        self.critic_loss = compile_(critic_loss)
        self.method = compile_(METHODS[args.method])
        self.denoising_loss = compile_(denoising_loss)
        self.candidate_info = compile_(candidate_info)
        self.soft_update = compile_(soft_update)

    def q_fn(self, obs, a):
        """What best-of-N and the regression see of the twins: (B, N)."""
        return self.of_twins(self.critic(obs, a))

    def target_q_fn(self, obs, a):
        return self.of_twins(self.target_critic(obs, a))

    def of_twins(self, q):
        if self.args.policy_q == "mean":
            return q.mean(dim=0)
        return q.amin(dim=0)

    def acting_actor(self):
        return self.target_actor if self.args.acting == "target" else self.actor

    @torch.no_grad()
    def act(self, obs, explore=False, generator=None):
        """Best-of-N actions (B, A) in states (B, O), noisy if explore; and all candidates (B, N, A)."""
        N = self.args.best_of_n if explore else self.args.eval_best_of_n
        shape = (self.args.num_diffusion_steps, len(obs), N, self.act_dim)
        noise = torch.randn(shape, device=self.device, generator=generator)
        actor = self.acting_actor()
        a, candidates = self.best_of_n(actor, self.q_fn, obs, noise, self.diffusion)
        if explore:
            a = self.add_noise(a)
        return a, candidates

    @torch.no_grad()
    def bootstrap(self, next_obs):
        """The actions a' (B, A) of the TD target, and all their candidates."""
        shape = (self.args.num_diffusion_steps, len(next_obs), self.args.best_of_n, self.act_dim)
        noise = torch.randn(shape, device=self.device)
        if self.args.bootstrap == "target":
            actor, q_fn = self.target_actor, self.target_q_fn
        else:
            actor, q_fn = self.actor, self.q_fn
        a, candidates = self.best_of_n(actor, q_fn, next_obs, noise, self.diffusion)
        return self.add_noise(a), candidates

    def add_noise(self, a):
        std = self.args.noise_scale * self.log_lambda.exp()
        return (a + std * torch.randn_like(a)).clamp(-1, 1)

    def update(self, batch, policy_is_due=True):
        """Update the critics and, when it is due, policy and moving averages; returns diagnostics.

        Among them, in info["best_actions"], are those that DIPO wants to have kept.
        """
        next_actions, candidates = self.bootstrap(batch.next_obs)
        batch = batch._replace(next_actions=next_actions)
        info = self.update_critic(batch)
        if policy_is_due:
            info |= self.update_actor(batch)
        return info | self.candidate_info(candidates)

    def update_critic(self, batch):
        critics = (self.critic, self.target_critic)
        loss, info = self.critic_loss(*critics, batch, batch.next_actions, self.args)
        self.descend("critic", loss)
        return info

    def update_actor(self, batch):
        """The policy, then all moving averages."""
        draws = draw(self.args, *batch.actions.shape, self.device)
        with torch.no_grad():
            state = State(self.log_lambda.exp(), self.q_stats, self.progress)
            inputs = (batch, draws, state, self.diffusion, self.args)
            regression, info = self.method(self.q_fn, self.actor, *inputs)
        loss, loss_info = self.denoising_loss(self.actor, regression)
        self.descend("actor", loss)
        self.soft_update(self.target_critic, self.critic, self.args.tau)
        self.soft_update(self.target_actor, self.actor, self.args.tau)
        self.q_stats.copy_(info.pop("q_stats", self.q_stats))
        return info | loss_info | {"losses/lambda": state.lam}

    def update_lambda(self):
        """Move lambda to where noise of std noise_scale * lambda has target_entropy: no data enter."""
        std = self.args.noise_scale * self.log_lambda.detach().exp()
        entropy = 0.5 * math.log(2 * math.pi * math.e) + std.log()
        self.descend("lambda", self.log_lambda * (entropy - self.args.target_entropy))

    def descend(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()


def soft_update(target, source, tau):
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


class ReplayBuffer:
    """Transitions, a row each, on the training device and, for --resume, in a file.

    Time limits are not `terminated`: they bootstrap. Only the last buffer_size rows are sampled.
    A checkpoint holds only the number of rows: to resume from it, the buffer_size rows before it
    must still be there. The older of the two kept checkpoints lies up to 2 * checkpoint_frequency
    steps back, so there are that many rows more than are sampled. The counter is on the device as
    well: adding and sampling never wait for the host.

    best_actions are DIPO's second buffer: the actions of the rows, moved. They go into checkpoints.
    """

    def __init__(self, args, obs_dim, act_dim, device, file, num_added):
        self.size = args.buffer_size
        self.widths = [obs_dim, obs_dim, act_dim, 1, 1]  # of the fields of Batch
        # every column begins at a multiple of 16 bytes, so that compiled kernels read it in place
        self.padded_widths = [4 * math.ceil(width / 4) for width in self.widths]
        self.row_width = sum(self.padded_widths)
        # a run shorter than that needs only total_timesteps rows. Such a buffer never wraps around, so
        # that row i stays in slot i when --resume with more steps makes the buffer larger
        num_rows = min(args.buffer_size + 2 * args.checkpoint_frequency, args.total_timesteps)
        # checkpoints can be a step late, see is_due; and one step to spare
        num_steps = math.ceil(num_rows / args.num_envs) + 2
        num_rows = num_steps * args.num_envs
        if file is None:
            self.on_host = np.zeros((num_rows, self.row_width), np.float32)
        else:
            self.on_host = map_file(file, (num_rows, self.row_width), num_added)
        self.rows = torch.from_numpy(self.on_host).to(device)  # on the CPU the same memory
        width = act_dim if args.method == "dipo" else 0  # of no use to the other methods
        self.best_actions = torch.zeros(num_rows, width, device=device)
        # the device is one step behind the host: an iteration begins by adding the previous step's
        # rows (see add_and_act). So its counter begins num_envs too low, and the first add() makes it
        # num_added. In a resumed run that add() stores the last step for the second time. A new run
        # has no previous step: zeros go to the last num_envs slots, as the counter is negative, and
        # are not sampled
        self.num_added = torch.tensor(num_added - args.num_envs, device=device)
        self.step_rows = torch.arange(args.num_envs, device=device)  # 0, 1, ... in a step

    def pack(self, rows, *columns):
        """Write the columns of transitions into rows, on the host."""
        starts = np.cumsum([0, *self.padded_widths])
        for start, width, column in zip(starts[:-1], self.widths, columns, strict=True):
            rows[:, start : start + width] = column.reshape(-1, width)

    def host_rows(self, num_added):
        """The place, on the host or in the file, of a step's rows after num_added transitions."""
        start = num_added % len(self.on_host)
        return self.on_host[start : start + len(self.step_rows)]

    def add(self, rows):
        slots = (self.num_added + self.step_rows) % len(self.rows)
        self.rows.index_copy_(0, slots, rows)
        actions = rows.split(self.padded_widths, dim=1)[2]
        actions = actions[:, : self.best_actions.shape[1]]
        self.best_actions.index_copy_(0, slots, actions)  # the old row's is forgotten
        self.num_added += len(rows)

    def sample(self, batch_size):
        num_filled = self.num_added.clamp(max=self.size)
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.rows.device)
        age = (uniform * num_filled).long()  # uniform in 0 .. num_filled - 1
        slots = (self.num_added - 1 - age) % len(self.rows)
        columns = self.rows[slots].split(self.padded_widths, dim=1)
        columns = [column[:, :width] for column, width in zip(columns, self.widths, strict=True)]
        obs, next_obs, actions, rewards, terminated = columns
        transitions = (obs, next_obs, actions, rewards.squeeze(1), terminated.squeeze(1))
        return Batch(*transitions, slots, self.best_actions[slots])


# A step asks two things of the device. Compiled on a GPU, each is one CUDA graph
def add_and_act(agent, rb, inbox):
    """Actions (E, A). inbox (E, row_width + O): the previous step's rows, observations to act in."""
    rows, obs = inbox.tensor_split([rb.row_width], dim=1)
    rb.add(rows)
    actions, _ = agent.act(obs, explore=True)
    return actions


def sample_and_update(agent, rb, policy_is_due):
    batch = rb.sample(agent.args.batch_size)
    info = agent.update(batch, policy_is_due)
    best_actions = info.pop("best_actions", batch.best_actions)
    rb.best_actions.index_copy_(0, batch.slots, best_actions)
    return info


class CUDAGraph:
    """A function without arguments: a few plain calls, then one launch for all of its kernels."""

    def __init__(self, function, num_plain_calls=5):
        self.function = function
        self.num_plain_calls = num_plain_calls  # they compile, and make the state of Adam
        self.graph = None

    def __call__(self):
        if self.num_plain_calls > 0:
            self.num_plain_calls -= 1
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()  # of the plain calls
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = self.function()  # recorded, not executed
        self.graph.replay()
        return self.result  # the same memory every time


def make_adam(parameters, lr, on_gpu, compiled):
    """Adam, compiled on a GPU: the library's fused kernel leaves most of the card idle."""
    if not (on_gpu and compiled):
        return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=on_gpu)
    optimizer = torch.optim.Adam(parameters, lr=lr, foreach=True, capturable=True)
    optimizer.step = torch.compile(optimizer.step, dynamic=False)  # it has breaks: no fullgraph
    return optimizer


def candidate_info(candidates):
    """Diagnostics of candidate actions (B, N, A)."""
    return {
        "actions/candidate_std": candidates.std(dim=1, correction=0).mean(),
        "actions/saturated": (candidates.abs() > 0.99).float().mean(),
    }


def make_policy(agent, box, seed=None):
    """The agent without exploration: observations (O,) or (B, O) -> the environment's actions.

    With a seed its noise has a generator of its own: the training's random numbers stay as they are.
    """
    generator = None if seed is None else torch.Generator(agent.device).manual_seed(seed)

    def policy(observation):
        observation = np.asarray(observation, np.float32)
        obs = torch.from_numpy(np.atleast_2d(observation)).to(agent.device)
        actions, _ = agent.act(obs, generator=generator)
        return to_box(actions.cpu().numpy(), box).reshape(*observation.shape[:-1], -1)  # (A,) for (O,)

    return policy


def load_policy(run_folder, device="cpu", **changes):
    """The newest policy of a run: observations (O,) or (B, O) -> actions, in the environment's units.

    changes: of the run's arguments, such as best_of_n=64. Raises ValueError if the newest checkpoint
    cannot be used. Nothing in the file is executed.
    """
    checkpoint = load_checkpoint(Path(run_folder))
    low, high, dtype = checkpoint["action_box"]
    box = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    changes = {"compile": False} | changes
    args = replace(Args(**checkpoint["args"]), **changes)
    agent = Agent(args, checkpoint["obs_dim"], len(low), torch.device(device))
    agent.load_state_dict(checkpoint["agent"])
    return make_policy(agent, box)


def evaluate(policy, env_id, num_episodes, seed, video_folder=None, received_signals=()):
    """Undiscounted returns (num_episodes,) of seeded episodes; None if a signal arrives.

    policy: observations (num_episodes, O) -> actions, both in the environment's units.
    """
    envs = [make_env(env_id, video_folder if i == 0 else None) for i in range(num_episodes)]
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns = np.zeros(num_episodes)
    running = np.ones(num_episodes, dtype=bool)
    while running.any() and not received_signals:
        actions = policy(obs)
        for i in np.flatnonzero(running):  # an environment that has finished is not stepped on
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += reward
            running[i] = not (terminated or truncated)
    for env in envs:
        env.close()
    return None if running.any() else returns


# What a reader of the method may skip: checks, files, signals
def exit_with_error(message, code=2):
    print("error:", " ".join(message.split()), file=sys.stderr)  # on one line
    sys.exit(code)


FLAGS_OF_METHODS = {
    "num_samples": ["sdac", "qvpo"],
    "inverse_temperature": ["sdac"],
    "proposals": ["sdac"],
    "dpmd_norm": ["dpmd"],
    "qsm_scale": ["qsm"],
    "action_steps": ["dipo"],
    "action_lr": ["dipo"],
    "entropy_samples": ["qvpo"],
    "entropy_coef": ["qvpo"],
    "final_entropy_coef": ["qvpo"],
}


def check_args(args):
    """An error for values that cannot work."""
    may_be_zero = "seed learning_starts gamma noise_scale target_entropy"
    may_be_zero = f"{may_be_zero} entropy_samples entropy_coef final_entropy_coef".split()
    defaults = default_args(args.method, args.preset)
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float):
            lowest = {"target_entropy": -math.inf}.get(name, 0)
            highest = 1 if name in ("gamma", "tau") else 2**63 - 1
            if not lowest <= value <= highest:
                exit_with_error(f"{flag} must be in [{lowest}, {highest}], got {value}")
            if value == 0 and name not in may_be_zero:
                exit_with_error(f"{flag} cannot be 0")
        methods = FLAGS_OF_METHODS.get(name, [args.method])
        if args.method not in methods and value != getattr(defaults, name):
            exit_with_error(f"{flag} has no effect: --method {args.method} does not use it")
    last_step = args.total_timesteps - args.total_timesteps % args.num_envs
    rules = {
        "--total-timesteps must be larger, by --num-envs or more, than --learning-starts": (
            last_step - args.num_envs >= max(args.learning_starts, 1)
        ),
        "--buffer-size must be at least --num-envs": args.buffer_size >= args.num_envs,
        "--noise-scale 0 needs --no-autotune": args.noise_scale > 0 or not args.autotune,
        "--device gpu: PyTorch finds no GPU": args.device != "gpu" or torch.cuda.is_available(),
        "--track needs wandb": not args.track or util.find_spec("wandb"),
        "--capture-video needs moviepy": not args.capture_video or util.find_spec("moviepy"),
    }
    for rule, holds in rules.items():
        if not holds:
            exit_with_error(rule)


def env_dimensions(args):
    """Lengths of observations and actions, and the actions' box; an error if not supported."""
    rendering = {"render_mode": "rgb_array"} if args.capture_video else {}  # some take no mode
    try:
        env = gym.make(args.env_id, **rendering)
    except (gym.error.Error, ImportError) as error:  # gymnasium's message names the nearest id
        hint = "ids of other packages: module:Env-v0"
        if args.env_id == "Pusher-v4":
            hint = "use Pusher-v5"
        exit_with_error(f"{args.env_id}: {error}; {hint}")
    obs_space = env.observation_space
    box = env.action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        hint = "supported are flat vectors; gymnasium.wrappers.FlattenObservation makes one"
        exit_with_error(f"{args.env_id} has observations {obs_space}; {hint}")
    is_real = isinstance(box, gym.spaces.Box) and np.issubdtype(box.dtype, np.floating)
    if not is_real or len(box.shape) != 1 or not box.is_bounded() or not (box.low < box.high).all():
        hint = "supported are flat vectors of real numbers with bounds low < high"
        exit_with_error(f"{args.env_id} has actions {box}; {hint}")
    if args.capture_video:
        try:
            env.reset()
            env.render()
        except Exception as error:
            exit_with_error(f"--capture-video: {error}; without a display, set MUJOCO_GL=egl")
    if env.spec.max_episode_steps is None:
        warn(f"{args.env_id} has no time limit; an evaluation lasts until its episodes end")
    # contact margins of MuJoCo's bodies; environments without MuJoCo have none
    margins = getattr(getattr(env.unwrapped, "model", None), "geom_margin", np.zeros(1))
    if margins.any() and [int(x) for x in metadata.version("mujoco").split(".")[:2]] >= [3, 5]:
        warn(f"mujoco >= 3.5 changed the contacts of {args.env_id}; use mujoco < 3.5")
    env.close()
    return obs_space.shape[0], box.shape[0], box


def warn(message):
    print("warning:", message, file=sys.stderr)


def check_compiler(device):
    """An error where torch.compile does not work, before any step is spent."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        exit_with_error(f"--compile does not work here, use --no-compile: {reason}")


def check_finite(place, **arrays):
    """Stop before a NaN, or what float32 makes infinite, reaches the replay buffer or a file."""
    for name, values in arrays.items():
        if not np.isfinite(np.asarray(values).astype(np.float32)).all():
            exit_with_error(f"the {name.replace('_', ' ')} is not finite {place}", code=1)


@contextlib.contextmanager
def writing(path):
    """An error in writing the run's own files ends it with one line."""
    try:
        yield
    except OSError as error:
        exit_with_error(f"{path} cannot be written: {error}; make room or mend the path", code=1)


def map_file(path, shape, num_added):
    """The replay buffer's file. Its space is taken now: a write that finds none kills the process."""
    num_rows, row_width = shape
    size = 4 * num_rows * row_width
    present = path.stat().st_size if path.exists() else 0
    if present < 4 * min(num_added, num_rows) * row_width:
        exit_with_error(f"{path} is missing or short; --no-checkpoint-buffer goes on without it")
    missing = size - present - shutil.disk_usage(path.parent).free
    if missing > 0:
        raise OSError(f"{missing / 1e6:.1f} MB are missing; --no-checkpoint-buffer needs none")
    path.touch()
    with path.open("r+b") as file:  # some file systems reserve nothing in a file that is open for appending
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError:  # a quota, or another process was faster: give back what was taken
            file.truncate(present)
            raise
    return np.memmap(path, np.float32, "r+", shape=shape)


def lock_run(run_folder):
    """Refuse to write where another process does. The lock ends with the process."""
    file = (run_folder / "lock").open("w")
    if util.find_spec("fcntl"):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            exit_with_error(f"{run_folder} is being written by another process")
    return file


def write_file(path, data):
    """Written under another name and renamed: a kill at any moment leaves a whole file."""
    with writing(path):
        path.with_suffix(".tmp").write_bytes(data)
        path.with_suffix(".tmp").replace(path)


def save_checkpoint(path, state):
    """Two checkpoints are kept."""
    data = io.BytesIO()  # torch.save would tell of a full disk by a RuntimeError
    torch.save(state, data)
    write_file(path, data.getbuffer())
    for old in sorted(path.parent.glob("checkpoint_[0-9]*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(path):
    """The newest checkpoint of a run, or one named itself.

    ValueError if it cannot be used, even if an older one can: the message names that one.
    """
    paths = sorted(path.glob("checkpoint_[0-9]*.pt"), reverse=True) if path.is_dir() else [path]
    errors = "" if paths else f"{path} has no checkpoint; "
    for path in paths:
        try:
            if zipfile.ZipFile(path).testzip() is not None:  # torch.load ignores the checksums
                raise ValueError("a checksum does not match")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if checkpoint["format"] != CHECKPOINT_FORMAT:
                raise ValueError(f"it is not of {CHECKPOINT_FORMAT}")
        except Exception as error:
            errors += f"{path} cannot be used: {error}; "
            continue
        if errors:  # a newer one is bad: whether to go back is for the user to decide
            raise ValueError(f"{errors}the newest good one is {path}")
        return checkpoint
    raise ValueError(f"{errors}there is no good one")


def resumed_args(checkpoint):
    """The run's arguments, overridden by what the command line names; some cannot change."""
    args = tyro.cli(Args, default=Args(**checkpoint["args"]))
    fixed = "method preset env_id seed num_envs buffer_size checkpoint_frequency"
    fixed = f"{fixed} hidden_dim num_layers num_frequencies num_diffusion_steps schedule".split()
    for name, before in checkpoint["args"].items():
        is_fixed = name in fixed or name.endswith("_lr") or name == "initial_lambda"
        if is_fixed and getattr(args, name) != before:
            exit_with_error(f"--{name.replace('_', '-')} is {before} here, and cannot change")
    return args


def evaluations_until(path, global_step):
    """The lines of evaluations.csv up to a step: later ones are dropped, and made again."""
    if not path.exists():
        return ["global_step,num_updates,return_mean,return_std,wall_time_s"]
    header, *lines = path.read_text().splitlines()
    return [header] + [line for line in lines if int(line.split(",")[0]) <= global_step]


def is_due(global_step, frequency, args):
    """Whether a multiple of frequency, or the run's end, is among the last num_envs steps."""
    is_last = global_step + args.num_envs > args.total_timesteps
    return is_last or global_step % frequency < args.num_envs


def receive_signals():
    """The signals received so far: the run ends after its step. A second signal kills it."""
    received_signals = []

    def handler(number, frame):
        received_signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return received_signals


if __name__ == "__main__":
    args = tyro.cli(Args)
    # flags count more than the defaults of method and preset: they are read again, on top of those
    args = tyro.cli(Args, default=default_args(args.method, args.preset))
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    run_folder = Path("runs", run_name.replace("/", "_").replace(":", "_"))
    checkpoint = None
    start_step = 0
    both = args.resume is not None and args.evaluate is not None
    if both or args.resume == "" or args.evaluate == "":
        exit_with_error("give the folder of a run, to --resume or to --evaluate")
    source = args.resume or args.evaluate
    if source is not None:
        run_folder = Path(source) if Path(source).is_dir() else Path(source).parent
        # locking creates a file: not in a folder without checkpoints, which load_checkpoint refuses
        if args.resume is not None and (Path(source).is_file() or any(run_folder.glob("checkpoint_[0-9]*.pt"))):
            with writing(run_folder):
                lock = lock_run(run_folder)  # for as long as this variable lives
        try:
            checkpoint = load_checkpoint(Path(source))
        except ValueError as error:
            exit_with_error(str(error))
        if args.evaluate is not None:  # it tracks and films only if this command line asks for it
            checkpoint["args"] |= {"track": False, "capture_video": False}
        args = resumed_args(checkpoint)
        start_step = checkpoint["global_step"]
    check_args(args)
    np.seterr(over="ignore")  # check_finite tells of numbers that float32 does not hold
    obs_dim, act_dim, box = env_dimensions(args)

    # TRY NOT TO MODIFY: seeding. A resumed run begins new episodes, with seeds of their own
    torch.manual_seed(args.seed)
    env_seeds = np.random.SeedSequence([args.seed, start_step]).generate_state(args.num_envs)
    eval_seed = int(np.random.SeedSequence([args.seed, 0, 1]).generate_state(1)[0])

    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision(args.matmul_precision)
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    if args.evaluate is not None:
        changes = {"eval_best_of_n": args.eval_best_of_n, "policy_q": args.policy_q, "acting": args.acting}
        policy = load_policy(source, device, **changes)
        torch.manual_seed(eval_seed)  # the same noise as in training's evaluations
        video_folder = f"{run_folder}/videos" if args.capture_video else None
        returns = evaluate(policy, args.env_id, args.num_episodes, eval_seed, video_folder)
        mean, std = returns.mean(), returns.std()
        print(f"return {mean:.1f} +- {std:.1f}, by episode {returns.round(1).tolist()}")
        sys.exit()

    last_step = args.total_timesteps - args.total_timesteps % args.num_envs
    evaluations = evaluations_until(run_folder / "evaluations.csv", start_step)
    # a checkpoint precedes its step's evaluation: a run that was killed between them lacks it
    evaluation_missing = start_step > 0 and is_due(start_step, args.eval_frequency, args)
    evaluation_missing = evaluation_missing and not evaluations[-1].startswith(f"{start_step},")
    if start_step >= last_step and not evaluation_missing and not args.save_model:
        print(f"{run_folder} is finished at step {start_step}; --total-timesteps MORE goes on")
        sys.exit()
    if args.compile:
        check_compiler(device)
    agent = Agent(args, obs_dim, act_dim, device)
    num_updates = 0
    num_added = 0  # transitions so far
    start_time = time.time()
    if checkpoint is not None:
        num_updates = checkpoint["num_updates"]
        num_added = checkpoint["num_added"] if args.checkpoint_buffer else 0
        start_time -= checkpoint["seconds"]
        agent.load_state_dict(checkpoint["agent"])
        if not args.autotune:
            agent.log_lambda.data.zero_()  # lambda = 1
        for name, optimizer in agent.optimizers.items():
            group = optimizer.param_groups[0]
            of_this_device = "lr", "fused", "foreach", "capturable"
            own = {key: group[key] for key in of_this_device}
            optimizer.load_state_dict(checkpoint["optimizers"][name])
            optimizer.param_groups[0].update(own)  # the run may come from another device
        torch.set_rng_state(checkpoint["cpu_generator"])
        if on_gpu and checkpoint["gpu_generator"] is not None:
            torch.cuda.set_rng_state(checkpoint["gpu_generator"])

    packages = [x for x in ("torch", "gymnasium", "mujoco", "numpy", "tyro") if util.find_spec(x)]
    versions = {package: metadata.version(package) for package in packages}
    config = {"script": Path(__file__).name, **asdict(args), "resume": None, "versions": versions}
    with writing(run_folder):
        run_folder.mkdir(parents=True, exist_ok=checkpoint is not None)
        if checkpoint is None:
            lock = lock_run(run_folder)
        rb_file = run_folder / "replay_buffer.bin" if args.checkpoint_buffer else None
        rb = ReplayBuffer(args, obs_dim, act_dim, device, rb_file, num_added)
    if args.track:
        import wandb

        wandb.init(project="diffusion", name=run_folder.name, config=config, sync_tensorboard=True)
    write_file(run_folder / "config.json", json.dumps(config, indent=2).encode())
    write_file(run_folder / "evaluations.csv", "\n".join([*evaluations, ""]).encode())
    for path in run_folder.glob("checkpoint_[0-9]*.pt"):
        if int(path.stem.split("_")[1]) > start_step:  # after the one resumed from: they are made anew
            path.unlink()
    writer = SummaryWriter(run_folder, purge_step=start_step + 1)  # drops what a killed run logged later
    atexit.register(writer.close)  # an error that ends the run leaves its curves
    received_signals = receive_signals()

    # an inbox row is a transition of the previous step, then the present observation
    inbox = torch.zeros(args.num_envs, rb.row_width + obs_dim, pin_memory=on_gpu)
    outbox = torch.zeros(args.num_envs, act_dim, pin_memory=on_gpu)
    device_inbox = inbox.to(device, copy=True)
    new_rows, new_obs = np.split(inbox.numpy(), [rb.row_width], axis=1)  # views
    if num_added > 0:  # a resumed run begins by adding its last step once more
        new_rows[:] = rb.host_rows(num_added - args.num_envs)
        rb.best_actions[: len(checkpoint["best_actions"])] = checkpoint["best_actions"].to(device)
    act = partial(add_and_act, agent, rb, device_inbox)
    updates = {due: partial(sample_and_update, agent, rb, due) for due in (True, False)}
    if on_gpu and args.compile:
        act = CUDAGraph(act)
        updates = {policy_is_due: CUDAGraph(update) for policy_is_due, update in updates.items()}

    def evaluate_at(global_step):
        """Evaluate, unless a signal arrives, and write the result to evaluations.csv and TensorBoard."""
        policy = make_policy(agent, box, eval_seed)
        video_folder = f"{run_folder}/videos/{global_step}" if args.capture_video else None
        returns = evaluate(policy, args.env_id, args.num_episodes, eval_seed, video_folder, received_signals)
        if returns is None:
            return
        check_finite(f"at step {global_step}, seed {args.seed}; see {run_folder}", evaluation=returns)
        mean, std, seconds = returns.mean(), returns.std(), time.time() - start_time
        evaluations.append(f"{global_step},{num_updates},{mean},{std},{seconds}")
        write_file(run_folder / "evaluations.csv", "\n".join([*evaluations, ""]).encode())
        writer.add_scalar("charts/eval_return", mean, global_step)
        tqdm.write(f"step {global_step}: evaluation return {mean:.1f} +- {std:.1f}")

    if evaluation_missing:
        evaluate_at(start_step)
        if received_signals:
            exit_with_error(f"stopped; go on with --resume {run_folder}", 128 + received_signals[0])

    # TRY NOT TO MODIFY: start the game
    thunks = args.num_envs * [partial(make_env, args.env_id)]
    envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode="SameStep")
    obs, _ = envs.reset(seed=env_seeds.tolist())
    info = {}  # the latest value of every diagnostic
    times = []  # of the first iterations with learning
    steps = range(start_step + args.num_envs, last_step + 1, args.num_envs)
    progress = tqdm(steps, unit="step", unit_scale=args.num_envs, disable=None)
    for global_step in progress:
        place = f"at step {global_step}, seed {args.seed}; see {run_folder}"

        # ALGO LOGIC: the previous step's rows join the buffer, and the policy acts
        new_obs[:] = obs
        device_inbox.copy_(inbox, non_blocking=True)
        outbox.copy_(act(), non_blocking=True)
        if on_gpu:
            actions_sent = torch.cuda.current_stream().record_event()

        # ALGO LOGIC: training. A GPU does it while the environments step, without this step's transitions
        learning = num_added >= max(args.learning_starts, 1)
        if learning:
            agent.progress.fill_(global_step / last_step)
            for _ in range(args.updates_per_step):
                num_updates += 1
                policy_is_due = num_updates % args.policy_frequency == 0
                info |= updates[policy_is_due]()
                if args.autotune and num_updates % args.alpha_delay == 0:
                    agent.update_lambda()

        # TRY NOT TO MODIFY: execute the game and log data.
        if on_gpu:
            actions_sent.synchronize()
        actions = outbox.numpy()
        if global_step <= args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, act_dim).numpy() - 1
        next_obs, rewards, terminated, truncated, infos = envs.step(to_box(actions, box))

        # TRY NOT TO MODIFY: save data to replay buffer; next_obs is of the next episode if one ended
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]
            episode = infos["final_info"]["episode_statistics"]
            writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
            writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
            progress.set_postfix(episodic_return=episode["r"][i], refresh=False)
        check_finite(place, action=actions, reward=rewards, observation=[obs, next_obs])
        check_finite(place, last_observation=real_next_obs)
        rb.pack(new_rows, obs, real_next_obs, actions, rewards, terminated)
        rb.host_rows(num_added)[:] = new_rows  # the device gets, and samples, them with the next inbox
        num_added += args.num_envs
        obs = next_obs

        # once in 100 policy updates, also where updates_per_step jumps over the hundredth
        log_due = num_updates % (100 * args.policy_frequency) < args.updates_per_step
        if learning and (log_due or global_step == last_step):
            scalars = {tag: value.item() for tag, value in info.items()}
            check_finite(place, **scalars)
            scalars["charts/SPS"] = global_step / (time.time() - start_time)
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, global_step)
        if learning and not on_gpu and args.preset is None and len(times) < 20:
            times.append(time.time())
            if len(times) == 20:  # the median leaves out compilation
                hours = np.median(np.diff(times)) * (last_step - global_step) / args.num_envs / 3600
                tqdm.write(f"the rest takes {hours:.1f} hours on this CPU; --preset laptop takes minutes")

        # a checkpoint comes before an evaluation, which may take long. In the first step it shows
        # whether the disk is full
        evaluation_due = is_due(global_step, args.eval_frequency, args)
        checkpoint_due = is_due(global_step, args.checkpoint_frequency, args) or global_step == steps[0]
        saving = checkpoint_due or evaluation_due or len(received_signals) > 0
        if saving:
            weights = torch.nn.utils.parameters_to_vector(agent.parameters())
            check_finite(place, weight=weights.detach().cpu())
            state = {
                "format": CHECKPOINT_FORMAT,
                "args": asdict(args),
                "obs_dim": obs_dim,
                "action_box": (box.low.tolist(), box.high.tolist(), str(box.dtype)),
                "global_step": global_step,
                "seconds": time.time() - start_time,
                "num_updates": num_updates,
                "num_added": num_added if args.checkpoint_buffer else 0,
                "best_actions": rb.best_actions[: num_added if args.checkpoint_buffer else 0].clone(),
                "agent": agent.state_dict(),
                "optimizers": {name: x.state_dict() for name, x in agent.optimizers.items()},
                "cpu_generator": torch.get_rng_state(),
                "gpu_generator": torch.cuda.get_rng_state() if on_gpu else None,
            }
            save_checkpoint(run_folder / f"checkpoint_{global_step:010d}.pt", state)
            with writing(run_folder):
                writer.flush()
        if evaluation_due and not received_signals:
            evaluate_at(global_step)
        if saving and received_signals:  # without a checkpoint in this step the next one saves and ends
            envs.close()
            message = f"stopped at step {global_step}; go on with --resume {run_folder}"
            exit_with_error(message, code=128 + received_signals[0])

    if args.save_model:
        networks = {"actor": agent.acting_actor().state_dict(), "critic": agent.critic.state_dict()}
        data = io.BytesIO()
        torch.save(networks | {"config": config}, data)
        write_file(run_folder / "model.pt", data.getbuffer())
    envs.close()
