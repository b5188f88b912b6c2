"""DACER: the chain's gradient, the entropy of its actions, one update by hand; what it shares; the script as run."""

import ast
import copy
import csv
import dataclasses
import fcntl
import json
import math
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import types
import typing

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import baselines.dacer_continuous_action as dacer
import som_continuous_action as som

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "baselines" / "dacer_continuous_action.py"
SOM_SCRIPT = ROOT / "som_continuous_action.py"
DIFFUSION_SCRIPT = ROOT / "baselines" / "diffusion_continuous_action.py"
B, O, A, T = 6, 3, 2, 4
TINY = (
    "--device cpu --no-compile --hidden-dim 16 --batch-size 32 --num-envs 2 --learning-starts 40 --num-episodes 2 "
    "--total-timesteps 200 --eval-frequency 100 --buffer-size 1000 --num-diffusion-steps 3 --alpha-delay 30 "
    "--num-entropy-samples 20"
).split()


class ClockEnv(gym.Env):
    """Its observations are the time and the last action: all its episodes begin alike."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t, *action]), float(action.sum()), False, self.t == 5, {}


gym.register("DacerClock-v0", ClockEnv, disable_env_checker=True, max_episode_steps=100)


@pytest.fixture(autouse=True)
def handlers():
    """The script, run in this process, takes over SIGINT and SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_agent(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 8, "num_layers": 2, "num_diffusion_steps": T, "batch_size": B, "compile": False}
    return dacer.Agent(dacer.Args(**(sizes | changes)), O, A, torch.device("cpu"))


def make_batch():
    terminated = (torch.arange(B) % 3 == 0).to(torch.get_default_dtype())
    return dacer.Batch(torch.randn(B, O), torch.randn(B, O), 2 * torch.rand(B, A) - 1, torch.randn(B), terminated)


# The gradient through the chain
def test_gradient_through_all_steps_is_that_of_central_differences(float64):
    actor = dacer.DiffusionActor(O, A, 4, 1, num_frequencies=2)
    d = dacer.diffusion(T, "vp")
    obs, noise, perturbation = torch.randn(B, O), torch.randn(T, B, 1, A), 0.1 * torch.randn(B, 1, A)

    def q_fn(obs, a):
        return (a * obs[:, None, :A]).sum(dim=-1).sin() - a.square().sum(dim=-1)

    def loss_of(weights):
        def eps_fn(*inputs):
            return torch.func.functional_call(actor, weights, inputs)

        return dacer.dacer_loss(eps_fn, q_fn, obs, noise, perturbation, d)[0]

    weights = {name: weight.detach().requires_grad_() for name, weight in actor.named_parameters()}
    gradients = torch.autograd.grad(loss_of(weights), [*weights.values()])
    h = 1e-6
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        assert gradient.abs().max() > 1e-4, name
        for index in np.ndindex(*weight.shape):
            moved = []
            for sign in (1, -1):
                changed = weight.detach().clone()
                changed[index] += sign * h
                moved.append(loss_of(weights | {name: changed}).item())
            slope = (moved[0] - moved[1]) / (2 * h)
            assert gradient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8), (name, index)


def test_two_steps_of_a_linear_denoiser_and_a_linear_q_in_closed_form(float64):
    d = dacer.diffusion(2, "vp", bound=1e6)  # nothing is clipped
    noise, slope = torch.randn(2, B, 1, A), torch.tensor([0.7, -0.4])
    w = torch.tensor(0.3, requires_grad=True)
    perturbation = torch.randn(B, 1, A)

    def eps_fn(obs, a, k):
        return w * a

    def q_fn(obs, a):
        return a @ slope

    loss, _ = dacer.dacer_loss(eps_fn, q_fn, torch.zeros(B, O), noise, perturbation, d)
    (gradient,) = torch.autograd.grad(loss, w)
    a_2, z = noise.squeeze(2)
    ratio = d.sigma / d.mu
    with torch.no_grad():
        a_1 = d.c0[2] * (a_2 / d.mu[2] - ratio[2] * w * a_2) + d.c1[2] * a_2 + d.std[2] * z
        a_0 = a_1 / d.mu[1] - ratio[1] * w * a_1
        da_1 = -d.c0[2] * ratio[2] * a_2  # by w
        da_0 = (1 / d.mu[1] - ratio[1] * w) * da_1 - ratio[1] * a_1
        expected = -((a_0 + perturbation.squeeze(1)) @ slope).mean()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(gradient, -(da_0 @ slope).mean())


