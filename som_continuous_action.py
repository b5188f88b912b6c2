# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2", "tyro>=1,<2",
#   "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""SOM, Score-Based One-step MeanFlow Policy Optimization (https://arxiv.org/abs/2605.23365), in one file.

Run it: python som_continuous_action.py --env-id Walker2d-v4 (in minutes on a laptop: add --preset laptop)
The policy turns noise into an action with ONE network evaluation. The field it imitates comes from the critic alone:

    act       a = argmax_i Q(s, a_i), where a_i = eps_i - u(eps_i, 0, 1, s), i = 1..N              (Algorithm 1)
    critic    y = scaled reward + gamma (1 - terminated) min Q'(s', a'), a' as in act, Q' the targets (Section 4.4)
    score     grad log p_t(a_t|s) = grad_{a_t} log sum_k exp(alpha Q(s, (a_t + sigma eps_k) / mu)) (Eq 5)
    velocity  v = -beta/2 (a_t + w score / ||score||), the probability-flow ODE, score at norm w   (Eq 6, 8)
    target    u_tgt = v - (t - r) (v d_a u + d_t u), by one Jacobian-vector product                (Eq 7)
    actor     ||u(a_t, r, t, s) - stopgrad(u_tgt)||^2, a_t = mu a_0 + sigma eps, (s, a_0) from the replay buffer

Conventions: t = 1 is noise, t = 0 is the action, 0 <= r <= t <= 1. Inside the learner actions live in [-1, 1]^A.
The default betas stop short of that: in training a_1 = 0.76 a_0 + 0.65 eps, while acting starts from a_1 = eps.
alpha is an INVERSE temperature: p_0(a|s) is proportional to exp(alpha Q(s, a)), Q in units of its std over actions.
lambda scales the exploration noise up and alpha down. With --autotune it falls along a fixed curve, from
initial_lambda to where the noise has target_entropy: unlike in SAC no data enter. Without, it is 1.
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

CHECKPOINT_FORMAT = "som_continuous_action.py, checkpoints of version 4"
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated")


@dataclass
class Args:
    exp_name: str = "som_continuous_action"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    # small networks; laptop: the method, a short run; peaks and smooth: beyond the paper, long runs
    preset: Literal["laptop", "peaks", "smooth"] | None = None  # other flags override it
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
    deterministic: bool = False  # evaluate the action of noise 0, not the best of N
    # Algorithm specific arguments
    env_id: str = "Walker2d-v4"  # Gymnasium id; flat observations, bounded continuous actions
    total_timesteps: int = 5_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments stepped together (E)
    learning_starts: int = 100_000  # environment steps with random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in an update (B)
    updates_per_step: int = 1  # critic updates per step of all environments
    policy_frequency: int = 1  # critic updates per policy update  # differs from SDAC's code: 2 there
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics, which are moved after each policy update
    policy_tau: float = 0.005  # rate of the actor's moving average, which acts  # differs from the paper: none
    reward_scale: float = 0.2  # factor on the reward
    policy_lr: float = 1e-4  # learning rate of the policy
    q_lr: float = 1e-4  # learning rate of the critics
    anneal_steps: int = 0  # environment steps at the end in which both fall to 0; 0: they stay
    hidden_dim: int = 256  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    num_frequencies: int = 8  # w of sin and cos of w t and w (t - r), from 1 to 3
    critic_loss: Literal["distributional", "mse"] = "mse"  # differs from the paper: DACER's, distributional
    # p_0 ~ reference(a) exp(alpha Q): 1 everywhere, N(0, I), or 1 in [-1, 1]^A and 0 outside
    reference: Literal["uniform", "prior", "box"] = "uniform"  # factor of p_0 beside exp(alpha Q)
    sde: Literal["vp", "ve"] = "vp"  # variance preserving (Eq 1), or exploding (Appendix B)
    num_mc_samples: int = 100  # Monte-Carlo samples of the score (K)
    mc_noise: Literal["normal", "lattice"] = "normal"  # independent, or one Sobol set, shifted
    climb_steps: int = 0  # with --reference box: gradient-ascent steps of each sample; 0: none
    score_dtype: Literal["float32", "bfloat16"] = "float32"  # of the critics' layers in the score
    best_of_n: int = 32  # candidate actions in acting and bootstrapping (N)
    policy_q: Literal["mean", "min"] = "mean"  # of the twins, in the score and best-of-N
    # in the score one number divides Q: its std in the batch, or in a state, averaged over states
    q_norm: Literal["batch", "state"] = "state"  # where Q's std is taken  # differs from the paper: batch
    inverse_temperature: float = 5.0  # of the target: alpha = inverse_temperature / lambda
    score_scale: float = 25.0  # norm of the rescaled score of Eq 8 (w)
    beta_min: float = 0.1  # beta(0) of vp_schedule, which --reference uniform uses
    beta_max: float = 1.0  # beta(1) of it; the paper prints none
    zero_r_ratio: float = 0.5  # share of a batch with r = 0, the r of acting  # differs from the paper: 0.0
    noise_scale: float = 0.1  # of the exploration: its std is noise_scale * lambda
    target_smoothing: bool = False  # the same noise on the next actions, which bootstrap
    autotune: bool = True  # move lambda, from initial_lambda on; without, it is 1 throughout
    initial_lambda: float = 5.0  # lambda at the start, if it moves
    alpha_lr: float = 7e-3  # learning rate of log lambda
    alpha_delay: int = 250  # critic updates per update of log lambda
    target_entropy: float = -0.9  # of the exploration noise, nats per action coordinate: its std ends at 0.098
    eval_frequency: int = 100_000  # environment steps between evaluations; the last is at the end


