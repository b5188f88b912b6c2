"""MFP against hand-written references and the closed forms of a Gaussian; what it shares with SOM; the script as run.

torch.compile takes half a minute; leave it out with: pytest -k "not compile"
"""

import ast
import csv
import dataclasses
import inspect
import json
import math
import pathlib
import re
import runpy
import subprocess
import sys
import tomllib
import types
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mfp_continuous_action as mfp
import som_continuous_action as som

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT, SOM_SCRIPT = ROOT / "mfp_continuous_action.py", ROOT / "som_continuous_action.py"
F64 = torch.float64
B, O, A = 12, 3, 2
TANGENTS = "marginal", "conditional"
TINY = (
    "--device cpu --no-compile --hidden-dim 16 --best-of-n 3 --batch-size 32 --num-envs 2 --learning-starts 40 "
    "--total-timesteps 200 --eval-frequency 100 --buffer-size 1000"
).split()


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=1e-10, rtol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def make_actor():
    torch.manual_seed(0)
    return mfp.MeanFlowActor(O, A, 8, 2).double()


def make_batch(seed=0, dtype=F64):
    obs, next_obs = randn(B, O, seed=seed), randn(B, O, seed=seed + 1)
    actions, rewards = 2 * rand(B, A, seed=seed + 2) - 1, randn(B, seed=seed + 3)
    terminated = (torch.arange(B) % 3 == 0).to(F64)
    return mfp.Batch(*(column.to(dtype) for column in (obs, next_obs, actions, rewards, terminated)))


def make_agent(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 16, "num_layers": 2, "best_of_n": 4, "batch_size": B, "compile": False}
    return mfp.Agent(mfp.Args(**(sizes | changes)), O, A, torch.device("cpu"))


def path_inputs(seed=3):
    """a_t, r, t, v of B paths, without the axis of actions."""
    times = rand(B, 2, seed=seed).sort(dim=1).values
    a_0, eps = 2 * rand(B, A, seed=seed + 1) - 1, randn(B, A, seed=seed + 2)
    return (*mfp.linear_path(a_0, eps, times[:, 1:]), times[:, :1], times[:, 1:])


# The method
def test_path_runs_from_the_action_to_the_noise_at_its_velocity():
    a_0, eps, t = randn(B, A, seed=0), randn(B, A, seed=1), rand(B, 1, seed=2)
    close(mfp.linear_path(a_0, eps, torch.zeros(B, 1))[0], a_0)
    close(mfp.linear_path(a_0, eps, torch.ones(B, 1))[0], eps)
    a_t, dadt = torch.func.jvp(lambda t: mfp.linear_path(a_0, eps, t)[0], (t,), (torch.ones_like(t),))
    close(a_t, torch.lerp(a_0, eps, t))
    close(mfp.linear_path(a_0, eps, t)[1], dadt)


def reference_losses(actor, obs, a_t, v, r, t, tangent, h=1e-5):
    """L_MF and L_IVC (B,), du/dt (B, A) by central differences along the flow: a_t and t move, r does not."""

    def u(a_t, r, t):
        return actor(obs, a_t.unsqueeze(1), r.unsqueeze(1), t.unsqueeze(1)).squeeze(1)

    with torch.no_grad():
        velocity = u(a_t, t, t) if tangent == "marginal" else v
        dudt = (u(a_t + h * velocity, r, t + h) - u(a_t - h * velocity, r, t - h)) / (2 * h)
        target = v - (t - r) * dudt
    return ((u(a_t, r, t) - target) ** 2).sum(1), ((u(a_t, t, t) - v) ** 2).sum(1), dudt


@pytest.mark.parametrize("tangent", TANGENTS)
def test_losses_against_central_differences(tangent):
    actor, obs, (a_t, v, r, t) = make_actor(), randn(B, O, seed=9), path_inputs()
    inputs = (x.unsqueeze(1) for x in (a_t, r, t, v))
    mf, ivc, dudt = mfp.mfp_loss(lambda *inputs: actor(obs, *inputs), *inputs, tangent)
    for actual, expected in zip((mf, ivc, dudt), reference_losses(actor, obs, a_t, v, r, t, tangent), strict=True):
        close(actual.squeeze(1), expected, atol=1e-7, rtol=1e-7)
    assert mf.shape == ivc.shape == (B, 1) and not dudt.requires_grad


def test_tangents_differ():
    u_fn, (a_t, v, r, t) = make_actor(), path_inputs()
    inputs = [x.unsqueeze(1) for x in (a_t, r, t, v)]
    losses = [mfp.mfp_loss(lambda *x: u_fn(randn(B, O, seed=9), *x), *inputs, tangent) for tangent in TANGENTS]
    assert (losses[0][0] - losses[1][0]).abs().min() > 1e-6
    close(losses[0][1], losses[1][1])  # the constraint does not know of the tangent
    assert inspect.signature(mfp.mfp_loss).parameters["tangent"].default == mfp.Args().tangent == "marginal"


