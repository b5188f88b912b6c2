"""benchmark/env_steps.py on runs of a few steps."""

import csv
import sys

import pytest

sys.path.insert(0, __file__.rpartition("/")[0])
import env_steps


def test_a_table_of_short_runs(tmp_path, monkeypatch, capsys):
    seconds = {"--no-compile": 8.0, "--compile": 4.0, "--num-seeds": 5.0}

    def fake(script, flags, total):
        slope = next((value for flag, value in seconds.items() if flag in flags), 2.0)
        return 100.0 + slope * (total - env_steps.SHORT) / 10  # the start counts in neither

    monkeypatch.setattr(env_steps, "seconds_of", fake)
    monkeypatch.setitem(env_steps.SIZES, "small", ([], 10))
    path = tmp_path / "table.csv"
    env_steps.main(env_steps.EnvStepsArgs(sizes=("small",), num_seeds=5, rounds=2, csv=path))
    with path.open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert [row["env steps/s in all"] for row in rows.values()] == ["1.2", "2.5", "5.0", "10.0"]
    assert [row["in all / JAX"] for row in rows.values()] == ["0.25", "0.5", "1.0", "2.0"]
    assert rows["JAX, 5 seeds"]["env steps/s of each agent"] == "2.0"
    assert "threads" in rows["JAX"]["hardware"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GPU 1")
    env_steps.main(env_steps.EnvStepsArgs(sizes=("small",), cuda=True))
    out = capsys.readouterr().out
    assert "hardware GPU 1  run JAX" in out and "seconds 4000.0" in out  # 2 s for 10 of the 20,000 steps


def test_time_of_a_real_run_and_of_one_that_fails():
    flags = "--env-id Pendulum-v1 --num-envs 1 --hidden-dim 8 --num-mc-samples 2 --best-of-n 2 --batch-size 8 --no-cuda"
    flags = [*flags.split(), "--no-compile"]
    assert 0 < env_steps.seconds_of("som_continuous_action.py", flags, 510)  # no limit: it is a time
    with pytest.raises(SystemExit, match=r"ended with 2.*--gamma"):
        env_steps.seconds_of("som_continuous_action.py", [*flags, "--gamma", "2"], 510)
