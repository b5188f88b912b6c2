"""Five diffusion policies against closed forms, quadrature and hand-written loops; what they share; the script as run.

torch.compile takes half a minute; leave it out with: pytest -k "not compile"
"""

import ast
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import math
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import tokenize
import types
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mfp_continuous_action as mfp
from baselines import diffusion_continuous_action as script

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT, MFP_SCRIPT = ROOT / "baselines" / "diffusion_continuous_action.py", ROOT / "mfp_continuous_action.py"
F64 = torch.float64
B, O, A = 12, 3, 2
METHODS = "sdac", "dpmd", "qsm", "dipo", "qvpo"
SCHEDULES = "linear", "vp", "cosine"
TINY = (
    "--device cpu --no-compile --hidden-dim 16 --num-diffusion-steps 3 --best-of-n 3 --eval-best-of-n 2 --num-envs 2 "
    "--batch-size 32 --learning-starts 40 --total-timesteps 200 --eval-frequency 100 --buffer-size 1000"
).split()
SMALL = {"sdac": "--num-samples 5", "dipo": "--action-steps 3", "qvpo": "--num-samples 5 --entropy-samples 2"}


def tiny(method):
    return ["--method", method, *TINY, *SMALL.get(method, "").split()]


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=1e-10, rtol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def diffusion(num_steps, schedule, scale=0.8, bound=1.0):
    """The coefficients in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        return script.diffusion(num_steps, schedule, scale, bound)
    finally:
        torch.set_default_dtype(before)


def make_batch(seed=0, dtype=F64):
    obs, next_obs = randn(B, O, seed=seed), randn(B, O, seed=seed + 1)
    actions, rewards = 2 * rand(B, A, seed=seed + 2) - 1, randn(B, seed=seed + 3)
    terminated = (torch.arange(B) % 3 == 0).to(F64)
    best_actions, next_actions = (2 * rand(B, A, seed=seed + i) - 1 for i in (4, 5))
    columns = [x.to(dtype) for x in (obs, next_obs, actions, rewards, terminated, best_actions, next_actions)]
    return script.Batch(*columns[:5], torch.arange(B), *columns[5:])


def make_args(method, **changes):
    sizes = {"hidden_dim": 16, "num_layers": 2, "best_of_n": 4, "batch_size": B, "compile": False}
    sizes |= {"num_diffusion_steps": 4, "eval_best_of_n": 3, "num_samples": 6, "action_steps": 3, "entropy_samples": 5}
    return dataclasses.replace(script.default_args(method), **(sizes | changes))


def make_agent(method, device="cpu", **changes):
    torch.manual_seed(0)
    return script.Agent(make_args(method, **changes), O, A, torch.device(device))


def make_draws(args, num_states=B, act_dim=A, seed=0):
    """Random numbers of a regression in float64."""
    torch.manual_seed(seed)
    draws = script.draw(args, num_states, act_dim, "cpu")
    return draws._replace(eps=draws.eps.double(), chains=draws.chains.double())


def make_state(lam=1.0, q_stats=(0.0, 1.0), progress=0.0):
    return script.State(*(torch.tensor(x, dtype=F64) for x in (lam, q_stats, progress)))


def make_actor(seed=0):
    torch.manual_seed(seed)
    return script.DiffusionActor(O, A, 8, 2).double()


def smooth_q(obs, a):
    return torch.sin(3 * a).sum(-1) + obs.sum(-1, keepdim=True) * a[..., 0]


# The schedules
@pytest.mark.parametrize(
    ("schedule", "scale", "num_steps", "abar", "ratio"),
    [
        ("linear", 0.8, 20, 5.3e-6, 436), ("linear", 0.8, 10, 0.0020, 22), ("linear", 0.3, 20, 0.035, 5.3),
        ("linear", 0.3, 100, 5e-8, None), ("vp", None, 20, 0.00641, 12.5), ("cosine", None, 20, 6e-6, 406),
    ],
)  # fmt: skip
def test_what_is_left_of_the_action_at_the_end(schedule, scale, num_steps, abar, ratio):
    d = diffusion(num_steps, schedule, scale)
    assert d.mu[-1] ** 2 == pytest.approx(abar, rel=0.06)
    assert ratio is None or d.sigma[-1] / d.mu[-1] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("num_steps", [5, 20, 100])
def test_vp_ends_in_the_same_place_for_every_number_of_steps(num_steps):
    assert diffusion(num_steps, "vp").mu[-1] == pytest.approx(math.exp(-5.05 / 2), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 7, 20])
def test_coefficients_by_hand(schedule, num_steps):
    d, T = diffusion(num_steps, schedule), num_steps
    abar = [1.0]
    for k in range(1, T + 1):
        if schedule == "linear":
            beta = 0.8 * (1e-4 if T == 1 else 1e-4 + (0.999 - 1e-4) * (k - 1) / (T - 1))
        elif schedule == "vp":
            beta = 1 - math.exp(-0.1 / T - 0.5 * 9.9 * (2 * k - 1) / T**2)
        else:
            f = [math.cos((j / T + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (k - 1, k)]
            beta = min(1 - f[1] / f[0], 0.999)
        abar.append(abar[-1] * (1 - beta))
        c0 = beta * math.sqrt(abar[k - 1]) / (1 - abar[k])
        c1 = (1 - abar[k - 1]) * math.sqrt(1 - beta) / (1 - abar[k])
        std = math.sqrt(beta * (1 - abar[k - 1]) / (1 - abar[k]))
        for actual, expected in zip(d[:5], (math.sqrt(abar[k]), math.sqrt(1 - abar[k]), c0, c1, std), strict=True):
            assert actual[k].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (d.mu[0], d.sigma[0]) == (1, 0) and {len(table) for table in d[:5]} == {T + 1}
    assert (d.c0[1], d.c1[1], d.std[1]) == (pytest.approx(1), 0, 0)
    # the step leads from the law of a_k to that of a_{k-1}, of an action that is known
    k = torch.arange(1, T + 1)
    close(d.c0[k] + d.c1[k] * d.mu[k], d.mu[k - 1], atol=1e-12)
    close((d.c1[k] * d.sigma[k]) ** 2 + d.std[k] ** 2, d.sigma[k - 1] ** 2, atol=1e-12)


# The sampler
@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        ("linear", 20, {0.2: 0.123, 0.5: 0.390}), ("linear", 10, {0.2: 0.100, 0.5: 0.354}),
        ("vp", 20, {0.2: 0.141, 0.5: 0.414}), ("vp", 10, {0.2: 0.112, 0.5: 0.364}),
        ("cosine", 20, {0.2: 0.153, 0.5: 0.432}), ("cosine", 10, {0.2: 0.129, 0.5: 0.389}),
    ],
)  # fmt: skip
def test_sampler_against_its_affine_recursion(schedule, num_steps, expected):
    """With the exact denoiser of N(m, s^2) a_0 is affine in the noise, which is read off unit vectors."""
    d, m = diffusion(num_steps, schedule, bound=math.inf), 0.4
    for s, std in expected.items():
        gain = d.mu * s**2 / (d.mu**2 * s**2 + d.sigma**2)

        def eps_fn(obs, a, k, d=d, gain=gain):
            (k,) = set(k.flatten().long().tolist())
            a_0 = m + gain[k] * (a - d.mu[k] * m)
            return (a - d.mu[k] * a_0) / d.sigma[k]

        mean, var = 0.0, 1.0  # of a_T ~ N(0, 1)
        for k in range(num_steps, 0, -1):
            slope = d.c0[k] * gain[k] + d.c1[k]
            mean = slope * mean + d.c0[k] * (1 - gain[k] * d.mu[k]) * m
            var = slope**2 * var + (d.std[k] ** 2 if k > 1 else 0)
        noise = torch.zeros(num_steps, 1, num_steps + 1, 1, dtype=F64)  # the last action is that of no noise
        noise[:, 0, :-1, 0] = torch.eye(num_steps, dtype=F64)
        a = script.ddpm_sample(eps_fn, torch.zeros(1, 1), noise, d).flatten()
        close(a[-1], mean)
        close((a[:-1] - a[-1]).square().sum(), var)
        assert var.sqrt() == pytest.approx(std, abs=6e-4)  # narrower than s: the steps are few


def test_one_step_returns_the_denoised_action():
    d, noise = diffusion(1, "linear"), randn(1, B, 3, A, seed=0)
    a = script.ddpm_sample(lambda obs, a, k: 0.1 * a + k, None, noise, d)
    expected = (noise[0] - d.sigma[1] * (0.1 * noise[0] + 1)) / d.mu[1]
    close(a, expected.clamp(-1, 1))
    assert (expected.abs() > 1).any() and (expected.abs() < 1).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_actions_are_in_the_box_and_functions_of_their_noise(schedule, bound):
    d, actor, obs = diffusion(6, schedule, bound=bound), make_actor(), randn(B, O, seed=1)
    noise = randn(6, B, 5, A, seed=2)

    def eps_fn(*inputs):
        return 3 * actor(*inputs)

    a = script.ddpm_sample(eps_fn, obs, noise, d).detach()
    assert a.shape == (B, 5, A) and a.abs().max() <= bound + 1e-9
    for i, j in itertools.product(range(B), range(5)):
        alone = script.ddpm_sample(eps_fn, obs[i : i + 1], noise[:, i : i + 1, j : j + 1], d)
        close(alone[0, 0], a[i, j])
    for k in range(6):  # every one of the random numbers counts
        other = noise.clone()
        other[k] = randn(B, 5, A, seed=3)
        assert not torch.equal(script.ddpm_sample(eps_fn, obs, other, d), a)


def test_the_sampler_by_hand():
    d, actor, obs, noise = diffusion(4, "cosine"), make_actor(), randn(B, O, seed=1), randn(4, B, 1, A, seed=2)
    a = noise[0]
    for k, z in zip((4, 3, 2, 1), (noise[1], noise[2], noise[3], 0 * a), strict=True):
        eps = actor(obs, a, torch.full((B, 1, 1), float(k), dtype=F64))
        a_0 = torch.clip((a - d.sigma[k] * eps) / d.mu[k], -1, 1)
        var = (d.sigma[k - 1] / d.sigma[k]) ** 2 * (1 - (d.mu[k] / d.mu[k - 1]) ** 2)
        # of jointly normal a_{k-1} and a_k, given a_0
        mean = d.mu[k - 1] * a_0 + d.mu[k] / d.mu[k - 1] * (d.sigma[k - 1] / d.sigma[k]) ** 2 * (a - d.mu[k] * a_0)
        a = mean + var.sqrt() * z
    close(script.ddpm_sample(actor, obs, noise, d), a)


def test_best_of_n_takes_the_first_of_the_best():
    d, obs = diffusion(3, "linear"), randn(B, O, seed=1)
    noise = randn(3, B, 5, A, seed=2)
    noise[:, :, 3] = noise[:, :, 1]  # a tie
    best, candidates = script.best_of_n(make_actor(), smooth_q, obs, noise, d)
    q = smooth_q(obs, candidates)
    close(best, torch.stack([candidates[i, q[i].tolist().index(q[i].max())] for i in range(B)]))
    assert 3 not in q.argmax(dim=1) and len(set(q.argmax(dim=1).tolist())) > 2
    alone, candidates = script.best_of_n(make_actor(), smooth_q, obs, noise[:, :, :1], d)
    close(alone, candidates[:, 0])


# The network and the loss
def test_actor_tells_every_step_from_the_next():
    actor = make_actor()
    a, obs = torch.zeros(1, 100, A, dtype=F64), torch.zeros(1, O, dtype=F64)
    out = actor(obs, a, torch.arange(1, 101).reshape(1, 100, 1))
    assert (out[0, 1:] - out[0, :-1]).abs().amax(dim=1).min() > 1e-5
    phase = 7 * actor.frequencies
    features = torch.cat([a[0, :1], phase.sin().unsqueeze(0), phase.cos().unsqueeze(0)], dim=1)
    expected = script.EnsembleMLP.forward(actor, obs, features.unsqueeze(0))
    close(out[:, 6:7], expected.squeeze(0))
    assert actor.frequencies[0] == 1 and actor.frequencies[-1] == pytest.approx(10_000 ** (-7 / 8), rel=1e-6)


def test_denoising_loss_by_hand():
    actor, k = make_actor(), 1 + torch.arange(B).unsqueeze(1) % 4
    obs, a_k, eps, weight = randn(B, O, seed=1), randn(B, A, seed=2), randn(B, A, seed=3), rand(B, seed=4)
    weight[: B // 2] = 0
    loss, info = script.denoising_loss(actor, script.Regression(obs, a_k, k, eps, weight))
    total = error = 0
    for i in range(B):
        prediction = actor(obs[i : i + 1], a_k[i].reshape(1, 1, A), k[i].reshape(1, 1, 1)).flatten()
        for j in range(A):
            total = total + weight[i] * (prediction[j] - eps[i, j]) ** 2 / (B * A)
            error = error + (prediction[j] - eps[i, j]) ** 2 / (B * A)
    close(loss, total)
    close(info["losses/actor_loss"], total.detach())
    close(info["losses/denoising_error"], error.detach())
    close(info["regression/target_rms"], eps.square().mean().sqrt())
    assert not any(value.requires_grad for value in info.values())
    half = slice(B // 2, None)
    regression = script.Regression(obs[half], a_k[half], k[half], eps[half], weight[half])
    parts = [torch.autograd.grad(x, [*actor.parameters()]) for x in (loss, script.denoising_loss(actor, regression)[0])]
    close(parts[0], [gradient / 2 for gradient in parts[1]])  # rows of weight 0 have no say


# SDAC
def sdac_by_hand(batch, draws, d, alpha, truncated=True):
    """All K noises and weights, (B, K, A) and (B, K), by other formulas than the script's."""
    k = draws.k
    a_k = d.mu[k] * batch.actions + d.sigma[k] * draws.eps
    eps, a_0 = script.propose(a_k, d.mu[k], d.sigma[k], draws.uniform, d.bound, truncated)
    terms = torch.exp(alpha * smooth_q(batch.obs, a_0))
    return a_k, eps, terms / terms.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("proposals", ["truncated", "clipped"])
