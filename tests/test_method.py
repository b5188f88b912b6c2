"""The method against closed forms, finite differences and plain autograd.

torch.compile takes half a minute; leave it out with: pytest -k "not compile"
"""

import copy
import io
import math
from functools import partial
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import som_continuous_action as som

F64 = torch.float64
VP = partial(som.vp_schedule, beta_min=0.1, beta_max=2.0)
VE = partial(som.ve_schedule, sigma_min=0.05, sigma_max=2.0)
SCHEDULES = {"vp": VP, "ve": VE, "cosine": som.cosine_schedule}
# the path's schedule, the reference measure of the target
PATHS = {"vp": (VP, "uniform"), "ve": (VE, "uniform"), "prior": (som.cosine_schedule, "prior")}


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=1e-10, rtol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def log_normal(a):
    return -0.5 * a.square().sum(-1) - 0.5 * a.shape[-1] * math.log(2 * math.pi)


class Mixture:
    """sum_k w_k N(m_k, S_k): weights (M,), means (M, A), covariances (M, A, A)."""

    def __init__(self, weights, means, covs):
        self.weights, self.means, self.covs = weights, means, covs
        self.precisions, self.whiten = torch.linalg.inv(covs), torch.linalg.inv(torch.linalg.cholesky(covs))

    def log_joint(self, a):  # (..., A) -> (..., M)
        parts = zip(self.weights, self.means, self.whiten, strict=True)
        return torch.stack([w.log() + log_normal((a - m) @ L.T) + L.diagonal().log().sum() for w, m, L in parts], -1)

    def log_prob(self, a):
        return self.log_joint(a).logsumexp(-1)

    def responsibilities(self, a):
        return self.log_joint(a).softmax(-1)

    def score(self, a):  # (B, A) -> (B, A), sum_k resp_k S_k^-1 (m_k - a)
        pulls = torch.einsum("mij,bmj->bmi", self.precisions, self.means - a.unsqueeze(1))
        return (self.responsibilities(a).unsqueeze(-1) * pulls).sum(1)

    def diffused(self, mu, sigma):
        """The law of mu a_0 + sigma eps: sum_k w_k N(mu m_k, mu^2 S_k + sigma^2 I)."""
        identity = torch.eye(self.means.shape[1], dtype=F64)
        return Mixture(self.weights, mu * self.means, mu**2 * self.covs + sigma**2 * identity)

    def moments(self):
        mean = self.weights @ self.means
        second = self.covs + torch.einsum("mi,mj->mij", self.means, self.means)
        return mean, torch.einsum("m,mij->ij", self.weights, second) - torch.outer(mean, mean)

    def sample(self, n, seed):
        k = torch.multinomial(self.weights, n, replacement=True, generator=torch.Generator().manual_seed(seed))
        noise = randn(n, self.means.shape[1], seed=seed + 1)
        return self.means[k] + torch.einsum("bij,bj->bi", torch.linalg.cholesky(self.covs)[k], noise)

    def q_fn(self, alpha, reference):
        """The Q whose target p_0 is this mixture at inverse temperature alpha."""
        base = log_normal if reference == "prior" else lambda a: 0.0
        return lambda obs, a: (self.log_prob(a) - base(a)) / alpha


def random_mixture(dim, seed=0, num_components=3):
    """Rotated components of std 0.5 to 0.9: importance weights of both references are then well behaved."""
    rotations = torch.linalg.qr(randn(num_components, dim, dim, seed=seed)).Q
    stds = 0.5 + 0.4 * rand(num_components, 1, dim, seed=seed + 1)
    weights = 0.2 + rand(num_components, seed=seed + 2)
    scaled = rotations * stds
    return Mixture(weights / weights.sum(), 0.7 * randn(num_components, dim, seed=seed + 3), scaled @ scaled.mT)


# score


# path, dimension, t: bound of the relative RMS error at K = 10,000, 1.5 times the largest measured with three seeds
SCORE_BOUNDS = {
    ("vp", 2, 0.05): 0.0024,
    ("vp", 2, 0.5): 0.023,
    ("vp", 6, 0.05): 0.0026,
    ("vp", 6, 0.5): 0.07,
    ("ve", 2, 0.05): 0.0017,
    ("ve", 2, 0.5): 0.010,
    ("ve", 6, 0.05): 0.0017,
    ("ve", 6, 0.5): 0.018,
    ("prior", 2, 0.05): 0.0015,
    ("prior", 2, 0.5): 0.0086,
    ("prior", 6, 0.05): 0.0015,
    ("prior", 6, 0.5): 0.022,
}


@pytest.mark.parametrize("path, dim, t", SCORE_BOUNDS)
def test_score_converges_to_the_closed_form_of_a_mixture(path, dim, t):
    (schedule, reference), alpha, num_points, num_repeats = PATHS[path], 2.5, 8, 8
    mixture = random_mixture(dim)
    mu, sigma, _, _ = schedule(torch.full((num_points * num_repeats, 1), t, dtype=F64))
    a_t = mu[:num_points] * mixture.sample(num_points, 10) + sigma[:num_points] * randn(num_points, dim, seed=20)
    exact = mixture.diffused(mu[0], sigma[0]).score(a_t).repeat(num_repeats, 1)
    a_t, errors, sizes = a_t.repeat(num_repeats, 1), [], (10, 100, 1000, 10_000)
    for K in sizes:
        eps = randn(len(a_t), K, dim, seed=K)
        q_fn = mixture.q_fn(alpha, reference)
        score, _ = som.estimate_score(q_fn, None, a_t, mu, sigma, eps, alpha, reference, q_norm=None, clip=False)
        errors.append(((score - exact).square().mean() / exact.square().mean()).sqrt().item())
    # K^-1/2; somewhat flatter where, at the wide proposals of 6 dimensions, K = 10 is few
    assert -0.55 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < -0.35
    assert errors[-1] < SCORE_BOUNDS[path, dim, t]


