"""SAC and PPO of Stable-Baselines3, unchanged, with the run folder and the evaluation of this repository's scripts.

python benchmark/sb3.py --env-id HalfCheetah-v4
python benchmark/sb3.py --algo ppo --env-id HalfCheetah-v4

The defaults are the sizes of --preset laptop: networks of 3 x 64 GELU (Table 3 of the paper has GELU for both), its
number of steps and environments.

SAC: random steps, batches, learning rate and one update per step of four environments are those of the preset too.
Everything else is the library's: gamma 0.99, tau 0.005, rewards unscaled, a tuned temperature with target entropy -A.

PPO: Tables 3 and 4 have 4,000 steps a batch, taken whole, at most 80 updates on each, gamma 0.995, GAE lambda 0.95,
clipping at 0.2, target KL 0.01, rewards unscaled, learning rates 1e-4 of the policy and 1e-3 of the value function. The
tables count 80 of either; the library has one loss for both, and a KL above 1.5 times the target ends the updates of
both. Where the tables are silent its defaults hold: advantages normalised in a batch, no entropy bonus, gradient norm
at most 0.5, weight 0.5 of the value's loss, orthogonal weights, one std for all states. The paper's networks are
3 x 512: --hidden-dim 512.

Environment and evaluation are those of som_continuous_action.py, by its own functions. There is no --resume: a run is
begun anew. At its end the networks are kept in its folder, and can be evaluated again; the episodes begin with those of
the last evaluation:

python benchmark/sb3.py --evaluate runs/RUN --num-episodes 100
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import som_continuous_action as som

VALUE_RATE = 10  # times the policy's learning rate: that of PPO's value function (Table 3: 1e-3 and 1e-4)


@dataclass
class Args:
    exp_name: str = "sac"  # name of the experiment, a part of the run's folder (default: the algorithm's)
    algo: Literal["sac", "ppo"] = "sac"  # the algorithm
    seed: int = 1  # seed of networks, noise, environments and evaluation
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to train; auto: on a GPU if there is one
    evaluate: str | None = None  # folder of a finished run, to evaluate
    env_id: str = "HalfCheetah-v4"  # Gymnasium id: flat observations, a bounded continuous action box
    total_timesteps: int = 200_000  # environment steps, over all environments
    num_envs: int = 4  # environments stepped together
    learning_starts: int = 5_000  # SAC: environment steps with uniform random actions, before learning
    buffer_size: int = 1_000_000  # SAC: transitions in the replay buffer
    batch_size: int = 128  # transitions in an update; PPO: steps between its updates, all of them in each
    updates_per_step: int = 1  # SAC: updates per step of all environments
    learning_rate: float = 1e-3  # of policy, critics and temperature; PPO: of the policy, the value's is ten times it
    hidden_dim: int = 64  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    eval_frequency: int = 20_000  # environment steps between evaluations; the last one is at the end
    num_episodes: int = 10  # episodes of an evaluation


# what --algo ppo changes; it has no use for those that are 0
PPO = {"exp_name": "ppo", "batch_size": 4_000, "learning_rate": 1e-4}
PPO |= {"learning_starts": 0, "buffer_size": 0, "updates_per_step": 0}
POLICY = "policy.pt"  # the networks of a finished run, in its folder, as the library writes them


def check_args(args):
    """The actions' box; one line and exit code 2 where the run cannot start."""
    if not args.learning_rate > 0:
        som.exit_with_error(f"--learning-rate must be > 0, got {args.learning_rate}")
    names = {field.name for field in fields(som.Args)}
    shared = {name: value for name, value in asdict(args).items() if name in names}
    if args.algo == "ppo":
        for name in ("learning_starts", "buffer_size", "updates_per_step"):
            if shared.pop(name) != 0:
                som.exit_with_error(f"--{name.replace('_', '-')} is of --algo sac alone")
        shared["learning_starts"] = 0
    som_args = som.Args(**shared, compile=False)
    som.check_args(som_args)
    if args.algo == "ppo":
        if args.batch_size % args.num_envs != 0 or args.batch_size == 1:
            som.exit_with_error("--batch-size must be a multiple of --num-envs, and more than 1, with --algo ppo")
        if args.total_timesteps % args.batch_size != 0:
            som.exit_with_error("--total-timesteps must be a multiple of --batch-size with --algo ppo")
    _, _, box = som.env_dimensions(som_args)
    return box