def test_the_collapsed_loss_has_the_gradient_of_all_samples(proposals):
    args, batch, actor, d = make_args("sdac", num_samples=64, proposals=proposals), make_batch(), make_actor(), None
    d, draws, state = diffusion(4, "linear"), make_draws(args), make_state(lam=0.7)
    regression, info = script.sdac(smooth_q, None, batch, draws, state, d, args)
    loss, _ = script.denoising_loss(actor, regression)
    actual = torch.autograd.grad(loss, [*actor.parameters()])
    a_k, eps, w = sdac_by_hand(batch, draws, d, 5 / 0.7, proposals == "truncated")
    prediction = actor(batch.obs, a_k.unsqueeze(1), draws.k.unsqueeze(1))  # (B, 1, A)
    loss = (w.unsqueeze(-1) * (prediction - eps).square()).sum(dim=1).mean()
    expected = torch.autograd.grad(loss, [*actor.parameters()])
    close(actual, expected, atol=1e-12, rtol=1e-12)
    close(regression.a_k, a_k)
    assert (regression.obs is batch.obs) and torch.equal(regression.weight, torch.ones(B, dtype=F64))
    close(info["regression/effective_sample_size"], (1 / w.square().sum(dim=1)).mean())
    assert expected[0].abs().max() > 1e-3


def test_sdac_does_not_see_a_constant_in_q():
    args, batch, d = make_args("sdac"), make_batch(), diffusion(4, "linear")
    draws, state = make_draws(args), make_state()
    regressions = [
        script.sdac(lambda obs, a, c=c: smooth_q(obs, a) + c, None, batch, draws, state, d, args)[0]
        for c in (0.0, 100.0)
    ]
    close(*regressions, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("num_steps", [10, 20])
@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_truncated_proposals_are_in_the_box_and_lead_to_a_k(num_steps, bound):
    d = diffusion(num_steps, "linear")
    k = torch.arange(1, num_steps + 1).repeat_interleave(40).unsqueeze(1)
    mu, sigma = d.mu[k], d.sigma[k]
    a = bound * (2 * rand(len(k), A, seed=0) - 1)
    a[::4] = bound  # a corner of the box, where many actions are
    a_k = mu * a + sigma * randn(len(k), A, seed=1)
    a_k[1::4] *= 3  # as no action leads to, or almost none
    uniform = rand(len(k), 200, A, seed=2)
    uniform[:, :2, :] = torch.tensor([0.0, 1 - 2**-53], dtype=F64).reshape(1, 2, 1)
    eps, a_0 = script.propose(a_k, mu, sigma, uniform, bound)
    assert torch.isfinite(eps).all() and a_0.abs().max() <= bound
    close((mu.unsqueeze(1) * a_0 + sigma.unsqueeze(1) * eps), a_k.unsqueeze(1).expand_as(eps), atol=1e-12, rtol=0)
    # their law is the normal's, given the box: its probability transform is the uniform number itself, or 1 - that
    low, high = ((a_k + sign * mu * bound) / sigma for sign in (-1, 1))
    inside = ((low < 4) & (high > -4)).all(dim=1)
    low, high, eps, uniform = (x[inside] for x in (low.unsqueeze(1), high.unsqueeze(1), eps, uniform))
    cdf = (torch.special.ndtr(eps) - torch.special.ndtr(low)) / (torch.special.ndtr(high) - torch.special.ndtr(low))
    flipped = (low > 0).expand_as(cdf)
    close(torch.where(flipped, 1 - cdf, cdf), uniform, atol=1e-6, rtol=0)
    assert flipped.any() and not flipped.all()


def test_proposals_in_float32_are_as_good():
    """Where mu is small, the action is the small difference of two large numbers."""
    d, d32 = diffusion(20, "linear"), script.diffusion(20, "linear")
    k = torch.full((500, 1), 20)
    a_k = randn(500, A, seed=1).float()
    uniform = rand(500, 50, A, seed=2)
    eps, a_0 = script.propose(a_k, d32.mu[k], d32.sigma[k], uniform)
    assert eps.dtype == a_0.dtype == torch.float32 and a_0.abs().max() <= 1
    _, expected = script.propose(a_k.double(), d32.mu.double()[k], d32.sigma.double()[k], uniform)
    close(a_0.double(), expected, atol=1e-6, rtol=0)
    assert a_0.std() == pytest.approx(3**-0.5, rel=0.03)  # almost uniform: a_k says next to nothing
    close(d32.mu.double(), d.mu, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 9, 14, 20])
