# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2", "tyro>=1,<2",
#   "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""DACER, diffusion actor-critic with entropy regulator (https://arxiv.org/abs/2405.15177), in one file.

Run it: python dacer_continuous_action.py --env-id Walker2d-v4 (in minutes on a laptop: add --preset laptop)
The policy is a diffusion model of T steps. It is not taught where to go: the critic is differentiated through all of
them, and the entropy, which such a policy does not have in closed form, is kept up by noise on its actions:

    act       a = clip(a_0 + noise_scale lambda xi), a_0 from a_T ~ N(0, I) by T denoising steps, xi ~ N(0, I)
    critic    y = scaled reward + gamma (1 - terminated) min Q'(s', a'), a' as in act; Q is a distribution of returns
    actor     -min Q(s, a), a as in act, differentiated by the weights in all T steps
    lambda    moved until the entropy of actions, that of a Gaussian mixture fitted to them, is target_entropy

Conventions: k = T is noise, k = 0 is the action. Inside the learner actions live in [-1, 1]^A. lambda is the scale of
the noise, alpha in the released code. Evaluation leaves the noise out.
Shapes: B states, N actions in each of them, A coordinates: (B, N, A). Twins come first: (2, B, N). Noise of the T
steps: (T, B, N, A).
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

CHECKPOINT_FORMAT = "dacer_continuous_action.py, checkpoints of version 1"
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated")


@dataclass
class Args:
    exp_name: str = "dacer"  # name of the experiment, a part of the run's folder
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
    # Algorithm specific arguments
    env_id: str = "Walker2d-v4"  # Gymnasium id; flat observations, bounded continuous actions
    total_timesteps: int = 5_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments stepped together (E)
    learning_starts: int = 30_000  # environment steps with random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in an update (B)
    updates_per_step: int = 1  # critic updates per step of all environments
    policy_frequency: int = 2  # critic updates per policy update
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target critics, which are moved after each policy update
    reward_scale: float = 0.2  # factor on the reward
    policy_lr: float = 3e-4  # learning rate of the policy
    q_lr: float = 3e-4  # learning rate of the critics
    hidden_dim: int = 256  # width of a hidden layer, with GELU  # differs from the paper: Mish
    num_layers: int = 3  # hidden layers of policy and critics
    num_frequencies: int = 8  # sines and cosines of the step k, from 1 rad per step down
    num_diffusion_steps: int = 20  # steps from noise to action (T)
    schedule: Literal["linear", "vp", "cosine"] = "vp"  # of the noise
    noise_scale: float = 0.1  # the noise on actions has std noise_scale lambda
    autotune: bool = True  # move lambda, from initial_lambda on; without, it is 1 throughout
    initial_lambda: float = 3.0  # lambda at the start, if it moves
    alpha_lr: float = 3e-2  # learning rate of log lambda
    alpha_delay: int = 10_000  # critic updates per update of log lambda
    target_entropy: float = -0.9  # of the actions, nats per action coordinate
    num_entropy_samples: int = 200  # actions in each state, of which the entropy is estimated
    num_components: int = 3  # Gaussians in the mixture that is fitted to them
    eval_frequency: int = 100_000  # environment steps between evaluations; the last is at the end


LAPTOP = {"total_timesteps": 200_000, "learning_starts": 5_000, "eval_frequency": 20_000}
LAPTOP |= {"hidden_dim": 64, "batch_size": 128, "policy_lr": 1e-3, "q_lr": 1e-3, "num_envs": 4}
LAPTOP |= {"policy_frequency": 1, "alpha_delay": 500}


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


def k_means(x, num_components, num_rounds=10):
    """Points x (B, n, A) as clusters: ones and zeros (B, n, M). The first centres are k-means++."""
    B, n, A = x.shape
    nearest = torch.zeros(B, n, dtype=x.dtype, device=x.device)  # squared distance to a centre
    centres = []
    for _ in range(num_components):
        # the constant: all weights are 0 for the first centre, and where all points coincide
        index = torch.multinomial(nearest + 1e-12, 1).unsqueeze(-1)  # (B, 1, 1)
        centre = x.gather(1, index.expand(B, 1, A))
        distance = (x - centre).square().sum(dim=-1)  # (B, n)
        nearest = torch.minimum(nearest, distance) if centres else distance
        centres.append(centre)
    centres = torch.cat(centres, dim=1)  # (B, M, A)
    for _ in range(num_rounds):
        cluster = torch.cdist(x, centres).argmin(dim=-1)  # (B, n)
        resp = F.one_hot(cluster, num_components).to(x.dtype)
        count = resp.sum(dim=1).unsqueeze(-1)  # (B, M, 1)
        means = resp.mT @ x / count.clamp(min=1)
        centres = torch.where(count > 0, means, centres)  # of an empty cluster it stays
    return resp


