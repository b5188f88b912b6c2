"""benchmark/step_time.py: its count of the arithmetic against what PyTorch does, and tables of small sizes."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import step_time
from step_time import som

SIZES = {"batch_size": 8, "num_mc_samples": 6, "best_of_n": 3, "hidden_dim": 16}
O, A = 7, 3
CPU = torch.device("cpu")
QUICK = {"env_id": "Pendulum-v1", "rounds": 2, "seconds": 0.0, "device": "cpu", "torch_compile": False}


@pytest.mark.parametrize(("num_layers", "form"), [(2, {}), (3, {}), (3, {"reference": "box", "climb_steps": 2})])
def test_products_are_those_of_an_update(num_layers, form):
    args = som.Args(compile=False, num_layers=num_layers, **SIZES, **form)
    agent = som.Agent(args, O, A, CPU)
    # the counter's hooks on modules do not bear torch.func.grad within no_grad
    agent.score_q_fn = lambda obs, a: agent.critic.mean_return(obs, a).mean(dim=0)
    B = args.batch_size
    batch = som.Batch(torch.randn(B, O), torch.randn(B, O), torch.rand(B, A), torch.randn(B), torch.zeros(B))
    with FlopCounterMode(display=False) as counter:
        agent.update(batch)
    # in its JVP PyTorch also multiplies the layers' inputs by the tangents of the weights, which are zero
    zeros = step_time.network_products(1, B, B, O, A + 32, A, args, "none")[1:]
    products = step_time.update_products(args, O, A) + zeros
    assert counter.get_total_flops() == pytest.approx(1e9 * step_time.gflop_of(products), rel=1e-12)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(step_time.SIZES, "small", SIZES)


def test_a_table_of_small_sizes(tiny, tmp_path):
    path = tmp_path / "table.csv"
    options = step_time.BenchmarkArgs(sizes=("small",), jax=False, csv=path, **QUICK)
    step_time.main(options)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert 0 < float(row["lowest ms"]) <= float(row["ms"]) <= float(row["highest ms"])
        assert row["/ first edition"] == ""
    updates = [row for row in rows if row["work"] == "update"]
    scores = [(row["mc_noise"], row["num_mc_samples"], row["score_dtype"]) for row in updates]
    noises, dtypes = ("normal", "lattice"), ("float32", "bfloat16")
    plain = [(noise, K, dtype) for noise in noises for K in ("6", "3") for dtype in dtypes]
    assert scores == [*plain, ("lattice", "4", "float32")]
    assert [row["climb_steps"] for row in updates] == 8 * ["0"] + ["3"]
    assert all(float(row["/ products"]) > 0 for row in updates)
    # of the defaults, the cheapest plain score and the peaks
    for name in ("action", "iteration, new order", "iteration, old order"):
        assert [row["num_mc_samples"] for row in rows if row["work"] == name] == ["6", "3", "4"]


def test_only_what_is_asked_for_is_timed(tiny):
    options = step_time.BenchmarkArgs(works=("update",), jax=False, variants=False, **QUICK)
    rows = step_time.measure("small", options, CPU)
    assert [row["work"] for row in rows] == ["update", "products of an update"]


def test_an_update_is_done_as_its_row_says(tiny, monkeypatch):
    """What reaches the score: its number of samples, their kind, the critic's dtype, reference and steps."""
    seen = []
    load_script = step_time.collect.load_script

    def load_and_watch(path):
        script = load_script(path)
        actor_loss = script.actor_loss

        def watched(u_fn, q_fn, batch, uniform, eps, mc_eps, alpha, args):
            seen.append((mc_eps, q_fn.keywords["hidden_dtype"], args))
            return actor_loss(u_fn, q_fn, batch, uniform, eps, mc_eps, alpha, args)

        script.actor_loss = watched
        return script

    monkeypatch.setattr(step_time.collect, "load_script", load_and_watch)
    values = {"env_id": "Pendulum-v1", "buffer_size": step_time.NUM_ROWS, **SIZES}
    works = step_time.torch_works(values, step_time.BenchmarkArgs(**QUICK), 3, 1, CPU)
    for work in works:
        if work.labels["work"] != "update":
            continue
        seen.clear()
        work.start()
        ((mc_eps, dtype, args),) = seen
        climbs = work.labels["climb_steps"] > 0
        assert (args.reference, args.policy_q) == (("box", "min") if climbs else ("uniform", "mean"))
        assert args.climb_steps == work.labels["climb_steps"]
        assert mc_eps.shape == (8, work.labels["num_mc_samples"], 1)
        assert str(dtype) == f"torch.{work.labels['score_dtype']}"
        # the points of a lattice differ by the same share of the unit interval in every state
        uniform = torch.special.ndtr(mc_eps)
        steps = (uniform[:, 1:] - uniform[:, :-1]) % 1
        is_lattice = torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-4)
        assert is_lattice == (work.labels["mc_noise"] == "lattice")


