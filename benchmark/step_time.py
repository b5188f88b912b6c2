"""Time of an update, of an action and of whole iterations of SOM, in PyTorch and in JAX.

    python benchmark/step_time.py --csv benchmark/results/step_time.csv

Beside the script's defaults stand the cheaper scores: the lattice, half of the samples, bfloat16, the box with its
peaks (climb_steps 3), on a GPU also TF32 beside float32 (precision "high" and "highest"). An update samples its batch;
an action is of one environment and comes back to the host. An iteration acts, steps the environments, adds their rows
and updates: "new order" sends the update off before the environments step, as the script does, "old order" after it.
On a GPU "captured" is the script's CUDA graph, "compiled" the same functions called plainly. "ms" waits for every
call, "back to back ms" only for the last, and "host ms" is what the processor needs of that; PyTorch on a CPU always
waits. On a GPU a copy within its memory gives the other ceiling beside the products.

All timings are taken in turn, round by round, so that they share the machine; what counts are their ratios: to the
update's matrix products alone, and to the first edition of the PyTorch script, which needs a checkout of it:

    git worktree add ../first 775835a
    python benchmark/step_time.py --first-edition ../first

With --methods it times an update and an action of every method instead, as in the paper's Table 2, and counts the
network evaluations that they ask for. An update here is one of the critics and one of the policy, whatever the method's
policy_frequency. PPO is not among them: it has no update for each step.

    python benchmark/step_time.py --methods --no-torch-compile --csv benchmark/results/method_time.csv
"""

import itertools
import os
import statistics
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import metadata
from operator import truediv
from pathlib import Path
from typing import Literal
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import collect
import launch
import sb3

import som_continuous_action as som

ROOT = Path(__file__).parents[1]
SIZES = {"paper": {}, "small": som.LAPTOP}  # what differs from the script's defaults
NUM_ROWS = 10_000  # in the replay buffer
SB3 = "benchmark/sb3.py"
# the field of --preset peaks, at any size
FORM = ("reference", "climb_steps", "num_mc_samples", "mc_noise", "policy_q")
BEST_FORM = {name: som.PEAKS[name] for name in FORM}
# --methods: a method's script, and what it is asked for there; the first is what the others are compared with
METHODS = {
    "SOM": ("som_continuous_action.py", {}),
    "SOM, prior": ("som_continuous_action.py", {"reference": "prior"}),
    "SOM, box and peaks": ("som_continuous_action.py", BEST_FORM),
    "MFP": ("mfp_continuous_action.py", {}),
    "SDAC": ("baselines/diffusion_continuous_action.py", {"method": "sdac"}),
    "DPMD": ("baselines/diffusion_continuous_action.py", {"method": "dpmd"}),
    "QSM": ("baselines/diffusion_continuous_action.py", {"method": "qsm"}),
    "DIPO": ("baselines/diffusion_continuous_action.py", {"method": "dipo"}),
    "QVPO": ("baselines/diffusion_continuous_action.py", {"method": "qvpo"}),
    "DACER": ("baselines/dacer_continuous_action.py", {}),
    "SAC": (SB3, {}),
}

# What an update is asked to do; precision is that of products in float32: "high" is TF32
Variant = namedtuple("Variant", "mc_noise num_mc_samples score_dtype precision climb_steps")


@dataclass
class Work:
    """What is timed: start() begins it, wait() waits for it; None if start() does so itself."""

    labels: dict  # columns of its row
    start: Callable[[], None]
    wait: Callable[[], None] | None
    seconds: list[float] = field(default_factory=list)  # a call's, of every round
    seconds_back_to_back: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)  # of those, until the last call returns


