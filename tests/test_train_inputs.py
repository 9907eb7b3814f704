"""What train/run.py reads and keeps: parquet, chats, rows without padding, cached log-probs, a disk that is full."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_train import colour_examples
from tests.tiny_models import arguments, begun_run, needs_peft, refusal, save_tiny_model, step_records, write_rows
from train import checkpoint, ref_logps, run
from train.batch import Group, num_tokens, pack, singles, unpadded
from train.data import read_examples, write_jsonl
from train.log import open_log, read_records, write_line
from train.model import head_operands
from train.objective import completion_logps

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"prompt": "a", "completions": ["x", "yy"], "rewards": [1, 0], "id": 7},
    {"prompt": "b", "completions": ["x", "yy", "z"], "rewards": [0, 1, 2], "id": 8},
]
CHAT = {"prompt": [{"role": "user", "content": "hi"}], "completions": ["x", "y"], "rewards": [0.0, 1.0]}


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    write_jsonl(path, colour_examples(20))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


# Rows


def write_parquet(path: Path, rows: list[dict]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("online", [False, True])
def test_parquet_is_read_as_json_lines_are(tmp_path, online):
    parquet = write_parquet(tmp_path / "rows.parquet", ROWS)
    lines = write_rows(tmp_path / "rows.jsonl", ROWS)
    examples = read_examples(parquet, online=online)
    assert examples == read_examples(lines, online=online)
    assert examples[1].rewards == [0.0, 1.0, 2.0] and examples[1].columns == ({"id": 8} if online else {})


def test_bad_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [*ROWS, {"prompt": "c", "completions": ["x"], "rewards": [1]}])
    with pytest.raises(ValueError, match="rows.parquet:3: a contrast needs at least 2 completions, got 1"):
        read_examples(path)
    path.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match="rows.parquet: not readable as parquet"):
        read_examples(path)


def test_messages_are_prompts_of_a_chat(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [CHAT, ROWS[0]])
    first, second = read_examples(path, chat=True)
    assert first.prompt == CHAT["prompt"] and second.prompt == "a"
    with pytest.raises(ValueError, match="chat.jsonl:1: prompt is a list of messages, which needs --chat"):
        read_examples(path)


BAD_PROMPTS = {
    "prompt is an empty list": [],
    "prompt[0] must be a message with a role and a content": ["hi"],
    "prompt[1] must be a message": [{"role": "user", "content": "hi"}, {"role": "user", "content": None}],
    "prompt[0] must have a role of system, user": [{"role": "robot", "content": "hi"}],
    "prompt must be a non-empty string, got ''": "",
}


@pytest.mark.parametrize(("message", "prompt"), BAD_PROMPTS.items(), ids=BAD_PROMPTS.keys())
def test_bad_messages_are_named(tmp_path, message, prompt):
    path = write_rows(tmp_path / "chat.jsonl", [CHAT | {"prompt": prompt}])
    with pytest.raises(ValueError) as error:
        read_examples(path, chat=True)
    assert message in str(error.value) and str(error.value).startswith(f"{path}:1: ")


# Rows without padding


def test_unpadded_rows_by_hand():
    groups = [Group([5, 6], [[7, 1], [8]], [0.0, 1.0]), Group([9], [[2, 3, 1], [4]], [0.0, 1.0])]
    batch = unpadded(pack(groups, 0, torch.device("cpu")))
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 5, 6, 8, 9, 2, 3, 1, 9, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch.attention_mask is None and num_tokens(groups) == batch.input_ids.numel()
    # The state in front of a label sits right before it in the row.
    assert torch.equal(batch.input_ids[0][batch.positions + 1], batch.labels)
    assert batch.labels.tolist() == [7, 1, 8, 2, 3, 1, 4] and batch.cu_seqlens.tolist() == [0, 2, 3, 6, 7]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_neighbours_in_a_row_do_not_see_each_other(tmp_path, colours, kind):
    """transformers reads the bounds from position_ids, for flash-attn's kernel and, here, for the mask of sdpa."""
    run_ = begun_run(save_tiny_model(tmp_path / kind, kind), colours, tmp_path / "out")
    padded = pack(run_.train_groups[:4], run_.tokenizer.pad_token_id, torch.device("cpu"))
    apart, together = (
        completion_logps(*head_operands(run_.model, batch, torch.float32), batch)
        for batch in (padded, unpadded(padded))
    )
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)
    shuffled = pack(run_.train_groups[3::-1], run_.tokenizer.pad_token_id, torch.device("cpu"))
    backwards = completion_logps(*head_operands(run_.model, unpadded(shuffled), torch.float32), shuffled)
    torch.testing.assert_close(backwards.sum(), apart.sum(), atol=1e-4, rtol=0)


def test_singles_keep_the_order():
    groups = [Group([5], [[7, 1], [8]], [0.0, 1.0]), Group([9], [[2]], [1.0])]
    assert [(group.prompt_ids, group.completion_ids) for group in singles(groups)] == [
        ([5], [[7, 1]]),
        ([5], [[8]]),
        ([9], [[2]]),
    ]


# Cached reference log-probs


def cached_files(out: Path) -> list[Path]:
    return sorted((out / "cache").glob("*"))


