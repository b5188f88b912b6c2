"""A short film of trained policies, side by side, as a GIF.

    MUJOCO_GL=egl python benchmark/film.py --runs runs/RUN1 runs/RUN2 --gif film.gif

Each run's newest policy plays one episode without exploration noise, from the beginning and in real time; a shorter
one is followed by the next. The whole returns of the episodes are printed. Without a display set MUJOCO_GL=egl, or
osmesa.
"""

import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import collect


@dataclass
class FilmArgs:
    runs: tuple[Path, ...]
    """run folders with checkpoints"""
    gif: Path
    """file to write"""
    seconds: float = 4.0
    """length of the film"""
    fps: int = 20
    """frames in a second"""
    size: int = 240
    """pixels of a frame's side"""
    seed: int = 0
    """seed of the first episode's start"""


def read_script(run):
    """The script of a run, as a module, and the run's environment."""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        collect.exit_with_error(f"{run} is not the folder of a run: {error}")
    if not (collect.ROOT / config["script"]).is_file():
        collect.exit_with_error(f"{run} is of {config['script']}, which is not in {collect.ROOT}")
    return importlib.import_module(Path(config["script"]).stem), config["env_id"]


def play(policy, env, seconds, fps, seed):
    """Frames (T, height, width, 3) of episodes, one every 1 / fps seconds, and the returns of whole episodes."""
    step_seconds = getattr(env.unwrapped, "dt", 1 / fps)
    num_frames = round(seconds * fps)
    frames = []
    returns = []
    num_steps = 0
    # the last episode goes on to its end for the sake of its return
    while len(frames) < num_frames:
        obs, _ = env.reset(seed=seed + len(returns))
        total = 0.0
        over = False
        while not over:
            due = math.floor(round(num_steps * step_seconds * fps, 6)) + 1
            while len(frames) < min(due, num_frames):
                frames.append(env.render())
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            total += reward
            num_steps += 1
            over = terminated or truncated
        returns.append(total)
    return np.stack(frames), returns


def write_gif(path, frames, fps):
    """All frames (T, height, width, 3) with one palette of 64 colours, which keeps what does not move equal."""
    sample = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 8)]))
    palette = sample.quantize(64)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, optimize=True)


def main(args):
    if not (args.runs and args.seconds * args.fps >= 1 and args.size >= 1):
        collect.exit_with_error("--runs needs at least one value; --seconds, --fps and --size at least one frame")
    films = []
    for run in args.runs:
        script, env_id = read_script(run)
        try:
            policy = script.load_policy(run)
        except ValueError as error:
            collect.exit_with_error(str(error))
        view = {}
        if "mujoco" in str(gym.spec(env_id).entry_point):
            view = {"width": args.size, "height": args.size, "camera_name": "track"}  # it follows the body
        env = gym.make(env_id, render_mode="rgb_array", **view)
        try:
            frames, returns = play(policy, env, args.seconds, args.fps, args.seed)
        except Exception as error:
            collect.exit_with_error(f"{env_id} cannot be drawn: {error}; without a display set MUJOCO_GL=egl")
        env.close()
        films.append(frames)
        print(f"{env_id}: return {', '.join(f'{x:,.0f}' for x in returns)}")
    heights = {frames.shape[1] for frames in films}
    if len(heights) > 1:
        collect.exit_with_error("these environments draw frames of different heights; make a film of each")
    write_gif(args.gif, np.concatenate(films, axis=2), args.fps)
    print(f"{args.gif}: {args.gif.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(FilmArgs, description=__doc__))
