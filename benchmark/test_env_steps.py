"""benchmark/env_steps.py on runs of a few steps."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import env_steps


def test_a_table_of_short_runs(tmp_path, monkeypatch, capsys):
    seconds = {"--no-compile": 8.0, "--compile": 4.0, "--num-seeds": 5.0}

    def fake(script, flags, total):
        slope = next((value for flag, value in seconds.items() if flag in flags), 2.0)
        return 100.0 + slope * (total - env_steps.SHORT) / 10  # the start counts in neither

    monkeypatch.setattr(env_steps, "seconds_of", fake)
    monkeypatch.setitem(env_steps.SIZES, "small", ([], 10))
    path = tmp_path / "table.csv"
    args = {"sizes": ("small",), "num_seeds": 5, "rounds": 2}
    env_steps.main(env_steps.EnvStepsArgs(**args, device="cpu", csv=path))
    with path.open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert [row["env steps/s in all"] for row in rows.values()] == ["1.2", "2.5", "5.0", "10.0"]
    assert [row["in all / JAX"] for row in rows.values()] == ["0.25", "0.5", "1.0", "2.0"]
    assert rows["JAX, 5 seeds"]["env steps/s of each agent"] == "2.0"
    assert "threads" in rows["JAX"]["hardware"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GPU 1")
    env_steps.main(env_steps.EnvStepsArgs(sizes=("small",)))
    out = capsys.readouterr().out
    assert "hardware GPU 1  run JAX" in out and "seconds 4000.0" in out  # 2 s for 10 of the 20,000 steps


def test_the_scripts_accept_what_they_are_given(monkeypatch):
    """The flags of both sizes, without a run."""
    import som_continuous_action as som_torch
    import som_continuous_action_jax as som_jax

    given = []
    monkeypatch.setattr(env_steps, "seconds_of", lambda *call: given.append(call) or 1.0 + len(given) ** 2)
    env_steps.main(env_steps.EnvStepsArgs(device="cpu"))
    scripts = {"som_continuous_action.py": som_torch, "som_continuous_action_jax.py": som_jax}
    for name, flags, _ in given:
        script = scripts[name]
        args = env_steps.tyro.cli(script.Args, args=flags)
        assert args.learning_starts < env_steps.SHORT and args.device == "cpu"
    assert {"--preset", "--num-seeds", "--compile", "--no-compile"} < {flag for _, flags, _ in given for flag in flags}


def test_time_of_a_real_run_and_of_one_that_fails():
    flags = "--env-id Pendulum-v1 --num-envs 1 --learning-starts 500 --hidden-dim 8 --num-mc-samples 2 --best-of-n 2"
    flags = f"{flags} --batch-size 8 --device cpu --no-compile".split()
    assert 0 < env_steps.seconds_of("som_continuous_action.py", flags, 510)  # no limit: it is a time
    with pytest.raises(SystemExit, match=r"ended with 2.*--gamma"):
        env_steps.seconds_of("som_continuous_action.py", [*flags, "--gamma", "2"], 510)


def test_a_missing_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        env_steps.main(env_steps.EnvStepsArgs(device="gpu"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --device gpu: PyTorch finds no GPU\n"
