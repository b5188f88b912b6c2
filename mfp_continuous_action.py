# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "gymnasium[mujoco]>=1.4,<1.5", "mujoco>=3.3,<3.5", "numpy>=2", "tyro>=1,<2",
#   "tensorboard>=2.18", "tqdm>=4.66"]
# ///
"""MFP, the mean flow policy with an instantaneous velocity constraint (https://arxiv.org/abs/2602.13810), in one file.

Run it: python mfp_continuous_action.py --env-id Walker2d-v4
The policy turns noise into an action with ONE network evaluation; it imitates the best of N actions of its own:

    act       a = argmax_i min(Q1, Q2)(s, a_i), where a_i = clip(eps_i - u(eps_i, 0, 1, s)), i = 1..N
    critic    y = r + gamma (1 - terminated) min(Q1', Q2')(s', a'), where a' is chosen in the same way
    best      a* = stopgrad(a), chosen afresh in the states s of the replay buffer: no gradient of Q enters the policy
    path      a_t = (1 - t) a* + t eps, v = eps - a*
    mean flow L_MF = ||u(a_t, r, t, s) - stopgrad(v - (t - r) du/dt)||^2, by one Jacobian-vector product
    actor     L_MF + lambda L_IVC, where L_IVC = ||u(a_t, t, t, s) - v||^2 is the instantaneous velocity constraint

Conventions: t = 1 is noise, t = 0 is the action, 0 <= r <= t <= 1, as in SOM. The paper's time runs the other way, and
its printed r < t does not fit its own sampling: one step from the noise, there at time 0, needs the opposite order.
Inside the learner actions live in [-1, 1]^A; the environment is rescaled at its edge. The paper also says MVP for MFP.
Shapes: B states, A action coordinates; networks take N actions in each state, (B, N, A); twins come first, (2, B, N).
"""

import copy
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, util
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Batch = namedtuple("Batch", "obs next_obs actions rewards terminated")
FORMAT = f"{Path(__file__).name}, checkpoints of version 2"


@dataclass
class Args:
    exp_name: str = "mfp_continuous_action"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    cuda: bool = torch.cuda.is_available()  # train on the GPU (default: where there is one)
    compile: bool = torch.cuda.is_available()  # compile acting and losses, on a GPU with CUDA graphs (default: there)
    track: bool = False  # also log to Weights and Biases
    capture_video: bool = False  # record one episode of every evaluation in the run's folder
    save_model: bool = False  # write actor, critic and configuration to model.pt at the end
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints; also at both ends, SIGINT and SIGTERM
    checkpoint_buffer: bool = True  # keep the replay buffer too; else a resumed run collects learning_starts anew
    resume: str | None = None  # folder of a run (or a checkpoint in it) to go on with, in fresh episodes
    evaluate: str | None = None  # folder of a run (or a checkpoint in it) to evaluate instead of training
    num_episodes: int = 10  # episodes of an evaluation
    # Algorithm specific arguments
    env_id: str = "Walker2d-v4"  # Gymnasium id: flat observations, a bounded continuous action box
    total_timesteps: int = 5_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments stepped together
    learning_starts: int = 30_000  # environment steps with uniform random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in an update (B)
    updates_per_step: int = 1  # critic updates per step of all environments
    policy_frequency: int = 1  # critic updates per policy and target update; # differs from the paper: 2
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target networks' moving average
    reward_scale: float = 0.2  # factor on the reward
    policy_lr: float = 1e-4  # learning rate of the policy
    q_lr: float = 1e-4  # learning rate of the critics
    hidden_dim: int = 256  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    num_frequencies: int = 8  # sines and cosines of the times in the policy, from 1 to 3 rad
    best_of_n: int = 32  # candidate actions in acting, bootstrapping and imitation (N)
    ivc_coef: float = 1.0  # weight of the instantaneous velocity constraint (lambda)
    tangent: Literal["marginal", "conditional"] = "marginal"  # du/dt along u(a_t, t, t, s), or along v
    zero_r_ratio: float = 0.0  # share of the batch with r = 0, as in one-step acting
    noise_scale: float = 0.0  # std of exploration noise; the method has none, it explores by its candidates' spread
    eval_frequency: int = 20_000  # environment steps between evaluations; the last one is at the end