LAPTOP = {"total_timesteps": 200_000, "learning_starts": 5_000, "eval_frequency": 20_000}
LAPTOP |= {"hidden_dim": 64, "batch_size": 128, "policy_lr": 1e-3, "q_lr": 1e-3, "num_envs": 4}
LAPTOP |= {"num_mc_samples": 8, "best_of_n": 16, "autotune": False}
# beyond the paper: a field that points at the best action, for long runs
PEAKS = LAPTOP | {"total_timesteps": 1_000_000, "policy_q": "min", "autotune": True}
PEAKS |= {"reference": "box", "climb_steps": 3, "num_mc_samples": 4, "mc_noise": "lattice"}
PEAKS |= {"inverse_temperature": 60.0, "initial_lambda": 3.0, "alpha_delay": 1_000}
# the same with more exploration noise, in the critic's target too: learns later, ends higher
SMOOTH = PEAKS | {"noise_scale": 0.2, "target_entropy": -0.19, "initial_lambda": 1.5}
SMOOTH |= {"target_smoothing": True}
PRESETS = {"laptop": LAPTOP, "peaks": PEAKS, "smooth": SMOOTH}


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
    """Twin critics: mean and std of the return, (2, B, N), of N actions (B, N, A) in each state."""

    def forward(self, obs, a):
        mean, std = super().forward(obs, a).unbind(-1)
        return mean, F.softplus(std)

    def mean_return(self, obs, a, hidden_dtype=None):
        """The means alone. hidden_dtype: of the hidden layers' products; the last has that of a."""
        h = self.hidden(obs, a, hidden_dtype)  # (2, B * N, H)
        w = self.weights[-1][:, None, :, 0]  # (2, 1, H)
        b = self.biases[-1][:, :, 0]  # (2, 1)
        # a sum in place of a product: the compiler makes it a part of the kernel before it
        mean = (h * w).sum(dim=-1) + b
        return mean.unflatten(1, a.shape[:2])


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


def ve_schedule(t, sigma_min=0.01, sigma_max=1.0):
    """Variance exploding, sigma = sigma_min (sigma_max / sigma_min)^t (Eq 10, B.2)."""
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    g2 = 2 * math.log(sigma_max / sigma_min) * sigma**2
    return torch.ones_like(t), sigma, torch.zeros_like(t), g2


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


def climb(log_density, a, rate, num_steps, half_width=1.0):
    """Actions (B, K, A) moved up log_density, (B, K, A) -> (B, K), inside the box (beyond the paper).

    A step is rate (B, 1) times the gradient. Its RMS over the coordinates stays below a limit,
    which falls linearly from half_width / 2 to half_width / (2 num_steps).
    """

    def total(a):
        return log_density(a).sum()

    for i in range(num_steps):
        gradient = torch.func.grad(total)(a)
        # a coordinate that pushes against a face of the box has come to its end
        at_its_end = (a.abs() >= half_width) & (a * gradient > 0)
        gradient = torch.where(at_its_end, 0.0, gradient)
        mean_square = gradient.square().mean(dim=-1, keepdim=True)  # (B, K, 1)
        length = mean_square.sqrt() + 1e-6
        limit = 0.5 * half_width * (1 - i / num_steps)
        a = a + torch.minimum(rate.unsqueeze(1), limit / length) * gradient
        a = a.clamp(-half_width, half_width)
    return a


