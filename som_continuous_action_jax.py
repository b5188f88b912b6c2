# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10", "optax>=0.2.4", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2",
#   "tyro>=1,<2", "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""SOM, Score-Based One-step MeanFlow Policy Optimization (https://arxiv.org/abs/2605.23365), in one file, in JAX.
Run it: python som_continuous_action_jax.py --env-id Walker2d-v4 --num-seeds 3
The policy turns noise into an action with ONE network evaluation; the field it imitates is built from the critic alone:
    act       a = argmax_i Q(s, a_i), where a_i = eps_i - u(eps_i, 0, 1, s), i = 1..N                    (Algorithm 1)
    critic    y = r + gamma (1 - terminated) Q'(s', a'), where a' is chosen in the same way              (Section 4.4)
    score     grad log p_t(a_t|s) = grad_{a_t} log sum_k exp(alpha Q(s, (a_t + sigma eps_k) / mu))       (Eq 5)
    velocity  v = -beta/2 (a_t + w score / ||score||), the probability-flow ODE of the VP path           (Eq 6, 8)
    target    u_tgt = v - (t - r) (v d_a u + d_t u), by one Jacobian-vector product                      (Eq 7)
    actor     ||u(a_t, r, t, s) - stopgrad(u_tgt)||^2, a_t = mu a_0 + sigma eps, (s, a_0) from the replay buffer
t = 1 is noise, t = 0 the action, 0 <= r <= t <= 1; actions live in [-1, 1]^A, rescaled at the environment's edge; alpha
is an INVERSE temperature: p_0(a|s) is proportional to exp(alpha Q(s, a)). Shapes: B states; networks take N actions in
each, (B, N, A); twins come first, (2, B, N); what `compile_functions` returns is for S agents, whose seeds come first.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, util
from itertools import pairwise, product
from typing import Literal

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary import Writer
from tqdm import tqdm

FORMAT = f"{pathlib.Path(__file__).name}, checkpoints of version 2"
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated")
Functions = namedtuple("Functions", "init explore act add update")
State = namedtuple("State", "actor acting_actor critic target_critic log_lambda mean_std actor_adam q_adam lambda_adam")
make_keys = jax.vmap(jax.random.PRNGKey)  # seeds (S,) -> (S, 2)


@dataclass
class Args:
    exp_name: str = "som_continuous_action_jax"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    num_seeds: int = 1  # agents trained side by side (S), with the seeds seed, seed + 1, ...
    platform: Literal["auto", "cpu", "gpu"] = "auto"  # where to train (default: on the GPU where JAX finds one)
    track: bool = False  # also log to Weights and Biases
    capture_video: bool = False  # record one episode of every evaluation in the run's folder
    save_model: bool = False  # write actor, critic and configuration to model.npz at the end
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
def init_ensemble(key, size, in_dim, out_dim, args):
    """Weights (size, in, out) and biases (size, 1, out) of every layer, uniform as in PyTorch's nn.Linear."""
    dims = list(pairwise([in_dim, *args.num_layers * [args.hidden_dim], out_dim]))
    keys = jax.random.split(key, len(dims))
    init = [jax.random.uniform(k, (size, i + 1, o), minval=-1) / i**0.5 for k, (i, o) in zip(keys, dims, strict=True)]
    return [(layer[:, :-1], layer[:, -1:]) for layer in init]


def ensemble_mlp(layers, obs, x):
    """GELU networks in one batched product: B states (B, O), N inputs for each (B, N, D) -> (size, B, N, out)."""
    (w_0, b_0), *layers = layers
    w_obs, w_x = jnp.split(w_0, [obs.shape[1]], axis=1)
    h_x = (x.reshape(-1, x.shape[2]) @ w_x).reshape(len(w_0), *x.shape[:2], -1)  # (size, B, N, H)
    h = ((obs @ w_obs + b_0)[:, :, None] + h_x).reshape(len(w_0), -1, w_0.shape[2])  # (size, B * N, H), obs once for N
    for w, b in layers:  # the exact GELU; jax.nn.gelu asks for erfc, which takes a CPU twice as long
        h = (0.5 * h * (1 + jax.lax.erf(h / math.sqrt(2)))) @ w + b
    return h.reshape(len(w_0), *x.shape[:2], -1)