def test_there_is_no_gradient_where_an_action_leaves_the_box(float64):
    d = dacer.diffusion(1, "vp")
    w = torch.tensor([0.1, 0.1], requires_grad=True)
    # one step gives a_0 = (a - sigma w) / mu; the first action leaves the box by the noise on it alone
    noise = torch.zeros(1, 2, 1, 2)
    perturbation = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])

    def q_fn(obs, a):
        return a.sum(dim=-1)

    loss, info = dacer.dacer_loss(lambda obs, a, k: w.expand_as(a), q_fn, torch.zeros(2, 1), noise, perturbation, d)
    (gradient,) = torch.autograd.grad(loss, w)
    slope = (d.sigma[1] / d.mu[1]).item()
    inside = abs(0.1 * slope) < 1
    # with T = 1 the schedule is almost all noise: a_0 itself is clipped, and all gradients end there
    assert not inside and gradient.tolist() == [0, 0] and info["actions/saturated"] == 1
    far = dacer.diffusion(1, "vp", bound=1.9)
    loss, _ = dacer.dacer_loss(lambda obs, a, k: w.expand_as(a), q_fn, torch.zeros(2, 1), noise, 2 * perturbation, far)
    (gradient,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(gradient, torch.tensor([slope / 2, slope]))


# The entropy
def test_entropy_of_three_components_that_do_not_meet():
    centres = torch.tensor([[-0.6, -0.6], [0.7, 0.0], [-0.3, 0.8]])
    component = torch.randint(3, (8, 200))
    x = centres[component] + 0.05 * torch.randn(8, 200, 2)
    entropy = dacer.gmm_entropy(x)
    expected = math.log(3) + math.log(2 * math.pi * math.e * 0.05**2)
    assert expected == pytest.approx(-2.05, abs=0.01)
    assert entropy.shape == (8,) and (entropy - expected).abs().max() < 0.6
    assert abs(entropy.mean().item() - expected) < 0.15


@pytest.mark.parametrize("A_", [1, 2, 6])
def test_entropy_of_one_gaussian_and_of_a_scaled_one(A_):
    x = 0.1 * torch.randn(8, 200, A_)
    resp = torch.zeros(8, 200, 3, dtype=torch.float64)
    resp[..., 0] = 1  # two components are empty from the start
    weights, means, cholesky = dacer.fit_gmm(x.double(), resp)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert (weights[:, 0] - 1).abs().max() < 1e-6
    torch.testing.assert_close(means[:, 0], x.double().mean(dim=1))
    covariance = torch.stack([state.double().T.cov(correction=0).reshape(A_, A_) for state in x])
    torch.testing.assert_close((cholesky @ cholesky.mT)[:, 0], covariance + 1e-6 * torch.eye(A_), rtol=1e-5, atol=1e-8)
    true = A_ * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1))
    # a fit of three to one overlaps: the bound is above, by more where there are few coordinates
    assert -0.05 * A_ < dacer.gmm_entropy(x).mean().item() - true < 0.7
    torch.manual_seed(3)
    one = dacer.gmm_entropy(x.double())
    torch.manual_seed(3)
    ten = dacer.gmm_entropy(10 * x.double())
    assert (ten - one).mean().item() == pytest.approx(A_ * math.log(10), abs=0.05 * A_)


def test_states_do_not_mix_and_entropy_moves_with_its_actions():
    x = torch.randn(3, 50, 2, dtype=torch.float64)
    resp = dacer.k_means(x, 3)
    together = dacer.fit_gmm(x, resp, max_rounds=5, tolerance=0)
    for i in range(3):
        alone = dacer.fit_gmm(x[i : i + 1], resp[i : i + 1], max_rounds=5, tolerance=0)
        for both, one in zip(together, alone, strict=True):
            torch.testing.assert_close(both[i : i + 1], one)


