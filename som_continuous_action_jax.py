# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10", "optax>=0.2.4", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2",
#   "scipy>=1.11", "tyro>=1,<2", "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""SOM, Score-Based One-step MeanFlow Policy Optimization (https://arxiv.org/abs/2605.23365), in one file, in JAX.

Run it: python som_continuous_action_jax.py --env-id Walker2d-v4 (in minutes on a laptop: add --preset laptop)
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
The method and the agent are written for one seed; --num-seeds S trains S side by side: the main block adds the axis.
"""

import atexit
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata, util
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.lax import stop_gradient
from jax.tree_util import keystr
from scipy.stats import qmc
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

CHECKPOINT_FORMAT = "som_continuous_action_jax.py, checkpoints of version 4"
MATMUL_PRECISIONS = {"high": "default", "highest": "highest"}  # JAX's names: "default" is TF32 on a GPU
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated")
# what an agent is; networks are lists of layers, a layer is (weights, biases); mean_std is of
# distributional_critic_loss
State = namedtuple("State", "actor acting_actor critic target_critic mean_std log_lambda optimizers key")
Acting = namedtuple("Acting", "acting_actor critic log_lambda")  # the parts that acting needs
Ring = namedtuple("Ring", "rows next_slot num_filled")  # the replay buffer on the training device


@dataclass(frozen=True)  # a hashable one can be a static argument of compiled functions
class Args:
    exp_name: str = "som_continuous_action_jax"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    num_seeds: int = 1  # agents trained side by side (S), with the seeds seed, seed + 1, ...
    # small networks; laptop: the method, a short run; peaks and smooth: beyond the paper, long runs
    preset: Literal["laptop", "peaks", "smooth"] | None = None  # other flags override it
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to train; auto: on a GPU if there is one
    matmul_precision: Literal["high", "highest"] = "high"  # of products on a GPU: TF32 or float32
    track: bool = False  # also log to Weights and Biases
    capture_video: bool = False  # record one episode of every evaluation in the run's folder
    save_model: bool = False  # write actor, critic and configuration to model.npz at the end
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
def init_ensemble(key, size, in_dim, out_dim, args):
    """Layers of networks that are evaluated together: weights (size, in, out), biases (size, 1, out)."""
    layers = []
    widths = [in_dim] + args.num_layers * [args.hidden_dim] + [out_dim]
    for fan_in, fan_out in pairwise(widths):
        key, layer_key = jax.random.split(key)
        bound = fan_in**-0.5  # as in PyTorch's nn.Linear
        uniform = jax.random.uniform(layer_key, (size, fan_in + 1, fan_out), minval=-1)
        w, b = jnp.split(bound * uniform, [fan_in], axis=1)
        layers.append((w, b))
    return layers


def gelu(x):
    """Equal to jax.nn.gelu(x, approximate=False), which uses erfc and takes a CPU twice as long."""
    return 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2)))


def ensemble_mlp(layers, obs, x, hidden_dtype=None):
    """GELU networks evaluated together: obs (B, O), N inputs (B, N, D) -> (size, B, N, out).

    The first layer's product with the state is computed once per state and shared by its N inputs.
    hidden_dtype: of the hidden layers; the last product always has the dtype of x.
    """
    B, N, D = x.shape
    dtype = hidden_dtype or x.dtype
    w, b = layers[0]
    size, _, H = w.shape
    w_obs, w_x = jnp.split(w.astype(dtype), [obs.shape[1]], axis=1)
    h_obs = obs.astype(dtype) @ w_obs + b.astype(dtype)  # (size, B, H)
    h_x = x.astype(dtype).reshape(B * N, D) @ w_x  # (size, B * N, H)
    h = h_obs[:, :, None] + h_x.reshape(size, B, N, H)
    h = h.reshape(size, B * N, H)  # before the activation
    for w, b in layers[1:-1]:
        h = gelu(h) @ w.astype(dtype) + b.astype(dtype)
    w, b = layers[-1]
    out = gelu(h.astype(x.dtype)) @ w + b
    return out.reshape(size, B, N, -1)


def q_network(layers, obs, a, hidden_dtype=None):
    """Twin critics: mean and std of the return, (2, B, N), of N actions (B, N, A) in each state."""
    out = ensemble_mlp(layers, obs, a, hidden_dtype)
    return out[..., 0], jax.nn.softplus(out[..., 1])


def mean_return(layers, obs, a):
    mean, _ = q_network(layers, obs, a)
    return mean


def meanflow_actor(layers, obs, a_t, r, t):
    """Average velocity u(a_t, r, t, s) (B, N, A) of actions (B, N, A) at times r, t (B, N, 1)."""
    first_weights, _ = layers[0]  # (1, in, H)
    num_times = first_weights.shape[1] - obs.shape[1] - a_t.shape[2]
    num_frequencies = num_times // 4  # sines and cosines, of t and of t - r
    # radians over t in [0, 1]. The target has du/dt in it, which high frequencies blow up
    frequencies = jnp.linspace(1.0, 3.0, num_frequencies)
    phase_t = t * frequencies  # (B, N, num_frequencies)
    phase_dt = (t - r) * frequencies
    times = [f(phase) for phase in (phase_t, phase_dt) for f in (jnp.sin, jnp.cos)]
    x = jnp.concatenate([a_t, *times], axis=-1)
    return ensemble_mlp(layers, obs, x)[0]


# ALGO LOGIC: the method
# A schedule returns mu, sigma, f, g^2 of da = f(t) a dt + g(t) dW, a_t = mu(t) a_0 + sigma(t) eps
def vp_schedule(t, beta_min, beta_max):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min) (Eq 1)."""
    beta = beta_min + t * (beta_max - beta_min)
    int_beta = beta_min * t + 0.5 * t**2 * (beta_max - beta_min)
    sigma = jnp.sqrt(-jnp.expm1(-int_beta))
    return jnp.exp(-0.5 * int_beta), sigma, -0.5 * beta, beta


def cosine_schedule(t):
    """Variance preserving, mu = cos(pi t / 2). beta = pi tan(pi t / 2) is unbounded: t <= 0.999."""
    angle = 0.5 * math.pi * jnp.minimum(t, 0.999)
    beta = math.pi * jnp.tan(angle)
    return jnp.cos(angle), jnp.sin(angle), -0.5 * beta, beta


