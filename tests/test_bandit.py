"""The 2D bandit: its rewards and counts against closed forms, its script as a user runs it, and the numbers to reach.

The numbers take an hour on two slow cores and are left out by default: pytest -m slow tests/test_bandit.py runs them.
"""

import ast
import concurrent.futures
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import typing

import numpy as np
import pytest
import scipy.stats
import torch

import mfp_continuous_action as mfp
import som_bandit_2d as bandit
import som_continuous_action as som

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "som_bandit_2d.py"
TASKS = "eight-gaussians", "two-moons", "checkerboard"
TINY = "--total-updates 100 --num-mc-samples 4 --hidden-dim 16 --q-hidden-dim 16 --batch-size 32 --best-of-n 3"
TINY = f"{TINY} --q-updates 1".split()
PICTURES = {"arrows.png", "training.png", "scores.png"}
ROOT2 = math.sqrt(2)
FEW = 200  # actions in the short runs of a copy of the script


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes):
    return bandit.Args(**({"num_mc_samples": 64, "hidden_dim": 16, "q_hidden_dim": 16, "batch_size": 32} | changes))


# The bandit
def test_eight_gaussians_are_those_of_appendix_f():
    task = bandit.Bandit("eight-gaussians")
    a = (4 * torch.rand(200, 2) - 2).double()
    angles = 2 * np.pi * np.arange(8) / 8
    density = sum(
        weight * scipy.stats.multivariate_normal(ROOT2 * np.array([np.cos(x), np.sin(x)]), 0.3**2).pdf(a.numpy())
        for weight, x in zip([2, 1] * 4, angles, strict=True)
    )
    reward = task.reward(a.float()).numpy()
    top = scipy.stats.multivariate_normal([0, 0], 0.3**2).pdf([0, 0]) * 2
    np.testing.assert_allclose(reward, density / top, rtol=2e-2, atol=1e-4)  # neighbours add a little at the peak
    ratio = reward / density
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert task.centres[0].tolist() == pytest.approx([ROOT2, 0]) and task.std == 0.3


@pytest.mark.parametrize("name", TASKS)
def test_rewards_fill_zero_to_one(name):
    task = bandit.Bandit(name)
    fine = torch.cartesian_prod(*2 * [torch.linspace(-bandit.BOX, bandit.BOX, 400)])
    reward = task.reward(fine)
    assert reward.min() >= 0 and reward.min() < 1e-3
    assert 0.995 < reward.max() <= 1 + 1e-5
    assert len(task.high_modes) == 4
    assert task.reward(fine.reshape(100, 1600, 2)).shape == (100, 1600)


@pytest.mark.parametrize("name", TASKS)
def test_gradient_of_the_reward_is_the_closed_form(name):
    task, a = bandit.Bandit(name), 3 * torch.rand(50, 2) - 1.5
    pull = task.centres - a.unsqueeze(1)  # (M, modes, 2)
    density = task.weights * torch.exp(-pull.square().sum(-1) / (2 * task.std**2)) / task.max_density
    expected = (density.unsqueeze(-1) * pull / task.std**2).sum(dim=1)
    gradient = torch.func.grad(lambda a: task.reward(a).sum())(a)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
    log_gradient = torch.func.grad(lambda a: task.log_reward(a).sum())(a)
    torch.testing.assert_close(log_gradient * task.reward(a).unsqueeze(1), expected, atol=1e-4, rtol=1e-3)


def test_counts_of_points_made_by_hand():
    task = bandit.Bandit("eight-gaussians")
    points = {
        "N": [(0, ROOT2), (0.49, ROOT2), (0, ROOT2 + 0.51)],
        "E": [(ROOT2, 0)],
        "S": [(0, -ROOT2), (0.3, -ROOT2 - 0.3), (-0.4, -ROOT2 + 0.4)],
        "W": [(-ROOT2, 0), (-ROOT2 - 0.49, 0), (-ROOT2, 0.49), (-ROOT2, -0.51)],
        "low": [(1, 1), (-1, 1), (-1, -1.3), (1.4, -1.4)],
        "none": [(0, 0), (2.4, 2.4)],
    }
    a = torch.tensor(list(itertools.chain(*points.values())))
    assert task.mode_counts(a) == {"N": 2, "E": 1, "S": 2, "W": 3, "low": 3}
    result = bandit.measure(task, a, a)
    assert result["high_mode_share"] == [2 / len(a), 1 / len(a), 2 / len(a), 3 / len(a)]
    assert result["low_mode_share"] == 3 / len(a)


