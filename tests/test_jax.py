"""The JAX script against the PyTorch script on the same numbers; several seeds in one process; the script as run."""

import ast
import contextlib
import csv
import dataclasses
import fcntl
import inspect
import json
import math
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import tomllib
import types
import warnings
from functools import partial
from unittest import mock

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_script
import torch
from jax import export
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import som_continuous_action as som
import som_continuous_action_jax as somx

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "som_continuous_action_jax.py"
# the sizes of Pendulum-v1, where the real script runs as a subprocess: all of these runs are of the same programs
TINY = (
    "--hidden-dim 16 --num-mc-samples 4 --best-of-n 3 --batch-size 32 --num-envs 2 --learning-starts 40 --device cpu "
    "--total-timesteps 200 --eval-frequency 100 --buffer-size 60 --checkpoint-frequency 64 --updates-per-step 2 "
    "--policy-frequency 3 --alpha-delay 20 --num-episodes 3"
).split()


class SeededEnv(gym.Env):
    """The observation is (step in the episode, random number of the episode, last action); truncated after four."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-2.0, 2.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.number = 0, self.np_random.uniform()
        return np.array([self.t, self.number, 0]), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t, self.number, action[0]]), self.t - action[0] ** 2, False, self.t == 4, {}


class UnboundedEnv(SeededEnv):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


gym.register("Seeded-v0", SeededEnv, disable_env_checker=True, max_episode_steps=100)
gym.register("UnboundedActions-v0", UnboundedEnv, disable_env_checker=True)
B, N, K, O, A = 16, 5, 12, 5, 3
jax.config.update("jax_platforms", "cpu")


def close(actual, expected, tol=1e-5):
    """Trees of JAX arrays against trees of tensors, to 1e-5 of the largest number in each."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), y.detach().numpy() if torch.is_tensor(y) else np.asarray(y)
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol * max(1.0, np.abs(y).max()))


