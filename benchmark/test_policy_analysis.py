"""benchmark/policy_analysis.py on two untrained checkpoints; it needs the packages of benchmark/requirements.txt."""

import csv
import importlib.util
import json
import math
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mfp_continuous_action as mfp
import som_continuous_action as som

SCRIPT = Path(__file__).parent / "policy_analysis.py"
FEW = "--rollout-steps 60 --num-states 5 --num-candidates 4 --tsne-steps 2 --tsne-candidates 8".split()
FEW += "--ode-steps 4 --ascent-steps 3".split()

spec = importlib.util.spec_from_file_location("policy_analysis", SCRIPT)
analysis = importlib.util.module_from_spec(spec)
sys.modules["policy_analysis"] = analysis
spec.loader.exec_module(analysis)


def acting_network(agent):
    """SOM acts with a moving average of its policy."""
    return agent.acting_actor if hasattr(agent, "acting_actor") else agent.actor


def save_run(script, folder, env_id="Hopper-v4", obs_dim=11, act_dim=3):
    torch.manual_seed(len(script.__name__) + obs_dim)
    args = script.Args(env_id=env_id, hidden_dim=8, num_layers=2, best_of_n=3, compile=False)
    agent = script.Agent(args, obs_dim, act_dim, torch.device("cpu"))
    with torch.no_grad():
        acting_network(agent).weights[-1] *= 1.5 if script is mfp else 0.5  # unlike networks
    checkpoint = {
        "format": script.CHECKPOINT_FORMAT,
        "args": asdict(args),
        "obs_dim": obs_dim,
        "global_step": 100,
        "action_box": (act_dim * [-1.0], act_dim * [1.0], "float32"),
        "agent": agent.state_dict(),
    }
    folder.mkdir()
    script.save_checkpoint(folder / "checkpoint_0000000100.pt", checkpoint)
    return agent


@pytest.fixture
def runs(tmp_path):
    return {"SOM": save_run(som, tmp_path / "som"), "MFP": save_run(mfp, tmp_path / "mfp")}