def test_conditional_tangent_is_the_mean_flow_loss_of_som():
    actor, obs, (a_t, v, r, t) = make_actor(), randn(B, O, seed=9), path_inputs()
    inputs = [x.unsqueeze(1) for x in (a_t, r, t, v)]
    mf, _, dudt = mfp.mfp_loss(lambda *x: actor(obs, *x), *inputs, "conditional")
    expected = som.meanflow_loss(lambda *x: actor(obs, *x), *inputs)
    close((mf, dudt), expected, atol=0, rtol=0)


@pytest.mark.parametrize("tangent", TANGENTS)
def test_both_losses_agree_at_r_equal_to_t(tangent):
    u_fn, (a_t, v, _, t) = make_actor(), path_inputs()
    inputs = (x.unsqueeze(1) for x in (a_t, t, t, v))
    mf, ivc, _ = mfp.mfp_loss(lambda *x: u_fn(randn(B, O, seed=9), *x), *inputs, tangent)
    close(mf, ivc)
    gradients = [torch.autograd.grad(loss.sum(), [*u_fn.parameters()], retain_graph=True) for loss in (mf, ivc)]
    close(*gradients)


@pytest.mark.parametrize("zero_r_ratio", [0.0, 0.5])
@pytest.mark.parametrize("ivc_coef", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("tangent", TANGENTS)
def test_actor_loss_and_its_gradient_by_hand(tangent, ivc_coef, zero_r_ratio):
    actor, batch = make_actor(), make_batch()
    best, uniform, eps = 2 * rand(B, A, seed=5) - 1, rand(B, 2, seed=6), randn(B, A, seed=7)
    args = mfp.Args(tangent=tangent, ivc_coef=ivc_coef, zero_r_ratio=zero_r_ratio)
    best.requires_grad_()
    loss, info = mfp.actor_loss(actor, batch, best, uniform, eps, args)
    loss.backward()
    assert best.grad is None  # a* is a constant
    gradient = [parameter.grad.clone() for parameter in actor.parameters()]

    actor.zero_grad()
    r, t = uniform.min(dim=1, keepdim=True).values, uniform.max(dim=1, keepdim=True).values
    r[: round(zero_r_ratio * B)] = 0
    a_t, v = (1 - t) * best.detach() + t * eps, eps - best.detach()
    mf, ivc, dudt = reference_losses(actor, batch.obs, a_t, v, r, t, tangent)
    (mf + ivc_coef * ivc).mean().backward()
    close(loss, (mf + ivc_coef * ivc).mean(), atol=1e-7, rtol=1e-7)
    close(gradient, [parameter.grad for parameter in actor.parameters()], atol=1e-7, rtol=1e-6)
    expected = {"losses/actor_loss": (mf + ivc_coef * ivc).mean(), "losses/mf_loss": mf.mean()}
    expected |= {"losses/ivc_loss": ivc.mean(), "velocity/norm": v.norm(dim=1).mean()}
    expected["velocity/dudt_ratio"] = ((t - r) * dudt).norm(dim=1).mean() / v.norm(dim=1).mean()
    for i in range(4):
        in_bin = (t[:, 0] >= i / 4) & (t[:, 0] < (i + 1) / 4)
        expected[f"losses/actor_loss_t{i}"] = (mf + ivc_coef * ivc)[in_bin].sum() / max(1, in_bin.sum())
    assert info.keys() == expected.keys() and not any(value.requires_grad for value in info.values())
    close(info, {key: value.detach() for key, value in expected.items()}, atol=1e-6, rtol=1e-6)


# The fixed point, for actions N(m, s^2) in one coordinate: everything is known and the quadrature is exact
MEAN, STD = 0.4, 0.3


def path_var(t):
    return ((1 - t) * STD) ** 2 + t**2


def marginal_velocity(a_t, t):
    """E[eps - a_0 | a_t] by the regression of jointly normal eps, a_0 and a_t."""
    return -MEAN + (t - (1 - t) * STD**2) / path_var(t) * (a_t - (1 - t) * MEAN)


def average_velocity(a_t, r, t):
    """(a_t - a_r) / (t - r), where the flow carries the quantiles of N((1 - t) m, path_var(t)); at r = t its limit."""
    a_r = (1 - r) * MEAN + (path_var(r) / path_var(t)) ** 0.5 * (a_t - (1 - t) * MEAN)
    same = (t - r).abs() < 1e-12
    return torch.where(same, marginal_velocity(a_t, t), (a_t - a_r) / torch.where(same, torch.ones_like(t), t - r))


def gaussian_paths(t, r, nodes=20):
    """Points and weights of an exact quadrature over (a_0, eps): a_t, r, t, v each (nodes^2, 1, 1) and the weights."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, w = torch.as_tensor(x), torch.as_tensor(w / w.sum())
    a_0, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(MEAN + STD * x, x, indexing="ij"))
    times = torch.full_like(eps, t), torch.full_like(eps, r)
    a_t, v = mfp.linear_path(a_0, eps, times[0])
    return [column.unsqueeze(1) for column in (a_t, times[1], times[0], v)], torch.outer(w, w).reshape(-1, 1)


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_the_constraint_is_least_at_the_marginal_velocity(t):
    inputs, weights = gaussian_paths(t, 0.0)

    def ivc(theta):  # u = theta_0 + theta_1 a_t, with the solution among them
        return (weights * mfp.mfp_loss(lambda a_t, r, t: theta[0] + theta[1] * a_t, *inputs)[1]).sum()

    start = torch.zeros(2, dtype=F64)  # the loss is quadratic: one Newton step is its minimum
    hessian, gradient = torch.func.hessian(ivc)(start), torch.func.grad(ivc)(start)
    minimum = start - torch.linalg.solve(hessian, gradient)
    slope = (t - (1 - t) * STD**2) / path_var(t)
    close(minimum, torch.tensor([-MEAN - slope * (1 - t) * MEAN, slope], dtype=F64), atol=1e-8)
    a_t = torch.linspace(-2, 2, 9, dtype=F64)
    close(minimum[0] + minimum[1] * a_t, marginal_velocity(a_t, torch.tensor(t, dtype=F64)), atol=1e-8)


@pytest.mark.parametrize("tangent", TANGENTS)
@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.0, 0.4), (0.3, 0.8)])
def test_the_average_velocity_of_a_gaussian_is_the_fixed_point(r, t, tangent):
    inputs, weights = gaussian_paths(t, r)
    theta = torch.zeros(3, dtype=F64, requires_grad=True)

    def u_fn(a_t, r, t):
        return average_velocity(a_t, r, t) + theta[0] + theta[1] * a_t + theta[2] * a_t**2

    mf, _, _ = mfp.mfp_loss(u_fn, *inputs, tangent)
    (weights * mf).sum().backward()
    close(theta.grad, torch.zeros_like(theta), atol=1e-8)
    # the regression's noise there: the path's velocity scatters about the marginal one, and the conditional tangent
    # scales that by (std at r / std at t)^2, the variance that the marginal tangent leaves whole
    a_t, _, times, v = inputs
    noise = (weights * (v - marginal_velocity(a_t, times)).square().squeeze(-1)).sum()
    scale = 1.0 if tangent == "marginal" else (path_var(r) / path_var(t))
    close((weights * mf).sum().detach(), scale * noise, atol=1e-8)


def test_one_step_from_the_noise_gives_the_gaussian():
    noise = randn(1, 1000, 1, seed=0)
    _, candidates = mfp.best_of_n(lambda obs, *x: average_velocity(*x), lambda obs, a: a[..., 0], noise[0, :1], noise)
    close(candidates, (MEAN + STD * noise).clamp(-1, 1))


# The agent
def recorded_update(agent, batch):
    """One update: what its three functions were given and gave back, and the critic before the actor's step."""
    seen = types.SimpleNamespace()

    def best_of_n(u_fn, q_fn, obs, noise):
        seen.obs, seen.noise = obs, noise
        seen.chosen, seen.candidates = mfp.best_of_n(u_fn, q_fn, obs, noise)
        seen.twins = agent.critic(obs, seen.candidates).detach()
        return seen.chosen, seen.candidates

    def critic_loss(*inputs):
        seen.critics, seen.next_actions = inputs[:2], inputs[3]
        return mfp.critic_loss(*inputs)

    def actor_loss(u_fn, batch, best_actions, *inputs):
        seen.best_actions = best_actions
        seen.critic_weights = [parameter.detach().clone() for parameter in agent.critic.parameters()]
        return mfp.actor_loss(u_fn, batch, best_actions, *inputs)

    agent.best_of_n, agent.critic_loss, agent.actor_loss = best_of_n, critic_loss, actor_loss
    seen.info = agent.update(batch)
    return seen


def test_the_policy_imitates_the_best_of_its_own_actions():
    agent, batch = make_agent(best_of_n=16), make_batch(dtype=torch.float32)
    before = [parameter.clone() for parameter in agent.actor.parameters()]
    seen = recorded_update(agent, batch)
    close(seen.obs, torch.cat([batch.next_obs, batch.obs]))
    rows = torch.arange(2 * B)
    best = seen.candidates[rows, seen.twins.amin(dim=0).argmax(dim=1)]
    assert seen.critics == (agent.critic, agent.target_critic)
    close(seen.next_actions, best[:B], atol=0, rtol=0)
    close(seen.best_actions, best[B:], atol=0, rtol=0)
    assert not torch.equal(best, seen.candidates[rows, seen.twins.mean(dim=0).argmax(dim=1)])
    assert seen.noise.shape == (2 * B, 16, A) and not seen.best_actions.requires_grad
    close(seen.info["actions/candidate_std"], seen.candidates.std(dim=1, correction=0).mean())
    close(seen.info["actions/saturated"], (seen.candidates.abs() > 0.99).float().mean())
    # the actor's step leaves the critic as it was, and moves the actor
    close([parameter.detach() for parameter in agent.critic.parameters()], seen.critic_weights, atol=0, rtol=0)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(agent.actor.parameters(), before, strict=True))


