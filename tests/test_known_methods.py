"""docs/methods.md: every expression of its table against the method as its own paper or code writes it, in float64.

Each function here is one method, on (N,) numbers of groups of k; what it is compared with stands in the document.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from copg_kernels import copg_loss, losses

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
BETA, K, N = 0.6, 4, 12


def table(header: str) -> list[list[str]]:
    """The cells of the rows below the line that starts with this header."""
    lines = DOCUMENT[DOCUMENT.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def numbers(k: int) -> dict:
    """What the document's expressions use; logps is the leaf."""
    logps, ref_logps, old_logps, rewards = torch.randn(4, N, dtype=torch.float64)
    per_prompt = dict(
        mean_rewards=rewards.view(-1, k).mean(1),
        soft_means=BETA * (rewards / BETA).view(-1, k).exp().mean(1).log(),
        learnt_values=torch.randn(N // k, dtype=torch.float64),
        optimal_values=torch.randn(N // k, dtype=torch.float64),
    )
    given = dict(logps=logps.requires_grad_(), ref_logps=ref_logps, old_logps=old_logps, rewards=rewards)
    given |= {name: values.repeat_interleave(k) for name, values in per_prompt.items()}
    given |= dict(k=k, N=N, beta=BETA, x=(logps, ref_logps, rewards), quarters=torch.full_like(rewards, 0.25))
    given["quarters"][(rewards.view(-1, 2).argmin(1) + torch.arange(0, N, 2)).view(-1)] = -0.25
    return given


def slopes(value: torch.Tensor, given: dict) -> torch.Tensor:
    return torch.autograd.grad(value, given["logps"], retain_graph=True)[0]


# The methods, as they are written


def copg_paper(logps, ref_logps, rewards, *, in_weights=BETA / 2, **_):
    """Eq. (7): each log-ratio weighted with the difference of rewards regularised by beta / 2; maximised."""
    log_ratios = logps - ref_logps
    weighted = rewards - in_weights * log_ratios
    y, y_prime = slice(0, None, 2), slice(1, None, 2)
    objective = (weighted[y] - weighted[y_prime]) * log_ratios[y] + (weighted[y_prime] - weighted[y]) * log_ratios[
        y_prime
    ]
    return -objective.mean()


def command_a(logps, ref_logps, rewards, *, k, **_):
    regularized = (rewards - BETA * (logps - ref_logps)).view(-1, k)
    total = sum((regularized[:, i] - regularized[:, j]) ** 2 for i in range(k) for j in range(i)) / (k - 1)
    return total.mean()


def trajectory_balance(logps, ref_logps, rewards, *, k, **_):
    log_rewards = rewards / BETA + ref_logps
    log_z = (log_rewards - logps).view(-1, k).mean(1).detach().repeat_interleave(k)
    return ((log_z + logps - log_rewards) ** 2).mean()


def gvpo(logps, old_logps, rewards, *, k, **_):
    implicit = BETA * (logps - old_logps).view(-1, k)
    implicit = implicit - implicit.mean(1, keepdim=True).detach()
    advantages = rewards.view(-1, k) - rewards.view(-1, k).mean(1, keepdim=True)
    return (0.5 / (k - 1) * ((implicit - advantages) ** 2).sum(1)).mean()


def dro_policy_only(logps, ref_logps, rewards, *, k, **_):
    """Half the variance as half the mean of squared differences of two independent samples, over two."""
    values = (rewards - BETA * (logps - ref_logps)).view(-1, k)
    distinct = [(i, j) for i in range(k) for j in range(k) if i != j]
    variance = sum((values[:, i] - values[:, j]) ** 2 / 2 for i, j in distinct) / len(distinct)
    return 0.5 * variance.mean()


def dro_learnt_v(logps, ref_logps, rewards, *, learnt_values, **_):
    return 0.5 * ((rewards - learnt_values - BETA * (logps - ref_logps)) ** 2).mean()


def rebel(logps, old_logps, rewards, **_):
    eta = 1 / BETA
    log_ratios = logps - old_logps
    differences = (log_ratios[0::2] - log_ratios[1::2]) - eta * (rewards[0::2] - rewards[1::2])
    return (differences**2).mean()


def preferred_gap(logps, ref_logps, rewards):
    """log [pi(w) pi_ref(l) / (pi(l) pi_ref(w))] of each pair."""
    first_wins = rewards[0::2] > rewards[1::2]
    gap = (logps[0::2] + ref_logps[1::2]) - (logps[1::2] + ref_logps[0::2])
    return torch.where(first_wins, gap, -gap)


def ipo(logps, ref_logps, rewards, **_):
    return ((preferred_gap(logps, ref_logps, rewards) - 1 / (2 * BETA)) ** 2).mean()


def dpo(logps, ref_logps, rewards, **_):
    return -logsigmoid(BETA * preferred_gap(logps, ref_logps, rewards)).mean()


def rloo(logps, ref_logps, rewards, *, k, **_):
    scores = (rewards - BETA * (logps - ref_logps)).detach().view(-1, k)
    baselines = (scores.sum(1, keepdim=True) - scores) / (k - 1)
    return -((scores - baselines) * logps.view(-1, k)).sum(1).div(k).mean()


def kimi(logps, old_logps, rewards, *, k, **_):
    """The update of the report's eq. (3): the square of the log-ratio is differentiated, its mean is not taken out."""
    centered = rewards.view(-1, k) - rewards.view(-1, k).mean(1, keepdim=True)
    update = centered.flatten() * logps - BETA / 2 * (logps - old_logps) ** 2
    return -update.mean()


def a_star_po(logps, ref_logps, rewards, *, optimal_values, **_):
    return ((BETA * (logps - ref_logps) + optimal_values - rewards) ** 2).mean()


def oapl(logps, old_logps, rewards, *, k, **_):
    grouped = rewards.view(-1, k)
    value = BETA * (torch.logsumexp(grouped / BETA, 1, keepdim=True) - math.log(k))
    residuals = BETA * (logps - old_logps).view(-1, k) - (grouped - value)
    return (residuals**2).sum(1).mean()


METHODS = {
    "CoPG, eq. (7) [1]": copg_paper,
    "CoPG in Command A [2]": command_a,
    "TBA, VarGrad [3]": trajectory_balance,
    "GVPO [4]": gvpo,
    "DRO, policy only (tau) [5]": dro_policy_only,
    "DRO, learnt V (tau) [5]": dro_learnt_v,
    "REBEL (1/eta) [6]": rebel,
    "IPO (tau) [7]": ipo,
    "RLOO [8]": rloo,
    "Kimi k1.5 (tau) [9]": kimi,
    r"A\*-PO (beta2) [10]": a_star_po,
    "OAPL [11]": oapl,
    "DPO [12]": dpo,
}
TO_OLD_POLICY = (gvpo, rebel, kimi, oapl)


def call(method, given: dict) -> torch.Tensor:
    anchor = "old_logps" if method in TO_OLD_POLICY else "ref_logps"
    extra = {name: given[name] for name in ("k", "learnt_values", "optimal_values")}
    return method(given["logps"], given[anchor], given["rewards"], **extra)


# The first table


def test_the_table_has_these_methods():
    assert [row[0] for row in table("Method")] == list(METHODS)


@pytest.mark.parametrize("row", table("Method"), ids=[row[0] for row in table("Method")])
def test_expression(row):
    name, written, expression, agrees, _ = row
    given = numbers(2 if written.endswith("k = 2") else K)
    own = call(METHODS[name], given)
    library = eval(expression.strip("`"), {"copg_loss": copg_loss, **vars(losses)}, given)
    torch.testing.assert_close(slopes(library, given), slopes(own, given), rtol=1e-12, atol=1e-14)
    assert agrees in ("value", "gradient")
    assert torch.isclose(library, own, rtol=1e-12) == (agrees == "value")


# The remarks below it


def test_eq_7_with_beta_in_the_weights_is_copg_at_twice_beta():
    given = numbers(2)
    wrong = slopes(copg_paper(*given["x"], in_weights=BETA), given)
    torch.testing.assert_close(wrong, slopes(2 * copg_loss(*given["x"], beta=2 * BETA, group_size=2), given))
    assert not torch.allclose(wrong, slopes(2 * copg_loss(*given["x"], beta=BETA, group_size=2), given), rtol=0.01)


def test_eq_7_differs_by_a_constant():
    given = numbers(2)
    gaps = given["rewards"][0::2] - given["rewards"][1::2]
    constant = (gaps**2).mean() / (2 * BETA)
    torch.testing.assert_close(copg_paper(*given["x"]), 2 * copg_loss(*given["x"], beta=BETA, group_size=2) - constant)


def test_losses_of_their_own_name():
    pairs, group = numbers(2), numbers(K)
    for own, loss, given in (
        (rebel, losses.rebel_loss, pairs),
        (ipo, losses.ipo_loss, pairs),
        (rloo, losses.rloo_loss, group),
    ):
        to = given["old_logps" if own is rebel else "ref_logps"]
        value = loss(given["logps"], to, given["rewards"], beta=BETA, group_size=given["k"])
        torch.testing.assert_close(value, call(own, given))


def test_the_best_learnt_value_is_copg_but_for_leave_one_out():
    given = numbers(K)
    logps, ref_logps, rewards = given["x"]
    best = (rewards - BETA * (logps - ref_logps)).detach().view(-1, K).mean(1).repeat_interleave(K)
    learnt = slopes(dro_learnt_v(*given["x"], learnt_values=best) / BETA, given)
    copg = slopes(copg_loss(*given["x"], beta=BETA, group_size=K), given)
    torch.testing.assert_close(learnt, (K - 1) / K * copg)


def test_kimi_is_not_copg():
    given = numbers(K)
    logps, old_logps, rewards = given["logps"], given["old_logps"], given["rewards"]
    copg = slopes(copg_loss(logps, old_logps, rewards, beta=BETA, group_size=K), given)
    mean_log_ratio = (logps - old_logps).detach().view(-1, K).mean(1).repeat_interleave(K)
    uncentered = slopes(call(kimi, given), given)
    torch.testing.assert_close(uncentered, (K - 1) / K * copg + BETA * mean_log_ratio / N)
    assert not torch.allclose(uncentered, (K - 1) / K * copg, rtol=0.01)
    given["old_logps"] = logps.detach().clone()
    first_copg = slopes(copg_loss(logps, given["old_logps"], rewards, beta=BETA, group_size=K), given)
    torch.testing.assert_close(slopes(call(kimi, given), given), (K - 1) / K * first_copg)


def test_dpo_has_another_weight_per_pair():
    given = numbers(2)
    gap = preferred_gap(*given["x"]).detach()
    winners = given["quarters"] > 0
    dpo_weights = -slopes(call(dpo, given), given)[winners] * (N // 2)
    copg = copg_loss(given["logps"], given["ref_logps"], given["quarters"], beta=BETA, group_size=2)
    copg_weights = -slopes(copg, given)[winners] * (N // 2)
    torch.testing.assert_close(dpo_weights, BETA * torch.sigmoid(-BETA * gap))
    torch.testing.assert_close(copg_weights, (0.5 - BETA * gap) / 2)


def test_drawn_preferences_lead_dpo_to_the_optimum_and_ipo_elsewhere():
    """At pi*, preferences drawn with sigmoid(R - R') leave DPO no gradient."""
    rewards = torch.tensor([1.3, 0.4], dtype=torch.float64)
    likely = torch.sigmoid(rewards[0] - rewards[1])
    optimal = (rewards / BETA).log_softmax(0).requires_grad_()
    uniform = torch.full((2,), -math.log(2), dtype=torch.float64)

    def slope(loss) -> float:
        first, second = (loss(optimal, uniform, winner, beta=BETA) for winner in (rewards, -rewards))
        return torch.autograd.grad(likely * first + (1 - likely) * second, optimal)[0].abs().max().item()

    assert slope(losses.dpo_loss) < 1e-12 and slope(losses.ipo_loss) > 0.1


# The second table: three arms, where a group of ten completions holds each arm exactly in proportion to mu

REWARDS = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
FLOW_BETA = 0.5
MU, AT_REFERENCE = (1, 2, 7), (5, 3, 2)


def rest_point(counts: tuple[int, int, int], loss) -> torch.Tensor:
    """Follow the exact gradient from the uniform policy until it vanishes; loss(arm_logps, arms) uses the library's."""
    arms = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(loss(logits.log_softmax(0), arms), logits)
        if gradient.abs().max() < 1e-9:
            return logits.detach().softmax(0)
        logits.data -= 2 * gradient
    raise AssertionError(f"no rest point in 2000 steps, the gradient is still {gradient.tolist()}")


def contrastive(arm_logps, arms):
    return copg_loss(arm_logps[arms], REFERENCE.log()[arms], REWARDS[arms], beta=FLOW_BETA, group_size=10)


def subtracting(baseline):
    """REINFORCE on A minus baseline(arm_logps, arms)."""

    def loss(arm_logps, arms):
        x = (arm_logps[arms], REFERENCE.log()[arms], REWARDS[arms])
        return losses.reinforce_loss(*x, beta=FLOW_BETA, group_size=10, baseline=baseline(arm_logps.detach(), arms))

    return loss


def log_partition(arm_logps, arms):
    return FLOW_BETA * (REFERENCE * (REWARDS / FLOW_BETA).exp()).sum().log()


def own_mean_of_a(arm_logps, arms):
    return (arm_logps.exp() * (REWARDS - FLOW_BETA * (arm_logps - REFERENCE.log()))).sum()


def log_mean_exp(arm_logps, arms):
    return FLOW_BETA * (REWARDS[arms] / FLOW_BETA).exp().mean().log()


def mean_reward(arm_logps, arms):
    return REWARDS[arms].mean()


def own_mean_of_r(arm_logps, arms):
    return (arm_logps.exp() * REWARDS).sum()


FLOWS = {
    "CoPG: leave-one-out": (MU, contrastive),
    "V = beta log Z": (MU, subtracting(log_partition)),
    "the policy's own mean of A": (MU, subtracting(own_mean_of_a)),
    "log-mean-exp of the rewards under mu": (MU, subtracting(log_mean_exp)),
    "log-mean-exp of the rewards, mu = pi_ref": (AT_REFERENCE, subtracting(log_mean_exp)),
    "mean reward (Kimi k1.5)": (MU, subtracting(mean_reward)),
    "mean reward, mu = pi_ref": (AT_REFERENCE, subtracting(mean_reward)),
    "the policy's own mean of R": (MU, subtracting(own_mean_of_r)),
    "nothing": (MU, subtracting(lambda arm_logps, arms: 0.0)),
}


@pytest.mark.parametrize("index", range(len(FLOWS)), ids=FLOWS.keys())
def test_rest_point(index):
    rows, name = table("What is subtracted from A"), list(FLOWS)[index]
    assert len(rows) == len(FLOWS) and rows[index][0].startswith(name)
    printed = [float(number) for number in re.findall(r"\d\.\d+", rows[index][1])]
    reached = rest_point(*FLOWS[name])
    assert reached.tolist() == pytest.approx(printed, abs=6e-4)
    optimal = (REFERENCE * (REWARDS / FLOW_BETA).exp()) / (REFERENCE * (REWARDS / FLOW_BETA).exp()).sum()
    assert torch.allclose(reached, optimal, atol=1e-6) == rows[index][1].endswith("= pi*")


def test_without_the_regularizer_the_favoured_arm_need_not_be_the_best():
    """mu = (.3, .6, .1), R = (0, .8, 1): the mean reward as baseline favours arm 2, CoPG ends at pi*, on arm 3."""
    counts, rewards, beta = (3, 6, 1), torch.tensor([0.0, 0.8, 1.0], dtype=torch.float64), 0.05
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    arms = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    leaf = uniform.log()[arms].requires_grad_()
    first = losses.reinforce_loss(
        leaf, uniform.log()[arms], rewards[arms], beta=beta, group_size=10, baseline=rewards[arms].mean()
    )
    push = torch.zeros(3, dtype=torch.float64).index_add(0, arms, -torch.autograd.grad(first, leaf)[0])
    assert push.argmax() == 1
    optimal = (rewards / beta).softmax(0)
    at_optimum = optimal.log()[arms].requires_grad_()
    loss = copg_loss(at_optimum, uniform.log()[arms], rewards[arms], beta=beta, group_size=10)
    assert optimal.argmax() == 2 and torch.autograd.grad(loss, at_optimum)[0].abs().max() < 1e-12
