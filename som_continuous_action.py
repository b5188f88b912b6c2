# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2", "tyro>=1,<2",
#   "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""SOM, Score-Based One-step MeanFlow Policy Optimization (https://arxiv.org/abs/2605.23365), in one file.
Run it: python som_continuous_action.py --env-id Walker2d-v4
The policy turns noise into an action with ONE network evaluation; the field it imitates is built from the critic alone:
    act       a = argmax_i Q(s, a_i), where a_i = eps_i - u(eps_i, 0, 1, s), i = 1..N                    (Algorithm 1)
    critic    y = r + gamma (1 - terminated) Q'(s', a'), where a' is chosen in the same way              (Section 4.4)
    score     grad log p_t(a_t|s) = grad_{a_t} log sum_k exp(alpha Q(s, (a_t + sigma eps_k) / mu))       (Eq 5)
    velocity  v = -beta/2 (a_t + w score / ||score||), the probability-flow ODE of the VP path           (Eq 6, 8)
    target    u_tgt = v - (t - r) (v d_a u + d_t u), by one Jacobian-vector product                      (Eq 7)
    actor     ||u(a_t, r, t, s) - stopgrad(u_tgt)||^2, a_t = mu a_0 + sigma eps, (s, a_0) from the replay buffer
Conventions: t = 1 is noise, t = 0 is the action, 0 <= r <= t <= 1. Inside the learner actions live in [-1, 1]^A; the
environment is rescaled at its edge. alpha is an INVERSE temperature: p_0(a|s) is proportional to exp(alpha Q(s, a)).
Shapes: B states, A action coordinates; networks take N actions in each state, (B, N, A); twins come first, (2, B, N).
"""

import copy
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, util
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Batch = namedtuple("Batch", "obs next_obs actions rewards terminated")
FORMAT = f"{Path(__file__).name}, checkpoints of version 2"


@dataclass
class Args:
    exp_name: str = "som_continuous_action"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    cuda: bool = torch.cuda.is_available()  # train on the GPU (default: where there is one)
    compile: bool = torch.cuda.is_available()  # compile acting and losses, on a GPU with CUDA graphs (default: there)
    track: bool = False  # also log to Weights and Biases
    capture_video: bool = False  # record one episode of every evaluation in the run's folder
    save_model: bool = False  # write actor, critic and configuration to model.pt at the end
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints; also at both ends, SIGINT and SIGTERM
    checkpoint_buffer: bool = True  # keep the replay buffer too; else a resumed run collects learning_starts anew
    resume: str | None = None  # folder of a run (or a checkpoint in it) to go on with, in fresh episodes
    evaluate: str | None = None  # folder of a run (or a checkpoint in it) to evaluate instead of training
    num_episodes: int = 10  # episodes of an evaluation
    # Algorithm specific arguments
    env_id: str = "Walker2d-v4"  # Gymnasium id: flat observations, a bounded continuous action box
    total_timesteps: int = 5_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments stepped together
    learning_starts: int = 100_000  # environment steps with uniform random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in an update (B)
    updates_per_step: int = 1  # critic updates per step of all environments
    policy_frequency: int = 1  # critic updates per policy and target update; # differs from the paper: 2
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the moving averages: target networks, the critics' mean std
    policy_tau: float = 0.005  # rate of the moving average of the policy that acts; # differs from the paper: 1, none
    reward_scale: float = 0.2  # factor on the reward
    policy_lr: float = 1e-4  # learning rate of the policy
    q_lr: float = 1e-4  # learning rate of the critics
    hidden_dim: int = 256  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    num_frequencies: int = 8  # sines and cosines of the times in the policy, from 1 to 3 rad
    critic_loss: Literal["distributional", "mse"] = "mse"  # DACER's or squared TD; # differs from the paper: DACER's
    reference: Literal["uniform", "prior"] = "uniform"  # p_0 ~ exp(alpha Q); or ~ N(0, I) exp(alpha Q), needs no w
    sde: Literal["vp", "ve"] = "vp"  # variance preserving (Eq 1), or exploding (Appendix B)
    num_mc_samples: int = 100  # Monte-Carlo samples of the score (K)
    best_of_n: int = 32  # candidate actions in acting and bootstrapping (N)
    policy_q: Literal["mean", "min"] = "mean"  # what the score and best-of-N see of the twins; TD targets use the min
    q_norm: Literal["batch", "state"] = "state"  # the std that divides Q in the score; # differs from the paper: batch
    inverse_temperature: float = 5.0  # alpha at lambda = 1
    score_scale: float = 25.0  # norm of the rescaled score of Eq 8 (w)
    beta_min: float = 0.1  # beta(0) of the VP schedule
    beta_max: float = 1.0  # beta(1) of the VP schedule; the paper prints none
    zero_r_ratio: float = 0.5  # share of the batch with r = 0, as in one-step acting; # differs from the paper: 0
    noise_scale: float = 0.1  # std of the exploration noise at lambda = 1
    autotune: bool = True  # move lambda: the noise is noise_scale lambda, alpha is inverse_temperature / lambda
    initial_lambda: float = 5.0  # lambda at the start; it is 1 throughout without autotune
    alpha_lr: float = 7e-3  # learning rate of log lambda
    alpha_delay: int = 250  # critic updates per update of log lambda
    target_entropy: float = -0.9  # entropy of the exploration noise that lambda moves to, nats per action coordinate
    eval_frequency: int = 20_000  # environment steps between evaluations; the last one is at the end


def make_env(env_id: str, video_folder: str | None = None) -> gym.Env:
    env = gym.make(env_id, **{"render_mode": "rgb_array"} if video_folder else {})
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: episode == 0)
    # RescaleAction does not clip by itself, and control costs are computed from the unclipped action
    return gym.wrappers.ClipAction(gym.wrappers.RescaleAction(gym.wrappers.RecordEpisodeStatistics(env), -1.0, 1.0))


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


class QNetwork(EnsembleMLP):
    """Twin critics: mean and std of the return, each (2, B, N), of N actions (B, N, A) in each of B states (B, O)."""

    def forward(self, obs: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = super().forward(obs, a).unbind(-1)
        return mean, nn.functional.softplus(std)


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


def ve_schedule(t, sigma_min=0.01, sigma_max=1.0):
    """Variance exploding, sigma = sigma_min (sigma_max / sigma_min)^t (Eq 10, B.2); sigma_max is the prior's std."""
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    return torch.ones_like(t), sigma, torch.zeros_like(t), 2 * math.log(sigma_max / sigma_min) * sigma**2


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