@pytest.mark.parametrize("path", PATHS)
def test_score_of_a_gaussian_is_exact_in_the_limit(path):
    # one coordinate, and the quantiles of the normal in place of random numbers: the limit of large K, without noise
    (schedule, reference), alpha, K = PATHS[path], 3.0, 20_000
    target = Mixture(torch.ones(1, dtype=F64), torch.tensor([[0.4]], dtype=F64), torch.tensor([[[0.36]]], dtype=F64))
    a_t = torch.linspace(-1.5, 1.5, 7, dtype=F64).unsqueeze(1)
    mu, sigma, _, _ = schedule(torch.full_like(a_t, 0.4))
    eps = torch.special.ndtri((torch.arange(K, dtype=F64) + 0.5) / K).expand(len(a_t), K).unsqueeze(2)
    q_fn = target.q_fn(alpha, reference)
    score, _ = som.estimate_score(q_fn, None, a_t, mu, sigma, eps, alpha, reference, clip=False)
    close(score, -(a_t - mu * 0.4) / (mu**2 * 0.36 + sigma**2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("K", (1, 2, 50))
@pytest.mark.parametrize("path", PATHS)
def test_score_of_a_linear_q_is_exact_for_every_k(path, K):
    (schedule, reference), alpha = PATHS[path], 3.0
    c, a_t = randn(4, seed=1), randn(8, 4, seed=2)
    mu, sigma, _, _ = schedule(0.05 + 0.9 * rand(8, 1, seed=3))
    eps = randn(8, K, 4, seed=4)
    score, _ = som.estimate_score(lambda obs, a: a @ c, None, a_t, mu, sigma, eps, alpha, reference, clip=False)
    close(score, alpha * c / mu if reference == "uniform" else -a_t + mu * alpha * c)


def random_mlp(in_dim, out_dim, seed, width=32):
    layers = torch.nn.Linear(in_dim, width), torch.nn.Tanh(), torch.nn.Linear(width, out_dim)
    net = torch.nn.Sequential(*layers).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed + i) / parameter.shape[-1] ** 0.5
    return net


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("q_norm", (None, "batch", "state"))
@pytest.mark.parametrize("path", PATHS)
def test_score_is_autograds_gradient_of_log_sum_exp(path, q_norm, clip):
    (schedule, reference), alpha, B, K, A = PATHS[path], 4.0, 16, 12, 3
    net = random_mlp(2 + A, 1, seed=50)

    def q_fn(obs, a):
        return net(torch.cat([obs.unsqueeze(1).expand(-1, a.shape[1], -1), a], -1)).squeeze(-1)

    obs, a_t, eps = randn(B, 2, seed=1), 0.8 * randn(B, A, seed=2), randn(B, K, A, seed=3)
    mu, sigma, _, _ = schedule(0.1 + 0.8 * rand(B, 1, seed=4))
    leaf = a_t.clone().requires_grad_()
    # one sample at a time
    center, std = (leaf / mu, sigma / mu) if reference == "uniform" else (leaf * mu, sigma)
    samples = torch.stack([center + std * eps[:, k] for k in range(K)], 1)
    outside = samples.abs() > 1
    assert outside.any() and not outside.all()
    if clip:  # outside of the box a constant: no gradient
        samples = torch.where(outside, samples.detach().sign(), samples)
    q = q_fn(obs, samples)
    live_std = torch.ones(()) if q_norm is None else q.std() if q_norm == "batch" else q.std(1).mean()
    std = live_std.item() + (1e-6 if q_norm else 0.0)
    (expected,) = torch.autograd.grad((alpha / std * q).exp().sum(1).log().sum(), leaf, retain_graph=True)
    shift = 0.0 if reference == "uniform" else a_t
    score, logits = som.estimate_score(q_fn, obs, a_t, mu, sigma, eps, alpha, reference, q_norm, clip)
    close(score, expected - shift)
    close(logits, alpha / std * q.detach())
    assert not score.requires_grad and all(parameter.grad is None for parameter in net.parameters())
    if q_norm:  # the check has teeth: a std that is differentiated, too, gives another gradient
        (live,) = torch.autograd.grad((alpha / live_std * q).logsumexp(1).sum(), leaf)
        assert (live - expected).abs().max() > 1e-2


# score of the box


def log_interval(low, high):
    """log of the normal's probability between low and high, from float64 tails."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-torch.exp(lower - upper))


@pytest.mark.parametrize("half_width", (1.0, 2.5))
@pytest.mark.parametrize("std", (0.01, 0.3, 5.0, 300.0))
@pytest.mark.parametrize("distance", (-4.0, -1.0, 0.0, 2.0, 8.0))
def test_samples_of_the_truncated_normal_have_its_quantiles(distance, std, half_width):
    """The mean is `distance` standard deviations (or half widths) outside or inside of the upper face."""
    # the float32 that is used, against the distribution function in float64
    mean = half_width + distance * min(std, half_width)
    K = 1000
    p = (torch.arange(K, dtype=F64) + 0.5) / K
    eps = torch.special.ndtri(p).float().reshape(1, K, 1)
    for sign in (1, -1):
        inputs = torch.full((1, 1), sign * mean), torch.full((1, 1), std)
        a_0 = som.truncated_normal(sign * eps, *inputs, half_width)
        assert a_0.abs().max() <= half_width
        x = (sign * a_0).double().flatten()  # by symmetry the same for both faces
        low, high = torch.tensor((-half_width - mean) / std), torch.tensor((half_width - mean) / std)
        low, high = low.double(), high.double()
        cdf = torch.exp(log_interval(low, (x - mean) / std) - log_interval(low, high))
        # rounding of a sample, as a probability
        rounding = 4e-7 * half_width * torch.exp(-0.5 * ((x - mean) / std) ** 2 - log_interval(low, high)) / std
        assert ((cdf - p).abs() <= 2e-4 + rounding).all()


def box_points(B, A, seed, half_width=1.0):
    """Actions a_0 (B, A), of which half of the coordinates lie at the box's faces, and noise for them."""
    a_0 = half_width * (4 * rand(B, A, seed=seed) - 2)
    return a_0.clamp(-half_width, half_width), randn(B, A, seed=seed + 1)


@pytest.mark.parametrize("alpha", (1.0, 5.0, 50.0))
@pytest.mark.parametrize("A, half_width, num", ((1, 1.0, 8001), (1, 0.5, 8001), (2, 1.0, 151)))
def test_weighted_mean_of_the_box_is_that_of_quadrature(A, half_width, num, alpha):
    """A mixture, cut by the box, to the power alpha. local_variance 0: without the slope of Q."""
    mixture, B, K = random_mixture(A), 6, 8192
    q_fn = lambda obs, a: mixture.log_prob(a)  # noqa: E731
    a_0, eps = box_points(B, A, seed=30, half_width=half_width)
    mc_eps = randn(B, K, A, seed=32)
    axis = half_width * ((torch.arange(num, dtype=F64) + 0.5) / num * 2 - 1)
    grid = torch.cartesian_prod(*A * [axis]).reshape(-1, A)
    num_checked = 0
    for t in (0.04, 0.1, 0.3, 0.6, 0.9, 0.999):
        mu, sigma, f, g2 = som.cosine_schedule(torch.full((B, 1), t, dtype=F64))
        a_t = mu * a_0 + sigma * eps
        score, _ = som.estimate_box_score(
            q_fn, None, a_t, mu, sigma, mc_eps, alpha, None, half_width, local_variance=0.0
        )
        log_proposals = (-0.5 * ((a_t.unsqueeze(1) - mu[0] * grid) / sigma[0]).square().sum(-1)).log_softmax(dim=1)
        log_weights = log_proposals + alpha * mixture.log_prob(grid)
        weights = log_weights.softmax(dim=1)
        mean = weights @ grid
        variance = weights @ grid.square() - mean.square()
        # K independent samples of the proposals have the variance of so many of p_0(a_0|a_t) itself
        num_effective = K / (weights * (weights.log() - log_proposals).exp()).nansum(dim=1)
        standard_error = (variance / num_effective.unsqueeze(1)).sqrt()
        seen = num_effective > 100  # else the samples hardly reach the mode, whatever the code
        error = (sigma**2 * score + a_t) / mu - mean
        assert (error.abs() <= 5 * standard_error + 1e-4)[seen].all()
        num_checked += seen.sum().item()
        # the velocity of the cosine path in terms of the mean
        v = som.pf_ode_velocity(a_t, (mu * mean - a_t) / sigma**2, f, g2)
        close(v, -0.5 * math.pi * (mean - mu * a_t) / sigma, atol=1e-6, rtol=1e-6)
    assert num_checked >= (30 if alpha == 1 else 12)  # of 36


def test_the_two_estimates_of_the_box_are_mixed_by_hand():
    mu, sigma, _, _ = som.cosine_schedule(torch.tensor([[0.1], [0.4], [0.8]], dtype=F64))
    a_t, eps, alpha = 0.3 * randn(3, 2, seed=1), randn(3, 6, 2, seed=2), 2.0
    q_fn = lambda obs, a: -a.square().sum(-1)  # noqa: E731
    score, _ = som.estimate_box_score(q_fn, None, a_t, mu, sigma, eps, alpha)
    a = som.truncated_normal(eps, a_t / mu, sigma / mu)
    weights = (alpha * q_fn(None, a)).softmax(dim=1).unsqueeze(-1)
    weighted_mean = (weights * a).sum(dim=1)
    slope = (a.mean(dim=1) + a.var(dim=1) * (weights * -2 * alpha * a).sum(dim=1)).clamp(-1, 1)
    share = sigma**2 / (sigma**2 + 0.1 * mu**2)
    close((sigma**2 * score + a_t) / mu, share * weighted_mean + (1 - share) * slope)


@pytest.mark.parametrize("alpha, t, bound", ((10.0, 0.02, 0.6), (2.0, 0.1, 0.7)))
def test_the_slope_of_q_serves_where_the_weighted_mean_is_noise(alpha, t, bound):
    """Close to t = 0, 16 samples in six dimensions: the slope brings the estimate nearer to quadrature."""
    B, K, A = 256, 16, 6

    def q_of_coordinates(a):
        return torch.sin(3 * a) + 0.3 * a

    def q_fn(obs, a):  # separable: quadrature in one dimension gives all coordinates
        return q_of_coordinates(a).sum(-1)

    a_0, eps = box_points(B, A, seed=40)
    mu, sigma, _, _ = som.cosine_schedule(torch.full((B, 1), t, dtype=F64))
    a_t = mu * a_0 + sigma * eps
    grid = torch.linspace(-1, 1, 4001, dtype=F64)
    log_weights = alpha * q_of_coordinates(grid) - 0.5 * ((a_t.unsqueeze(2) - mu[0] * grid) / sigma[0]).square()
    exact = log_weights.softmax(dim=2) @ grid  # (B, A)

    def error(**kwargs):
        mc_eps = som.lattice_noise(sobol_points(K, A), rand(B, 1, A, seed=42))
        score, _ = som.estimate_box_score(q_fn, None, a_t, mu, sigma, mc_eps, alpha, **kwargs)
        return ((sigma**2 * score + a_t) / mu - exact).abs().mean().item()

    assert error() < bound * error(local_variance=0.0)


def test_slope_of_a_linear_q_is_exact_inside_the_box():
    alpha, B, A, K = 3.0, 8, 4, 4096
    c = randn(A, seed=1)
    a_0 = 0.8 * rand(B, A, seed=2) - 0.4
    mu, sigma, _, _ = som.cosine_schedule(torch.full((B, 1), 0.02, dtype=F64))
    a_t = mu * a_0 + sigma * randn(B, A, seed=3)
    mc_eps = som.lattice_noise(sobol_points(K, A), rand(B, 1, A, seed=4))
    score, _ = som.estimate_box_score(lambda obs, a: a @ c, None, a_t, mu, sigma, mc_eps, alpha)
    # the faces are more than ten standard deviations away: N(a_t / mu, (sigma / mu)^2) moved by (sigma / mu)^2 alpha c
    exact = a_t / mu + (sigma / mu) ** 2 * alpha * c
    close((sigma**2 * score + a_t) / mu, exact, atol=0.4 * sigma[0].item() / K**0.5, rtol=0)


@pytest.mark.parametrize("num_steps", (0, 3))
@pytest.mark.parametrize("alpha", (1.0, 1e2, 1e6))
def test_velocity_of_the_box_is_bounded_at_any_alpha(alpha, num_steps):
    net, B, A = random_mlp(3, 1, seed=50).float(), 4096, 3
    a_0, eps = box_points(B, A, seed=60)
    mu, sigma, f, g2 = som.cosine_schedule(rand(B, 1, seed=62).float())
    a_t = mu * a_0.float() + sigma * eps.float()
    q_fn = lambda obs, a: 100 * net(a).squeeze(-1)  # noqa: E731
    inputs = (q_fn, None, a_t, mu, sigma, randn(B, 16, A, seed=63).float(), alpha)
    if num_steps > 0:
        score, logits = som.estimate_peak_score(*inputs, num_steps)
    else:
        score, logits = som.estimate_box_score(*inputs)
    assert not score.requires_grad and all(parameter.grad is None for parameter in net.parameters())
    assert logits.shape == (B, 16)
    m = (sigma.clamp(min=1e-3) ** 2 * score + a_t) / mu
    assert (m.abs() * mu <= mu + 1e-5).all()  # inside the box, to rounding
    v = som.pf_ode_velocity(a_t, score, f, g2)
    bound = 0.5 * math.pi * (1 + mu * a_t.abs()) / sigma.clamp(min=1e-3)
    assert (v.abs() <= 1.001 * bound + 1e-3).all()


# the peaks of the posterior


def test_climb_by_hand():
    """The steps of a slope (3, -4): at a small rate its multiples, at a large one 0.5 and 0.25 long, RMS."""
    slope = torch.tensor([3.0, -4.0], dtype=F64)
    start = torch.tensor([[0.0, 0.0], [0.9, 0.5], [1.0, 0.0], [1.0, -1.0]], dtype=F64)
    a = start.expand(2, 4, 2)
    rate = torch.tensor([[0.01], [100.0]], dtype=F64)
    slow, fast = som.climb(lambda a: a @ slope, a, rate, 2)
    direction = slope / 12.5**0.5  # of RMS 1
    close(slow[0], 2 * 0.01 * slope)
    close(fast[0], 0.75 * direction, atol=1e-6)
    # the first step ends at the face, and all of the second is the other coordinate's
    close(fast[1], torch.tensor([1.0, 0.5 + 0.5 * direction[1] - 0.25 * 2**0.5], dtype=F64), atol=1e-6)
    close(fast[2], torch.tensor([1.0, -1.0], dtype=F64), atol=1e-6)  # 0.75 of sqrt(2), and the face
    close(fast[3], a[1, 3])  # in the corner nothing moves
    away = som.climb(lambda a: -a @ slope, a, rate, 1)
    close(away[1, 3], a[1, 3] - 0.5 * direction, atol=1e-6)  # a face holds nobody back who leaves it
    wide = som.climb(lambda a: a @ slope, a, rate, 1, half_width=2.0)
    close(wide[1, 0], direction, atol=1e-6)


def test_the_peak_of_a_linear_q_takes_one_step():
    """exp(alpha c a) N(a_t; mu a, sigma^2) has its peak at a_t / mu + alpha c (sigma / mu)^2."""
    alpha, B, A, K = 20.0, 8, 4, 3
    c = randn(A, seed=1)
    mu, sigma, _, _ = som.cosine_schedule(torch.full((B, 1), 0.05, dtype=F64))
    a_t = mu * (0.8 * rand(B, A, seed=2) - 0.4) + sigma * randn(B, A, seed=3)
    mc_eps = randn(B, K, A, seed=4)
    score, logits = som.estimate_peak_score(lambda obs, a: a @ c, None, a_t, mu, sigma, mc_eps, alpha, 1)
    peak = a_t / mu + (sigma / mu) ** 2 * alpha * c
    close((sigma**2 * score + a_t) / mu, peak)
    height = alpha * peak @ c - 0.5 * ((a_t - mu * peak) / sigma).square().sum(dim=1)
    close(logits, height.unsqueeze(1).expand(B, K))


@pytest.mark.parametrize("alpha", (3.0, 60.0))
def test_the_peak_of_a_quadratic_q(alpha):
    """Q = -c (a - b)^2 has a posterior with one peak, in closed form inside the box and at its faces."""
    B, K, A = 24, 4, 3
    b, c = 1.5 * randn(A, seed=70), 0.5 + rand(A, seed=71)
    q_fn = lambda obs, a: -(c * (a - b).square()).sum(-1)  # noqa: E731
    t = torch.linspace(0.02, 0.999, B, dtype=F64).unsqueeze(1)
    mu, sigma, _, _ = som.cosine_schedule(t)
    a_0, eps = box_points(B, A, seed=72)
    a_t = mu * a_0 + sigma * eps
    peak = (alpha * 2 * c * b + mu * a_t / sigma**2) / (alpha * 2 * c + (mu / sigma) ** 2)
    peak = peak.clamp(-1, 1)
    errors = []
    for num_steps in 3, 30, 300:
        score, logits = som.estimate_peak_score(q_fn, None, a_t, mu, sigma, randn(B, K, A, seed=73), alpha, num_steps)
        assert logits.shape == (B, K)
        m = (sigma**2 * score + a_t) / mu
        errors.append((m - peak).abs().max().item())
    # where Q is curved the steps go to and fro across the peak, as long as the limit is in the end
    assert errors[0] < 0.5 and errors[1] < 0.05 and errors[2] < 0.005


def test_the_field_points_at_the_best_action():
    """Two peaks, the lower one broad: far from t = 0 the field points at the higher one, close to it at either."""
    B, K = 64, 16

    def q_fn(obs, a):
        high = torch.exp(-50 * (a - 0.6).square())
        broad = 0.9 * torch.exp(-4 * (a + 0.5).square())
        return (high + broad).sum(dim=-1)

    start = torch.where(torch.arange(B).unsqueeze(1) % 2 == 0, 0.6, -0.5).to(F64)
    for t, end in ((0.9, torch.full((B, 1), 0.6, dtype=F64)), (0.02, start)):
        mu, sigma, _, _ = som.cosine_schedule(torch.full((B, 1), t, dtype=F64))
        a_t = mu * start + sigma * randn(B, 1, seed=80)
        mc_eps = som.lattice_noise(sobol_points(K, 1), rand(B, 1, 1, seed=81))
        score, _ = som.estimate_peak_score(q_fn, None, a_t, mu, sigma, mc_eps, 200.0, 8)
        m = (sigma**2 * score + a_t) / mu
        assert ((m - end).abs() < 0.15).double().mean() > 0.95


@pytest.mark.parametrize("q_norm", ("batch", "state"))
def test_peaks_do_not_depend_on_the_scale_of_q(q_norm):
    net, B, A = random_mlp(3, 1, seed=90), 32, 3
    mu, sigma, _, _ = som.cosine_schedule(rand(B, 1, seed=91))
    a_t, mc_eps = randn(B, A, seed=92), randn(B, 8, A, seed=93)

    def q_fn(obs, a):
        return net(a).squeeze(-1)

    def larger(obs, a):
        return 1000 * q_fn(obs, a) + 7

    inputs = (None, a_t, mu, sigma, mc_eps, 20.0, 3, q_norm)
    score, _ = som.estimate_peak_score(q_fn, *inputs)
    score_of_larger, _ = som.estimate_peak_score(larger, *inputs)
    close(score_of_larger, score, atol=2e-3, rtol=2e-3)
    assert not score.requires_grad and all(weight.grad is None for weight in net.parameters())


def sobol_points(K, dim):
    return torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(K, dtype=F64)


def mc_noise(kind, n, K, dim, seed):
    """(n, K, dim)"""
    if kind == "normal":
        return randn(n, K, dim, seed=seed)
    return som.lattice_noise(sobol_points(K, dim), rand(n, 1, dim, seed=seed))


def test_every_sample_of_a_shifted_lattice_is_standard_normal():
    n, K, dim = 20_000, 8, 3
    eps = mc_noise("lattice", n, K, dim, seed=1)
    assert eps.shape == (n, K, dim)
    ordered = eps.sort(dim=0).values
    # Kolmogorov and Smirnov: exceeded by 2 exp(-2 * 2.2^2) = 0.0001 of such samples
    steps = (torch.arange(n, dtype=F64).reshape(n, 1, 1) + 0.5) / n
    assert (torch.special.ndtr(ordered) - steps).abs().max() < 2.2 / n**0.5
    # coordinates of a sample are independent
    for k in range(K):
        close(eps[:, k].T.cov(), torch.eye(dim, dtype=F64), atol=0.05, rtol=0)
    # and all K of a state have the same shift: the points lie as before, modulo 1
    distances = (
        torch.special.ndtr(eps) - sobol_points(K, dim) - torch.special.ndtr(eps[:, :1]) + sobol_points(K, dim)[0]
    )
    assert (distances - distances.round()).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ("normal", "lattice"))
