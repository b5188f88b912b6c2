"""SDAC and DACER on the 2D bandit: their limits and chains, the script as a user runs it, its benchmark."""

import ast
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import importlib.util
import inspect
import io
import json
import math
import pathlib
import re
import runpy
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch

import baselines.dacer_continuous_action as dacer
import baselines.diffusion_bandit_2d as bandit
import baselines.diffusion_continuous_action as diffusion
import som_bandit_2d as som_bandit

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "baselines" / "diffusion_bandit_2d.py"
TINY = "--total-updates 100 --num-samples 4 --hidden-dim 16 --q-hidden-dim 16 --batch-size 32 --q-updates 1"
TINY = f"{TINY} --num-diffusion-steps 3".split()
FEW = 200  # actions in the short runs of a copy of the script


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes):
    sizes = {"num_samples": 16, "hidden_dim": 16, "q_hidden_dim": 16, "batch_size": 32, "num_diffusion_steps": 4}
    return bandit.Args(**(sizes | changes))


def make_agent(method, **changes):
    return bandit.Agent(small(**changes), method, bandit.Bandit("eight-gaussians"))


# The methods
@pytest.mark.parametrize(("method", "num_updates"), [("sdac", 600), ("dacer", 100)])
def test_sdac_spreads_over_the_high_modes_and_dacer_ends_on_one(method, num_updates):
    sizes = {"hidden_dim": 64, "batch_size": 128, "num_samples": 32, "num_diffusion_steps": 8, "num_envs": 32}
    args = small(oracle_critic=True, learning_starts=500, policy_lr=1e-2, total_updates=num_updates, **sizes)
    task = bandit.Bandit("eight-gaussians")
    agent, film = bandit.train(args, method, task, 0)
    assert [update for update, _ in film] == [math.ceil(num_updates * share) for share in bandit.FILM_SHARES]
    a = agent.act(torch.randn(8, 1000, 2))
    result = bandit.measure(task, a, bandit.sample_target(task, args.inverse_temperature, 1000))
    shares = result["high_mode_share"]
    if method == "sdac":  # 0.17 to 0.19 on each, at distance 0.35 to 0.38, in two seeds
        assert min(shares) > 0.11 and max(shares) < 0.25 and result["w2_to_target"] < 0.5
    else:
        assert max(shares) > 0.95 and result["mean_reward"] > 0.85


@pytest.mark.parametrize(("method", "schedule"), [("sdac", "linear"), ("dacer", "vp")])
def test_acting_is_a_chain_in_the_box_and_denoise_shows_it(method, schedule):
    agent = make_agent(method)
    with torch.no_grad():
        for weight in agent.acting_actor.parameters():
            weight.mul_(2.0)
    noise = torch.randn(4, 50, 2)
    d = bandit.diffusion(4, schedule, bound=bandit.BOX)
    chain = [noise[0]]
    for k in (4, 3, 2, 1):
        with torch.no_grad():
            eps = agent.acting_actor(torch.zeros(50, 1), chain[-1].unsqueeze(1), torch.full((50, 1, 1), float(k)))
        a_0 = ((chain[-1] - d.sigma[k] * eps[:, 0]) / d.mu[k]).clamp(-bandit.BOX, bandit.BOX)
        a = d.c0[k] * a_0 + d.c1[k] * chain[-1]
        chain.append(a + d.std[k] * noise[5 - k] if k > 1 else a)
    torch.testing.assert_close(agent.act(noise), chain[-1])
    assert agent.act(noise).abs().max() <= bandit.BOX
    for t, state in zip((1.0, 0.75, 0.5, 0.25, 0.0), chain, strict=True):
        torch.testing.assert_close(agent.denoise(noise, t), state)
    torch.testing.assert_close(agent.denoise(noise, 0.6), chain[1])  # rounded up


def test_sdac_acts_by_a_moving_average_and_dacer_by_its_policy():
    a, rewards = 4 * torch.rand(1, 32, 2) - 2, torch.rand(1, 32)
    for method in ("sdac", "dacer"):
        agent = make_agent(method)
        before = copy.deepcopy(agent.acting_actor)
        agent.update(a, rewards)
        networks = (before, agent.actor, agent.acting_actor)
        old, new, acting = (torch.nn.utils.parameters_to_vector(x.parameters()) for x in networks)
        share = 0.9 if method == "sdac" else 1.0  # 9 / (1 + 9) after the first update
        torch.testing.assert_close(acting, old + share * (new - old))
        assert not torch.equal(old, new)


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("method", ["sdac", "dacer"])
def test_training_fits_the_critic_and_leaves_it_alone_with_an_oracle(method, oracle):
    task, a = bandit.Bandit("eight-gaussians"), 4 * torch.rand(1, 32, 2) - 2
    agent = make_agent(method, oracle_critic=oracle)
    before = [weight.clone() for weight in agent.critic.parameters()]
    q = agent.critic(torch.zeros(32, 1), a[0].unsqueeze(1)).flatten()
    expected = torch.autograd.grad((q - task.reward(a[0])).square().mean(), [*agent.critic.parameters()])
    agent.update(a, task.reward(a))
    moved = [not torch.equal(x, y) for x, y in zip(before, agent.critic.parameters(), strict=True)]
    assert any(moved) != oracle
    if not oracle:  # nothing of the policy's loss is in the critic's gradient
        torch.testing.assert_close([weight.grad for weight in agent.critic.parameters()], [*expected])