def q_network(layers, obs, a):
    """Twin critics: mean and std of the return, each (2, B, N), of N actions (B, N, A) in each of B states (B, O)."""
    out = ensemble_mlp(layers, obs, a)
    return out[..., 0], jax.nn.softplus(out[..., 1])


def meanflow_actor(layers, obs, a_t, r, t):
    """Average velocity u(a_t, r, t, s): N actions (B, N, A) at times r, t (B, N, 1) in B states (B, O) -> (B, N, A)."""
    # radians over t in [0, 1]: the loss multiplies du/dt, and much higher frequencies keep MeanFlow from training
    frequencies = jnp.linspace(1.0, 3.0, (layers[0][0].shape[1] - obs.shape[1] - a_t.shape[2]) // 4)
    phase_t, phase_dt = t * frequencies, (t - r) * frequencies  # (B, N, num_frequencies)
    embedding = jnp.sin(phase_t), jnp.cos(phase_t), jnp.sin(phase_dt), jnp.cos(phase_dt)
    return ensemble_mlp(layers, obs, jnp.concatenate([a_t, *embedding], axis=-1))[0]


# ALGO LOGIC: the method. Forward SDE da = f a dt + g dW, a_t = mu a_0 + sigma eps; schedules return mu, sigma, f, g^2.
def vp_schedule(t, beta_min, beta_max):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min) (Eq 1)."""
    beta = beta_min + t * (beta_max - beta_min)
    int_beta = beta_min * t + 0.5 * t**2 * (beta_max - beta_min)
    return jnp.exp(-0.5 * int_beta), jnp.sqrt(-jnp.expm1(-int_beta)), -0.5 * beta, beta


def cosine_schedule(t):
    """Variance preserving, mu = cos(pi t / 2); its beta = pi tan(pi t / 2) is unbounded: the last 1e-3 is cut off."""
    angle = 0.5 * math.pi * jnp.minimum(t, 0.999)
    beta = math.pi * jnp.tan(angle)
    return jnp.cos(angle), jnp.sin(angle), -0.5 * beta, beta


def ve_schedule(t, sigma_min=0.01, sigma_max=1.0):
    """Variance exploding, sigma = sigma_min (sigma_max / sigma_min)^t (Eq 10, B.2); sigma_max is the prior's std."""
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    return jnp.ones_like(t), sigma, jnp.zeros_like(t), 2 * math.log(sigma_max / sigma_min) * sigma**2


def estimate_score(q_fn, obs, a_t, mu, sigma, eps, alpha, reference="uniform", q_norm=None, clip=True):
    """Monte-Carlo score grad log p_t(a_t|s) (B, A) (Eq 4 and 5), and the logits alpha Q (B, K) of its samples.
    q_fn: (B, O), (B, K, A) -> (B, K); a_t: (B, A); mu, sigma: (B, 1); eps: (B, K, A) standard normal.
    reference: p_0 ~ exp(alpha Q) ("uniform") or p_0 ~ N(0, I) exp(alpha Q) ("prior", beyond the paper). q_norm: the std
    that divides Q, of all samples ("batch") or a state's ("state"). clip: Q is asked in [-1, 1]^A, where it was fit."""

    def log_sum_exp(a_t):
        # prior: the square of N(a_0; 0, I) N(a_t; mu a_0, sigma^2 I) completed
        center, std = (a_t / mu, sigma / mu) if reference == "uniform" else (mu * a_t, sigma)
        a_0 = center[:, None] + std[:, None] * eps  # (B, K, A)
        q = q_fn(obs, jnp.clip(a_0, -1, 1) if clip else a_0)  # (B, K)
        if q_norm is not None:
            q = q / (jax.lax.stop_gradient(q.std(axis=None if q_norm == "batch" else 1, ddof=1).mean()) + 1e-6)
        return jax.nn.logsumexp(alpha * q, axis=1).sum(), alpha * q

    score, logits = jax.lax.stop_gradient(jax.grad(log_sum_exp, has_aux=True)(a_t))  # none to the critic's weights
    return (score if reference == "uniform" else score - a_t), logits


