"""benchmark/field_error.py: its quadrature, and that the errors fall with the number of samples."""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import field_error

import som_continuous_action as som


def test_quadrature_of_the_prior_is_that_of_a_gaussian(monkeypatch):
    """Q = -2 a^2 beside N(0, 1): p_0 is N(0, 1 / (1 + 4 alpha)), its noised score is known."""
    monkeypatch.setattr(field_error, "q_of_coordinate", lambda a: -2 * a.square())
    t = torch.full((5, 1), 0.3, dtype=torch.float64)
    mu, sigma, f, g2 = som.cosine_schedule(t)
    a_t = torch.linspace(-0.5, 0.5, 10, dtype=torch.float64).reshape(5, 2)
    alpha = 20.0  # narrow: the clip of Q at the box changes nothing
    v = field_error.true_velocity("prior", a_t, mu, sigma, f, g2, alpha)
    score = -a_t / (mu**2 / (1 + 4 * alpha) + sigma**2)
    torch.testing.assert_close(v, som.pf_ode_velocity(a_t, score, f, g2), atol=1e-5, rtol=1e-5)


def test_errors_without_bias_fall_with_the_number_of_samples(tmp_path):
    path = tmp_path / "error.csv"
    sizes = {"num_states": 50, "num_mc_samples": (16, 4096), "alphas": (1.0,), "times": (0.1, 0.6), "act_dim": 2}
    field_error.main(field_error.ErrorArgs(path, **sizes))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 2
    assert torch.get_default_dtype() == torch.float32
    errors = {}
    for row in rows:
        key = tuple(row[name] for name in ("reference", "estimate", "noise"))
        errors.setdefault(key, []).append([float(row["t = 0.1"]), float(row["t = 0.6"])])
    for (_, estimate, _), (few, many) in errors.items():
        if estimate in ("weighted mean", "gradient of log sum exp"):  # consistent: no bias is left
            assert many[0] < 0.4 * few[0] and many[1] < 0.4 * few[1]