def test_policy_and_targets_move_when_they_are_due():
    agent, batch = make_agent(), make_batch(dtype=torch.float32)
    start = make_agent()
    info = agent.update(batch, policy_is_due=False)
    assert "losses/qf_loss" in info and "losses/actor_loss" not in info
    close(agent.actor.state_dict(), start.actor.state_dict(), atol=0, rtol=0)
    close(agent.target_critic.state_dict(), start.critic.state_dict(), atol=0, rtol=0)
    assert not torch.equal(agent.critic.weights[0], start.critic.weights[0])
    assert "losses/actor_loss" in agent.update(batch, policy_is_due=True)
    assert not torch.equal(agent.actor.weights[0], start.actor.weights[0])
    expected = torch.lerp(start.critic.weights[0], agent.critic.weights[0], agent.args.tau)
    close(agent.target_critic.weights[0], expected, atol=1e-7, rtol=0)


def test_acting_takes_the_candidate_of_highest_smaller_q():
    agent, obs = make_agent(noise_scale=0.1), randn(B, O, seed=0).float()
    torch.manual_seed(1)
    noise = torch.randn(B, 4, A)
    with torch.no_grad():
        zero = torch.zeros(B, 4, 1)
        candidates = (noise - agent.actor(obs, noise, zero, zero + 1)).clamp(-1, 1)
        best = candidates[torch.arange(B), agent.critic(obs, candidates).amin(dim=0).argmax(dim=1)]
    torch.manual_seed(1)
    a, all_candidates = agent.act(obs)
    close((a, all_candidates), (best, candidates), atol=1e-7, rtol=0)
    many = torch.zeros(20_000, O)
    torch.manual_seed(1)
    of_zero, _ = agent.act(obs, deterministic=True)
    with torch.no_grad():
        close(of_zero, -agent.actor(obs, 0 * noise[:, :1], zero[:, :1], zero[:, :1] + 1).squeeze(1).clamp(-1, 1))
    plain, _ = agent.act(many)
    torch.manual_seed(1)
    explored, _ = agent.act(many, explore=True)
    inside = plain.abs() < 0.5
    assert (explored - plain)[inside].std() == pytest.approx(0.1, rel=0.03)
    assert explored.abs().max() <= 1
    agent.args.noise_scale = 0.0
    torch.manual_seed(1)
    close(agent.act(many, explore=True)[0], plain, atol=0, rtol=0)