def pf_ode_velocity(a_t, score, f, g2, score_scale=None):
    """Velocity f a_t - g^2/2 score (B, A) of the probability-flow ODE (Eq 2, 6, B.2); score_scale is w of Eq 8."""
    if score_scale is not None:
        score = score_scale * score / (jnp.linalg.norm(score, axis=-1, keepdims=True) + 1e-6)
    return f * a_t - 0.5 * g2 * score


def sample_r_t(uniform, zero_r_ratio=0.0):
    """Two uniform numbers (B, 2) as times r <= t, each (B, 1) (Algorithm 1); r = 0 in a share of the rows."""
    r, t = uniform.min(axis=1, keepdims=True), uniform.max(axis=1, keepdims=True)
    return r * (jnp.arange(len(r))[:, None] >= zero_r_ratio * len(r)), t


def meanflow_loss(u_fn, a_t, r, t, v):
    """Squared error (B, N) of u_fn(a_t, r, t) against stopgrad(v - (t - r) du/dt) (Eq 7), and du/dt (B, N, A)."""
    u, dudt = jax.jvp(u_fn, (a_t, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))  # along the flow
    u_tgt = jax.lax.stop_gradient(v - (t - r) * dudt)
    return jnp.square(u - u_tgt).sum(axis=-1), jax.lax.stop_gradient(dudt)


def best_of_n(u_fn, q_fn, obs, noise):
    """One-step actions noise - u(noise, 0, 1, s): the one of highest Q (B, A), and all N (B, N, A) (Algorithm 1)."""
    r = jnp.zeros_like(noise[..., :1])
    candidates = jnp.clip(noise - u_fn(obs, noise, r, r + 1), -1, 1)
    return candidates[jnp.arange(len(obs)), q_fn(obs, candidates).argmax(axis=1)], candidates


# Replay buffer: a ring of transitions on the device, a row each; only `terminated` is stored as the end of an episode.
def sample(buffer, num_added, key, batch_size, obs_dim):
    rows = buffer[jax.random.randint(key, (batch_size,), 0, jnp.minimum(num_added, len(buffer)))]
    obs, next_obs, actions, rest = jnp.split(rows, [obs_dim, 2 * obs_dim, rows.shape[1] - 2], axis=1)
    return Batch(obs, next_obs, actions, rest[:, 0], rest[:, 1])


def critic_loss(q_dist, target_q_dist, batch, next_actions, z, mean_std, args, eps=0.1):
    """Temporal differences of the twins, as in DACER or as plain squared errors (Section 4.4).
    q_dist, target_q_dist: (B, O), (B, 1, A) -> mean, std of the return, (2, B, 1). z: (B,) standard normal.
    mean_std: (2, 1) moving average of the predicted std, NaN at first; info["mean_std"] is the next. eps: of DACER."""
    mean, std = (x.squeeze(-1) for x in target_q_dist(batch.next_obs, next_actions[:, None]))  # (2, B)
    mean, std = (jnp.where(mean[0] <= mean[1], *x) for x in (mean, std))  # (B,), of the smaller mean
    rewards, discount = args.reward_scale * batch.rewards, args.gamma * (1 - batch.terminated)
    y, y_sample = jax.lax.stop_gradient([rewards + discount * q for q in (mean, mean + std * jnp.clip(z, -3, 3))])
    mean, std = (x.squeeze(-1) for x in q_dist(batch.obs, batch.actions[:, None]))  # (2, B)
    batch_std = jax.lax.stop_gradient(std.mean(axis=1, keepdims=True))
    mean_std = jnp.where(jnp.isnan(mean_std), batch_std, mean_std + args.tau * (batch_std - mean_std))
    if args.critic_loss == "mse":
        loss = jnp.square(mean - y).mean(axis=1).sum()
    else:  # its gradient is DACER's: the mean is pulled to y, the std to the spread of the bounded sampled target
        spread = jnp.square(jnp.clip(y_sample - mean, -3 * mean_std, 3 * mean_std))
        pulls = (y - mean) / (jnp.square(std) + eps), (spread - jnp.square(std)) / (std**3 + eps)
        mean_pull, std_pull = jax.lax.stop_gradient(pulls)
        loss = -((jnp.square(mean_std) + eps) * (mean_pull * mean + std_pull * std)).mean(axis=1).sum()
    info = {"mean_std": mean_std, "losses/qf_loss": loss, "losses/qf_std": batch_std.mean()}
    info |= {"losses/qf_values": mean.mean(), "losses/td_error": jnp.square(y - mean).mean()}
    return loss, jax.lax.stop_gradient(info)