@pytest.mark.parametrize("name", TASKS)
def test_every_high_mode_counts_its_own_centres(name):
    task = bandit.Bandit(name)
    compass = {"N": (1, 1), "S": (1, -1), "E": (0, 1), "W": (0, -1)}
    counted = [i for group in task.high_modes.values() for i in group]
    assert len(set(counted)) == len(counted)
    middles = {label: task.centres[group].mean(dim=0) for label, group in task.high_modes.items()}
    for label, group in task.high_modes.items():
        counts = task.mode_counts(task.centres[group])
        assert counts[label] == len(group)
        for letter in label.replace("upper ", "N").replace("lower ", "S"):
            axis, sign = compass[letter]  # on that side of the mean of all
            assert sign * (middles[label][axis] - sum(middles.values())[axis] / 4) > 0, label


def test_perturbations_of_the_reward():
    a = torch.zeros(20_000, 2)
    task = bandit.Bandit("eight-gaussians", noise=0.3, bump_scale=0.7, bump_std=0.5)
    answers = task.query(a) - task.reward(a)
    assert answers.mean().item() == pytest.approx(0.7, abs=0.01) and answers.std().item() == pytest.approx(
        0.3, abs=0.01
    )
    a[:, 0] = 0.5  # one std of the bump away from its centre
    assert (task.query(a) - task.reward(a)).mean().item() == pytest.approx(0.7 * math.exp(-0.5), abs=0.01)
    clean = bandit.Bandit("eight-gaussians")
    torch.testing.assert_close(clean.query(a), clean.reward(a))


def test_wasserstein_distance_of_a_shift_and_of_two_pairs():
    task, a = bandit.Bandit("eight-gaussians"), torch.randn(100, 2)
    shift = torch.tensor([0.3, -0.4])
    assert bandit.measure(task, a, (a + shift)[torch.randperm(100)])["w2_to_pf_ode"] == pytest.approx(0.5, rel=1e-5)
    pair, other = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert bandit.measure(task, pair, other)["w2_to_pf_ode"] == pytest.approx(math.sqrt(0.5), rel=1e-5)


# The method
def gaussian_case(reference, t, K):
    """Score of exp(alpha Q) when it is a Gaussian N(m, s^2 I), by estimate_score and mix_score, and in closed form."""
    m, s, a_t = torch.tensor([0.5, -0.3]), 0.4, torch.randn(16, 2)
    t = torch.full((16, 1), t)
    mu, sigma, _, _ = bandit.cosine_schedule(t) if reference == "prior" else bandit.vp_schedule(t, 0.1, 1.0)
    eps, one = torch.randn(16, K, 2), torch.zeros(16, 1)

    def log_target(obs, a):
        value = -0.5 * (a - m).square().sum(-1) / s**2
        return value + 0.5 * a.square().sum(-1) if reference == "prior" else value

    score, logits = bandit.estimate_score(log_target, one, a_t, mu, sigma, eps, 1.0, reference, clip=False)
    curvature = 1 / s**2 - (1 if reference == "prior" else 0)
    mixed = bandit.mix_score(score, logits, a_t, mu, sigma, eps, reference, 1 / curvature)
    return score, mixed, -(a_t - mu * m) / (mu.square() * s**2 + sigma.square())


