"""Time of one update and one action of SOM in PyTorch and in JAX, beside matrix products alone.

    python benchmark/step_time.py --csv benchmark/results/step_time.csv

All timings of a row are taken in turn within one run, so that they share the machine; what counts is their ratio.
"""

import dataclasses
import pathlib
import platform
import statistics
import sys
import time
from typing import Literal

import gymnasium as gym
import jax
import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import collect

import som_continuous_action as som
import som_continuous_action_jax as som_jax

PAPER = {"batch_size": 256, "num_mc_samples": 100, "best_of_n": 32, "hidden_dim": 256}
SMALL = {"batch_size": 128, "num_mc_samples": 8, "best_of_n": 4, "hidden_dim": 64}


@dataclasses.dataclass
class BenchmarkArgs:
    env_id: str = "HalfCheetah-v4"
    """environment whose observation and action dimensions are used"""
    sizes: tuple[Literal["paper", "small"], ...] = ("paper", "small")
    """Table 3's sizes, and those of the README's small setting"""
    rounds: int = 7
    """rounds of interleaved timings; the median is reported"""
    seconds: float = 1.0
    """time for each measurement of a round"""
    cuda: bool = torch.cuda.is_available()
    """time on the GPU"""
    torch_compile: bool = True
    """time the PyTorch script compiled, too"""
    csv: pathlib.Path | None = None
    """also write the table to this file"""


def network_products(size, states, rows, obs_dim, in_dim, out_dim, args, backward):
    """(count, M, K, N) batched products of one network pass; backward: "none", "input" or "weights and input"."""
    forward = [(states, obs_dim, args.hidden_dim), (rows, in_dim, args.hidden_dim)]
    forward += (args.num_layers - 1) * [(rows, args.hidden_dim, args.hidden_dim)] + [(rows, args.hidden_dim, out_dim)]
    products = list(forward)
    if backward != "none":
        products += [(m, n, k) for m, k, n in forward[2:]]  # gradient of the hidden inputs
    if backward == "input":
        products += [(rows, args.hidden_dim, in_dim)]
    if backward == "weights and input":
        products += [(k, m, n) for m, k, n in forward]
    return [(size, *product) for product in products]


def update_products(args, obs_dim, act_dim):
    """Every matrix product of one update, from the shapes."""
    B, N, K, A = args.batch_size, args.best_of_n, args.num_mc_samples, act_dim
    embedded = A + 4 * 8  # action and time embedding
    actor, critic = (1, B), (2, B)
    products = network_products(*actor, B * N, obs_dim, embedded, A, args, "none")  # candidates at s'
    products += network_products(*critic, B * N, obs_dim, A, 2, args, "none")  # best of them
    products += network_products(*critic, B, obs_dim, A, 2, args, "none")  # target
    products += network_products(*critic, B, obs_dim, A, 2, args, "weights and input")  # critic loss
    products += network_products(*critic, B * K, obs_dim, A, 2, args, "input")  # score
    products += network_products(*actor, B, obs_dim, embedded, A, args, "weights and input")  # MeanFlow loss
    products += network_products(*actor, B, obs_dim, embedded, A, args, "none")[1:]  # tangent of the JVP
    return products


def seconds_per_call(function, device, seconds):
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        function()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def jax_work(sizes, options, obs_dim, act_dim):
    """One update, one action and one layer of the score's critics, by the JAX script's functions; that layer's flop."""
    args = som_jax.Args(env_id=options.env_id, buffer_size=10_000, **sizes)
    functions, keys = som_jax.compile_functions(args, obs_dim, act_dim), jax.numpy.stack([jax.random.PRNGKey(1)])
    states, rng = [functions.init(keys)], np.random.default_rng(1)
    buffer = jax.numpy.array(rng.uniform(-1, 1, (1, 10_000, 2 * obs_dim + act_dim + 2)), "float32").at[..., -1].set(0)
    obs = rng.standard_normal((1, 1, obs_dim)).astype(np.float32)
    shape = 2, args.batch_size * args.num_mc_samples, args.hidden_dim
    left, right = jax.random.normal(keys[0], shape), jax.random.normal(keys[0], (2, shape[2], shape[2]))
    product = jax.jit(jax.numpy.matmul)

    def update():
        states[0], _ = functions.update(states[0], buffer, 10_000, 0, keys)
        jax.block_until_ready(states[0])

    work = {
        "product jax": lambda: product(left, right).block_until_ready(),
        "update jax": update,
        "action jax": lambda: np.asarray(functions.act(states[0], obs, keys, 0)[0]),
    }
    return work, 2 * left.size * shape[2]


