"""The table of where the paper's field ends: a row from ends made by hand, and the field itself."""

import beta_on_bandit


def test_a_row_of_ends_made_by_hand():
    row = beta_on_bandit.row_of(10.0, 1.0, beta_on_bandit.CENTRES[[0, 2, 4, 4, 1]])
    assert (row["high_modes"], row["smallest_high_mode"], row["low_modes"]) == (0.8, 0.0, 0.2)
    assert row["reach"] == 2.75  # w / 2 times the integral of beta
    assert row["mean_reward"] > 0.85


def test_the_ends_lie_on_the_modes_and_not_with_the_usual_beta():
    args = beta_on_bandit.SweepArgs(csv=None, num_samples=200, num_mc_samples=64, num_steps=40)
    shares = {}
    for w, beta_max in ((None, None), (25.0, 1.0), (25.0, 20.0)):
        row = beta_on_bandit.row_of(w, beta_max, beta_on_bandit.end_points(args, w, beta_max))
        shares[beta_max] = row["high_modes"] + row["low_modes"]
    assert shares[None] > 0.8 and shares[1.0] > 0.8 and shares[20.0] < 0.1
