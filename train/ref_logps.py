"""Log-probs of the data's completions under the reference policy: computed once, and kept on disk between runs.

The key of a cached file is a digest of every weight, of the model's configuration, of all token ids in their order and
of what else moves a bit: the dtype, the attention and how sequences share a pass. Tokenizer, chat template, limits of
length and the split are all in the token ids. So a sweep over beta, losses or learning rates asks the reference once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from train import ranks
from train.batch import Group
from train.pretrained import without_wrapper
from train.spread import whole
from train.state import Run, reference_logps, with_ref_logps


class CacheError(Exception):
    """A cached file is not what its name says."""


def set_ref_logps(run: Run) -> None:
    """Gives every group its reference log-probs: the policy's own, before its first step."""
    path, key = cache_file(run)
    cached = None if path is None else ranks.from_first(lambda: read_cache(path, key) if path.exists() else None)
    if cached is not None:
        train, heldout = cached
    else:
        train, heldout = _computed(run, run.train_groups), _computed(run, run.heldout_groups)
        if path is not None:
            ranks.from_first(lambda: write_cache(path, key, train, heldout))
    run.train_groups = with_ref_logps(run.train_groups, train)
    run.heldout_groups = with_ref_logps(run.heldout_groups, heldout)


def cache_file(run: Run) -> tuple[Path | None, dict[str, str]]:
    """Where the log-probs of this run are or will be, and the key; None where they are not worth a file.

    Without --model every run makes its own weights, so that only an explicit --cache-dir keeps theirs.
    """
    config = run.config
    if not config.model and not config.cache_dir:
        return None, {}
    model = without_wrapper(run.model)
    key = {
        "weights": run.base_digest or weights_digest(model),
        "token_ids": token_digest([*run.train_groups, *run.heldout_groups]),
        "dtype": config.dtype,
        "attention": f"{model.config._attn_implementation}, {'packed' if run.is_packed else 'padded'}",
        "sequences": f"{config.prompts_per_step} prompts, micro-batch {config.micro_batch}",
        "split": f"{len(run.train_groups)} + {len(run.heldout_groups)} prompts",
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_dir(config.cache_dir) / f"ref-logps-{name}.safetensors", key


def cache_dir(given: str) -> Path:
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "copg-kernels"


def read_cache(path: Path, key: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The cached (training, held-out) log-probs; CacheError where the file is not what its name says."""
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("key", "{}"))
            train, heldout = file.get_tensor("train"), file.get_tensor("heldout")
    except (SafetensorError, OSError, ValueError) as error:
        raise CacheError(f"{path}: not a readable cache of reference log-probs ({error}); delete it") from None
    differing = [name for name in key if saved.get(name) != key[name]]
    if differing:
        raise CacheError(f"{path}: a cache of reference log-probs of other {', '.join(differing)}; delete it")
    print(f"reference log-probs: {path}")
    return train, heldout


def write_cache(path: Path, key: dict[str, str], train: Tensor, heldout: Tensor) -> None:
    """The whole file or none: another run may read it at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({"train": train, "heldout": heldout}, partial, metadata={"key": json.dumps(key)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def weights_digest(model: Any) -> str:
    """sha256 over names, shapes, dtypes and every byte of the weights, and over the model's configuration."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for varying in ("_name_or_path", "transformers_version"):
        config.pop(varying, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def token_digest(groups: Sequence[Group]) -> str:
    ids = json.dumps([[group.prompt_ids, group.completion_ids] for group in groups])
    return hashlib.sha256(ids.encode()).hexdigest()


def _computed(run: Run, groups: Sequence[Group]) -> Tensor:
    size = run.config.prompts_per_step * ranks.size()  # a pass for each rank
    starts = tqdm(range(0, len(groups), size), desc="reference log-probs", disable=not ranks.is_first())
    return torch.cat([reference_logps(run, groups[start : start + size]) for start in starts]).cpu()
