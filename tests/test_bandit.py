"""train/bandit.py and train/three_arms.py: rest points, draws and methods by hand, and a short run."""

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")

from train import bandit, three_arms

# Worked out apart from this library, from the paper's equations.
KNOWN = {
    "CoPG": ((0.705385, 0.259496, 0.035119), 0.0),
    "IPO": ((0.4242, 0.3527, 0.2231), 0.1525),
    "policy gradient, value baseline": ((0.8115, 0.1675, 0.0209), 0.0148),
    "policy gradient, no baseline": ((0.1940, 0.2501, 0.5559), 0.6378),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_objective_and_optimum():
    assert three_arms.optimum().tolist() == pytest.approx(KNOWN["CoPG"][0], abs=1e-6)
    assert three_arms.objective(three_arms.optimum()).item() == pytest.approx(2.125200, abs=1e-6)
    assert three_arms.objective(three_arms.REFERENCE).item() == pytest.approx(11 / 6)
    assert three_arms.regret(three_arms.REFERENCE).item() == pytest.approx(0.291867, abs=1e-6)


@pytest.mark.parametrize("name", KNOWN)
def test_rest_points(name):
    policy, regret = KNOWN[name]
    reached = three_arms.rest_point(bandit.METHODS[name])
    assert reached.tolist() == pytest.approx(policy, abs=6e-5)
    assert three_arms.regret(reached).item() == pytest.approx(regret, abs=6e-5)


def test_ipo_rest_point_solves_its_normal_equations():
    """E (h_y - h_y' - (2 p - 1) / (2 beta))^2 is quadratic in the log-ratios h, up to a constant."""
    squares, targets = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for y in range(3):
        for other in range(3):
            difference = torch.zeros(3, dtype=torch.float64)
            difference[y] += 1
            difference[other] -= 1
            weight = (three_arms.MU[0, y] * three_arms.MU[1, other]).item()
            preferred = 1 / (1 + math.exp(-(three_arms.REWARDS[y] - three_arms.REWARDS[other]).item()))
            squares += weight * torch.outer(difference, difference)
            targets += weight * (2 * preferred - 1) / (2 * three_arms.BETA) * difference
    expected = (torch.linalg.pinv(squares) @ targets).softmax(0)
    torch.testing.assert_close(three_arms.rest_point(bandit.ipo), expected, rtol=0, atol=1e-8)


def test_population_is_a_distribution():
    pairs, probability = three_arms.population()
    assert probability.sum().item() == pytest.approx(1)
    rows = pairs.arms[:, 0].tolist()
    first_is_best = sum(p for p, (y, _) in zip(probability.tolist(), rows, strict=True) if y == 0)
    assert first_is_best == pytest.approx(0.1)
    arm_0_over_2 = [rows.index([0, 2]), len(rows) - 1 - rows[::-1].index([0, 2])]
    ratio = probability[arm_0_over_2[0]] / probability[arm_0_over_2[1]]
    assert pairs.first_preferred[:, 0][arm_0_over_2].tolist() == [True, False]
    assert ratio.item() == pytest.approx(math.exp(1.5))


def test_draws_follow_their_distributions():
    pairs = three_arms.draw_pairs([torch.Generator().manual_seed(seed) for seed in range(4)])
    assert pairs.arms.shape == (4, 10_000, 2)
    for member in (0, 1):
        drawn = torch.bincount(pairs.arms[..., member].flatten(), minlength=3) / 40_000
        assert drawn.tolist() == pytest.approx(three_arms.MU[member].tolist(), abs=0.01)
    best_first = (pairs.arms[..., 0] == 0) & (pairs.arms[..., 1] == 2)
    share = pairs.first_preferred[best_first].double().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.03)
    assert not torch.equal(pairs.arms[0], pairs.arms[1])