def test_mean_over_shifts_is_the_closed_form(kind):
    # E exp(c eps) = exp(|c|^2 / 2), E eps exp(c eps) = c exp(|c|^2 / 2): the numerator and denominator of a linear Q
    n, K, c = 4000, 10, torch.tensor([0.5, -0.8, 0.3], dtype=F64)
    eps = mc_noise(kind, n, K, 3, seed=2)
    weights = (eps @ c).exp().unsqueeze(-1)
    expected = (c @ c / 2).exp() * torch.cat([torch.ones(1, dtype=F64), c])
    estimates = torch.cat([weights, weights * eps], -1).mean(1)  # (n, 4)
    errors = estimates.std(0) / n**0.5
    assert ((estimates.mean(0) - expected).abs() < 4 * errors).all()


def test_points_of_the_lattice_lie_evenly():
    spreads = [mc_noise(kind, 4000, 50, 6, seed=3).mean(1).std().item() for kind in ("normal", "lattice")]
    assert spreads[0] == pytest.approx(50**-0.5, rel=0.03) and spreads[1] < 0.45 * spreads[0]  # measured: 0.39


# alpha: bounds of the error with 50 points, beside 100 and 50 independent ones; measured with two seeds: 0.88 to 1.00
# and 0.61 to 0.71, 1.07 to 1.20 and 0.94 to 0.97
@pytest.mark.parametrize(("alpha", "beside_100", "beside_50"), [(1.0, 1.05, 0.8), (5.0, 1.3, 1.05)])
@pytest.mark.parametrize("t", (0.2, 0.5, 0.8))
def test_fifty_points_of_the_lattice_are_as_good_as_a_hundred_independent_ones(alpha, beside_100, beside_50, t):
    dim, num_points, num_repeats = 6, 16, 64
    mixture = random_mixture(dim)
    mu, sigma, _, _ = VP(torch.full((num_points * num_repeats, 1), t, dtype=F64))
    a_t = mu[:num_points] * mixture.sample(num_points, 10) + sigma[:num_points] * randn(num_points, dim, seed=20)
    # Q divided by its std within a state, as in the script
    samples = (a_t + sigma[:num_points] * randn(2000, 1, dim, seed=30)) / mu[:num_points]
    std = mixture.log_prob(samples).std(0).mean()

    def q_fn(obs, a):
        return mixture.log_prob(a) / std

    def score(a_t, eps):
        n = len(a_t)
        return som.estimate_score(q_fn, None, a_t, mu[:n], sigma[:n], eps, alpha, clip=False)[0]

    exact = score(a_t, randn(num_points, 20_000, dim, seed=40)).repeat(num_repeats, 1)
    a_t, errors = a_t.repeat(num_repeats, 1), {}
    for kind, K in ("lattice", 50), ("normal", 50), ("normal", 100):
        estimate = score(a_t, mc_noise(kind, len(a_t), K, dim, seed=50))
        errors[kind, K] = (estimate - exact).square().mean().sqrt()
    assert errors["lattice", 50] < beside_100 * errors["normal", 100]
    assert errors["lattice", 50] < beside_50 * errors["normal", 50]