def estimate_peak_score(q_fn, obs, a_t, mu, sigma, eps, alpha, num_steps, q_norm=None, half_width=1.0):
    """As estimate_box_score, for an alpha so large that few of K samples count (beyond the paper).

    The posterior of a_0 given a_t, exp(alpha Q(a_0)) N(a_t; mu a_0, sigma^2), is narrow then around
    its peaks. Each sample climbs one. m is the mean of where they end, weighted by their heights:
    the logits are those of the posterior.
    """
    variance = sigma.clamp(min=1e-3) ** 2
    a_0 = truncated_normal(eps, a_t / mu, sigma / mu, half_width)  # (B, K, A)
    with torch.no_grad():
        scale = q_scale(q_fn(obs, a_0), q_norm)

    def log_posterior(a_0):
        errors = a_t.unsqueeze(1) - mu.unsqueeze(1) * a_0
        log_likelihood = -0.5 * errors.square().sum(dim=-1) / variance
        return alpha * q_fn(obs, a_0) / scale + log_likelihood  # (B, K)

    with torch.no_grad():
        # at this rate one step ends at the peak if Q is linear
        a_0 = climb(log_posterior, a_0, variance / mu**2, num_steps, half_width)
        logits = log_posterior(a_0)
    weights = logits.softmax(dim=1).unsqueeze(-1)  # (B, K, 1)
    m = (weights * a_0).sum(dim=1)  # (B, A)
    return (mu * m - a_t) / variance, logits


def lattice_noise(points, shift):
    """Standard normal eps (B, K, A): points (K, A) of the unit cube plus shift (B, 1, A), modulo 1.

    With a uniform shift every sample is normal, and the K samples of a state lie evenly.
    """
    uniform = (points + shift) % 1.0  # (B, K, A)
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))


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


def best_of_n(u_fn, q_fn, obs, noise):
    """The candidate with the largest Q, (B, A), and all of them, (B, N, A) (Algorithm 1).

    Candidates are noise - u_fn(obs, noise, 0, 1), of noise (B, N, A).
    """
    r = torch.zeros_like(noise[..., :1])  # (B, N, 1)
    t = torch.ones_like(r)
    candidates = (noise - u_fn(obs, noise, r, t)).clamp(-1, 1)
    best = q_fn(obs, candidates).argmax(dim=1)  # (B,)
    return candidates[torch.arange(len(obs), device=obs.device), best], candidates


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


def distributional_critic_loss(q_dist, target_q_dist, batch, next_actions, z, mean_std, args, eps=0.1):
    """Loss of the twins' means and stds as in DACER (Section 4.4); also the next mean_std, and info.

    q_dist, target_q_dist: (B, O), (B, 1, A) -> mean, std of the return, (2, B, 1). z: (B,) normal.
    mean_std: (2, 1) moving average of the predicted std, NaN before the first update. eps: DACER's, for small stds.
    """
    with torch.no_grad():
        target_mean, target_std = target_q_dist(batch.next_obs, next_actions.unsqueeze(1))
        index = target_mean.argmin(dim=0, keepdim=True)  # (1, B, 1), of the twin with the smaller mean
        next_q = target_mean.gather(0, index).flatten()  # (B,)
        next_std = target_std.gather(0, index).flatten()
        discount = args.gamma * (1 - batch.terminated)
        y = args.reward_scale * batch.rewards + discount * next_q
        y_sample = y + discount * next_std * z.clamp(-3, 3)
    mean, std = q_dist(batch.obs, batch.actions.unsqueeze(1))
    mean = mean.squeeze(-1)  # (2, B)
    std = std.squeeze(-1)
    batch_std = std.detach().mean(dim=1, keepdim=True)
    mean_std = torch.where(mean_std.isnan(), batch_std, mean_std.lerp(batch_std, args.tau))
    # only the gradients of this loss mean something. With respect to the mean it is that of
    # -log N(y; mean, std^2), with respect to the std that of -log N(y_sample; mean, std^2), clipped,
    # both times mean_std^2 + eps
    spread = (y_sample - mean).clamp(-3 * mean_std, 3 * mean_std).square()
    mean_pull = (y - mean) / (std.square() + eps)
    std_pull = (spread - std.square()) / (std.pow(3) + eps)
    pulled = mean_pull.detach() * mean + std_pull.detach() * std  # (2, B)
    loss = -((mean_std.square() + eps) * pulled).mean(dim=1).sum()
    info = {
        "losses/qf_loss": loss.detach(),
        "losses/qf_values": mean.detach().mean(),
        "losses/td_error": (y - mean).detach().square().mean(),
        "losses/qf_std": batch_std.mean(),
    }
    return loss, mean_std, info