def best_of_n(u_fn, q_fn, obs, noise):
    """One-step actions noise - u(noise, 0, 1, s): the one of highest Q (B, A), and all N (B, N, A) (Algorithm 1)."""
    r = torch.zeros_like(noise[..., :1])
    candidates = (noise - u_fn(obs, noise, r, r + 1)).clamp(-1, 1)
    return candidates[torch.arange(len(obs), device=obs.device), q_fn(obs, candidates).argmax(dim=1)], candidates


class ReplayBuffer:
    """Ring of transitions, a row each, on the training device; only `terminated` is stored as the end of an episode."""

    def __init__(self, size: int, obs_dim: int, act_dim: int, device: torch.device, file: str = "", num_added: int = 0):
        self.num_added, self.widths = num_added, [obs_dim, obs_dim, act_dim, 1, 1]
        shape, row = (size, sum(self.widths)), 4 * sum(self.widths)  # a file is memory-mapped: it keeps its rows
        if num_added and not (os.path.isfile(file) and os.path.getsize(file) >= row * min(size, num_added)):
            fail(f"{file} is missing or too short; --no-checkpoint-buffer goes on without it")
        if file and hasattr(os, "posix_fallocate"):  # all of it now: a later write that finds no room kills the process
            os.posix_fallocate(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), 0, row * size)
        self.disk = torch.from_file(file, True, math.prod(shape)).view(shape) if file else torch.empty(shape)
        self.rows = self.disk.to(device)  # on the CPU the same memory

    def add(self, *columns) -> None:
        rows = torch.as_tensor(np.column_stack(columns), dtype=torch.float32)
        slots = torch.arange(self.num_added, self.num_added + len(rows)) % len(self.rows)
        self.rows[slots], self.disk[slots], self.num_added = rows.to(self.rows.device), rows, self.num_added + len(rows)

    def sample(self, batch_size: int) -> Batch:
        slots = torch.randint(min(self.num_added, len(self.rows)), (batch_size,), device=self.rows.device)
        *columns, rewards, terminated = self.rows[slots].split(self.widths, dim=1)
        return Batch(*columns, rewards.squeeze(1), terminated.squeeze(1))


