"""What the policies of an experiment share, and how each of them is evaluated with it: by sampling."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GPT2ForTokenClassification, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from train.batch import Group
from train.documents import Document
from train.policy import completion_logps, draw
from train.preferences import overlap
from train.reward_model import score
from train.summarize_settings import Settings


@dataclass(frozen=True)
class Laboratory:
    """It travels to other processes as a folder of files."""

    settings: Settings
    tokenizer: Tokenizer
    reference: PreTrainedModel
    reward_model: PreTrainedModel
    validation: list[Document]
    test: list[Document]
    offline: dict[int, list[Group]]  # seed -> pairs, with rewards and ref_logps

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        self.reference.save_pretrained(folder / "reference")
        self.reward_model.save_pretrained(folder / "reward_model")
        record = {name: getattr(self, name) for name in ("settings", "validation", "test", "offline")}
        (folder / "data.json").write_text(json.dumps(record, default=asdict), encoding="utf-8")


@functools.cache
def load_laboratory(folder: Path) -> Laboratory:
    logging.disable_progress_bar()
    record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    settings = Settings(**record["settings"])
    return Laboratory(
        settings,
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        GPT2LMHeadModel.from_pretrained(folder / "reference").to(settings.torch_device),
        GPT2ForTokenClassification.from_pretrained(folder / "reward_model").to(settings.torch_device),
        [Document(**document) for document in record["validation"]],
        [Document(**document) for document in record["test"]],
        {int(seed): [Group(**group) for group in groups] for seed, groups in record["offline"].items()},
    )


def evaluate(policy: PreTrainedModel, lab: Laboratory, documents: Sequence[Document], seed: int) -> dict[str, float]:
    """Means over one sample per prompt, and the standard error of the reward over prompts.

        kl = mean over samples y of log pi(y|x) - log pi_ref(y|x)     in nats, unbiased for KL(pi || pi_ref)

    A sample that reaches the length limit without EOS counts as it is: the KL is that of completions cut there.
    """
    drawn = draw(policy, documents, 1, lab.settings, seed=10_000 * seed)
    groups = [Group(d.prompt_ids, completions, [0.0]) for d, completions in zip(documents, drawn, strict=True)]
    overlaps = [overlap(completions[0], d, lab.tokenizer) for d, completions in zip(documents, drawn, strict=True)]
    rewards = score(lab.reward_model, groups, lab.settings).double()
    logps, ref_logps = (completion_logps(model, groups, lab.settings) for model in (policy, lab.reference))
    return {
        "reward": rewards.mean().item(),
        "reward_se": (rewards.std() / len(rewards) ** 0.5).item(),
        "kl": (logps - ref_logps).double().mean().item(),
        "length": statistics.fmean(len(completions[0]) for completions in drawn),
        "overlap": statistics.fmean(overlaps),
    }
