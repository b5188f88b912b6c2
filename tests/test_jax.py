"""The JAX script against the PyTorch script on the same numbers; several seeds in one process; the script as run."""

import atexit
import contextlib
import csv
import dataclasses
import inspect
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import types
from functools import partial
from unittest import mock

# The tests compile longer than they compute: without optimization, and once for all that run the same program.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

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
    "--hidden-dim 16 --num-mc-samples 4 --best-of-n 3 --batch-size 32 --num-envs 2 --learning-starts 40 --platform cpu "
    "--total-timesteps 200 --eval-frequency 100 --buffer-size 150 --checkpoint-frequency 64 --updates-per-step 2 "
    "--policy-frequency 3"
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


gym.register("Seeded-v0", SeededEnv, disable_env_checker=True)
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
    return somx.Args(**sizes), som.Args(cuda=False, compile=False, **sizes)


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
    state = somx.compile_functions(args_x, O, A).init(jnp.zeros((1, 2), jnp.uint32))
    assert [x.shape[1:] for x, _ in state.actor] == [w.shape for w in actor.weights]
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

    (loss, info), (grad, target_grad) = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))(
        to_jax(critic), to_jax(target)
    )
    close(loss, loss_t)
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


def test_the_buffer_is_a_ring_and_every_row_is_sampled():
    add = somx.compile_functions(somx.Args(), 2, 1).add
    buffer, seen = jnp.full((10, 2 * 2 + 1 + 2), -7.0), []
    for start in range(0, 36, 3):  # 10 is not a multiple of 3
        rows = jnp.arange(start, start + 3.0)[:, None] + jnp.array([0, 100, 1000, 1100, 2000, 3000, 4000.0])
        buffer = add(buffer[None], start, rows[None])[0]
        batch = somx.sample(buffer, start + 3, jax.random.PRNGKey(start), 500, 2)
        ids = batch.obs[:, 0]
        columns = [ids[:, None] + jnp.array(x) for x in ([0.0, 100], [1000.0, 1100], [2000.0])]
        close(list(batch), [*columns, ids + 3000, ids + 4000], 0)
        seen.append(set(ids.astype(int).tolist()))
    assert seen == [set(range(max(0, start + 3 - 10), start + 3)) for start in range(0, 36, 3)]


@pytest.mark.parametrize("changes", [{}, {"critic_loss": "distributional", "sde": "ve", "policy_frequency": 2}])
def test_updates_are_those_of_the_pytorch_agent(monkeypatch, changes):
    """Both agents make four updates, U = 2 a call, with the random numbers that the JAX script draws."""
    changes = {"policy_tau": 0.1, "tau": 0.2, "alpha_delay": 2, "initial_lambda": 3.0, "policy_lr": 1e-3} | changes
    args_x, args = both_args(updates_per_step=2, num_envs=1, buffer_size=64, **changes)
    torch.manual_seed(1)
    agent = som.Agent(args, O, A, torch.device("cpu"))
    functions = somx.compile_functions(args_x, O, A)
    state = functions.init(somx.make_keys(np.array([5])))
    one = partial(jax.tree.map, lambda x: jnp.array(x)[None])
    state = state._replace(**{name: one(to_jax(getattr(agent, name))) for name in ("actor", "acting_actor")})
    state = state._replace(**{name: one(to_jax(getattr(agent, name))) for name in ("critic", "target_critic")})
    columns = [np.asarray(x).reshape(B, -1) for x in batches(10)[0]]
    buffer, key = jnp.array(np.column_stack(columns))[None], jax.random.PRNGKey(9)
    draws = []
    for function in "randn", "rand":
        monkeypatch.setattr(torch, function, lambda *_, **__: torch.tensor(np.asarray(draws.pop(0))))
    for call in range(2):
        for number in (2 * call + 1, 2 * call + 2):
            keys = jax.random.split(jax.random.fold_in(key, number), 6)
            noise_key = jax.random.split(jax.random.fold_in(keys[1], 0))[0]
            draws += [jax.random.normal(noise_key, (B, N, A)), jax.random.normal(keys[2], (B,))]
            if number % args.policy_frequency == 0:
                draws += [jax.random.uniform(keys[3], (B, 2)), jax.random.normal(keys[4], (B, A))]
                draws += [jax.random.normal(keys[5], (B, K, A))]
            batch = somx.sample(buffer[0], B, keys[0], B, O)
            info = agent.update(som.Batch(*(torch.tensor(np.asarray(x)) for x in batch)))
            assert not draws
        state, info_x = functions.update(state, buffer, B, 2 * call, key[None])
    for name in "actor", "acting_actor", "critic", "target_critic":
        close(jax.tree.map(lambda x: x[0], getattr(state, name)), to_jax(getattr(agent, name)), 5e-5)
    close([state.log_lambda[0], state.mean_std[0]], [agent.log_lambda, agent.mean_std])
    assert info_x.keys() == info.keys()
    close({tag: x[0] for tag, x in info_x.items()}, info, 1e-3)


def run_loop(folder, *flags):
    """Run the script as __main__ in this process, where the toy environments are; returns its variables."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.chdir(folder), mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, flags)]):
            return types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def scalars(run_folder):
    """Tag -> steps and values."""
    events = EventAccumulator(str(run_folder), size_guidance={"tensors": 0}).Reload()  # as TensorBoard reads them
    return {
        tag: [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The variables of a finished run of two seeds."""
    folder = tmp_path_factory.mktemp("pair")
    run = run_loop(folder, *TINY, "--env-id", "Seeded-v0", "--seed", "1", "--num-seeds", "2")
    run.folders = [folder / x for x in run.folders]
    return run