@pytest.fixture
def jax_run(tmp_path):
    """The folders of a JAX run of the seeds 5 and 6, all of its numbers different, and its script and checkpoint."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_platforms", "cpu")
    import som_continuous_action_jax as somx

    args = somx.Args(env_id="Hopper-v4", seed=5, num_seeds=2, hidden_dim=8, num_layers=2, best_of_n=3)
    shapes = jax.eval_shape(lambda key: somx.init(key, args, 11, 3), np.zeros(2, np.uint32))
    rng = np.random.default_rng(0)
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        numbers = 0.5 * rng.standard_normal((2, *leaf.shape))
        arrays[jax.tree_util.keystr(path)] = numbers.astype(leaf.dtype)
    folders = [tmp_path / "jax_5", tmp_path / "jax_6"]
    checkpoint = {
        "format": somx.CHECKPOINT_FORMAT,
        "args": asdict(args),
        "obs_dim": 11,
        "global_step": 200,
        "action_box": (3 * [-1.0], 3 * [1.0], "float32"),
        "agent": arrays,
    }
    for seed, folder in zip((5, 6), folders, strict=True):
        folder.mkdir()
        config = {"seed": seed, "first_seed": 5, "first_folder": "jax_5"}
        (folder / "config.json").write_text(json.dumps(config))
    for step in (100, 200):
        somx.save_checkpoint(folders[0] / f"checkpoint_{step:010d}.npz", checkpoint)
        arrays[".log_lambda"][:] += 1  # the newest one has others
    arrays[".log_lambda"][:] -= 1
    return folders, somx, checkpoint


def run_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


SOM_ROWS = ["one step", "2 steps", "4 steps", "16 steps", "PF-ODE, K = 100", "uniform actions"]
SOM_ROWS += ["one step, ascent", "uniform actions, ascent"]


def test_the_analysis_as_a_user_runs_it(runs, tmp_path, monkeypatch):
    words = [sys.executable, "-W", "ignore", SCRIPT, "--som", "som", "--mfp", "mfp", "--out", "a/b", *FEW]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert {file.name for file in (tmp_path / "a/b").iterdir()} == {"box_plots.png", "tsne.png", "policy_analysis.json"}
    for picture in (tmp_path / "a/b").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    numbers = json.loads((tmp_path / "a/b/policy_analysis.json").read_text())
    assert numbers["env_id"] == "Hopper-v4" and numbers["options"]["num_states"] == 5
    for box in numbers["box plots"].values():
        assert len(box["SOM"]["values"]) == len(box["MFP"]["values"]) == 5
    for policy in numbers["t-SNE"].values():
        assert all(math.isfinite(value) for value in policy.values())
    assert list(numbers["spread"]) == [*SOM_ROWS, "MFP, one step"]
    assert finished.stdout.splitlines()[-2].startswith("MFP, one step ")
    # without MFP the same numbers, and no pictures
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time in place of the first
        run_script(monkeypatch, "--som", "som", "--out", "b", "--csv", "spread.csv", *FEW)
    with open("spread.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["actions"] for row in table] == SOM_ROWS and {row["steps"] for row in table} == {"100"}
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["policy_analysis.json"]
    alone = json.loads((tmp_path / "b/policy_analysis.json").read_text())
    assert list(alone["spread"]) == SOM_ROWS and "box plots" not in alone and alone["options"]["mfp"] is None
    for name, row in alone["spread"].items():
        assert row == pytest.approx(numbers["spread"][name], rel=1e-4)
        in_table = table[SOM_ROWS.index(name)]
        assert float(in_table["mean of Q"]) == pytest.approx(row["mean of Q"], abs=6e-4)
        assert (in_table["setting"], in_table["seed"]) == (runs["SOM"].args.exp_name, str(runs["SOM"].args.seed))


def test_a_table_of_spreads_keeps_other_agents(runs, tmp_path):
    agent = runs["SOM"]
    agent.global_step = 10
    path = tmp_path / "spread.csv"
    for step, q in ((10, 1.0), (20, 2.0), (10, 3.0)):
        agent.global_step = step
        analysis.add_to_table(path, agent, {"one step": {"mean of Q": q}, "2 steps": {"mean of Q": -q}})
    with path.open() as file:
        rows = [(row["steps"], row["actions"], float(row["mean of Q"])) for row in csv.DictReader(file)]
    assert rows == [("20", "one step", 2), ("20", "2 steps", -2), ("10", "one step", 3), ("10", "2 steps", -3)]


def test_checkpoints_are_read_back(runs, tmp_path):
    for script, name in ((som, "SOM"), (mfp, "MFP")):
        agent = analysis.load_agent(script, tmp_path / name.lower())
        torch.testing.assert_close(agent.state_dict(), runs[name].state_dict(), rtol=0, atol=0, equal_nan=True)
        assert agent.args == runs[name].args


def test_each_policy_proposes_and_the_critic_of_som_judges(runs):
    obs = torch.randn(6, 11)
    torch.manual_seed(1)
    proposals = analysis.propose(runs, obs, 5)
    torch.manual_seed(1)
    for name, agent in runs.items():
        noise, zero = torch.randn(6, 5, 3), torch.zeros(6, 5, 1)
        with torch.no_grad():
            a = (noise - acting_network(agent)(obs, noise, zero, zero + 1)).clamp(-1, 1)
            q = runs["SOM"].critic(obs, a)[0].mean(dim=0)
        np.testing.assert_allclose(proposals[name][0], a, atol=1e-6)
        np.testing.assert_allclose(proposals[name][1], q, atol=1e-6)
        assert agent.args.best_of_n == 3


def test_rollout_goes_on_after_an_episode(runs):
    start, _ = som.make_env("Hopper-v4").reset(seed=3)
    states = analysis.rollout(runs["SOM"], 200, seed=3)
    assert states.shape == (200, 11)
    np.testing.assert_allclose(states[0], start, rtol=1e-6)
    near_reset = ((states - torch.tensor(start, dtype=torch.float32)).abs() < 0.011).all(dim=1)
    assert 2 <= near_reset.sum() < 50  # Hopper starts within 0.005 of one state; an untrained policy falls


def test_numbers_of_the_boxes(tmp_path):
    q = {"SOM": np.array([[1.0, 3.0], [2.0, 8.0]]), "MFP": np.array([[1.0, 1.0], [7.0, 9.0]])}
    numbers = analysis.box_plots({name: (None, values) for name, values in q.items()}, "", tmp_path / "x.png")
    assert numbers["mean of Q"]["SOM"]["values"] == [2, 5] and numbers["mean of Q"]["MFP"]["values"] == [1, 8]
    assert numbers["std of Q"]["SOM"]["values"] == [1, 3] and numbers["std of Q"]["MFP"]["values"] == [0, 1]
    assert numbers["mean of Q"]["SOM - MFP"]["values"] == [1, -3]
    assert numbers["mean of Q"]["share of states where SOM's is higher"] == 0.5
    assert numbers["mean of Q"]["SOM"]["quartiles"] == [2.75, 3.5, 4.25]


def test_numbers_of_the_tsne_picture(tmp_path):
    rng = np.random.default_rng(0)
    proposals = {
        "SOM": (np.full((2, 8, 3), 1.0) * rng.choice([-1, 1], (2, 8, 1)), np.full((2, 8), 2.0)),
        "MFP": (rng.uniform(-0.9, 0.9, (2, 8, 3)), np.ones((2, 8))),
    }
    numbers = analysis.tsne_picture(proposals, "", 0, tmp_path / "x.png")
    assert numbers["SOM"]["mean of Q"] == 2 and numbers["MFP"]["mean of Q"] == 1
    assert (
        numbers["SOM"]["share above the state's median Q"] == 1
        and numbers["SOM"]["share of saturated coordinates"] == 1
    )
    assert numbers["MFP"]["share above the state's median Q"] == numbers["MFP"]["share of saturated coordinates"] == 0
    spread = "std of an action coordinate over a state's candidates"
    assert numbers["MFP"][spread] == pytest.approx(proposals["MFP"][0].std(axis=1).mean())
    same = {name: (candidates, np.ones((2, 8))) for name, (candidates, _) in proposals.items()}
    analysis.tsne_picture(same, "", 0, tmp_path / "y.png")  # a Q that is the same everywhere


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--som nowhere", "nowhere cannot be used"),
        ("--som empty", "empty has no checkpoint"),
        ("--som mfp", "it is not of som_continuous_action.py, checkpoints of version 4"),
        ("--mfp som", "it is not of mfp_continuous_action.py, checkpoints of version 3"),
        ("--mfp walker", "SOM was trained on Hopper-v4, MFP on Walker2d-v4"),
        ("--mfp junk", "junk/checkpoint_0000000100.pt cannot be used"),
        ("--out junk/checkpoint_0000000100.pt", "is not a folder"),
        ("--num-states 61", "--num-states must be <= --rollout-steps"),
        ("--num-candidates 1", "--num-candidates must be >= 2"),
        ("--tsne-steps 0", "--tsne-steps must be >= 1"),
        ("--seed -1", "--seed must be >= 0"),
        ("--ode-steps 0", "--ode-steps must be >= 1"),
        ("--som-seed 2", "--som-seed must be 1, the only one in som, got 2"),
        ("--som junk/checkpoint_0000000100.npz", "junk/checkpoint_0000000100.npz cannot be used"),
        ("--som junk", "junk/checkpoint_0000000100.npz cannot be used"),
        ("--som other", "it is not of som_continuous_action_jax.py, checkpoints of version 4"),
        ("--som torn", "torn/config.json cannot be used"),
    ],
)
def test_bad_input_is_refused(runs, monkeypatch, tmp_path, capsys, flags, words):
    save_run(mfp, tmp_path / "walker", "Walker2d-v4", 17, 6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "checkpoint_0000000100.pt").write_text("junk")
    (tmp_path / "junk" / "checkpoint_0000000100.npz").write_text("junk")
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "checkpoint_0000000100.npz", entries=json.dumps({"format": "another"}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    default = ["--som", "som", "--mfp", "mfp", "--out", "out"]
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *default, *FEW, *flags.split())
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message.startswith("error: ") and len(message.splitlines()) == 1 and words in message
    assert not (tmp_path / "out").exists()


def test_a_jax_run_becomes_the_same_agent(jax_run):
    folders, somx, checkpoint = jax_run
    assert somx.CHECKPOINT_FORMAT == analysis.JAX_CHECKPOINT_FORMAT
    states = somx.restore_state(checkpoint)
    args = somx.Args(**checkpoint["args"])
    rng = np.random.default_rng(1)
    obs = rng.standard_normal((6, 11)).astype(np.float32)
    noise = rng.standard_normal((6, 4, 3)).astype(np.float32)
    times = rng.random((2, 6, 4, 1)).astype(np.float32)
    inputs = [torch.tensor(x) for x in (obs, noise, *times)]
    for k, folder in enumerate(folders):
        agent = analysis.load_som(folder)
        state = somx.part_of_seed(k, states)
        assert (agent.args.seed, agent.args.best_of_n, agent.args.env_id) == (5 + k, 3, "Hopper-v4")
        u_fn = partial(somx.meanflow_actor, state.acting_actor)
        q_fn = partial(somx.policy_q, state.critic, args=args)
        expected = [*somx.best_of_n(u_fn, q_fn, obs, noise), somx.meanflow_actor(state.actor, obs, noise, *times)]
        expected += [*somx.q_network(state.critic, obs, noise), *somx.q_network(state.target_critic, obs, noise)]
        expected += [state.mean_std, state.log_lambda]
        with torch.no_grad():
            actual = [*agent.best_of_n(agent.acting_actor, agent.q_fn, *inputs[:2]), agent.actor(*inputs)]
            actual += [*agent.critic(*inputs[:2]), *agent.target_critic(*inputs[:2])]
            actual += [agent.mean_std, agent.log_lambda.detach()]
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x, np.asarray(y), rtol=1e-4, atol=1e-5)


def test_the_seed_of_a_jax_run(jax_run, capsys):
    folders, _, checkpoint = jax_run
    paths = [(folders[0], None), (folders[1], None), (folders[0], 6), (folders[1], 5)]
    paths += [(folders[0] / "checkpoint_0000000200.npz", None), (folders[0] / "checkpoint_0000000200.npz", 6)]
    seeds = []
    for path, seed in paths:
        agent = analysis.load_som(path, seed)
        seeds.append(agent.args.seed)
        expected = checkpoint["agent"][".log_lambda"][agent.args.seed - 5]
        assert agent.log_lambda.item() == pytest.approx(expected)
    assert seeds == [5, 6, 6, 5, 5, 6]
    older = analysis.load_som(folders[0] / "checkpoint_0000000100.npz")
    assert older.log_lambda.item() == pytest.approx(checkpoint["agent"][".log_lambda"][0] - 1)
    for seed in (0, 4, 7):
        with pytest.raises(SystemExit):
            analysis.load_som(folders[1], seed)
        assert f"--som-seed must be in [5, 6], the seeds in {folders[0]}" in capsys.readouterr().err


def test_a_jax_run_is_analysed_without_jax(jax_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "som_continuous_action_jax")
    run_script(monkeypatch, "--som", tmp_path / "jax_6", "--out", tmp_path / "out", *FEW)
    numbers = json.loads((tmp_path / "out/policy_analysis.json").read_text())
    assert list(numbers["spread"]) == SOM_ROWS
    assert all(math.isfinite(value) for row in numbers["spread"].values() for value in row.values())
    table = capsys.readouterr().out.splitlines()[: len(SOM_ROWS) + 1]
    assert len({len(line) for line in table}) == 1 and table[1].split()[:2] == ["one", "step"]


FIELDS = [("uniform", "vp", 0), ("uniform", "ve", 0), ("prior", "vp", 0), ("box", "vp", 0), ("box", "vp", 2)]


@pytest.mark.parametrize("q_norm", (None, "batch", "state"))
@pytest.mark.parametrize(("reference", "sde", "climb_steps"), FIELDS)
def test_the_field_is_what_the_policy_is_regressed_on(runs, reference, sde, climb_steps, q_norm):
    """The loss of a policy that is the field is zero."""
    changes = {"reference": reference, "sde": sde, "climb_steps": climb_steps, "q_norm": q_norm}
    args = replace(runs["SOM"].args, **changes, zero_r_ratio=0.0)
    B, K = 16, 12
    obs = torch.randn(B, 11)
    eps = torch.randn(B, 3)
    mc_eps = torch.randn(B, K, 3)
    uniform = torch.rand(B, 2)
    actions = 2 * torch.rand(B, 3) - 1
    _, t = som.sample_r_t(uniform)
    mu, sigma, _, _ = analysis.schedule(t, args)
    q_fn = runs["SOM"].q_fn
    a_t = mu * actions + sigma * eps
    v, logits = analysis.velocity(q_fn, obs, a_t, t, mc_eps, 3.0, args)
    assert v.norm(dim=1).mean() > 0.02 and logits.shape == (B, K)
    batch = som.Batch(obs, obs, actions, torch.zeros(B), torch.zeros(B))
    loss, _ = som.actor_loss(lambda *_: v.unsqueeze(1), q_fn, batch, uniform, eps, mc_eps, 3.0, args)
    assert loss < 1e-8 * v.square().sum(dim=1).mean()


def test_the_noise_of_the_score(runs):
    agent = runs["SOM"]
    torch.manual_seed(1)
    eps = analysis.mc_noise(6, agent.args.num_mc_samples, 3, "lattice")
    torch.manual_seed(1)
    torch.testing.assert_close(eps, som.lattice_noise(agent.sobol, torch.rand(6, 1, 3)))
    for K in (16, 128):  # the points of any K lie evenly, as independent ones do not
        even = torch.special.ndtr(analysis.mc_noise(50, K, 3, "lattice")).mean(dim=1)
        independent = torch.special.ndtr(analysis.mc_noise(50, K, 3, "normal")).mean(dim=1)
        assert even.shape == (50, 3) and even.std() < 0.5 * independent.std()
        assert independent.std().item() == pytest.approx((12 * K) ** -0.5, rel=0.2)


@pytest.mark.parametrize("n", (1, 2, 5))
def test_many_steps_of_a_network_in_closed_form(n):
    a = torch.tensor([[[-3.0], [0.2], [0.5], [1.4]]])
    c = 0.7

    def average(a_t, r, t):  # of the flow da/dt = c a
        return a_t * -torch.expm1(-c * (t - r)) / (t - r)

    torch.testing.assert_close(analysis.follow(average, a, n), (math.exp(-c) * a).clamp(-1, 1))
    torch.testing.assert_close(analysis.follow(lambda a_t, r, t: c * a_t, a, n), ((1 - c / n) ** n * a).clamp(-1, 1))
    moved = analysis.follow(lambda a_t, r, t: t + 0 * a_t, a, n)  # at the upper end of each interval, and the lower
    torch.testing.assert_close(moved, (a - (n + 1) / (2 * n)).clamp(-1, 1))
    moved = analysis.follow(lambda a_t, r, t: r + 0 * a_t, a, n)
    torch.testing.assert_close(moved, (a - (n - 1) / (2 * n)).clamp(-1, 1))


def test_one_step_is_the_policys_and_the_noise_is_shared(runs):
    agent = runs["SOM"]
    obs = torch.randn(4, 11)
    few = {"pool": obs, "num_candidates": 5, "ode_steps": 3, "ascent_steps": 2, "ascent_step": 0.2}
    torch.manual_seed(1)
    rows = analysis.take_apart(runs, obs, **few)
    torch.manual_seed(1)
    torch.testing.assert_close(rows["one step"], analysis.candidates_of(agent, obs, 5), rtol=0, atol=0)
    assert (rows["uniform actions"].abs() <= 1).all() and rows["uniform actions"].std() > 0.45
    torch.testing.assert_close(rows["MFP, one step"].shape, rows["one step"].shape)
    for start in ("one step", "uniform actions"):  # an ascent begins there
        distance = (rows[f"{start}, ascent"] - rows[start]).square().mean(dim=-1).sqrt()
        assert 0 < distance.max() <= 1.5 * 0.2 + 1e-5
    # where nothing moves the noise stays: a network of zeros, a Q that is flat, the prior as reference
    agent.args = replace(agent.args, reference="prior", num_mc_samples=8)
    with torch.no_grad():
        for network in (agent.acting_actor, agent.critic):
            network.weights[-1].zero_()
            network.biases[-1].fill_(float(network is agent.critic))
    torch.manual_seed(2)
    rows = analysis.take_apart({"SOM": agent}, obs, **few)
    torch.manual_seed(2)
    noise = torch.randn(4, 5, 3).clamp(-1, 1)
    assert list(rows)[:6] == [*SOM_ROWS[:4], "PF-ODE, K = 8", "PF-ODE, K = 100"]
    for name in list(rows)[:6]:
        torch.testing.assert_close(rows[name], noise, msg=name)


def agent_on(q_fn, **changes):
    """An agent of one action coordinate whose critic is a function; its buffer is full of zeros."""
    args = som.Args(hidden_dim=8, num_layers=1, compile=False, batch_size=64, **changes)
    agent = som.Agent(args, 1, 1, torch.device("cpu"))
    agent.score_q_fn = q_fn

    def act(obs, explore):
        assert explore
        return torch.zeros(len(obs), 1), None

    agent.act = act
    return agent


def hill_of_width(width, alpha):
    """A Q with exp(alpha Q) = N(state, width^2)."""
    return lambda obs, a: -((a - obs.unsqueeze(1)).squeeze(-1) / width).square() / (2 * alpha)


@pytest.mark.parametrize("reference", ("prior", "box", "uniform"))
@torch.no_grad()
def test_the_ode_ends_where_its_target_is(reference):
    """alpha is inverse_temperature / lambda, here 5 / 2."""
    changes = {"reference": reference, "q_norm": None, "mc_noise": "lattice", "inverse_temperature": 5.0}
    agent = agent_on(hill_of_width(0.2, alpha=5 / 2), **changes)
    agent.log_lambda.fill_(math.log(2))
    torch.manual_seed(3)
    obs = torch.tensor([[0.3], [-0.2]])
    a = analysis.pf_ode(agent, obs, torch.randn(2, 500, 1), obs, 200, 64)
    if reference == "uniform":
        # a field of unit norm ends on the top of the hill; what starts far outside the box sees no slope
        on_top = (a - obs.unsqueeze(1)).abs() < 0.05
        assert on_top.float().mean() > 0.9
        return
    mean = obs
    std = 0.2
    if reference == "prior":  # its target is also times N(0, 1)
        mean = 25 / 26 * obs
        std = 26**-0.5
    torch.testing.assert_close(a.mean(dim=1), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(a.std(dim=1), torch.full((2, 1), std), rtol=0.1, atol=0)


@torch.no_grad()
def test_q_is_divided_by_what_an_update_divides_it_by():
    """One number, the mean over the times of an update; so the scale of Q is without effect."""

    def q_fn(obs, a, scale=3.0):
        return scale * a.squeeze(-1)

    pool = torch.zeros(5, 1)
    torch.manual_seed(4)
    t = torch.rand(4000, 2).amax(dim=1).view(-1, 1, 1)
    mu, sigma, _, _ = som.cosine_schedule(t)
    a_t = sigma * torch.randn(4000, 1, 1)
    a_0 = (mu * a_t + sigma * torch.randn(4000, 100, 1)).clamp(-1, 1)
    agent = agent_on(q_fn, reference="prior", q_norm="state")
    divisor = analysis.q_divisor(agent, pool, 100)
    assert divisor.item() == pytest.approx(3 * a_0.std(dim=1).mean().item(), rel=0.03)
    agent.args = replace(agent.args, q_norm="batch")
    assert analysis.q_divisor(agent, pool, 100).item() == pytest.approx(3 * a_0.std().item(), rel=0.03)
    agent.args = replace(agent.args, q_norm=None)
    assert analysis.q_divisor(agent, pool, 100).item() == pytest.approx(1)
    ends = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(5)
        agent = agent_on(lambda obs, a, scale=scale: q_fn(obs, a, scale), reference="prior", q_norm="state")
        ends.append(analysis.pf_ode(agent, pool[:1], torch.randn(1, 20, 1), pool, 10, 8))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_ascent_of_q():
    obs = torch.zeros(6, 1)
    start = 2 * torch.rand(6, 7, 3) - 1
    slope = torch.tensor([1.0, -2.0, 0.1])
    corner = analysis.ascend(lambda obs, a: a @ slope, obs, start, 50, 0.1)
    torch.testing.assert_close(corner, slope.sign().expand(6, 7, 3), rtol=0, atol=0)
    peak = torch.tensor([0.3, -0.6, 1.5])  # the last one is outside

    def hill(obs, a):
        return -(a - peak).square().sum(dim=-1)

    top = analysis.ascend(hill, obs, start, 50, 0.1)
    torch.testing.assert_close(top, peak.clamp(max=1).expand(6, 7, 3), rtol=0, atol=0.01)
    # a step that is far too long: no action is left for a worse one
    far = analysis.ascend(hill, obs, start, 1, 50.0)
    assert (hill(obs, far) >= hill(obs, start)).all() and (far == start).all(dim=-1).any()
    # one step has the length that it is told
    one = analysis.ascend(lambda obs, a: a @ slope, obs, torch.zeros(6, 7, 3), 1, 0.1)
    torch.testing.assert_close(one.square().mean(dim=-1).sqrt(), torch.full((6, 7), 0.1))


def test_numbers_of_the_spread():
    actions = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.5, 0.995], [0.5, 0.995]]])
    rows = analysis.spread(lambda obs, a: 4 * a[..., 0] + obs, torch.tensor([[10.0], [20.0]]), actions)
    assert rows == pytest.approx(
        {
            "mean of Q": 16,
            "std of Q": 2,
            "Q of the best": 18,
            "std of a coordinate": 0.25,
            "share saturated": 0.5,
        }
    )