def test_k_means_finds_clusters_and_survives_points_that_coincide():
    centres = torch.tensor([[-0.6, -0.6], [0.7, 0.0], [-0.3, 0.8]], dtype=torch.float64)
    label = torch.randint(3, (5, 60))
    resp = dacer.k_means(centres[label] + 0.02 * torch.randn(5, 60, 2), 3)
    assert (resp.sum(dim=-1) == 1).all()
    same = label.unsqueeze(1) == label.unsqueeze(2)
    assert torch.equal(resp @ resp.mT == 1, same)
    for x in (torch.ones(2, 40, 3), torch.sign(torch.randn(2, 40, 1))):
        entropy = dacer.gmm_entropy(x)
        assert entropy.isfinite().all() and (entropy < -3).all()  # the floor of the variances is 1e-6


def test_the_centre_of_an_empty_cluster_stays(monkeypatch):
    drawn = iter([0, 0, 5])  # the first two centres are one point
    monkeypatch.setattr(torch, "multinomial", lambda weights, n: torch.full((1, 1), next(drawn)))
    x = torch.tensor([5 * [-1.0] + 5 * [0.0, 0.4]], dtype=torch.float64).unsqueeze(-1)
    assert dacer.k_means(x, 3).sum(dim=1).tolist() == [[5, 0, 10]]


@pytest.mark.parametrize(("entropy", "factor"), [(-0.8, -1), (-1.0, 1)])
def test_lambda_falls_where_there_is_more_entropy_than_wanted(monkeypatch, entropy, factor):
    agent = make_agent()
    before = agent.log_lambda.item()
    seen = []
    monkeypatch.setattr(dacer, "gmm_entropy", lambda a, n: seen.append((a, n)) or torch.full((len(a),), A * entropy))
    info = agent.update_lambda(torch.randn(B, O))
    assert before == pytest.approx(math.log(3)) and agent.log_lambda.item() - before == pytest.approx(0.03 * factor)
    assert info["actions/entropy"].item() == pytest.approx(entropy)  # a coordinate, target_entropy is -0.9
    assert info["losses/lambda"] == agent.log_lambda.exp()
    ((actions, num_components),) = seen
    assert actions.shape == (B, 200, A) and num_components == 3 and actions.abs().max() <= 1


def test_entropy_is_that_of_the_actions_with_their_noise(monkeypatch):
    monkeypatch.setattr(dacer, "ddpm_sample", lambda eps_fn, obs, noise, d: 0.0 * noise[0])
    seen = []
    monkeypatch.setattr(dacer, "gmm_entropy", lambda a, n: seen.append(a) or torch.zeros(len(a)))
    make_agent(initial_lambda=2.0).update_lambda(torch.randn(50, O))
    assert seen[0].std().item() == pytest.approx(0.2, rel=0.03)


def test_the_entropy_is_that_of_the_policys_chains(monkeypatch):
    seen, sample, agent, obs = [], dacer.ddpm_sample, make_agent(), torch.randn(50, O)
    monkeypatch.setattr(dacer, "ddpm_sample", lambda *inputs: seen.append(inputs) or sample(*inputs))
    agent.update_lambda(obs)
    ((eps_fn, given, noise, d),) = seen
    assert eps_fn is agent.actor and given is obs and d is agent.diffusion and noise.shape == (T, 50, 200, A)
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02


# The agent
def test_acting_is_one_chain_and_exploring_adds_noise():
    agent, obs = make_agent(), torch.randn(200, O)
    torch.manual_seed(5)
    a, a_0 = agent.act(obs)
    torch.manual_seed(5)
    noise = torch.randn(T, 200, 1, A)
    with torch.no_grad():
        expected = dacer.ddpm_sample(agent.actor, obs, noise, agent.diffusion)
    torch.testing.assert_close(a_0, expected, rtol=0, atol=0)
    torch.testing.assert_close(a, expected[:, 0], rtol=0, atol=0)
    torch.manual_seed(5)
    noisy, same = agent.act(obs, explore=True)
    assert torch.equal(same, a_0) and noisy.abs().max() <= 1
    inside = noisy.abs() < 1
    assert (noisy - a)[inside & (a.abs() < 0.2)].std().item() == pytest.approx(0.3, rel=0.2)  # 0.1 lambda, from 3 on
    torch.manual_seed(9)
    by_generator = agent.act(obs, generator=torch.Generator().manual_seed(5))[0]
    assert torch.equal(by_generator, a)