def actor_loss(u_fn, q_fn, batch, uniform, eps, mc_eps, alpha, args):
    """The policy regressed on the velocity field of exp(alpha Q) (Eq 5 to 8).
    u_fn, q_fn: of N actions a state, as the networks. uniform: (B, 2). eps: (B, A) and mc_eps: (B, K, A) normal."""
    r, t = sample_r_t(uniform, args.zero_r_ratio)
    schedules = {"vp": partial(vp_schedule, beta_min=args.beta_min, beta_max=args.beta_max), "ve": ve_schedule}
    mu, sigma, f, g2 = cosine_schedule(t) if args.reference == "prior" else schedules[args.sde](t)
    a_t = mu * batch.actions + sigma * eps
    score, logits = estimate_score(q_fn, batch.obs, a_t, mu, sigma, mc_eps, alpha, args.reference, args.q_norm)
    v = pf_ode_velocity(a_t, score, f, g2, args.score_scale if args.reference == "uniform" else None)
    loss, dudt = meanflow_loss(partial(u_fn, batch.obs), *(x[:, None] for x in (a_t, r, t, v)))
    info = {"losses/actor_loss": loss.mean(), "score/norm": jnp.linalg.norm(score, axis=-1).mean()}
    info["score/effective_sample_size"] = (1 / jnp.square(jax.nn.softmax(logits, axis=1)).sum(axis=1)).mean()
    v_norm, dudt_norm = (jnp.linalg.norm(x, axis=-1).mean() for x in (v, (t - r)[:, None] * dudt))
    info |= {"velocity/norm": v_norm, "velocity/dudt_ratio": dudt_norm / v_norm}
    for i in range(4):
        in_bin = jnp.floor(4 * t) == i  # (B, 1)
        info[f"losses/actor_loss_t{i}"] = (loss * in_bin).sum() / jnp.maximum(in_bin.sum(), 1)
    return loss.mean(), jax.lax.stop_gradient(info)