def ve_schedule(t, sigma_min=0.01, sigma_max=1.0):
    """Variance exploding, sigma = sigma_min (sigma_max / sigma_min)^t (Eq 10, B.2)."""
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    g2 = 2 * math.log(sigma_max / sigma_min) * sigma**2
    return jnp.ones_like(t), sigma, jnp.zeros_like(t), g2


def q_scale(q, q_norm):
    """What divides Q (B, K): one number.

    "batch": its std. "state": its std in each state, averaged. None: 1.
    """
    if q_norm == "batch":
        return stop_gradient(q.std(ddof=1)) + 1e-6
    if q_norm == "state":
        return stop_gradient(q.std(axis=1, ddof=1).mean()) + 1e-6
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
        a_0 = center[:, None] + std[:, None] * eps  # (B, K, A)
        q = q_fn(obs, jnp.clip(a_0, -1, 1) if clip else a_0)  # (B, K)
        logits = alpha * q / q_scale(q, q_norm)
        return jax.nn.logsumexp(logits, axis=1).sum(), logits

    score, logits = jax.grad(log_sum_exp, has_aux=True)(a_t)
    if reference == "prior":
        score = score - a_t
    return stop_gradient((score, logits))  # the critic's weights get no gradient


def truncated_normal(eps, mean, std, half_width=1.0):
    """Standard normal eps (B, K, A) as samples of N(mean, std^2) inside the box; mean: (B, A), std: (B, 1)."""
    ndtr = jax.scipy.special.ndtr
    low = ((-half_width - mean) / std)[:, None]  # (B, 1, A)
    high = ((half_width - mean) / std)[:, None]
    # by the inverse CDF. Floats resolve probabilities near 0, not near 1: a box above the mean is
    # mirrored to below it, sign = -1, and the samples in it are mirrored back
    sign = jnp.where(low > 0, -1.0, 1.0)
    lower = jnp.minimum(sign * low, sign * high)
    upper = jnp.maximum(sign * low, sign * high)
    mass = ndtr(upper) - ndtr(lower)
    # sign * eps, which is as normal: mirrored with the box and back, it lets a_0 rise with eps for
    # both signs. So a_0 does not jump where the sign changes
    cdf = ndtr(lower) + ndtr(sign * eps) * mass  # (B, K, A)
    z = jax.scipy.special.ndtri(jnp.clip(cdf, 1e-37, 1 - 1e-7))
    z = sign * z
    a_0 = mean[:, None] + std[:, None] * z
    return jnp.clip(a_0, -half_width, half_width)


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
        return jax.nn.logsumexp(logits, axis=1).sum(), logits

    # the gradient by a_0[k] is its weight times its logit's slope: their sum is the mean slope
    gradients, logits = jax.grad(log_sum_exp, has_aux=True)(a_0)  # (B, K, A)
    weights = jax.nn.softmax(logits, axis=1)[..., None]  # (B, K, 1)
    weighted_mean = (weights * a_0).sum(axis=1)  # (B, A)
    # exp(slope a) moves the mean of a distribution by its variance times slope, to first order
    slope = gradients.sum(axis=1)
    moved_mean = a_0.mean(axis=1) + a_0.var(axis=1, ddof=1) * slope
    moved_mean = jnp.clip(moved_mean, -half_width, half_width)
    # from 0 at t = 0 to 1; 1/2 where sigma^2 / mu^2, the samples' variance but for the box, is
    # local_variance
    share = sigma**2 / (sigma**2 + local_variance * mu**2)
    m = share * weighted_mean + (1 - share) * moved_mean
    score = (mu * m - a_t) / jnp.maximum(sigma, 1e-3) ** 2
    return stop_gradient((score, logits))


def climb(log_density, a, rate, num_steps, half_width=1.0):
    """Actions (B, K, A) moved up log_density, (B, K, A) -> (B, K), inside the box (beyond the paper).

    A step is rate (B, 1) times the gradient. Its RMS over the coordinates stays below a limit,
    which falls linearly from half_width / 2 to half_width / (2 num_steps).
    """

    def total(a):
        return log_density(a).sum()

    for i in range(num_steps):
        gradient = jax.grad(total)(a)
        # a coordinate that pushes against a face of the box has come to its end
        at_its_end = (jnp.abs(a) >= half_width) & (a * gradient > 0)
        gradient = jnp.where(at_its_end, 0.0, gradient)
        mean_square = jnp.square(gradient).mean(axis=-1, keepdims=True)  # (B, K, 1)
        length = jnp.sqrt(mean_square) + 1e-6
        limit = 0.5 * half_width * (1 - i / num_steps)
        a = a + jnp.minimum(rate[:, None], limit / length) * gradient
        a = jnp.clip(a, -half_width, half_width)
    return a


def estimate_peak_score(q_fn, obs, a_t, mu, sigma, eps, alpha, num_steps, q_norm=None, half_width=1.0):
    """As estimate_box_score, for an alpha so large that few of K samples count (beyond the paper).

    The posterior of a_0 given a_t, exp(alpha Q(a_0)) N(a_t; mu a_0, sigma^2), is narrow then around
    its peaks. Each sample climbs one. m is the mean of where they end, weighted by their heights:
    the logits are those of the posterior.
    """
    variance = jnp.maximum(sigma, 1e-3) ** 2
    a_0 = truncated_normal(eps, a_t / mu, sigma / mu, half_width)  # (B, K, A)
    scale = q_scale(q_fn(obs, a_0), q_norm)

    def log_posterior(a_0):
        errors = a_t[:, None] - mu[:, None] * a_0
        log_likelihood = -0.5 * jnp.square(errors).sum(axis=-1) / variance
        return alpha * q_fn(obs, a_0) / scale + log_likelihood  # (B, K)

    # at this rate one step ends at the peak if Q is linear
    a_0 = climb(log_posterior, a_0, variance / mu**2, num_steps, half_width)
    logits = log_posterior(a_0)
    weights = jax.nn.softmax(logits, axis=1)[..., None]  # (B, K, 1)
    m = (weights * a_0).sum(axis=1)  # (B, A)
    return stop_gradient(((mu * m - a_t) / variance, logits))


def lattice_noise(points, shift):
    """Standard normal eps (B, K, A): points (K, A) of the unit cube plus shift (B, 1, A), modulo 1.

    With a uniform shift every sample is normal, and the K samples of a state lie evenly.
    """
    uniform = (points + shift) % 1.0  # (B, K, A)
    return jax.scipy.special.ndtri(jnp.clip(uniform, 1e-6, 1 - 1e-6))