def critic_of_large_q(obs_dim, act_dim):
    """Trained on a return of about 300, to which an action adds 1 to 2; its states' std is 13."""
    torch.manual_seed(1)
    critic = som.QNetwork(2, obs_dim, act_dim, 2, hidden_dim=64, num_layers=3)
    level, best = torch.randn(obs_dim) / 4, torch.randn(obs_dim, act_dim) / 4
    adam = torch.optim.Adam(critic.parameters(), lr=3e-3, fused=True)
    for _ in range(1200):
        obs, a = torch.randn(256, obs_dim), 2 * torch.rand(256, 1, act_dim) - 1
        q = (
            300
            + 20 * torch.tanh(obs @ level).unsqueeze(1)
            - 2 * (a - torch.tanh(obs @ best).unsqueeze(1)).square().sum(-1)
        )
        adam.zero_grad()
        (critic.mean_return(obs, a) - q).square().mean().backward()
        adam.step()
    return critic.requires_grad_(False)


def test_hidden_layers_in_bfloat16_keep_the_direction_of_the_score():
    B, K, O, A = 128, 32, 17, 6
    critic = critic_of_large_q(O, A)
    half = copy.deepcopy(critic).bfloat16()
    obs, a_t, t = torch.randn(B, O), 0.6 * torch.randn(B, A), 0.05 + 0.9 * torch.rand(B, 1)
    mu, sigma, _, _ = som.vp_schedule(t, 0.1, 1.0)

    def unit_score(q_fn, eps):
        score, logits = som.estimate_score(q_fn, obs, a_t, mu, sigma, eps, 5.0, "uniform", "state")
        return F.normalize(score.float()), logits

    def q_fn(obs, a, dtype=None):
        return critic.mean_return(obs, a, dtype).mean(dim=0)

    eps = torch.randn(B, K, A)
    q = q_fn(obs, ((a_t / mu).unsqueeze(1) + (sigma / mu).unsqueeze(1) * eps).clamp(-1, 1))
    assert 280 < q.mean() < 310 and 1 < q.std(dim=1).mean() < 2.5
    exact, _ = unit_score(q_fn, eps)
    hidden, logits = unit_score(partial(q_fn, dtype=torch.bfloat16), eps)
    throughout, _ = unit_score(lambda obs, a: half(obs.bfloat16(), a.bfloat16())[0].mean(dim=0), eps)
    redrawn, _ = unit_score(q_fn, torch.randn(B, K, A))
    assert logits.dtype == torch.float32
    errors = [(score - exact).norm(dim=1).mean().item() for score in (hidden, throughout, redrawn)]
    # measured with three seeds: 0.04 to 0.07, 0.21 to 0.23, 0.58 to 0.65
    assert errors[0] < 0.1 and 0.15 < errors[1] < 0.5 and errors[2] > 0.4
    assert errors[1] > 2.5 * errors[0]


def test_only_the_score_sees_bfloat16():
    agent = tiny_agent(score_dtype="bfloat16", policy_q="mean")
    obs, a = torch.randn(4, 5), torch.randn(4, 7, 2)
    exact = agent.critic.mean_return(obs, a).mean(dim=0)
    close(exact, agent.critic(obs, a)[0].mean(dim=0), atol=1e-6, rtol=0)
    assert torch.equal(agent.q_fn(obs, a), exact)
    score_q = agent.score_q_fn(obs, a)
    assert score_q.dtype == torch.float32
    assert torch.equal(score_q, agent.critic.mean_return(obs, a, torch.bfloat16).mean(dim=0))
    assert 1e-5 < (score_q - exact).abs().max() < 0.05
    assert torch.equal(tiny_agent().score_q_fn(obs, a), tiny_agent().q_fn(obs, a))
    used = []
    agent.actor_loss = lambda u_fn, q_fn, *rest: used.append(q_fn) or som.actor_loss(u_fn, q_fn, *rest)
    agent.best_of_n = lambda u_fn, q_fn, *rest: used.append(q_fn) or som.best_of_n(u_fn, q_fn, *rest)
    agent.update(random_batch(1))
    assert used == [agent.q_fn, agent.score_q_fn]


# velocity


def test_velocity_by_hand():
    a_t, score = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[3.0, -4.0]], dtype=F64)
    f, g2 = torch.tensor([[-0.5]], dtype=F64), torch.tensor([[3.0]], dtype=F64)
    close(som.pf_ode_velocity(a_t, score, f, g2), torch.tensor([[-0.5 - 4.5, -1.0 + 6.0]], dtype=F64))
    # 10 / 5 = 2 times the score; the 1e-6 in the norm's denominator is the tolerance
    rescaled = torch.tensor([[-0.5 - 9.0, -1.0 + 12.0]], dtype=F64)
    close(som.pf_ode_velocity(a_t, score, f, g2, 10.0), rescaled, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_score_scale_sets_the_norm_and_keeps_the_direction(schedule):
    a_t, score = randn(64, 5, seed=1), randn(64, 5, seed=2) * 10 ** rand(64, 1, seed=3)
    _, _, f, g2 = schedule(0.05 + 0.9 * rand(64, 1, seed=4))
    part = som.pf_ode_velocity(a_t, score, f, g2, 25.0) - f * a_t
    close(part.norm(dim=1, keepdim=True), 0.5 * g2 * 25.0, rtol=1e-5)  # but for the 1e-6 in the denominator
    close(F.cosine_similarity(part, score), -torch.ones(64, dtype=F64))


TWO_MODES = Mixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-1.2, 0.3], [1.0, -0.6]], dtype=F64),
    torch.tensor([[[0.25, 0.1], [0.1, 0.16]], [[0.16, 0.0], [0.0, 0.36]]], dtype=F64),
)