def make_sac(shared, args):
    """The model, and the optimizer whose steps count as updates."""
    from stable_baselines3 import SAC

    model = SAC(
        "MlpPolicy",
        learning_rate=args.learning_rate,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        train_freq=1,
        gradient_steps=args.updates_per_step,
        **shared,
    )
    return model, model.critic.optimizer


def make_ppo(shared, args):
    """The model, and the optimizer whose steps count as updates."""
    from stable_baselines3 import PPO

    model = PPO(
        "MlpPolicy",
        learning_rate=args.learning_rate,
        n_steps=args.batch_size // args.num_envs,
        batch_size=args.batch_size,
        n_epochs=80,
        gamma=0.995,
        gae_lambda=0.95,
        clip_range=0.2,
        target_kl=0.01,
        **shared,
    )
    # the library sets one rate in all groups of its optimizer: the value's is set again before each step
    optimizer = model.policy.optimizer
    of_value = [*model.policy.mlp_extractor.value_net.parameters(), *model.policy.value_net.parameters()]
    of_policy = [x for x in model.policy.parameters() if all(x is not y for y in of_value)]
    optimizer.param_groups[0]["params"] = of_policy
    optimizer.add_param_group({"params": of_value})

    def set_value_rate(optimizer, args, kwargs):
        policy_group, value_group = optimizer.param_groups
        value_group["lr"] = VALUE_RATE * policy_group["lr"]

    optimizer.register_step_pre_hook(set_value_rate)
    return model, optimizer


def make_training_env(env_id):
    """The environment with actions in [-1, 1]^A."""
    env = som.make_env(env_id)
    box = env.action_space
    unit_box = gym.spaces.Box(-1, 1, box.shape)
    return gym.wrappers.TransformAction(env, partial(som.to_box, box=box), unit_box)


def device_of(args):
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def evaluate(policy, args, box):
    """Returns (num_episodes,) of the library's policy in seeded episodes: each action is the mean of its normal."""

    def act(obs):
        actions, _ = policy.predict(obs, deterministic=True)
        return som.to_box(actions, box)

    eval_seed = int(np.random.SeedSequence(args.seed).generate_state(1)[0])
    return som.evaluate(act, args.env_id, args.num_episodes, eval_seed)