def sobol_points(num_points, dim):
    """The first points (K, A) of a scrambled Sobol sequence, always the same ones."""
    power = math.ceil(math.log2(num_points))  # SciPy warns of other numbers than powers of 2
    points = qmc.Sobol(dim, scramble=True, seed=0).random_base2(power)
    return points[:num_points].astype(np.float32)


def pf_ode_velocity(a_t, score, f, g2, score_scale=None):
    """Velocity f a_t - g^2/2 score (B, A) of the PF-ODE (Eq 2, 6, B.2). score_scale: w of Eq 8."""
    if score_scale is not None:
        norm = jnp.linalg.norm(score, axis=-1, keepdims=True)
        score = score_scale * score / (norm + 1e-6)
    return f * a_t - 0.5 * g2 * score


def sample_r_t(uniform, zero_r_ratio=0.0):
    """Uniform numbers (B, 2) as times r <= t, each (B, 1) (Algorithm 1); r = 0 in a share of them."""
    r = uniform.min(axis=1, keepdims=True)
    t = uniform.max(axis=1, keepdims=True)
    row = jnp.arange(len(r))[:, None]  # the batch was drawn at random: its first rows will do
    return r * (row >= zero_r_ratio * len(r)), t


def meanflow_loss(u_fn, a_t, r, t, v):
    """Squared error (B, N) of u_fn(a_t, r, t) against stopgrad(v - (t - r) du/dt) (Eq 7).

    Also du/dt (B, N, A), the derivative of u along the flow.
    """
    tangents = (v, jnp.zeros_like(r), jnp.ones_like(t))  # along the flow, da_t/dt = v
    u, dudt = jax.jvp(u_fn, (a_t, r, t), tangents)
    u_tgt = stop_gradient(v - (t - r) * dudt)
    return jnp.square(u - u_tgt).sum(axis=-1), stop_gradient(dudt)


def best_of_n(u_fn, q_fn, obs, noise):
    """The candidate with the largest Q, (B, A), and all of them, (B, N, A) (Algorithm 1).

    Candidates are noise - u_fn(obs, noise, 0, 1), of noise (B, N, A).
    """
    r = jnp.zeros_like(noise[..., :1])  # (B, N, 1)
    t = jnp.ones_like(r)
    candidates = jnp.clip(noise - u_fn(obs, noise, r, t), -1, 1)
    best = q_fn(obs, candidates).argmax(axis=1)  # (B,)
    return candidates[jnp.arange(len(obs)), best], candidates


def critic_loss(q_twins, target_q_twins, batch, next_actions, args):
    """Squared temporal differences of the twins, against the smaller of the target twins.

    q_twins, target_q_twins: (B, O), (B, 1, A) -> return (2, B, 1). next_actions: (B, A).
    """
    next_q = target_q_twins(batch.next_obs, next_actions[:, None])  # (2, B, 1)
    next_q = next_q.squeeze(-1).min(axis=0)  # (B,)
    y = args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminated) * next_q
    y = stop_gradient(y)
    q = q_twins(batch.obs, batch.actions[:, None]).squeeze(-1)  # (2, B)
    loss = jnp.square(q - y).mean(axis=1).sum()
    info = {
        "losses/qf_loss": loss,
        "losses/qf_values": q.mean(),
        "losses/td_error": jnp.square(y - q).mean(),
    }
    return loss, stop_gradient(info)


def distributional_critic_loss(q_dist, target_q_dist, batch, next_actions, z, mean_std, args, eps=0.1):
    """Loss of the twins' means and stds as in DACER (Section 4.4); also the next mean_std, and info.

    q_dist, target_q_dist: (B, O), (B, 1, A) -> mean, std of the return, (2, B, 1). z: (B,) normal.
    mean_std: (2, 1) moving average of the predicted std, NaN before the first update. eps: DACER's, for small stds.
    """
    target_mean, target_std = target_q_dist(batch.next_obs, next_actions[:, None])
    index = target_mean.argmin(axis=0, keepdims=True)  # (1, B, 1), of the twin with the smaller mean
    next_q = jnp.take_along_axis(target_mean, index, axis=0).flatten()  # (B,)
    next_std = jnp.take_along_axis(target_std, index, axis=0).flatten()
    discount = args.gamma * (1 - batch.terminated)
    y = args.reward_scale * batch.rewards + discount * next_q
    y_sample = y + discount * next_std * jnp.clip(z, -3, 3)
    y, y_sample = stop_gradient((y, y_sample))
    mean, std = q_dist(batch.obs, batch.actions[:, None])
    mean = mean.squeeze(-1)  # (2, B)
    std = std.squeeze(-1)
    batch_std = stop_gradient(std.mean(axis=1, keepdims=True))
    moved = mean_std + args.tau * (batch_std - mean_std)
    mean_std = jnp.where(jnp.isnan(mean_std), batch_std, moved)
    # only the gradients of this loss mean something. With respect to the mean it is that of
    # -log N(y; mean, std^2), with respect to the std that of -log N(y_sample; mean, std^2), clipped,
    # both times mean_std^2 + eps
    spread = jnp.square(jnp.clip(y_sample - mean, -3 * mean_std, 3 * mean_std))
    mean_pull = (y - mean) / (std**2 + eps)
    std_pull = (spread - std**2) / (std**3 + eps)
    pulled = stop_gradient(mean_pull) * mean + stop_gradient(std_pull) * std  # (2, B)
    loss = -((mean_std**2 + eps) * pulled).mean(axis=1).sum()
    info = {
        "losses/qf_loss": loss,
        "losses/qf_values": mean.mean(),
        "losses/td_error": jnp.square(y - mean).mean(),
        "losses/qf_std": batch_std.mean(),
    }
    return loss, mean_std, stop_gradient(info)


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
    flow = [x[:, None] for x in (a_t, r, t, v)]  # N = 1 action in each state
    errors, dudt = meanflow_loss(partial(u_fn, batch.obs), *flow)
    loss = errors.mean()
    weights = jax.nn.softmax(logits, axis=1)  # (B, K)
    correction = (t - r)[:, None] * dudt
    v_norm = jnp.linalg.norm(v, axis=-1).mean()
    info = {
        "losses/actor_loss": loss,
        "score/norm": jnp.linalg.norm(score, axis=-1).mean(),
        "score/effective_sample_size": (1 / jnp.square(weights).sum(axis=1)).mean(),
        "velocity/norm": v_norm,
        "velocity/dudt_ratio": jnp.linalg.norm(correction, axis=-1).mean() / v_norm,
    }
    for i in range(4):
        in_bin = jnp.floor(4 * t) == i  # (B, 1)
        num_in_bin = jnp.maximum(in_bin.sum(), 1)
        info[f"losses/actor_loss_t{i}"] = (errors * in_bin).sum() / num_in_bin
    return loss, stop_gradient(info)


