"""TOFU: questions about authors who do not exist (Maini et al. 2024, arXiv 2401.06121).

Definitions are the paper's. Where published scripts differ from it, and from each other:

- An answer's probability is over its own tokens. The scripts count the end of text, and TOFU's the
  tag before the answer too, which any model foresees.
- The truth ratio has the arithmetic mean of the wrong answers' probabilities (the paper's equation
  1). TOFU's aggregation and OpenUnlearning take the geometric one, by averaging losses.
- A model's own answer has up to 200 new tokens; TOFU's 200 include the question and its padding.
- ROUGE-L recall is of words as they stand; the scripts stem them first.
- Nothing is drawn or left out: TOFU's script looks at the first 300 records of each set.
- Forget quality without a retain model's truth ratios is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate.answers import answer_losses, own_answers, read_rows, readable
from gradstore.evaluate.continuation import rouge_l_recall
from gradstore.evaluate.statistics import kolmogorov_smirnov

SETS = ("forget", "retain", "real_authors", "world_facts")
FIGURES = ("probability", "rouge_l", "truth_ratio")
TEMPLATE = "Question: {question}\nAnswer: {answer}"
SPLIT = "forget10"
LONGEST = 200

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what the truth ratio compares: a true answer and wrong ones.

    ``true`` is the answer in other words, or itself where there are none.
    """

    question: str
    answer: str
    true: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """A model's answers to a set, by record (n,).

    ``probability``: P(a|q)^(1/|a|), or of real authors and world facts its share among all answers
    offered; ``rouge_l``: recall; ``log_ratio``: log of the truth ratio, None without wrong answers.
    All are NaN where the question with one of its answers is longer than what the model reads.
    """

    probability: Array
    rouge_l: Array
    log_ratio: Array | None

    @property
    def read(self) -> NDArray[np.bool_]:
        """Which records the model could read."""
        return ~np.isnan(self.rouge_l)

    def only(self, which: NDArray[np.bool_]) -> Answers:
        """Those to some records."""
        ratios = None if self.log_ratio is None else self.log_ratio[which]
        return Answers(self.probability[which], self.rouge_l[which], ratios)


def read(folder: Path, split: str = SPLIT, records: int | None = None) -> dict[str, list[Question]]:
    """The sets that a folder has, of the published files; the first ``records`` of each.

    forget: ``SPLIT_perturbed.json``, else ``SPLIT.json``. retain: ``retain_perturbed.json``, else
    ``retainNN.json``, else ``full.json`` without what is forgotten. real_authors, world_facts:
    ``*_perturbed.json``, where they are. Raises :class:`DataError`.
    """
    share = split.removeprefix("forget")
    retain = f"retain{100 - int(share):02d}" if share.isdecimal() else None
    sets = {"forget": _first(folder, f"{split}_perturbed", split)}
    sets["retain"] = _first(folder, "retain_perturbed", retain)
    for name in SETS[2:]:
        sets[name] = _first(folder, f"{name}_perturbed")
    if sets["forget"] is None:
        raise DataError(
            f"{folder} has neither {split}_perturbed.json nor {split}.json: give the folder with "
            "TOFU's JSON files, and --split for another share to forget"
        )
    if sets["retain"] is None and (everything := _first(folder, "full")) is not None:
        forgotten = {each.question for each in sets["forget"]}
        sets["retain"] = [each for each in everything if each.question not in forgotten]
    return {name: found[:records] for name, found in sets.items() if found}


def _first(folder: Path, *names: str | None) -> list[Question] | None:
    """The questions of the first of these files that is there."""
    for name in names:
        if name is not None and (path := folder / f"{name}.json").is_file():
            rows = read_rows(path, ("question", "answer"))
            return [_question(path, number, row) for number, row in enumerate(rows, 1)]
    return None


def _question(path: Path, number: int, row: Mapping[str, Any]) -> Question:
    wrong = row.get("perturbed_answer", [])
    wrong = [wrong] if isinstance(wrong, str) else wrong
    true = row.get("paraphrased_answer", row["answer"])
    if not isinstance(wrong, list) or not all(isinstance(t, str) and t for t in [true, *wrong]):
        raise DataError(
            f"{path}, line {number}: perturbed_answer wants to be a list of texts, and "
            "paraphrased_answer a text"
        )
    return Question(row["question"], row["answer"], true, tuple(wrong))


def measure(
    model: Any, tokenizer: Any, sets: Mapping[str, list[Question]], template: str = TEMPLATE
) -> dict[str, Answers]:
    """A model's answers to every set, asked as ``template`` says (:func:`check_template`).

    What is longer than the model's context is not asked. Raises
    :class:`~gradstore.errors.EvaluateError`.
    """
    check_template(template)
    found = {}
    for name, questions in sets.items():
        fits = np.array([_fits(model, tokenizer, each, template) for each in questions])
        asked = [each for each, fit in zip(questions, fits, strict=True) if fit]
        answers = _measure(model, tokenizer, asked, template, choice=name in SETS[2:])
        if not all(each.wrong for each in questions):
            answers = replace(answers, log_ratio=None)
        found[name] = _spread(answers, fits)
    return found


def _fits(model: Any, tokenizer: Any, question: Question, template: str) -> bool:
    """Whether the model can read the question with each of its answers."""
    prompt = template.removesuffix("{answer}").replace("{question}", question.question)
    answers = [question.answer, question.true, *question.wrong]
    return bool(readable(model, tokenizer, [prompt] * len(answers), answers).all())


def _spread(answers: Answers, asked: NDArray[np.bool_]) -> Answers:
    """The answers to those asked at their places among all records."""

    def at_places(values: Array) -> Array:
        spread = np.full(len(asked), np.nan)
        spread[asked] = values
        return spread

    ratios = None if answers.log_ratio is None else at_places(answers.log_ratio)
    return Answers(at_places(answers.probability), at_places(answers.rouge_l), ratios)