def critic_loss(q_dist, target_q_dist, batch, next_actions, z, mean_std, args, eps=0.1):
    """Temporal differences of the twins, as in DACER or as plain squared errors (Section 4.4).
    q_dist, target_q_dist: (B, O), (B, 1, A) -> mean, std of the return, (2, B, 1). z: (B,) standard normal.
    mean_std: (2, 1) moving average of the predicted std, NaN at first; info["mean_std"] is the next. eps: of DACER."""
    with torch.no_grad():
        mean, std = (x.squeeze(-1) for x in target_q_dist(batch.next_obs, next_actions.unsqueeze(1)))  # (2, B)
        mean, std = (torch.where(mean[0] <= mean[1], *x) for x in (mean, std))  # (B,), of the smaller mean
        rewards, discount = args.reward_scale * batch.rewards, args.gamma * (1 - batch.terminated)
        y, y_sample = (rewards + discount * q for q in (mean, mean + std * z.clamp(-3, 3)))
    mean, std = (x.squeeze(-1) for x in q_dist(batch.obs, batch.actions.unsqueeze(1)))  # (2, B)
    batch_std = std.detach().mean(dim=1, keepdim=True)
    mean_std = torch.where(mean_std.isnan(), batch_std, mean_std.lerp(batch_std, args.tau))
    if args.critic_loss == "mse":
        loss = (mean - y).square().mean(dim=1).sum()
    else:  # its gradient is DACER's: the mean is pulled to y, the std to the spread of the bounded sampled target
        spread = (y_sample - mean).clamp(-3 * mean_std, 3 * mean_std).square()
        mean_pull, std_pull = (y - mean) / (std.square() + eps), (spread - std.square()) / (std.pow(3) + eps)
        loss = -((mean_std.square() + eps) * (mean_pull.detach() * mean + std_pull.detach() * std)).mean(dim=1).sum()
    info = {"mean_std": mean_std, "losses/qf_loss": loss.detach(), "losses/qf_std": batch_std.mean()}
    info["losses/qf_values"], info["losses/td_error"] = mean.detach().mean(), (y - mean).detach().square().mean()
    return loss, info


def actor_loss(u_fn, q_fn, batch, uniform, eps, mc_eps, alpha, args):
    """The policy regressed on the velocity field of exp(alpha Q) (Eq 5 to 8).
    u_fn, q_fn: of N actions a state, as the networks. uniform: (B, 2). eps: (B, A) and mc_eps: (B, K, A) normal."""
    r, t = sample_r_t(uniform, args.zero_r_ratio)
    schedules = {"vp": partial(vp_schedule, beta_min=args.beta_min, beta_max=args.beta_max), "ve": ve_schedule}
    mu, sigma, f, g2 = cosine_schedule(t) if args.reference == "prior" else schedules[args.sde](t)
    a_t = mu * batch.actions + sigma * eps
    score, logits = estimate_score(q_fn, batch.obs, a_t, mu, sigma, mc_eps, alpha, args.reference, args.q_norm)
    v = pf_ode_velocity(a_t, score, f, g2, args.score_scale if args.reference == "uniform" else None)
    loss, dudt = meanflow_loss(partial(u_fn, batch.obs), *(x.unsqueeze(1) for x in (a_t, r, t, v)))
    errors, speed = loss.detach(), v.norm(dim=-1).mean()
    info = {"losses/actor_loss": errors.mean(), "score/norm": score.norm(dim=-1).mean(), "velocity/norm": speed}
    info["score/effective_sample_size"] = (1 / logits.softmax(dim=1).square().sum(dim=1)).mean()
    info["velocity/dudt_ratio"] = ((t - r).unsqueeze(1) * dudt).norm(dim=-1).mean() / speed
    for i in range(4):
        in_bin = ((4 * t).floor() == i).float()  # (B, 1)
        info[f"losses/actor_loss_t{i}"] = (errors * in_bin).sum() / in_bin.sum().clamp(min=1)
    return loss.mean(), info