def test_critic_loss_by_hand():
    torch.manual_seed(0)
    critic, target = (mfp.QNetwork(2, O, A, 1, 8, 2).double() for _ in range(2))
    batch, next_actions, args = make_batch(), 2 * rand(B, A, seed=8) - 1, mfp.Args()
    loss, info = mfp.critic_loss(critic, target, batch, next_actions, args)
    loss.backward()
    total, q_values, errors = 0, [], []
    for i in range(B):
        twins = target(batch.next_obs[i : i + 1], next_actions[i : i + 1].unsqueeze(1)).flatten()
        y = 0.2 * batch.rewards[i] + 0.99 * (1 - batch.terminated[i]) * min(twins)
        q = critic(batch.obs[i : i + 1], batch.actions[i : i + 1].unsqueeze(1)).flatten()
        q_values.append(q.mean()), errors.append(((q - y) ** 2).mean())
        total = total + ((q - y) ** 2).sum() / B
    close(loss, total)
    expected = {"losses/qf_loss": total, "losses/qf_values": sum(q_values) / B, "losses/td_error": sum(errors) / B}
    close(info, {tag: value.detach() for tag, value in expected.items()})
    assert all(parameter.grad is None for parameter in target.parameters())


def test_a_candidate_spread_of_its_own_best_narrows():
    # self-imitation of the best of N under a fixed Q: what actions/candidate_std is logged for
    agent = make_agent(best_of_n=16, policy_lr=1e-2, q_lr=1e-12, hidden_dim=32)
    agent.q_fn = lambda obs, a: -(a - 0.5).square().sum(-1)
    batch = make_batch(dtype=torch.float32)
    spread = [float(agent.update(batch)["actions/candidate_std"]) for _ in range(300)]
    _, candidates = agent.act(batch.obs)
    assert spread[-1] < 0.5 * spread[0]
    assert (candidates.mean(dim=(0, 1)) - 0.5).abs().max() < 0.15


