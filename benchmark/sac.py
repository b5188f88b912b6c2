"""SAC of Stable-Baselines3, unchanged, with the run folder and the evaluation of this repository's scripts.

python benchmark/sac.py --env-id HalfCheetah-v4 --total-timesteps 160000

The defaults are the README's small setting: networks of 3 x 64 GELU (Table 3 of the paper has GELU for SAC too), the
same random steps, batches, learning rate and one update per step of four environments. Everything else is the
library's: gamma 0.99, tau 0.005, rewards unscaled, a tuned temperature with target entropy -A. Evaluation, environment
and seeds are those of som_continuous_action.py, by its own functions. There is no --resume: an hour is begun anew.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import som_continuous_action as som


@dataclasses.dataclass
class Args:
    exp_name: str = "sac"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    cuda: bool = torch.cuda.is_available()  # train on the GPU (default: where there is one)
    env_id: str = "HalfCheetah-v4"  # Gymnasium id: flat observations, a bounded continuous action box
    total_timesteps: int = 160_000  # environment steps, over all environments
    num_envs: int = 4  # environments stepped together
    learning_starts: int = 5_000  # environment steps with uniform random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 128  # transitions in an update
    updates_per_step: int = 1  # updates per step of all environments
    learning_rate: float = 1e-3  # of policy, critics and temperature
    hidden_dim: int = 64  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    eval_frequency: int = 40_000  # environment steps between evaluations; the last one is at the end
    num_episodes: int = 10  # episodes of an evaluation


def check_args(args: Args) -> None:
    """One line and exit code 2 where the run cannot start."""
    if not args.learning_rate > 0:
        som.fail(f"--learning-rate must be > 0, got {args.learning_rate}")
    if not args.num_episodes > 0:
        som.fail(f"--num-episodes must be > 0, got {args.num_episodes}")
    shared = [field.name for field in dataclasses.fields(som.Args) if hasattr(args, field.name)]
    som.check_args(som.Args(**{name: getattr(args, name) for name in shared}, compile=False))


def train(args: Args, run_folder: pathlib.Path) -> None:
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv

    start = time.time()
    # SB3 gives environment i the seed + i: spread, so that seeds 1, 2 and 3 share none
    seed = int(np.random.SeedSequence(args.seed).spawn(1)[0].generate_state(1)[0] // 2)
    *_, eval_seed = np.random.SeedSequence(args.seed).generate_state(args.num_envs + 1).tolist()
    model = SAC(
        "MlpPolicy",
        # without ClipAction, the outermost wrapper: its action space is unbounded, SB3's actions never leave [-1, 1]
        DummyVecEnv(args.num_envs * [lambda: som.make_env(args.env_id).env]),
        learning_rate=args.learning_rate,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        train_freq=1,
        gradient_steps=args.updates_per_step,
        policy_kwargs={"net_arch": args.num_layers * [args.hidden_dim], "activation_fn": torch.nn.GELU},
        seed=seed,
        device="cuda" if args.cuda else "cpu",
    )
    model.set_logger(configure(str(run_folder), ["tensorboard"]))

    def act(obs):
        return torch.as_tensor(model.predict(obs.numpy(), deterministic=True)[0]), None

    class Evaluations(BaseCallback):
        def evaluate(self):
            agent = SimpleNamespace(args=args, act=act, device=torch.device("cpu"))  # SB3 moves observations by itself
            returns = som.evaluate(agent, eval_seed)
            row = self.num_timesteps, model._n_updates, returns.mean(), returns.std(), time.time() - start
            with (run_folder / "evaluations.csv").open("a") as file:
                print(*row, sep=",", file=file)
            print(f"step {row[0]}: evaluation return {row[2]:.1f} +- {row[3]:.1f}", flush=True)

        def _on_rollout_start(self):  # after the update of the step before
            if self.num_timesteps and self.num_timesteps % args.eval_frequency < args.num_envs:
                self.evaluate()

        def _on_training_end(self):
            self.evaluate()

        def _on_step(self):
            return True

    model.learn(args.total_timesteps - args.total_timesteps % args.num_envs, callback=Evaluations())


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    try:
        packages = ("stable-baselines3", "torch", "gymnasium", "mujoco", "numpy")
        versions = {package: metadata.version(package) for package in packages}
    except metadata.PackageNotFoundError as error:
        som.fail(f"{error.name} is missing: pip install -r benchmark/requirements.txt")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}_{os.getpid()}".replace("/", "_")
    run_folder = pathlib.Path("runs", name)
    run_folder.mkdir(parents=True)
    config = {"script": "sac.py"} | dataclasses.asdict(args)
    config["versions"] = versions | {"python": sys.version.split()[0]}
    (run_folder / "config.json").write_text(json.dumps(config, indent=2))
    (run_folder / "evaluations.csv").write_text("global_step,num_updates,return_mean,return_std,wall_time_s\n")
    train(args, run_folder)