class Agent(nn.Module):
    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        super().__init__()
        self.args, self.act_dim, self.device, self.num_updates = args, act_dim, device, 0
        self.actor = MeanFlowActor(obs_dim, act_dim, args.hidden_dim, args.num_layers, args.num_frequencies).to(device)
        self.acting_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = QNetwork(2, obs_dim, act_dim, 2, args.hidden_dim, args.num_layers).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_lambda = nn.Parameter(torch.tensor(args.initial_lambda if args.autotune else 1.0, device=device).log())
        self.register_buffer("mean_std", torch.full((2, 1), math.nan, device=device))
        rates = (self.actor.parameters(), args.policy_lr), (self.critic.parameters(), args.q_lr)
        groups = [{"params": p, "lr": lr} for p, lr in (*rates, ([self.log_lambda], args.alpha_lr))]
        self.optimizer = torch.optim.Adam(groups, fused=True)  # a step leaves alone what its loss gives no gradient
        self.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        twins = torch.mean if args.policy_q == "mean" else torch.amin
        self.q_fn = lambda obs, a: twins(self.critic(obs, a)[0], dim=0)  # (B, N)
        mode = "reduce-overhead" if args.cuda else "default"
        compile = partial(torch.compile, mode=mode, dynamic=False) if args.compile else lambda function: function
        self.best_of_n, self.critic_loss, self.actor_loss = map(compile, (best_of_n, critic_loss, actor_loss))

    @torch.no_grad()
    def act(self, obs: torch.Tensor, explore: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Best-of-N actions (B, A) in states (B, O), with exploration noise or without, and all N candidates."""
        if self.args.compile and self.args.cuda:
            torch.compiler.cudagraph_mark_step_begin()
        noise = torch.randn(len(obs), self.args.best_of_n, self.act_dim, device=self.device)
        a, candidates = self.best_of_n(self.acting_actor, self.q_fn, obs, noise)
        if explore:
            a = (a + self.args.noise_scale * self.log_lambda.exp() * torch.randn_like(a)).clamp(-1, 1)
        return a, candidates

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Update the critics and, when it is due, the policy, the target networks and lambda; returns diagnostics."""
        args, (B, A), self.num_updates = self.args, batch.actions.shape, self.num_updates + 1
        (next_actions, candidates), z = self.act(batch.next_obs), torch.randn(B, device=self.device)
        loss, info = self.critic_loss(self.critic, self.target_critic, batch, next_actions, z, self.mean_std, args)
        self.optimizer.step(loss.backward)
        self.mean_std.copy_(info.pop("mean_std"))
        info["actions/candidate_std"] = candidates.std(dim=1, correction=0).mean()
        info["actions/saturated"] = (candidates.abs() > 0.99).float().mean()
        if self.num_updates % args.policy_frequency == 0:
            alpha = args.inverse_temperature / self.log_lambda.detach().exp()
            uniform, eps = torch.rand(B, 2, device=self.device), torch.randn(B, A, device=self.device)
            mc_eps = torch.randn(B, args.num_mc_samples, A, device=self.device)
            loss, actor_info = self.actor_loss(self.actor, self.q_fn, batch, uniform, eps, mc_eps, alpha, args)
            self.optimizer.step(loss.backward)
            with torch.no_grad():
                torch._foreach_lerp_([*self.target_critic.parameters()], [*self.critic.parameters()], args.tau)
                torch._foreach_lerp_([*self.acting_actor.parameters()], [*self.actor.parameters()], args.policy_tau)
            info |= actor_info | {"losses/alpha": alpha}
        if args.autotune and self.num_updates % args.alpha_delay == 0:
            entropy = 0.5 * math.log(2 * math.pi * math.e * args.noise_scale**2) + self.log_lambda.detach()
            self.optimizer.step((self.log_lambda * (entropy - args.target_entropy)).backward)
        return info


def evaluate(agent: Agent, seed: int, video_folder: str | None = None, num_episodes: int = 10) -> np.ndarray:
    """Undiscounted returns of seeded episodes without exploration; the training's random numbers stay as they were."""
    thunks = [partial(make_env, agent.args.env_id, None if i else video_folder) for i in range(num_episodes)]
    envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode="SameStep")
    returns, running = np.zeros(num_episodes), np.ones(num_episodes, bool)
    with torch.random.fork_rng([0] if agent.args.cuda else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        while running.any():
            actions, _ = agent.act(torch.as_tensor(obs, dtype=torch.float32).to(agent.device))
            obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
            returns, running = returns + running * rewards, running & ~(terminated | truncated)
    envs.close()
    return returns


def fail(message: str, code: int = 2):
    print("error:", *message.split(), file=sys.stderr)  # one line
    sys.exit(code)


def check_args(args: Args) -> tuple[int, int]:
    """Observation and action dimension of the environment; one line and exit code 2 where the run cannot start."""
    zero_too = "seed", "learning_starts", "gamma", "zero_r_ratio", "" if args.autotune else "noise_scale"
    for name, value in vars(args).items():
        low = {"target_entropy": -math.inf, "num_mc_samples": 1}.get(name, 0)
        high = 1 if name in ("gamma", "tau", "policy_tau", "zero_r_ratio") else 2**63
        if type(value) in (int, float) and not (low < value <= high or (value == 0 and name in zero_too)):
            fail(f"--{name.replace('_', '-')} must be in {'[' if name in zero_too else '('}{low}, {high}], got {value}")
    rules = {
        "--beta-max must be >= --beta-min": args.beta_max >= args.beta_min,
        "--total-timesteps must be > --learning-starts": args.total_timesteps >= args.learning_starts + args.num_envs,
        "--reference prior needs --sde vp": args.reference == "uniform" or args.sde == "vp",
        "--cuda: PyTorch finds no GPU here, use --no-cuda": torch.cuda.is_available() or not args.cuda,
        "--track needs wandb: pip install wandb": not args.track or util.find_spec("wandb"),
        "--capture-video needs moviepy: pip install moviepy": not args.capture_video or util.find_spec("moviepy"),
    }
    try:
        env = gym.make(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {})
        _ = args.capture_video and (env.reset(), env.render())
    except Exception as error:  # of an unknown id, it names the nearest
        fail(f"{error}{'; use Pusher-v5 instead' if args.env_id == 'Pusher-v4' else ''}")
    for kind, space in ("observations", env.observation_space), ("actions", env.action_space):
        flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and (kind != "actions" or space.is_bounded())
        rules[f"{args.env_id} has {kind} {space}; supported are flat continuous ones, bounded for actions"] = flat
    for rule in [rule for rule, holds in rules.items() if not holds]:
        fail(rule)
    margins = getattr(getattr(env.unwrapped, "model", None), "geom_margin", np.zeros(1))
    if margins.any() and tuple(map(int, metadata.version("mujoco").split(".")[:2])) >= (3, 5):
        print(f"warning: mujoco >= 3.5 changed the contacts of {args.env_id}; use mujoco < 3.5", file=sys.stderr)
    return env.observation_space.shape[0], env.action_space.shape[0]


if __name__ == "__main__":
    args, bad, stop = tyro.cli(Args), "", []
    checkpoint = {"progress": (0, 0, 0, math.nan, "global_step,num_updates,return_mean,return_std,wall_time_s\n", 0.0)}
    run_folder = Path("runs", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}".replace("/", "_"))
    if source := args.resume or args.evaluate:
        for path in sorted(Path(source).glob("checkpoint_*.pt"), reverse=True) or [Path(source)]:
            try:
                checkpoint = torch.load(path, "cpu", weights_only=True)  # it executes nothing, and skips the checksums
                if zipfile.ZipFile(path).testzip() or checkpoint["format"] != FORMAT:
                    raise ValueError(f"it is damaged, or not of {FORMAT}")
                break
            except Exception as error:
                bad, checkpoint = f"{bad}{path} cannot be used: {error}; ", None
        bad and fail(f"{bad}the newest good one is {checkpoint and path}")
        args, run_folder = tyro.cli(Args, default=Args(**checkpoint["args"])), path.parent
        for name in "env_id seed num_envs buffer_size hidden_dim num_layers num_frequencies policy_lr q_lr".split():
            if getattr(args, name) != checkpoint["args"][name]:
                fail(f"{path} has --{name.replace('_', '-')} {checkpoint['args'][name]}, which cannot change")
    obs_dim, act_dim = check_args(args)
    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    *env_seeds, eval_seed = np.random.SeedSequence(args.seed).generate_state(args.num_envs + 1).tolist()
    agent = Agent(args, obs_dim, act_dim, device)
    rng = torch.cuda.default_generators[0] if args.cuda else torch.default_generator
    first_step, agent.num_updates, num_added, episodic_return, evaluations, seconds = checkpoint["progress"]
    agent.load_state_dict(checkpoint.get("agent", agent.state_dict()))
    agent.optimizer.load_state_dict(checkpoint.get("optimizer", agent.optimizer.state_dict()))
    if args.evaluate:
        returns = evaluate(agent, eval_seed, f"{run_folder}/videos" if args.capture_video else None, args.num_episodes)
        sys.exit(print(f"return {returns.mean():.1f} +- {returns.std():.1f}, by episode {returns.round(1).tolist()}"))
    start, steps = time.time() - seconds, range(first_step + args.num_envs, args.total_timesteps + 1, args.num_envs)
    steps or sys.exit(print(f"{run_folder} is finished at step {first_step}; --total-timesteps MORE goes on"))
    hint = f"make room or mend the path, then --resume {run_folder} where it has a checkpoint"
    sys.excepthook = lambda *e: fail(f"{e[1]}; {hint}", 1) if isinstance(e[1], OSError) else sys.__excepthook__(*e)
    run_folder.mkdir(parents=True, exist_ok=bool(first_step))
    envs = gym.vector.SyncVectorEnv(args.num_envs * [partial(make_env, args.env_id)], autoreset_mode="SameStep")
    file, num_added = (f"{run_folder}/replay_buffer.bin", num_added) if args.checkpoint_buffer else ("", 0)
    rb = ReplayBuffer(min(args.buffer_size, args.total_timesteps), obs_dim, act_dim, device, file, num_added)
    rng.set_state(checkpoint["generator"] if checkpoint.get("args", {}).get("cuda") == args.cuda else rng.get_state())
    versions = {package: metadata.version(package) for package in ("torch", "gymnasium", "mujoco", "numpy", "tyro")}
    config = {"script": FORMAT.split(",")[0], **asdict(args), "resume": None, "versions": versions}
    (run_folder / "config.json").write_text(json.dumps(config, indent=2))
    args.track and __import__("wandb").init(project="som", name=run_folder.name, config=config, sync_tensorboard=True)
    writer = SummaryWriter(run_folder, purge_step=first_step + 1)
    for number in signal.SIGINT, signal.SIGTERM:  # the run ends after its step; a second signal kills it
        signal.signal(number, lambda number, _: stop.append(number) or signal.signal(number, signal.SIG_DFL))
    # TRY NOT TO MODIFY: start the game, in new episodes where the run is resumed
    for env, state in zip(envs.envs, checkpoint.get("env_generators", ()), strict=False):
        env.unwrapped.np_random.bit_generator.state = state
    obs, _ = envs.reset(seed=None if first_step else env_seeds)
    for global_step in (progress := tqdm(steps, unit="step", unit_scale=args.num_envs, disable=None)):
        place = f"at step {global_step}, seed {args.seed}; see {run_folder}"
        # ALGO LOGIC: put action logic here
        if global_step <= args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, act_dim, device=device) - 1
        else:
            actions, _ = agent.act(torch.as_tensor(obs, dtype=torch.float32).to(device), explore=True)
        actions = actions.cpu().numpy()
        # TRY NOT TO MODIFY: execute the game and log data.
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        # TRY NOT TO MODIFY: save data to replay buffer; where an episode ended, next_obs is the next one's first
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]
            episodic_return = float(infos["final_info"]["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", infos["final_info"]["episode"]["l"][i], global_step)
        for quantity, values in ("action", actions), ("reward", rewards), ("observation", [next_obs, real_next_obs]):
            np.isfinite(values).all() or fail(f"the {quantity} is not finite {place}", code=1)
        rb.add(obs, real_next_obs, actions, rewards, terminated)
        obs = next_obs
        # ALGO LOGIC: training.
        if rb.num_added > args.learning_starts:
            for _ in range(args.updates_per_step):
                info = agent.update(rb.sample(args.batch_size))
            if agent.num_updates % (100 * args.policy_frequency) < args.updates_per_step or global_step == steps[-1]:
                scalars = {k: x.item() for k, x in info.items()} | {"charts/SPS": global_step / (time.time() - start)}
                for tag, value in scalars.items():
                    math.isfinite(value) or fail(f"{tag} is not finite {place}", code=1)
                    writer.add_scalar(tag, value, global_step)
                progress.set_postfix({k: x for k, x in scalars.items() if k.endswith("_loss")}, episode=episodic_return)
        if global_step % args.eval_frequency < args.num_envs or global_step == steps[-1]:
            returns = evaluate(agent, eval_seed, f"{run_folder}/videos/{global_step}" if args.capture_video else None)
            evaluations += f"{global_step},{agent.num_updates},{returns.mean()},{returns.std()},{time.time() - start}\n"
            (run_folder / "evaluations.csv").write_text(evaluations)
            writer.add_scalar("charts/eval_return", returns.mean(), global_step)
            tqdm.write(f"step {global_step}: evaluation return {returns.mean():.1f} +- {returns.std():.1f}")
        if stop or global_step % args.checkpoint_frequency < args.num_envs or global_step in (steps[0], steps[-1]):
            all(w.isfinite().all() for w in agent.parameters()) or fail(f"a weight is not finite {place}", code=1)
            done = global_step, agent.num_updates, rb.num_added * args.checkpoint_buffer, episodic_return, evaluations
            state = {"format": FORMAT, "args": asdict(args), "agent": agent.state_dict(), "generator": rng.get_state()}
            state |= {"optimizer": agent.optimizer.state_dict(), "progress": (*done, time.time() - start)}
            state["env_generators"] = [env.unwrapped.np_random.bit_generator.state for env in envs.envs]
            torch.save(state, data := io.BytesIO())
            (run_folder / "checkpoint.tmp").write_bytes(data.getbuffer())
            writer.flush()
            getattr(os, "sync", int)()  # the replay buffer too; Windows has no such call
            os.replace(run_folder / "checkpoint.tmp", run_folder / f"checkpoint_{global_step:010d}.pt")
            for old in sorted(run_folder.glob("checkpoint_*.pt"))[:-2]:
                old.unlink()
        stop and fail(f"stopped at step {global_step}; go on with --resume {run_folder}", code=128 + stop[0])
    networks = {"actor": agent.acting_actor.state_dict(), "critic": agent.critic.state_dict(), "config": config}
    args.save_model and torch.save(networks, run_folder / "model.pt")
