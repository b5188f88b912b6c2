"""benchmark/step_time.py: its count of the arithmetic against what PyTorch does, a table of small sizes."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, __file__.rpartition("/")[0])
import step_time
from step_time import som

SIZES = {"batch_size": 8, "num_mc_samples": 5, "best_of_n": 3, "hidden_dim": 16}
O, A = 7, 3


def flop(products):
    return sum(2 * s * m * k * n for s, m, k, n in products)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_products_are_those_of_an_update(num_layers):
    args = som.Args(cuda=False, compile=False, num_layers=num_layers, **SIZES)
    agent, B = som.Agent(args, O, A, torch.device("cpu")), args.batch_size
    columns = torch.randn(B, O), torch.randn(B, O), torch.rand(B, A), torch.randn(B), torch.zeros(B)
    with FlopCounterMode(display=False) as counter:
        agent.update(som.Batch(*columns))
    # in its JVP PyTorch also multiplies the layers' inputs by the tangents of the weights, which are zero
    zeros = step_time.network_products(1, B, B, O, A + 32, A, args, "none")[1:]
    assert counter.get_total_flops() == flop(step_time.update_products(args, O, A)) + flop(zeros)


def test_a_row_of_small_sizes():
    options = step_time.BenchmarkArgs(env_id="Pendulum-v1", rounds=1, seconds=0.0, cuda=False, torch_compile=False)
    row = step_time.measure("tiny", SIZES, options)
    times = {key: value for key, value in row.items() if key.endswith(" ms")}
    assert len(times) == 6 and min(times.values()) >= 0
    assert row["update eager / products"] > 0 and row["update jax: share of the product's GFLOP/s"] >= 0