def test_an_epoch_sees_every_pair_once():
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    data = three_arms.draw_pairs(generators)
    batches = three_arms.shuffled_batches(data, generators)
    assert [batch.arms.shape[1] for batch in batches] == [512] * 19 + [272]
    seen = torch.cat([batch.arms for batch in batches], 1)
    assert not torch.equal(seen, data.arms)
    for run in (0, 1):
        counts = [torch.bincount((arms[run] @ torch.tensor([3, 1])), minlength=9) for arms in (seen, data.arms)]
        assert torch.equal(*counts)


def test_every_run_has_the_gradient_of_its_own_mean_loss():
    """By hand for the paper's gradient with the value baseline: -(R - beta log(pi / pi_ref) - E_pi R) over 2 B."""
    logps = torch.randn(2, 3, dtype=torch.float64).log_softmax(-1).requires_grad_()
    arms = torch.tensor([[[0, 2], [1, 1]], [[2, 2], [0, 1]]])
    loss = bandit.value_baseline(logps, three_arms.Pairs(arms, torch.ones(2, 2, dtype=torch.bool)))
    (slopes,) = torch.autograd.grad(loss, logps)
    expected = [[0.0] * 3, [0.0] * 3]
    for run, drawn in enumerate(arms.flatten(1).tolist()):
        arm_logps = logps[run].tolist()
        value = sum(math.exp(arm_logps[y]) * three_arms.REWARDS[y].item() for y in range(3))
        for y in drawn:
            regularized = three_arms.REWARDS[y].item() - 0.5 * (arm_logps[y] + math.log(3))
            expected[run][y] -= (regularized - value) / len(drawn)
    assert slopes.flatten().tolist() == pytest.approx(sum(expected, []))


def test_a_short_run(tmp_path, capsys):
    """Eight epochs are enough for the network, whose last regrets are all where the rest points are."""
    arguments = ["--seeds", "3", "--epochs", "8", "--bare-epochs", "1", "--out", str(tmp_path / "out")]
    status = bandit.main(arguments)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["regret.png", "results.json"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"date", "command", "commit", "source_sha256", "versions"} <= results["provenance"].keys()
    for policy, epochs in (("network", 8), ("bare logits", 1)):
        for name, curve in results["regret"][policy].items():
            assert len(curve["mean"]) == len(curve["sd"]) == epochs + 1 and len(curve["final"]) == 3
            assert curve["mean"][0] == pytest.approx(0.291867, abs=1e-6) and curve["sd"][0] < 1e-6
            assert name in printed
    final = {name: curve["mean"][-1] for name, curve in results["regret"]["network"].items()}
    assert final["CoPG"] < 1e-3
    for name, (_, regret) in KNOWN.items():
        assert final[name] == pytest.approx(regret, abs=0.03)
    assert status == (1 if bandit.missed(final, {name: known[1] for name, known in KNOWN.items()}) else 0)


def test_equal_runs_give_equal_bits():
    first, second = (bandit.train(bandit.network, [0, 1], 1) for _ in range(2))
    assert torch.equal(first, second)
    # A seed's runs do not depend on which other seeds run along, but for the order of float sums.
    torch.testing.assert_close(bandit.train(bandit.network, [1], 1)[:, 0], first[:, 1], rtol=1e-3, atol=1e-4)


def test_a_miss_is_an_exit_status(tmp_path, capsys):
    assert bandit.main(["--seeds", "2", "--epochs", "1", "--bare-epochs", "1", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "CoPG: final regret 0.0" in printed and "expected below 0.001" in printed


BAD_FLAGS = {
    "--seeds must be at least 2, got 1": ["--seeds", "1"],
    "--epochs must be at least 1, got 0": ["--epochs", "0"],
    "--bare-epochs must be at least 1, got -3": ["--bare-epochs", "-3"],
    "--out must name a directory": ["--out", ""],
    "--out: ": ["--out", "/dev/null/bandit"],
}


@pytest.mark.parametrize(("message", "flags"), BAD_FLAGS.items(), ids=BAD_FLAGS.keys())
def test_bad_flags(capsys, message, flags):
    with pytest.raises(SystemExit) as error:
        bandit.main(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err