@dataclass
class BenchmarkArgs:
    env_id: str = "HalfCheetah-v4"
    """environment whose observations and actions are used"""
    sizes: tuple[Literal["paper", "small"], ...] = ("paper", "small")
    """the script's defaults, which are the paper's Table 3, and those of --preset laptop"""
    works: tuple[Literal["update", "action", "iteration"], ...] = ("update", "action", "iteration")
    """what to time"""
    rounds: int = 7
    """rounds of interleaved timings; their median, lowest and highest are reported"""
    seconds: float = 1.0
    """time for each measurement of a round"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where to time; auto: on a GPU if there is one"""
    torch_compile: bool = True
    """time the PyTorch script compiled, too"""
    variants: bool = True
    """time the cheaper scores, too"""
    jax: bool = True
    """time the JAX script, too"""
    num_seeds: int = 5
    """also time an update of as many seeds side by side, in JAX"""
    methods: bool = False
    """time every method instead"""
    first_edition: Path | None = None
    """checkout of the first edition, to be timed beside the second"""
    csv: Path | None = None
    """also write the table to this file"""


def script_args(script, values):
    """The script's Args with those of the values that it has."""
    names = {field.name for field in fields(script.Args)}
    return script.Args(**{name: value for name, value in values.items() if name in names})


# The matrix products of an update, from the shapes
def network_products(size, states, rows, obs_dim, in_dim, out_dim, args, backward):
    """(count, M, K, N) batched products of a network; backward: "none", "input", "weights and input".

    out_dim None: the last layer is a sum.
    """
    width = args.hidden_dim
    forward = [(states, obs_dim, width), (rows, in_dim, width)]
    forward += (args.num_layers - 1) * [(rows, width, width)]
    if out_dim is not None:
        forward += [(rows, width, out_dim)]
    products = list(forward)
    if backward != "none":
        products += [(m, n, k) for m, k, n in forward[2:]]  # gradient of the hidden inputs
    if backward == "input":
        products += [(rows, width, in_dim)]
    if backward == "weights and input":
        products += [(k, m, n) for m, k, n in forward]
    return [(size, *product) for product in products]


def update_products(args, obs_dim, act_dim):
    """Every matrix product of one update."""
    B = args.batch_size
    candidates = B * args.best_of_n
    samples = B * args.num_mc_samples
    embedded = act_dim + 4 * args.num_frequencies  # action and times

    def actor(rows, backward):
        return network_products(1, B, rows, obs_dim, embedded, act_dim, args, backward)

    def critics(rows, backward):
        return network_products(2, B, rows, obs_dim, act_dim, None, args, backward)

    products = actor(candidates, "none")  # at s'
    products += critics(candidates, "none")  # the best of them
    products += critics(B, "none")  # the target
    products += critics(B, "weights and input")  # the critic's loss
    climb_steps = getattr(args, "climb_steps", 0)  # the first edition has none
    if climb_steps == 0:
        products += critics(samples, "input")  # the score
    else:
        products += 2 * critics(samples, "none")  # Q's scale, and the peaks' heights
        products += climb_steps * critics(samples, "input")
    products += actor(B, "weights and input")  # the MeanFlow loss
    products += actor(B, "none")[1:]  # the tangent of its Jacobian-vector product
    return products


def gflop_of(products):
    return sum(2 * size * m * k * n for size, m, k, n in products) / 1e9


def random_columns(num_rows, obs_dim, act_dim):
    """Columns of random transitions, in the order of the replay buffer."""
    rng = np.random.default_rng(1)
    obs, next_obs = rng.standard_normal((2, num_rows, obs_dim))
    actions = rng.uniform(-1, 1, (num_rows, act_dim))
    rewards = rng.standard_normal(num_rows)
    return obs, next_obs, actions, rewards, np.zeros(num_rows)


# Each of these classes has the same work to offer: an update, an action, an iteration in one order or both
class FirstEdition:
    """The PyTorch script's first edition."""

    def __init__(self, script, args, obs_dim, act_dim, device):
        self.args = args
        self.device = device
        self.agent = script.Agent(args, obs_dim, act_dim, device)
        self.rb = script.ReplayBuffer(NUM_ROWS, obs_dim, act_dim, device)
        self.rb.add(*random_columns(NUM_ROWS, obs_dim, act_dim))
        self.one_obs = np.zeros((1, obs_dim))
        thunks = args.num_envs * [partial(script.make_env, args.env_id)]
        self.envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode="SameStep")
        self.obs, _ = self.envs.reset(seed=1)

    def works(self):
        return {
            "update": self.update,
            "action": partial(self.act, self.one_obs),
            "iteration, old order": self.iteration,
        }

    def act(self, obs, explore=False):
        obs = torch.as_tensor(obs, dtype=torch.float32).to(self.device)
        actions, _ = self.agent.act(obs, explore)
        return actions.cpu().numpy()

    def update(self):
        self.agent.update(self.rb.sample(self.args.batch_size))

    def iteration(self):
        actions = self.act(self.obs, explore=True)
        next_obs, rewards, terminated, _, _ = self.envs.step(actions)
        self.rb.add(self.obs, next_obs, actions, rewards, terminated)
        self.obs = next_obs
        self.update()