def compile_functions(args, obs_dim, act_dim):
    """The agent, for S of them side by side: seeds come first in arrays, states and keys; the counters are shared."""

    def init(key):
        actor_key, critic_key = jax.random.split(key)
        actor = init_ensemble(actor_key, 1, obs_dim + act_dim + 4 * args.num_frequencies, act_dim, args)
        critic = init_ensemble(critic_key, 2, obs_dim + act_dim, 2, args)
        log_lambda = jnp.log(jnp.float32(args.initial_lambda if args.autotune else 1))
        adams = [optax.adam(0.0).init(parameters) for parameters in (actor, critic, log_lambda)]
        networks = jax.tree.map(jnp.copy, (actor, actor, critic, critic))  # no array may be donated twice
        return State(*networks, log_lambda, jnp.float32([[math.nan]] * 2), *adams)

    def q_of_twins(critic, obs, a):
        return (jnp.mean if args.policy_q == "mean" else jnp.min)(q_network(critic, obs, a)[0], axis=0)  # (B, N)

    def act(state, obs, key, step, explore=False):
        """Best-of-N actions (B, A) in states (B, O), with exploration noise or without, and all N candidates."""
        noise_key, explore_key = jax.random.split(key := jax.random.fold_in(key, step))
        u_fn, q_fn = partial(meanflow_actor, state.acting_actor), partial(q_of_twins, state.critic)
        a, candidates = best_of_n(u_fn, q_fn, obs, jax.random.normal(noise_key, (len(obs), args.best_of_n, act_dim)))
        if explore:  # and before learning starts, at random
            a += args.noise_scale * jnp.exp(state.log_lambda) * jax.random.normal(explore_key, a.shape)
            a = jnp.where(step <= args.learning_starts, jax.random.uniform(key, a.shape, minval=-1), a)
        return jnp.clip(a, -1, 1), candidates

    def descend(loss_fn, network, parameters, adam_state, lr, *rest):
        """One step of Adam on loss_fn(the network with these parameters, *rest) -> loss, info."""
        gradient, info = jax.grad(lambda p: loss_fn(partial(network, p), *rest), has_aux=True)(parameters)
        step, adam_state = optax.adam(lr).update(gradient, adam_state)
        return optax.apply_updates(parameters, step), adam_state, info

    def update_policy(state, batch, keys):
        (B, A), alpha = batch.actions.shape, args.inverse_temperature / jnp.exp(state.log_lambda)
        uniform, eps = jax.random.uniform(keys[3], (B, 2)), jax.random.normal(keys[4], (B, A))
        mc_eps = jax.random.normal(keys[5], (B, args.num_mc_samples, A))
        rest = partial(q_of_twins, state.critic), batch, uniform, eps, mc_eps, alpha, args
        actor, adam, info = descend(actor_loss, meanflow_actor, state.actor, state.actor_adam, args.policy_lr, *rest)
        target_critic = optax.incremental_update(state.critic, state.target_critic, args.tau)
        acting_actor = optax.incremental_update(actor, state.acting_actor, args.policy_tau)
        state = state._replace(actor=actor, actor_adam=adam, target_critic=target_critic, acting_actor=acting_actor)
        return state, info | {"losses/alpha": alpha}

    def update(state, buffer, num_added, num_updates, key):
        """U updates of critics and, when due, of policy, targets and lambda; the latest value of every diagnostic."""

        def one_update(state, number):
            keys = jax.random.split(jax.random.fold_in(key, number), 6)
            batch = sample(buffer, num_added, keys[0], args.batch_size, obs_dim)
            next_actions, candidates = act(state, batch.next_obs, keys[1], 0)
            z, target_q_dist = jax.random.normal(keys[2], (args.batch_size,)), partial(q_network, state.target_critic)
            rest = target_q_dist, batch, next_actions, z, state.mean_std, args
            critic, adam, info = descend(critic_loss, q_network, state.critic, state.q_adam, args.q_lr, *rest)
            state = state._replace(critic=critic, q_adam=adam, mean_std=info.pop("mean_std"))
            info["actions/candidate_std"] = candidates.std(axis=1).mean()
            info["actions/saturated"] = (jnp.abs(candidates) > 0.99).mean()
            # all seeds share the number of the update, so that vmap keeps the condition: what is not due costs nothing
            no_info = jax.tree.map(jnp.zeros_like, jax.eval_shape(update_policy, state, batch, keys)[1])
            branches = update_policy, lambda state, *_: (state, no_info)
            state, policy_info = jax.lax.cond(number % args.policy_frequency == 0, *branches, state, batch, keys)
            if args.autotune:
                entropy = 0.5 * math.log(2 * math.pi * math.e * args.noise_scale**2) + state.log_lambda
                step, adam = optax.adam(args.alpha_lr).update(entropy - args.target_entropy, state.lambda_adam)
                updated = state._replace(log_lambda=state.log_lambda + step, lambda_adam=adam)
                state = jax.tree.map(partial(jnp.where, number % args.alpha_delay == 0), updated, state)
            return state, (info, policy_info)

        numbers = num_updates + 1 + jnp.arange(args.updates_per_step)
        state, (info, policy_info) = jax.lax.scan(one_update, state, numbers)
        latest = len(numbers) - 1 - numbers[-1] % args.policy_frequency
        return state, {tag: x[-1] for tag, x in info.items()} | {tag: x[latest] for tag, x in policy_info.items()}

    explore, greedy = (jax.jit(jax.vmap(partial(act, explore=x), (0, 0, 0, None))) for x in (True, False))
    add = jax.vmap(lambda buffer, n, rows: buffer.at[(n + jnp.arange(len(rows))) % len(buffer)].set(rows), (0, None, 0))
    donating = add, jax.vmap(update, (0, 0, None, None, 0))
    return Functions(jax.jit(jax.vmap(init)), explore, greedy, *(jax.jit(f, donate_argnums=0) for f in donating))