def check_template(template: str) -> None:
    """Raise :class:`EvaluateError` unless it has {question}, and {answer} once, at its end."""
    head = template.removesuffix("{answer}")
    if head == template or "{answer}" in head or "{question}" not in head:
        raise EvaluateError(
            f"the template {template!r} wants to contain {{question}} and end in {{answer}}"
        )


def _measure(
    model: Any, tokenizer: Any, questions: list[Question], template: str, *, choice: bool
) -> Answers:
    head = template.removesuffix("{answer}")
    start = head.rstrip(" ")
    blank = head[len(start) :]  # is the answer's first token's, as tokenizers have it
    prompts = [start.replace("{question}", each.question) for each in questions]

    def losses(answers: list[str], of: list[str]) -> Array:
        return answer_losses(model, tokenizer, of, [blank + answer for answer in answers])

    own = losses([each.answer for each in questions], prompts)
    said = own_answers(model, tokenizer, prompts, LONGEST)
    rouge = [rouge_l_recall(s, each.answer) for s, each in zip(said, questions, strict=True)]
    if not all(each.wrong for each in questions):
        return Answers(np.exp(-own), np.array(rouge), None)
    true = losses([each.true for each in questions], prompts)
    counts = [len(each.wrong) for each in questions]
    repeated = [p for p, count in zip(prompts, counts, strict=True) for _ in range(count)]
    flat = losses([wrong for each in questions for wrong in each.wrong], repeated)
    wrong = np.split(flat, np.cumsum(counts)[:-1]) if counts else []
    # by logarithms: what was driven far away has a probability that no number can hold
    sums = np.array([np.logaddexp.reduce(-nats) for nats in wrong])
    probability = np.exp(-own - np.logaddexp(-own, sums)) if choice else np.exp(-own)
    return Answers(probability, np.array(rouge), sums - np.log(counts) + true)


def figure(name: str, of: Answers, metric: str) -> float | None:
    """A set's figure: the mean over its records that the model could read; None where none is.

    The truth ratio R is taken as min(R, 1/R) of the forgotten, nearest to 1 where true and wrong
    are alike, and as max(0, 1 - R) elsewhere, 1 where the truth is known.
    """
    of = of.only(of.read)
    if not len(of.rouge_l):
        return None
    if metric != "truth_ratio":
        return float(getattr(of, metric).mean())
    if of.log_ratio is None:
        return None
    if name == "forget":
        return float(np.exp(-np.abs(of.log_ratio)).mean())
    return float(np.maximum(0.0, -np.expm1(np.minimum(of.log_ratio, 0.0))).mean())


def model_utility(measured: Mapping[str, Answers]) -> float | None:
    """Harmonic mean of the nine figures of the sets that stay; None where one is missing."""
    found = [
        figure(name, measured[name], metric) if name in measured else None
        for name in SETS[1:]
        for metric in FIGURES
    ]
    kept = [value for value in found if value is not None]
    return harmonic_mean(kept) if len(kept) == len(found) else None


def forget_quality(measured: Mapping[str, Answers], retain: Mapping[str, Answers]) -> float | None:
    """p of the Kolmogorov-Smirnov test of a model's truth ratios of the forgotten, and a retain
    model's; None without wrong answers, or without records that both could read. The logarithms
    have the same p.
    """
    both = measured["forget"].read & retain["forget"].read
    ours, theirs = (of["forget"].only(both).log_ratio for of in (measured, retain))
    if ours is None or theirs is None or not both.any():
        return None
    return kolmogorov_smirnov(ours.tolist(), theirs.tolist())[1]


def table(
    measured: Mapping[str, Mapping[str, Answers]], reference: str | None = None
) -> list[dict[str, Any]]:
    """Rows of metric, set, records, skipped and a column for each model; ``reference`` names the
    retain model. Forget quality is a row only with one.

    Columns are of the same records, those that every model could read; ``skipped`` counts the rest.
    """
    first = next(iter(measured.values()))
    kept = {
        name: np.logical_and.reduce([of[name].read for of in measured.values()]) for name in first
    }
    alike = {
        model: {name: answers.only(kept[name]) for name, answers in of.items()}
        for model, of in measured.items()
    }
    counts = {
        name: {"set": name, "records": int(which.sum()), "skipped": int((~which).sum())}
        for name, which in kept.items()
    }
    rows = [
        {
            "metric": metric,
            **counts[name],
            **{model: figure(name, of[name], metric) for model, of in alike.items()},
        }
        for name in first
        for metric in FIGURES
    ]
    utilities = {model: model_utility(of) for model, of in alike.items()}
    none = {"set": None, "records": None, "skipped": None}
    rows.append({"metric": "model_utility", **none, **utilities})
    if reference is not None:
        qualities = {
            model: None if model == reference else forget_quality(of, alike[reference])
            for model, of in alike.items()
        }
        rows.append({"metric": "forget_quality", **counts["forget"], **qualities})
    return rows


def missing(sets: Mapping[str, list[Question]]) -> list[str]:
    """What the files that are there do not allow to say, in words."""
    complete = {name for name, of in sets.items() if all(each.wrong for each in of)}
    bare = [name for name in SETS if name not in complete]
    said = []
    if "forget" in bare:
        said.append(
            "The truth ratio of the forgotten, and forget quality, need wrong answers: the split's "
            "_perturbed.json."
        )
    if others := [f"{name}_perturbed.json" for name in bare if name != "forget"]:
        said.append(f"Model utility is the mean of nine figures: it needs {', '.join(others)} too.")
    return said