def test_the_reference_is_asked_once(tmp_path, model, colours, monkeypatch):
    """Another beta, learning rate and number of steps find what the first run left; the log-probs are the same."""
    cache = ("--cache-dir", str(tmp_path / "cache"))
    first = begun_run(model, colours, tmp_path / "first", *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(ref_logps, "reference_logps", lambda *_: pytest.fail("the reference was asked again"))
    second = begun_run(model, colours, tmp_path / "second", *cache, "--beta", "1", "--lr", "1", "--average-logps")
    assert [g.ref_logps for g in second.train_groups] == [g.ref_logps for g in first.train_groups]
    assert [g.ref_logps for g in second.heldout_groups] == [g.ref_logps for g in first.heldout_groups]


def test_what_moves_a_log_prob_is_in_the_key(tmp_path, model, colours):
    cache = ("--cache-dir", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "other.jsonl", colour_examples(19))
    other = save_tiny_model(tmp_path / "other", initializer_range=0.05)
    runs = [
        (model, colours, ()),
        (model, colours, ("--max-completion-tokens", "3")),
        (model, colours, ("--seed", "1")),
        (model, colours, ("--dtype", "bfloat16")),
        (model, tmp_path / "other.jsonl", ()),
        (other, colours, ()),
    ]
    for number, (weights, data, flags) in enumerate(runs, start=1):
        begun_run(weights, data, tmp_path / f"run-{number}", *cache, *flags)
        assert len(list((tmp_path / "cache").iterdir())) == number


def test_a_cache_of_other_data_is_refused(tmp_path, model, colours, capsys):
    """A file under the name of another: copied by hand, or a digest that has been seen before."""
    run.main(arguments(model, colours, tmp_path / "a", "--steps", "1"))
    run.main(arguments(model, colours, tmp_path / "b", "--steps", "1", "--max-completion-tokens", "3"))
    (mine,), (other,) = cached_files(tmp_path / "a"), cached_files(tmp_path / "b")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.copy(other, mine)
    command = arguments(model, colours, tmp_path / "a", "--steps", "1")
    assert run.main(command) == 1
    assert f"{mine}: a cache of reference log-probs of other token_ids; delete it" in capsys.readouterr().err
    mine.write_bytes(mine.read_bytes()[:50])
    assert run.main(command) == 1
    assert f"{mine}: not a readable cache" in capsys.readouterr().err


def test_a_cache_is_whole_or_absent(tmp_path, monkeypatch):
    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ref_logps, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        ref_logps.write_cache(tmp_path / "cache" / "x.safetensors", {}, torch.zeros(2), torch.zeros(1))
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ref_logps.cache_dir("") == tmp_path / "copg-kernels" and ref_logps.cache_dir("here") == Path("here")


# A full disk


@pytest.mark.parametrize("flags", [(), pytest.param(("--lora-rank", "2"), marks=needs_peft)], ids=["whole", "adapters"])
def test_a_full_disk_is_named_and_the_last_checkpoint_stands(tmp_path, model, colours, capsys, monkeypatch, flags):
    save = torch.save

    def full_from_step_two(state, path):
        if state["step"] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_from_step_two)
    command = arguments(model, colours, tmp_path, "--steps", "4", "--checkpoint-every", "1", *flags)
    assert run.main(command) == 1
    said = capsys.readouterr().err
    folder = tmp_path / "checkpoints"
    assert f"{folder / 'step-00000002'} could not be written" in said and "No space left on device" in said
    assert f"{folder / 'step-00000001'} stands" in said
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert run.main([*command, "--resume"]) == 0 and step_records(tmp_path)[-1]["step"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_named():
    with pytest.raises(OSError, match="/dev/full could not be written.*No space left"):
        with open_log(Path("/dev/full"), None) as log:
            write_line(log, {"step": 1})


def test_checkpoints_of_another_version_are_refused(tmp_path, model, colours, capsys):
    command = arguments(model, colours, tmp_path / "out", "--steps", "1")
    run.main(command)
    folder = checkpoint.checkpoints(tmp_path / "out")[-1]
    torch.save(checkpoint.load_state(folder) | {"format": 1}, folder / "state.pt")
    assert f"{folder} was written by another version" in refusal(capsys, [*command, "--resume"])


# The log


def test_evaluations_after_the_checkpoint_are_dropped(tmp_path):
    lines = [{"config": {}}, {"evaluated_at": 0}, {"step": 1}, {"step": 2}, {"evaluated_at": 2}, {"step": 3}]
    path = write_rows(tmp_path / "log.jsonl", lines)
    with open_log(path, resume_step=1) as log:
        write_line(log, {"step": 2})
    lines[3:] = [{"step": 2}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert read_records(path, "evaluated_at") == [{"evaluated_at": 0}]


def test_tensorboard_has_the_numbers_of_the_log(tmp_path, model, colours):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.main(arguments(model, colours, tmp_path, "--steps", "3", "--tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("loss")]
    assert values == pytest.approx([record["loss"] for record in step_records(tmp_path)])
    assert [event.step for event in events.Scalars("heldout_margin")] == [0, 3]


@pytest.mark.parametrize("package", ["datasets", "peft", "torch.utils.tensorboard"])
def test_missing_packages_are_named(tmp_path, model, colours, capsys, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    flags = {"datasets": (), "peft": ("--lora-rank", "2"), "torch.utils.tensorboard": ("--tensorboard",)}[package]
    data = colours if package != "datasets" else tmp_path / "rows.parquet"
    data.touch()
    message = refusal(capsys, arguments(model, data, tmp_path / "out", *flags))
    assert f"needs the {package.rpartition('.')[2]} package, which is not installed" in message