def test_sdac_against_quadrature(k):
    """E[eps | a_k] under exp(alpha Q) on [-1, 1], with evenly spread proposals in place of random ones."""
    d, K, alpha = diffusion(20, "linear"), 20_000, 5.0
    args = make_args("sdac", num_samples=K, num_diffusion_steps=20)

    def q_fn(obs, a):
        return torch.sin(4 * a[..., 0]) + a[..., 0] ** 2

    actions, eps = torch.tensor([[-0.9], [0.1], [1.0]], dtype=F64), torch.tensor([[0.3], [-1.2], [2.0]], dtype=F64)
    batch = script.Batch(torch.zeros(3, 1), None, actions, None, None)
    uniform = ((torch.arange(K, dtype=F64) + 0.5) / K).reshape(1, K, 1).expand(3, K, 1)
    draws = script.Draws(torch.full((3, 1), k), eps, uniform, None)
    regression, _ = script.sdac(q_fn, None, batch, draws, make_state(), d, args)
    a = (torch.arange(200_000, dtype=F64) + 0.5) / 100_000 - 1
    mu, sigma = d.mu[k], d.sigma[k]
    for i in range(3):
        noise = (regression.a_k[i] - mu * a) / sigma
        weight = torch.exp(alpha * q_fn(None, a.unsqueeze(-1)) - noise**2 / 2)
        close(regression.eps[i, 0], (weight * noise).sum() / weight.sum(), atol=3e-4, rtol=0)


def test_sdac_estimates_the_score_of_a_mixture():
    """Without a box, eps_hat is -sigma times the score of the mixture that exp(alpha Q) is."""
    alpha, K, num_points = 5.0, 20_000, 30
    d = diffusion(20, "linear", bound=math.inf)
    args = make_args("sdac", num_samples=K, num_diffusion_steps=20, proposals="clipped")
    means = torch.tensor([[0.5, 0.3], [-0.6, 0.1]], dtype=F64)
    stds, heights = torch.tensor([0.4, 0.3], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)

    def log_density(a, mu, sigma):  # of mu a_0 + sigma eps, up to a constant
        var = (mu * stds) ** 2 + sigma**2
        square = (a.unsqueeze(-2) - mu * means).square().sum(-1)
        return torch.logsumexp(heights.log() - var.log() - square / (2 * var), dim=-1)

    def q_fn(obs, a):
        return log_density(a, 1.0, 0.0) / alpha

    for k in (2, 4, 6):
        assert d.sigma[k] / d.mu[k] <= 1
        actions = means[torch.arange(num_points) % 2] + 0.3 * randn(num_points, 2, seed=k)
        batch = script.Batch(torch.zeros(num_points, 1), None, actions, None, None)
        draws = script.Draws(
            torch.full((num_points, 1), k), randn(num_points, 2, seed=k + 1), rand(num_points, K, 2, seed=k), None
        )
        regression, _ = script.sdac(q_fn, None, batch, draws, make_state(), d, args)
        mu, sigma = d.mu[k].item(), d.sigma[k].item()
        score = torch.func.grad(lambda a, mu=mu, sigma=sigma: log_density(a, mu, sigma).sum())(regression.a_k)
        eps, a_0 = script.propose(regression.a_k, d.mu[draws.k], d.sigma[draws.k], draws.uniform, math.inf, False)
        w = (alpha * q_fn(None, a_0)).softmax(dim=1).unsqueeze(-1)
        error = (w.square() * (eps - regression.eps.unsqueeze(1)).square()).sum(dim=1).sqrt()
        assert ((regression.eps + sigma * score).abs() < 5 * error + 1e-9).all()
        assert score.abs().mean() > 1 and error.mean() < 0.03


# DPMD
def dpmd_weights(norm, q, **state):
    batch = make_batch()._replace(next_actions=q.unsqueeze(1))
    args = make_args("dpmd", dpmd_norm=norm)
    draws = make_draws(args, len(q), 1)
    return script.dpmd(lambda obs, a: a[..., 0], None, batch, draws, make_state(**state), diffusion(4, "linear"), args)


@pytest.mark.parametrize("k", [1, 5, 15])
def test_dpmd_makes_the_denoiser_of_the_reweighted_policy(k):
    """One step from pi = N(m, s^2) under Q = g a: pi exp(Q / lambda) is N(m + s^2 g / lambda, s^2)."""
    m, s, g, lam, d = 0.1, 0.35, 0.6, 0.5, diffusion(20, "linear")
    x, w = np.polynomial.hermite_e.hermegauss(40)
    x, w = torch.as_tensor(x), torch.as_tensor(w / w.sum())
    a, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(m + s * x, x, indexing="ij"))
    batch = make_batch()._replace(next_obs=torch.zeros(len(a), 1), next_actions=a)
    draws = script.Draws(torch.full((len(a), 1), k), eps, None, None)
    args = make_args("dpmd", num_diffusion_steps=20)
    q_fn = lambda obs, a: g * a[..., 0]  # noqa: E731
    regression, _ = script.dpmd(q_fn, None, batch, draws, make_state(lam=lam), d, args)
    assert regression.obs is batch.next_obs
    root = (torch.outer(w, w).flatten() * regression.weight).sqrt().unsqueeze(1)
    columns = torch.cat([torch.ones_like(a), regression.a_k], dim=1)
    intercept, slope = torch.linalg.lstsq(root * columns, root * regression.eps).solution.flatten()
    mu, sigma = d.mu[k], d.sigma[k]
    expected = sigma / (mu**2 * s**2 + sigma**2)
    close(slope, expected, atol=1e-5, rtol=0)
    close(intercept, -expected * mu * (m + s**2 * g / lam), atol=1e-5, rtol=0)


def test_dpmd_weights_and_running_statistics_by_hand():
    q = torch.tensor([-9.0, 0.5, 1.0, 2.0, 30.0], dtype=F64)
    for norm, n in {"standard": (q - 1) / 2, "released": q - 1 / 2}.items():
        regression, info = dpmd_weights(norm, q, lam=0.8, q_stats=(1.0, 2.0))
        close(regression.weight, torch.exp(torch.clip(n, -3, 3) / 0.8), rtol=1e-5)
        assert regression.weight[0] == pytest.approx(math.exp(-3 / 0.8))
        close(
            info["q_stats"],
            0.999 * torch.tensor([1.0, 2.0], dtype=F64) + 0.001 * torch.stack([q.mean(), q.std(correction=0)]),
        )
        w = regression.weight
        close(info["regression/effective_sample_size"], w.sum() ** 2 / w.square().sum())


def test_released_dpmd_does_not_weight_at_all():
    q = 100 + 20 * randn(B, seed=0)
    sizes = []
    for norm in ("standard", "released"):
        regression, info = dpmd_weights(norm, q, lam=0.98, q_stats=(100.0, 20.0))
        sizes.append(float(info["regression/effective_sample_size"]) / B)
        assert (len(regression.weight.unique()) == 1) == (norm == "released")
    assert sizes[0] < 0.8 and sizes[1] == pytest.approx(1)


@pytest.mark.parametrize(("method", "state"), [("dpmd", "next_obs"), ("qsm", "obs")])
def test_q_is_asked_in_the_states_of_its_actions(method, state):
    args, batch, seen = make_args(method), make_batch(), []

    def q_fn(obs, a):
        seen.append(obs)
        return smooth_q(obs, a)

    script.METHODS[method](q_fn, None, batch, make_draws(args), make_state(), diffusion(4, "linear"), args)
    assert seen and all(obs is getattr(batch, state) for obs in seen)


# QSM
def test_qsm_points_up_the_critic_by_the_temperature():
    d, m, v, scale = diffusion(20, "vp"), torch.tensor([0.3, -0.2], dtype=F64), 0.05, 4.0
    args, batch = make_args("qsm", num_diffusion_steps=20, qsm_scale=scale), make_batch()
    draws = make_draws(args)
    q_fn = lambda obs, a: -(a - m).square().sum(-1) / (2 * v)  # noqa: E731
    regression, info = script.qsm(q_fn, None, batch, draws, make_state(), d, args)
    mu, sigma = d.mu[draws.k], d.sigma[draws.k]
    a_k = mu * batch.actions + sigma * draws.eps
    close(regression.a_k, a_k)
    pull = (a_k.clamp(-1, 1) - m) / v
    assert (a_k.abs() > 1).any()
    close(info["regression/q_gradient"], pull.abs().mean())
    close(regression.eps, scale * sigma * pull / pull.abs().mean(), rtol=1e-5)
    inside = (a_k.abs() < 1) & ((a_k - m).abs() > 0.05)
    denoised = a_k - 0.01 * sigma * regression.eps  # a small step against the noise
    assert ((denoised - m).abs() < (a_k - m).abs())[inside].all() and inside.sum() > 5
    assert regression.obs is batch.obs and torch.equal(regression.weight, torch.ones(B, dtype=F64))
    # in units of the gradient's size: the scale of the rewards does not count
    again, _ = script.qsm(lambda obs, a: 50 * q_fn(obs, a), None, batch, draws, make_state(), d, args)
    close(again.eps, regression.eps, rtol=1e-5)