# ALGO LOGIC: the agent, as pure functions on its State
def init(key, args, obs_dim, act_dim):
    key, actor_key, critic_key = jax.random.split(key, 3)
    actor_in_dim = obs_dim + act_dim + 4 * args.num_frequencies
    actor = init_ensemble(actor_key, 1, actor_in_dim, act_dim, args)
    critic = init_ensemble(critic_key, 2, obs_dim + act_dim, 2, args)  # twins; mean and, if it is trained, std
    # lambda scales the exploration noise up and the inverse temperature down
    initial_lambda = args.initial_lambda if args.autotune else 1.0
    log_lambda = jnp.log(jnp.float32(initial_lambda))
    trained = {"actor": actor, "critic": critic, "log_lambda": log_lambda}
    optimizers = {name: adam.init(trained[name]) for name, adam in make_optimizers(args).items()}
    return State(
        **trained,
        acting_actor=jax.tree.map(jnp.copy, actor),  # its moving average
        target_critic=jax.tree.map(jnp.copy, critic),
        mean_std=jnp.full((2, 1), math.nan, jnp.float32),  # of the distributional loss
        optimizers=optimizers,
        key=key,
    )


def make_optimizers(args):
    """Adam for the trained parts of State. Flat: with few arrays a compiled call starts sooner."""
    return {
        "actor": optax.flatten(optax.adam(args.policy_lr)),
        "critic": optax.flatten(optax.adam(args.q_lr)),
        "log_lambda": optax.adam(args.alpha_lr),
    }


def acting_part(state):
    return Acting(state.acting_actor, state.critic, state.log_lambda)


def policy_q(critic, obs, a, args, hidden_dtype=None):
    """What best-of-N and the score see of the twins: (B, N)."""
    q, _ = q_network(critic, obs, a, hidden_dtype)  # (2, B, N)
    return q.mean(axis=0) if args.policy_q == "mean" else q.min(axis=0)


def act(acting, obs, key, args, explore=False, deterministic=False):
    """Best-of-N actions (B, A) in states (B, O), noisy if explore; and all candidates (B, N, A).

    deterministic: the action of noise 0 is the only candidate (beyond the paper).
    """
    noise_key, explore_key = jax.random.split(key)
    last_weights, _ = acting.acting_actor[-1]  # (1, H, A)
    act_dim = last_weights.shape[-1]
    if deterministic:
        noise = jnp.zeros((len(obs), 1, act_dim))
    else:
        noise = jax.random.normal(noise_key, (len(obs), args.best_of_n, act_dim))
    u_fn = partial(meanflow_actor, acting.acting_actor)
    q_fn = partial(policy_q, acting.critic, args=args)
    a, candidates = best_of_n(u_fn, q_fn, obs, noise)
    if explore:
        std = args.noise_scale * jnp.exp(acting.log_lambda)
        noise = std * jax.random.normal(explore_key, a.shape)
        a = jnp.clip(a + noise, -1, 1)
    return a, candidates


def update(state, batch, key, args, policy_is_due=True, lr_factor=1.0):
    """Update the critics and, when it is due, policy and moving averages; returns diagnostics."""
    critic_key, actor_key = jax.random.split(key)
    state, info = update_critic(state, batch, critic_key, args, lr_factor)
    if policy_is_due:
        state, actor_info = update_actor(state, batch, actor_key, args, lr_factor)
        info |= actor_info
    return state, info


def update_critic(state, batch, key, args, lr_factor=1.0):
    act_key, z_key = jax.random.split(key)
    acting = acting_part(state)
    next_actions, candidates = act(acting, batch.next_obs, act_key, args, args.target_smoothing)
    next_actions = stop_gradient(next_actions)

    def loss_fn(critic):
        if args.critic_loss == "mse":
            twins = (partial(mean_return, critic), partial(mean_return, state.target_critic))
            loss, info = critic_loss(*twins, batch, next_actions, args)
            return loss, (state.mean_std, info)
        twins = (partial(q_network, critic), partial(q_network, state.target_critic))
        z = jax.random.normal(z_key, (len(batch.obs),))
        rest = (batch, next_actions, z, state.mean_std, args)
        loss, mean_std, info = distributional_critic_loss(*twins, *rest)
        return loss, (mean_std, info)

    state, (mean_std, info) = descend(state, "critic", loss_fn, args, lr_factor)
    info["actions/candidate_std"] = candidates.std(axis=1).mean()
    info["actions/saturated"] = (jnp.abs(candidates) > 0.99).mean()
    return state._replace(mean_std=mean_std), info


def update_actor(state, batch, key, args, lr_factor=1.0):
    """The policy, then all moving averages."""
    times_key, eps_key, mc_key = jax.random.split(key, 3)
    B, A = batch.actions.shape
    uniform = jax.random.uniform(times_key, (B, 2))
    eps = jax.random.normal(eps_key, (B, A))
    if args.mc_noise == "normal":
        mc_eps = jax.random.normal(mc_key, (B, args.num_mc_samples, A))
    else:
        sobol = sobol_points(args.num_mc_samples, A)
        mc_eps = lattice_noise(sobol, jax.random.uniform(mc_key, (B, 1, A)))
    alpha = args.inverse_temperature / jnp.exp(state.log_lambda)
    q_fn = partial(policy_q, state.critic, args=args, hidden_dtype=jnp.dtype(args.score_dtype))

    def loss_fn(actor):
        u_fn = partial(meanflow_actor, actor)
        return actor_loss(u_fn, q_fn, batch, uniform, eps, mc_eps, alpha, args)

    state, info = descend(state, "actor", loss_fn, args, lr_factor)
    target_critic = optax.incremental_update(state.critic, state.target_critic, args.tau)
    acting_actor = optax.incremental_update(state.actor, state.acting_actor, args.policy_tau)
    info["losses/alpha"] = alpha
    return state._replace(target_critic=target_critic, acting_actor=acting_actor), info