def test_seed_k_of_a_run_is_the_single_run_with_that_seed(pair, tmp_path):
    # of other evaluations and checkpoints nothing is felt
    often = "--eval-frequency", "200", "--checkpoint-frequency", "10"
    single = run_loop(tmp_path, *TINY, "--env-id", "Seeded-v0", "--seed", "2", *often)
    for leaf, other in zip(jax.tree.leaves(pair.state), jax.tree.leaves(single.state), strict=True):
        np.testing.assert_allclose(leaf[1], other[0], rtol=1e-3, atol=1e-4)
        assert leaf.size == 2 or not np.allclose(leaf[0], leaf[1]) or not np.asarray(leaf).any()
    np.testing.assert_allclose(pair.buffer[1], single.buffer[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(pair.buffer[1], pair.buffer[0])


def test_rows_logs_and_checkpoint_of_a_run(pair):
    # the latest 150 of 200 rows: observation (3), next observation (3), action, reward, terminated
    for rows in np.asarray(pair.buffer):
        np.testing.assert_array_equal(rows[:, 1], rows[:, 4])  # no row crosses episodes
        np.testing.assert_array_equal(rows[:, 0] + 1, rows[:, 3])  # nor skips a step
        np.testing.assert_allclose(rows[:, 5], 2 * rows[:, 6], rtol=1e-6)  # the action that was stored was made
        np.testing.assert_allclose(rows[:, 7], rows[:, 3] - (2 * rows[:, 6]) ** 2, rtol=1e-4, atol=1e-5)
        assert (rows[:, 3] == 4).sum() > 30 and not rows[:, 8].any() and (np.abs(rows[:, 6]) <= 1).all()
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


def test_actions_are_random_until_learning_starts(pair):
    obs, keys = np.zeros((2, 2, 3), np.float32), pair.act_keys
    for step in 1, 40, 41:
        actions, _ = pair.agents.explore(pair.state, obs, keys, step)
        draws = [jax.random.uniform(jax.random.fold_in(key, step), (2, 1), minval=-1) for key in keys]
        assert np.array_equal(actions, np.stack(draws)) == (step <= 40)


def test_every_function_is_compiled_once(pair):
    assert pair.agents.update._cache_size() == pair.agents.explore._cache_size() == pair.agents.add._cache_size() == 1


def test_the_program_for_a_gpu_has_no_more_operations_for_more_seeds():
    """Lowered for CUDA, which needs no GPU: seeds share every product, the loop and the branch that is not taken."""
    args = somx.Args(hidden_dim=16, batch_size=8, updates_per_step=2, policy_frequency=2)
    agents, counts = somx.compile_functions(args, O, A), []
    for S in 1, 5:
        keys, rows = somx.make_keys(np.arange(S)), jax.ShapeDtypeStruct((S, N, 2 * O + A + 2), np.float32)
        state, buffer = agents.init(keys), jax.ShapeDtypeStruct((S, 100, 2 * O + A + 2), np.float32)
        calls = {
            agents.update: (state, buffer, 100, 0, keys),
            agents.explore: (state, jax.ShapeDtypeStruct((S, N, O), np.float32), keys, 0),
            agents.add: (buffer, 0, rows),
        }
        texts = [export.export(f, platforms=["cuda"])(*inputs).mlir_module() for f, inputs in calls.items()]
        names = "dot_general", "while", "case", "scatter"
        counts.append([[text.count(f"stablehlo.{name}") for name in names] for text in texts])
    assert counts[0] == counts[1]
    (products, loops, branches, _), (acting, *_), _ = counts[0]
    assert products > acting > 0 and loops == branches == 1


def message_of(script, capsys, **changes):
    with pytest.raises(SystemExit) as stop:
        script.check_args(script.Args(**changes))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_with_the_pytorch_scripts_words(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    cases = [{"env_id": env_id} for env_id in ("Walker3d-v4", "Pusher-v4", "DiscreteActions-v0", "Unbounded-v0")]
    cases += [{"reference": "prior", "sde": "ve"}, {"track": True}, {"capture_video": True}, {"total_timesteps": 7}]
    hints = {field.name: field.type for field in dataclasses.fields(somx.Args)}
    for flag, value in test_script.BAD_NUMBERS.items():
        name = flag[2:].replace("-", "_")
        if name in hints:
            cases.append({name: hints[name](value)})
    assert len(cases) > 30
    for case in cases:
        kwargs = {"env_id": "Truncates-v0"} | case
        message = message_of(somx, capsys, **kwargs)
        assert message.startswith("error: ") and len(message.splitlines()) == 1
        theirs = message_of(som, capsys, cuda=False, compile=False, **kwargs)
        assert message == theirs.replace("--env-id Disc", "Disc").replace("--env-id Unb", "Unb")
    assert "--num-seeds" in message_of(somx, capsys, env_id="Truncates-v0", num_seeds=0)
    assert "--platform gpu" in message_of(somx, capsys, env_id="Truncates-v0", platform="gpu")


def test_the_real_script_creates_nothing_on_bad_input_and_needs_no_torch(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["{SCRIPT}", "--env-id", "Walker2d-v9", "--platform", "cpu"]
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
    assert ours.keys() - theirs.keys() == {"num_seeds", "platform"}
    assert theirs.keys() - ours.keys() == {"cuda", "compile"}
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
    assert {"jax", "optax", "gymnasium", "mujoco", "numpy", "tensorboard", "tqdm", "tyro"} == inline.keys()


def test_script_is_short_enough_to_be_read():
    assert len(SCRIPT.read_text().splitlines()) <= 500