def train(args, box, run_folder):
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv

    start_time = time.time()
    # SB3 gives environment i the seed + i: spread, so that seeds 1, 2 and 3 share none
    seed = int(np.random.SeedSequence(args.seed).spawn(1)[0].generate_state(1)[0] // 2)
    shared = {
        "env": DummyVecEnv(args.num_envs * [partial(make_training_env, args.env_id)]),
        "policy_kwargs": {"net_arch": args.num_layers * [args.hidden_dim], "activation_fn": torch.nn.GELU},
        "seed": seed,
        "device": device_of(args),
    }
    if args.algo == "sac":
        model, optimizer = make_sac(shared, args)
        steps_per_rollout = args.num_envs
    else:
        model, optimizer = make_ppo(shared, args)
        steps_per_rollout = args.batch_size
    model.set_logger(configure(str(run_folder), ["tensorboard"]))

    class Evaluations(BaseCallback):
        def write_evaluation(self):
            returns = evaluate(model.policy, args, box)
            step = self.num_timesteps
            som.check_finite(f"at step {step}, seed {args.seed}; see {run_folder}", evaluation=returns)
            mean, std = returns.mean(), returns.std()
            # PPO's own count has the updates too that the KL stopped
            num_updates = max([int(state["step"]) for state in optimizer.state.values()], default=0)
            row = [step, num_updates, mean, std, time.time() - start_time]
            with som.writing(run_folder), (run_folder / "evaluations.csv").open("a") as file:
                print(*row, sep=",", file=file)
            print(f"step {step}: evaluation return {mean:.1f} +- {std:.1f}", flush=True)

        def _on_rollout_start(self):  # after the updates on the rollout before
            if self.num_timesteps > 0 and self.num_timesteps % args.eval_frequency < steps_per_rollout:
                self.write_evaluation()

        def _on_training_end(self):
            self.write_evaluation()

        def _on_step(self):
            return True

    model.learn(args.total_timesteps - args.total_timesteps % args.num_envs, callback=Evaluations())
    with som.writing(run_folder):
        model.policy.save(run_folder / POLICY)
    model.get_env().close()


def args_of_run(run_folder):
    """The arguments that a finished run was begun with."""
    try:
        config = json.loads((run_folder / "config.json").read_text())
        script = config["script"]
        stored = {field.name: config[field.name] for field in fields(Args) if field.name in config}
    except (OSError, ValueError, KeyError, TypeError) as error:
        som.exit_with_error(f"{run_folder} is not the folder of a run: {error}")
    if script != Path(__file__).name:
        som.exit_with_error(f"{run_folder} is of {script}, and this is {Path(__file__).name}")
    if not (run_folder / POLICY).exists():
        som.exit_with_error(f"{run_folder} has no {POLICY}: a run writes it at its end")
    return Args(**stored)


def load_policy(args):
    """The library's policy, from the folder args.evaluate. Its file can run code: only of runs that you trust."""
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.sac.policies import SACPolicy

    kinds = {"sac": SACPolicy, "ppo": ActorCriticPolicy}
    path = Path(args.evaluate, POLICY)
    try:
        return kinds[args.algo].load(path, device=device_of(args))
    except Exception as error:  # torch and pickle have many, for a file that was cut off or is another's
        first_sentence = str(error).partition(". ")[0]
        som.exit_with_error(f"{path} cannot be read: {first_sentence}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.algo == "ppo":
        args = tyro.cli(Args, description=__doc__, default=Args(algo="ppo", **PPO))
    if args.evaluate is not None:
        trained = args_of_run(Path(args.evaluate))
        args = tyro.cli(Args, description=__doc__, default=trained)
        kept = replace(args, evaluate=None, num_episodes=trained.num_episodes, device=trained.device)
        if kept != trained:
            som.exit_with_error("--evaluate takes --num-episodes and --device alone")
    box = check_args(args)
    try:
        packages = ("stable-baselines3", "torch", "gymnasium", "mujoco", "numpy")
        versions = {package: metadata.version(package) for package in packages}
    except metadata.PackageNotFoundError as error:
        som.exit_with_error(f"{error.name} is missing: pip install -r benchmark/requirements.txt")
    if args.evaluate is not None:
        returns = evaluate(load_policy(args), args, box)
        mean, std = returns.mean(), returns.std()
        print(f"return {mean:.1f} +- {std:.1f}, seed {args.seed}, by episode {returns.round(1).tolist()}")
        sys.exit()
    versions["python"] = sys.version.split()[0]
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}_{os.getpid()}"
    run_folder = Path("runs", name.replace("/", "_"))
    config = {"script": Path(__file__).name, **asdict(args), "versions": versions}
    with som.writing(run_folder):
        run_folder.mkdir(parents=True)
        (run_folder / "config.json").write_text(json.dumps(config, indent=2))
        header = "global_step,num_updates,return_mean,return_std,wall_time_s\n"
        (run_folder / "evaluations.csv").write_text(header)
    train(args, box, run_folder)