def test_learning_rates_fall_linearly():
    agent = make_agent("dacer", total_updates=4, policy_lr=1e-3, q_lr=2e-3)
    a = 4 * torch.rand(1, 32, 2) - 2
    for left in (1.0, 0.75, 0.5, 0.25):
        agent.update(a, agent.bandit.reward(a))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in agent.optimizers.values()]
        assert rates == pytest.approx([1e-3 * left, 2e-3 * left])


@pytest.mark.parametrize("alpha", [0.5, 10.0])
def test_the_target_is_exp_alpha_r_on_the_box(alpha):
    task = bandit.Bandit("eight-gaussians")
    a = bandit.sample_target(task, alpha, 20_000)
    fine = torch.linspace(-bandit.BOX, bandit.BOX, 500)
    fine = torch.cartesian_prod(fine, fine)
    density = (alpha * task.reward(fine)).softmax(dim=0)
    for value in (task.reward, lambda a: a[:, 0], lambda a: a.square().sum(dim=1)):
        mean = (density * value(fine)).sum().item()
        spread = value(a).std().item() / math.sqrt(len(a))
        assert value(a).mean().item() == pytest.approx(mean, abs=5 * spread + 0.02)
    assert a.abs().max() <= bandit.BOX and len(a.unique(dim=0)) > 19_000


def test_measure_of_a_shift():
    task, a = bandit.Bandit("eight-gaussians"), torch.randn(100, 2)
    shifted = (a + torch.tensor([0.3, -0.4]))[torch.randperm(100)]
    result = bandit.measure(task, a, shifted)
    assert result["w2_to_target"] == pytest.approx(0.5, rel=1e-5)
    expected = som_bandit.measure(task, a, shifted)
    expected["w2_to_target"] = expected.pop("w2_to_pf_ode")
    assert result == expected


# What the scripts share
def test_shared_functions_are_equal_to_the_letter():
    shared = {
        som_bandit: "eight_gaussians two_moons checkerboard Bandit EnsembleMLP soft_update draw_panel caption "
        "exit_with_error writing start_worker end_with_main_process",
        diffusion: "EnsembleMLP DiffusionActor diffusion noised ddpm_sample propose sdac denoising_loss soft_update",
        dacer: "EnsembleMLP DiffusionActor diffusion ddpm_sample dacer_loss soft_update",
    }
    for script, names in shared.items():
        for name in names.split():
            assert inspect.getsource(getattr(bandit, name)) == inspect.getsource(getattr(script, name)), name
    for method in ("q_fn", "update", "update_critic", "descend"):
        assert inspect.getsource(getattr(bandit.Agent, method)) == inspect.getsource(getattr(som_bandit.Agent, method))
    for name in ("Diffusion", "Draws", "State", "Regression"):
        assert getattr(bandit, name)._fields == getattr(diffusion, name)._fields
    for name in ("BOX", "RADIUS", "NUM_SAMPLES", "FILM_SHARES"):
        assert getattr(bandit, name) == getattr(som_bandit, name)


def test_the_protocol_is_that_of_som():
    mine, theirs = ({f.name: f.default for f in dataclasses.fields(x.Args)} for x in (bandit, som_bandit))
    differing = {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]}
    assert differing == {"exp_name", "num_frequencies"}
    assert mine["num_samples"] == theirs["num_mc_samples"] and mine["num_diffusion_steps"] == 10


