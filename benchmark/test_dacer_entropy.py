"""DACER's entropy estimate against scikit-learn, which only benchmark/requirements.txt brings."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

sys.path.insert(0, str(Path(__file__).parents[1] / "baselines"))
import dacer_continuous_action as dacer


def points(kind, A, n=200, seed=0):
    """Points (n, A) of one state."""
    rng = np.random.default_rng(seed)
    if kind == "modes":
        centres = rng.uniform(-0.8, 0.8, (3, A))
        return centres[rng.integers(3, size=n)] + 0.1 * rng.standard_normal((n, A))
    if kind == "one":
        return 0.3 * rng.standard_normal((n, A))
    return np.clip(rng.standard_normal((n, A)), -1, 1)  # many of them on the faces of the box


@pytest.mark.parametrize("kind", ["modes", "one", "clipped"])
@pytest.mark.parametrize("A", [1, 2, 6])
def test_em_is_that_of_scikit_learn_from_the_same_start(kind, A):
    x = torch.from_numpy(points(kind, A)).unsqueeze(0)
    torch.manual_seed(1)
    resp = dacer.k_means(x, 3)
    weights, means, cholesky = dacer.maximization(x, resp)
    covariances = cholesky @ cholesky.mT
    start = {
        "weights_init": weights[0] / weights.sum(),
        "means_init": means[0],
        "precisions_init": torch.linalg.inv(covariances)[0],
    }
    model = GaussianMixture(3, tol=1e-3, reg_covar=1e-6, max_iter=100, **{k: v.numpy() for k, v in start.items()})
    model.fit(x[0].numpy())
    weights, means, cholesky = dacer.fit_gmm(x, resp)
    assert model.n_iter_ > 1
    np.testing.assert_allclose(weights[0], model.weights_, rtol=1e-6)
    np.testing.assert_allclose(means[0], model.means_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose((cholesky @ cholesky.mT)[0], model.covariances_, rtol=1e-6, atol=1e-8)

    entropy = 0.0  # as DACER's code has it
    for weight, covariance in zip(model.weights_, model.covariances_, strict=True):
        _, log_det = np.linalg.slogdet(covariance)
        entropy += weight * (-np.log(weight) + 0.5 * A * (1 + np.log(2 * np.pi)) + 0.5 * log_det)
    torch.manual_seed(1)
    assert dacer.gmm_entropy(x, 3).item() == pytest.approx(entropy, rel=1e-6)