# DIPO
def run_dipo(q_fn, best_actions, steps, lr=0.03):
    args = make_args("dipo", action_steps=steps, action_lr=lr)
    batch = make_batch()._replace(best_actions=best_actions)
    d, draws = diffusion(4, "cosine"), make_draws(args)
    regression, info = script.dipo(q_fn, None, batch, draws, make_state(), d, args)
    close(regression.a_k, d.mu[draws.k] * info["best_actions"] + d.sigma[draws.k] * draws.eps)
    close(regression.eps, draws.eps)
    assert regression.obs is batch.obs and torch.equal(regression.weight, torch.ones(B, dtype=F64))
    close(info["regression/distance"], (info["best_actions"] - batch.actions).abs().mean())
    return info["best_actions"]


def test_dipo_moves_by_steps_times_rate_whatever_the_slope():
    start = 0.6 * (2 * rand(B, A, seed=0) - 1)
    slope = torch.tensor([3.0, -0.02], dtype=F64)
    for steps in (1, 20, 50):
        moved = run_dipo(lambda obs, a: (a * slope).sum(-1), start, steps)
        close(moved, (start + steps * 0.03 * slope.sign()).clamp(-1, 1), atol=1e-5, rtol=0)


def test_dipo_against_adam_of_torch():
    start, steps = 0.8 * (2 * rand(B, A, seed=0) - 1), 15
    expected = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (-smooth_q(make_batch().obs, expected.unsqueeze(1)).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            expected.clamp_(-1, 1)
    close(run_dipo(smooth_q, start, steps, lr=0.05), expected.detach(), atol=1e-9)
    assert (expected.abs() == 1).any()


def test_dipo_reaches_the_maximum_again_and_again():
    best, m = 2 * rand(B, A, seed=0) - 1, torch.tensor([0.4, -0.7], dtype=F64)
    distances = []
    for _ in range(12):  # every draw of a row moves its action on
        distances.append((best - m).abs().max())
        best = run_dipo(lambda obs, a: -(a - m).square().sum(-1), best, 10)
    assert distances[0] > 1 and distances[1] > 0.5 * distances[0] and (best - m).abs().max() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_only_drawn_rows_are_overwritten(method):
    args = make_args(method, num_envs=4, batch_size=3, buffer_size=16, checkpoint_frequency=2, total_timesteps=1000)
    agent = make_agent(method, num_envs=4, batch_size=3, buffer_size=16, checkpoint_frequency=2, total_timesteps=1000)
    rb, num_steps = script.ReplayBuffer(args, O, A, "cpu", None, 0), 0

    def add():
        nonlocal num_steps
        rows = np.zeros((4, rb.row_width), np.float32)
        actions = rand(4, A, seed=num_steps).float().numpy()
        columns = [np.full(shape, value) for shape, value in (((4, O), 0.1), ((4, O), 0.2), (4, 0.3), (4, 0.4))]
        rb.pack(rows, *columns[:2], actions, *columns[2:])
        rb.add(torch.from_numpy(rows))
        num_steps += 1
        return torch.from_numpy(actions)

    rb.add(torch.zeros(4, rb.row_width))  # that of a new run, before its first step
    actions = torch.cat([add() for _ in range(4)])
    rows, drawn = rb.rows.clone(), set()
    width = A if method == "dipo" else 0
    assert rb.best_actions.shape == (len(rb.rows), width)
    close(rb.best_actions[:16], actions[:, :width], atol=0, rtol=0)
    sample = rb.sample

    def recorded(batch_size):
        batch = sample(batch_size)
        close(batch.actions, actions[batch.slots], atol=0, rtol=0)
        for column, value in ((batch.obs, 0.1), (batch.next_obs, 0.2), (batch.rewards, 0.3), (batch.terminated, 0.4)):
            close(column, torch.full_like(column, value), atol=1e-6, rtol=0)
        close(batch.best_actions, rb.best_actions[batch.slots], atol=0, rtol=0)
        drawn.update(batch.slots.tolist())
        return batch

    rb.sample = recorded
    info = script.sample_and_update(agent, rb, True)
    script.sample_and_update(agent, rb, True)
    assert all(value.ndim == 0 for value in info.values())
    assert torch.equal(rb.rows, rows)
    if method == "dipo":
        changed = (rb.best_actions[:16] != actions).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) == drawn and 3 <= len(drawn) < 16
        before = rb.best_actions.clone()
        script.sample_and_update(agent, rb, False)  # nothing moves without the policy
        close(rb.best_actions, before, atol=0, rtol=0)
        while num_steps < len(rb.rows) // 4:
            add()
        new = add()  # the ring is full: the first rows are new
        close(rb.best_actions[:4], new, atol=0, rtol=0)
        close(rb.best_actions[4:16], before[4:16], atol=0, rtol=0)


# QVPO
def test_qvpo_by_hand():
    args, batch, actor, d = make_args("qvpo"), make_batch(), make_actor(), diffusion(4, "cosine")
    draws, state = make_draws(args), make_state(progress=0.4)
    M, K = args.entropy_samples, args.num_samples
    assert draws.uniform.shape == (B, M, A) and draws.chains.shape == (4, B, K, A)
    assert draws.k.shape == (B + B * M, 1) and draws.eps.shape == (B + B * M, A)
    with torch.no_grad():
        regression, info = script.qvpo(smooth_q, actor, batch, draws, state, d, args)
        candidates = script.ddpm_sample(actor, batch.obs, draws.chains, d)
    q = smooth_q(batch.obs, candidates)
    obs, actions, weight = [], [], []
    for i in range(B):
        obs.append(batch.obs[i])
        actions.append(candidates[i, q[i].argmax()])
        weight.append(max(q[i]) - q[i].mean())
    for i, j in itertools.product(range(B), range(M)):
        obs.append(batch.obs[i])
        actions.append(2 * draws.uniform[i, j] - 1)
        weight.append(0.02 * 0.6 * weight[i])
    close(regression.obs, torch.stack(obs))
    close(regression.weight, torch.stack(weight))
    close(regression.a_k, d.mu[draws.k] * torch.stack(actions) + d.sigma[draws.k] * draws.eps)
    close(regression.eps, draws.eps)
    assert (regression.weight > 0).all() and not any(x.requires_grad for x in regression)
    close(info["regression/advantage"], torch.stack(weight[:B]).mean())


def test_qvpo_learns_nothing_where_all_actions_are_alike():
    args, batch, actor, d = make_args("qvpo"), make_batch(), make_actor(), diffusion(4, "cosine")
    q_fn = lambda obs, a: 0 * a.sum(-1) + 3  # noqa: E731
    regression, _ = script.qvpo(q_fn, actor, batch, make_draws(args), make_state(), d, args)
    assert torch.equal(regression.weight, torch.zeros(B * 6, dtype=F64))


@pytest.mark.parametrize(("progress", "coef"), [(0.0, 0.02), (0.5, 0.01), (0.95, 0.002), (1.0, 0.002)])
def test_the_weight_of_uniform_actions_falls_to_its_floor(progress, coef):
    args, batch, d = make_args("qvpo"), make_batch(), diffusion(4, "cosine")
    regression, _ = script.qvpo(smooth_q, make_actor(), batch, make_draws(args), make_state(progress=progress), d, args)
    close(regression.weight[B : B + 5], coef * regression.weight[0].expand(5))


def test_a_weight_that_begins_below_its_floor_stays_where_it_is():
    batch, d = make_batch(), diffusion(4, "cosine")
    for coef in 0.0, 0.001:
        args = make_args("qvpo", entropy_coef=coef)
        state = make_state(progress=0.0)
        regression, _ = script.qvpo(smooth_q, make_actor(), batch, make_draws(args), state, d, args)
        close(regression.weight[B : B + 5], coef * regression.weight[0].expand(5))


# The agent
def test_draws_are_uniform_steps_and_normal_noise():
    args = make_args("sdac", num_diffusion_steps=4, num_samples=2)
    torch.manual_seed(0)
    draws = script.draw(args, 40_000, 1, "cpu")
    counts = torch.bincount(draws.k.flatten(), minlength=6).tolist()
    assert counts[0] == counts[5] == 0 and all(abs(count - 10_000) < 450 for count in counts[1:5])
    assert draws.eps.mean().abs() < 0.03 and abs(draws.eps.std() - 1) < 0.02
    assert draws.uniform.dtype == F64 and draws.chains.numel() == 0
    for method in ("dpmd", "qsm", "dipo"):
        draws = script.draw(make_args(method), B, A, "cpu")
        assert draws.uniform.numel() == draws.chains.numel() == 0 and draws.eps.shape == (B, A)
    chains = script.draw(make_args("qvpo", num_samples=64), B, A, "cpu").chains
    assert chains.mean().abs() < 0.05 and abs(chains.std() - 1) < 0.05


