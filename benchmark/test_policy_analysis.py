"""benchmark/policy_analysis.py on two untrained checkpoints; it needs the packages of benchmark/requirements.txt."""

import importlib.util
import json
import math
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import mfp_continuous_action as mfp
import som_continuous_action as som

SCRIPT = Path(__file__).parent / "policy_analysis.py"
FEW = "--rollout-steps 60 --num-states 5 --num-candidates 4 --tsne-steps 2 --tsne-candidates 8".split()

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
        "action_box": (act_dim * [-1.0], act_dim * [1.0], "float32"),
        "agent": agent.state_dict(),
    }
    folder.mkdir()
    script.save_checkpoint(folder / "checkpoint_0000000100.pt", checkpoint)
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
        ("--som mfp", "it is not of som_continuous_action.py, checkpoints of version 3"),
        ("--mfp som", "it is not of mfp_continuous_action.py, checkpoints of version 3"),
        ("--mfp walker", "SOM was trained on Hopper-v4, MFP on Walker2d-v4"),
        ("--mfp junk", "junk/checkpoint_0000000100.pt cannot be used"),
        ("--out junk/checkpoint_0000000100.pt", "is not a folder"),
        ("--num-states 61", "--num-states must be <= --rollout-steps"),
        ("--num-candidates 1", "--num-candidates must be >= 2"),
        ("--tsne-steps 0", "--tsne-steps must be >= 1"),
        ("--seed -1", "--seed must be >= 0"),
    ],
)
def test_bad_input_is_refused(runs, monkeypatch, tmp_path, capsys, flags, words):
    save_run(mfp, tmp_path / "walker", "Walker2d-v4", 17, 6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "checkpoint_0000000100.pt").write_text("junk")
    monkeypatch.chdir(tmp_path)
    default = ["--som", "som", "--mfp", "mfp", "--out", "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *default, *FEW, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message.startswith("error: ") and len(message.splitlines()) == 1 and words in message
    assert not (tmp_path / "out").exists()