def test_the_policy_sees_the_smaller_mean_and_leaves_the_critics_alone():
    agent, obs, a = make_agent(), torch.randn(B, O), torch.randn(B, 5, A, requires_grad=True)
    mean, _ = agent.critic(obs, a)
    q = agent.q_fn(obs, a)
    assert torch.equal(q, mean.amin(dim=0))
    q.sum().backward()
    assert a.grad.abs().max() > 0 and all(weight.grad is None for weight in agent.critic.parameters())


def test_updates_by_hand(float64):
    agent = make_agent(policy_frequency=2, tau=0.1, policy_lr=1e-2, q_lr=3e-3, reward_scale=0.5).double()
    actor, critic, target = (copy.deepcopy(x) for x in (agent.actor, agent.critic, agent.target_critic))
    adams = [torch.optim.Adam(actor.parameters(), lr=1e-2), torch.optim.Adam(critic.parameters(), lr=3e-3)]
    mean_std, d = torch.full((2, 1), math.nan), agent.diffusion
    for update in range(1, 5):
        batch = make_batch()
        torch.manual_seed(update)
        info = agent.update(batch, update % 2 == 0)
        torch.manual_seed(update)
        noise = torch.randn(T, B, 1, A)
        next_actions = dacer.ddpm_sample(actor, batch.next_obs, noise, d).squeeze(1).detach()
        next_actions = (next_actions + 0.3 * torch.randn(B, A)).clamp(-1, 1)
        z = torch.randn(B)
        rest = (batch, next_actions, z, mean_std, agent.args)
        loss, mean_std, expected = som.distributional_critic_loss(critic, target, *rest)
        adams[1].zero_grad()
        loss.backward()
        adams[1].step()
        torch.testing.assert_close(info["losses/qf_loss"], expected["losses/qf_loss"])
        assert ("losses/actor_loss" in info) == (update % 2 == 0)
        if update % 2 == 0:
            noise = torch.randn(T, B, 1, A)
            a = dacer.ddpm_sample(actor, batch.obs, noise, d)
            a = (a + 0.3 * torch.randn(B, 1, A)).clamp(-1, 1)
            mean, _ = critic(batch.obs, a)
            loss = -torch.minimum(mean[0], mean[1]).mean()
            adams[0].zero_grad()
            loss.backward()
            adams[0].step()
            som.soft_update(target, critic, 0.1)
            torch.testing.assert_close(info["losses/actor_loss"], loss.detach())
        networks = ((agent.actor, actor), (agent.critic, critic), (agent.target_critic, target))
        for mine, by_hand in networks:
            torch.testing.assert_close([*mine.parameters()], [*by_hand.parameters()], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(agent.mean_std, mean_std)
    assert agent.log_lambda.item() == pytest.approx(math.log(3))  # its updates are apart


def test_the_policy_climbs_a_fixed_critic():
    agent = make_agent(policy_lr=1e-2, hidden_dim=16)
    agent.q_fn = lambda obs, a: -(a - 0.5).square().sum(dim=-1)
    batch = make_batch()
    losses = [agent.update_actor(batch)["losses/actor_loss"].item() for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("seed", [0, 2])  # they end on different hills
def test_in_one_state_all_actions_end_on_the_top_of_one_hill(seed):
    """Nothing in the loss keeps actions apart; only the noise on them, here none, would."""
    agent = make_agent(noise_scale=0.0)
    agent.q_fn = lambda obs, a: -((a[..., 0] ** 2 - 0.25) ** 2) / 0.25**2  # hills at 0.5 and -0.5
    torch.manual_seed(seed)
    agent.actor = dacer.DiffusionActor(1, 1, 32, 2)
    agent.optimizers["actor"] = torch.optim.Adam(agent.actor.parameters(), lr=3e-3)
    one_state = torch.zeros(64, 1)
    for _ in range(300):
        agent.update_actor(dacer.Batch(one_state, one_state, one_state, None, None))
    noise = torch.randn(T, 1, 1000, 1)
    a = dacer.ddpm_sample(agent.actor, one_state[:1], noise, agent.diffusion).flatten().detach()
    assert a.mean().abs().item() == pytest.approx(0.5, abs=0.02) and a.std() < 0.03
    assert (a > 0).all() or (a < 0).all()


@pytest.mark.slow  # half a minute of compiling
def test_compiled_losses_equal_eager_ones():
    batch = make_batch()
    results = []
    for compile_ in (False, True):
        agent = make_agent(compile=compile_, num_diffusion_steps=2)
        torch.manual_seed(1)
        results.append(agent.update(batch))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# What the scripts share
def definitions(text):
    """Source of the functions and classes of a module, decorators included, by name."""
    lines = text.splitlines(keepends=True)
    sources = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            sources[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return sources


OWN = "dacer_loss k_means maximization expectation log_volume fit_gmm gmm_entropy".split()
OF_DIFFUSION = "DiffusionActor diffusion ddpm_sample".split()


def test_shared_functions_are_equal_to_the_letter():
    paths = (SCRIPT, SOM_SCRIPT, DIFFUSION_SCRIPT)
    mine, of_som, of_diffusion = (definitions(path.read_text()) for path in paths)
    assert mine.keys() - of_som.keys() == {*OWN, *OF_DIFFUSION}
    different = {name for name in mine.keys() & of_som.keys() if mine[name] != of_som[name]}
    assert different == {"Args", "Agent", "check_args", "resumed_args", "make_policy", "load_policy"}
    assert mine["make_policy"] == of_diffusion["make_policy"]
    assert mine["distributional_critic_loss"] == of_som["distributional_critic_loss"]
    assert all(mine[name] == of_diffusion[name] for name in OF_DIFFUSION)
    order = [name for name in mine if name in of_som]
    assert order == [name for name in of_som if name in mine]
    (fields,) = re.findall(r"(?m)^Diffusion = .*", DIFFUSION_SCRIPT.read_text())
    assert fields in SCRIPT.read_text()


def test_the_main_block_is_that_of_som_but_for_names_and_lambda():
    mine, theirs = (path.read_text() for path in (SCRIPT, SOM_SCRIPT))
    mine, theirs = (text[text.index('if __name__ == "__main__":') :] for text in (mine, theirs))
    changes = {
        'project="som"': 'project="dacer"',
        "agent.acting_actor.": "agent.actor.",
        '        changes = {"best_of_n": args.best_of_n, "policy_q": args.policy_q, '
        '"deterministic": args.deterministic}\n': "",
        "load_policy(source, device, **changes)": "load_policy(source, device)",
        "agent.update_lambda()": "info |= agent.update_lambda(rb.sample(args.batch_size).obs)",
        "args.preset is not None:\n        preset = PRESETS[args.preset]": 'args.preset == "laptop":',
        "preset=args.preset, **preset": 'preset="laptop", **LAPTOP',
        "            if args.anneal_steps > 0:\n"
        "                agent.set_learning_rates(lr_factor_at(global_step, args))\n": "",
    }
    for words, other in changes.items():
        assert theirs.count(words) == 1
        theirs = theirs.replace(words, other)
    assert mine == theirs


def test_the_script_is_one_file_with_the_metadata_of_som():
    mine, theirs = (path.read_text() for path in (SCRIPT, SOM_SCRIPT))
    assert mine[: mine.index('"""')] == theirs[: theirs.index('"""')]
    assert not re.search(r"(?m)^(from|import) (som|mfp|baselines|benchmark)\w*", mine)
    imports = [text[text.index("\nimport ") : text.index("CHECKPOINT_FORMAT")] for text in (mine, theirs)]
    assert imports[0] == imports[1]


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(dacer.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(dacer.Args):
        assert field.name in read, f"{field.name} has no reader"
        hint = hints[field.name]
        is_choice = field.default in typing.get_args(hint)
        assert is_choice or field.default is None or type(field.default) is hint, field.name


def test_defaults_are_table_3():
    args = dacer.Args()
    table = {"buffer_size": 10**6, "learning_starts": 30_000, "batch_size": 256, "gamma": 0.99, "tau": 0.005}
    table |= {"reward_scale": 0.2, "num_layers": 3, "hidden_dim": 256, "policy_lr": 3e-4, "q_lr": 3e-4}
    table |= {"num_diffusion_steps": 20, "alpha_delay": 10_000, "num_components": 3, "num_entropy_samples": 200}
    table |= {"alpha_lr": 3e-2, "target_entropy": -0.9}
    assert {name: getattr(args, name) for name in table} == table
    laptop = dacer.LAPTOP
    shared = laptop.keys() & som.LAPTOP.keys()
    assert len(shared) == 8 and all(laptop[name] == som.LAPTOP[name] for name in shared)
    assert "num_diffusion_steps" not in laptop  # one chain, of as many steps as with the defaults


# The script as a user runs it
def run_loop(folder, *flags):
    """Run the script as __main__ in this process; returns its variables."""
    locked, flock = [], fcntl.flock
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(SCRIPT), *flags])
        patch.setattr(fcntl, "flock", lambda file, operation: (locked.append(file), flock(file, operation)))
        try:
            run = types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="__main__"))
            run.writer.close()
        finally:
            for file in locked:  # as at the end of a process
                file.close()
    return run


