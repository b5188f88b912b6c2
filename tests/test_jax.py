"""The JAX script against the PyTorch script on the same numbers; several seeds in one process; the script as run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import som_continuous_action as som
import som_continuous_action_jax as somx

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


def pairs(*xs):
    return list(zip(*xs, strict=True))


def to_jax(network):
    parameters = [[jnp.asarray(p.detach().numpy()) for p in ps] for ps in (network.weights, network.biases)]
    return list(zip(*parameters, strict=True))


def networks(seed=1):
    torch.manual_seed(seed)
    return som.MeanFlowActor(O, A, 16, 2), som.QNetwork(O, A, 16, 2), som.QNetwork(O, A, 16, 2)


def gradients(network):
    return [(w.grad, b.grad) for w, b in zip(network.weights, network.biases, strict=True)]


def both_args(**changes):
    sizes = {"hidden_dim": 16, "num_layers": 2, "batch_size": B, "num_mc_samples": K, "best_of_n": N} | changes
    return somx.Args(**sizes), som.Args(cuda=False, compile=False, **sizes)


def batches(seed):
    columns = [numbers(B, O, seed=seed), numbers(B, O, seed=seed + 1)]
    a, a_t = uniform(B, A, seed=seed + 2)
    u, u_t = uniform(B, seed=seed + 3)
    columns += [(2 * a - 1, 2 * a_t - 1), numbers(B, seed=seed + 4), ((u < 0.3) * 1.0, (u_t < 0.3).float())]
    return somx.Batch(*(x for x, _ in columns)), som.Batch(*(y for _, y in columns))


def test_networks():
    actor, critic, _ = networks()
    (obs, obs_t), (a, a_t), (times, times_t) = numbers(B, O, seed=1), numbers(B, N, A, seed=2), uniform(B, N, 2, seed=3)
    close(somx.q_network(to_jax(critic), obs, a), critic(obs_t, a_t))
    r, t = times[..., :1], times[..., 1:]
    close(somx.meanflow_actor(to_jax(actor), obs, a, r, t), actor(obs_t, a_t, times_t[..., :1], times_t[..., 1:]))


VARIANTS = [
    {"reference": reference, "sde": sde, "q_norm": q_norm, "policy_q": policy_q}
    for reference, sde in (("uniform", "vp"), ("uniform", "ve"), ("prior", "vp"))
    for q_norm, policy_q in (("batch", "mean"), ("state", "min"))
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes.values()))
def test_actor_loss_and_its_gradient(changes):
    args_x, args = both_args(sigma_max=0.8, zero_r_ratio=0.25, **changes)
    actor, critic, _ = networks()
    twins = torch.mean if args.policy_q == "mean" else torch.amin
    (batch, batch_t), (u, u_t) = batches(10), uniform(B, 2, seed=20)
    (eps, eps_t), (mc, mc_t) = numbers(B, A, seed=21), numbers(B, K, A, seed=22)
    q_fn_t = lambda obs, a: twins(critic(obs, a)[0], dim=0)
    loss_t, info_t = som.actor_loss(actor, q_fn_t, batch_t, u_t, eps_t, mc_t, torch.tensor(3.0), args)
    loss_t.backward()

    def loss_fn(actor, critic):
        u_fn, q_fn = lambda *x: somx.meanflow_actor(actor, *x), lambda *x: somx.q_of_twins(critic, args_x, *x)
        return somx.actor_loss(u_fn, q_fn, batch, u, eps, mc, 3.0, args_x)

    (loss, info), (grad, critic_grad) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
        to_jax(actor), to_jax(critic)
    )
    close(loss, loss_t)
    assert info.keys() == info_t.keys()
    close(info, info_t)
    close(grad, gradients(actor))
    assert not any(g.any() for g in jax.tree.leaves(critic_grad))


@pytest.mark.parametrize("kind", ("mse", "distributional"))
@pytest.mark.parametrize("first", (True, False))
def test_critic_loss_and_its_gradient(kind, first):
    args_x, args = both_args(critic_loss=kind, tau=0.25, gamma=0.9)
    _, critic, target = networks()
    (batch, batch_t), (next_a, next_a_t), (z, z_t) = batches(30), numbers(B, A, seed=40), numbers(B, seed=41)
    z, z_t = 3 * z, 3 * z_t
    mean_std = torch.full((2, 1), math.nan if first else 0.2)
    loss_t, info_t = som.critic_loss(critic, target, batch_t, next_a_t, z_t, mean_std, args)
    loss_t.backward()

    def loss_fn(critic, target):
        q_dist, target_q_dist = (lambda *x, p=p: somx.q_network(p, *x) for p in (critic, target))
        return somx.critic_loss(q_dist, target_q_dist, batch, next_a, z, jnp.asarray(mean_std.numpy()), args_x)

    (loss, info), (grad, target_grad) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
        to_jax(critic), to_jax(target)
    )
    close(loss, loss_t)
    assert info.keys() == info_t.keys()
    close(info, info_t)
    close(grad, gradients(critic))
    assert not any(g.any() for g in jax.tree.leaves(target_grad))