def measure(name, sizes, options):
    device = torch.device("cuda" if options.cuda else "cpu")
    env = gym.make(options.env_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    kwargs = {"env_id": options.env_id, "cuda": options.cuda, **sizes}
    agents = {
        label: som.Agent(som.Args(compile=label == "compiled", **kwargs), obs_dim, act_dim, device)
        for label in (("eager", "compiled") if options.torch_compile else ("eager",))
    }
    args = agents["eager"].args
    B = args.batch_size
    columns = torch.randn(B, obs_dim), torch.randn(B, obs_dim), torch.rand(B, act_dim) * 2 - 1, torch.randn(B)
    batch = som.Batch(*(column.to(device) for column in (*columns, torch.zeros(B))))
    one_obs = torch.randn(1, obs_dim, device=device)

    products = update_products(args, obs_dim, act_dim)
    operands = {
        (s, m, k, n): (torch.randn(s, m, k), torch.randn(s, k, n), torch.empty(s, m, n)) for s, m, k, n in products
    }
    operands = {shape: tuple(x.to(device) for x in tensors) for shape, tensors in operands.items()}

    def bare_products():
        for shape in products:
            left, right, out = operands[shape]
            torch.bmm(left, right, out=out)

    work = {"products": bare_products}
    for label, agent in agents.items():
        work[f"update {label}"] = lambda agent=agent: agent.update(batch)
        work[f"action {label}"] = lambda agent=agent: agent.act(one_obs)[0].cpu()
    jax_functions, product_flop = jax_work(sizes, options, obs_dim, act_dim)
    work |= jax_functions
    for function in work.values():  # compile and warm up
        for _ in range(3):
            function()
    rounds = [
        {label: seconds_per_call(function, device, options.seconds) for label, function in work.items()}
        for _ in range(options.rounds)
    ]
    gflop = sum(2 * s * m * k * n for s, m, k, n in products) / 1e9
    hardware = (
        torch.cuda.get_device_name() if options.cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    row = {
        "sizes": name,
        "env_id": options.env_id,
        "hardware": hardware,
        "torch": torch.__version__,
        "jax": jax.__version__,
    }
    row["update_gflop"] = round(gflop, 2)
    for label in work:
        row[f"{label} ms"] = round(1e3 * statistics.median(r[label] for r in rounds), 3)
    for label in agents:
        ratios = [r[f"update {label}"] / r["products"] for r in rounds]
        row[f"update {label} / products"] = round(statistics.median(ratios), 2)
    rate = [product_flop / r["product jax"] / 1e9 for r in rounds]
    row["product jax GFLOP/s"] = round(statistics.median(rate), 1)
    shares = [gflop / r["update jax"] / x for r, x in zip(rounds, rate, strict=True)]
    row["update jax: share of the product's GFLOP/s"] = round(statistics.median(shares), 2)
    for label in agents:
        ratios = [r[f"update {label}"] / r["update jax"] for r in rounds]
        row[f"update {label} / update jax"] = round(statistics.median(ratios), 2)
    return row


if __name__ == "__main__":
    options = tyro.cli(BenchmarkArgs)
    if not options.cuda:
        jax.config.update("jax_platforms", "cpu")
    elif not torch.cuda.is_available() or jax.default_backend() != "gpu":
        collect.fail("--cuda: PyTorch and JAX do not both find a GPU here, use --no-cuda")
    jax.config.update("jax_default_matmul_precision", "float32")  # as in PyTorch; JAX's own choice on a GPU is TF32
    rows = []
    for name in options.sizes:
        rows.append(measure(name, {"paper": PAPER, "small": SMALL}[name], options))
        print("\n".join(f"{key:44} {value}" for key, value in rows[-1].items()), end="\n\n", flush=True)
    if options.csv:
        collect.write(options.csv, rows)