def recorded_update(agent, batch, policy_is_due=True):
    """One update: what its functions were given and gave back."""
    seen = types.SimpleNamespace()
    method = agent.method

    def best_of_n(eps_fn, q_fn, obs, noise, d):
        seen.bootstrap_policy, seen.noise = eps_fn, noise
        seen.chosen, seen.candidates = script.best_of_n(eps_fn, q_fn, obs, noise, d)
        seen.bootstrap_obs = obs
        critics = {"online": agent.critic, "target": agent.target_critic}
        seen.twins = {name: critic(obs, seen.candidates).detach() for name, critic in critics.items()}
        return seen.chosen, seen.candidates

    def critic_loss(*inputs):
        seen.critics, seen.next_actions = inputs[:2], inputs[3]
        return script.critic_loss(*inputs)

    def recorded_method(q_fn, eps_fn, *inputs):
        seen.critic = [parameter.detach().clone() for parameter in agent.critic.parameters()]
        seen.q = q_fn(batch.obs, batch.actions.unsqueeze(1)).detach()
        seen.eps_fn, seen.inputs = eps_fn, inputs
        seen.regression, info = method(q_fn, eps_fn, *inputs)
        return seen.regression, info

    agent.best_of_n, agent.critic_loss, agent.method = best_of_n, critic_loss, recorded_method
    seen.info = agent.update(batch, policy_is_due)
    return seen


# as published, under the protocol of SOM
STRUCTURE = {  # bootstrap, acting, pooling of the twins, std of the noise
    "sdac": ("online", "target", "min", 0.5), "dpmd": ("online", "target", "min", 0.5),
    "qsm": ("online", "online", "mean", 0.1), "dipo": ("target", "online", "min", 0.0),
    "qvpo": ("target", "online", "min", 0.0),
}  # fmt: skip


def pooled(twins, how):
    return (twins[0] + twins[1]) / 2 if how == "mean" else torch.minimum(twins[0], twins[1])


def scattered(agent):
    """The agent with moving averages that are not the networks that they follow."""
    torch.manual_seed(9)
    for network in (agent.target_actor, agent.target_critic):
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return agent


@pytest.mark.parametrize("method", METHODS)
def test_an_update_is_made_of_its_method(method):
    bootstrap, _, pooling, std = STRUCTURE[method]
    agent, batch = scattered(make_agent(method, q_lr=1e-3)), make_batch(dtype=torch.float32)
    start = scattered(make_agent(method))
    before = {name: [*getattr(start, name).parameters()] for name in ("actor", "critic", "target_actor")}
    seen = recorded_update(agent, batch)
    # a' is the best of N, by the critics of the same name, and noise
    assert seen.bootstrap_policy is (agent.actor if bootstrap == "online" else agent.target_actor)
    assert seen.bootstrap_obs is batch.next_obs and seen.noise.shape == (4, B, 4, A)
    best = pooled(seen.twins[bootstrap], pooling).argmax(dim=1)
    close(seen.chosen, seen.candidates[torch.arange(B), best], atol=0, rtol=0)
    assert seen.critics == (agent.critic, agent.target_critic)
    assert seen.next_actions.abs().max() <= 1 and not seen.next_actions.requires_grad
    assert torch.equal(seen.next_actions, seen.chosen.clamp(-1, 1)) == (std == 0)
    # the critic moved by Adam's first step, against the gradient of its loss
    loss, _ = script.critic_loss(start.critic, start.target_critic, batch, seen.next_actions, agent.args)
    gradient = torch.autograd.grad(loss, before["critic"])
    for new, old, g in zip(seen.critic, before["critic"], gradient, strict=True):
        large = g.abs() > 1e-5
        close((new - old.detach())[large], -1e-3 * g.sign()[large], atol=1e-6, rtol=2e-3)
    # the regression is made with the critic as it now is, which the policy's step leaves alone
    given, _, state, d, args = seen.inputs
    assert given.next_actions is seen.next_actions and given.obs is batch.obs and args is agent.args
    assert seen.eps_fn is agent.actor and d is agent.diffusion
    assert not any(x.requires_grad for x in seen.regression)
    close([x.detach() for x in agent.critic.parameters()], seen.critic, atol=0, rtol=0)
    assert any(not torch.equal(x, y) for x, y in zip(seen.critic, before["critic"], strict=True))
    with torch.no_grad():
        close(seen.q, pooled(agent.critic(batch.obs, batch.actions.unsqueeze(1)), pooling), atol=1e-6, rtol=0)
    close(state.lam, torch.tensor(5.0 if args.autotune else 1.0))
    assert state.q_stats is agent.q_stats and state.progress is agent.progress
    assert seen.noise.mean().abs() < 0.25 and abs(seen.noise.std() - 1) < 0.2
    # the policy moved by Adam's first step, against the gradient of the loss of this very regression
    actor = make_agent(method).actor
    loss, _ = script.denoising_loss(actor, seen.regression)
    close(seen.info["losses/actor_loss"], loss.detach(), atol=1e-6, rtol=1e-5)
    gradient = torch.autograd.grad(loss, [*actor.parameters()])
    for new, old, g in zip(agent.actor.parameters(), before["actor"], gradient, strict=True):
        large = g.abs() > 1e-5
        close((new - old)[large], -args.policy_lr * g.sign()[large], atol=1e-6, rtol=2e-3)
    # and the averages followed
    averages = {"target_actor": agent.actor.parameters(), "target_critic": agent.critic.parameters()}
    for name, followed in averages.items():
        networks = (getattr(agent, name).parameters(), getattr(start, name).parameters(), followed)
        for new, old, online in zip(*networks, strict=True):
            close(new.detach(), old.detach() + 0.005 * (online.detach() - old.detach()), atol=1e-7, rtol=0)
    scalars = {name: value for name, value in seen.info.items() if name != "best_actions"}
    assert all(value.ndim == 0 and torch.isfinite(value) and not value.requires_grad for value in scalars.values())
    assert ("best_actions" in seen.info) == (method == "dipo")
    close(seen.info["actions/candidate_std"], seen.candidates.std(dim=1, correction=0).mean())
    close(seen.info["actions/saturated"], (seen.candidates.abs() > 0.99).float().mean())


@pytest.mark.parametrize("method", METHODS)
def test_policy_and_averages_move_when_they_are_due(method):
    agent, start, batch = make_agent(method), make_agent(method), make_batch(dtype=torch.float32)
    info = agent.update(batch, policy_is_due=False)
    assert "losses/qf_loss" in info and "losses/actor_loss" not in info
    for name in ("actor", "target_actor", "target_critic"):
        close(getattr(agent, name).state_dict(), getattr(start, name).state_dict(), atol=0, rtol=0)
    close(agent.q_stats, start.q_stats, atol=0, rtol=0)
    assert not torch.equal(agent.critic.weights[0], start.critic.weights[0])
    agent.update(batch)
    for name in ("actor", "target_actor", "target_critic"):
        assert not torch.equal(getattr(agent, name).weights[0], getattr(start, name).weights[0])
    assert torch.equal(agent.q_stats, start.q_stats) == (method != "dpmd")


@pytest.mark.parametrize("method", METHODS)
def test_acting_and_exploring(method):
    _, acting, pooling, std = STRUCTURE[method]
    agent, obs = scattered(make_agent(method)), randn(B, O, seed=0).float()
    actor = agent.target_actor if acting == "target" else agent.actor
    for explore, N in {False: 3, True: 4}.items():
        torch.manual_seed(1)
        noise = torch.randn(4, B, N, A)
        with torch.no_grad():
            candidates = script.ddpm_sample(actor, obs, noise, agent.diffusion)
            best = pooled(agent.critic(obs, candidates), pooling).argmax(dim=1)
            expected = candidates[torch.arange(B), best]
            if explore:
                expected = (expected + std * torch.randn(B, A)).clamp(-1, 1)
        torch.manual_seed(1)
        a, all_candidates = agent.act(obs, explore=explore)
        close((a, all_candidates), (expected, candidates), atol=1e-5, rtol=0)
        assert a.abs().max() <= 1 and not a.requires_grad


def test_lambda_follows_its_schedule():
    """From 5 to about 0.98, whatever the policy does: the noise has 0.1 lambda. The steps are Adam's."""
    agent = make_agent("sdac")
    log_lambda = torch.tensor(math.log(5), requires_grad=True)
    optimizer = torch.optim.Adam([log_lambda], lr=7e-3)
    for _ in range(300):
        agent.update_lambda()
        entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.1) + log_lambda.item()
        log_lambda.grad = torch.tensor(entropy + 0.9)
        optimizer.step()
    assert agent.log_lambda.exp().item() == pytest.approx(1.24, abs=0.01)
    assert agent.log_lambda.item() == pytest.approx(log_lambda.item(), abs=1e-4)
    target = math.exp(-0.9) / (0.1 * math.sqrt(2 * math.pi * math.e))
    assert target == pytest.approx(0.98, abs=0.005)
    for _ in range(400):
        agent.update_lambda()
    assert agent.log_lambda.exp().item() == pytest.approx(target, rel=0.02)