def actor_loss(u_fn, q_fn, batch, uniform, eps, mc_eps, alpha, args):
    """The policy regressed on the velocity field of exp(alpha Q) (Eq 5 to 8).

    u_fn: (B, O), (B, 1, A), (B, 1, 1), (B, 1, 1) -> (B, 1, A). q_fn: (B, O), (B, K, A) -> (B, K).
    uniform: (B, 2) in [0, 1]. eps: (B, A) and mc_eps: (B, K, A) standard normal.
    """
    r, t = sample_r_t(uniform, args.zero_r_ratio)
    if args.reference != "uniform":
        mu, sigma, f, g2 = cosine_schedule(t)  # mu(1) = 0: a_1 is noise, from which acting starts
    elif args.sde == "vp":
        mu, sigma, f, g2 = vp_schedule(t, args.beta_min, args.beta_max)
    else:
        mu, sigma, f, g2 = ve_schedule(t)
    a_t = mu * batch.actions + sigma * eps
    inputs = (q_fn, batch.obs, a_t, mu, sigma, mc_eps, alpha)
    if args.reference == "box" and args.climb_steps > 0:
        score, logits = estimate_peak_score(*inputs, num_steps=args.climb_steps, q_norm=args.q_norm)
    elif args.reference == "box":
        score, logits = estimate_box_score(*inputs, q_norm=args.q_norm)
    else:
        score, logits = estimate_score(*inputs, reference=args.reference, q_norm=args.q_norm)
    # Eq 8 is for "uniform" only: near t = 1 the cosine schedule's f a_t is large, and only the
    # unscaled score cancels it
    score_scale = args.score_scale if args.reference == "uniform" else None
    v = pf_ode_velocity(a_t, score, f, g2, score_scale)
    flow = [x.unsqueeze(1) for x in (a_t, r, t, v)]  # N = 1 action in each state
    errors, dudt = meanflow_loss(partial(u_fn, batch.obs), *flow)
    loss = errors.mean()
    with torch.no_grad():
        weights = logits.softmax(dim=1)  # (B, K)
        correction = (t - r).unsqueeze(1) * dudt
        v_norm = v.norm(dim=-1).mean()
        info = {
            "losses/actor_loss": loss.detach(),
            "score/norm": score.norm(dim=-1).mean(),
            "score/effective_sample_size": (1 / weights.square().sum(dim=1)).mean(),
            "velocity/norm": v_norm,
            "velocity/dudt_ratio": correction.norm(dim=-1).mean() / v_norm,
        }
        for i in range(4):
            in_bin = ((4 * t).floor() == i).float()  # (B, 1)
            info[f"losses/actor_loss_t{i}"] = (errors * in_bin).sum() / in_bin.sum().clamp(min=1)
    return loss, info