def test_the_two_orders_of_an_iteration(monkeypatch):
    """The update comes before the environments' step, or after it; the rows are those of the step."""
    args = som.Args(env_id="Pendulum-v1", buffer_size=step_time.NUM_ROWS, num_envs=2, compile=False, **SIZES)
    script = step_time.InPyTorch(som, args, "eager", 3, 1, CPU)
    events = []
    step = script.envs.step

    def watched_step(actions):
        events.append("step")
        return step(actions)

    monkeypatch.setattr(script.envs, "step", watched_step)
    script.update = lambda: events.append("update")
    for update_comes_first, order in ((True, ["update", "step"]), (False, ["step", "update"])):
        obs = script.obs
        script.iteration(update_comes_first)
        assert events == order
        events.clear()
        np.testing.assert_array_equal(script.new_rows[:, :3], obs)
        np.testing.assert_array_equal(script.new_rows[:, 4:7], script.obs)


FIRST_EDITION = """
import torch, gymnasium as gym
from dataclasses import dataclass

@dataclass
class Args:
    env_id: str
    cuda: bool
    compile: bool
    num_envs: int = 2
    num_layers: int = 2
    num_frequencies: int = 8
    batch_size: int = 8
    num_mc_samples: int = 6
    best_of_n: int = 3
    hidden_dim: int = 16

def make_env(env_id):
    return gym.make(env_id)

class Agent:
    def __init__(self, args, obs_dim, act_dim, device):
        self.act_dim = act_dim

    def act(self, obs, explore=False):
        return torch.zeros(len(obs), self.act_dim), None

    def update(self, batch):
        assert batch == 8

class ReplayBuffer:
    def __init__(self, size, obs_dim, act_dim, device):
        self.widths = (obs_dim, obs_dim, act_dim)

    def add(self, obs, next_obs, actions, rewards, terminated):
        assert (obs.shape[1], next_obs.shape[1], actions.shape[1]) == self.widths

    def sample(self, batch_size):
        return batch_size
"""


def test_the_first_edition_beside_the_second(tiny, tmp_path, capsys):
    (tmp_path / "som_continuous_action.py").write_text(FIRST_EDITION)
    options = step_time.BenchmarkArgs(sizes=("small",), variants=False, first_edition=tmp_path, num_seeds=2, **QUICK)
    rows = step_time.measure("small", options, CPU)
    works = ["update", "action", "iteration, old order"]
    assert [row["work"] for row in rows if row["edition"] == "first"] == works
    for row in rows:
        has_one_seed = "seeds" not in row["work"]
        assert (row["/ first edition"] != "") == (row["edition"] != "" and has_one_seed)
    assert {row["framework"] for row in rows} == {"PyTorch", "JAX"}
    in_jax = [row for row in rows if row["framework"] == "JAX"]
    works = ["update", "action", "iteration, new order", "iteration, old order", "update of 2 seeds"]
    assert [row["work"] for row in in_jax] == works
    assert all(0 < row["host ms"] <= row["back to back ms"] for row in in_jax)