def make_env(env_id: str, video_folder: str | None = None) -> gym.Env:
    env = gym.make(env_id, **{"render_mode": "rgb_array"} if video_folder else {})
    if video_folder:
        env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: episode == 0)
    # RescaleAction does not clip by itself, and control costs are computed from the unclipped action
    return gym.wrappers.ClipAction(gym.wrappers.RescaleAction(gym.wrappers.RecordEpisodeStatistics(env), -1.0, 1.0))


# ALGO LOGIC: initialize agent here
class EnsembleMLP(nn.Module):
    """GELU networks in one batched product: B states (B, O), N inputs for each (B, N, D) -> (size, B, N, out)."""

    def __init__(self, size: int, obs_dim: int, in_dim: int, out_dim: int, hidden_dim: int, num_layers: int):
        super().__init__()
        dims = [obs_dim + in_dim, *num_layers * [hidden_dim], out_dim]  # weights (size, in, out), biases (size, 1, out)
        init = [(torch.empty(size, i + 1, o).uniform_(-1, 1) / i**0.5).split([i, 1], 1) for i, o in pairwise(dims)]
        self.weights, self.biases = (nn.ParameterList(x.clone() for x in xs) for xs in zip(*init, strict=True))

    def forward(self, obs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        w_obs, w_x = self.weights[0].split([obs.shape[1], x.shape[2]], dim=1)
        h_obs = torch.baddbmm(self.biases[0], obs.expand(len(w_obs), -1, -1), w_obs)  # (size, B, H), once for N inputs
        h = (h_obs.unsqueeze(2) + (x.flatten(0, 1) @ w_x).unflatten(1, x.shape[:2])).flatten(1, 2)  # (size, B * N, H)
        for w, b in list(zip(self.weights, self.biases, strict=True))[1:]:
            h = torch.baddbmm(b, nn.functional.gelu(h), w)
        return h.unflatten(1, x.shape[:2])


class QNetwork(EnsembleMLP):
    """Twin critics: the return, (2, B, N), of N actions (B, N, A) in each of B states (B, O)."""

    def forward(self, obs: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return super().forward(obs, a).squeeze(-1)


class MeanFlowActor(EnsembleMLP):
    """Average velocity u(a_t, r, t, s): N actions (B, N, A) at times r, t (B, N, 1) in B states (B, O) -> (B, N, A)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, num_layers: int, num_frequencies: int = 8):
        super().__init__(1, obs_dim, act_dim + 4 * num_frequencies, act_dim, hidden_dim, num_layers)
        # radians over t in [0, 1]: the loss multiplies du/dt, and much higher frequencies keep MeanFlow from training
        self.register_buffer("frequencies", torch.linspace(1.0, 3.0, num_frequencies))

    def forward(self, obs: torch.Tensor, a_t: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        phase_t, phase_dt = t * self.frequencies, (t - r) * self.frequencies  # (B, N, num_frequencies)
        embedding = phase_t.sin(), phase_t.cos(), phase_dt.sin(), phase_dt.cos()
        return super().forward(obs, torch.cat([a_t, *embedding], dim=-1)).squeeze(0)


# ALGO LOGIC: the method.
def linear_path(a_0, eps, t):
    """The straight path a_t = (1 - t) a_0 + t eps from actions to noise (B, A), and its velocity v = eps - a_0."""
    return (1 - t) * a_0 + t * eps, eps - a_0


def sample_r_t(uniform, zero_r_ratio=0.0):
    """Two uniform numbers (B, 2) as times r <= t, each (B, 1) (Algorithm 1); r = 0 in a share of the rows."""
    r, t = uniform.amin(dim=1, keepdim=True), uniform.amax(dim=1, keepdim=True)
    return r * (torch.arange(len(r), device=r.device).unsqueeze(1) >= zero_r_ratio * len(r)), t


def mfp_loss(u_fn, a_t, r, t, v, tangent="marginal"):
    """L_MF and L_IVC (B, N) of u_fn(a_t, r, t), and du/dt (B, N, A) along the flow.

    tangent: the flow's direction is u_fn's own velocity u(a_t, t, t) ("marginal"), or the path's v ("conditional").
    """
    u_tt = u_fn(a_t, t, t)
    velocity = u_tt.detach() if tangent == "marginal" else v
    u, dudt = torch.func.jvp(u_fn, (a_t, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))
    u_tgt = (v - (t - r) * dudt).detach()
    return (u - u_tgt).square().sum(dim=-1), (u_tt - v).square().sum(dim=-1), dudt.detach()


def best_of_n(u_fn, q_fn, obs, noise):
    """One-step actions noise - u(noise, 0, 1, s): the one of highest Q (B, A), and all N (B, N, A) (Algorithm 1)."""
    r = torch.zeros_like(noise[..., :1])
    candidates = (noise - u_fn(obs, noise, r, r + 1)).clamp(-1, 1)
    return candidates[torch.arange(len(obs), device=obs.device), q_fn(obs, candidates).argmax(dim=1)], candidates


class ReplayBuffer:
    """Ring of transitions, a row each, on the training device; only `terminated` is stored as the end of an episode."""

    def __init__(self, size: int, obs_dim: int, act_dim: int, device: torch.device, file: str = "", num_added: int = 0):
        self.num_added, self.widths = num_added, [obs_dim, obs_dim, act_dim, 1, 1]
        shape, row = (size, sum(self.widths)), 4 * sum(self.widths)  # a file is memory-mapped: it keeps its rows
        if num_added and not (os.path.isfile(file) and os.path.getsize(file) >= row * min(size, num_added)):
            fail(f"{file} is missing or too short; --no-checkpoint-buffer goes on without it")
        if file and hasattr(os, "posix_fallocate"):  # all of it now: a later write that finds no room kills the process
            os.posix_fallocate(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), 0, row * size)
        self.disk = torch.from_file(file, True, math.prod(shape)).view(shape) if file else torch.empty(shape)
        self.rows = self.disk.to(device)  # on the CPU the same memory

    def add(self, *columns) -> None:
        rows = torch.as_tensor(np.column_stack(columns), dtype=torch.float32)
        slots = torch.arange(self.num_added, self.num_added + len(rows)) % len(self.rows)
        self.rows[slots], self.disk[slots], self.num_added = rows.to(self.rows.device), rows, self.num_added + len(rows)

    def sample(self, batch_size: int) -> Batch:
        slots = torch.randint(min(self.num_added, len(self.rows)), (batch_size,), device=self.rows.device)
        *columns, rewards, terminated = self.rows[slots].split(self.widths, dim=1)
        return Batch(*columns, rewards.squeeze(1), terminated.squeeze(1))


def critic_loss(q_twins, target_q_twins, batch, next_actions, args):
    """Temporal differences of the twins as plain squared errors.

    q_twins, target_q_twins: (B, O), (B, 1, A) -> return, (2, B, 1). next_actions: (B, A).
    """
    with torch.no_grad():
        next_q = target_q_twins(batch.next_obs, next_actions.unsqueeze(1)).squeeze(-1).amin(dim=0)  # (B,)
        y = args.reward_scale * batch.rewards + args.gamma * (1 - batch.terminated) * next_q
    q = q_twins(batch.obs, batch.actions.unsqueeze(1)).squeeze(-1)  # (2, B)
    loss = (q - y).square().mean(dim=1).sum()
    return loss, {
        "losses/qf_loss": loss.detach(),
        "losses/qf_values": q.detach().mean(),
        "losses/td_error": (y - q).detach().square().mean(),
    }


def actor_loss(u_fn, batch, best_actions, uniform, eps, args):
    """The policy regressed on the straight paths from noise to the best of its own actions.

    u_fn: of N actions a state, as the network. best_actions: (B, A). uniform: (B, 2). eps: (B, A) normal.
    """
    r, t = sample_r_t(uniform, args.zero_r_ratio)
    a_t, v = linear_path(best_actions.detach(), eps, t)
    mf, ivc, dudt = mfp_loss(partial(u_fn, batch.obs), *(x.unsqueeze(1) for x in (a_t, r, t, v)), args.tangent)
    loss = mf + args.ivc_coef * ivc
    with torch.no_grad():
        info = {"losses/actor_loss": loss.mean(), "losses/mf_loss": mf.mean(), "losses/ivc_loss": ivc.mean()}
        info["velocity/norm"] = v.norm(dim=-1).mean()
        info["velocity/dudt_ratio"] = ((t - r).unsqueeze(1) * dudt).norm(dim=-1).mean() / info["velocity/norm"]
        for i in range(4):
            in_bin = ((4 * t).floor() == i).float()  # (B, 1)
            info[f"losses/actor_loss_t{i}"] = (loss * in_bin).sum() / in_bin.sum().clamp(min=1)
    return loss.mean(), info


class Agent(nn.Module):
    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device):
        super().__init__()
        self.args, self.act_dim, self.device, self.num_updates = args, act_dim, device, 0
        self.actor = MeanFlowActor(obs_dim, act_dim, args.hidden_dim, args.num_layers, args.num_frequencies).to(device)
        self.acting_actor = self.actor
        self.critic = QNetwork(2, obs_dim, act_dim, 1, args.hidden_dim, args.num_layers).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        rates = (self.actor.parameters(), args.policy_lr), (self.critic.parameters(), args.q_lr)
        groups = [{"params": p, "lr": lr} for p, lr in rates]
        self.optimizer = torch.optim.Adam(groups, fused=True)  # a step leaves alone what its loss gives no gradient
        self.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        self.q_fn = lambda obs, a: self.critic(obs, a).amin(dim=0)  # (B, N)
        mode = "reduce-overhead" if args.cuda else "default"
        compile = partial(torch.compile, mode=mode, dynamic=False) if args.compile else lambda function: function
        self.best_of_n, self.critic_loss, self.actor_loss = map(compile, (best_of_n, critic_loss, actor_loss))

    @torch.no_grad()
    def act(self, obs: torch.Tensor, explore: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Best-of-N actions (B, A) in states (B, O), with exploration noise or without, and all N candidates."""
        if self.args.compile and self.args.cuda:
            torch.compiler.cudagraph_mark_step_begin()
        noise = torch.randn(len(obs), self.args.best_of_n, self.act_dim, device=self.device)
        a, candidates = self.best_of_n(self.acting_actor, self.q_fn, obs, noise)
        if explore:
            a = (a + self.args.noise_scale * torch.randn_like(a)).clamp(-1, 1)
        return a, candidates

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Update the critics and, when it is due, the policy and the target networks; returns diagnostics."""
        args, (B, A), self.num_updates = self.args, batch.actions.shape, self.num_updates + 1
        chosen_actions, candidates = self.act(torch.cat([batch.next_obs, batch.obs]))
        next_actions, best_actions = chosen_actions.split(B)
        loss, info = self.critic_loss(self.critic, self.target_critic, batch, next_actions, args)
        self.optimizer.step(loss.backward)
        info["actions/candidate_std"] = candidates.std(dim=1, correction=0).mean()
        info["actions/saturated"] = (candidates.abs() > 0.99).float().mean()
        if self.num_updates % args.policy_frequency == 0:
            uniform, eps = torch.rand(B, 2, device=self.device), torch.randn(B, A, device=self.device)
            loss, actor_info = self.actor_loss(self.actor, batch, best_actions, uniform, eps, args)
            self.optimizer.step(loss.backward)
            with torch.no_grad():
                torch._foreach_lerp_([*self.target_critic.parameters()], [*self.critic.parameters()], args.tau)
            info |= actor_info
        return info


def evaluate(agent: Agent, seed: int, video_folder: str | None = None, num_episodes: int = 10) -> np.ndarray:
    """Undiscounted returns of seeded episodes without exploration; the training's random numbers stay as they were."""
    thunks = [partial(make_env, agent.args.env_id, None if i else video_folder) for i in range(num_episodes)]
    envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode="SameStep")
    returns, running = np.zeros(num_episodes), np.ones(num_episodes, bool)
    with torch.random.fork_rng([0] if agent.args.cuda else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        while running.any():
            actions, _ = agent.act(torch.as_tensor(obs, dtype=torch.float32).to(agent.device))
            obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
            returns, running = returns + running * rewards, running & ~(terminated | truncated)
    envs.close()
    return returns


def fail(message: str, code: int = 2):
    print("error:", *message.split(), file=sys.stderr)  # one line
    sys.exit(code)


def check_args(args: Args) -> tuple[int, int]:
    """Observation and action dimension of the environment; one line and exit code 2 where the run cannot start."""
    zero_too = "seed", "learning_starts", "gamma", "zero_r_ratio", "noise_scale", "ivc_coef"
    for name, value in vars(args).items():
        low, high = 0, 1 if name in ("gamma", "tau", "zero_r_ratio") else 2**63
        if type(value) in (int, float) and not (low < value <= high or (value == 0 and name in zero_too)):
            fail(f"--{name.replace('_', '-')} must be in {'[' if name in zero_too else '('}{low}, {high}], got {value}")
    rules = {
        "--total-timesteps must be > --learning-starts": args.total_timesteps >= args.learning_starts + args.num_envs,
        "--cuda: PyTorch finds no GPU here, use --no-cuda": torch.cuda.is_available() or not args.cuda,
        "--track needs wandb: pip install wandb": not args.track or util.find_spec("wandb"),
        "--capture-video needs moviepy: pip install moviepy": not args.capture_video or util.find_spec("moviepy"),
    }
    try:
        env = gym.make(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {})
        _ = args.capture_video and (env.reset(), env.render())
    except Exception as error:  # of an unknown id, it names the nearest
        fail(f"{error}{'; use Pusher-v5 instead' if args.env_id == 'Pusher-v4' else ''}")
    for kind, space in ("observations", env.observation_space), ("actions", env.action_space):
        flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and (kind != "actions" or space.is_bounded())
        rules[f"{args.env_id} has {kind} {space}; supported are flat continuous ones, bounded for actions"] = flat
    for rule in [rule for rule, holds in rules.items() if not holds]:
        fail(rule)
    margins = getattr(getattr(env.unwrapped, "model", None), "geom_margin", np.zeros(1))
    if margins.any() and tuple(map(int, metadata.version("mujoco").split(".")[:2])) >= (3, 5):
        print(f"warning: mujoco >= 3.5 changed the contacts of {args.env_id}; use mujoco < 3.5", file=sys.stderr)
    return env.observation_space.shape[0], env.action_space.shape[0]


if __name__ == "__main__":
    args, bad, stop = tyro.cli(Args), "", []
    checkpoint = {"progress": (0, 0, 0, math.nan, "global_step,num_updates,return_mean,return_std,wall_time_s\n", 0.0)}
    run_folder = Path("runs", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}".replace("/", "_"))
    if source := args.resume or args.evaluate:
        for path in sorted(Path(source).glob("checkpoint_*.pt"), reverse=True) or [Path(source)]:
            try:
                checkpoint = torch.load(path, "cpu", weights_only=True)  # it executes nothing, and skips the checksums
                if zipfile.ZipFile(path).testzip() or checkpoint["format"] != FORMAT:
                    raise ValueError(f"it is damaged, or not of {FORMAT}")
                break
            except Exception as error:
                bad, checkpoint = f"{bad}{path} cannot be used: {error}; ", None
        bad and fail(f"{bad}the newest good one is {checkpoint and path}")
        args, run_folder = tyro.cli(Args, default=Args(**checkpoint["args"])), path.parent
        for name in "env_id seed num_envs buffer_size hidden_dim num_layers num_frequencies policy_lr q_lr".split():
            if getattr(args, name) != checkpoint["args"][name]:
                fail(f"{path} has --{name.replace('_', '-')} {checkpoint['args'][name]}, which cannot change")
    obs_dim, act_dim = check_args(args)
    # TRY NOT TO MODIFY: seeding
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    *env_seeds, eval_seed = np.random.SeedSequence(args.seed).generate_state(args.num_envs + 1).tolist()
    agent = Agent(args, obs_dim, act_dim, device)
    rng = torch.cuda.default_generators[0] if args.cuda else torch.default_generator
    first_step, agent.num_updates, num_added, episodic_return, evaluations, seconds = checkpoint["progress"]
    agent.load_state_dict(checkpoint.get("agent", agent.state_dict()))
    agent.optimizer.load_state_dict(checkpoint.get("optimizer", agent.optimizer.state_dict()))
    if args.evaluate:
        returns = evaluate(agent, eval_seed, f"{run_folder}/videos" if args.capture_video else None, args.num_episodes)
        sys.exit(print(f"return {returns.mean():.1f} +- {returns.std():.1f}, by episode {returns.round(1).tolist()}"))
    start, steps = time.time() - seconds, range(first_step + args.num_envs, args.total_timesteps + 1, args.num_envs)
    steps or sys.exit(print(f"{run_folder} is finished at step {first_step}; --total-timesteps MORE goes on"))
    hint = f"make room or mend the path, then --resume {run_folder} where it has a checkpoint"
    sys.excepthook = lambda *e: fail(f"{e[1]}; {hint}", 1) if isinstance(e[1], OSError) else sys.__excepthook__(*e)
    run_folder.mkdir(parents=True, exist_ok=bool(first_step))
    envs = gym.vector.SyncVectorEnv(args.num_envs * [partial(make_env, args.env_id)], autoreset_mode="SameStep")
    file, num_added = (f"{run_folder}/replay_buffer.bin", num_added) if args.checkpoint_buffer else ("", 0)
    rb = ReplayBuffer(min(args.buffer_size, args.total_timesteps), obs_dim, act_dim, device, file, num_added)
    rng.set_state(checkpoint["generator"] if checkpoint.get("args", {}).get("cuda") == args.cuda else rng.get_state())
    versions = {package: metadata.version(package) for package in ("torch", "gymnasium", "mujoco", "numpy", "tyro")}
    config = {"script": FORMAT.split(",")[0], **asdict(args), "resume": None, "versions": versions}
    (run_folder / "config.json").write_text(json.dumps(config, indent=2))
    args.track and __import__("wandb").init(project="som", name=run_folder.name, config=config, sync_tensorboard=True)
    writer = SummaryWriter(run_folder, purge_step=first_step + 1)
    for number in signal.SIGINT, signal.SIGTERM:  # the run ends after its step; a second signal kills it
        signal.signal(number, lambda number, _: stop.append(number) or signal.signal(number, signal.SIG_DFL))
    # TRY NOT TO MODIFY: start the game, in new episodes where the run is resumed
    for env, state in zip(envs.envs, checkpoint.get("env_generators", ()), strict=False):
        env.unwrapped.np_random.bit_generator.state = state
    obs, _ = envs.reset(seed=None if first_step else env_seeds)
    for global_step in (progress := tqdm(steps, unit="step", unit_scale=args.num_envs, disable=None)):
        place = f"at step {global_step}, seed {args.seed}; see {run_folder}"
        # ALGO LOGIC: put action logic here
        if global_step <= args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, act_dim, device=device) - 1
        else:
            actions, _ = agent.act(torch.as_tensor(obs, dtype=torch.float32).to(device), explore=True)
        actions = actions.cpu().numpy()
        # TRY NOT TO MODIFY: execute the game and log data.
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        # TRY NOT TO MODIFY: save data to replay buffer; where an episode ended, next_obs is the next one's first
        real_next_obs = next_obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            real_next_obs[i] = infos["final_obs"][i]
            episodic_return = float(infos["final_info"]["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", infos["final_info"]["episode"]["l"][i], global_step)
        for quantity, values in ("action", actions), ("reward", rewards), ("observation", [next_obs, real_next_obs]):
            np.isfinite(values).all() or fail(f"the {quantity} is not finite {place}", code=1)
        rb.add(obs, real_next_obs, actions, rewards, terminated)
        obs = next_obs
        # ALGO LOGIC: training.
        if rb.num_added > args.learning_starts:
            for _ in range(args.updates_per_step):
                info = agent.update(rb.sample(args.batch_size))
            if agent.num_updates % (100 * args.policy_frequency) < args.updates_per_step or global_step == steps[-1]:
                scalars = {k: x.item() for k, x in info.items()} | {"charts/SPS": global_step / (time.time() - start)}
                for tag, value in scalars.items():
                    math.isfinite(value) or fail(f"{tag} is not finite {place}", code=1)
                    writer.add_scalar(tag, value, global_step)
                progress.set_postfix({k: x for k, x in scalars.items() if k.endswith("_loss")}, episode=episodic_return)
        if global_step % args.eval_frequency < args.num_envs or global_step == steps[-1]:
            returns = evaluate(agent, eval_seed, f"{run_folder}/videos/{global_step}" if args.capture_video else None)
            evaluations += f"{global_step},{agent.num_updates},{returns.mean()},{returns.std()},{time.time() - start}\n"
            (run_folder / "evaluations.csv").write_text(evaluations)
            writer.add_scalar("charts/eval_return", returns.mean(), global_step)
            tqdm.write(f"step {global_step}: evaluation return {returns.mean():.1f} +- {returns.std():.1f}")
        if stop or global_step % args.checkpoint_frequency < args.num_envs or global_step in (steps[0], steps[-1]):
            all(w.isfinite().all() for w in agent.parameters()) or fail(f"a weight is not finite {place}", code=1)
            done = global_step, agent.num_updates, rb.num_added * args.checkpoint_buffer, episodic_return, evaluations
            state = {"format": FORMAT, "args": asdict(args), "agent": agent.state_dict(), "generator": rng.get_state()}
            state |= {"optimizer": agent.optimizer.state_dict(), "progress": (*done, time.time() - start)}
            state["env_generators"] = [env.unwrapped.np_random.bit_generator.state for env in envs.envs]
            torch.save(state, data := io.BytesIO())
            (run_folder / "checkpoint.tmp").write_bytes(data.getbuffer())
            writer.flush()
            getattr(os, "sync", int)()  # the replay buffer too; Windows has no such call
            os.replace(run_folder / "checkpoint.tmp", run_folder / f"checkpoint_{global_step:010d}.pt")
            for old in sorted(run_folder.glob("checkpoint_*.pt"))[:-2]:
                old.unlink()
        stop and fail(f"stopped at step {global_step}; go on with --resume {run_folder}", code=128 + stop[0])
    networks = {"actor": agent.acting_actor.state_dict(), "critic": agent.critic.state_dict(), "config": config}
    args.save_model and torch.save(networks, run_folder / "model.pt")
