"""Sparse gradients in the benchmark: the provider's own bound, the error table, the softmax of a trained run."""

import json
from itertools import pairwise

import pytest
import torch

import copg_kernels
from bench import accuracy, checks, granularity, loaders, providers, sparse, suites, tables
from bench.inputs import Shape, make_inputs
from bench.timing import Rounds
from copg_kernels import linear_logps, sequence_logps
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.significant_columns import significant_columns_torch
from copg_kernels.reference import linear_copg_loss_ref
from tests.test_bench import CPU, checked, tiny_table

# Large enough for blocks to stay compact, and two of them.
SMALL = Shape("small", 16000, 32, 256, 64)


@pytest.fixture
def once(monkeypatch):
    monkeypatch.setattr(sparse, "ROUNDS", Rounds(1))


def small_case():
    return sparse.case_of(SMALL, "rl")


# The provider


def test_sparse_provider_is_held_to_a_bound_of_its_own():
    rows = checked(loaders.OURS_SPARSE, make_inputs(SMALL, "rl", torch.float32, "cpu"))
    assert [row.status for row in rows] == ["ok"] * 4 + ["not available: no gradient of the entropy"]
    for row in rows[1:4]:
        assert 3e-4 < row.errors.dhidden < 3e-3 and accuracy.wrong(row.errors, torch.float32) is not None
    assert rows[0].errors.logps < 1e-4


def test_own_bound_only_widens_that_of_the_dtype_and_only_for_gradients():
    assert accuracy.wrong(accuracy.Errors(1e-4, 9e-3, 9e-3), torch.float32, 1e-2) is None
    assert "dX off by" in accuracy.wrong(accuracy.Errors(1e-4, 2e-2, 9e-3), torch.float32, 1e-2)
    assert "dW off by" in accuracy.wrong(accuracy.Errors(1e-4, 9e-3, float("nan")), torch.float32, 1e-2)
    assert "log-probs off by" in accuracy.wrong(accuracy.Errors(2e-2, 9e-3, 9e-3), torch.float32, 0.1)
    assert accuracy.wrong(accuracy.Errors(1e-4, 0.4, 0.4), torch.bfloat16, 1e-2) is None


def test_sparse_provider_without_kernels_says_so_in_one_row(monkeypatch):
    def refusing(*operands, **options):
        raise ValueError("sparse_eps needs backend='torch'")

    monkeypatch.setattr(copg_kernels, "linear_logps", refusing)
    found, rows = checks.load_providers((loaders.OURS_SPARSE,), CPU)
    assert not found and [row.status for row in rows] == ["not available: sparse_eps needs backend='torch'"]