def test_the_hosts_share_ends_where_waiting_begins(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def pass_time(seconds):
        clock[0] += seconds

    work = step_time.Work({}, lambda: pass_time(1.0), lambda: pass_time(6.0))
    assert step_time.seconds_per_call(work, 3.0, back_to_back=True) == (3.0, 1.0)  # (3 + 6) / 3 calls


def test_ratios_are_those_of_the_rounds():
    labels = {"num_mc_samples": 6, "precision": "high", "climb_steps": 0, "gflop": 2.0}
    own = labels | {"work": "update", "edition": "second", "form": "compiled"}
    first = labels | {"work": "update", "edition": "first", "form": "compiled"}
    products = labels | {"work": "products of an update", "edition": "", "form": "products"}
    works = [step_time.Work(x, None, None) for x in (own, first, products)]
    works[0].seconds += [1.0, 2.0, 9.0]
    works[1].seconds += [2.0, 2.0, 3.0]
    works[2].seconds += [0.5, 0.25, 1.0]
    row = step_time.row_of(works[0], works)
    assert (row["ms"], row["lowest ms"], row["highest ms"]) == (2000, 1000, 9000)
    assert (row["GFLOP/s"], row["/ first edition"], row["/ products"]) == (1, 1, 8)


def test_every_method_is_timed_and_its_evaluations_are_counted():
    """The counts are those that follow from N, K, T and the methods, as docs/baselines.md has them."""
    options = step_time.BenchmarkArgs(methods=True, **QUICK)
    rows = {row["method"]: row for row in step_time.measure("small", options, CPU)}
    assert list(rows) == list(step_time.METHODS)
    N, K = som.LAPTOP["best_of_n"], som.LAPTOP["num_mc_samples"]
    # of the diffusion policies: steps, candidates, K. QSM and DACER have 20 steps, DIPO has 40
    T, chains, samples = 10, 4, 16
    expected = {  # policy and critics in an update, policy and critics in an action
        "SOM": (N + 1, N + 2 + K, N, N),
        "SOM, prior": (N + 1, N + 2 + K, N, N),
        "SOM, box and peaks": (
            N + 1,
            N + 2 + 4 * (1 + 3 + 1),
            N,
            N,
        ),  # four samples: their scale, three steps, their height
        "MFP": (2 * N + 2, 2 * N + 2, N, N),  # the best of N in both states
        "SDAC": (T * chains + 1, chains + 2 + samples, T * chains, chains),
        "DPMD": (T * chains + 1, chains + 2 + 1, T * chains, chains),
        "QSM": (20 * chains + 1, chains + 2 + 1, 20 * chains, chains),
        "DIPO": (40 + 1, 1 + 2 + 10, 40, 1),  # ten steps up the critic
        "QVPO": (T * chains + T * samples + 11, chains + 2 + samples, T * chains, chains),
        "DACER": (2 * 20, 3, 20, 0),
        "SAC": (2, 3, 1, 0),
    }
    for method, counts in expected.items():
        row = rows[method]
        names = "policy, update", "critic, update", "policy, action", "critic, action"
        assert tuple(row[name] for name in names) == counts, method
        assert 0 < row["update lowest ms"] <= row["update ms"] <= row["update highest ms"]
        assert row["update / SOM"] > 0 and row["action / SOM"] > 0
    assert rows["SOM"]["update / SOM"] == rows["SOM"]["action / SOM"] == 1


def test_methods_at_the_papers_sizes():
    """Table 3: 256 wide, batches of 256, N = 32, K = 100 (SOM) and 64 (SDAC, QVPO), T = 20, DIPO's 100."""
    for method, (file, changes) in step_time.METHODS.items():
        script = step_time.sb3 if file == step_time.SB3 else step_time.collect.load_script(step_time.ROOT / file)
        args = step_time.method_args(script, "paper", changes, "Pendulum-v1")
        assert (args.hidden_dim, args.num_layers, args.batch_size) == (256, 3, 256)
        if "num_diffusion_steps" in vars(args):
            assert args.num_diffusion_steps == (100 if method == "DIPO" else 20)
        if method in ("SOM", "SOM, prior"):
            assert (args.best_of_n, args.num_mc_samples) == (32, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_edition": Path("nowhere")}, "--first-edition nowhere is no checkout"),
        ({"device": "gpu"}, "--device gpu: PyTorch finds no GPU"),
    ],
)
def test_bad_input_is_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        step_time.main(step_time.BenchmarkArgs(**options))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