META = torch.device("meta")  # shapes without values: to read one, or to mix devices, is an error


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_computed_on_the_training_device(method):
    changes = {"num_envs": 4, "buffer_size": 20, "total_timesteps": 1000, "checkpoint_frequency": 20}
    agent = make_agent(method, device=META, **changes)
    for optimizer in agent.optimizers.values():
        optimizer.param_groups[0]["fused"] = False  # the fused one does not know this device
    rb = script.ReplayBuffer(agent.args, O, A, META, None, 0)
    inbox = torch.zeros(4, rb.row_width + O, device=META)
    actions = [script.add_and_act(agent, rb, inbox) for _ in range(3)][-1]
    info = script.sample_and_update(agent, rb, True)
    assert "losses/actor_loss" not in script.sample_and_update(agent, rb, False)
    assert "losses/actor_loss" in info and "losses/qf_loss" in info
    assert {x.device.type for x in (actions, *info.values(), *agent.state_dict().values())} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_updates_equal_eager_ones(method):
    # SLOW: the compiler takes its time
    agents = [make_agent(method, compile=compile) for compile in (False, True)]
    for agent in agents:
        torch.manual_seed(2)
        for i in range(3):
            agent.update(make_batch(i, torch.float32))
    eager, compiled = ([*agent.parameters()] for agent in agents)
    assert (eager[0] - make_agent(method).actor.weights[0]).abs().max() > 1e-4
    close(compiled, eager, atol=1e-5, rtol=0)


# One state, one coordinate and a critic that is known: where the methods end
GRID = torch.linspace(-1, 1, 401, dtype=F64)


def two_hills(obs, a):
    """Of heights 1 and 0.75."""
    hills = torch.exp(-(((a[..., 0] - 0.5) / 0.2) ** 2) / 2), torch.exp(-(((a[..., 0] + 0.5) / 0.2) ** 2) / 2)
    return hills[0] + 0.75 * hills[1]


def one_hill(obs, a):
    return -((a[..., 0] - 0.4) ** 2)


def fitted(method, num_updates, num_steps, num_samples=16, q_fn=two_hills, batch_size=128):
    """Samples (4,000,) of a policy that has seen num_updates regressions on q_fn."""
    sizes = {"num_diffusion_steps": num_steps, "num_samples": num_samples}
    args = dataclasses.replace(script.default_args(method), **sizes)
    torch.manual_seed(0)
    actor = script.DiffusionActor(1, 1, 64, 2)
    d = script.diffusion(num_steps, args.schedule)
    optimizer = torch.optim.Adam(actor.parameters())
    state = script.State(torch.tensor(1.0), torch.tensor([0.0, 1.0]), torch.tensor(0.0))
    obs = torch.zeros(batch_size, 1)
    for i in range(num_updates):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - 0.95 * i / num_updates)
        batch = script.Batch(obs, obs, 2 * torch.rand(batch_size, 1) - 1, None, None)
        with torch.no_grad():
            draws = script.draw(args, batch_size, 1, "cpu")
            regression, _ = script.METHODS[method](q_fn, actor, batch, draws, state, d, args)
        loss, _ = script.denoising_loss(actor, regression)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sampled(actor, d)


def sampled(eps_fn, d):
    num_steps = len(d.mu) - 1
    torch.manual_seed(1)
    with torch.no_grad():
        noise = torch.randn(num_steps, 1, 4000, 1, dtype=d.mu.dtype)
        return script.ddpm_sample(eps_fn, torch.zeros(1, 1), noise, d).flatten()


def test_sdac_ends_at_the_boltzmann_distribution():
    """At what the sampler, in 20 steps, makes of its exact denoiser, by quadrature; the steps alone cost 0.2."""
    d = diffusion(20, "linear")

    def eps_fn(obs, a, k):
        (k,) = set(k.flatten().long().tolist())
        noise = (a - d.mu[k] * GRID) / d.sigma[k]
        weight = (5 * two_hills(None, GRID.unsqueeze(-1)) - noise**2 / 2).softmax(dim=-1)
        return (weight * noise).sum(dim=-1, keepdim=True)

    def histogram(a, **weight):
        counts = torch.histogram(a.double(), 20, range=(-1, 1), **weight).hist
        return counts / counts.sum()

    def distance(a, b):
        return 0.5 * (a - b).abs().sum()

    target = histogram(GRID, weight=torch.exp(5 * two_hills(None, GRID.unsqueeze(-1))))
    exact, a = sampled(eps_fn, d), fitted("sdac", 900, 20, num_samples=32)
    assert distance(histogram(exact), target) < 0.22
    assert distance(histogram(a), histogram(exact)) < 0.25  # at most 0.15 with five seeds
    assert (a > 0).float().mean() == pytest.approx(target[10:].sum().item(), abs=0.08)


def test_qvpo_ends_at_the_highest_action_and_few_uniform_ones():
    a = fitted("qvpo", 250, 10, num_samples=8, batch_size=48)
    assert ((a - 0.5).abs() < 0.2).float().mean() > 0.6
    assert ((a - 0.5).abs() > 0.4).float().mean() > 0.01


def test_qsm_ends_about_the_top():
    """Its score is not smoothed at large sigma, so that it overshoots a narrow hill; this one is wide."""
    a = fitted("qsm", 400, 20, q_fn=one_hill)
    assert a.mean().item() == pytest.approx(0.4, abs=0.1) and 0.05 < a.std() < 0.3


def test_dipo_ends_on_the_hill_that_it_started_from():
    start = torch.linspace(-0.9, 0.9, B, dtype=F64).unsqueeze(1).expand(B, A).contiguous()
    best = start
    for _ in range(10):
        best = run_dipo(two_hills, best, 10)
    hill = torch.where(start[:, 0] > 0, 0.5, -0.5).double()
    close(best[:, 0], hill, atol=0.03, rtol=0)


# What the scripts share
SHARED = """make_env to_box EnsembleMLP QNetwork candidate_info critic_loss make_adam soft_update
    add_and_act CUDAGraph load_policy evaluate exit_with_error env_dimensions warn check_compiler
    check_finite writing map_file lock_run write_file save_checkpoint load_checkpoint evaluations_until is_due
    receive_signals""".split()
DIFFERENT = {
    "Args",
    "Agent",
    "ReplayBuffer",
    "best_of_n",
    "sample_and_update",
    "make_policy",
    "check_args",
    "resumed_args",
}


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
    return [function(path.read_text()) for path in (SCRIPT, MFP_SCRIPT)]


def test_shared_functions_are_equal_to_the_letter():
    mine, theirs = both(lambda text: definitions(ast.parse(text), text))
    assert mine.keys() & theirs.keys() == {*SHARED} | DIFFERENT
    assert {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]} == DIFFERENT
    of_noise_0 = ", deterministic=agent.args.deterministic"  # a flag of SOM and MFP
    assert theirs["make_policy"].count(of_noise_0) == 1
    assert mine["make_policy"] == theirs["make_policy"].replace(of_noise_0, "")
    order = [name for name in mine if name in theirs]
    assert order == [name for name in theirs if name in mine]


def test_lambda_is_that_of_som():
    texts = SCRIPT.read_text(), (ROOT / "som_continuous_action.py").read_text()

    def method(text, name):
        (agent,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "Agent")
        return definitions(agent, text)[name]

    for name in ("update_lambda", "descend"):
        mine, theirs = (method(text, name) for text in texts)
        assert mine == theirs, name


def without(text, *lines):
    """The text without these lines, which it has."""
    for line in lines:
        assert text.count(line) == 1, line
        text = text.replace(line, "")
    return text


def test_the_replay_buffer_is_that_of_mfp_and_a_second_one():
    mine, theirs = both(lambda text: definitions(ast.parse(text), text)["ReplayBuffer"])
    added = re.findall(
        r"(?m)^.*(?:best_actions|transitions = |actions = |DIPO).*\n|^.*of no use to the other.*\n", mine
    )
    left = mine
    for line in added:
        left = left.replace(line, "", 1)
    expected = theirs
    expected = without(
        expected, "        return Batch(obs, next_obs, actions, rewards.squeeze(1), terminated.squeeze(1))\n"
    )
    assert re.sub(r"\n+", "\n", left).strip() == re.sub(r"\n+", "\n", expected).strip()
    assert len(added) <= 9


def test_the_main_blocks_are_equal_but_for_the_methods():
    mine, theirs = both(lambda text: text[text.index('if __name__ == "__main__":') :])
    changes = {
        '    if args.preset == "laptop":\n        args = tyro.cli(Args, default=Args(preset="laptop", **LAPTOP))\n': (
            "    args = tyro.cli(Args, default=default_args(args.method, args.preset))\n"
        ),
        'project="mfp"': 'project="diffusion"',
        '{"best_of_n": args.best_of_n, "deterministic": args.deterministic}': (
            '{"eval_best_of_n": args.eval_best_of_n, "policy_q": args.policy_q, "acting": args.acting}'
        ),
        "agent.actor.": "agent.acting_actor().",
    }
    for words, other in changes.items():
        assert theirs.count(words) == 1, words
        theirs = theirs.replace(words, other)
    of_methods = re.compile(
        r"args\.autotune|agent\.(log_lambda|update_lambda|progress)\b|best_actions|# flags count more"
    )
    lines = mine.splitlines()
    left = [line for line in lines if not of_methods.search(line)]
    assert left == theirs.splitlines() and len(lines) - len(left) == 8


def test_the_rest_of_the_scripts_is_equal_to_the_letter():
    mine, theirs = both(lambda text: text[: text.index('"""')])
    assert mine == theirs
    mine, theirs = both(lambda text: text[text.index("\nimport ") : text.index("CHECKPOINT_FORMAT")])
    assert mine == theirs
    mine, theirs = both(lambda text: re.findall(r"(?m)^\s*# ((?:ALGO LOGIC|TRY NOT)[^\n]*)", text))
    assert mine == theirs and len(mine) == 8


