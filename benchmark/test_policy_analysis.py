"""benchmark/policy_analysis.py on two untrained checkpoints; it needs the packages of benchmark/requirements.txt."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

import mfp_continuous_action as mfp
import som_continuous_action as som

SCRIPT = pathlib.Path(__file__).parent / "policy_analysis.py"
FEW = "--rollout-steps 60 --num-states 5 --num-candidates 4 --tsne-steps 2 --tsne-candidates 8".split()

spec = importlib.util.spec_from_file_location("policy_analysis", SCRIPT)
analysis = importlib.util.module_from_spec(spec)
sys.modules["policy_analysis"] = analysis
spec.loader.exec_module(analysis)


def save_run(script, folder, env_id="Hopper-v4", obs_dim=11, act_dim=3):
    torch.manual_seed(len(script.__name__) + obs_dim)
    args = script.Args(env_id=env_id, hidden_dim=8, num_layers=2, best_of_n=3, cuda=False, compile=False)
    agent = script.Agent(args, obs_dim, act_dim, torch.device("cpu"))
    with torch.no_grad():
        agent.acting_actor.weights[-1] *= 1.5 if script is mfp else 0.5  # unlike networks
    config = dataclasses.asdict(args) | {"versions": {"torch": "2.0"}}
    folder.mkdir()
    networks = {"actor": agent.acting_actor.state_dict(), "critic": agent.critic.state_dict()}
    torch.save(networks | {"config": config}, folder / "model.pt")
    return agent


@pytest.fixture
def runs(tmp_path):
    return {"SOM": save_run(som, tmp_path / "som"), "MFP": save_run(mfp, tmp_path / "mfp")}


def test_the_analysis_as_a_user_runs_it(runs, tmp_path):
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


def test_checkpoints_are_read_back(runs, tmp_path):
    for script, name, only_here in ((som, "SOM", "score_scale"), (mfp, "MFP", "ivc_coef")):
        agent = analysis.load_agent(script, tmp_path / name.lower(), only_here)
        for network in ("acting_actor", "critic"):
            expected = getattr(runs[name], network).state_dict()
            torch.testing.assert_close(getattr(agent, network).state_dict(), expected, rtol=0, atol=0)
        assert agent.args == runs[name].args


def test_each_policy_proposes_and_the_critic_of_som_judges(runs):
    obs = torch.randn(6, 11)
    torch.manual_seed(1)
    proposals = analysis.propose(runs, obs, 5)
    torch.manual_seed(1)
    for name, agent in runs.items():
        noise, zero = torch.randn(6, 5, 3), torch.zeros(6, 5, 1)
        with torch.no_grad():
            a = (noise - agent.acting_actor(obs, noise, zero, zero + 1)).clamp(-1, 1)
            q = runs["SOM"].critic(obs, a)[0].mean(dim=0)
        np.testing.assert_allclose(proposals[name][0], a, atol=1e-6)
        np.testing.assert_allclose(proposals[name][1], q, atol=1e-6)
        assert agent.args.best_of_n == 3


def test_rollout_goes_on_after_an_episode(runs):
    agent, start = runs["SOM"], som.make_env("Hopper-v4").reset(seed=3)[0]
    states = analysis.rollout(agent, 200, seed=3)
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
        ("--som nowhere", "nowhere/model.pt is missing"),
        ("--som mfp", "is not of som_continuous_action.py"),
        ("--mfp som", "is not of mfp_continuous_action.py"),
        ("--mfp walker", "SOM was trained on Hopper-v4, MFP on Walker2d-v4"),
        ("--mfp junk", "is no checkpoint of mfp_continuous_action.py"),
        ("--out junk/model.pt", "is not a folder"),
        ("--num-states 61", "--num-states must be <= --rollout-steps"),
        ("--num-candidates 1", "--num-candidates must be >= 2"),
        ("--tsne-steps 0", "--tsne-steps must be >= 1"),
        ("--seed -1", "--seed must be >= 0"),
    ],
)
def test_bad_input_is_refused(runs, monkeypatch, tmp_path, capsys, flags, words):
    save_run(mfp, tmp_path / "walker", "Walker2d-v4", 17, 6)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "model.pt").write_text("junk")
    monkeypatch.chdir(tmp_path)
    default = ["--som", "som", "--mfp", "mfp", "--out", "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *default, *FEW, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message.startswith("error: ") and len(message.splitlines()) == 1 and words in message
    assert not (tmp_path / "out").exists()