def integrate(velocity, a, num_steps):
    """Heun's method from t = 1 to t = 0."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=F64)
    for t, t_next in pairwise(times):
        v = velocity(a, t)
        a = a + (t_next - t) * 0.5 * (v + velocity(a + (t_next - t) * v, t_next))
    return a


def assert_two_modes(a, share_tol, mean_tol, cov_tol):
    mean, cov = TWO_MODES.moments()
    # the mean responsibility of a component is exactly its weight
    close(TWO_MODES.responsibilities(a).mean(0), TWO_MODES.weights, atol=share_tol, rtol=0)
    close(a.mean(0), mean, atol=mean_tol, rtol=0)
    close(a.T.cov(), cov, atol=cov_tol, rtol=0)
    for k, component in enumerate(TWO_MODES.responsibilities(a).argmax(1) == k for k in range(2)):
        close(a[component].mean(0), TWO_MODES.means[k], atol=0.1, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_ode_with_the_exact_score_carries_the_prior_to_the_mixture(path):
    # VP with beta up to 20: at t = 1 the path is N(0, I) up to mu = 0.007
    schedule = partial(som.vp_schedule, beta_min=0.1, beta_max=20.0) if path == "vp" else PATHS[path][0]

    def velocity(a, t):
        mu, sigma, f, g2 = schedule(t.reshape(1, 1))
        return som.pf_ode_velocity(a, TWO_MODES.diffused(mu, sigma).score(a), f, g2)

    a = randn(4000, 2, seed=1)
    if path == "ve":
        a = TWO_MODES.sample(4000, 2) + 2.0 * a  # exact samples at t = 1
    # three standard errors of 4000 samples: 0.022 in a share, 0.05 in a mean, 0.07 in a variance
    assert_two_modes(integrate(velocity, a, 100), share_tol=0.022, mean_tol=0.05, cov_tol=0.07)


@pytest.mark.parametrize("path", PATHS)
def test_ode_with_the_estimated_score_carries_the_prior_to_the_mixture(path):
    (schedule, reference), alpha, K = PATHS[path], 2.0, 128
    q_fn, n = TWO_MODES.q_fn(alpha, reference), 1000
    generator = torch.Generator().manual_seed(3)

    def velocity(a, t):
        mu, sigma, f, g2 = (x.expand(n, 1) for x in schedule(t.reshape(1, 1)))
        eps = torch.randn(n, K, 2, dtype=F64, generator=generator)
        score, _ = som.estimate_score(q_fn, None, a, mu, sigma, eps, alpha, reference, clip=False)
        return som.pf_ode_velocity(a, score, f, g2)

    mu, sigma, _, _ = schedule(torch.ones(1, 1, dtype=F64))
    a = randn(n, 2, seed=1)
    if path != "prior":
        a = mu * TWO_MODES.sample(n, 2) + sigma * a  # exact samples at t = 1
    # three standard errors of 1000 samples: 0.044 in a share, 0.1 in a mean, 0.14 in a variance
    assert_two_modes(integrate(velocity, a, 30), share_tol=0.044, mean_tol=0.1, cov_tol=0.14)


# schedules and times


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_is_the_path_of_its_sde(schedule):
    t, h = torch.linspace(0.01, 0.99, 50, dtype=F64).unsqueeze(1), 1e-6
    mu, sigma, f, g2 = schedule(t)
    (mu_1, sigma_1, _, _), (mu_0, sigma_0, _, _) = schedule(t + h), schedule(t - h)
    close((mu_1 - mu_0) / (2 * h), f * mu, atol=1e-6, rtol=1e-6)
    close((sigma_1**2 - sigma_0**2) / (2 * h), 2 * f * sigma**2 + g2, atol=1e-6, rtol=1e-6)
    if schedule is not VE:
        close(mu**2 + sigma**2, torch.ones_like(t))


def test_schedule_endpoints():
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    for schedule in VP, som.cosine_schedule:
        close(torch.cat(schedule(zero)[:2]), torch.cat([one, zero]))
    # int beta = (0.1 + 2) / 2
    close(torch.cat(VP(one)[:2]).flatten(), torch.tensor([math.exp(-0.525), (1 - math.exp(-1.05)) ** 0.5], dtype=F64))
    close([VP(zero)[3].item(), VP(one)[3].item()], [0.1, 2.0])
    mu, sigma, f, g2 = som.cosine_schedule(one)
    assert 0 < mu < 2e-3 and 1 - sigma < 2e-6 and f.isfinite() and g2.isfinite()
    assert [VE(x)[0].item() for x in (zero, one)] == [1.0, 1.0]
    close([VE(zero)[1].item(), VE(one)[1].item()], [0.05, 2.0])


@pytest.mark.parametrize("zero_r_ratio", (0.0, 0.25, 1.0))
def test_times_are_ordered_uniform_numbers_and_a_share_of_r_is_zero(zero_r_ratio):
    n = 20_000
    uniform = rand(n, 2, seed=1)
    r, t = som.sample_r_t(uniform, zero_r_ratio)
    assert r.shape == t.shape == (n, 1) and (r >= 0).all() and (r <= t).all() and (t <= 1).all()
    assert torch.equal(t.squeeze(1), torch.where(uniform[:, 0] > uniform[:, 1], uniform[:, 0], uniform[:, 1]))
    rest = r != 0
    assert (~rest).sum() == zero_r_ratio * n
    # order statistics: means 1/3 and 2/3, variances 1/18; 0.01 is five standard errors of 15,000 numbers
    assert abs(t.mean() - 2 / 3) < 0.01 and abs(t.var() - 1 / 18) < 0.002
    if zero_r_ratio < 1:
        assert abs(r[rest].mean() - 1 / 3) < 0.01 and abs(r[rest].var() - 1 / 18) < 0.002


# MeanFlow


def recovered_target(u_fn, a_t, r, t, v):
    """u_tgt from the loss: with u + c, the gradient in c at c = 0 is 2 (u - u_tgt)."""
    c = torch.zeros_like(a_t, requires_grad=True)
    loss, dudt = som.meanflow_loss(lambda a, r, t: u_fn(a, r, t) + c, a_t, r, t, v)
    assert loss.shape == a_t.shape[:2]
    loss.sum().backward()
    return u_fn(a_t, r, t).detach() - 0.5 * c.grad, dudt


def meanflow_inputs(n=16, dim=3):
    times = rand(n, 1, 2, seed=1).sort(-1).values
    net = random_mlp(dim + 2, dim, seed=60)
    return (
        net,
        (lambda a, r, t: net(torch.cat([a, r, t], -1))),
        (randn(n, 1, dim, seed=2), times[..., :1], times[..., 1:], randn(n, 1, dim, seed=3)),
    )


def test_meanflow_target_against_central_differences():
    _, u_fn, (a_t, r, t, v) = meanflow_inputs()
    u_tgt, dudt = recovered_target(u_fn, a_t, r, t, v)
    h = 1e-5
    expected = ((u_fn(a_t + h * v, r, t + h) - u_fn(a_t - h * v, r, t - h)) / (2 * h)).detach()
    close(dudt, expected, atol=1e-8, rtol=1e-6)
    close(u_tgt, v - (t - r) * expected, atol=1e-8, rtol=1e-6)
    loss, _ = som.meanflow_loss(u_fn, a_t, r, t, v)
    close(loss, (u_fn(a_t, r, t) - u_tgt).square().sum(-1))


def test_meanflow_target_is_the_velocity_at_r_equal_to_t():
    _, u_fn, (a_t, _, t, v) = meanflow_inputs()
    u_tgt, _ = recovered_target(u_fn, a_t, t, t, v)
    close(u_tgt, v)


def test_meanflow_gradient_stops_at_the_target():
    net, u_fn, inputs = meanflow_inputs()
    parameters = list(net.parameters())
    u_tgt, _ = recovered_target(u_fn, *inputs)
    loss, dudt = som.meanflow_loss(u_fn, *inputs)
    assert not dudt.requires_grad
    expected = torch.autograd.grad((u_fn(*inputs[:3]) - u_tgt).square().sum(), parameters)
    close(torch.autograd.grad(loss.sum(), parameters), expected)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_average_velocity_of_a_gaussian_is_the_fixed_point(schedule):
    # target N(m, diag s^2): the flow keeps (a_t - mu_t m) / std_t
    m, s = torch.tensor([0.3, -0.5, 0.1], dtype=F64), torch.tensor([0.3, 0.6, 0.9], dtype=F64)

    def mean_std(t):
        mu, sigma, _, _ = schedule(t)
        return mu * m, (mu**2 * s**2 + sigma**2).sqrt()

    def u_fn(a_t, r, t):
        (mean_r, std_r), (mean_t, std_t) = mean_std(r), mean_std(t)
        return (a_t - mean_r - std_r / std_t * (a_t - mean_t)) / (t - r)

    t = 0.2 + 0.75 * rand(32, 1, 1, seed=1)
    r = t * 0.8 * rand(32, 1, 1, seed=2)
    a_t = randn(32, 1, 3, seed=3)
    mean, std = mean_std(t)
    _, _, f, g2 = schedule(t)
    v = som.pf_ode_velocity(a_t, (mean - a_t) / std**2, f, g2)
    # the instantaneous velocity is the limit of the average one
    close(u_fn(a_t, t - 1e-6, t), v, atol=1e-4, rtol=1e-4)
    assert som.meanflow_loss(u_fn, a_t, r, t, v)[0].max() < 1e-20
    # the check has teeth: the velocity negated, and the tangent that belongs to networks of (t, t - r)
    assert som.meanflow_loss(u_fn, a_t, r, t, -v)[0].mean() > 1e-2
    u, dudt = torch.func.jvp(u_fn, (a_t, r, t), (v, torch.ones_like(r), torch.ones_like(t)))
    assert (u - v + (t - r) * dudt).square().sum(-1).mean() > 1e-3


# acting


def test_best_of_n_takes_the_action_of_highest_q():
    obs, noise, calls = randn(3, 2, seed=1), randn(3, 5, 4, seed=2), []
    q = torch.tensor([[0, 1, 2, 3, 9], [7, -1, 3, 2, 1], [-5, -4, -1, -2, -3]], dtype=F64)

    def u_fn(*inputs):
        calls.append(inputs)
        _, a, r, t = inputs
        return 0.5 * a - 0.3 * t + 4.0 * r

    def q_fn(*inputs):
        calls.append(inputs)
        return q

    a, candidates = som.best_of_n(u_fn, q_fn, obs, noise)
    expected = (0.5 * noise + 0.3).clamp(-1, 1)
    assert (expected.abs() == 1).any()
    close(candidates, expected)
    close(a, torch.stack([expected[0, 4], expected[1, 0], expected[2, 2]]))
    (u_obs, u_a, r, t), (q_obs, q_a) = calls
    assert torch.equal(u_a, noise) and torch.equal(q_a, candidates) and u_obs is obs and q_obs is obs
    assert torch.equal(r, torch.zeros(3, 5, 1, dtype=F64)) and torch.equal(t, torch.ones(3, 5, 1, dtype=F64))


def tiny_args(**changes):
    sizes = {"hidden_dim": 16, "num_layers": 2, "batch_size": 32, "num_mc_samples": 4, "best_of_n": 3}
    return som.Args(**(sizes | {"device": "cpu", "compile": False} | changes))


def tiny_agent(seed=1, **changes):
    torch.manual_seed(seed)
    return som.Agent(tiny_args(**changes), 5, 2, torch.device("cpu"))


def random_batch(seed, n=32, dtype=torch.float32):
    columns = randn(n, 5, seed=seed), randn(n, 5, seed=seed + 1), 2 * rand(n, 2, seed=seed + 2) - 1
    rest = randn(n, seed=seed + 3), (rand(n, seed=seed + 4) < 0.3).double()
    return som.Batch(*(column.to(dtype) for column in columns + rest))


def test_the_moving_average_acts_and_the_lattice_is_fixed():
    agent = tiny_agent(num_mc_samples=7)
    close(agent.sobol.double(), sobol_points(7, 2), atol=1e-6)
    with torch.no_grad():
        for parameter in agent.acting_actor.parameters():
            parameter.zero_()  # u = 0
    torch.manual_seed(3)
    _, candidates = agent.act(torch.zeros(4, 5))
    torch.manual_seed(3)
    close(candidates, torch.randn(4, agent.args.best_of_n, 2).clamp(-1, 1))


def test_the_deterministic_action_is_that_of_noise_0():
    agent = tiny_agent()
    obs = randn(4, 5, seed=1).float()
    before = torch.get_rng_state()
    a, candidates = agent.act(obs, deterministic=True)
    assert torch.equal(torch.get_rng_state(), before)  # it draws nothing
    zeros = torch.zeros(4, 1, 1)
    expected = -agent.acting_actor(obs, torch.zeros(4, 1, 2), zeros, zeros + 1)
    close(a, expected.squeeze(1).clamp(-1, 1))
    assert torch.equal(candidates, a.unsqueeze(1)) and a.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("sde", ("vp", "ve"))
def test_acting_starts_from_the_prior(sde):
    agent = tiny_agent(sde=sde, best_of_n=4)
    prior_std = som.ve_schedule(torch.ones(1))[1] if sde == "ve" else 1.0
    agent.best_of_n = lambda u_fn, q_fn, obs, noise: (noise[:, 0], noise)
    _, noise = agent.act(torch.zeros(5000, 5))
    assert noise.shape == (5000, 4, 2) and abs(noise.std() / prior_std - 1) < 0.02


def test_exploration_noise_has_std_noise_scale_times_lambda():
    agent = tiny_agent(noise_scale=0.02, initial_lambda=4.0)
    agent.best_of_n = lambda u_fn, q_fn, obs, noise: (torch.full((20_000, 2), 0.2), noise)
    obs = torch.zeros(20_000, 5)
    assert (agent.act(obs)[0] == 0.2).all()
    assert abs((agent.act(obs, explore=True)[0] - 0.2).std() / 0.08 - 1) < 0.02


@pytest.mark.parametrize("smoothed", (False, True))
def test_target_smoothing_has_the_noise_of_exploration(smoothed):
    agent = tiny_agent(noise_scale=0.02, initial_lambda=4.0, target_smoothing=smoothed)
    agent.best_of_n = lambda u_fn, q_fn, obs, noise: (torch.full((20_000, 2), 0.2), noise)
    bootstrapping = []
    agent.critic_loss = lambda q, target_q, batch, next_actions, args: (
        bootstrapping.append(next_actions) or som.critic_loss(q, target_q, batch, next_actions, args)
    )
    agent.update_critic(random_batch(1, n=20_000))
    (next_actions,) = bootstrapping
    assert abs(next_actions.mean() - 0.2) < 0.002
    assert (next_actions == 0.2).all() or smoothed
    assert abs(next_actions.std() - (0.08 if smoothed else 0)) < 0.002


def test_a_generator_of_its_own_leaves_the_others_alone():
    agent, obs = tiny_agent(), torch.zeros(4, 5)
    state = torch.get_rng_state()
    first, again, other = (agent.act(obs, generator=torch.Generator().manual_seed(seed))[0] for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def odd_boxes():
    """Bounds (A,) of one dtype each: (15, 30), as in a bug report, round and random numbers, tiny and huge ones."""
    rng = np.random.default_rng(0)
    pairs = [(15, 30), (0, 1), (-0.4, 0.4), (0.1, 0.3), (-3, 1e-3), (1, 1 + 2**-10), (-6e4, 6e4), (-1e-7, 2e-7)]
    pairs += [(low / 10, high / 10) for low in range(-20, 20) for high in range(low + 1, 21, 7)]
    pairs += np.sort(rng.normal(size=(100, 2)) * 10.0 ** rng.integers(-3, 4, (100, 2))).tolist()
    for dtype in np.float16, np.float32, np.float64:
        for low, high in pairs:
            low, high = np.array([low], dtype), np.array([high], dtype)
            if low < high:
                yield gym.spaces.Box(low, high, dtype=dtype)
    yield gym.spaces.Box(-3.4e38, 3.4e38, (1,))


def test_actions_of_a_huge_box_are_finite():
    box = gym.spaces.Box(-1e308, 1e308, (1,), np.float64)  # high - low is no number
    np.testing.assert_array_equal(som.to_box(np.float32([[-1], [0], [1]]), box), [[-1e308], [0], [1e308]])


def test_actions_lie_in_their_box_and_have_its_dtype():
    boxes = list(odd_boxes())
    assert len(boxes) > 600
    unit = np.concatenate([np.linspace(-1, 1, 29), [np.nextafter(-1, 0), np.nextafter(1, 0), -1 - 1e-6, 1 + 1e-6]])
    unit = np.sort(unit).astype(np.float32)[:, None]
    for box in boxes:
        actions = som.to_box(unit, box)
        assert all(box.contains(action) for action in actions), box
        low, high = box.low.astype(np.float64), box.high.astype(np.float64)
        resolution = max(np.finfo(box.dtype).eps * max(abs(low), abs(high))[0], np.finfo(box.dtype).tiny)
        share = (unit.astype(np.float64).clip(-1, 1) + 1) / 2
        expected = low + (high - low) * share
        np.testing.assert_allclose(actions, expected, rtol=0, atol=2 * resolution)  # each side rounds


# networks


def plain_member(network, i, obs, x):
    """Member i of an ensemble as a plain network of [obs, x], one input at a time."""
    h = torch.cat([obs.unsqueeze(1).expand(-1, x.shape[1], -1), x], -1)
    for layer, (w, b) in enumerate(zip(network.weights, network.biases, strict=True)):
        h = (F.gelu(h) if layer else h) @ w[i] + b[i]
    return h


def test_ensemble_equals_plain_networks():
    torch.manual_seed(1)
    obs, x = randn(4, 5, seed=1), randn(4, 7, 3, seed=2)
    net = som.EnsembleMLP(3, 5, 3, 6, hidden_dim=16, num_layers=3).double()
    assert [tuple(w.shape) for w in net.weights] == [(3, 8, 16), (3, 16, 16), (3, 16, 16), (3, 16, 6)]
    out = net(obs, x)
    assert out.shape == (3, 4, 7, 6)
    close(out, torch.stack([plain_member(net, i, obs, x) for i in range(3)]))
    # members differ, and so do biases
    assert (out[0] - out[1]).abs().max() > 1e-2 and all(b.std() > 0 for b in net.biases)


def test_critics_are_plain_networks_of_mean_and_softplus_std():
    torch.manual_seed(1)
    obs, a = randn(4, 5, seed=1), randn(4, 7, 3, seed=2)
    critic = som.QNetwork(2, 5, 3, 2, hidden_dim=16, num_layers=2).double()
    mean, std = critic(obs, a)
    for i in range(2):
        out = plain_member(critic, i, obs, a)
        close(mean[i], out[..., 0])
        close(std[i], (1 + out[..., 1].exp()).log())


@pytest.mark.parametrize("num_frequencies", [8, 1])
def test_actor_is_a_plain_network_of_action_and_times(num_frequencies):
    torch.manual_seed(1)
    obs, a_t, times = randn(4, 5, seed=1), randn(4, 7, 3, seed=2), rand(4, 7, 2, seed=3).sort(-1).values
    r, t = times[..., :1], times[..., 1:]
    actor = som.MeanFlowActor(5, 3, 16, 2, *([] if num_frequencies == 8 else [num_frequencies])).double()
    frequencies = torch.linspace(1, 3, num_frequencies, dtype=F64)
    close(actor.frequencies, frequencies, atol=1e-6)
    actor.frequencies.copy_(frequencies)
    phases = frequencies * t, frequencies * (t - r)
    embedding = torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], -1)
    close(actor(obs, a_t, r, t), plain_member(actor, 0, obs, torch.cat([a_t, embedding], -1)))


# replay buffer


def id_coded(ids):
    """Rows in which every column encodes the same id; numpy as from environments, `terminated` as booleans."""
    ids = np.asarray(ids, dtype=np.float64)
    obs, actions = ids[:, None] + [0.0, 0.25, 0.5], -ids[:, None] + [0.0, 0.5]
    return obs, obs + 1000, actions, 10 * ids, ids % 3 == 0


class Filled:
    """A replay buffer that is filled as the loop does it; observations of 3 numbers, actions of 2."""

    def __init__(self, num_envs, **changes):
        args = tiny_args(num_envs=num_envs, total_timesteps=10_000, **changes)
        self.rb = som.ReplayBuffer(args, 3, 2, torch.device("cpu"), None, 0)
        self.rb.rows.fill_(-7.0)  # an unwritten row is then recognised
        self.num_envs, self.num_added = num_envs, 0
        self.new_rows = np.zeros((num_envs, self.rb.row_width), np.float32)
        self.rb.add(torch.from_numpy(self.new_rows))  # before the first step

    def step(self):
        columns = id_coded(range(self.num_added, self.num_added + self.num_envs))
        self.rb.pack(self.new_rows, *columns)
        self.rb.host_rows(self.num_added)[:] = self.new_rows
        self.num_added += self.num_envs

    def add(self):
        self.rb.add(torch.from_numpy(self.new_rows))

    def sampled_ids(self, n=4000):
        batch = self.rb.sample(n)
        ids = batch.obs[:, 0]
        for column, expected in zip(batch, id_coded(ids.numpy()), strict=True):
            assert column.dtype == torch.float32 and np.array_equal(column.numpy(), expected)
        return ids.int()


@pytest.mark.parametrize(("num_envs", "checkpoint_frequency"), [(3, 4), (3, 1), (2, 5), (1, 7)])
def test_buffer_samples_the_latest_rows_whole_and_keeps_spare_ones(num_envs, checkpoint_frequency):
    torch.manual_seed(1)
    # 10 is not a multiple of 3: what is sampled from begins in the middle of a step
    buffer = Filled(num_envs, buffer_size=10, checkpoint_frequency=checkpoint_frequency)
    rows = buffer.rb.on_host
    assert len(rows) % num_envs == 0
    for _ in range(4 * len(rows) // num_envs):
        seen = buffer.num_added
        buffer.step()
        if seen > 0:  # a step that is not added yet is not sampled
            assert set(buffer.sampled_ids(500).tolist()) <= set(range(max(0, seen - 10), seen))
        buffer.add()
        assert buffer.rb.num_added.item() == buffer.num_added
        # only written rows, the latest 10 of them, and every one: also in the last slot
        assert set(buffer.sampled_ids().tolist()) == set(range(max(0, buffer.num_added - 10), buffer.num_added))
        # and as many more are still there as may come after the older of the two checkpoints that are kept
        kept = range(max(0, buffer.num_added - 10 - 2 * checkpoint_frequency), buffer.num_added)
        slots = [i % len(rows) for i in kept]
        obs, next_obs, actions, rewards, terminated = id_coded(kept)
        np.testing.assert_array_equal(rows[slots, 0:3], obs)
        np.testing.assert_array_equal(rows[slots, 4:7], next_obs)
        np.testing.assert_array_equal(rows[slots, 8:10], actions)
        np.testing.assert_array_equal(rows[slots, 12], rewards)
        np.testing.assert_array_equal(rows[slots, 16], terminated)


@pytest.mark.parametrize("num_steps", (3, 4, 17))
def test_buffer_samples_uniformly(num_steps):
    torch.manual_seed(1)
    buffer = Filled(2, buffer_size=8, checkpoint_frequency=5)
    for _ in range(num_steps):
        buffer.step()
        buffer.add()
    filled = min(2 * num_steps, 8)
    ids = buffer.sampled_ids(2000 * filled) - (buffer.num_added - filled)
    counts = torch.bincount(ids, minlength=filled)
    assert len(counts) == filled and (counts - 2000).abs().max() < 200  # standard deviation at most 42


@pytest.mark.parametrize(("obs_dim", "act_dim"), [(17, 6), (3, 2), (4, 4), (1, 1), (376, 17)])
def test_columns_of_a_row_are_aligned_and_come_back(obs_dim, act_dim):
    torch.manual_seed(1)
    args = tiny_args(num_envs=2, buffer_size=100)
    rb = som.ReplayBuffer(args, obs_dim, act_dim, torch.device("cpu"), None, 2)
    assert rb.rows.shape[1] == rb.row_width == sum(rb.padded_widths)
    assert all(width % 4 == 0 for width in rb.padded_widths)  # 16 bytes
    rows = np.zeros((2, rb.row_width), np.float32)
    columns = [np.arange(2 * width, dtype=np.float64).reshape(2, width) + 0.5 for width in (obs_dim, obs_dim, act_dim)]
    columns += [np.array([1.5, 2.5]), np.array([True, False])]
    rb.pack(rows, *columns)
    rb.add(torch.from_numpy(rows))
    batch = rb.sample(1000)
    index = (batch.rewards == 2.5).long().numpy()
    assert set(index) == {0, 1}
    for column, expected in zip(batch, columns, strict=True):
        np.testing.assert_array_equal(column.numpy(), expected[index])


# losses


def critic_case(seed=1, n=12):
    batch = random_batch(seed, n, F64)
    mean, target_mean = 2 * randn(2, n, 1, seed=seed + 10), 2 * randn(2, n, 1, seed=seed + 11)
    std, target_std = 0.2 + 0.8 * rand(2, n, 1, seed=seed + 12), 0.5 + 2 * rand(2, n, 1, seed=seed + 13)
    z = randn(n, seed=seed + 14)
    z[:2] = torch.tensor([5.0, -4.0])  # beyond its bounds, in rows whose difference stays within those of mean_std
    for column in batch.rewards, batch.terminated:
        column[:2] = 0.0
    mean[:, :2], target_mean[:, :2], target_std[:, :2] = 0.1, 0.2, 0.1
    return batch, mean, std, target_mean, target_std, randn(n, 2, seed=seed + 15), z


def critic_gradients(batch, mean, std, target_mean, target_std, next_actions, loss_fn):
    """Loss, diagnostics and the gradients in mean and std; loss_fn takes two critics, batch and next actions."""
    leaves = [x.clone().requires_grad_() for x in (mean, std, target_mean, target_std)]

    def q_dist(obs, a):
        assert torch.equal(obs, batch.obs) and torch.equal(a, batch.actions.unsqueeze(1))
        return leaves[0], leaves[1]

    def target_q_dist(obs, a):
        assert torch.equal(obs, batch.next_obs) and torch.equal(a, next_actions.unsqueeze(1))
        return leaves[2], leaves[3]

    loss, *rest, info = loss_fn(q_dist, target_q_dist, batch, next_actions)
    assert loss.shape == () and not any(value.requires_grad for value in [*rest, *info.values()])
    loss.backward()
    assert leaves[2].grad is None and leaves[3].grad is None  # nothing flows into the target
    return loss.detach(), rest, leaves[0].grad, leaves[1].grad


def mse_loss(args):
    def loss_fn(q_dist, target_q_dist, batch, next_actions):
        means = [lambda obs, a, q=q: q(obs, a)[0] for q in (q_dist, target_q_dist)]
        return som.critic_loss(*means, batch, next_actions, args)

    return loss_fn


def distributional_loss(args, z, mean_std):
    return lambda *inputs: som.distributional_critic_loss(*inputs, z, mean_std, args)


def critic_targets(args, batch, target_mean, target_std, z, i):
    k = 0 if target_mean[0, i] < target_mean[1, i] else 1
    reward, keep = args.reward_scale * batch.rewards[i], args.gamma * (0.0 if batch.terminated[i] else 1.0)
    noise = target_std[k, i, 0] * min(max(z[i].item(), -3.0), 3.0)
    return reward + keep * target_mean[k, i, 0], reward + keep * (target_mean[k, i, 0] + noise)


@pytest.mark.parametrize("first", (True, False))
def test_distributional_critic_has_dacers_gradients(first):
    args = tiny_args(critic_loss="distributional", gamma=0.9, tau=0.25, reward_scale=0.3)
    batch, mean, std, target_mean, target_std, _, z = case = critic_case()
    mean_std = torch.full((2, 1), math.nan if first else 0.4, dtype=F64)
    _, (new_mean_std,), d_mean, d_std = critic_gradients(*case[:-1], distributional_loss(args, z, mean_std))
    n, clipped = len(z), 0
    for j in range(2):
        average = std[j].mean() if first else 0.75 * 0.4 + 0.25 * std[j].mean()
        close(new_mean_std[j, 0], average)
        for i in range(n):
            y, y_sample = critic_targets(args, batch, target_mean, target_std, z, i)
            q, s, weight = mean[j, i, 0], std[j, i, 0], average**2 + 0.1
            difference = (y_sample - q).clamp(-3 * average, 3 * average)
            clipped += (difference != y_sample - q).item()
            close(d_mean[j, i, 0], -weight * (y - q) / (s**2 + 0.1) / n)
            close(d_std[j, i, 0], -weight * (difference**2 - s**2) / (s**3 + 0.1) / n)
    assert 0 < clipped < 2 * n  # bounded in some rows, not in others


def test_mse_critic():
    args = tiny_args(critic_loss="mse", gamma=0.9, reward_scale=0.3)
    batch, mean, _, target_mean, target_std, _, z = case = critic_case()
    loss, _, d_mean, d_std = critic_gradients(*case[:-1], mse_loss(args))
    assert d_std is None
    y = torch.stack([critic_targets(args, batch, target_mean, target_std, z, i)[0] for i in range(len(z))])
    close(loss, ((mean[0, :, 0] - y) ** 2).mean() + ((mean[1, :, 0] - y) ** 2).mean())
    close(d_mean.squeeze(-1), 2 * (mean.squeeze(-1) - y) / len(z))


@pytest.mark.parametrize("kind", ("mse", "distributional"))
def test_terminated_rows_do_not_bootstrap(kind):
    args = tiny_args(critic_loss=kind)
    batch, mean, std, target_mean, target_std, next_actions, z = critic_case()
    std, mean_std = std + 5, torch.full((2, 1), 100.0, dtype=F64)  # no clipping
    loss_fn = mse_loss(args) if kind == "mse" else distributional_loss(args, z, mean_std)
    before, after = (
        critic_gradients(batch, mean, std, target_mean + shift, target_std, next_actions, loss_fn)[2]
        for shift in (0.0, 5.0)
    )
    changed = ((after - before).abs() > 1e-6).squeeze(-1)
    assert 0 < batch.terminated.sum() < len(z)
    assert torch.equal(changed, (batch.terminated == 0).expand(2, -1))


@pytest.mark.parametrize("q_norm, policy_q", (("batch", "mean"), ("state", "min")))
@pytest.mark.parametrize("path", (*PATHS, "box", "peaks"))
def test_actor_loss_is_score_velocity_and_meanflow_in_turn(path, q_norm, policy_q):
    reference = "box" if path in ("box", "peaks") else PATHS[path][1]
    sde = "ve" if path == "ve" else "vp"
    changes = {
        "reference": reference,
        "sde": sde,
        "q_norm": q_norm,
        "policy_q": policy_q,
        "beta_max": 2.0,
        "climb_steps": 3 if path == "peaks" else 0,
    }
    agent = tiny_agent(zero_r_ratio=0.25, score_scale=7.0, **changes)
    args, actor, critic = agent.args, agent.actor.double(), agent.critic.double()
    batch, alpha = random_batch(1, dtype=F64), torch.tensor(3.0)
    uniform, eps, mc_eps = rand(32, 2, seed=6), randn(32, 2, seed=7), randn(32, 4, 2, seed=8)
    loss, info = som.actor_loss(actor, agent.q_fn, batch, uniform, eps, mc_eps, alpha, args)
    assert loss.isfinite() and all(value.isfinite() and not value.requires_grad for value in info.values())
    loss.backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in actor.parameters())

    def q_fn(obs, a):
        (mean_0, mean_1), _ = critic(obs, a)
        return (mean_0 + mean_1) / 2 if policy_q == "mean" else torch.where(mean_0 < mean_1, mean_0, mean_1)

    t, r = uniform.max(1, keepdim=True).values, uniform.min(1, keepdim=True).values
    r[:8] = 0.0
    schedules = {"vp": (som.vp_schedule, 0.1, 2.0), "ve": (som.ve_schedule, 0.01, 1.0)}
    schedule, *constants = schedules.get(path, (som.cosine_schedule,))
    mu, sigma, f, g2 = schedule(t, *constants)
    a_t = mu * batch.actions + sigma * eps
    inputs = q_fn, batch.obs, a_t, mu, sigma, mc_eps, 3.0
    if path == "box":
        score, _ = som.estimate_box_score(*inputs, q_norm)
    elif path == "peaks":
        score, _ = som.estimate_peak_score(*inputs, 3, q_norm)
    else:
        score, _ = som.estimate_score(*inputs, reference, q_norm, clip=True)
    v = som.pf_ode_velocity(a_t, score, f, g2, None if path in ("prior", "box", "peaks") else 7.0)
    rows = [x.unsqueeze(1) for x in (a_t, r, t, v)]
    errors, dudt = som.meanflow_loss(lambda a, r, t: actor(batch.obs, a, r, t), *rows)
    close(loss, errors.sum() / 32)
    close(info["score/norm"], score.norm(dim=1).mean())
    close(info["velocity/norm"], v.norm(dim=1).mean())
    close(info["velocity/dudt_ratio"], ((t - r) * dudt.squeeze(1)).norm(dim=1).mean() / v.norm(dim=1).mean())
    for i in range(4):
        of_bin = ((t >= i / 4) & (t < (i + 1) / 4)).flatten()
        close(info[f"losses/actor_loss_t{i}"], errors.flatten()[of_bin].detach().mean())


# updates


def test_targets_follow_the_critics():
    agent = tiny_agent(tau=0.1)
    start, actor_start = copy.deepcopy(agent.target_critic), copy.deepcopy(agent.actor)
    agent.update(random_batch(1), policy_is_due=False)  # neither the targets nor the policy move
    for network, before in (agent.target_critic, start), (agent.actor, actor_start):
        assert all(torch.equal(x, y) for x, y in zip(network.parameters(), before.parameters(), strict=True))
    agent.update(random_batch(2))
    parameters = agent.target_critic.parameters(), start.parameters(), agent.critic.parameters()
    for target, before, online in zip(*parameters, strict=True):
        close(target, 0.9 * before + 0.1 * online, atol=1e-6)
        assert not torch.equal(target, before) and not torch.equal(before, online)
    assert any(not torch.equal(x, y) for x, y in zip(agent.actor.parameters(), actor_start.parameters(), strict=True))


def test_acting_policy_is_a_moving_average():
    agent = tiny_agent(policy_tau=0.2)
    start = copy.deepcopy(agent.acting_actor)
    agent.update(random_batch(1))
    parameters = agent.acting_actor.parameters(), start.parameters(), agent.actor.parameters()
    for acting, before, online in zip(*parameters, strict=True):
        close(acting, 0.8 * before + 0.2 * online, atol=1e-6)


def test_lambda_moves_down_by_the_learning_rate():
    agent = tiny_agent(inverse_temperature=4.0)
    log_lambdas, alphas = [], []
    for i in range(3):
        alphas.append(agent.update(random_batch(i))["losses/alpha"].item())
        agent.update_lambda()
        log_lambdas.append(agent.log_lambda.item())
    # Adam's first steps, under a nearly constant gradient, have the length of its learning rate
    steps = [math.log(5) - 7e-3 * k for k in range(4)]
    assert log_lambdas == pytest.approx(steps[1:], abs=1e-5)
    assert alphas == pytest.approx([4.0 / math.exp(x) for x in steps[:3]], rel=1e-4)


@pytest.mark.parametrize("noise_scale, target_entropy", ((0.1, -0.9), (0.3, -1.5)))
def test_lambda_settles_at_the_target_entropy(noise_scale, target_entropy):
    agent = tiny_agent(noise_scale=noise_scale, target_entropy=target_entropy, alpha_lr=0.05)
    for _ in range(300):
        agent.update_lambda()
    std = noise_scale * agent.log_lambda.exp().item()
    assert torch.distributions.Normal(0.0, std).entropy().item() == pytest.approx(target_entropy, abs=0.01)


def test_lambda_is_one_without_autotune():
    agent = tiny_agent(autotune=False, inverse_temperature=4.0)
    assert agent.update(random_batch(1))["losses/alpha"].item() == 4.0
    assert agent.log_lambda.item() == 0.0


# critic loss, reference: what the first edition's networks and lambda were after these updates
FIRST_EDITION = {
    ("mse", "uniform"): [0.158314, 0.153541, -12.21777, -12.226357, 1.588441],
    ("distributional", "prior"): [0.15915, 0.15355, -12.220392, -12.226401, 1.588441],
}


@pytest.mark.parametrize(("critic_loss", "reference"), FIRST_EDITION)
def test_updates_are_those_of_the_first_edition(critic_loss, reference):
    agent = tiny_agent(critic_loss=critic_loss, reference=reference)
    networks = agent.actor, agent.acting_actor, agent.critic, agent.target_critic
    with torch.no_grad():
        for network in networks:
            for i, parameter in enumerate(network.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=i) / parameter.shape[-2] ** 0.5)
    torch.manual_seed(2)
    if critic_loss == "mse":  # the first edition drew the distributional loss's numbers with every loss
        act = agent.act
        agent.act = lambda obs, explore: (act(obs, explore), torch.randn(32))[0]
    for i in range(1, 7):
        agent.update(random_batch(i), policy_is_due=i % 2 == 0)
        if i % 2 == 0:
            agent.update_lambda()
    vectors = [torch.nn.utils.parameters_to_vector(network.parameters()).double() for network in networks]
    sums = [(vector * torch.arange(len(vector)).cos()).sum().item() for vector in vectors]
    assert [*sums, agent.log_lambda.item()] == pytest.approx(FIRST_EDITION[critic_loss, reference], abs=1e-5)


def test_updates_leave_each_other_alone():
    """A step of one loss moves its own networks, and no other loss's gradient is left over."""
    moved = {}
    for name in "critic", "actor", "lambda":
        agent = tiny_agent()
        agent.update_critic(random_batch(1))
        agent.update_actor(random_batch(2))
        agent.update_lambda()
        agent.mean_std.zero_()  # a NaN differs from itself
        before = {key: value.clone() for key, value in agent.state_dict().items()}
        update = getattr(agent, f"update_{name}")
        update() if name == "lambda" else update(random_batch(3))
        after = agent.state_dict()
        moved[name] = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert moved["critic"] == {"critic"}
    assert moved["actor"] == {"actor", "acting_actor", "target_critic"}
    assert moved["lambda"] == {"log_lambda"}