def update_lambda(state, args):
    """Move lambda to where noise of std noise_scale * lambda has target_entropy: no data enter."""
    std = args.noise_scale * jnp.exp(state.log_lambda)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + jnp.log(std)

    def loss_fn(log_lambda):
        return log_lambda * (entropy - args.target_entropy), None

    state, _ = descend(state, "log_lambda", loss_fn, args)
    return state


def descend(state, name, loss_fn, args, lr_factor=1.0):
    """One step of Adam on state.<name>; loss_fn(part) -> (loss, rest). Returns the state and rest."""
    part = getattr(state, name)
    gradient, rest = jax.grad(loss_fn, has_aux=True)(part)
    step, optimizer = make_optimizers(args)[name].update(gradient, state.optimizers[name])
    step = jax.tree.map(lambda x: lr_factor * x, step)
    changed = {name: optax.apply_updates(part, step)}
    return state._replace(**changed, optimizers=state.optimizers | {name: optimizer}), rest


class ReplayBuffer:
    """Transitions, a row each, on the host or, for --resume, in a file.

    Training samples from the ring that to_device() makes. Time limits are not `terminated`: they
    bootstrap. Only the last buffer_size rows are sampled.
    A checkpoint holds only the number of rows: to resume from it, the buffer_size rows before it
    must still be there. The older of the two kept checkpoints lies up to 2 * checkpoint_frequency
    steps back, so there are that many rows more than are sampled. The rows of a step are those of
    the first seed's environments, then of the second's, and so on.
    """

    def __init__(self, args, obs_dim, act_dim, file, num_added):
        self.size = args.buffer_size
        self.num_seeds = args.num_seeds
        self.num_envs = args.num_envs
        self.widths = [obs_dim, obs_dim, act_dim, 1, 1]  # of the fields of Batch
        self.row_width = sum(self.widths)
        # a run shorter than that needs only total_timesteps rows. Such a buffer never wraps around, so
        # that row i stays in slot i when --resume with more steps makes the buffer larger
        num_rows = min(args.buffer_size + 2 * args.checkpoint_frequency, args.total_timesteps)
        # checkpoints can be a step late, see is_due; and one step to spare
        num_steps = math.ceil(num_rows / args.num_envs) + 2
        shape = (num_steps * args.num_envs * args.num_seeds, self.row_width)
        if file is None:
            self.on_host = np.zeros(shape, np.float32)
        else:
            self.on_host = map_file(file, shape, num_added * args.num_seeds)

    def pack(self, rows, *columns):
        """Write the columns of transitions into rows."""
        starts = np.cumsum([0, *self.widths])
        for start, width, column in zip(starts[:-1], self.widths, columns, strict=True):
            rows[:, start : start + width] = column.reshape(-1, width)

    def host_rows(self, num_added):
        """The place, on the host or in the file, of a step's rows after num_added transitions."""
        start = num_added * self.num_seeds % len(self.on_host)
        return self.on_host[start : start + self.num_seeds * self.num_envs]

    def to_device(self, num_added):
        """The ring of every seed, one step back: an iteration begins by adding the previous step.

        The first one makes num_filled num_added. A resumed run stores its last step once more. A
        new one has none: num_filled begins at -num_envs, zeros go to the last slots, and with
        num_filled at 0 they are not sampled.
        """
        steps = self.on_host.reshape(-1, self.num_seeds, self.num_envs, self.row_width)
        rows = steps.swapaxes(0, 1).reshape(self.num_seeds, -1, self.row_width)
        num_before = num_added - self.num_envs
        next_slot = jnp.full(self.num_seeds, num_before % rows.shape[1], jnp.int32)
        num_filled = jnp.full(self.num_seeds, min(num_before, self.size), jnp.int32)
        return Ring(jnp.array(rows), next_slot, num_filled)


def add(ring, rows, size):
    """Write rows into the ring. size: how many of its newest rows may be sampled."""
    slots = (ring.next_slot + jnp.arange(len(rows))) % len(ring.rows)
    next_slot = (ring.next_slot + len(rows)) % len(ring.rows)
    num_filled = jnp.minimum(ring.num_filled + len(rows), size)
    return Ring(ring.rows.at[slots].set(rows), next_slot, num_filled)


def sample(ring, key, batch_size, widths):
    age = jax.random.randint(key, (batch_size,), 0, ring.num_filled)  # 0 .. num_filled - 1
    slots = (ring.next_slot - 1 - age) % len(ring.rows)
    starts = np.cumsum(widths)[:-1]
    obs, next_obs, actions, rewards, terminated = jnp.split(ring.rows[slots], starts, axis=1)
    return Batch(obs, next_obs, actions, rewards.squeeze(1), terminated.squeeze(1))


# The two compiled calls of an iteration; slots and random keys stay on the device between them
def add_and_act(ring, key, acting, inbox, args):
    """Actions (E, A). inbox (E, row_width + O): the previous step's rows, observations to act in."""
    _, row_width = ring.rows.shape
    rows, obs = jnp.split(inbox, [row_width], axis=1)
    ring = add(ring, rows, args.buffer_size)
    key, act_key = jax.random.split(key)
    actions, _ = act(acting, obs, act_key, args, explore=True)
    return ring, key, actions


def sample_and_update(state, ring, lr_factor, args, widths, policy_is_due):
    key, sample_key, update_key = jax.random.split(state.key, 3)
    batch = sample(ring, sample_key, args.batch_size, widths)
    return update(state._replace(key=key), batch, update_key, args, policy_is_due, lr_factor)


@partial(jax.jit, static_argnames="args")
def act_greedily(acting, obs, key, num_calls, args):
    key = jax.random.fold_in(key, num_calls)
    actions, _ = act(acting, obs, key, args, deterministic=args.deterministic)
    return actions


def make_policy(acting, args, box, seed):
    """The agent without exploration: observations (O,) or (B, O) -> the environment's actions."""
    key = jax.random.PRNGKey(seed)
    num_calls = count()

    def policy(observation):
        observation = np.asarray(observation, np.float32)
        obs = np.atleast_2d(observation)
        actions = act_greedily(acting, obs, key, next(num_calls), args)
        return to_box(np.asarray(actions), box).reshape(*observation.shape[:-1], -1)  # (A,) for (O,)

    return policy


def load_policy(run_folder, device="cpu", **changes):
    """The newest policy of a run: observations (O,) or (B, O) -> actions, in the environment's units.

    Of several seeds it is the policy of the one that run_folder belongs to.
    changes: of the run's arguments, such as best_of_n=64. Raises ValueError if the newest checkpoint
    cannot be used. Nothing in the file is executed.
    """
    _, k = find_run(Path(run_folder))
    return restore_policy(load_checkpoint(Path(run_folder)), k, device, **changes)


