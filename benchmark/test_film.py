"""benchmark/film.py on an environment that draws its own clock."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import film


class Clock(gym.Env):
    """Ends after five steps; a frame shows the steps and the seed."""

    dt = 0.1
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.begin = seed
        self.steps = 0
        return np.zeros(1), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps), float(action), self.steps == 5, False, {}

    def render(self):
        frame = np.zeros((8, 8, 3), np.uint8)
        frame[..., 0] = 20 * self.steps
        frame[..., 1] = 100 * self.begin
        return frame


def policy(obs):
    return 1 + obs[0]


def test_frames_come_in_real_time_and_returns_are_of_whole_episodes():
    frames, returns = film.play(policy, Clock(), seconds=0.8, fps=5, seed=1)
    assert frames[:, 0, 0, 0].tolist() == [0, 40, 80, 20]  # after 0, 2, 4 and 6 steps, the last of a new episode
    assert frames[:, 0, 0, 1].tolist() == [100, 100, 100, 200]
    assert returns == [15, 15]


def test_more_frames_than_steps():
    frames, _ = film.play(policy, Clock(), seconds=0.4, fps=20, seed=0)
    assert frames[:, 0, 0, 0].tolist() == [0, 20, 20, 40, 40, 60, 60, 80]


def test_the_gif_has_the_frames(tmp_path):
    frames, _ = film.play(policy, Clock(), seconds=0.5, fps=10, seed=1)
    film.write_gif(tmp_path / "film.gif", frames, fps=10)
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 5 and image.size == (8, 8) and image.info["duration"] == 100
        for i in range(5):
            image.seek(i)
            assert np.asarray(image.convert("RGB"))[4, 4].tolist() == frames[i, 4, 4].tolist()


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        film.main(film.FilmArgs(runs=(tmp_path,), gif=tmp_path / "film.gif"))
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