class SecondEdition:
    """A script of the second edition: what both frameworks have."""

    def __init__(self, script, args, rb, obs_dim):
        self.rb = rb
        self.one_obs = np.zeros((1, obs_dim), np.float32)
        thunks = args.num_envs * [partial(script.make_env, args.env_id)]
        self.envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode="SameStep")
        self.to_box = partial(script.to_box, box=self.envs.single_action_space)
        self.obs, _ = self.envs.reset(seed=1)

    def works(self):
        return {
            "update": self.update,
            "action": self.action,
            "iteration, new order": partial(self.iteration, update_comes_first=True),
            "iteration, old order": partial(self.iteration, update_comes_first=False),
        }

    def iteration(self, update_comes_first):
        self.new_obs[:] = self.obs
        actions_in_flight = self.send_off_actions()
        if update_comes_first:
            self.update()
        actions = self.wait_for(actions_in_flight)
        next_obs, rewards, terminated, _, _ = self.envs.step(self.to_box(actions))
        self.rb.pack(self.new_rows, self.obs, next_obs, actions, rewards, terminated)
        self.rb.on_host[: len(self.new_rows)] = self.new_rows
        if not update_comes_first:
            self.update()
        self.obs = next_obs


class InPyTorch(SecondEdition):
    def __init__(self, script, args, form, obs_dim, act_dim, device):
        rb = script.ReplayBuffer(args, obs_dim, act_dim, device, None, NUM_ROWS)
        super().__init__(script, args, rb, obs_dim)
        rows = rb.on_host[:NUM_ROWS]
        rb.pack(rows, *random_columns(NUM_ROWS, obs_dim, act_dim))
        rb.rows[:NUM_ROWS] = torch.from_numpy(rows)
        self.on_gpu = device.type == "cuda"
        self.inbox = torch.zeros(args.num_envs, rb.row_width + obs_dim, pin_memory=self.on_gpu)
        self.outbox = torch.zeros(args.num_envs, act_dim, pin_memory=self.on_gpu)
        self.device_inbox = self.inbox.to(device, copy=True)
        self.new_rows, self.new_obs = np.split(self.inbox.numpy(), [rb.row_width], axis=1)
        self.device_obs = torch.zeros(1, obs_dim, device=device)
        agent = script.Agent(args, obs_dim, act_dim, device)
        self.act = partial(script.add_and_act, agent, rb, self.device_inbox)
        self.update = partial(script.sample_and_update, agent, rb, True)
        self.act_in_one = partial(agent.act, self.device_obs)
        if form == "captured":
            self.act = script.CUDAGraph(self.act)
            self.update = script.CUDAGraph(self.update)
            self.act_in_one = script.CUDAGraph(self.act_in_one)

    def action(self):
        self.device_obs.copy_(torch.from_numpy(self.one_obs))
        actions, _ = self.act_in_one()
        return actions.cpu()

    def send_off_actions(self):
        self.device_inbox.copy_(self.inbox, non_blocking=True)
        self.outbox.copy_(self.act(), non_blocking=True)
        return torch.cuda.current_stream().record_event() if self.on_gpu else None

    def wait_for(self, event):
        if self.on_gpu:
            event.synchronize()
        return self.outbox.numpy()


def torch_products(products, device):
    """A function that computes these products alone."""
    operands = {}
    for size, m, k, n in products:
        left = torch.randn(size, m, k, device=device)
        right = torch.randn(size, k, n, device=device)
        operands[size, m, k, n] = (left, right, torch.empty(size, m, n, device=device))

    def multiply():
        for shape in products:
            left, right, out = operands[shape]
            torch.bmm(left, right, out=out)

    return multiply