class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, device):
        super().__init__()
        self.args = args
        self.act_dim = act_dim
        self.device = device
        sizes = (args.hidden_dim, args.num_layers)
        self.actor = MeanFlowActor(obs_dim, act_dim, *sizes, args.num_frequencies)
        self.acting_actor = copy.deepcopy(self.actor).requires_grad_(False)  # its moving average
        self.critic = QNetwork(2, obs_dim, act_dim, 2, *sizes)  # twins; mean and, if it is trained, std
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("mean_std", torch.full((2, 1), math.nan))  # of the distributional loss
        # lambda scales the exploration noise up and the inverse temperature down
        initial_lambda = args.initial_lambda if args.autotune else 1.0
        self.log_lambda = nn.Parameter(torch.tensor(math.log(initial_lambda)))
        sobol = torch.quasirandom.SobolEngine(act_dim, scramble=True, seed=0)
        self.register_buffer("sobol", sobol.draw(args.num_mc_samples), persistent=False)  # (K, A)
        self.to(device)
        adam = partial(make_adam, on_gpu=device.type == "cuda", compiled=args.compile)
        # a rate that changes is a tensor: a captured update reads it anew every time
        rate = partial(torch.tensor, device=device) if args.anneal_steps > 0 else float
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr=rate(args.policy_lr)),
            "critic": adam(self.critic.parameters(), lr=rate(args.q_lr)),
            "lambda": adam([self.log_lambda], lr=args.alpha_lr, compiled=False),  # it steps rarely
        }
        self.score_q_fn = partial(self.q_fn, hidden_dtype=getattr(torch, args.score_dtype))
        # almost all of the time is spent in these. Without fullgraph a break would be silent, and slow
        compile_ = partial(torch.compile, dynamic=False, fullgraph=True, disable=not args.compile)
        self.best_of_n = compile_(best_of_n)
        self.critic_loss = compile_(critic_loss)
        self.distributional_critic_loss = compile_(distributional_critic_loss)
        self.actor_loss = compile_(actor_loss)
        self.lattice_noise = compile_(lattice_noise)
        self.candidate_info = compile_(candidate_info)
        self.soft_update = compile_(soft_update)

    def q_fn(self, obs, a, hidden_dtype=None):
        """What best-of-N and the score see of the twins: (B, N)."""
        q = self.critic.mean_return(obs, a, hidden_dtype)  # (2, B, N)
        if self.args.policy_q == "mean":
            return q.mean(dim=0)
        return q.amin(dim=0)

    @torch.no_grad()
    def act(self, obs, explore=False, generator=None, deterministic=False):
        """Best-of-N actions (B, A) in states (B, O), noisy if explore; and all candidates (B, N, A).

        deterministic: the action of noise 0 is the only candidate (beyond the paper).
        """
        if deterministic:
            noise = torch.zeros(len(obs), 1, self.act_dim, device=self.device)
        else:
            shape = (len(obs), self.args.best_of_n, self.act_dim)
            noise = torch.randn(shape, device=self.device, generator=generator)
        a, candidates = self.best_of_n(self.acting_actor, self.q_fn, obs, noise)
        if explore:
            std = self.args.noise_scale * self.log_lambda.exp()
            a = (a + std * torch.randn_like(a)).clamp(-1, 1)
        return a, candidates

    def update(self, batch, policy_is_due=True):
        """Update the critics and, when it is due, policy and moving averages; returns diagnostics."""
        info = self.update_critic(batch)
        if policy_is_due:
            info |= self.update_actor(batch)
        return info

    def update_critic(self, batch):
        next_actions, candidates = self.act(batch.next_obs, explore=self.args.target_smoothing)
        if self.args.critic_loss == "mse":
            q_twins, target_q_twins = self.critic.mean_return, self.target_critic.mean_return
            loss, info = self.critic_loss(q_twins, target_q_twins, batch, next_actions, self.args)
        else:
            z = torch.randn(len(batch.obs), device=self.device)
            loss, mean_std, info = self.distributional_critic_loss(
                self.critic, self.target_critic, batch, next_actions, z, self.mean_std, self.args
            )
            self.mean_std.copy_(mean_std)
        self.descend("critic", loss)
        return info | self.candidate_info(candidates)

    def update_actor(self, batch):
        """The policy, then all moving averages."""
        args = self.args
        B, A = batch.actions.shape
        uniform = torch.rand(B, 2, device=self.device)
        eps = torch.randn(B, A, device=self.device)
        if args.mc_noise == "normal":
            mc_eps = torch.randn(B, args.num_mc_samples, A, device=self.device)
        else:
            mc_eps = self.lattice_noise(self.sobol, torch.rand(B, 1, A, device=self.device))
        alpha = args.inverse_temperature / self.log_lambda.detach().exp()
        loss, info = self.actor_loss(self.actor, self.score_q_fn, batch, uniform, eps, mc_eps, alpha, args)
        self.descend("actor", loss)
        self.soft_update(self.target_critic, self.critic, args.tau)
        self.soft_update(self.acting_actor, self.actor, args.policy_tau)
        info["losses/alpha"] = alpha
        return info

    def update_lambda(self):
        """Move lambda to where noise of std noise_scale * lambda has target_entropy: no data enter."""
        std = self.args.noise_scale * self.log_lambda.detach().exp()
        entropy = 0.5 * math.log(2 * math.pi * math.e) + std.log()
        self.descend("lambda", self.log_lambda * (entropy - self.args.target_entropy))

    def set_learning_rates(self, factor):
        """Those of policy and critics, as args have them, times factor; needs anneal_steps > 0."""
        rates = {"actor": self.args.policy_lr, "critic": self.args.q_lr}
        for name, lr in rates.items():
            (group,) = self.optimizers[name].param_groups
            group["lr"].fill_(factor * lr)

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
        self.num_added += len(rows)

    def sample(self, batch_size):
        num_filled = self.num_added.clamp(max=self.size)
        uniform = torch.rand(batch_size, dtype=torch.float64, device=self.rows.device)
        age = (uniform * num_filled).long()  # uniform in 0 .. num_filled - 1
        slots = (self.num_added - 1 - age) % len(self.rows)
        columns = self.rows[slots].split(self.padded_widths, dim=1)
        columns = [column[:, :width] for column, width in zip(columns, self.widths, strict=True)]
        obs, next_obs, actions, rewards, terminated = columns
        return Batch(obs, next_obs, actions, rewards.squeeze(1), terminated.squeeze(1))