def numbers(*shape, seed):
    """The same standard normal numbers for both: a JAX array and a tensor."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x), torch.tensor(x)


def uniform(*shape, seed):
    x = np.random.default_rng(seed).random(shape).astype(np.float32)
    return jnp.asarray(x), torch.tensor(x)


def to_jax(network):
    parameters = [[jnp.asarray(p.detach().numpy()) for p in ps] for ps in (network.weights, network.biases)]
    return list(zip(*parameters, strict=True))


def networks(seed=1):
    torch.manual_seed(seed)
    return som.MeanFlowActor(O, A, 16, 2), som.QNetwork(2, O, A, 2, 16, 2), som.QNetwork(2, O, A, 2, 16, 2)


def gradients(network):
    return [(w.grad, b.grad) for w, b in zip(network.weights, network.biases, strict=True)]


def both_args(**changes):
    sizes = {"hidden_dim": 16, "num_layers": 2, "batch_size": B, "num_mc_samples": K, "best_of_n": N} | changes
    return somx.Args(**sizes), som.Args(device="cpu", compile=False, **sizes)


def batches(seed):
    columns = [numbers(B, O, seed=seed), numbers(B, O, seed=seed + 1)]
    a, a_t = uniform(B, A, seed=seed + 2)
    u, u_t = uniform(B, seed=seed + 3)
    columns += [(2 * a - 1, 2 * a_t - 1), numbers(B, seed=seed + 4), ((u < 0.3) * 1.0, (u_t < 0.3).float())]
    return somx.Batch(*(x for x, _ in columns)), som.Batch(*(y for _, y in columns))


@pytest.mark.parametrize("num_frequencies", [8, 1])
def test_networks(num_frequencies):
    args_x, args = both_args(num_frequencies=num_frequencies)
    _, critic, _ = networks()
    actor = som.Agent(args, O, A, torch.device("cpu")).actor
    state = jax.eval_shape(lambda key: somx.init(key, args_x, O, A), jax.random.PRNGKey(0))
    assert [w.shape for w, _ in state.actor] == [w.shape for w in actor.weights]
    (obs, obs_t), (a, a_t), (times, times_t) = numbers(B, O, seed=1), numbers(B, N, A, seed=2), uniform(B, N, 2, seed=3)
    close(somx.q_network(to_jax(critic), obs, a), critic(obs_t, a_t))
    r, t = times[..., :1], times[..., 1:]
    close(somx.meanflow_actor(to_jax(actor), obs, a, r, t), actor(obs_t, a_t, times_t[..., :1], times_t[..., 1:]))


VARIANTS = [
    {"reference": reference, "sde": sde, "q_norm": q_norm, "policy_q": policy_q}
    for reference, sde in (("uniform", "vp"), ("uniform", "ve"), ("prior", "vp"), ("box", "vp"))
    for q_norm, policy_q in (("batch", "mean"), ("state", "min"))
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes.values()))
def test_actor_loss_and_its_gradient(changes):
    args_x, args = both_args(zero_r_ratio=0.25, **changes)
    actor, critic, _ = networks()
    twins = torch.mean if args.policy_q == "mean" else torch.amin
    (batch, batch_t), (u, u_t) = batches(10), uniform(B, 2, seed=20)
    (eps, eps_t), (mc, mc_t) = numbers(B, A, seed=21), numbers(B, K, A, seed=22)

    def q_fn_t(obs, a):
        return twins(critic(obs, a)[0], dim=0)

    loss_t, info_t = som.actor_loss(actor, q_fn_t, batch_t, u_t, eps_t, mc_t, torch.tensor(3.0), args)
    loss_t.backward()

    def loss_fn(actor, critic):
        twins_x = jnp.mean if args.policy_q == "mean" else jnp.min
        u_fn, q_fn = partial(somx.meanflow_actor, actor), lambda *x: twins_x(somx.q_network(critic, *x)[0], axis=0)
        return somx.actor_loss(u_fn, q_fn, batch, u, eps, mc, 3.0, args_x)

    (loss, info), (grad, critic_grad) = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))(
        to_jax(actor), to_jax(critic)
    )
    close(loss, loss_t)
    assert info.keys() == info_t.keys()
    close(info, info_t)
    close(grad, gradients(actor))
    assert not any(g.any() for g in jax.tree.leaves(critic_grad))


def test_critic_loss_and_its_gradient():
    args_x, args = both_args(gamma=0.9)
    _, critic, target = networks()
    (batch, batch_t), (next_a, next_a_t) = batches(30), numbers(B, A, seed=40)
    loss_t, info_t = som.critic_loss(critic.mean_return, target.mean_return, batch_t, next_a_t, args)
    loss_t.backward()

    def loss_fn(critic, target):
        q_twins, target_q_twins = partial(somx.mean_return, critic), partial(somx.mean_return, target)
        return somx.critic_loss(q_twins, target_q_twins, batch, next_a, args_x)

    gradient = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (loss, info), (grad, target_grad) = gradient(to_jax(critic), to_jax(target))
    close(loss, loss_t)
    assert info.keys() == info_t.keys()
    close(info, info_t)
    close(grad, gradients(critic))
    assert not any(g.any() for g in jax.tree.leaves(target_grad))


@pytest.mark.parametrize("first", (True, False))
def test_distributional_critic_loss_and_its_gradient(first):
    args_x, args = both_args(tau=0.25, gamma=0.9)
    _, critic, target = networks()
    (batch, batch_t), (next_a, next_a_t), (z, z_t) = batches(30), numbers(B, A, seed=40), numbers(B, seed=41)
    z, z_t = 3 * z, 3 * z_t
    mean_std = torch.full((2, 1), math.nan if first else 0.2)
    rest = batch_t, next_a_t, z_t, mean_std, args
    loss_t, mean_std_t, info_t = som.distributional_critic_loss(critic, target, *rest)
    loss_t.backward()

    def loss_fn(critic, target):
        q_dist, target_q_dist = partial(somx.q_network, critic), partial(somx.q_network, target)
        rest = batch, next_a, z, jnp.asarray(mean_std.numpy()), args_x
        loss, *others = somx.distributional_critic_loss(q_dist, target_q_dist, *rest)
        return loss, others

    gradient = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (loss, (next_mean_std, info)), (grad, target_grad) = gradient(to_jax(critic), to_jax(target))
    close([loss, next_mean_std], [loss_t, mean_std_t])
    assert info.keys() == info_t.keys()
    close(info, info_t)
    close(grad, gradients(critic))
    assert not any(g.any() for g in jax.tree.leaves(target_grad))


@pytest.mark.parametrize("name", ("vp_schedule", "ve_schedule", "cosine_schedule"))
def test_schedules(name):
    parameters = {"vp_schedule": (0.1, 2.0), "ve_schedule": (0.05, 2.0), "cosine_schedule": ()}[name]
    t = np.linspace(0.01, 1, 64, dtype=np.float32)[:, None]
    close(list(getattr(somx, name)(t, *parameters)), list(getattr(som, name)(torch.tensor(t), *parameters)))


def test_times_and_velocity():
    (u, u_t), (a, a_t), (score, score_t) = uniform(B, 2, seed=1), numbers(B, A, seed=2), numbers(B, A, seed=3)
    close(somx.sample_r_t(u, 0.3), som.sample_r_t(u_t, 0.3))
    for scale in (None, 7.0):
        close(somx.pf_ode_velocity(a, score, -0.3, 0.8, scale), som.pf_ode_velocity(a_t, score_t, -0.3, 0.8, scale))


@pytest.mark.parametrize("clip", (True, False))
@pytest.mark.parametrize("q_norm", (None, "batch", "state"))
@pytest.mark.parametrize("reference", ("uniform", "prior"))
def test_score(reference, q_norm, clip):
    _, critic, _ = networks()
    layers = to_jax(critic)
    (obs, obs_t), (a, a_t), (eps, eps_t) = numbers(B, O, seed=1), numbers(B, A, seed=2), numbers(B, K, A, seed=3)
    t = np.linspace(0.05, 0.95, B, dtype=np.float32)[:, None]
    mu, sigma, _, _ = som.vp_schedule(torch.tensor(t), 0.1, 2.0)
    rest = 3.0, reference, q_norm, clip

    def ours(layers):
        q_fn = lambda *x: somx.q_network(layers, *x)[0][0]  # noqa: E731
        return somx.estimate_score(q_fn, obs, a, mu.numpy(), sigma.numpy(), eps, *rest)

    theirs = som.estimate_score(lambda *x: critic(*x)[0][0], obs_t, a_t, mu, sigma, eps_t, *rest)
    close(jax.jit(ours)(layers), theirs)
    if q_norm is None:  # the critic's weights get no gradient
        gradient = jax.jit(jax.grad(lambda layers: ours(layers)[0].sum()))(layers)
        assert not any(g.any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("q_norm", (None, "batch", "state"))
def test_box_and_peak_scores(q_norm):
    _, critic, _ = networks()
    layers = to_jax(critic)
    (obs, obs_t), (a, a_t), (eps, eps_t) = numbers(B, O, seed=1), numbers(B, A, seed=2), numbers(B, K, A, seed=3)
    t = np.linspace(0.05, 0.95, B, dtype=np.float32)[:, None]
    mu, sigma, _, _ = som.cosine_schedule(torch.tensor(t))
    close(
        somx.truncated_normal(eps, 3 * a, sigma.numpy(), 1.5),
        som.truncated_normal(eps_t, 3 * a_t, sigma, 1.5),
    )

    def q_fn(layers, *x):
        return somx.q_network(layers, *x)[0][0]

    def q_fn_t(*x):
        return critic(*x)[0][0]

    for name, options in (("estimate_box_score", ()), ("estimate_peak_score", (3,))):

        def ours(layers, name=name, options=options):
            path = (obs, a, mu.numpy(), sigma.numpy(), eps, 3.0)
            return getattr(somx, name)(partial(q_fn, layers), *path, *options, q_norm)

        theirs = getattr(som, name)(q_fn_t, obs_t, a_t, mu, sigma, eps_t, 3.0, *options, q_norm)
        close(jax.jit(ours)(layers), theirs, 1e-3)
        gradient = jax.jit(jax.grad(lambda layers: ours(layers)[0].sum()))(layers)
        assert not any(g.any() for g in jax.tree.leaves(gradient))  # the critic's weights get no gradient
    assert all(weight.grad is None for weight in critic.parameters())


def test_meanflow_target_and_best_of_n():
    actor, critic, _ = networks()
    layers, q_layers = to_jax(actor), to_jax(critic)
    (obs, obs_t), (noise, noise_t), (v, v_t) = numbers(B, O, seed=1), numbers(B, N, A, seed=2), numbers(B, N, A, seed=3)
    times, _ = uniform(B, N, 2, seed=4)
    r, t = times.min(-1, keepdims=True), times.max(-1, keepdims=True)
    r_t, t_t = torch.tensor(np.asarray(r)), torch.tensor(np.asarray(t))
    close(
        somx.meanflow_loss(partial(somx.meanflow_actor, layers, obs), noise, r, t, v),
        som.meanflow_loss(partial(actor, obs_t), noise_t, r_t, t_t, v_t),
    )
    close(
        somx.best_of_n(partial(somx.meanflow_actor, layers), lambda *x: somx.q_network(q_layers, *x)[0][1], obs, noise),
        som.best_of_n(actor, lambda *x: critic(*x)[0][1], obs_t, noise_t),
    )


def test_lattice_noise():
    (points, points_t), (shift, shift_t) = uniform(K, A, seed=1), uniform(B, 1, A, seed=2)
    close(somx.lattice_noise(points, shift), som.lattice_noise(points_t, shift_t))
    extreme = np.float32([[0], [1e-9], [0.5], [1 - 1e-7]])
    eps = np.asarray(somx.lattice_noise(extreme, np.zeros((1, 1, 1), np.float32)))
    assert np.isfinite(eps).all() and eps[0, 2, 0] == 0


@pytest.mark.parametrize("num_points", (2, 7, 50, 64))
def test_sobol_points_lie_evenly(num_points):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SciPy warns of 7 or 50 points
        points = somx.sobol_points(num_points, 3)
    assert points.shape == (num_points, 3) and points.dtype == np.float32
    assert (points >= 0).all() and (points < 1).all()
    np.testing.assert_array_equal(points, somx.sobol_points(num_points, 3))
    power = 2 ** int(math.log2(num_points))  # each of so many intervals has one of the first points, in every dimension
    for coordinate in points[:power].T:
        assert sorted(np.floor(power * coordinate)) == list(range(power))


def unit(x):
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_score_with_hidden_layers_in_bfloat16():
    """Q is about 300 and its std in a state 1 to 2, as late in training: what the dtype changes is small, and what
    bfloat16 throughout would change is not. The scripts agree to a part of what rounding changes."""
    torch.manual_seed(3)
    critic = som.QNetwork(2, O, A, 2, 64, 3)
    critic.weights[-1].data *= 30
    critic.biases[-1].data[:] = 300
    (obs, obs_t), (a, a_t), (eps, eps_t) = numbers(64, O, seed=1), numbers(64, A, seed=2), numbers(64, 100, A, seed=3)

    def score(dtype, last=None):
        """last: the dtype of the last product too."""

        def q_fn(obs, a):
            layers = to_jax(critic)
            if last is not None:
                layers, obs, a = jax.tree.map(lambda x: x.astype(last), (layers, obs, a))
            return somx.q_network(layers, obs, a, dtype)[0].mean(axis=0).astype(jnp.float32)

        mu, sigma = jnp.array([[0.9]]), jnp.array([[0.4]])
        return unit(jax.jit(partial(somx.estimate_score, q_fn))(obs, a, mu, sigma, eps, 5.0)[0])

    def q_fn_t(obs, a):
        return critic.mean_return(obs, a, torch.bfloat16).mean(dim=0)

    theirs = unit(som.estimate_score(q_fn_t, obs_t, a_t, *torch.tensor([[0.9], [0.4]]), eps_t, 5.0)[0])
    exact, ours, naive = score(jnp.float32), score(jnp.bfloat16), score(jnp.bfloat16, jnp.bfloat16)
    errors = [np.sqrt(np.square(x - exact).sum(axis=1).mean()) for x in (ours, naive, theirs)]
    assert 0 < errors[0] < 0.1 and errors[1] > 3 * errors[0]
    assert np.sqrt(np.square(theirs - ours).sum(axis=1).mean()) < 0.5 * errors[0]
    # the products with the state, with the action and of two more hidden layers; the last one
    q = jax.make_jaxpr(partial(somx.q_network, hidden_dtype=jnp.bfloat16))(to_jax(critic), obs, eps)
    products = [line for line in str(q).splitlines() if "dot_general" in line]
    assert ["bf16" if ":bf16[" in line else "f32" for line in products] == 4 * ["bf16"] + ["f32"]
    assert {x.dtype for x in q.out_avals} == {jnp.dtype("float32")}


def test_the_ring_and_its_newest_rows():
    """Ten rows are sampled from, and twice five more have room; a step has three rows."""
    add, draw = (
        jax.jit(partial(somx.add, size=10)),
        jax.jit(partial(somx.sample, batch_size=500, widths=[2, 2, 1, 1, 1])),
    )
    args = somx.Args(buffer_size=10, checkpoint_frequency=5, num_envs=3)
    rb, seen = somx.ReplayBuffer(args, 2, 1, None, 0), []
    assert rb.on_host.shape == (27, 7)
    ring = jax.tree.map(lambda x: x[0], rb.to_device(0))
    ring = add(ring, jnp.full((3, 7), -7.0))  # of no step
    for start in range(0, 60, 3):
        rows = jnp.arange(start, start + 3.0)[:, None] + jnp.array([0, 100, 1000, 1100, 2000, 3000, 4000.0])
        ring = add(ring, rows)
        batch = draw(ring, jax.random.PRNGKey(start))
        ids = batch.obs[:, 0]
        columns = [ids[:, None] + jnp.array(x) for x in ([0.0, 100], [1000.0, 1100], [2000.0])]
        close(list(batch), [*columns, ids + 3000, ids + 4000], 0)
        seen.append(set(ids.astype(int).tolist()))
    assert seen == [set(range(max(0, start + 3 - 10), start + 3)) for start in range(0, 60, 3)]


def test_rows_on_the_host_and_on_the_device_are_the_same():
    """Two seeds, three environments each; after eleven steps the ring of nine is loaded anew, as on resuming."""
    args = somx.Args(num_seeds=2, num_envs=3, buffer_size=10, checkpoint_frequency=5)
    rb, inbox = somx.ReplayBuffer(args, 2, 1, None, 0), np.zeros((6, 7), np.float32)
    ring, add = rb.to_device(0), jax.jit(jax.vmap(partial(somx.add, size=10)))
    for step in range(11):
        ring = add(ring, inbox.reshape(2, 3, 7))
        seed, env = np.divmod(np.arange(6), 3)
        row = 100 * step + 10 * seed + env
        rb.pack(inbox, np.column_stack([row, -row]), np.column_stack([row, row]), row[:, None], row, 0 * row)
        rb.host_rows(3 * step)[:] = inbox
    loaded = rb.to_device(33)
    assert ring.rows.shape == loaded.rows.shape == (2, 27, 7)
    rows, others = (np.delete(x.rows, [3, 4, 5], axis=1) for x in (ring, loaded))  # the last step comes from the inbox
    np.testing.assert_array_equal(rows, others)
    assert ring.next_slot.tolist() == loaded.next_slot.tolist() == [3, 3]
    assert ring.num_filled.tolist() == loaded.num_filled.tolist() == [10, 10]
    assert rb.host_rows(30)[4].tolist() == [1011, -1011, 1011, 1011, 1011, 1011, 0]


UPDATES = {
    "default": {},
    "distributional": {"critic_loss": "distributional", "sde": "ve", "policy_frequency": 2},
    "lattice": {"mc_noise": "lattice", "policy_q": "min"},
    "bfloat16": {"score_dtype": "bfloat16"},
    "box": {"reference": "box"},
    "peaks": {"reference": "box", "climb_steps": 2},
    "smoothed": {"target_smoothing": True},
    "annealed": {"anneal_steps": 10},
}


@pytest.mark.parametrize("variant", UPDATES)
def test_updates_are_those_of_the_pytorch_agent(monkeypatch, variant):
    """Both agents make four updates, with the random numbers that the JAX script draws."""
    changes = {"policy_tau": 0.1, "tau": 0.2, "initial_lambda": 3.0, "policy_lr": 1e-3} | UPDATES[variant]
    args_x, args = both_args(num_envs=1, buffer_size=64, **changes)
    torch.manual_seed(1)
    agent = som.Agent(args, O, A, torch.device("cpu"))
    agent.sobol = torch.tensor(somx.sobol_points(K, A))
    one = partial(jax.tree.map, lambda x: jnp.array(x)[None])
    state = one(jax.jit(partial(somx.init, args=args_x, obs_dim=O, act_dim=A))(jax.random.PRNGKey(5)))
    names = "actor", "acting_actor", "critic", "target_critic"
    state = state._replace(**{name: one(to_jax(getattr(agent, name))) for name in names})
    rows = np.column_stack([np.asarray(x).reshape(B, -1) for x in batches(10)[0]])
    ring = one(somx.Ring(jnp.array(rows), jnp.int32(0), jnp.int32(B)))
    widths = [O, O, A, 1, 1]
    draws = []
    for function in "randn", "rand", "randn_like":
        monkeypatch.setattr(torch, function, lambda *_, **__: torch.tensor(np.asarray(draws.pop(0))))
    update_lambda, updates = somx.side_by_side(somx.update_lambda, args=args_x), {}
    for number in range(1, 5):
        due = number % args.policy_frequency == 0
        _, sample_key, update_key = jax.random.split(state.key[0], 3)
        critic_key, actor_key = jax.random.split(update_key)
        act_key, z_key = jax.random.split(critic_key)
        noise_key, explore_key = jax.random.split(act_key)
        draws += [jax.random.normal(noise_key, (B, N, A))]
        if args.target_smoothing:
            draws += [jax.random.normal(explore_key, (B, A))]
        if args.critic_loss == "distributional":
            draws += [jax.random.normal(z_key, (B,))]
        if due:
            times_key, eps_key, mc_key = jax.random.split(actor_key, 3)
            draws += [jax.random.uniform(times_key, (B, 2)), jax.random.normal(eps_key, (B, A))]
            lattice = args.mc_noise == "lattice"
            shape = (B, 1, A) if lattice else (B, K, A)
            draws += [(jax.random.uniform if lattice else jax.random.normal)(mc_key, shape)]
        batch = somx.sample(jax.tree.map(lambda x: x[0], ring), sample_key, B, widths)
        factor = 1.0
        if args.anneal_steps > 0:
            factor = 1 - number / 5
            agent.set_learning_rates(factor)
        info = agent.update(som.Batch(*(torch.tensor(np.asarray(x)) for x in batch)), due)
        assert not draws
        if due not in updates:
            fixed = {"args": args_x, "widths": widths, "policy_is_due": due}
            updates[due] = somx.side_by_side(somx.sample_and_update, **fixed)
        state, info_x = updates[due](state, ring, jnp.full(1, factor))
        if number % 2 == 0:
            agent.update_lambda()
            state = update_lambda(state)
    jaxpr = jax.make_jaxpr(partial(somx.sample_and_update, args=args_x, widths=widths, policy_is_due=True))
    assert ("bf16" in str(jaxpr(*jax.tree.map(lambda x: x[0], (state, ring)), 1.0))) == (variant == "bfloat16")
    # in bfloat16 the roundings differ, and Adam makes whole steps where a gradient is nearly zero
    rounded = variant == "bfloat16"
    for name in names:
        parts = jax.tree.map(lambda x: x[0], getattr(state, name)), to_jax(getattr(agent, name))
        close(*parts, 4e-3 if rounded else 5e-5)
        for x, y in zip(*map(jax.tree.leaves, parts), strict=True):
            assert np.abs(x - y).mean() < 1e-4
    close([state.log_lambda[0], state.mean_std[0]], [agent.log_lambda, agent.mean_std])
    assert info_x.keys() == info.keys()
    close({tag: x[0] for tag, x in info_x.items()}, info, 2e-2 if rounded else 1e-3)


def run_loop(folder, *flags):
    """Run the script as __main__ in this process, where the toy environments are; returns its variables."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, flags)])
    locks, exits = mock.patch("fcntl.flock", wraps=fcntl.flock), mock.patch("atexit.register")
    with contextlib.chdir(folder), arguments, locks as flock, exits as register:
        try:
            return types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))
        finally:  # as at the end of a process
            for call in flock.call_args_list:
                call.args[0].close()
            for call in register.call_args_list:
                if "EventFileWriter" in call.args[0].__qualname__:
                    call.args[0]()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def scalars(run_folder):
    """Tag -> steps and values."""
    events = EventAccumulator(str(run_folder), size_guidance={"tensors": 0}).Reload()  # as TensorBoard reads them
    return {
        tag: [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }


def stored(run):
    """The rows that are sampled from, (S, n, width), the oldest first. The last step is not on the device yet."""
    S, E, width = run.args.num_seeds, run.args.num_envs, run.rb.row_width
    rows = run.rb.on_host.reshape(-1, S, E, width).swapaxes(0, 1).reshape(S, -1, width)
    n = min(run.num_added, run.args.buffer_size)
    slots = np.arange(run.num_added - n, run.num_added) % rows.shape[1]
    np.testing.assert_array_equal(np.asarray(run.ring.rows)[:, slots[:-E]], rows[:, slots[:-E]])
    return rows[:, slots]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The variables of a finished run of two seeds."""
    folder = tmp_path_factory.mktemp("pair")
    run = run_loop(folder, *TINY, "--env-id", "Seeded-v0", "--seed", "1", "--num-seeds", "2")
    run.folders = [folder / x for x in run.run_folders]
    return run


def test_seed_k_of_a_run_is_the_single_run_with_that_seed(pair, tmp_path):
    # of other evaluations and checkpoints nothing is felt, and braces are characters as others
    other = "--eval-frequency", "200", "--checkpoint-frequency", "70", "--exp-name", "a{b}/{0}"
    single = run_loop(tmp_path, *TINY, "--env-id", "Seeded-v0", "--seed", "2", *other)
    assert single.run_folder.name.startswith("Seeded-v0__a{b}_{0}__2__")
    for leaf, other in zip(jax.tree.leaves(pair.state), jax.tree.leaves(single.state), strict=True):
        np.testing.assert_allclose(leaf[1], other[0], rtol=1e-3, atol=1e-4)
        assert leaf.size == 2 or not np.allclose(leaf[0], leaf[1]) or not np.asarray(leaf).any()
    ours, theirs = stored(pair), stored(single)
    np.testing.assert_allclose(ours[1], theirs[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(ours[1], ours[0])


def test_learning_rates_are_0_in_the_last_step_of_a_run_that_anneals(pair, tmp_path):
    flags = *TINY, "--env-id", "Seeded-v0", "--seed", "1", "--num-seeds", "2"
    shorter = run_loop(tmp_path, *flags, "--total-timesteps", "198")
    annealed = run_loop(tmp_path, *flags, "--anneal-steps", "2")
    assert annealed.num_updates == pair.num_updates == shorter.num_updates + 2
    for name in "actor", "critic":
        weights = [getattr(run.state, name)[1][0] for run in (annealed, shorter, pair)]
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4, atol=1e-5)
        assert np.abs(weights[0] - weights[2]).max() > 5e-5


def test_rows_logs_and_checkpoint_of_a_run(pair):
    # all rows of the ring, which has room for 192: observation (3), next observation (3), action, reward, terminated
    assert pair.num_added == 200 and pair.rb.on_host.shape == (2 * 192, 9)
    for rows in pair.rb.on_host.reshape(-1, 2, 2, 9).swapaxes(0, 1).reshape(2, -1, 9):
        np.testing.assert_array_equal(rows[:, 1], rows[:, 4])  # no row crosses episodes
        np.testing.assert_array_equal(rows[:, 0] + 1, rows[:, 3])  # nor skips a step
        np.testing.assert_allclose(
            rows[:, 5], 2 * rows[:, 6], rtol=1e-6, atol=1e-6
        )  # the action that was stored was made
        np.testing.assert_allclose(rows[:, 7], rows[:, 3] - (2 * rows[:, 6]) ** 2, rtol=1e-4, atol=1e-5)
        assert (rows[:, 3] == 4).sum() > 30 and not rows[:, 8].any() and (np.abs(rows[:, 6]) <= 1).all()
    assert stored(pair).shape == (2, 60, 9)
    # the update of a step does not see its rows: those of the random steps are enough for the first
    assert pair.num_updates == 160
    arrays = np.load(pair.folders[0] / "checkpoint_0000000200.npz")  # allow_pickle is False
    assert len(arrays.files) == 1 + len(jax.tree.leaves(pair.state))
    np.testing.assert_array_equal(arrays[".critic[0][0]"], pair.state.critic[0][0])
    assert arrays[".acting_actor[3][1]"].shape == (2, 1, 1, 1)
    for seed, folder in zip((1, 2), pair.folders, strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert config["seed"] == seed and config["first_seed"] == 1 and config["script"] == SCRIPT.name
        assert "torch" not in config["versions"] and "jax" in config["versions"]
        table = list(csv.DictReader((folder / "evaluations.csv").open()))
        assert [int(row["global_step"]) for row in table] == [100, 200]
        logged = scalars(folder)
        assert [x for _, x in logged["charts/eval_return"]] == pytest.approx([float(x["return_mean"]) for x in table])
        assert len(logged["charts/episodic_return"]) == 50
        assert {x for _, x in logged["charts/episodic_length"]} == {4.0}
        assert {"charts/SPS", "losses/qf_loss", "losses/actor_loss_t3", "losses/alpha"} <= logged.keys()


def test_actions_are_random_until_learning_starts(tmp_path, pair):
    """Functions of seed and step, uniform, the same in a single run; the policy's afterwards."""
    actions = pair.rb.on_host.reshape(-1, 2, 2, 9)[..., 6]  # (steps, S, E), of which the last 96 are there
    for step in range(4, 100):
        drawn = somx.random_actions((1, 2), 2 * (step + 1), 2, 1).reshape(2, 2)
        assert np.array_equal(actions[step % 96], drawn) == (2 * (step + 1) <= 40)
        np.testing.assert_array_equal(drawn[1:], somx.random_actions((2,), 2 * (step + 1), 2, 1).reshape(1, 2))
    many = somx.random_actions((1, 2, 3), 7, 1000, 2)
    assert many.dtype == np.float32 and many.shape == (3000, 2) and len(np.unique(many)) > 5900
    np.testing.assert_allclose(np.quantile(many, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.05)


def test_exploration_noise(monkeypatch):
    args = somx.Args(hidden_dim=16, best_of_n=2, noise_scale=0.02, initial_lambda=2.0)
    state = jax.jit(partial(somx.init, args=args, obs_dim=O, act_dim=A))(jax.random.PRNGKey(0))
    act = jax.jit(somx.act, static_argnames=("args", "explore"))
    obs, key = jnp.zeros((4000, O)), jax.random.PRNGKey(1)
    greedy, candidates = act(somx.acting_part(state), obs, key, args)
    noisy, _ = act(somx.acting_part(state), obs, key, args, explore=True)
    assert candidates.shape == (4000, 2, A) and (np.abs(noisy) <= 1).all()
    inside = np.abs(greedy) < 0.8
    np.testing.assert_allclose((noisy - greedy)[inside].std(), 0.04, rtol=0.05)


def test_every_function_is_compiled_once(pair):
    functions = pair.add_and_act_all, *pair.updates.values(), pair.update_lambda_all
    assert [function._cache_size() for function in functions] == [1, 1, 1, 1]


def test_the_program_for_a_gpu_has_no_more_operations_for_more_seeds():
    """Lowered for CUDA, which needs no GPU: seeds share every product. Acting has fewer than an update."""
    counts = []
    for S in 1, 5:
        args = somx.Args(hidden_dim=16, batch_size=8, buffer_size=100, total_timesteps=200, num_seeds=S)
        rb = somx.ReplayBuffer(args, O, A, None, 0)
        keys, ring = jnp.zeros((S, 2), jnp.uint32), rb.to_device(0)
        state = somx.side_by_side(somx.init, args=args, obs_dim=O, act_dim=A)(keys)
        inbox = jax.ShapeDtypeStruct((S, args.num_envs, rb.row_width + O), np.float32)
        update = somx.side_by_side(somx.sample_and_update, args=args, widths=rb.widths, policy_is_due=True)
        act = somx.side_by_side(somx.add_and_act, args=args)
        calls = {update: (state, ring, jnp.ones(S)), act: (ring, keys, somx.acting_part(state), inbox)}
        texts = [export.export(f, platforms=["cuda"])(*inputs).mlir_module() for f, inputs in calls.items()]
        names = "dot_general", "while", "case", "scatter"
        counts.append([[text.count(f"stablehlo.{name}") for name in names] for text in texts])
    assert counts[0] == counts[1]
    (products, loops, branches, _), (acting, *_) = counts[0]
    assert products > acting > 0 and loops == branches == 0


def test_matmul_precision_and_preset(tmp_path, monkeypatch):
    """The flags beside a preset count. No step is made."""
    monkeypatch.setattr("tqdm.tqdm", lambda steps, **_: iter(()))
    before = jax.config.jax_default_matmul_precision
    try:
        flags = "--preset", "laptop", "--env-id", "Seeded-v0", "--hidden-dim", "16", "--device", "cpu"
        run = run_loop(tmp_path, *flags, "--matmul-precision", "highest")
        assert jax.config.jax_default_matmul_precision == "highest"
        assert (run.args.num_envs, run.args.num_mc_samples, run.args.hidden_dim) == (4, 8, 16)
        config = json.loads((tmp_path / run.run_folder / "config.json").read_text())
        assert config["preset"] == "laptop" and config["num_mc_samples"] == 8 and config["hidden_dim"] == 16
        assert not config["autotune"] and config["total_timesteps"] == 200_000
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def policies(pair):
    """As evaluate() gets them in the run."""
    for k in range(2):
        acting = somx.part_of_seed(k, somx.acting_part(pair.state))
        yield somx.make_policy(acting, pair.args, pair.box, somx.evaluation_seed(k + 1))


def test_a_loaded_policy_is_the_runs(pair):
    obs = np.random.default_rng(0).standard_normal((2, 7, 3))
    for k, (folder, expected) in enumerate(zip(pair.folders, policies(pair), strict=True)):
        policy = somx.load_policy(str(folder))
        for batch in obs:  # its noise goes on from call to call
            actions = policy(batch)
            np.testing.assert_array_equal(actions, expected(batch))
            assert actions.shape == (7, 1) and actions.dtype == np.float32 and (np.abs(actions) <= 2).all()
        np.testing.assert_array_equal(policy(obs[0, 0]), expected(obs[0, 0]))
        assert policy(obs[0, 0]).shape == (1,)
        # and it gets the return of the last evaluation, of --num-episodes 3
        returns = somx.evaluate(somx.load_policy(folder), "Seeded-v0", 3, somx.evaluation_seed(k + 1))
        last = list(csv.DictReader((folder / "evaluations.csv").open()))[-1]
        assert (float(last["return_mean"]), float(last["return_std"])) == (returns.mean(), returns.std())
        many = somx.load_policy(folder, best_of_n=64)  # another choice among more candidates
        assert not np.array_equal(many(obs[0]), somx.load_policy(folder)(obs[0]))
        assert not np.array_equal(many(obs[0]), many(obs[0]))  # nor is its noise the same again
        # the action of noise 0, in the environment's units
        zeros = jnp.zeros((7, 1, 1))
        actor = somx.part_of_seed(k, pair.state.acting_actor)
        expected_0 = -somx.meanflow_actor(actor, obs[0].astype(np.float32), zeros, zeros, zeros + 1)[:, 0]
        deterministic = somx.load_policy(folder, deterministic=True)
        for _ in range(2):
            np.testing.assert_allclose(deterministic(obs[0]), 2 * jnp.clip(expected_0, -1, 1), rtol=1e-5, atol=1e-6)
    checkpoint = pair.folders[0] / "checkpoint_0000000192.npz"
    assert somx.load_policy(checkpoint)(obs[0]).shape == (7, 1)
    with pytest.raises(ValueError, match="cannot be used"):
        somx.load_policy("runs/nowhere")


def message_of(script, capsys, **changes):
    with pytest.raises(SystemExit) as stop:
        args = script.Args(**changes)
        script.check_args(args)
        script.env_dimensions(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_with_the_pytorch_scripts_words(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    cases = [{"env_id": env_id} for env_id in ("Walker3d-v4", "Pusher-v4", "CartPole-v1", "UnboundedActions-v0")]
    cases += [{"reference": "prior", "sde": "ve"}, {"track": True}, {"capture_video": True}, {"total_timesteps": 7}]
    cases += [{"buffer_size": 4}, {"device": "gpu"}]
    hints = {field.name: field.type for field in dataclasses.fields(somx.Args)}
    for flag, value in test_script.BAD_NUMBERS.items():
        name = flag[2:].replace("-", "_")
        if name in hints:
            cases.append({name: hints[name](value)})
    assert len(cases) > 30
    for case in cases:
        kwargs = {"env_id": "Seeded-v0"} | case
        message = message_of(somx, capsys, **kwargs)
        assert message.startswith("error: ") and len(message.splitlines()) == 1
        assert message == message_of(som, capsys, compile=False, **kwargs).replace("PyTorch", "JAX")
    assert "--num-seeds" in message_of(somx, capsys, env_id="Seeded-v0", num_seeds=0)


def test_the_real_script_creates_nothing_on_bad_input_and_needs_no_torch(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["{SCRIPT}", "--env-id", "Walker2d-v9", "--device", "cpu"]
try:
    runpy.run_path("{SCRIPT}", run_name="__main__")
finally:
    assert "jax" in sys.modules and "torch" not in sys.modules
"""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 2 and finished.stderr.startswith("error: "), finished.stderr
    assert not any(tmp_path.iterdir())


def fields_of(script):
    """Name -> the line of the field in the source, without its name."""
    lines = re.sub(r"\(\n\s*(.*)\n\s*\)", r"\1", inspect.getsource(script.Args))
    return dict(re.findall(r"(?m)^    (\w+): (.*)$", lines))


def test_arguments_are_those_of_the_pytorch_script():
    ours, theirs = fields_of(somx), fields_of(som)
    assert ours.keys() - theirs.keys() == {"num_seeds"}
    assert theirs.keys() - ours.keys() == {"compile"}
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]
    for name in ours.keys() & theirs.keys():
        assert ours[name].replace("_jax", "").replace("model.npz", "model.pt") == theirs[name], name
    assert len(ours) == len(dataclasses.fields(somx.Args))


def test_inline_metadata_equals_requirements():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = test_script.requirement_lines(line for line in lines if line)
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT.read_text()).group(1)
    inline = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    inline = test_script.requirement_lines(inline["dependencies"])
    assert all(required[name] == line for name, line in inline.items())
    assert {"jax", "optax", "scipy", "gymnasium", "mujoco", "numpy", "tensorboard", "tqdm", "tyro"} == inline.keys()


SHARED = (
    "make_env to_box evaluate exit_with_error env_dimensions warn check_finite writing map_file "
    "lock_run write_file evaluations_until is_due lr_factor_at receive_signals"
).split()


METHOD = (
    "vp_schedule cosine_schedule ve_schedule estimate_score lattice_noise pf_ode_velocity sample_r_t meanflow_loss "
    "best_of_n critic_loss distributional_critic_loss actor_loss"
).split()


def definitions(path):
    """Name -> source of a script's functions and classes, with their decorators."""
    source = path.read_text()
    lines, nodes = source.splitlines(keepends=True), ast.parse(source).body
    found = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return found


def test_functions_of_no_framework_are_those_of_the_pytorch_script():
    ours, theirs = definitions(SCRIPT), definitions(ROOT / "som_continuous_action.py")
    for name in SHARED:
        assert ours[name] == theirs[name], name
    one_line = re.compile(r'        "--device gpu: .*\n')
    assert one_line.sub("", ours["check_args"]) == one_line.sub("", theirs["check_args"])
    assert len(one_line.findall(ours["check_args"])) == 1
    assert somx.PRESETS == som.PRESETS
    docs = [script.__doc__.split("\n\n", 2)[2] for script in (somx, som)]
    assert docs[0].startswith(docs[1].rstrip())
    for name in METHOD:
        assert getattr(somx, name).__doc__ == getattr(som, name).__doc__, name
    for name in "act", "update", "update_actor", "update_lambda":
        assert inspect.getdoc(getattr(somx, name)) == inspect.getdoc(getattr(som.Agent, name)), name