def test_every_field_is_read_and_every_default_has_its_type():
    hints, source = typing.get_type_hints(bandit.Args), ast.parse(SCRIPT.read_text())
    main = [node for node in source.body if not (isinstance(node, ast.ClassDef) and node.name == "Args")]
    read = {node.attr for top in main for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for field in dataclasses.fields(bandit.Args):
        assert field.name in read, f"{field.name} has no reader"
        hint = hints[field.name]
        assert field.default in typing.get_args(hint) or type(field.default) in (hint, tuple), field.name
    assert not re.search(r"(?m)^(from|import) (som|mfp|baselines|benchmark)\w*", SCRIPT.read_text())


# The script as a user runs it
class InlineExecutor:
    """Does at once what is submitted, in this process."""

    def __init__(self, *_):
        pass

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


def run_here(script, folder, *flags):
    """A script's main in this process; what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", InlineExecutor)
        patch.setattr(sys, "argv", [script.name, *flags])
        patch.chdir(folder)
        runpy.run_path(str(script), run_name="__main__")
    bandit.plt.close("all")
    return output.getvalue()


def run_process(script, folder, *flags):
    finished = subprocess.run([sys.executable, script, *flags], cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


RUNS = {
    "eight-gaussians": "--bump-scale 0.5 --reward-noise 0.2",
    "two-moons": "--oracle-critic --methods sdac --proposals clipped",
    "checkerboard": "",
}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The run folders of a short run of every task, by task; of a copy of the script that draws fewer actions."""
    source, folders = SCRIPT.read_text(), {}
    assert source.count("NUM_SAMPLES = 2000 ") == 1
    script = tmp_path_factory.mktemp("script") / SCRIPT.name
    script.write_text(source.replace("NUM_SAMPLES = 2000 ", f"NUM_SAMPLES = {FEW} "))
    for (task, extra), run in zip(RUNS.items(), (run_here, run_here, run_process), strict=True):
        folder = tmp_path_factory.mktemp(task)
        assert "sdac: mean reward" in run(script, folder, "--task", task, *TINY, *extra.split())
        (folders[task],) = (folder / "runs").iterdir()
    return folders


@pytest.mark.parametrize("task", RUNS)
def test_a_run_writes_its_pictures_and_numbers(tiny_run, task):
    folder = tiny_run[task]
    is_perturbed = task == "eight-gaussians"
    policies = {"sdac", "dacer"} - ({"dacer"} if task == "two-moons" else set())
    policies |= {f"{name}_clean" for name in policies} if is_perturbed else set()
    pictures = {"arrows.png", "training.png"} | ({"robustness.png"} if is_perturbed else set())
    arrays = {"samples.npz", "arrows.npz"} | ({"chains.npz", "landscapes.npz"} if is_perturbed else set())
    assert {path.name for path in folder.iterdir()} == pictures | arrays | {"results.json"}
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG") and (folder / picture).stat().st_size > 10_000
    results, samples = json.loads((folder / "results.json").read_text()), np.load(folder / "samples.npz")
    assert results.keys() == policies | {"target", "seconds", "config", "versions"}
    assert results["config"]["task"] == task
    reference = torch.as_tensor(samples["target_reference"])
    for policy in (*policies, "target"):
        expected = bandit.measure(bandit.Bandit(task), torch.as_tensor(samples[policy]), reference)
        assert results[policy].keys() == expected.keys() and len(samples[policy]) == FEW
        assert results[policy]["mode_counts"] == expected["mode_counts"]
        assert results[policy]["w2_to_target"] == pytest.approx(expected["w2_to_target"], rel=1e-5)
    arrows = np.load(folder / "arrows.npz")
    assert {name: arrows[name].shape for name in arrows} == {name: (49, 2) for name in ("noise", *policies)}
    if is_perturbed:
        chains, landscapes = np.load(folder / "chains.npz"), np.load(folder / "landscapes.npz")
        for policy in policies:
            assert chains[policy].shape == (4, FEW, 2) and landscapes[policy].shape == (81, 81)
            np.testing.assert_allclose(chains[policy][3], samples[policy], atol=1e-6)


BAD_NUMBERS = {
    "--seed": "-1", "--reward-noise": "-0.1", "--bump-scale": "nan", "--bump-std": "0", "--total-updates": "99",
    "--num-envs": "0", "--learning-starts": "-1", "--batch-size": "0", "--policy-lr": "0", "--q-lr": "inf",
    "--q-updates": "0", "--hidden-dim": "0", "--q-hidden-dim": "0", "--num-frequencies": "0", "--policy-tau": "1.5",
    "--noise-scale": "-1", "--inverse-temperature": "0", "--num-samples": "0", "--num-diffusion-steps": "0",
}  # fmt: skip


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        bandit.check_args(bandit.tyro.cli(bandit.Args, args=flags))
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and len(output.err.splitlines()) == 1
    return output.err


@pytest.mark.parametrize("flag", BAD_NUMBERS)
def test_bad_numbers_are_refused(capsys, flag):
    assert flag in refused(capsys, flag, BAD_NUMBERS[flag])


def test_every_number_has_a_bad_value_above():
    numbers = {field.name for field in dataclasses.fields(bandit.Args) if type(field.default) in (int, float)}
    assert {f"--{name.replace('_', '-')}" for name in numbers} == BAD_NUMBERS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--methods", "--methods needs"),
        ("--methods sdac sdac", "--methods needs"),
        ("--methods dacer --num-samples 5", "of --methods sdac"),
        ("--methods dacer --policy-tau 0.1", "of --methods sdac"),
        ("--methods dacer --proposals clipped", "of --methods sdac"),
        ("--oracle-critic --reward-noise 0.2", "learned critic"),
        ("--oracle-critic --bump-scale 1", "learned critic"),
        ("--bump-std 1", "--bump-scale"),
    ],
)
def test_flags_without_effect_are_refused(capsys, flags, words):
    assert words in refused(capsys, *flags.split())