# A step asks two things of the device. Compiled on a GPU, each is one CUDA graph
def add_and_act(agent, rb, inbox):
    """Actions (E, A). inbox (E, row_width + O): the previous step's rows, observations to act in."""
    rows, obs = inbox.tensor_split([rb.row_width], dim=1)
    rb.add(rows)
    actions, _ = agent.act(obs, explore=True)
    return actions


def sample_and_update(agent, rb, policy_is_due):
    batch = rb.sample(agent.args.batch_size)
    return agent.update(batch, policy_is_due)


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
        actions, _ = agent.act(obs, generator=generator, deterministic=agent.args.deterministic)
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


def check_args(args):
    """An error for values that cannot work."""
    may_be_zero = "seed learning_starts gamma zero_r_ratio noise_scale target_entropy climb_steps"
    may_be_zero = f"{may_be_zero} anneal_steps".split()
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            lowest = {"target_entropy": -math.inf, "num_mc_samples": 2}.get(name, 0)
            highest = 1 if name in ("gamma", "tau", "policy_tau", "zero_r_ratio") else 2**63 - 1
            flag = f"--{name.replace('_', '-')}"
            if not lowest <= value <= highest:
                exit_with_error(f"{flag} must be in [{lowest}, {highest}], got {value}")
            if value == 0 and name not in may_be_zero:
                exit_with_error(f"{flag} cannot be 0")
    last_step = args.total_timesteps - args.total_timesteps % args.num_envs
    rules = {
        "--total-timesteps must be larger, by --num-envs or more, than --learning-starts": (
            last_step - args.num_envs >= max(args.learning_starts, 1)
        ),
        "--beta-max must be at least --beta-min": args.beta_max >= args.beta_min,
        "--buffer-size must be at least --num-envs": args.buffer_size >= args.num_envs,
        "--anneal-steps must be at most --total-timesteps": args.anneal_steps <= args.total_timesteps,
        "--noise-scale 0 needs --no-autotune": args.noise_scale > 0 or not args.autotune,
        f"--reference {args.reference} needs --sde vp": args.reference == "uniform" or args.sde == "vp",
        "--climb-steps needs --reference box": args.climb_steps == 0 or args.reference == "box",
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
    fixed = "preset env_id seed num_envs buffer_size checkpoint_frequency"
    fixed = f"{fixed} hidden_dim num_layers num_frequencies".split()
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


def lr_factor_at(global_step, args):
    """Factor on the learning rates: 1, and in the last anneal_steps steps on a straight line to 0."""
    if args.anneal_steps == 0:
        return 1.0
    return min(1.0, (args.total_timesteps - global_step) / args.anneal_steps)


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
    if args.preset is not None:
        preset = PRESETS[args.preset]
        args = tyro.cli(Args, default=Args(preset=args.preset, **preset))
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
        changes = {"best_of_n": args.best_of_n, "policy_q": args.policy_q, "deterministic": args.deterministic}
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
        for name, optimizer in agent.optimizers.items():
            group = optimizer.param_groups[0]
            of_this_device = "lr", "fused", "foreach", "capturable"
            own = {key: group[key] for key in of_this_device}
            optimizer.load_state_dict(checkpoint["optimizers"][name])
            optimizer.param_groups[0].update(own)  # the run may come from another device
        if not args.autotune:
            agent.log_lambda.data.zero_()  # lambda = 1
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

        wandb.init(project="som", name=run_folder.name, config=config, sync_tensorboard=True)
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
            if args.anneal_steps > 0:
                agent.set_learning_rates(lr_factor_at(global_step, args))
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
        networks = {"actor": agent.acting_actor.state_dict(), "critic": agent.critic.state_dict()}
        data = io.BytesIO()
        torch.save(networks | {"config": config}, data)
        write_file(run_folder / "model.pt", data.getbuffer())
    envs.close()