def scalars(run_folder):
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_walker2d_as_a_user_runs_it(tmp_path):
    words = [sys.executable, "-W", "ignore", SCRIPT, "--env-id", "Walker2d-v4", *TINY, "--save-model"]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert run_folder.name.startswith("Walker2d-v4__dacer__1__")
    config = json.loads((run_folder / "config.json").read_text())
    assert config["script"] == "dacer_continuous_action.py" and config["num_diffusion_steps"] == 3
    rows = list(csv.DictReader((run_folder / "evaluations.csv").open()))
    assert [int(row["global_step"]) for row in rows] == [100, 200]
    logged = scalars(run_folder)
    assert logged.keys() == {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/eval_return", "losses/qf_loss",
        "losses/td_error", "losses/qf_values", "losses/qf_std", "losses/actor_loss", "actions/saturated",
        "actions/entropy", "losses/lambda",
    }  # fmt: skip
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    model = torch.load(run_folder / "model.pt", weights_only=True)
    assert model["config"] == config
    dacer.DiffusionActor(17, 6, 16, 3).load_state_dict(model["actor"])
    dacer.QNetwork(2, 17, 6, 2, 16, 3).load_state_dict(model["critic"])


def test_a_resumed_run_is_bit_equal_to_one_that_was_not_stopped(tmp_path):
    # episodes begin alike, and none is cut by the checkpoint at 100: the resumed run has nothing that is new
    flags = (*TINY, "--env-id", "DacerClock-v0", "--checkpoint-frequency", "20", "--eval-frequency", "100")
    whole = run_loop(tmp_path, *flags, "--total-timesteps", "180")
    first = run_loop(tmp_path, *flags, "--total-timesteps", "100")
    torch.manual_seed(12345)
    again = run_loop(tmp_path, "--resume", str(first.run_folder), "--total-timesteps", "180")
    assert again.num_updates == whole.num_updates == 70 > first.num_updates
    assert whole.agent.log_lambda < math.log(3)  # by two updates, one of them after the checkpoint
    states = [run.agent.state_dict() for run in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    taken = {name: int(x.state_dict()["state"][0]["step"]) for name, x in again.agent.optimizers.items()}
    assert taken == {"critic": 70, "actor": 35, "lambda": 2}
    for name, optimizer in again.agent.optimizers.items():
        moments, expected = optimizer.state_dict()["state"], whole.agent.optimizers[name].state_dict()["state"]
        torch.testing.assert_close(moments, expected, rtol=0, atol=0)


def test_preset_load_policy_and_evaluate(tmp_path, monkeypatch, capsys):
    flags = "--preset laptop --env-id Pendulum-v1 --learning-starts 40 --total-timesteps 80 --num-episodes 2"
    run = run_loop(tmp_path, *flags.split(), "--device", "cpu", "--no-compile")
    config = json.loads((tmp_path / run.run_folder / "config.json").read_text())
    overridden = {"learning_starts": 40, "total_timesteps": 80}
    assert {name: config[name] for name in dacer.LAPTOP} == dacer.LAPTOP | overridden

    policy = dacer.load_policy(tmp_path / run.run_folder)
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    torch.manual_seed(3)
    expected, _ = run.agent.act(torch.as_tensor(observation).unsqueeze(0))
    torch.manual_seed(3)
    action = policy(observation)
    np.testing.assert_allclose(action, 2 * expected.squeeze(0).numpy(), rtol=1e-6)  # torques in [-2, 2]
    batch = policy(np.stack([observation, observation]))
    assert batch.shape == (2, 1) and batch.dtype == env.action_space.dtype and np.abs(batch).max() <= 2

    for words, code in ((["--evaluate", str(run.run_folder)], None),):
        with pytest.raises(SystemExit) as stop:
            run_loop(tmp_path, *words)
        assert stop.value.code == code
    returned = float(re.search(r"return (-?[\d.]+) \+-", capsys.readouterr().out.splitlines()[-1])[1])
    rows = list(csv.DictReader((tmp_path / run.run_folder / "evaluations.csv").open()))
    assert returned == pytest.approx(float(rows[-1]["return_mean"]), abs=0.06)


BAD_NUMBERS = {
    "--total-timesteps": "0", "--num-envs": "-1", "--learning-starts": "-5", "--buffer-size": "0", "--batch-size": "0",
    "--updates-per-step": "0", "--policy-frequency": "0", "--gamma": "1.5", "--tau": "1.5", "--reward-scale": "0",
    "--policy-lr": "-1e-4", "--q-lr": "nan", "--hidden-dim": "0", "--num-layers": "0", "--checkpoint-frequency": "0",
    "--num-episodes": "0", "--num-frequencies": "0", "--num-diffusion-steps": "0", "--noise-scale": "-1",
    "--initial-lambda": "0", "--alpha-lr": "0", "--alpha-delay": "0", "--target-entropy": "nan",
    "--num-entropy-samples": "0", "--num-components": "0", "--eval-frequency": "0", "--seed": "-1",
}  # fmt: skip


def refused(tmp_path, capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, *flags)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_bad_numbers_are_refused(tmp_path, capsys, flag):
    assert flag in refused(tmp_path, capsys, "--env-id", "Pendulum-v1", flag, BAD_NUMBERS[flag])
    assert not any(tmp_path.iterdir())


def test_every_number_has_a_bad_value_above():
    numbers = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(dacer.Args) if f.type in (int, float)}
    assert numbers == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Walker3d-v4", "Did you mean: `Walker2d`"),
        ("--env-id CartPole-v1", "supported are flat vectors"),
        ("--env-id Pendulum-v1 --total-timesteps 199 --learning-starts 199", "--learning-starts"),
        ("--env-id Pendulum-v1 --buffer-size 1", "--num-envs"),
        ("--env-id Pendulum-v1 --noise-scale 0", "--noise-scale 0 needs --no-autotune"),
        ("--env-id Pendulum-v1 --device gpu", "finds no GPU"),
        ("--resume nowhere", "nowhere cannot be used"),
    ],
)
def test_bad_input_is_refused(monkeypatch, tmp_path, capsys, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in refused(tmp_path, capsys, *flags.split())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--schedule", "none"], ["--best-of-n", "4"]])
def test_unknown_flags_are_refused(tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        run_loop(tmp_path, *flags)
    assert stop.value.code == 2 and not any(tmp_path.iterdir())


def test_what_cannot_change_in_a_resumed_run(tmp_path, capsys):
    run = run_loop(tmp_path, *TINY, "--env-id", "Pendulum-v1", "--total-timesteps", "60")
    for flag, value in {"--num-diffusion-steps": "5", "--schedule": "linear", "--alpha-lr": "0.1"}.items():
        message = refused(tmp_path, capsys, "--resume", str(run.run_folder), flag, value)
        assert f"{flag} is" in message and "cannot change" in message