# The flags
def test_the_methods_stand_side_by_side():
    text = SCRIPT.read_text()
    tree = ast.parse(text)
    sources = definitions(tree, text)
    signatures = {re.search(r"\((.*)\)", sources[name].splitlines()[0]).group(1) for name in METHODS}
    assert signatures == {"q_fn, eps_fn, batch, draws, state, d, args"}
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = names.index("sdac")
    assert tuple(names[first : first + 5]) == METHODS == tuple(script.METHODS) == tuple(script.PRESETS)
    assert sum(len(sources[name].splitlines()) for name in METHODS) <= 150


def test_defaults_are_those_of_sdac_and_table_3():
    assert script.default_args("sdac") == script.Args()
    table = {"buffer_size": 10**6, "learning_starts": 30_000, "batch_size": 256, "gamma": 0.99, "tau": 0.005}
    table |= {"reward_scale": 0.2, "num_layers": 3, "hidden_dim": 256, "policy_lr": 3e-4, "q_lr": 3e-4}
    table |= {"alpha_lr": 7e-3, "alpha_delay": 250, "noise_scale": 0.1, "num_diffusion_steps": 20, "best_of_n": 32}
    args = script.Args()
    assert {name: getattr(args, name) for name in table} == table
    for method in METHODS:
        args = script.default_args(method)
        bootstrap, acting, pooling, std = STRUCTURE[method]
        assert (args.bootstrap, args.acting, args.policy_q) == (bootstrap, acting, pooling)
        assert args.noise_scale * (args.initial_lambda if args.autotune else 1) == std
        assert args.num_diffusion_steps == (100 if method == "dipo" else 20)
        assert args.best_of_n == {"dipo": 1, "qvpo": 4}.get(method, 32)
        assert args.eval_best_of_n == (1 if method == "dipo" else 32)
        assert args.policy_frequency == (1 if method in ("qsm", "dipo") else 2)
        assert args.exp_name == args.method == method
    assert script.default_args("dipo").action_steps == 30


def test_the_preset_is_that_of_mfp_but_for_the_methods():
    own = {"num_diffusion_steps": 10, "best_of_n": 4, "eval_best_of_n": 4, "num_samples": 16, "action_steps": 10}
    own |= {"policy_frequency": 1, "autotune": False}  # as som_continuous_action.py has them there
    theirs = {name: value for name, value in mfp.LAPTOP.items() if name not in ("best_of_n", "noise_scale")}
    assert script.LAPTOP == theirs | own
    for method in METHODS:
        args = script.default_args(method, "laptop")
        expected = script.LAPTOP | script.LAPTOP_OWN.get(method, {})
        assert {name: getattr(args, name) for name in expected} == expected
        assert args.preset == "laptop" and args.noise_scale == (0 if method in ("dipo", "qvpo") else 0.1)
        assert args.schedule == script.default_args(method).schedule
        assert args.num_diffusion_steps * args.best_of_n == (80 if method == "qsm" else 40)
        assert args.autotune == (method == "dpmd")
        assert args.best_of_n == args.eval_best_of_n == (1 if method == "dipo" else 4)


def test_dpmds_lambda_in_a_run_of_the_preset():
    """It falls from 5 to 1.7 in the first half of the updates and to 1.1 in all, as docs/baselines.md says."""
    args = script.default_args("dpmd", "laptop")
    num_updates = (args.total_timesteps - args.learning_starts) // args.num_envs
    agent = script.Agent(args, 2, 1, torch.device("cpu"))
    lambdas = [agent.log_lambda.exp().item()]
    for _ in range(num_updates // args.alpha_delay):
        agent.update_lambda()
        lambdas.append(agent.log_lambda.exp().item())
    half = lambdas[len(lambdas) // 2]
    assert [lambdas[0], half, lambdas[-1]] == pytest.approx([5, 1.7, 1.1], abs=0.05)


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(script.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(script.Args):
        assert field.name in read, f"{field.name} has no reader"
        for method, preset in itertools.product(METHODS, (None, "laptop")):
            value, hint = getattr(script.default_args(method, preset), field.name), hints[field.name]
            optional = [x for x in typing.get_args(hint) if typing.get_origin(x) is typing.Literal]
            if typing.get_origin(hint) is typing.Literal:
                assert value in typing.get_args(hint)
            elif not optional:
                assert type(value) in (hint, type(None)), field.name


def test_shared_flags_are_described_alike():
    comment = re.compile(r"(?m)^    (\w+): [^\n]*?  (# [^\n]*)")
    mine, theirs = both(lambda text: dict(comment.findall(text[: text.index("\nLAPTOP")])))
    assert mine.keys() == {field.name for field in dataclasses.fields(script.Args)}
    described = {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]}
    assert described == {"exp_name", "best_of_n", "policy_frequency", "noise_scale", "num_frequencies", "tau"}
    assert {*script.FLAGS_OF_METHODS} <= mine.keys()
    for name, methods in script.FLAGS_OF_METHODS.items():
        assert set(methods) < set(METHODS)
        assert all(method.upper() in mine[name] for method in methods), name


def test_the_script_is_easy_to_read():
    source = SCRIPT.read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    counts = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.type == tokenize.STRING and token.string.startswith('"""')
        if token.type not in skipped and not docstring:
            counts[token.start[0]] = counts.get(token.start[0], 0) + 1
    assert sum(counts.values()) / len(counts) <= 12
    assert sum(count >= 25 for count in counts.values()) <= 35
    assert sum(len(line) > 100 for line in source.splitlines()) <= 70
    assert not re.search(r"TODO|FIXME|XXX|NotImplemented|/tmp|/home|/work", source)
    tree = ast.parse(source)
    for name in ("sdac", "propose", "ddpm_sample", "best_of_n", "denoising_loss", "diffusion", *METHODS):
        (node,) = (node for node in tree.body if getattr(node, "name", "") == name)
        assert ast.get_docstring(node), name


# The script as a user runs it
class ClockEnv(gym.Env):
    """Episodes of 5 steps that begin alike; its observations are the time and the last action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t, *action]), float(action.sum()), False, self.t == 5, {}


gym.register("DiffusionClock-v0", ClockEnv, disable_env_checker=True, max_episode_steps=100)


@pytest.fixture(autouse=True)
def handlers():
    """The script, run in this process, takes over SIGINT and SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_loop(tmp_path):
    """Runs the script as __main__ in this process; returns its variables."""

    def run(*flags):
        locked, flock = [], fcntl.flock
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
            patch.setattr(fcntl, "flock", lambda file, operation: (locked.append(file), flock(file, operation)))
            try:
                variables = types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))
                variables.writer.close()
                variables.run_folder = tmp_path / variables.run_folder
            finally:
                for file in locked:  # as at the end of a process
                    file.close()
        return variables

    return run


def scalars(run_folder):
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


OF_METHOD = {
    "sdac": "effective_sample_size", "dpmd": "effective_sample_size", "qsm": "q_gradient", "dipo": "distance",
    "qvpo": "advantage",
}  # fmt: skip