def restore_policy(checkpoint, k, device, **changes):
    """The policy of seed number k."""
    low, high, dtype = checkpoint["action_box"]
    box = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    args = replace(Args(**checkpoint["args"]), **changes)
    acting = part_of_seed(k, acting_part(restore_state(checkpoint)))
    acting = jax.device_put(acting, jax.devices(device)[0])
    return make_policy(acting, args, box, evaluation_seed(args.seed + k))


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


# What a reader of the method may skip: several seeds, checks, files, signals
def side_by_side(function, donated=(), **fixed):
    """A function of one seed, compiled for several: all of its arrays get the seeds as first axis.

    donated: numbers of the arguments whose memory the results take over.
    """
    return jax.jit(jax.vmap(partial(function, **fixed)), donate_argnums=donated)


def part_of_seed(k, tree):
    return jax.tree.map(lambda x: x[k], tree)


def evaluation_seed(seed):
    return int(np.random.SeedSequence([seed, 0, 1]).generate_state(1)[0])


def env_seeds_of(seeds, start_step, num_envs):
    """Seeds of the environments (S * E,)."""
    sequences = [np.random.SeedSequence([seed, start_step]) for seed in seeds]
    return np.concatenate([sequence.generate_state(num_envs) for sequence in sequences])


def random_actions(seeds, global_step, num_envs, act_dim):
    """Uniform actions (S * E, A), a function of seed and step."""
    generators = [np.random.default_rng([seed, global_step]) for seed in seeds]
    actions = [generator.uniform(-1, 1, (num_envs, act_dim)) for generator in generators]
    return np.concatenate(actions).astype(np.float32)


def check_finite_by_seed(places, **arrays):
    """check_finite of each seed's part of the arrays. places: how each seed's error message ends."""
    for name, values in arrays.items():
        parts = np.reshape(values, (len(places), -1))
        for place, part in zip(places, parts, strict=True):
            check_finite(place, **{name: part})


class SummaryWriter:
    """Scalars for TensorBoard, which drops what a killed run logged from purge_step on."""

    def __init__(self, folder, purge_step):
        self.file = event_file_writer.EventFileWriter(str(folder))
        self.flush = self.file.flush
        self.close = self.file.close
        self.add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, tag, value, step):
        scalar = Summary.Value(tag=tag, simple_value=float(value))
        self.add(step, summary=Summary(value=[scalar]))

    def add(self, step, **content):
        self.file.add_event(Event(wall_time=time.time(), step=step, **content))


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
        "--device gpu: JAX finds no GPU": args.device != "gpu" or jax.default_backend() == "gpu",
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


def named_arrays(state):
    """Every array of a state by its name, such as .critic[0][1], on the host."""
    leaves = jax.tree.leaves_with_path(jax.device_get(state))
    return {keystr(path): x for path, x in leaves}


def restore_state(checkpoint):
    """The states of all seeds, on the host."""
    args = Args(**checkpoint["args"])
    low, _, _ = checkpoint["action_box"]
    init_one = partial(init, args=args, obs_dim=checkpoint["obs_dim"], act_dim=len(low))
    keys = np.zeros((args.num_seeds, 2), np.uint32)
    shapes = jax.eval_shape(jax.vmap(init_one), keys)
    arrays = checkpoint["agent"]
    return jax.tree.map_with_path(lambda path, _: arrays[keystr(path)], shapes)


def save_checkpoint(path, checkpoint):
    """A NumPy archive of the agent's arrays, with all other entries as JSON. Two are kept."""
    entries = {name: entry for name, entry in checkpoint.items() if name != "agent"}
    data = io.BytesIO()
    np.savez(data, entries=json.dumps(entries), **checkpoint["agent"])
    write_file(path, data.getbuffer())
    for old in sorted(path.parent.glob("checkpoint_[0-9]*.npz"))[:-2]:
        old.unlink()


def find_run(path):
    """The first seed's folder, with the checkpoints of all; and the number k of path's own seed."""
    if not path.is_dir():
        return path.parent, 0
    config_file = path / "config.json"
    if any(path.glob("checkpoint_[0-9]*.npz")) or not config_file.exists():
        return path, 0
    config = json.loads(config_file.read_text())
    if "first_folder" not in config:  # of another script
        return path, 0
    return path.resolve().with_name(config["first_folder"]), config["seed"] - config["first_seed"]


def load_checkpoint(path):
    """The newest checkpoint of a run, or one named itself. ValueError if it cannot be used."""
    paths = [path]
    if path.is_dir():
        path, _ = find_run(path)
        paths = sorted(path.glob("checkpoint_[0-9]*.npz"), reverse=True)
    errors = "" if paths else f"{path} has no checkpoint; "
    for path in paths:
        try:
            with np.load(path) as file:  # it compares checksums, and refuses pickled objects
                arrays = dict(file)
            checkpoint = json.loads(str(arrays.pop("entries", "{}")))
            if checkpoint.get("format") != CHECKPOINT_FORMAT:
                raise ValueError(f"it is not of {CHECKPOINT_FORMAT}")
        except Exception as error:
            errors += f"{path} cannot be used: {error}; "
            continue
        if errors:  # a newer one is bad: whether to go back is for the user to decide
            raise ValueError(f"{errors}the newest good one is {path}")
        return checkpoint | {"agent": arrays}
    raise ValueError(f"{errors}there is no good one")


def resumed_args(checkpoint):
    """The run's arguments, overridden by what the command line names; some cannot change."""
    args = tyro.cli(Args, default=Args(**checkpoint["args"]))
    fixed = "preset env_id seed num_seeds num_envs buffer_size checkpoint_frequency"
    fixed = f"{fixed} hidden_dim num_layers num_frequencies".split()
    for name, before in checkpoint["args"].items():
        is_fixed = name in fixed or name.endswith("_lr") or name == "initial_lambda"
        if is_fixed and getattr(args, name) != before:
            exit_with_error(f"--{name.replace('_', '-')} is {before} here, and cannot change")
    return args


