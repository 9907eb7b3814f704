"""Real text that every installation has: the docstrings of the packages this project runs on.

A docstring's body is the prompt and its summary line the best completion; the other completions are summary
lines of other docstrings, rewarded by the words they share with the true one. Sources are parsed, never
imported, and visited in a fixed order, so the same installation gives the same file.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from train.data import Example
from train.reward import token_f1, words

PACKAGES = ("torch", "numpy", "transformers")
# About thirteen seconds of parsing.
FILES_PER_PACKAGE = 600
BODY_WORDS = 60


def source_roots() -> list[Path]:
    """The standard library and those of PACKAGES that are installed."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    return roots


def source_files(root: Path, limit: int = FILES_PER_PACKAGE) -> list[Path]:
    """Up to `limit` files: every n-th, so that all parts of a package are represented."""
    files = (path for path in root.rglob("*.py") if "site-packages" not in path.relative_to(root).parts)
    # Sorted by parts as text: the order then depends on the installation alone, not on the file system.
    paths = sorted(files, key=lambda path: path.relative_to(root).as_posix())
    return paths[:: max(1, -(-len(paths) // limit))]


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and its functions; none where the file does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(body, summary line) of a docstring with one line of summary and a body worth reading, else None."""
    summary, _, body = docstring.strip().partition("\n\n")
    body_words = body.split()
    if "\n" in summary or not 3 <= len(summary.split()) <= 24 or len(body_words) < 12:
        return None
    return " ".join(body_words[:BODY_WORDS]), summary


def is_told_by(body: str, summary: str) -> bool:
    """Whether the body has two fifths of the summary's longer words; with none, nothing points to it."""
    longer = {word for word in words(summary) if len(word) > 3}
    return len(longer & set(words(body))) >= max(1, 0.4 * len(longer))


def summaries_by_body(files_per_package: int = FILES_PER_PACKAGE) -> dict[str, str]:
    """body -> summary; a body or a summary that was seen before is left out."""
    pairs: dict[str, str] = {}
    seen = set()
    for root in source_roots():
        for path in source_files(root, files_per_package):
            for docstring in docstrings(path):
                pair = split_docstring(docstring)
                if pair and is_told_by(*pair) and pair[0] not in pairs and pair[1] not in seen:
                    pairs[pair[0]] = pair[1]
                    seen.add(pair[1])
    return pairs


def docstring_examples(num_prompts: int, group_size: int, seed: int) -> list[Example]:
    """Up to num_prompts prompts, each with its own summary line and group_size - 1 lines of others."""
    pairs = summaries_by_body()
    if group_size > len(pairs):
        raise ValueError(f"--group-size {group_size}, but there are only {len(pairs)} docstrings")
    rng = random.Random(seed)
    bodies = rng.sample(list(pairs), min(num_prompts, len(pairs)))
    summaries = list(pairs.values())
    examples = []
    for body in bodies:
        truth = pairs[body]
        others = [line for line in rng.sample(summaries, group_size) if line != truth][: group_size - 1]
        completions = [truth, *others]
        # The loss does not care about the order; shuffled, nothing else can come to depend on it.
        rng.shuffle(completions)
        # The newline tells the model where the prompt ends: a body holds none.
        examples.append(Example(body + "\n", completions, [token_f1(line, truth) for line in completions]))
    return examples