def evaluate(policy, args, seeds, run_folders, videos, num_episodes=10):
    """Returns (S, num_episodes) without exploration or discount; policy: obs (S, num_episodes, O), keys, step -> a."""
    folders = [args.capture_video and i == 0 and f"{x}/{videos}" for x in run_folders for i in range(num_episodes)]
    envs = gym.vector.SyncVectorEnv([partial(make_env, args.env_id, x) for x in folders], autoreset_mode="SameStep")
    returns, running, keys, step = np.zeros(len(folders)), np.ones(len(folders), bool), make_keys(np.uint32(seeds)), 0
    obs, _ = envs.reset(seed=[seed + i for seed in seeds for i in range(num_episodes)])
    while running.any():
        actions, _ = policy(obs.astype(np.float32).reshape(len(seeds), num_episodes, -1), keys, step)
        obs, rewards, terminated, truncated, _ = envs.step(np.asarray(actions).reshape(len(folders), -1))
        returns, running, step = returns + running * rewards, running & ~(terminated | truncated), step + 1
    envs.close()
    return returns.reshape(len(seeds), num_episodes)


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
        "--platform gpu: JAX finds no GPU here": args.platform != "gpu" or jax.default_backend() == "gpu",
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
    return env.observation_space.shape[0], env.action_space.shape[0]