def folders_of(run_folder, names):
    """The folders of all seeds: the first may have been renamed, the others lie beside it."""
    run_folder = run_folder.resolve()
    others = [run_folder.with_name(name) for name in names[1:]]
    for folder in others:
        if not folder.is_dir():
            exit_with_error(f"{folder} is missing; it belongs to another seed of {run_folder}")
    return [run_folder, *others]


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
    checkpoint = None
    start_step = 0
    both = args.resume is not None and args.evaluate is not None
    if both or args.resume == "" or args.evaluate == "":
        exit_with_error("give the folder of a run, to --resume or to --evaluate")
    source = args.resume or args.evaluate
    if source is not None:
        try:
            run_folder, _ = find_run(Path(source))
            if args.resume is not None and any(run_folder.glob("checkpoint_[0-9]*.npz")):
                with writing(run_folder):
                    lock = lock_run(run_folder)
            checkpoint = load_checkpoint(Path(source))
        except ValueError as error:
            exit_with_error(str(error))
        if args.evaluate is not None:  # it tracks and films only if this command line asks for it
            checkpoint["args"] |= {"track": False, "capture_video": False}
        args = resumed_args(checkpoint)
        start_step = checkpoint["global_step"]
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISIONS[args.matmul_precision])
    check_args(args)
    np.seterr(over="ignore")  # check_finite tells of numbers that float32 does not hold
    obs_dim, act_dim, box = env_dimensions(args)
    device = jax.default_backend()  # "cpu" or "gpu"

    # TRY NOT TO MODIFY: seeding. A resumed run begins new episodes, with seeds of their own
    seeds = range(args.seed, args.seed + args.num_seeds)
    keys = [jax.random.PRNGKey(seed % 2**32) for seed in seeds]
    # each seed's key, 2 numbers, is split in two: (S, 2) and (S, 2)
    init_keys, act_keys = jax.vmap(jax.random.split, out_axes=1)(jnp.stack(keys))
    env_seeds = env_seeds_of(seeds, start_step, args.num_envs)
    eval_seeds = [evaluation_seed(seed) for seed in seeds]

    if args.evaluate is not None:
        changes = {"best_of_n": args.best_of_n, "policy_q": args.policy_q, "deterministic": args.deterministic}
        for k, seed in enumerate(seeds):
            policy = restore_policy(checkpoint, k, device, **changes)
            video_folder = f"{run_folder}/videos/seed_{seed}" if args.capture_video else None
            returns = evaluate(policy, args.env_id, args.num_episodes, eval_seeds[k], video_folder)
            mean, std = returns.mean(), returns.std()
            print(f"return {mean:.1f} +- {std:.1f}, seed {seed}, by episode {returns.round(1).tolist()}")
        sys.exit()

    if checkpoint is None:
        suffix = time.time_ns()
        run_name = f"{args.env_id}__{args.exp_name}".replace("/", "_").replace(":", "_")
        run_folders = [Path("runs", f"{run_name}__{seed}__{suffix}") for seed in seeds]
    else:
        run_folders = folders_of(run_folder, checkpoint["folder_names"])
    run_folder = run_folders[0]  # it holds what all seeds share
    last_step = args.total_timesteps - args.total_timesteps % args.num_envs
    evaluations = [evaluations_until(folder / "evaluations.csv", start_step) for folder in run_folders]
    # a checkpoint precedes its step's evaluations: a run that was killed between them lacks some
    missing = []
    if start_step > 0 and is_due(start_step, args.eval_frequency, args):
        missing = [k for k, lines in enumerate(evaluations) if not lines[-1].startswith(f"{start_step},")]
    if start_step >= last_step and not missing and not args.save_model:
        print(f"{run_folder} is finished at step {start_step}; --total-timesteps MORE goes on")
        sys.exit()
    state = side_by_side(init, args=args, obs_dim=obs_dim, act_dim=act_dim)(init_keys)
    num_updates = 0
    num_added = 0  # transitions of each seed so far
    start_time = time.time()
    if checkpoint is not None:
        num_updates = checkpoint["num_updates"]
        num_added = checkpoint["num_added"] if args.checkpoint_buffer else 0
        start_time -= checkpoint["seconds"]
        state = jax.tree.map(jnp.array, restore_state(checkpoint))
        act_keys = jnp.array(checkpoint["act_keys"], jnp.uint32)
        if not args.autotune:
            state = state._replace(log_lambda=jnp.zeros_like(state.log_lambda))  # lambda = 1

    packages = [x for x in ("jax", "optax", "gymnasium", "mujoco", "numpy", "tyro") if util.find_spec(x)]
    versions = {package: metadata.version(package) for package in packages}
    config = {"script": Path(__file__).name, **asdict(args), "resume": None, "versions": versions}
    config |= {"first_seed": args.seed, "first_folder": run_folder.name}
    with writing(run_folder):
        for folder in run_folders:
            folder.mkdir(parents=True, exist_ok=checkpoint is not None)
        if checkpoint is None:
            lock = lock_run(run_folder)
        rb_file = run_folder / "replay_buffer.bin" if args.checkpoint_buffer else None
        rb = ReplayBuffer(args, obs_dim, act_dim, rb_file, num_added)
    if args.track:
        import wandb

        wandb.init(project="som", name=run_folder.name, config=config, sync_tensorboard=True)
    for folder, seed, lines in zip(run_folders, seeds, evaluations, strict=True):
        write_file(folder / "config.json", json.dumps(config | {"seed": seed}, indent=2).encode())
        write_file(folder / "evaluations.csv", "\n".join([*lines, ""]).encode())
    for path in run_folder.glob("checkpoint_[0-9]*.npz"):
        if int(path.stem.split("_")[1]) > start_step:  # after the one resumed from: they are made anew
            path.unlink()
    writers = [SummaryWriter(folder, purge_step=start_step + 1) for folder in run_folders]
    for writer in writers:
        atexit.register(writer.close)  # an error that ends the run leaves its curves
    received_signals = receive_signals()

    # an inbox row is a transition of the previous step, then the present observation
    inbox = np.zeros((len(env_seeds), rb.row_width + obs_dim), np.float32)
    new_rows, new_obs = np.split(inbox, [rb.row_width], axis=1)  # views
    inbox_by_seed = inbox.reshape(len(seeds), args.num_envs, -1)  # another view
    ring = rb.to_device(num_added)
    if num_added > 0:  # a resumed run begins by adding its last step once more
        new_rows[:] = rb.host_rows(num_added - args.num_envs)
    add_and_act_all = side_by_side(add_and_act, donated=(0, 1), args=args)
    fixed = {"args": args, "widths": rb.widths}
    updates = {due: side_by_side(sample_and_update, donated=0, policy_is_due=due, **fixed) for due in (True, False)}
    update_lambda_all = side_by_side(update_lambda, donated=0, args=args)
    lr_factor = jnp.ones(len(seeds))

    def evaluate_at(global_step, k):
        """Evaluate seed k, unless a signal arrives, and write the result to evaluations.csv and TensorBoard."""
        policy = make_policy(part_of_seed(k, acting_part(state)), args, box, eval_seeds[k])
        video_folder = f"{run_folders[k]}/videos/{global_step}" if args.capture_video else None
        returns = evaluate(policy, args.env_id, args.num_episodes, eval_seeds[k], video_folder, received_signals)
        if returns is None:
            return
        check_finite(f"at step {global_step}, seed {seeds[k]}; see {run_folders[k]}", evaluation=returns)
        mean, std, seconds = returns.mean(), returns.std(), time.time() - start_time
        evaluations[k].append(f"{global_step},{num_updates},{mean},{std},{seconds}")
        write_file(run_folders[k] / "evaluations.csv", "\n".join([*evaluations[k], ""]).encode())
        writers[k].add_scalar("charts/eval_return", mean, global_step)
        tqdm.write(f"step {global_step}: evaluation return {mean:.1f} +- {std:.1f}, seed {seeds[k]}")

    for k in missing:
        evaluate_at(start_step, k)
    if missing and received_signals:
        exit_with_error(f"stopped; go on with --resume {run_folder}", 128 + received_signals[0])

    # TRY NOT TO MODIFY: start the game
    thunks = len(env_seeds) * [partial(make_env, args.env_id)]
    envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode="SameStep")
    obs, _ = envs.reset(seed=env_seeds.tolist())
    info = {}  # the latest value of every diagnostic
    times = []  # of the first iterations with learning
    steps = range(start_step + args.num_envs, last_step + 1, args.num_envs)
    progress = tqdm(steps, unit="step", unit_scale=args.num_envs, disable=None)
    for global_step in progress:
        names = zip(seeds, run_folders, strict=True)
        places = [f"at step {global_step}, seed {seed}; see {folder}" for seed, folder in names]

        # ALGO LOGIC: the previous step's rows join the buffer, and the policy acts
        new_obs[:] = obs
        ring, act_keys, actions = add_and_act_all(ring, act_keys, acting_part(state), inbox_by_seed)
        actions.copy_to_host_async()

        # ALGO LOGIC: training. A GPU does it while the environments step, without this step's transitions
        learning = num_added >= max(args.learning_starts, 1)
        if learning:
            if args.anneal_steps > 0:
                lr_factor = jnp.full(len(seeds), lr_factor_at(global_step, args))
            for _ in range(args.updates_per_step):
                num_updates += 1
                policy_is_due = num_updates % args.policy_frequency == 0
                state, new_info = updates[policy_is_due](state, ring, lr_factor)
                info |= new_info
                if args.autotune and num_updates % args.alpha_delay == 0:
                    state = update_lambda_all(state)

        # TRY NOT TO MODIFY: execute the game and log data.
        actions = np.asarray(actions).reshape(-1, act_dim)  # waits for the actions, not for the updates
        if global_step <= args.learning_starts:
            actions = random_actions(seeds, global_step, args.num_envs, act_dim)
        next_obs, rewards, terminated, truncated, infos = envs.step(to_box(actions, box))

        # TRY NOT TO MODIFY: save data to replay buffer; next_obs is of the next episode if one ended
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]
            episode = infos["final_info"]["episode_statistics"]
            writer = writers[i // args.num_envs]
            writer.add_scalar("charts/episodic_return", episode["r"][i], global_step)
            writer.add_scalar("charts/episodic_length", episode["l"][i], global_step)
            progress.set_postfix(episodic_return=episode["r"][i], refresh=False)
        observations = np.hstack([obs, next_obs])
        check_finite_by_seed(places, action=actions, reward=rewards, observation=observations)
        check_finite_by_seed(places, last_observation=real_next_obs)
        rb.pack(new_rows, obs, real_next_obs, actions, rewards, terminated)
        rb.host_rows(num_added)[:] = new_rows
        num_added += args.num_envs
        obs = next_obs

        # once in 100 policy updates, also where updates_per_step jumps over the hundredth
        log_due = num_updates % (100 * args.policy_frequency) < args.updates_per_step
        if learning and (log_due or global_step == last_step):
            scalars = jax.device_get(info)  # a value of each seed
            check_finite_by_seed(places, **scalars)
            scalars["charts/SPS"] = len(seeds) * [global_step / (time.time() - start_time)]
            for tag, values in scalars.items():
                for writer, value in zip(writers, values, strict=True):
                    writer.add_scalar(tag, value, global_step)
        if learning and device == "cpu" and args.preset is None and len(times) < 20:
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
            arrays = named_arrays(state)
            # mean_std is NaN with --critic-loss mse
            weights = {f"weight {name}": x for name, x in arrays.items() if name != ".mean_std"}
            check_finite_by_seed(places, **weights)
            checkpoint = {
                "format": CHECKPOINT_FORMAT,
                "args": asdict(args),
                "obs_dim": obs_dim,
                "action_box": (box.low.tolist(), box.high.tolist(), str(box.dtype)),
                "folder_names": [folder.name for folder in run_folders],
                "global_step": global_step,
                "seconds": time.time() - start_time,
                "num_updates": num_updates,
                "num_added": num_added if args.checkpoint_buffer else 0,
                "agent": arrays,
                "act_keys": np.asarray(act_keys).tolist(),
            }
            save_checkpoint(run_folder / f"checkpoint_{global_step:010d}.npz", checkpoint)
            for writer, folder in zip(writers, run_folders, strict=True):
                with writing(folder):
                    writer.flush()
        if evaluation_due and not received_signals:
            for k in range(args.num_seeds):
                evaluate_at(global_step, k)
        if saving and received_signals:
            envs.close()
            message = f"stopped at step {global_step}; go on with --resume {run_folder}"
            exit_with_error(message, code=128 + received_signals[0])

    if args.save_model:
        for k, folder in enumerate(run_folders):
            networks = named_arrays(part_of_seed(k, acting_part(state)))
            config_text = (folder / "config.json").read_text()
            data = io.BytesIO()
            np.savez(data, config=config_text, **networks)
            write_file(folder / "model.npz", data.getbuffer())
    envs.close()