@pytest.mark.parametrize("flags", ["--task three-moons", "--batch-size 0", "--no-such-flag", "--methods som"])
def test_bad_input_of_the_real_script_writes_nothing(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run_here(SCRIPT, tmp_path, *flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err and not any(tmp_path.iterdir())


# benchmark/bandit.py on results that are written by hand
sys.path.insert(0, str(ROOT / "benchmark"))
spec = importlib.util.spec_from_file_location("bandit_benchmark", ROOT / "benchmark" / "bandit.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def write_run(args, flags, seed, policies, w2):
    folder = benchmark.folder_of(args, flags, seed) / "runs" / "x"
    folder.mkdir(parents=True)
    numbers = {"mean_reward": seed / 10, "high_mode_share": [0.1, 0.2, 0.3, 0.4], "low_mode_share": 0.0, w2: 1.0}
    results = {name: numbers for name in policies} | {"seconds": 60}
    (folder / "results.json").write_text(json.dumps(results))
    rng = np.random.default_rng(seed)
    np.savez(folder / "arrows.npz", noise=rng.normal(size=(49, 2)), **{x: rng.normal(size=(49, 2)) for x in policies})
    samples = {name: rng.normal(size=(50, 2)).astype(np.float32) for name in policies}
    np.savez(folder / "samples.npz", **samples)
    np.savez(folder / "chains.npz", sdac=rng.normal(size=(4, 50, 2)).astype(np.float32))
    np.savez(folder / "landscapes.npz", sdac=rng.normal(size=(81, 81)).astype(np.float32))


def test_table_of_the_diffusion_script(tmp_path, monkeypatch):
    args = benchmark.BanditArgs(out=tmp_path, csv=tmp_path / "t.csv", script="diffusion")
    made = []

    def run(args, flags, seed):
        made.append((flags, seed))
        policies = ("sdac", "target") if "--methods" in flags else ("sdac", "dacer", "target")
        write_run(args, flags, seed, policies, "w2_to_target")

    monkeypatch.setattr(benchmark, "run", run)
    benchmark.main(args)
    assert [seed for flags, seed in made if flags == ""] == [1, 2, 3]
    assert [seed for flags, seed in made if "--task" in flags] == [1, 1]
    assert [seed for flags, seed in made if "--methods" in flags] == 3 * [1]
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert len(rows) == 4 * 3 + 3 * 2
    assert rows[0]["flags"] == "(none)" and rows[0]["policy"] == "sdac"
    assert rows[0]["mean_reward"] == "0.100 0.200 0.300" and rows[0]["w2_to_target"] == "1.000 1.000 1.000"
    benchmark.main(args)
    assert len(made) == 3 + 3 + 3  # none is repeated


def test_figures_are_drawn_from_saved_samples(tmp_path, monkeypatch):
    args = benchmark.BanditArgs(out=tmp_path, figures=tmp_path / "figures")
    made = []

    def run(args, flags, seed):
        made.append((args.script, flags))
        policies = ("som", "mfp", "pf_ode") if args.script == "som" else ("sdac", "dacer", "target")
        write_run(args, flags, seed, policies, "w2_to_target")

    monkeypatch.setattr(benchmark, "run", run)
    benchmark.main(args)
    bandit.plt.close("all")
    assert len(made) == len(set(made)) == 3 * 2 + 3
    pictures = {path.name: path.read_bytes() for path in args.figures.iterdir()}
    assert pictures.keys() == {"bandit_policies.png", "bandit_robustness_sdac.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 50_000 for data in pictures.values())


def test_the_benchmark_needs_something_to_make(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(benchmark.BanditArgs(out=tmp_path))
    assert stop.value.code == 2 and "--figures" in capsys.readouterr().err