def maximization(x, resp, floor=1e-6):
    """Mixtures of points x (B, n, A) with responsibilities (B, n, M), one in each state, by maximum likelihood.

    Returns weights (B, M), means (B, M, A) and Cholesky factors of the covariances (B, M, A, A).
    floor is added to the variances: points may coincide, as at the corners of the box.
    """
    count = resp.sum(dim=1) + 10 * torch.finfo(x.dtype).eps  # (B, M)
    weights = count / count.sum(dim=1, keepdim=True)
    count = count.unsqueeze(-1)
    means = resp.mT @ x / count
    difference = x.unsqueeze(1) - means.unsqueeze(2)  # (B, M, n, A)
    weighted = resp.mT.unsqueeze(-1) * difference
    covariances = weighted.mT @ difference / count.unsqueeze(-1)  # (B, M, A, A)
    covariances.diagonal(dim1=-2, dim2=-1).add_(floor)
    return weights, means, torch.linalg.cholesky(covariances)


def expectation(x, weights, means, cholesky):
    """Responsibilities (B, n, M) of a mixture for points x (B, n, A), and its mean log-likelihood."""
    difference = x.unsqueeze(1) - means.unsqueeze(2)  # (B, M, n, A)
    scaled = torch.linalg.solve_triangular(cholesky, difference.mT, upper=False)  # (B, M, A, n)
    log_kernel = -0.5 * scaled.square().sum(dim=2)  # (B, M, n)
    constant = 0.5 * x.shape[-1] * math.log(2 * math.pi)
    log_height = weights.log() - log_volume(cholesky) - constant  # (B, M)
    log_joint = (log_height.unsqueeze(-1) + log_kernel).mT  # (B, n, M)
    return log_joint.softmax(dim=-1), log_joint.logsumexp(dim=-1).mean()


def log_volume(cholesky):
    """1/2 log|S| (B, M) of covariances S with these Cholesky factors (B, M, A, A)."""
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)  # (B, M, A)
    return diagonal.log().sum(dim=-1)


def fit_gmm(x, resp, max_rounds=100, tolerance=1e-3):
    """Gaussian mixtures of points x (B, n, A), one in each state, by EM from responsibilities (B, n, M).

    The rounds end when the mean log-likelihood of all states moves by less than tolerance. For one
    state this is scikit-learn's GaussianMixture. Returns what maximization() returns.
    """
    mixture = maximization(x, resp)
    log_likelihood = -math.inf
    for _ in range(max_rounds):
        before = log_likelihood
        resp, log_likelihood = expectation(x, *mixture)
        mixture = maximization(x, resp)
        if abs(log_likelihood - before) < tolerance:
            break
    return mixture


def gmm_entropy(actions, num_components=3):
    """Entropy (B,) of actions (B, n, A) in each state, in nats: that of a Gaussian mixture fitted to them.

    sum_i w_i (-log w_i + A/2 log(2 pi e) + 1/2 log|S_i|) bounds the mixture's entropy from above, and
    is exact where its components do not meet.
    """
    x = actions.double()
    weights, _, cholesky = fit_gmm(x, k_means(x, num_components))
    of_unit_normal = 0.5 * x.shape[-1] * math.log(2 * math.pi * math.e)
    of_component = of_unit_normal + log_volume(cholesky)  # (B, M)
    return (weights * (of_component - weights.log())).sum(dim=1)