@pytest.mark.slow  # a minute; the compiled functions that SOM shares are compared in test_method.py
def test_compiled_updates_equal_eager_ones():
    # SLOW: the compiler takes its time
    agents = [make_agent(compile=compile) for compile in (False, True)]
    for agent in agents:
        torch.manual_seed(2)
        for i in range(3):
            agent.update(make_batch(i, torch.float32))
    eager, compiled = ([*agent.parameters()] for agent in agents)
    assert (eager[0] - make_agent().actor.weights[0]).abs().max() > 1e-4  # the updates moved something
    close(compiled, eager, atol=1e-5, rtol=0)


META = torch.device("meta")  # shapes without values: to read one, or to mix devices, is an error


@pytest.mark.parametrize("tangent", TANGENTS)
def test_everything_is_computed_on_the_training_device(tangent):
    sizes = {"hidden_dim": 16, "best_of_n": 3, "batch_size": 8, "num_envs": 4, "buffer_size": 20}
    args = mfp.Args(**sizes, compile=False, tangent=tangent)
    agent = mfp.Agent(args, O, A, META)
    for optimizer in agent.optimizers.values():
        optimizer.param_groups[0]["fused"] = False  # the fused one does not know this device
    rb = mfp.ReplayBuffer(args, O, A, META, None, 0)
    inbox = torch.zeros(4, rb.row_width + O, device=META)
    actions = [mfp.add_and_act(agent, rb, inbox) for _ in range(3)][-1]
    info = mfp.sample_and_update(agent, rb, True)
    assert "losses/actor_loss" not in mfp.sample_and_update(agent, rb, False)
    assert "losses/actor_loss" in info and "losses/qf_loss" in info
    assert {x.device.type for x in (actions, *info.values(), *agent.state_dict().values())} == {"meta"}


# The same update by hand: matrix products, autograd and Adam, nothing of the script but its starting weights
def layers_by_hand(weights, biases, x):
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if i > 0:
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        x = x @ w + b
    return x


def twins_by_hand(network, obs, a):
    """(2, B) of a (B, A)."""
    x = torch.cat([obs, a], dim=1)
    half = len(network) // 2
    twins = [[layer[i] for layer in network] for i in (0, 1)]
    return torch.stack([layers_by_hand(twin[:half], twin[half:], x).squeeze(1) for twin in twins])


def velocity_by_hand(network, obs, a_t, r, t):
    """u (B, A) of a_t (B, A), r and t (B, 1)."""
    frequencies = 1 + 2 * torch.arange(8) / 7
    phase, phase_dt = t * frequencies, (t - r) * frequencies
    x = torch.cat([obs, a_t, phase.sin(), phase.cos(), phase_dt.sin(), phase_dt.cos()], dim=1)
    layers = [layer[0] for layer in network]
    half = len(layers) // 2
    return layers_by_hand(layers[:half], layers[half:], x)


def adam_by_hand(network, loss, moments, step, lr):
    for i, gradient in enumerate(torch.autograd.grad(loss, network)):
        mean, square = moments.get(i, (0, 0))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        moments[i] = mean, square
        change = lr * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        network[i] = (network[i] - change).detach().requires_grad_()


def best_by_hand(actor, critic, states, noise):
    """The best of N actions (B, A), by the smaller of the twins, N loop by loop."""
    zero = torch.zeros(len(states), 1)
    candidates = [(e - velocity_by_hand(actor, states, e, zero, zero + 1)).clamp(-1, 1) for e in noise.unbind(1)]
    values = torch.stack([twins_by_hand(critic, states, a).min(dim=0).values for a in candidates])
    return torch.stack([candidates[k][i] for i, k in enumerate(values.argmax(dim=0).tolist())]).detach()