if __name__ == "__main__":
    args, checkpoint, arrays, writers, stop = tyro.cli(Args), {}, {}, [], []
    if source := args.resume or args.evaluate:
        paths = sorted(pathlib.Path(source).glob("checkpoint_*.npz")) or [pathlib.Path(source)]
        for path in reversed(paths):
            with suppress(Exception), np.load(path) as file:  # without pickle it executes nothing; it has checksums
                arrays = dict(file)
                checkpoint = json.loads(str(arrays.pop(FORMAT)))
                break
        if (good := path if checkpoint else None) != paths[-1]:
            fail(f"{paths[-1]} is missing, damaged or not of {FORMAT}; the good one before it: {good}")
        args = tyro.cli(Args, default=Args(**checkpoint["args"]))
        for name in "env_id seed num_seeds num_envs buffer_size hidden_dim num_layers num_frequencies".split():
            if getattr(args, name) != checkpoint["args"][name]:
                fail(f"{path} has --{name.replace('_', '-')} {checkpoint['args'][name]}, which cannot change")
    jax.config.update("jax_platforms", "cpu" if args.platform == "cpu" else jax.config.jax_platforms)
    obs_dim, act_dim = check_args(args)
    S, seeds = args.num_seeds, range(args.seed, args.seed + args.num_seeds)
    name = f"{args.env_id}__{args.exp_name}__{{}}__{time.time_ns()}_{os.getpid()}".replace("/", "_")
    runs = path.resolve().parents[1] if checkpoint else pathlib.Path("runs")
    folders = [runs / x for x in checkpoint.get("names", map(name.format, seeds))]  # the first: checkpoints
    tables = S * ["global_step,num_updates,return_mean,return_std,wall_time_s\n"]
    first_step, num_updates, num_added, seconds, tables = checkpoint.get("progress", (0, 0, 0, 0.0, tables))
    # TRY NOT TO MODIFY: seeding. Random numbers are functions of the seed and of the steps or updates so far
    env_seeds = np.concatenate([np.random.SeedSequence([s, first_step]).generate_state(args.num_envs) for s in seeds])
    eval_seeds = [int(np.random.SeedSequence(s).generate_state(args.num_envs + 1)[-1]) for s in seeds]
    keys = make_keys(np.array(seeds).astype(np.uint32))
    init_keys, act_keys, update_keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(keys)
    agents = compile_functions(args, obs_dim, act_dim)
    name_of, state = jax.tree_util.keystr, agents.init(init_keys)
    state = jax.tree.map_with_path(lambda path, x: jnp.array(arrays[name_of(path)]) if checkpoint else x, state)
    if args.evaluate:
        x = evaluate(partial(agents.act, state), args, eval_seeds, folders, "videos", args.num_episodes).round(1)
        sys.exit(print(f"return {x.mean(1).round(1)} +- {x.std(1).round(1)}, by seed and episode {x.tolist()}"))
    steps, start = range(first_step + args.num_envs, args.total_timesteps + 1, args.num_envs), time.time() - seconds
    steps or sys.exit(print(f"{folders[0]} is finished at step {first_step}; --total-timesteps MORE goes on"))
    file, size = folders[0] / "replay_buffer.bin", min(args.buffer_size, args.total_timesteps)
    shape, num_added = (size, S, 2 * obs_dim + act_dim + 2), num_added * args.checkpoint_buffer
    if num_added and not (file.exists() and file.stat().st_size >= 4 * math.prod(shape[1:]) * min(size, num_added)):
        fail(f"{file} is missing or too short; --no-checkpoint-buffer goes on without it")
    versions = {name: metadata.version(name) for name in ("jax", "optax", "gymnasium", "mujoco", "numpy", "tyro")}
    config = {"script": FORMAT.split(",")[0], **asdict(args), "resume": None, "first_seed": args.seed}
    args.track and __import__("wandb").init(project="som", name=folders[0].name, config=config, sync_tensorboard=True)
    sys.excepthook = lambda *e: fail(str(e[1]), 1) if isinstance(e[1], OSError) else sys.__excepthook__(*e)
    for seed, folder, table in zip(seeds, folders, tables, strict=True):
        folder.mkdir(parents=True, exist_ok=bool(checkpoint))
        (folder / "config.json").write_text(json.dumps(config | {"seed": seed, "versions": versions}, indent=2))
        (folder / "evaluations.csv").write_text(table)
        writers.append(Writer(str(folder.resolve())))  # TensorBoard drops what was logged after the checkpoint:
        writers[-1]._output._ev_writer.add_event(Event(step=first_step + 1, session_log=SessionLog(status=1)))
    for number in signal.SIGINT, signal.SIGTERM:  # the run ends after its step; a second signal kills it
        signal.signal(number, lambda number, _: stop.append(number) or signal.signal(number, signal.SIG_DFL))
    # env setup: SameStep resets an environment in the step that ends its episode; each seed has num_envs, in its order
    envs = gym.vector.SyncVectorEnv(len(env_seeds) * [partial(make_env, args.env_id)], autoreset_mode="SameStep")
    if args.checkpoint_buffer:  # all of its room now, where the system can: a later write that finds none is fatal
        getattr(os, "posix_fallocate", max)(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), 0, 4 * math.prod(shape))
    disk = np.memmap(file, np.float32, "r+", shape=shape) if args.checkpoint_buffer else np.zeros(shape, np.float32)
    buffer = jnp.array(disk.swapaxes(0, 1))  # (S, size, row), on the device
    # TRY NOT TO MODIFY: start the game, in new episodes where the run is resumed
    obs, _ = envs.reset(seed=env_seeds.tolist())
    for global_step in tqdm(steps, unit="step", unit_scale=args.num_envs, disable=None):
        # ALGO LOGIC: put action logic here, random until learning starts
        actions, _ = agents.explore(state, obs.astype(np.float32).reshape(S, -1, obs_dim), act_keys, global_step)
        actions = np.asarray(actions).reshape(-1, act_dim)
        # TRY NOT TO MODIFY: execute the game and log data.
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        # TRY NOT TO MODIFY: save data to replay buffer; where an episode ended, next_obs is the next one's first
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i], episode = infos["final_obs"][i], infos["final_info"]["episode"]
            writers[i // args.num_envs].add_scalar("charts/episodic_return", episode["r"][i], global_step)
            writers[i // args.num_envs].add_scalar("charts/episodic_length", episode["l"][i], global_step)
        for name, x in ("action", actions), ("reward", rewards), ("observation", np.hstack([next_obs, real_next_obs])):
            for k in np.flatnonzero(~np.isfinite(x)) // x[0].size // args.num_envs:
                fail(f"the {name} is not finite at step {global_step}, seed {seeds[k]}; see {folders[k]}", code=1)
        rows = np.float32(np.column_stack([obs, real_next_obs, actions, rewards, terminated])).reshape(S, -1, shape[2])
        disk[np.arange(num_added, num_added + args.num_envs) % size] = rows.swapaxes(0, 1)
        buffer, obs, num_added = agents.add(buffer, num_added, rows), next_obs, num_added + args.num_envs
        # ALGO LOGIC: training.
        if num_added > args.learning_starts:
            state, info = agents.update(state, buffer, num_added, num_updates, update_keys)
            num_updates += args.updates_per_step
            if num_updates % (args.policy_frequency * (100 if global_step < steps[-1] else 1)) < args.updates_per_step:
                scalars = jax.device_get(info) | {"charts/SPS": np.full(S, global_step / (time.time() - start))}  # (S,)
                for (tag, values), k in product(scalars.items(), range(S)):
                    writers[k].add_scalar(tag, values[k], global_step)
        if global_step % args.eval_frequency < args.num_envs or global_step == steps[-1]:
            returns = evaluate(partial(agents.act, state), args, eval_seeds, folders, f"videos/{global_step}")
            for k, (mean, std) in enumerate(zip(returns.mean(axis=1), returns.std(axis=1), strict=True)):
                tables[k] += f"{global_step},{num_updates},{mean},{std},{time.time() - start}\n"
                (folders[k] / "evaluations.csv").write_text(tables[k])
                writers[k].add_scalar("charts/eval_return", mean, global_step)
                tqdm.write(f"step {global_step}: evaluation return {mean:.1f} +- {std:.1f}, seed {seeds[k]}")
        if stop or global_step % args.checkpoint_frequency < args.num_envs or global_step in (steps[0], steps[-1]):
            arrays = {name_of(path): x for path, x in jax.tree.leaves_with_path(jax.device_get(state))}
            for (name, x), k in product(arrays.items(), range(S)):
                if name != ".mean_std" and not np.isfinite(x[k]).all():  # that is NaN before the first update
                    fail(f"weight {name} is not finite at step {global_step}, seed {seeds[k]}; see {folders[k]}", 1)
            done = global_step, num_updates, num_added * args.checkpoint_buffer, time.time() - start, tables
            about = {"args": asdict(args), "names": [folder.name for folder in folders], "progress": done}
            np.savez(folders[0] / "unfinished.npz", **{FORMAT: json.dumps(about)}, **arrays)
            for writer in writers:
                writer.flush()
            getattr(os, "sync", int)()  # the replay buffer too; Windows has no such call
            os.replace(folders[0] / "unfinished.npz", folders[0] / f"checkpoint_{global_step:010d}.npz")
            for old in sorted(folders[0].glob("checkpoint_*.npz"))[:-2]:
                old.unlink()
        stop and fail(f"stopped at step {global_step}; go on with --resume {folders[0]}", code=128 + stop[0])
    for folder, k in zip(folders, range(S if args.save_model else 0), strict=False):
        networks = {name: x[k] for name, x in arrays.items() if name.startswith((".acting_actor", ".critic"))}
        np.savez(folder / "model.npz", config=(folder / "config.json").read_text(), **networks)