def with_torch_precision(precision, function):
    """The function with products of this precision."""

    def start():
        torch.set_float32_matmul_precision(precision)
        function()

    return start


def variants_of(args, options, on_gpu):
    """The script's defaults, then the cheaper scores."""
    K = args.num_mc_samples
    default = Variant("normal", K, "float32", "high" if on_gpu else "highest", 0)
    if not options.variants:
        return [default]
    noises = ("normal", "lattice")
    dtypes = ("float32", "bfloat16")
    variants = [Variant(*values, default.precision, 0) for values in itertools.product(noises, (K, K // 2), dtypes)]
    if on_gpu:
        variants.insert(1, default._replace(precision="highest"))
    peaks = {name: BEST_FORM[name] for name in ("mc_noise", "num_mc_samples", "climb_steps")}
    return [*variants, default._replace(**peaks)]


def values_of(variant):
    """What a variant changes in Args."""
    form = BEST_FORM if variant.climb_steps > 0 else {}
    return {**form, **variant._asdict()}


def torch_works(values, options, obs_dim, act_dim, device):
    """All work of the PyTorch script; values: of Args."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else None
    forms = ["eager"]
    if options.torch_compile:
        forms.append("compiled")
    if options.torch_compile and on_gpu:
        forms.append("captured")
    works = []

    def add(edition, form, variant, gflop, starts):
        for name, start in starts.items():
            labels = {"framework": "PyTorch", "edition": edition, "form": form, "work": name}
            labels |= {**variant._asdict(), "gflop": gflop if "update" in name else ""}
            works.append(Work(labels, with_torch_precision(variant.precision, start), wait))

    variants = variants_of(script_args(som, values), options, on_gpu)
    if options.first_edition is not None:
        script = collect.load_script(options.first_edition / "som_continuous_action.py")
        args = script_args(script, values | {"cuda": on_gpu, "compile": options.torch_compile})
        gflop = gflop_of(update_products(args, obs_dim, act_dim))
        starts = FirstEdition(script, args, obs_dim, act_dim, device).works()
        in_float32 = variants[0]._replace(precision="highest")
        add("first", "compiled" if options.torch_compile else "eager", in_float32, gflop, starts)
    for variant in variants:
        for form in forms if variant == variants[0] else forms[-1:]:
            script = collect.load_script(ROOT / "som_continuous_action.py")
            args = script_args(script, {**values, **values_of(variant), "compile": form != "eager"})
            starts = InPyTorch(script, args, form, obs_dim, act_dim, device).works()
            if variant not in (variants[0], *variants[-2:]):  # they act and step alike
                starts = {"update": starts["update"]}
            products = update_products(args, obs_dim, act_dim)
            add("second", form, variant, gflop_of(products), starts)
        if variant.climb_steps > 0 or (variant.mc_noise == "normal" and variant.score_dtype == "float32"):
            multiply = torch_products(products, device)
            add("", "products", variant, gflop_of(products), {"products of an update": multiply})
    if on_gpu:
        source, target = torch.rand(2, 2**28, device=device)
        starts = {"copy of 1 GiB": partial(target.copy_, source)}
        add("", "copy", variants[0], "", starts)
    return works


def jax_works(values, options, obs_dim, act_dim, device):
    """All work of the JAX script, of one seed and of several."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its share of a GPU
    import jax

    import som_continuous_action_jax as som_jax

    if device.type == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        collect.exit_with_error("JAX finds no GPU; --no-jax leaves it out")

    class InJAX(SecondEdition):
        def __init__(self, args):
            rb = som_jax.ReplayBuffer(args, obs_dim, act_dim, None, NUM_ROWS)
            super().__init__(som_jax, args, rb, obs_dim)
            num_rows = NUM_ROWS * args.num_seeds
            rb.pack(rb.on_host[:num_rows], *random_columns(num_rows, obs_dim, act_dim))
            self.args = args
            self.ring = rb.to_device(NUM_ROWS)
            self.keys = jax.numpy.stack([jax.random.PRNGKey(k) for k in range(args.num_seeds)])
            init = som_jax.side_by_side(som_jax.init, args=args, obs_dim=obs_dim, act_dim=act_dim)
            self.state = init(self.keys)
            self.acting = som_jax.part_of_seed(0, som_jax.acting_part(self.state))  # a copy
            self.act_key = jax.random.PRNGKey(1)
            fixed = {"args": args, "widths": rb.widths, "policy_is_due": True}
            self.sample_and_update = som_jax.side_by_side(som_jax.sample_and_update, donated=0, **fixed)
            self.add_and_act = som_jax.side_by_side(som_jax.add_and_act, donated=(0, 1), args=args)
            self.lr_factor = jax.numpy.ones(args.num_seeds)
            self.inbox = np.zeros((1, args.num_envs, rb.row_width + obs_dim), np.float32)
            self.new_rows, self.new_obs = np.split(self.inbox[0], [rb.row_width], axis=1)

        def update(self):
            self.state, _ = self.sample_and_update(self.state, self.ring, self.lr_factor)

        def action(self):
            return np.asarray(som_jax.act_greedily(self.acting, self.one_obs, self.act_key, 0, self.args))

        def send_off_actions(self):
            acting = som_jax.acting_part(self.state)
            self.ring, self.keys, actions = self.add_and_act(self.ring, self.keys, acting, self.inbox)
            actions.copy_to_host_async()
            return actions

        def wait_for(self, actions):
            return np.asarray(actions)[0]

        def wait(self):
            jax.block_until_ready(self.state)

    def with_precision(precision, function):
        def start():
            with jax.default_matmul_precision(som_jax.MATMUL_PRECISIONS[precision]):
                function()

        return start

    works = []
    variants = variants_of(script_args(som_jax, values), options, device.type == "cuda")
    for variant in variants:
        args = script_args(som_jax, {**values, **values_of(variant)})
        script = InJAX(args)
        starts = script.works()
        full = variant in (variants[0], *variants[-2:])
        if not full:
            starts = {"update": starts["update"]}
        waits = dict.fromkeys(starts, script.wait)
        if full and options.num_seeds > 1:
            several = InJAX(replace(args, num_seeds=options.num_seeds))
            name = f"update of {options.num_seeds} seeds"
            starts[name] = several.update
            waits[name] = several.wait
        gflop = gflop_of(update_products(args, obs_dim, act_dim))
        for name, start in starts.items():
            labels = {"framework": "JAX", "edition": "second", "form": "compiled", "work": name}
            labels |= {**variant._asdict(), "gflop": gflop if name == "update" else ""}
            works.append(Work(labels, with_precision(variant.precision, start), waits[name]))
    return works


def seconds_per_call(work, seconds, back_to_back):
    """Of a call, and of it until the function returns."""
    calls = 0
    begin = time.perf_counter()
    while calls == 0 or time.perf_counter() - begin < seconds:
        work.start()
        calls += 1
        if work.wait is not None and not back_to_back:
            work.wait()
    host_seconds = time.perf_counter() - begin
    if work.wait is not None:
        work.wait()
    return (time.perf_counter() - begin) / calls, host_seconds / calls


def ratio(work, other):
    """Median over the rounds of the time of one work divided by that of another."""
    return round(statistics.median(map(truediv, work.seconds, other.seconds)), 3)


def row_of(work, works):
    """Medians, spread and ratios of one work."""
    labels = work.labels
    median = statistics.median(work.seconds)
    row = dict(labels)
    if labels["gflop"]:
        row["gflop"] = round(labels["gflop"], 2)
    row["ms"] = round(1e3 * median, 3)
    row["lowest ms"] = round(1e3 * min(work.seconds), 3)
    row["highest ms"] = round(1e3 * max(work.seconds), 3)
    row["back to back ms"] = ""
    row["host ms"] = ""
    if work.seconds_back_to_back:
        row["back to back ms"] = round(1e3 * statistics.median(work.seconds_back_to_back), 3)
        row["host ms"] = round(1e3 * statistics.median(work.host_seconds), 3)
    row["GFLOP/s"] = round(labels["gflop"] / median, 1) if labels["gflop"] else ""
    row["/ products"] = ""
    row["/ first edition"] = ""
    kind, _, _ = labels["work"].partition(",")  # the first edition's iterations have one order
    for other in works:
        same_update = all(other.labels[name] == labels[name] for name in ("num_mc_samples", "precision", "climb_steps"))
        if labels["gflop"] and other.labels["form"] == "products" and same_update:
            row["/ products"] = ratio(work, other)
        if other.labels["edition"] == "first" and other.labels["work"].startswith(kind):
            row["/ first edition"] = ratio(work, other)
    return row


# Every method, with --methods
def method_args(script, sizes, changes, env_id):
    """The script's Args of a method, at its own defaults or at those of --preset laptop."""
    small = sizes == "small"
    if script is sb3:  # whose defaults are the small ones
        args = sb3.Args() if small else sb3.Args(batch_size=256, hidden_dim=256, learning_rate=3e-4)
    elif hasattr(script, "default_args"):
        args = script.default_args(changes["method"], "laptop" if small else None)
    else:
        args = script.Args(**{**(script.LAPTOP if small else {}), **changes})
    return replace(args, env_id=env_id, buffer_size=NUM_ROWS)


class InSB3:
    """SAC of Stable-Baselines3."""

    def __init__(self, args, obs_dim, act_dim, device):
        from stable_baselines3.common.logger import configure

        self.args = args
        layers = args.num_layers * [args.hidden_dim]
        shared = {
            "env": sb3.make_training_env(args.env_id),
            "policy_kwargs": {"net_arch": layers, "activation_fn": torch.nn.GELU},
            "device": device,
        }
        self.model, _ = sb3.make_sac(shared, args)
        self.model.set_logger(configure(None, []))
        columns = random_columns(NUM_ROWS, obs_dim, act_dim)
        for *row, terminated in zip(*columns, strict=True):
            obs, next_obs, action, reward = row
            self.model.replay_buffer.add(obs, next_obs, action, reward, terminated, [{}])
        self.one_obs = np.zeros((1, obs_dim), np.float32)

    def update(self):
        self.model.train(gradient_steps=1, batch_size=self.args.batch_size)

    def action(self):
        return self.model.predict(self.one_obs, deterministic=True)


def networks_of(script):
    """The networks that are counted, twins once."""
    if isinstance(script, InSB3):
        model = script.model
        return {"policy": [model.actor.latent_pi], "critic": [model.critic.qf0, model.critic_target.qf0]}
    agent = script.update.args[0]
    networks = {"policy": [], "critic": []}
    for name, module in agent.named_children():
        networks["policy" if "actor" in name else "critic"].append(module)
    return networks


def evaluations(networks, function):
    """{name: inputs that go through its networks in a call of the function}."""
    counts = dict.fromkeys(networks, 0)

    def counting(name, evaluate):
        def counted(*inputs):
            x = inputs[min(1, len(inputs) - 1)]  # (B, N, D) beside the states, or (B, D) alone
            counts[name] += x.shape[:-1].numel()
            return evaluate(*inputs)

        return counted

    with ExitStack() as stack:
        for name, modules in networks.items():
            for module in modules:
                # a critic's mean_return() passes by its forward()
                method = "hidden" if hasattr(module, "hidden") else "forward"
                counted = counting(name, getattr(module, method))
                stack.enter_context(mock.patch.object(module, method, counted))
        function()
    return counts


def method_works(sizes, options, obs_dim, act_dim, device):
    """An update and an action of every method, in all forms."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else None
    forms = ["eager"]
    if options.torch_compile:
        forms.append("captured" if on_gpu else "compiled")
    precision = "high" if on_gpu else "highest"  # as the scripts have it
    works = []
    for method, (file, changes) in METHODS.items():
        labels = {"method": method}  # and the evaluations, which are counted where nothing is compiled
        for form in forms:
            script = sb3 if file == SB3 else collect.load_script(ROOT / file)
            args = method_args(script, sizes, changes, options.env_id)
            if file == SB3 and form == "eager":
                timed = InSB3(args, obs_dim, act_dim, device)
            elif file == SB3:
                continue
            else:
                args = replace(args, compile=form != "eager")
                timed = InPyTorch(script, args, form, obs_dim, act_dim, device)
            starts = {"update": timed.update, "action": timed.action}
            if form == "eager":
                for name, start in starts.items():
                    per = args.batch_size if name == "update" else 1
                    for network, count in evaluations(networks_of(timed), start).items():
                        labels[f"{network}, {name}"] = count // per
            for name, start in starts.items():
                of_work = {**labels, "form": form, "work": name}
                works.append(Work(of_work, with_torch_precision(precision, start), wait))
    return works


def method_rows(works):
    """A row for each method and form: times, ratios to the first method's, evaluations for each state."""
    rows = {}
    for work in works:
        labels = dict(work.labels)
        form = labels.pop("form")
        name = labels.pop("work")
        row = rows.setdefault((labels["method"], form), {"method": labels["method"], "form": form})
        row[f"{name} ms"] = round(1e3 * statistics.median(work.seconds), 3)
        row[f"{name} lowest ms"] = round(1e3 * min(work.seconds), 3)
        row[f"{name} highest ms"] = round(1e3 * max(work.seconds), 3)
        for other in works:
            wanted = {"method": next(iter(METHODS)), "form": form, "work": name}
            if wanted.items() <= other.labels.items():
                row[f"{name} / {wanted['method']}"] = ratio(work, other)
        row |= {key: count for key, count in labels.items() if key.endswith(f", {name}")}
    return list(rows.values())


def measure(sizes, options, device):
    """The rows of one size."""
    env = gym.make(options.env_id)
    obs_dim = env.observation_space.shape[0]
    act_dim = env.action_space.shape[0]
    env.close()
    values = {"env_id": options.env_id, "buffer_size": NUM_ROWS, **SIZES[sizes]}
    if options.methods:
        works = method_works(sizes, options, obs_dim, act_dim, device)
    else:
        works = torch_works(values, options, obs_dim, act_dim, device)
    if options.jax and not options.methods:
        works += jax_works(values, options, obs_dim, act_dim, device)
    kinds = (*options.works, "copy")
    works = [work for work in works if any(kind in work.labels["work"] for kind in kinds)]
    for work in works:  # compile and warm up; the script captures a graph in its sixth call
        for _ in range(7 if work.labels["form"] == "captured" else 3):
            work.start()
        if work.wait is not None:
            work.wait()
    for _ in range(options.rounds):
        for work in works:
            seconds, _ = seconds_per_call(work, options.seconds, back_to_back=False)
            work.seconds.append(seconds)
            if work.wait is not None:
                seconds, host_seconds = seconds_per_call(work, options.seconds, back_to_back=True)
                work.seconds_back_to_back.append(seconds)
                work.host_seconds.append(host_seconds)
    threads = torch.get_num_threads()
    hardware = launch.hardware(threads, 0)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    common = {"sizes": sizes, "env_id": options.env_id, "hardware": hardware, "threads": threads}
    common["torch"] = torch.__version__
    if options.methods:
        return [common | row for row in method_rows(works)]
    common["jax"] = metadata.version("jax") if options.jax else ""
    return [common | row_of(work, works) for work in works]


def main(options):
    if options.device == "gpu" and not torch.cuda.is_available():
        collect.exit_with_error("--device gpu: PyTorch finds no GPU")
    if options.first_edition is not None and not (options.first_edition / "som_continuous_action.py").is_file():
        collect.exit_with_error(f"--first-edition {options.first_edition} is no checkout of the repository")
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch._dynamo.config.cache_size_limit = 1000  # all methods compile the library's Adam in this one process
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    rows = []
    for sizes in options.sizes:
        rows_of_size = measure(sizes, options, device)
        for row in rows_of_size:
            print("  ".join(str(value) for value in row.values()), flush=True)
        rows += rows_of_size
    if options.csv is not None:
        collect.write(options.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkArgs, description=__doc__))