@pytest.fixture
def float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tangent", TANGENTS)
def test_updates_by_hand(float64, tangent):
    agent = make_agent(tangent=tangent, ivc_coef=0.3, zero_r_ratio=0.25, policy_lr=1e-2, q_lr=3e-3)
    networks = (agent.actor, agent.critic, agent.target_critic)
    actor, critic, target = ([w.detach().clone().requires_grad_() for w in x.parameters()] for x in networks)
    actor_moments, critic_moments, policy_step = {}, {}, 0
    for step, policy_is_due in enumerate([True, False, True], start=1):
        batch = make_batch(seed=10 * step)
        torch.manual_seed(step)
        info = agent.update(batch, policy_is_due)

        torch.manual_seed(step)
        noise = torch.randn(2 * B, 4, A)
        best = best_by_hand(actor, critic, torch.cat([batch.next_obs, batch.obs]), noise)
        next_actions, best_actions = best[:B], best[B:]
        next_q = twins_by_hand(target, batch.next_obs, next_actions).min(dim=0).values
        y = (0.2 * batch.rewards + 0.99 * (1 - batch.terminated) * next_q).detach()
        loss = ((twins_by_hand(critic, batch.obs, batch.actions) - y) ** 2).mean(dim=1).sum()
        close(info["losses/qf_loss"], loss.detach(), atol=1e-9)
        adam_by_hand(critic, loss, critic_moments, step, 3e-3)
        if not policy_is_due:
            continue

        policy_step += 1
        uniform, eps = torch.rand(B, 2), torch.randn(B, A)
        r, t = uniform.min(dim=1, keepdim=True).values, uniform.max(dim=1, keepdim=True).values
        r[: B // 4] = 0
        a_t, v = best_actions + t * (eps - best_actions), eps - best_actions

        def u(a_t, r, t, obs=batch.obs):
            return velocity_by_hand(actor, obs, a_t, r, t)

        along = (u(a_t, t, t).detach() if tangent == "marginal" else v, 0 * r, 1 + 0 * t)
        u_r, dudt = torch.autograd.functional.jvp(u, (a_t, r, t), along, create_graph=True)
        mean_flow = ((u_r - (v - (t - r) * dudt).detach()) ** 2).sum(dim=1)
        constraint = ((u(a_t, t, t) - v) ** 2).sum(dim=1)
        loss = (mean_flow + 0.3 * constraint).mean()
        close(info["losses/actor_loss"], loss.detach(), atol=1e-9)
        adam_by_hand(actor, loss, actor_moments, policy_step, 1e-2)
        target = [w + 0.005 * (q - w) for w, q in zip(target, critic, strict=True)]
    for network, by_hand in zip(networks, (actor, critic, target), strict=True):
        close([w.detach() for w in network.parameters()], [w.detach() for w in by_hand], atol=1e-9)
    assert (agent.actor.weights[0] - make_agent().actor.weights[0]).abs().max() > 1e-3


# What the two scripts share
SHARED = """make_env to_box EnsembleMLP MeanFlowActor sample_r_t best_of_n candidate_info critic_loss
    make_adam soft_update ReplayBuffer add_and_act sample_and_update CUDAGraph make_policy load_policy evaluate
    exit_with_error env_dimensions warn check_compiler check_finite writing map_file lock_run write_file
    save_checkpoint load_checkpoint resumed_args evaluations_until is_due receive_signals""".split()
DIFFERENT = {"Args", "QNetwork", "actor_loss", "Agent", "check_args"}


def definitions(parent, text):
    """Source of the functions and classes in a module or class, decorators included, by name."""
    lines = text.splitlines(keepends=True)
    sources = {}
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            sources[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return sources


def both(function):
    return [function(path.read_text()) for path in (SCRIPT, SOM_SCRIPT)]


def test_shared_functions_are_equal_to_the_letter():
    mine, theirs = both(lambda text: definitions(ast.parse(text), text))
    assert mine.keys() & theirs.keys() == {*SHARED} | DIFFERENT
    assert mine.keys() - theirs.keys() == {"linear_path", "mfp_loss"}
    of_lambda = ' or name == "initial_lambda"'  # a flag of SOM
    assert theirs["resumed_args"].count(of_lambda) == 1
    theirs["resumed_args"] = theirs["resumed_args"].replace(of_lambda, "")
    assert {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]} == DIFFERENT
    order = [name for name in mine if name in theirs]
    assert order == [name for name in theirs if name in mine]


def test_agents_have_the_same_methods():
    def methods(text):
        (agent,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "Agent")
        return definitions(agent, text)

    mine, theirs = both(methods)
    assert [name for name in theirs if name not in ("update_lambda", "set_learning_rates")] == list(mine)
    assert mine["descend"] == theirs["descend"]
    for name in ("__init__", "act", "update", "q_fn"):
        assert mine[name].split("\n")[0] == theirs[name].split("\n")[0].replace(", hidden_dtype=None", ""), name


def test_the_main_blocks_are_equal_but_for_names_and_lambda():
    mine, theirs = both(lambda text: text[text.index('if __name__ == "__main__":') :])
    changes = {
        'project="som"': 'project="mfp"',
        "agent.acting_actor.": "agent.actor.",
        '"policy_q": args.policy_q, ': "",
    }
    changes |= {"args.preset is not None:\n        preset = PRESETS[args.preset]": 'args.preset == "laptop":'}
    changes |= {"preset=args.preset, **preset": 'preset="laptop", **LAPTOP'}
    for words, other in changes.items():
        assert theirs.count(words) == 1
        theirs = theirs.replace(words, other)
    of_lambda = re.compile(r"args\.(autotune|anneal_steps)|agent\.(log_lambda|update_lambda|set_learning_rates)\b")
    lines = theirs.splitlines()
    expected = [line for line in lines if not of_lambda.search(line)]
    assert mine.splitlines() == expected and len(lines) - len(expected) == 6


def test_the_rest_of_the_scripts_is_equal_to_the_letter():
    mine, theirs = both(lambda text: text[: text.index('"""')])
    assert mine == theirs
    mine, theirs = both(lambda text: text[text.index("\nimport ") : text.index("@dataclass")])
    theirs = theirs.replace("som_continuous", "mfp_continuous")
    # checkpoints have their own versions: Args changes in one script alone
    mine, theirs = (re.sub(r"of version \d+", "of version", text) for text in (mine, theirs))
    assert mine == theirs and "Batch = " in mine
    mine, theirs = both(lambda text: re.findall(r"(?m)^\s*# ((?:ALGO LOGIC|TRY NOT)[^\n]*)", text))
    assert mine == theirs and len(mine) == 8


def test_the_preset_is_that_of_som_but_for_the_method():
    mine, theirs = dict(mfp.LAPTOP), dict(som.LAPTOP)
    assert (theirs.pop("num_mc_samples"), theirs.pop("autotune")) == (8, False)
    assert mine.pop("noise_scale") == 0.1 and mine == theirs


def test_flags_are_those_of_som_but_for_the_method():
    mine, theirs = ({f.name: f for f in dataclasses.fields(script.Args)} for script in (mfp, som))
    assert mine.keys() - theirs.keys() == {"ivc_coef", "tangent"}
    differing = {name for name in mine.keys() & theirs.keys() if mine[name].default != theirs[name].default}
    assert differing == {"exp_name", "learning_starts", "zero_r_ratio", "noise_scale"}
    order = [name for name in theirs if name in mine]
    assert order == [name for name in mine if name in theirs]
    comment = re.compile(r"(?m)^    (\w+): [^\n]*?  (# [^\n]*)")
    mine, theirs = both(lambda text: dict(comment.findall(text[: text.index("LAPTOP")])))
    assert mine.keys() == {field.name for field in dataclasses.fields(mfp.Args)}
    described = {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]}
    assert described == {"preset", "best_of_n", "zero_r_ratio", "noise_scale"}


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(mfp.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(mfp.Args):
        assert field.name in read, f"{field.name} has no reader"
        hint = hints[field.name]
        optional = [x for x in typing.get_args(hint) if typing.get_origin(x) is typing.Literal]
        if typing.get_origin(hint) is typing.Literal:
            assert field.default in typing.get_args(hint)
        elif optional:
            assert field.default is None
        else:
            assert isinstance(field.default, hint), field.name
            assert type(field.default) in (hint, type(None)), field.name


def test_defaults_are_table_3():
    args = mfp.Args()
    table = {"buffer_size": 10**6, "learning_starts": 30_000, "batch_size": 256, "gamma": 0.99, "tau": 0.005}
    table |= {"reward_scale": 0.2, "num_layers": 3, "hidden_dim": 256, "policy_lr": 1e-4, "q_lr": 1e-4, "best_of_n": 32}
    assert {name: getattr(args, name) for name in table} == table
    assert args.ivc_coef == 1 and args.noise_scale == 0


def test_inline_metadata_equals_that_of_som():
    blocks = [
        re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", path.read_text()).group(1) for path in (SCRIPT, SOM_SCRIPT)
    ]
    metadata = [tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True))) for block in blocks]
    assert metadata[0] == metadata[1] and "dependencies" in metadata[0]