@pytest.mark.parametrize("annealed", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_compiled_adam_steps_as_the_fused_one(annealed):
    # SLOW: the compiler takes its time
    vectors = []
    moments = []
    for on_gpu in (False, True):
        torch.manual_seed(1)
        network = som.EnsembleMLP(2, 3, 2, 1, hidden_dim=8, num_layers=2)
        lr = torch.tensor(1e-2) if annealed else 1e-2
        optimizer = som.make_adam(network.parameters(), lr=lr, on_gpu=on_gpu, compiled=True)
        (group,) = optimizer.param_groups
        assert (bool(group["fused"]), bool(group["foreach"])) == (not on_gpu, on_gpu)
        start = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
        for i in range(4):
            if annealed:
                group["lr"].fill_(1e-2 * (1 - i / 4))
            optimizer.zero_grad()
            network(torch.randn(8, 3), torch.randn(8, 1, 2)).square().mean().backward()
            optimizer.step()  # of the second on a CPU an error if it is not compiled
        vectors.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach())
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        moments.append(torch.load(file, weights_only=True)["state"])  # as a checkpoint is read
    assert (vectors[0] - start).abs().median() > 1e-2
    close(vectors[1], vectors[0], atol=1e-5, rtol=0)
    close(moments[1], moments[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    (
        {"critic_loss": "distributional", "mc_noise": "lattice"},
        pytest.param({"critic_loss": "distributional", "reference": "box", "climb_steps": 2}, marks=pytest.mark.slow),
    ),
    ids=("distributional", "box"),
)
def test_compiled_updates_equal_eager_ones(changes):
    # SLOW: the compiler takes its time
    agents = [tiny_agent(compile=compile, **changes) for compile in (False, True)]
    infos = []
    for agent in agents:
        torch.manual_seed(2)
        for i in range(3):
            info = agent.update(random_batch(i))
            agent.update_lambda()
        infos.append(info)
    modules = [(agent.actor, agent.acting_actor, agent.critic, agent.target_critic) for agent in agents]
    states = [[parameter for network in networks for parameter in network.parameters()] for networks in modules]
    for agent, state in zip(agents, states, strict=True):
        state += [agent.log_lambda, agent.mean_std]
    start = tiny_agent(**changes)
    assert (states[0][0] - start.actor.weights[0]).abs().max() > 1e-4  # the updates moved something
    close(states[1], states[0], atol=1e-5, rtol=0)
    close(infos[1], infos[0], atol=1e-4, rtol=1e-3)