@pytest.mark.parametrize("reference", ["uniform", "prior"])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_mixed_score_of_a_gaussian_is_exact_for_every_k(reference, t):
    for K in (1, 2, 30):
        _, mixed, true = gaussian_case(reference, t, K)
        torch.testing.assert_close(mixed, true, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("reference", ["uniform", "prior"])
def test_both_scores_converge_to_that_of_the_mixture(reference):
    task, K, alpha = bandit.Bandit("eight-gaussians"), 20_000, 1.0
    t, a_t = torch.full((6, 1), 0.6), torch.randn(6, 2)
    mu, sigma, _, _ = bandit.cosine_schedule(t) if reference == "prior" else bandit.vp_schedule(t, 0.1, 1.0)

    def q_fn(obs, a):
        log_r = task.log_components(a.flatten(0, 1)).logsumexp(dim=1).unflatten(0, a.shape[:2])
        return log_r + 0.5 * a.square().sum(-1) if reference == "prior" else log_r

    var = mu.square() * task.std**2 + sigma.square()  # (M, 1)
    pull = mu.unsqueeze(1) * task.centres - a_t.unsqueeze(1)  # (M, modes, 2)
    rho = (task.weights.log() - 0.5 * pull.square().sum(-1) / var).softmax(dim=1)
    true = (rho.unsqueeze(-1) * pull).sum(dim=1) / var
    eps = torch.randn(6, K, 2)
    score, logits = bandit.estimate_score(q_fn, eps[:, 0, :1], a_t, mu, sigma, eps, alpha, reference, clip=False)
    for local_var in (1e-3, 0.1, 10.0):
        mixed = bandit.mix_score(score, logits, a_t, mu, sigma, eps, reference, local_var)
        torch.testing.assert_close(mixed, true, atol=0.15, rtol=0.05)
    torch.testing.assert_close(score, true, atol=0.15, rtol=0.05)


def test_mixed_score_has_less_variance_where_it_is_needed():
    errors = {}
    for estimator in ("gradient", "mixed"):
        torch.manual_seed(1)
        agent = bandit.Agent(small(oracle_critic=True, estimator=estimator), "som", bandit.Bandit("eight-gaussians"))
        a_t = torch.randn(1, 2).expand(200, 2)
        errors[estimator] = agent.velocity(a_t, torch.full((200, 1), 0.8)).var(dim=0).sum().item()
    assert errors["mixed"] < 0.3 * errors["gradient"]


def test_ode_of_the_prior_matched_field_reaches_the_high_modes(monkeypatch):
    monkeypatch.setattr(bandit, "NUM_ODE_STEPS", 40)
    task = bandit.Bandit("eight-gaussians")
    agent = bandit.Agent(small(oracle_critic=True, num_mc_samples=128), "som", task)
    result = bandit.measure(task, ends := bandit.integrate(agent, torch.randn(300, 2), seed=0), ends)
    assert result["mean_reward"] > 0.83 and result["low_mode_share"] < 0.06
    assert min(result["high_mode_share"]) > 0.15


def test_ode_of_the_papers_field_reaches_the_high_modes(monkeypatch):
    monkeypatch.setattr(bandit, "NUM_ODE_STEPS", 40)
    task = bandit.Bandit("eight-gaussians")
    agent = bandit.Agent(small(oracle_critic=True, num_mc_samples=128, reference="uniform"), "som", task)
    result = bandit.measure(task, ends := bandit.integrate(agent, torch.randn(300, 2), seed=0), ends)
    assert result["mean_reward"] > 0.83 and result["low_mode_share"] < 0.06
    assert min(result["high_mode_share"]) > 0.15


@pytest.mark.parametrize("alpha", [10.0, 3.0])
def test_ode_of_the_box_is_the_histogram_of_exp_alpha_r(monkeypatch, alpha):
    monkeypatch.setattr(bandit, "NUM_ODE_STEPS", 40)
    task = bandit.Bandit("two-moons")
    args = small(oracle_critic=True, num_mc_samples=128, reference="box", inverse_temperature=alpha)
    ends = bandit.integrate(bandit.Agent(args, "som", task), torch.randn(1000, 2), seed=0)
    assert ends.abs().max() <= bandit.BOX
    axis = bandit.BOX * ((torch.arange(200) + 0.5) / 100 - 1)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    expected = (alpha * task.reward(grid)).flatten().softmax(dim=0).reshape(5, 40, 5, 40).sum(dim=(1, 3))
    cells = ((ends / bandit.BOX + 1) / 2 * 5).long().clamp(0, 4)
    found = torch.bincount(5 * cells[:, 0] + cells[:, 1], minlength=25) / len(ends)
    # half the sum over cells of the mean distance of a share from its expectation, for independent samples
    sampling = 0.5 * (2 / math.pi * expected * (1 - expected) / len(ends)).sqrt().sum()
    assert 0.5 * (found - expected.flatten()).abs().sum() < 1.7 * sampling


def test_sobol_noise_is_standard_normal(monkeypatch):
    seen = []
    monkeypatch.setattr(bandit, "estimate_score", lambda *args, **kwargs: seen.append(args[5]) or (args[2], None))
    agent = bandit.Agent(small(estimator="gradient"), "som", bandit.Bandit("eight-gaussians"))
    agent.velocity(torch.zeros(2000, 2), torch.full((2000, 1), 0.5))
    (eps,) = seen
    assert eps.shape == (2000, 64, 2)
    for axis in range(2):
        assert scipy.stats.kstest(eps[:, 0, axis], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(eps[:, 0].T)[0, 1]) < 0.08
    assert eps.mean(dim=1).std() < 0.5 / math.sqrt(64)  # spread more evenly than independent points


def test_training_fits_the_critic_and_leaves_it_alone_with_an_oracle():
    task, a = bandit.Bandit("eight-gaussians"), 4 * torch.rand(32, 2) - 2
    for oracle, method in itertools.product((False, True), ("som", "mfp")):
        agent = bandit.Agent(small(oracle_critic=oracle), method, task)
        before = [weight.clone() for weight in (*agent.critic.parameters(), *agent.actor.parameters())]
        agent.update(a.unsqueeze(0), task.reward(a).unsqueeze(0))
        after = [*agent.critic.parameters(), *agent.actor.parameters()]
        moved = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        half = len([*agent.critic.parameters()])
        assert any(moved[:half]) != oracle and any(moved[half:])


def test_the_critics_gradient_is_that_of_its_own_loss_alone():
    task, a = bandit.Bandit("eight-gaussians"), 4 * torch.rand(32, 2) - 2
    agent = bandit.Agent(small(), "som", task)
    q = agent.q_fn(torch.zeros(32, 1), a.unsqueeze(1)).squeeze(1)
    expected = torch.autograd.grad((q - task.reward(a)).square().mean(), [*agent.critic.parameters()])
    agent.update(a.unsqueeze(0), task.reward(a).unsqueeze(0))
    for weight, gradient in zip(agent.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_an_update_is_one_of_the_policy_and_one_of_the_critic_for_each_batch():
    task = bandit.Bandit("eight-gaussians")
    batches = 4 * torch.rand(3, 32, 2) - 2
    one = bandit.Agent(small(), "som", task)
    three = bandit.Agent(small(), "som", task)
    three.actor.load_state_dict(one.actor.state_dict())
    three.critic.load_state_dict(one.critic.state_dict())
    q = copy.deepcopy(one.critic)  # the same three steps by hand
    optimizer = torch.optim.Adam(q.parameters(), small().q_lr)
    for a in batches:
        optimizer.zero_grad()
        (q(torch.zeros(32, 1), a.unsqueeze(1)).flatten() - task.reward(a)).square().mean().backward()
        optimizer.step()
    for agent, actions in ((one, batches[:1]), (three, batches)):
        torch.manual_seed(7)
        agent.update(actions, task.reward(actions))
    for x, y in zip(one.actor.parameters(), three.actor.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    for x, y in zip(three.critic.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("method", ["som", "mfp"])
def test_the_policys_loss_by_hand(method):
    task, a_0 = bandit.Bandit("eight-gaussians"), 4 * torch.rand(32, 2) - 2
    agent = bandit.Agent(small(oracle_critic=True, best_of_n=3), method, task)
    torch.manual_seed(3)
    loss = getattr(agent, f"{method}_actor_loss")(a_0)
    torch.manual_seed(3)
    r, t = bandit.sample_r_t(torch.rand(32, 2), agent.args.zero_r_ratio)
    eps = torch.randn(32, 2)
    if method == "mfp":
        a_0 = agent.act(torch.randn(32, 3, 2))  # its own best of N, on the straight path
    mu, sigma = ((math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()) if method == "som" else (1 - t, t)
    a_t = mu * a_0 + sigma * eps
    v = agent.velocity(a_t, t) if method == "som" else eps - a_0
    rows = [x.unsqueeze(1) for x in (a_t, r, t, v)]
    u_fn = lambda *inputs: agent.actor(torch.zeros(32, 1), *inputs)  # noqa: E731
    parts = som.meanflow_loss(u_fn, *rows)[:1] if method == "som" else mfp.mfp_loss(u_fn, *rows)[:2]
    torch.testing.assert_close(loss, sum(part.mean() for part in parts))


def test_the_moving_average_acts_and_follows():
    agent = bandit.Agent(small(), "som", bandit.Bandit("eight-gaussians"))
    before = copy.deepcopy(agent.acting_actor)
    agent.update(4 * torch.rand(1, 32, 2) - 2, torch.rand(1, 32))
    networks = (before, agent.actor, agent.acting_actor)
    old, new, acting = (torch.nn.utils.parameters_to_vector(x.parameters()) for x in networks)
    torch.testing.assert_close(acting, old + 0.9 * (new - old))  # 9 / (1 + 9) after the first update
    assert not torch.equal(old, new)


def test_a_reward_is_that_of_its_action(monkeypatch):
    seen, update, task = [], bandit.Agent.update, bandit.Bandit("eight-gaussians")
    monkeypatch.setattr(bandit.Agent, "update", lambda *inputs: seen.append(inputs[1:]) or update(*inputs))
    bandit.train(small(total_updates=20, learning_starts=10), "som", task, 0)
    assert len(seen) == 20
    for actions, rewards in seen:
        torch.testing.assert_close(rewards, task.reward(actions))


def test_learning_rates_fall_linearly():
    task = bandit.Bandit("eight-gaussians")
    args = small(total_updates=4, policy_lr=1e-3, q_lr=2e-3)
    agent = bandit.Agent(args, "mfp", task)
    a = 4 * torch.rand(1, 32, 2) - 2
    for left in (1.0, 0.75, 0.5, 0.25):
        agent.update(a, task.reward(a))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in agent.optimizers.values()]
        assert rates == pytest.approx([1e-3 * left, 2e-3 * left])


@pytest.mark.parametrize(("oracle", "batches"), [(True, 1), (False, 3)])
def test_the_critic_is_updated_q_updates_times(monkeypatch, oracle, batches):
    seen, update = [], bandit.Agent.update
    monkeypatch.setattr(bandit.Agent, "update", lambda *x: seen.append((x[1].shape, x[2].shape)) or update(*x))
    args = small(oracle_critic=oracle, q_updates=3, total_updates=2, learning_starts=10, num_mc_samples=2)
    bandit.train(args, "som", bandit.Bandit("eight-gaussians"), 0)
    assert seen == 2 * [((batches, 32, 2), (batches, 32))]


def test_one_step_action_is_noise_minus_u_and_mfp_takes_its_best():
    task = bandit.Bandit("eight-gaussians")
    agent = bandit.Agent(small(oracle_critic=True), "mfp", task)
    agent.acting_actor.weights[-1].data.mul_(2)  # not what is trained acts
    noise = torch.randn(10, 5, 2)
    zero = torch.zeros(10, 5, 1)
    actions = (noise - agent.acting_actor(torch.zeros(10, 1), noise, zero, zero + 1)).clamp(-bandit.BOX, bandit.BOX)
    best = actions[torch.arange(10), task.reward(actions).argmax(dim=1)]
    torch.testing.assert_close(agent.act(noise), best)
    torch.testing.assert_close(agent.denoise(noise[:, 0], 0.0).clamp(-bandit.BOX, bandit.BOX), actions[:, 0])
    torch.testing.assert_close(agent.denoise(noise[:, 0], 1.0), noise[:, 0])


def test_shared_functions_are_equal_to_the_letter():
    shared = {
        som: "EnsembleMLP MeanFlowActor vp_schedule cosine_schedule estimate_score q_scale truncated_normal "
        "estimate_box_score pf_ode_velocity sample_r_t "
        "meanflow_loss best_of_n soft_update exit_with_error writing",
        mfp: "EnsembleMLP MeanFlowActor mfp_loss sample_r_t best_of_n soft_update exit_with_error writing",
    }
    for script, names in shared.items():
        for name in names.split():
            assert inspect.getsource(getattr(bandit, name)) == inspect.getsource(getattr(script, name)), name


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(bandit.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(bandit.Args):
        assert field.name in read, f"{field.name} has no reader"
        hint = hints[field.name]
        assert field.default in typing.get_args(hint) or type(field.default) is hint, field.name


def test_script_is_short_and_imports_nothing_of_this_repository():
    assert len(SCRIPT.read_text().splitlines()) <= 850
    assert not re.search(r"(?m)^(from|import) (som|mfp|benchmark)_?\w*", SCRIPT.read_text())


# The script as a user runs it
class InlineExecutor:
    """Does at once what is submitted, in this process."""

    def __init__(self, *_):
        self.map = map

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


def run_here(script, folder, *flags):
    """A script's main in this process, without the seconds that it takes to start Python anew; what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", InlineExecutor)
        patch.setattr(sys, "argv", [script.name, *flags])
        patch.chdir(folder)
        runpy.run_path(str(script), run_name="__main__")
    bandit.plt.close("all")
    return output.getvalue()


def run_process(script, folder, *flags):
    """A script as a process, without a display; what it prints."""
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    finished = subprocess.run([sys.executable, script, *flags], cwd=folder, capture_output=True, text=True, env=env)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The run folders of a short run of every task, by task; of a copy of the script that has less to compute."""
    source, folders = SCRIPT.read_text(), {}
    changes = (
        ("NUM_SAMPLES = 2000 ", f"NUM_SAMPLES = {FEW} "),
        ("NUM_ODE_STEPS = 100 ", "NUM_ODE_STEPS = 10 "),
        ("num_mc_samples=200)", "num_mc_samples=5)"),
    )
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (script := tmp_path_factory.mktemp("script") / SCRIPT.name).write_text(source)
    extras = "--bump-scale 0.5 --reward-noise 0.2", "--oracle-critic", ""
    for task, extra, run in zip(TASKS, extras, (run_here, run_here, run_process), strict=True):
        folder = tmp_path_factory.mktemp(task)
        assert "som: mean reward" in run(script, folder, "--task", task, *TINY, *extra.split())
        (folders[task],) = (folder / "runs").iterdir()
    return folders


@pytest.mark.parametrize("task", TASKS)
def test_a_run_writes_its_pictures_and_numbers(tiny_run, task):
    folder = tiny_run[task]
    pictures = PICTURES | ({"robustness.png"} if task == TASKS[0] else set())
    assert {path.name for path in folder.iterdir()} == pictures | {"results.json", "samples.npz", "arrows.npz"}
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG") and (folder / picture).stat().st_size > 10_000
    results, samples = json.loads((folder / "results.json").read_text()), np.load(folder / "samples.npz")
    policies = {"som", "mfp", "pf_ode"} | ({"som_clean", "mfp_clean"} if task == TASKS[0] else set())
    arrows = np.load(folder / "arrows.npz")
    assert {name: arrows[name].shape for name in arrows} == {name: (49, 2) for name in ("noise", *policies)}
    assert results.keys() == policies | {"seconds", "config", "versions"}
    assert results["config"]["task"] == task
    ode = torch.as_tensor(samples["pf_ode_reference"])
    for policy in policies:
        expected = bandit.measure(bandit.Bandit(task), torch.as_tensor(samples[policy]), ode)
        assert results[policy].keys() == expected.keys()
        for key in ("mean_reward", "low_mode_share", "w2_to_pf_ode"):
            assert results[policy][key] == pytest.approx(expected[key], rel=1e-5), key
        assert results[policy]["mode_counts"] == expected["mode_counts"] and len(samples[policy]) == FEW
        assert results[policy]["high_mode_share"] == expected["high_mode_share"]


BAD_NUMBERS = {
    "--seed": "-1", "--reward-noise": "-0.1", "--bump-scale": "nan", "--bump-std": "0", "--total-updates": "99",
    "--num-envs": "0", "--learning-starts": "-1", "--batch-size": "0", "--policy-lr": "0", "--q-lr": "inf",
    "--q-updates": "0",
    "--hidden-dim": "0", "--q-hidden-dim": "0", "--num-frequencies": "0", "--policy-tau": "1.5", "--noise-scale": "-1",
    "--zero-r-ratio": "1.1", "--inverse-temperature": "0", "--num-mc-samples": "1", "--score-scale": "0",
    "--beta-max": "0.05", "--best-of-n": "0",
}  # fmt: skip


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        bandit.check_args(bandit.tyro.cli(bandit.Args, args=flags))
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and len(output.err.splitlines()) == 1
    return output.err


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_bad_numbers_are_refused(capsys, flag):
    assert flag in refused(capsys, "--reference", "uniform", flag, BAD_NUMBERS[flag])


def test_every_number_has_a_bad_value_above():
    numbers = {field.name for field in dataclasses.fields(bandit.Args) if type(field.default) in (int, float)}
    assert {f"--{name.replace('_', '-')}" for name in numbers} == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--score-scale 25", "--reference uniform"),
        ("--beta-max 2", "--reference uniform"),
        ("--oracle-critic --reward-noise 0.2", "learned critic"),
        ("--oracle-critic --bump-scale 1", "learned critic"),
        ("--bump-std 1", "--bump-scale"),
        ("--reference box --estimator gradient", "--reference uniform or prior"),
    ],
)
def test_flags_without_effect_are_refused(capsys, flags, words):
    assert words in refused(capsys, *flags.split())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        run_here(SCRIPT, tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and len(error.splitlines()) == 1 and "cannot be written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


TERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)  # the script leaves it alone, and sets SIGINT to the same


@pytest.mark.parametrize("number", [signal.SIGKILL, TERM, signal.SIGINT])
def test_workers_end_with_the_main_process(tmp_path, number):
    source = SCRIPT.read_text()
    old = "    for update in progress:\n"
    assert source.count(old) == 1
    script = tmp_path / SCRIPT.name
    script.write_text(source.replace(old, '    print("a worker trains", flush=True)\n' + old))
    flags = [*TINY, "--total-updates", "1000000", "--num-envs", "1"]  # hours
    process = subprocess.Popen(
        [sys.executable, script, *flags], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for _ in range(2):
            assert process.stdout.readline() == "a worker trains\n"
        process.send_signal(number)  # to the main process alone
        # the workers write into the same pipe: its end comes when all of them are gone, else never
        output, _ = process.communicate(timeout=60)
        assert output == "" and process.returncode == -number
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("flags", ["--task three-moons", "--batch-size 0", "--no-such-flag", "--seed one"])
def test_bad_input_of_the_real_script_writes_nothing(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run_here(SCRIPT, tmp_path, *flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err and not any(tmp_path.iterdir())


# The numbers to reach: three seeds
sys.path.insert(0, str(ROOT / "benchmark"))
spec = importlib.util.spec_from_file_location("bandit_benchmark", ROOT / "benchmark" / "bandit.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
PRIOR, UNIFORM, LEARNED, UNIFORM_LEARNED, LONG = benchmark.SETTINGS


@pytest.fixture(scope="module")
def benchmark_args(tmp_path_factory):
    folder = pathlib.Path(os.environ.get("BANDIT_RUNS") or tmp_path_factory.mktemp("bandit"))  # finished runs are kept
    return benchmark.BanditArgs(out=folder, csv=folder / "bandit.csv")


@pytest.mark.slow
@pytest.mark.parametrize("seed_", [1, 2, 3])
@pytest.mark.parametrize(
    ("flags", "least_reward", "least", "most", "low"),
    [
        (PRIOR, 0.82, 0.18, 0.32, 1.0),
        (LONG, 0.86, 0.18, 0.32, 1.0),
        (UNIFORM, 0.0, 0.15, 1.0, 0.08),
        (LEARNED, 0.77, 0.13, 0.37, 1.0),
        (UNIFORM_LEARNED, 0.0, 0.10, 1.0, 0.13),
    ],
)
def test_numbers_are_reached(benchmark_args, flags, least_reward, least, most, low, seed_):
    args = dataclasses.replace(benchmark_args, settings=(flags,), seeds=(seed_,))
    benchmark.main(args)
    results = benchmark.result_of(args, flags, seed_)
    assert results["som"]["mean_reward"] >= least_reward
    assert least <= min(results["som"]["high_mode_share"]) and max(results["som"]["high_mode_share"]) <= most
    assert results["som"]["low_mode_share"] <= low
    assert sum(share > 0.02 for share in results["mfp"]["high_mode_share"]) < 4  # the baseline collapses