class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, device):
        super().__init__()
        self.args = args
        self.act_dim = act_dim
        self.device = device
        sizes = (args.hidden_dim, args.num_layers)
        self.actor = DiffusionActor(obs_dim, act_dim, *sizes, args.num_frequencies)
        self.critic = QNetwork(2, obs_dim, act_dim, 2, *sizes)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("mean_std", torch.full((2, 1), math.nan))  # of the distributional loss
        # lambda scales the noise on the actions
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
        self.ddpm_sample = compile_(ddpm_sample)
        self.distributional_critic_loss = compile_(distributional_critic_loss)
        self.dacer_loss = compile_(dacer_loss)
        self.soft_update = compile_(soft_update)

    def q_fn(self, obs, a):
        """What the policy sees of the twins (B, N): their smaller mean. No gradient reaches their weights."""
        weights = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        mean, _ = torch.func.functional_call(self.critic, weights, (obs, a))  # (2, B, N)
        return mean.amin(dim=0)

    def noise_on(self, a):
        """What exploration adds to actions of any shape."""
        std = self.args.noise_scale * self.log_lambda.detach().exp()
        return std * torch.randn_like(a)

    @torch.no_grad()
    def act(self, obs, explore=False, generator=None):
        """Actions (B, A) in states (B, O), with noise or not; and the same without it (B, 1, A)."""
        shape = (self.args.num_diffusion_steps, len(obs), 1, self.act_dim)
        noise = torch.randn(shape, device=self.device, generator=generator)
        a_0 = self.ddpm_sample(self.actor, obs, noise, self.diffusion)
        a = a_0.squeeze(1)
        if explore:
            a = (a + self.noise_on(a)).clamp(-1, 1)
        return a, a_0

    def update(self, batch, policy_is_due=True):
        """Update the critics and, when it is due, policy and moving averages; returns diagnostics."""
        info = self.update_critic(batch)
        if policy_is_due:
            info |= self.update_actor(batch)
        return info

    def update_critic(self, batch):
        next_actions, _ = self.act(batch.next_obs, explore=True)
        z = torch.randn(len(batch.obs), device=self.device)
        loss, mean_std, info = self.distributional_critic_loss(
            self.critic, self.target_critic, batch, next_actions, z, self.mean_std, self.args
        )
        self.mean_std.copy_(mean_std)
        self.descend("critic", loss)
        return info

    def update_actor(self, batch):
        """The policy, then the critics' moving averages."""
        B, A = batch.actions.shape
        noise = torch.randn(self.args.num_diffusion_steps, B, 1, A, device=self.device)
        draws = (noise, self.noise_on(noise[0]))  # of noise[0] the shape alone counts
        loss, info = self.dacer_loss(self.actor, self.q_fn, batch.obs, *draws, self.diffusion)
        self.descend("actor", loss)
        self.soft_update(self.target_critic, self.critic, self.args.tau)
        return info

    def update_lambda(self, obs):
        """Move the entropy of the actions in states (B, O), noise included, to target_entropy."""
        with torch.no_grad():
            shape = (len(obs), self.args.num_entropy_samples, self.act_dim)
            noise = torch.randn(self.args.num_diffusion_steps, *shape, device=self.device)
            a_0 = ddpm_sample(self.actor, obs, noise, self.diffusion)  # rare: not worth compiling
            a = (a_0 + self.noise_on(a_0)).clamp(-1, 1)
            entropy = gmm_entropy(a, self.args.num_components).mean() / self.act_dim
            excess = (entropy - self.args.target_entropy).float()
        self.descend("lambda", self.log_lambda * excess)
        return {"actions/entropy": entropy, "losses/lambda": self.log_lambda.detach().exp()}

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


def load_policy(run_folder, device="cpu"):
    """The newest policy of a run: observations (O,) or (B, O) -> actions, in the environment's units.

    Raises ValueError if the newest checkpoint cannot be used. Nothing in the file is executed.
    """
    checkpoint = load_checkpoint(Path(run_folder))
    low, high, dtype = checkpoint["action_box"]
    box = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    args = replace(Args(**checkpoint["args"]), compile=False)
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
    may_be_zero = "seed learning_starts gamma noise_scale target_entropy".split()
    for name, value in asdict(args).items():
        if type(value) in (int, float):
            lowest = {"target_entropy": -math.inf}.get(name, 0)
            highest = 1 if name in ("gamma", "tau") else 2**63 - 1
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
    fixed = "preset env_id seed num_envs buffer_size checkpoint_frequency"
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
    if args.preset == "laptop":
        args = tyro.cli(Args, default=Args(preset="laptop", **LAPTOP))
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
        policy = load_policy(source, device)
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

        wandb.init(project="dacer", name=run_folder.name, config=config, sync_tensorboard=True)
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
            for _ in range(args.updates_per_step):
                num_updates += 1
                policy_is_due = num_updates % args.policy_frequency == 0
                info |= updates[policy_is_due]()
                if args.autotune and num_updates % args.alpha_delay == 0:
                    info |= agent.update_lambda(rb.sample(args.batch_size).obs)

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
        networks = {"actor": agent.actor.state_dict(), "critic": agent.critic.state_dict()}
        data = io.BytesIO()
        torch.save(networks | {"config": config}, data)
        write_file(run_folder / "model.pt", data.getbuffer())
    envs.close()
