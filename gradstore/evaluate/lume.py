"""LUME: stories, invented people and real ones (Ramakrishna et al. 2025, arXiv 2502.15097).

Definitions are those of SemEval-2025 task 4 (arXiv 2504.02883). Where its script differs:

- Every record counts once; the script pads what it spreads over processes, and counts those twice.
- Kinds are told by the id's last letters, whatever number follows; the script drops one digit.
- ROUGE-L recall is of words as they stand; the script stems them first.
- A task's figure that no record gives makes the aggregate None, not a mean over NaN.

MMLU has nothing to do with the records, so the challenge's final score, which has it as a third, is
not given; the two other thirds are (``task_aggregate`` and ``mia_score``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate.answers import own_answers, read_rows, readable
from gradstore.evaluate.continuation import rouge_l_recall
from gradstore.evaluate.loss import sample_losses
from gradstore.evaluate.statistics import auc
from gradstore.training.model import context_of

SETS = ("forget", "retain")
ALL = "all"  # the set where nothing says who is to be forgotten
PEOPLE = "Task2"  # the task of the invented people
KINDS = {"sc": "regurgitation", "qa": "knowledge"}
LONGEST = 256


@dataclass(frozen=True)
class Prompt:
    """What is asked: ``kind`` is regurgitation (go on with a text) or knowledge (a question)."""

    set: str
    task: str
    kind: str
    input: str
    output: str


@dataclass(frozen=True)
class Lume:
    """The benchmark as read; ``members`` and ``strangers`` are texts for membership, or none."""

    prompts: list[Prompt]
    members: list[str]
    strangers: list[str]


@dataclass(frozen=True)
class Result:
    """A model's scores, 0 to 1, one for each prompt, and the AUC of membership where asked.

    NaN is the score of a prompt that with its answer is longer than what the model reads.
    """

    scores: NDArray[np.float64]
    auc: float | None


def read(folder: Path, records: int | None = None) -> Lume:
    """The prompts of a folder, in one of two layouts; the first ``records`` of each set, task and
    kind.

    As the challenge published it: ``forget.jsonl`` and ``retain.jsonl`` in the folder or its
    ``data`` (id, input, output, task). As the benchmark's repository has the invented people of
    task 2: ``people.jsonl`` (id, prompt, target) and ``people_qa.jsonl`` (id, question, answer);
    nothing there says who is to be forgotten, so their set is ``all``. Texts for membership are
    ``member.jsonl`` and ``nonmember.jsonl`` (document), beside them or in ``mia_data``. Raises
    :class:`DataError`.
    """
    home = next((f for f in (folder, folder / "data") if (f / "forget.jsonl").is_file()), folder)
    if (home / "forget.jsonl").is_file():
        found = [each for name in SETS for each in _prompts(home / f"{name}.jsonl", name)]
    elif (home / "people.jsonl").is_file():
        found = _prompts(home / "people.jsonl", ALL, ("prompt", "target"), PEOPLE)
        found += _prompts(home / "people_qa.jsonl", ALL, ("question", "answer"), PEOPLE)
    else:
        raise DataError(
            f"{folder} has neither forget.jsonl nor people.jsonl: give the folder with LUME's "
            "forget.jsonl and retain.jsonl (lines with id, input, output and task), or with its "
            "people.jsonl (id, prompt, target) and people_qa.jsonl (id, question, answer)"
        )
    prompts, counts = [], Counter[tuple[str, ...]]()
    for each in found:
        counts[key := (each.set, each.task, each.kind)] += 1
        if records is None or counts[key] <= records:
            prompts.append(each)
    places = [f for f in (folder, folder / "mia_data", home) if (f / "member.jsonl").is_file()]
    texts = [
        [row["document"] for row in read_rows(places[0] / f"{name}.jsonl", ("document",))][:records]
        if places
        else []
        for name in ("member", "nonmember")
    ]
    return Lume(prompts, *texts)


def _prompts(
    path: Path, name: str, texts: tuple[str, str] = ("input", "output"), task: str | None = None
) -> list[Prompt]:
    """The prompts of one file: what is asked and expected by its names; each line's task, or one.

    An id's end says the kind.
    """
    prompts = []
    for number, row in enumerate(read_rows(path, ["id", *texts, *([] if task else ["task"])]), 1):
        if (kind := re.search(r"(sc|qa)\d+$", row["id"])) is None:
            raise DataError(
                f"{path}, line {number}: the id {row['id']!r} ends neither in sc nor in qa and a "
                "number"
            )
        asked, expected = (row[each] for each in texts)
        prompts.append(Prompt(name, task or row["task"], KINDS[kind[1]], asked, expected))
    return prompts


def measure(model: Any, tokenizer: Any, lume: Lume) -> Result:
    """ROUGE-L recall of each text's rest, exact match of each answer, and the membership's AUC.

    Both are of what greedy decoding says in at most 256 tokens up to the end of text; an answer
    matches where all of it does, but for case and white space around it. The AUC is of losses: 1
    says that members are known, 0 that they stand out. What is longer than the model's context is
    not asked. Raises :class:`~gradstore.errors.EvaluateError`.
    """
    inputs, outputs = ([getattr(p, name) for p in lume.prompts] for name in ("input", "output"))
    fits = readable(model, tokenizer, inputs, [f" {output}" for output in outputs])
    asked = [each for each, fit in zip(lume.prompts, fits, strict=True) if fit]
    said = own_answers(model, tokenizer, [each.input for each in asked], LONGEST)
    scores = np.full(len(fits), np.nan)
    scores[fits] = [_score(each, words) for each, words in zip(asked, said, strict=True)]
    found = None
    if lume.members:
        known, unknown = (_losses(model, tokenizer, t) for t in (lume.members, lume.strangers))
        found = auc(-known, -unknown)
    return Result(scores, found)


def _score(prompt: Prompt, said: str) -> float:
    if prompt.kind == "regurgitation":
        return rouge_l_recall(said, prompt.output)
    return float(said.strip().lower() == prompt.output.strip().lower())


def _losses(model: Any, tokenizer: Any, texts: Sequence[str]) -> NDArray[np.float64]:
    tokens = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    if not all(2 <= len(each) <= context_of(model) for each in tokens):
        raise EvaluateError(
            f"a text for membership has fewer than two tokens, or more than the "
            f"{context_of(model)} that the model reads"
        )
    return sample_losses(model, tokens).double().numpy()


def task_aggregate(figures: Mapping[tuple[str, str, str], float | None]) -> float | None:
    """Harmonic mean of every task's two figures of either set, those of the forgotten as 1 - x.

    ``figures`` are by set, task and kind. None where one is missing.
    """
    tasks = sorted({task for _, task, _ in figures})
    wanted = [(s, task, kind) for s in SETS for task in tasks for kind in KINDS.values()]
    found = [(key, value) for key in wanted if (value := figures.get(key)) is not None]
    if len(found) < len(wanted):
        return None
    return harmonic_mean([1 - value if key[0] == "forget" else value for key, value in found])


def mia_score(of: float) -> float:
    """1 - 2 |AUC - 1/2|: 1 where members cannot be told, 0 where they can, whichever way."""
    return 1 - 2 * abs(of - 0.5)


def table(lume: Lume, results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Rows of metric, set, task, records, skipped and a column for each model; task None is all
    tasks.

    Columns are of the same records, those that every model could read; ``skipped`` counts the rest.
    There is an aggregate where some are to be forgotten.
    """
    read = ~np.any([np.isnan(result.scores) for result in results.values()], axis=0)
    tasks = [*sorted({each.task for each in lume.prompts}), None]
    rows: list[dict[str, Any]] = []
    figures: dict[str, dict[tuple[str, str, str], float | None]] = {name: {} for name in results}
    for kind in KINDS.values():
        for of_set in (*SETS, ALL):
            for task in tasks:
                at = [
                    i
                    for i, each in enumerate(lume.prompts)
                    if (each.set, each.kind) == (of_set, kind) and task in (None, each.task)
                ]
                if not at:
                    continue
                asked = [i for i in at if read[i]]
                row: dict[str, Any] = {
                    "metric": kind,
                    "set": of_set,
                    "task": task,
                    "records": len(asked),
                    "skipped": len(at) - len(asked),
                }
                for name, result in results.items():
                    row[name] = fmean(result.scores[asked]) if asked else None
                    if task is not None:
                        figures[name][of_set, task, kind] = row[name]
                rows.append(row)
    bare = dict.fromkeys(("set", "task", "records", "skipped"))
    if any(each.set != ALL for each in lume.prompts):
        aggregates = {name: task_aggregate(of) for name, of in figures.items()}
        rows.append({"metric": "task_aggregate", **bare, **aggregates})
    if lume.members:
        aucs = {name: result.auc for name, result in results.items()}
        scores = {name: mia_score(a) for name, a in aucs.items() if a is not None}
        rows.append({"metric": "mia_auc", **bare, **aucs})
        rows.append({"metric": "mia_score", **bare, **scores})
    return rows


def missing(lume: Lume) -> list[str]:
    """What the files that are there do not allow to say, in words."""
    said = []
    tasks = {each.task for each in lume.prompts}
    if any(each.set == ALL for each in lume.prompts):
        said.append(
            "These files are LUME's task 2 alone and do not say who is to be forgotten: the "
            "figures are of everyone, and there is no aggregate, which needs forget.jsonl and "
            "retain.jsonl."
        )
    elif len(tasks) < 3:
        said.append(
            f"LUME has three tasks; the aggregate is over {', '.join(sorted(tasks))} alone, so do "
            "not compare it with published ones."
        )
    if not lume.members:
        said.append(
            "Membership needs texts never trained on, which the retained are not: member.jsonl and "
            "nonmember.jsonl."
        )
    return said