# The script as a user runs it
def run_loop(monkeypatch, folder, *flags, tiny=TINY):
    """Run the script as __main__ in this process; returns its variables."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *tiny, *flags])
    return types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))


def run_script(folder, *flags):
    return subprocess.run([sys.executable, "-W", "ignore", SCRIPT, *flags], cwd=folder, capture_output=True, text=True)


def scalars(run_folder):
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_walker2d_as_a_user_runs_it(tmp_path):
    flags = [*TINY, "--total-timesteps", "300", "--save-model"]
    finished = run_script(tmp_path, "--env-id", "Walker2d-v4", *flags)
    assert finished.returncode == 0, finished.stderr
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert {"config.json", "evaluations.csv", "model.pt"} <= {file.name for file in run_folder.iterdir()}
    assert run_folder.name.startswith("Walker2d-v4__mfp_continuous_action__1__")
    config = json.loads((run_folder / "config.json").read_text())
    assert config["env_id"] == "Walker2d-v4" and config["ivc_coef"] == 1 and "torch" in config["versions"]
    rows = list(csv.DictReader((run_folder / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [100, 200, 300]
    logged = scalars(run_folder)
    assert logged.keys() == {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/eval_return", "losses/qf_loss",
        "losses/td_error", "losses/qf_values", "losses/actor_loss", "losses/mf_loss", "losses/ivc_loss",
        *(f"losses/actor_loss_t{i}" for i in range(4)), "velocity/norm", "velocity/dudt_ratio",
        "actions/candidate_std", "actions/saturated",
    }  # fmt: skip
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    evaluated = [event.value for event in logged["charts/eval_return"]]
    assert evaluated == pytest.approx([float(row["return_mean"]) for row in rows], rel=1e-5)
    model = torch.load(run_folder / "model.pt", weights_only=True)
    assert model["config"] == config
    mfp.MeanFlowActor(17, 6, 16, 3).load_state_dict(model["actor"])
    mfp.QNetwork(2, 17, 6, 1, 16, 3).load_state_dict(model["critic"])


@pytest.mark.parametrize(
    "flags", ["--tangent conditional --ivc-coef 0 --noise-scale 0.1", "--policy-frequency 2 --updates-per-step 2"]
)
def test_every_variant_trains(monkeypatch, tmp_path, flags):
    run = run_loop(monkeypatch, tmp_path, "--env-id", "Pendulum-v1", "--eval-frequency", "200", *flags.split())
    logged = scalars(run.run_folder)
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert "losses/actor_loss" in logged
    # learning begins in the step after learning_starts; each of the two optimizers has counted
    assert run.num_updates == 80 * run.args.updates_per_step
    taken = {name: int(x.state_dict()["state"][0]["step"]) for name, x in run.agent.optimizers.items()}
    assert taken == {"critic": run.num_updates, "actor": run.num_updates // run.args.policy_frequency}


def test_preset_and_load_policy(monkeypatch, tmp_path):
    flags = "--preset laptop --env-id Pendulum-v1 --learning-starts 40 --total-timesteps 80 --num-episodes 2"
    run = run_loop(monkeypatch, tmp_path, *flags.split(), tiny=())
    config = json.loads((run.run_folder / "config.json").read_text())
    overridden = {"learning_starts": 40, "total_timesteps": 80}
    assert {name: config[name] for name in mfp.LAPTOP} == mfp.LAPTOP | overridden

    policy = mfp.load_policy(run.run_folder)
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    obs, zero = torch.as_tensor(observation).unsqueeze(0), torch.zeros(1, 16, 1)
    torch.manual_seed(3)
    noise = torch.randn(1, 16, 1)
    with torch.no_grad():
        candidates = (noise - run.agent.actor(obs, noise, zero, zero + 1)).clamp(-1, 1)
        best = candidates[0, run.agent.critic(obs, candidates).amin(dim=0).argmax()]
    torch.manual_seed(3)
    action = policy(observation)
    np.testing.assert_allclose(action, 2 * best.numpy(), rtol=1e-6)  # its actions are torques in [-2, 2]
    env.step(action)
    batch = policy(np.stack([observation, observation]))
    assert batch.shape == (2, 1) and batch.dtype == env.action_space.dtype and np.abs(batch).max() <= 2


BAD_NUMBERS = {
    "--total-timesteps": "0", "--num-envs": "-1", "--learning-starts": "-5", "--buffer-size": "0", "--batch-size": "0",
    "--updates-per-step": "0", "--policy-frequency": "0", "--gamma": "1.5", "--tau": "1.5", "--reward-scale": "0",
    "--policy-lr": "-1e-4", "--q-lr": "nan", "--hidden-dim": "0", "--num-layers": "0", "--best-of-n": "0",
    "--checkpoint-frequency": "0", "--num-episodes": "0", "--num-frequencies": "0",
    "--ivc-coef": "-0.1", "--zero-r-ratio": "1.1", "--noise-scale": "-1", "--eval-frequency": "0", "--seed": "-1",
}  # fmt: skip


def refused(monkeypatch, tmp_path, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        run_loop(monkeypatch, tmp_path, *flags)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert not any(tmp_path.iterdir())  # nothing was created
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_bad_numbers_are_refused(monkeypatch, tmp_path, capsys, flag):
    message = refused(monkeypatch, tmp_path, capsys, "--env-id", "Pendulum-v1", flag, BAD_NUMBERS[flag])
    assert flag in message


def test_every_number_has_a_bad_value_above():
    numbers = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(mfp.Args) if f.type in (int, float)}
    assert numbers == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Walker3d-v4", "Did you mean: `Walker2d`"),
        ("--env-id CartPole-v1", "supported are flat vectors"),
        ("--env-id Pusher-v4", "use Pusher-v5"),
        ("--env-id Pendulum-v1 --learning-starts 199", "--learning-starts"),
        ("--env-id Pendulum-v1 --buffer-size 1", "--num-envs"),
        ("--env-id Pendulum-v1 --track", "needs wandb"),
        ("--env-id Walker2d-v4 --capture-video", "needs moviepy"),
        ("--env-id Pendulum-v1 --device gpu", "finds no GPU"),
    ],
)
def test_bad_input_is_refused(monkeypatch, tmp_path, capsys, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert words in refused(monkeypatch, tmp_path, capsys, *flags.split())


def test_bad_input_of_the_real_script(monkeypatch, tmp_path):
    finished = run_script(tmp_path, "--env-id", "Walker2d-v9")
    assert finished.returncode == 2 and finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    for flags in (["--no-such-flag"], ["--tangent", "none"]):
        with pytest.raises(SystemExit) as stop:
            run_loop(monkeypatch, tmp_path, *flags)
        assert stop.value.code == 2
    assert not any(tmp_path.iterdir())


def test_flags_of_som_alone_are_refused():
    with pytest.raises(SystemExit):
        tyro.cli(mfp.Args, args=["--score-scale", "5"])