def test_sparse_provider_is_neither_ours_nor_a_peer(monkeypatch):
    seconds = {loaders.EAGER: 3.0, loaders.OURS: 2.0, loaders.OURS_SPARSE: 1.0}
    table = tiny_table(monkeypatch, {name: loaders.LOADERS[name] for name in seconds})
    for row in table["rows"]:
        row["seconds"] = seconds[row["provider"]]
    assert "fastest peer / ours: log-probs 1.50 (eager), loss+gradients 1.50 (eager)" in tables.plain(table)
    over_ours = tables.HEADER.index("/ ours")
    assert [row[over_ours] for row in tables.cells(table)] == ["1.50", "1.50", "1.00", "1.00", "0.50", "0.50"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_have_the_sparse_provider_where_the_regime_matters(device):
    device = torch.device(device)
    regimes = [job for job in suites.full(device) if job.about == "regimes"]
    assert len(regimes) == 3
    assert all(loaders.OURS_SPARSE in job.providers for job in (*suites.quick(device), *regimes))


# The table


def test_table_has_a_row_per_eps_and_two_to_compare_with(once, tmp_path, capsys):
    path = tmp_path / "new" / "sparse.json"
    arguments = ["--shape", "16000", "32", "256", "--eps", "2^-8", "2^-12", "--json", str(path)]
    results = sparse.main(arguments)
    assert json.loads(path.read_text()) == results and "source_sha256" in results["provenance"]
    assert [table["name"] for table in results["tables"]] == [
        f"regime {name}" for name in ("base", "tuned", "rl", "flat")
    ]
    printed = capsys.readouterr().out
    names = ["sparse_eps 2^-8", "sparse_eps 2^-12", "rounded to bfloat16", "128 x 128 tiles 2^-12"]
    for table in results["tables"]:
        assert [row["gradients"] for row in table["rows"]] == names
        assert [row["over_exact"] is None for row in table["rows"]] == [False, False, True, True]
    assert all(printed.count(name) == 4 for name in names)

    rl = results["tables"][2]["rows"]
    assert rl[0]["density"] < rl[1]["density"] and rl[0]["dropped"] > rl[1]["dropped"] > 0
    assert rl[0]["dhidden_error"] > rl[1]["dhidden_error"] > rl[2]["dhidden_error"] > 0
    assert rl[0]["uncorrected_dhidden_error"] > 1.2 * rl[0]["dhidden_error"]


def dense_errors(case, entries_of):
    """dX and dW errors where these (T, V) float64 entries stand for softmax - onehot; the truth is autograd's."""
    inputs = case.inputs
    operands = [operand.detach().double().requires_grad_() for operand in inputs[:2]]
    loss = linear_copg_loss_ref(
        *operands,
        inputs.labels,
        inputs.ref_logps.double(),
        inputs.rewards.double(),
        beta=inputs.beta,
        group_size=inputs.group_size,
        cu_seqlens=inputs.cu_seqlens,
    )
    truth = torch.autograd.grad(loss, operands)
    hidden_states, weight = (operand.detach() for operand in operands)
    softmax = (hidden_states @ weight.T).softmax(1)
    onehot = torch.nn.functional.one_hot(inputs.labels, len(weight))
    dlogits = -case.coefficients().double().unsqueeze(1) * entries_of(softmax, onehot)
    return [
        ((value - exact).norm() / exact.norm()).item()
        for value, exact in zip((dlogits @ weight, dlogits.T @ hidden_states), truth, strict=True)
    ]


@pytest.mark.parametrize("eps", [2.0**-8, 2.0**-12])
def test_sparse_errors_are_those_of_the_entries_that_stay(eps):
    case = small_case()
    hidden_states, weight, labels = (operand.detach() for operand in case.inputs[:3])
    head = Head(weight, None, 1.0, None, 1.0)
    _, compact = significant_columns_torch(hidden_states, head, labels, eps, sparse.WORKSPACE)
    is_kept = torch.zeros(len(labels), len(weight), dtype=torch.bool)
    for rows, columns, _ in compact.blocks():
        is_kept[rows, columns] = True
    others = torch.outer(compact.dropped, compact.tail).double()

    def without(softmax, onehot):
        return softmax * (is_kept | (onehot > 0)) - onehot

    corrected = dense_errors(case, lambda softmax, onehot: without(softmax, onehot) + others)
    inputs = case.inputs._replace(dlogps=case.coefficients())
    row = sparse.sparse_row(inputs, eps, accuracy.exact(inputs, (providers.UPSTREAM,)))
    assert [row.dhidden_error, row.dweight_error] == pytest.approx(corrected, rel=1e-2)
    uncorrected = [row.uncorrected_dhidden_error, row.uncorrected_dweight_error]
    assert uncorrected == pytest.approx(dense_errors(case, without), rel=1e-2)
    share = is_kept.double().mean().item(), compact.dropped.mean().item(), 0.0
    assert (row.density, row.dropped, row.overflow) == pytest.approx(share, rel=1e-5)


def test_reference_rows_are_those_of_rounded_entries_and_of_tiles_left_out():
    case = small_case()
    inputs = case.inputs._replace(dlogps=case.coefficients())
    rounded, tiles = sparse.reference_rows(inputs, accuracy.exact(inputs, (providers.UPSTREAM,)))
    kept, gone = [], []

    def without_small_tiles(softmax, onehot):
        entries = softmax - onehot
        for rows in entries.split(128):
            for tile in rows.split(128, 1):
                if tile.abs().max() >= 2.0**-12:
                    kept.append(tile.numel())
                else:
                    gone.append(tile.clamp_min(0).sum().item())
                    tile.zero_()
        return entries

    expected = dense_errors(case, lambda softmax, onehot: (softmax - onehot).bfloat16().double())
    assert [rounded.dhidden_error, rounded.dweight_error] == pytest.approx(expected, rel=1e-2)
    expected = dense_errors(case, without_small_tiles)
    assert [tiles.dhidden_error, tiles.dweight_error] == pytest.approx(expected, rel=1e-2)
    assert tiles.density == pytest.approx(sum(kept) / (256 * 16000)) and 0 < tiles.density < 1
    assert tiles.dropped == pytest.approx(sum(gone) / 256, rel=1e-3) and tiles.dhidden_error > 1e-5


def test_reference_entries_by_hand():
    logits = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log()
    entries = sparse.softmax_minus_onehot(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(entries, torch.tensor([[0.25, -0.25], [-0.5, 0.5]]))
    # Eight bits of mantissa, ties to even.
    values = torch.tensor([1 / 3, -1 - 2.0**-8, 1 + 3 * 2.0**-8])
    assert sparse.round_to_bfloat16(values).tolist() == [0.333984375, -1.0, 1.015625]
    entries = torch.full((2, 300), 2.0**-13)
    entries[0, 130], entries[1, 299] = -(2.0**-12), 2.0**-12
    assert sparse.columns_of_kept_tiles(entries).tolist() == [False] * 128 + [True] * 172


def test_bad_options_are_refused(capsys):
    for arguments, message in (
        (["--shape", "1000", "16", "100"], "T is a multiple of 128"),
        (["--shape", "0", "16", "128"], "sizes are positive"),
        (["--eps", "0"], "must be a probability"),
        (["--eps", "2^-x"], "invalid probability value"),
        (["--from-run", "nothing", "--shape", "1000", "16", "128"], "brings its own --shape"),
    ):
        with pytest.raises(SystemExit):
            sparse.parse(arguments)
        assert message in capsys.readouterr().err


# The softmax of a run


@pytest.fixture
def tiny_run(tmp_path):
    """A fresh run with groups of two and of three, and its directory."""
    pytest.importorskip("transformers")
    from tests.test_train import colour_examples, tiny_run
    from train.data import write_jsonl

    write_jsonl(tmp_path / "colours.jsonl", colour_examples(20))
    return tiny_run(tmp_path / "colours.jsonl", tmp_path / "run"), tmp_path / "run"


def test_hidden_states_of_a_run_are_those_of_its_heldout_completions(tiny_run):
    from bench.trained import trained_inputs

    run, folder = tiny_run
    inputs, cu_groups = trained_inputs(folder)
    completions = [ids for group in run.heldout_groups for ids in group.completion_ids]
    assert inputs.labels.tolist() == [token for ids in completions for token in ids]
    assert cu_groups.diff().tolist() == [len(group.rewards) for group in run.heldout_groups]
    # No step has been taken: the policy is the reference.
    logps = sequence_logps(linear_logps(*inputs[:3]), inputs.labels, cu_seqlens=inputs.cu_seqlens)
    expected = torch.tensor([logp for group in run.heldout_groups for logp in group.ref_logps])
    torch.testing.assert_close(logps.detach(), expected)
    case = sparse.Case("", inputs, cu_groups)
    truth = accuracy.exact(inputs._replace(dlogps=case.coefficients()), (providers.UPSTREAM,))
    errors = accuracy.gradient_errors(providers.UPSTREAM, case.loss_and_gradients(None), truth)
    assert errors.dhidden < 1e-5 and errors.dweight < 1e-5


def test_run_and_sparse_report_the_same_of_a_run(once, tiny_run, tmp_path):
    pytest.importorskip("tqdm")
    from bench import run

    _, folder = tiny_run
    arguments = ["--from-run", str(folder), "--json", str(tmp_path / "sparse.json")]
    handed_over, direct = run.main(arguments), sparse.main([*arguments, "--eps", "2^-4", "2^-14"])
    assert json.loads((tmp_path / "sparse.json").read_text()) == direct
    assert [table["name"] for table in direct["tables"]] == ["held-out completions", "tokens drawn at temperature 1"]
    for ours, theirs in zip(direct["tables"], handed_over["tables"], strict=True):
        assert ours["rows"][1]["dhidden_error"] == theirs["rows"][2]["dhidden_error"]
        coarse, fine = ours["rows"][:2]
        # A vocabulary of 300 with a softmax that is nearly uniform: nothing is significant, or all of it.
        assert coarse["density"] < 0.05 and coarse["dropped"] > 0.9 and coarse["overflow"] == 0
        assert coarse["uncorrected_dweight_error"] > 2 * coarse["dweight_error"] > 1e-3
        assert fine["overflow"] == 1 and fine["dhidden_error"] < 1e-5


def test_drawn_labels_follow_the_softmax():
    inputs = make_inputs(Shape("", 3, 1, 4096, 2048), "flat", torch.float32, "cpu")
    weight = torch.tensor([[0.0], [1.0], [-1000.0]])
    hidden_states = torch.tensor([[4.0], [1e-9]]).log().repeat(2048, 1)
    labels = sparse.drawn_labels(inputs._replace(hidden_states=hidden_states, lm_head_weight=weight))
    shares = labels[0::2].bincount(minlength=3) / 2048  # in proportion to 1, 4 and 0
    assert shares.tolist() == pytest.approx([0.2, 0.8, 0.0], abs=0.03)
    assert (labels[1::2] == 2).all()


def test_run_directory_that_is_none_is_refused(tiny_run, tmp_path, capsys):
    pytest.importorskip("tqdm")
    from bench import run

    assert run.parse(["--device", "cpu"]).json == run.JSON
    assert run.parse(["--from-run", "nothing"]).json == sparse.JSON
    with pytest.raises(SystemExit):
        run.parse(["--from-run", "nothing", "--group-size", "4"])
    assert "--from-run takes no --group-size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sparse.main(["--from-run", str(tmp_path / "nothing")])
    assert "holds no checkpoint" in capsys.readouterr().err
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit):
        sparse.main(["--from-run", str(tiny_run[1])])
    assert "the data have changed" in capsys.readouterr().err


# The form of what is kept


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_forms_keep_what_they_say_and_multiply_it(monkeypatch):
    """Coarser forms keep more and lose less; products are checked against dense ones by `errors` itself."""
    monkeypatch.setattr(granularity, "ROUNDS", Rounds(1))
    shape, eps = Shape("small", 4000, 32, 256, 128), 2.0**-12
    table = granularity.measure(shape, "rl", eps, lambda: None)
    rows = {row["form"]: row for row in table["rows"]}
    softmax = granularity.make_softmax(shape, "rl")
    for share in granularity.ENTRY_EPS:
        kept = (softmax.probabilities >= eps * share).double().mean().item()
        assert rows[f"entries, {sparse.power_of_two(eps * share)}"]["kept"] == pytest.approx(kept)
    single, *unions = (rows[name] for name in ("entries, 2^-12", *(f"columns per {n} tokens" for n in (32, 64, 128))))
    for fine, coarse in pairwise([single, *unions, rows["128 x 128 tiles"]]):
        assert fine["kept"] < coarse["kept"] and fine["dhidden_error"] > coarse["dhidden_error"]
    assert "columns per 128 tokens" in granularity.summary(table).plain()


def test_wrong_products_are_found():
    softmax = granularity.make_softmax(Shape("small", 500, 8, 64, 32), "rl")
    form = granularity.column_union(softmax, 2.0**-12, 32)
    operands = (granularity.dense_products(softmax), granularity.exact_gradients(softmax))
    granularity.errors(form, softmax, *operands)
    with pytest.raises(AssertionError, match="products are wrong"):
        granularity.errors(form._replace(kept=~form.kept), softmax, *operands)
