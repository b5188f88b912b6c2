"""SAC of Stable-Baselines3, unchanged, with the run folder and the evaluation of this repository's scripts.

python benchmark/sac.py --env-id HalfCheetah-v4

The defaults are those of --preset laptop: networks of 3 x 64 GELU (Table 3 of the paper has GELU for SAC too), the same
steps, random steps, batches, learning rate and one update per step of four environments. Everything else is the
library's: gamma 0.99, tau 0.005, rewards unscaled, a tuned temperature with target entropy -A. Evaluation, environment
and seeds are those of som_continuous_action.py, by its own functions. There is no --resume: a run is begun anew.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import som_continuous_action as som


@dataclass
class Args:
    exp_name: str = "sac"  # name of the experiment, a part of the run's folder
    seed: int = 1  # seed of networks, noise, environments and evaluation
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where to train; auto: on a GPU if there is one
    env_id: str = "HalfCheetah-v4"  # Gymnasium id: flat observations, a bounded continuous action box
    total_timesteps: int = 200_000  # environment steps, over all environments
    num_envs: int = 4  # environments stepped together
    learning_starts: int = 5_000  # environment steps with uniform random actions, before learning
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 128  # transitions in an update
    updates_per_step: int = 1  # updates per step of all environments
    learning_rate: float = 1e-3  # of policy, critics and temperature
    hidden_dim: int = 64  # width of a hidden layer
    num_layers: int = 3  # hidden layers of policy and critics
    eval_frequency: int = 20_000  # environment steps between evaluations; the last one is at the end
    num_episodes: int = 10  # episodes of an evaluation


def check_args(args):
    """The actions' box; one line and exit code 2 where the run cannot start."""
    if not args.learning_rate > 0:
        som.exit_with_error(f"--learning-rate must be > 0, got {args.learning_rate}")
    names = {field.name for field in fields(som.Args)}
    shared = {name: value for name, value in asdict(args).items() if name in names}
    som_args = som.Args(**shared, compile=False)
    som.check_args(som_args)
    _, _, box = som.env_dimensions(som_args)
    return box


def train(args, box, run_folder):
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv

    start_time = time.time()
    # SB3 gives environment i the seed + i: spread, so that seeds 1, 2 and 3 share none
    seed = int(np.random.SeedSequence(args.seed).spawn(1)[0].generate_state(1)[0] // 2)
    eval_seed = int(np.random.SeedSequence(args.seed).generate_state(1)[0])
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    model = SAC(
        "MlpPolicy",
        DummyVecEnv(args.num_envs * [partial(som.make_training_env, args.env_id)]),
        learning_rate=args.learning_rate,
        buffer_size=args.buffer_size,
        learning_starts=args.learning_starts,
        batch_size=args.batch_size,
        train_freq=1,
        gradient_steps=args.updates_per_step,
        policy_kwargs={"net_arch": args.num_layers * [args.hidden_dim], "activation_fn": torch.nn.GELU},
        seed=seed,
        device="cuda" if on_gpu else "cpu",
    )
    model.set_logger(configure(str(run_folder), ["tensorboard"]))

    def policy(obs):
        actions, _ = model.predict(obs, deterministic=True)
        return som.to_box(actions, box)

    class Evaluations(BaseCallback):
        def evaluate(self):
            returns = som.evaluate(policy, args.env_id, args.num_episodes, eval_seed)
            step = self.num_timesteps
            som.check_finite(f"at step {step}, seed {args.seed}; see {run_folder}", evaluation=returns)
            mean, std = returns.mean(), returns.std()
            row = [step, model._n_updates, mean, std, time.time() - start_time]
            with som.writing(run_folder), (run_folder / "evaluations.csv").open("a") as file:
                print(*row, sep=",", file=file)
            print(f"step {step}: evaluation return {mean:.1f} +- {std:.1f}", flush=True)

        def _on_rollout_start(self):  # after the update of the step before
            if self.num_timesteps > 0 and self.num_timesteps % args.eval_frequency < args.num_envs:
                self.evaluate()

        def _on_training_end(self):
            self.evaluate()

        def _on_step(self):
            return True

    model.learn(args.total_timesteps - args.total_timesteps % args.num_envs, callback=Evaluations())
    model.get_env().close()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    box = check_args(args)
    try:
        packages = ("stable-baselines3", "torch", "gymnasium", "mujoco", "numpy")
        versions = {package: metadata.version(package) for package in packages}
    except metadata.PackageNotFoundError as error:
        som.exit_with_error(f"{error.name} is missing: pip install -r benchmark/requirements.txt")
    versions["python"] = sys.version.split()[0]
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}_{os.getpid()}"
    run_folder = Path("runs", name.replace("/", "_"))
    config = {"script": "sac.py", **asdict(args), "versions": versions}
    with som.writing(run_folder):
        run_folder.mkdir(parents=True)
        (run_folder / "config.json").write_text(json.dumps(config, indent=2))
        header = "global_step,num_updates,return_mean,return_std,wall_time_s\n"
        (run_folder / "evaluations.csv").write_text(header)
    train(args, box, run_folder)