def test_qvpos_progress_is_the_share_of_the_run(run_loop, monkeypatch):
    seen, fill = [], torch.Tensor.fill_

    def recorded(x, value):
        seen.append(value)
        return fill(x, value)

    monkeypatch.setattr(torch.Tensor, "fill_", recorded)
    run_loop(*tiny("qvpo"), *"--env-id DiffusionClock-v0 --total-timesteps 60 --num-episodes 1".split())
    shares = [step / 60 for step in range(2, 61, 2)]
    assert [value for value in seen if value in shares] == [step / 60 for step in range(42, 61, 2)]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_exactly_where_it_was(run_loop, method):
    clock = "--env-id DiffusionClock-v0 --eval-frequency 60 --checkpoint-frequency 20 --num-episodes 2".split()
    flags = [*tiny(method), *clock, "--buffer-size", "90"]
    if method == "qvpo":  # whose weight of uniform actions knows the end of the run, which is not the same here
        flags += ["--final-entropy-coef", "0.02"]
    whole = run_loop(*flags, "--total-timesteps", "180")
    first = run_loop(*flags, "--total-timesteps", "120")
    assert whole.num_updates == 70 and whole.args.method == whole.args.exp_name == method
    # killed after the checkpoint at step 100: what came later is made anew
    (first.run_folder / "checkpoint_0000000120.pt").unlink()
    torch.manual_seed(12345)
    again = run_loop("--resume", first.run_folder, "--total-timesteps", "180")
    assert again.start_step == 100 and again.args.method == method and again.num_updates == 70
    close(again.agent.state_dict(), whole.agent.state_dict(), atol=0, rtol=0)
    assert not torch.equal(first.agent.actor.weights[0], again.agent.actor.weights[0])
    for name, optimizer in again.agent.optimizers.items():
        moments, expected = optimizer.state_dict()["state"], whole.agent.optimizers[name].state_dict()["state"]
        close(moments, expected, atol=0, rtol=0)
    close(again.rb.rows, whole.rb.rows, atol=0, rtol=0)
    close(again.rb.best_actions, whole.rb.best_actions, atol=0, rtol=0)
    if method == "dipo":
        moved = (whole.rb.best_actions - whole.rb.rows[:, 8:10]).abs().amax(dim=1)
        assert (moved > 0.02).float().mean() > 0.4
    rows = [[line.split(",")[:4] for line in run.evaluations] for run in (again, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    logged = scalars(whole.run_folder)
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert logged.keys() >= {
        "charts/episodic_return", "charts/eval_return", "charts/SPS", "losses/qf_loss", "losses/actor_loss",
        f"regression/{OF_METHOD[method]}", "regression/weight", "actions/candidate_std", "losses/lambda",
    }  # fmt: skip
    taken = {
        name: int(x.state_dict()["state"][0]["step"])
        for name, x in whole.agent.optimizers.items()
        if x.state_dict()["state"]
    }
    assert taken == {"critic": 70, "actor": 70 // whole.args.policy_frequency}
    with pytest.raises(SystemExit) as stop:
        run_loop("--evaluate", whole.run_folder)
    assert not stop.value.code
    assert whole.agent.progress == 1


def test_an_evaluation_takes_what_changes_how_the_policy_acts(run_loop, capsys):
    run = run_loop(*tiny("sdac"), "--env-id", "Pendulum-v1")

    def evaluation(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run_loop("--evaluate", run.run_folder, "--num-episodes", "2", *flags)
        return capsys.readouterr().out

    assert evaluation() == evaluation("--acting", "target", "--policy-q", "min")
    flags = ["--acting", "online"], ["--policy-q", "mean"], ["--eval-best-of-n", "1"]
    assert all(evaluation(*words) != evaluation() for words in flags)


def test_halfcheetah_as_a_user_runs_it(tmp_path):
    flags = [*tiny("dipo"), "--num-episodes", "1", "--save-model"]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--env-id", "HalfCheetah-v4", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert run_folder.name.startswith("HalfCheetah-v4__dipo__1__")
    config = json.loads((run_folder / "config.json").read_text())
    assert config["method"] == "dipo" and config["script"] == SCRIPT.name and config["schedule"] == "cosine"
    rows = list(csv.DictReader((run_folder / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [100, 200]
    model = torch.load(run_folder / "model.pt", weights_only=True)
    assert model["config"] == config
    script.DiffusionActor(17, 6, 16, 3).load_state_dict(model["actor"])
    script.QNetwork(2, 17, 6, 1, 16, 3).load_state_dict(model["critic"])


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("sdac", "--proposals clipped --alpha-delay 3"), ("dpmd", "--dpmd-norm released --updates-per-step 2"),
        ("qvpo", "--bootstrap online --acting target --policy-q mean --schedule linear"),
    ],
)  # fmt: skip
def test_every_variant_trains(run_loop, method, flags):
    run = run_loop(*tiny(method), "--env-id", "Pendulum-v1", "--eval-frequency", "200", *flags.split())
    logged = scalars(run.run_folder)
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert run.num_updates == 80 * run.args.updates_per_step
    steps_of_lambda = run.agent.optimizers["lambda"].state_dict()["state"]
    assert (int(steps_of_lambda[0]["step"]) == 26) if method == "sdac" else not steps_of_lambda


def test_preset_and_load_policy(run_loop, monkeypatch):
    flags = (
        "--method qvpo --preset laptop --env-id Pendulum-v1 --learning-starts 40 --total-timesteps 80 --num-samples 4"
    )
    run = run_loop(*flags.split(), "--num-episodes", "2", "--device", "cpu")
    config = json.loads((run.run_folder / "config.json").read_text())
    overridden = {"learning_starts": 40, "total_timesteps": 80, "num_samples": 4}
    assert {name: config[name] for name in script.LAPTOP} == script.LAPTOP | overridden
    assert config["bootstrap"] == "target" and config["exp_name"] == "qvpo"  # of the method

    policy = script.load_policy(run.run_folder)
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    torch.manual_seed(3)
    noise = torch.randn(10, 1, 4, 1)
    with torch.no_grad():
        obs = torch.as_tensor(observation).unsqueeze(0)
        candidates = script.ddpm_sample(run.agent.actor, obs, noise, script.diffusion(10, "cosine"))
        best = candidates[0, run.agent.critic(obs, candidates).amin(dim=0).argmax()]
    torch.manual_seed(3)
    action = policy(observation)
    np.testing.assert_allclose(action, 2 * best.numpy(), rtol=1e-5)  # its actions are torques in [-2, 2]
    env.step(action)
    many = script.load_policy(run.run_folder, eval_best_of_n=9)(np.stack([observation, observation]))
    assert many.shape == (2, 1) and many.dtype == env.action_space.dtype and np.abs(many).max() <= 2


def test_without_its_buffer_a_resumed_run_fills_it_anew(run_loop):
    clock = "--env-id DiffusionClock-v0 --total-timesteps 120 --num-episodes 1".split()
    run = run_loop(*tiny("dipo"), *clock, "--no-checkpoint-buffer")
    again = run_loop("--resume", run.run_folder, "--total-timesteps", "180")
    assert again.num_added == 60 and again.num_updates == run.num_updates + 10
    assert not again.rb.best_actions[60:].any() and again.rb.best_actions[:58].any(dim=1).all()


BAD_NUMBERS = {
    "--total-timesteps": "0", "--num-envs": "-1", "--learning-starts": "-5", "--buffer-size": "0", "--batch-size": "0",
    "--updates-per-step": "0", "--policy-frequency": "0", "--gamma": "1.5", "--tau": "1.5", "--reward-scale": "0",
    "--policy-lr": "-1e-4", "--q-lr": "nan", "--hidden-dim": "0", "--num-layers": "0", "--best-of-n": "0",
    "--eval-best-of-n": "0", "--checkpoint-frequency": "0", "--num-episodes": "0", "--num-frequencies": "0",
    "--noise-scale": "-1", "--eval-frequency": "0", "--seed": "-1", "--num-diffusion-steps": "0",
    "--initial-lambda": "0", "--alpha-lr": "0", "--alpha-delay": "0", "--target-entropy": "nan",
    "--num-samples": "0", "--inverse-temperature": "-5", "--qsm-scale": "0", "--action-steps": "0", "--action-lr": "0",
    "--entropy-samples": "-1", "--entropy-coef": "-1", "--final-entropy-coef": "-1",
}  # fmt: skip


def refused(run_loop, tmp_path, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        run_loop(*flags)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2, message
    assert not any(tmp_path.iterdir())  # nothing was created
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_bad_numbers_are_refused(capsys, flag):
    name = flag[2:].replace("-", "_")
    (method, *_) = script.FLAGS_OF_METHODS.get(name, ["sdac"])
    args = dataclasses.replace(script.default_args(method), env_id="Pendulum-v1")
    kind = {field.name: field.type for field in dataclasses.fields(script.Args)}[name]
    with pytest.raises(SystemExit) as stop:
        script.check_args(dataclasses.replace(args, **{name: kind(BAD_NUMBERS[flag])}))
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1
    assert flag in message


def test_every_number_has_a_bad_value_above():
    numbers = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(script.Args) if f.type in (int, float)}
    assert numbers == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Pendulum-v1 --qsm-scale 5", "--qsm-scale has no effect: --method sdac does not use it"),
        ("--env-id Pendulum-v1 --method qsm --num-samples 5", "--num-samples has no effect"),
        ("--env-id Pendulum-v1 --method dipo --preset laptop --dpmd-norm released", "--dpmd-norm has no effect"),
        ("--env-id Pendulum-v1 --noise-scale 0", "--no-autotune"),
        ("--env-id Pendulum-v1 --batch-size 0", "--batch-size cannot be 0"),
        ("--env-id Walker3d-v4", "Did you mean: `Walker2d`"),
        ("--env-id CartPole-v1", "supported are flat vectors"),
        ("--env-id Pendulum-v1 --learning-starts 5000000", "--learning-starts"),
        ("--env-id Pendulum-v1 --device gpu", "finds no GPU"),
        ("--resume nowhere", "nowhere cannot be used"),
    ],
)
def test_bad_input_is_refused(run_loop, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in refused(run_loop, tmp_path, capsys, *flags.split())


def test_what_cannot_change_is_refused(run_loop, capsys):
    clock = "--env-id DiffusionClock-v0 --total-timesteps 44 --num-episodes 1".split()
    run = run_loop(*tiny("dpmd"), *clock)
    more = "--resume", run.run_folder, "--total-timesteps", "60"
    for flag, value in {
        "--method": "sdac", "--schedule": "vp", "--num-diffusion-steps": "4", "--hidden-dim": "32", "--q-lr": "1",
        "--num-frequencies": "3", "--preset": "laptop",
    }.items():  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_loop(*more, flag, value)
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and len(message.splitlines()) == 1
        assert flag in message and "cannot change" in message
    again = run_loop(*more)
    assert again.num_updates == run.num_updates + 8 and again.args.method == "dpmd"


def test_unknown_words_are_refused():
    for flags in (["--no-such-flag"], ["--method", "dacer"], ["--score-scale", "5"], ["--dpmd-norm", "none"]):
        with pytest.raises(SystemExit) as stop:
            tyro.cli(script.Args, args=flags)
        assert stop.value.code == 2
