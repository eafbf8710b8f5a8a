"""Near-duplicates of a record: what would go on teaching a model what it is to forget.

A store keeps token ids, not text, so texts are compared as sequences of ids: by their shingles and
by their common subsequence. A third measure compares the gradients they were first met with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import nlargest
from itertools import groupby
from typing import Any

import numpy as np
import torch
from datasketch import MinHash, MinHashLSH
from jaxtyping import Float
from numpy.typing import NDArray
from rapidfuzz.distance import Indel
from torch import Tensor

from gradstore.errors import IdError
from gradstore.factored import FactoredGradient, Term
from gradstore.store import catalog
from gradstore.store.store import Store

COMMON_SHARE, COMMON_COUNT = 0.01, 10  # a shingle of more records than both is boilerplate
NEAREST = 20  # records by the input side of the gradient whose whole gradients are compared
_PERMUTATIONS = 128
_STEEPEST = 0.9  # the highest threshold that an index of so many permutations serves
_SURPLUS, _MISSED = 0.1, 0.9  # how bad a candidate too many is, and one too few

Tokens = NDArray[np.integer[Any]]
Shingles = NDArray[np.int64]
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Thresholds:
    """From where on each measure, in 0 … 1, speaks for near-duplicates.

    ``edit`` confirms, but does not suffice: one form filled in for two people comes to 0.7 or more.
    """

    jaccard: float = 0.5
    edit: float = 0.8
    cosine: float = 0.6


@dataclass(frozen=True)
class Match:
    """``id`` is a near-duplicate of ``of``, say the measures named in ``by``.

    ``cosine`` is None where ``of`` was held out: it has no gradient.
    """

    id: str
    of: str
    jaccard: float
    edit: float
    cosine: float | None
    by: tuple[str, ...]

    def __str__(self) -> str:
        said = "" if self.cosine is None else f", cosine {self.cosine:.2f}"
        return (
            f"{self.id} is a near-duplicate of {self.of} by {' and '.join(self.by)} "
            f"(jaccard {self.jaccard:.2f}, edit {self.edit:.2f}{said})"
        )


def near_duplicates(
    store: Store,
    ids: Sequence[str],
    thresholds: Thresholds | None = None,
    *,
    run: str | int | None = None,
) -> list[Match]:
    """Records a run was trained on that shingles or gradients find near one of ``ids``.

    ``ids``, or unambiguous beginnings of ids, may be trained on or held out; ``run`` is a name or
    number, by default the newest. In the order of ``ids``, the nearest first. Raises
    :class:`IdError` for an unknown id or run, or an id that the run did not meet.

    Candidates are what a MinHash index gives (0.3 ms a record of a hundred tokens), and the
    gradients nearest by their input side, which all records are scanned for, a segment at a time:
    that finds what shingles miss. At GPT-2 small's width the input side takes 0.8 ms a record, the
    whole gradient of a tied embedding 65 ms, so only candidates are compared by that.
    """
    thresholds = thresholds or Thresholds()
    facts, asked = store.run(run), store.resolve(ids)
    weight = _adam_weight(store, facts)
    held = store.tokens(list(asked.values()), facts["run_id"])
    for of, number in asked.items():
        if number not in held:
            raise IdError(
                f"{of!r} is not in {facts['name']}: name a run that met it with --run "
                f"(`gradstore show {of}` lists them)"
            )
    trained, near = _scan(store, facts["run_id"], asked, weight)
    texts = {of: held[number].numpy() for of, number in asked.items()} | trained
    common = _common([shingles(text) for text in trained.values()])
    shingled = {id: shingles(text, common) for id, text in texts.items()}
    alike = _alike(shingled, trained, asked, thresholds.jaccard)
    matches = []
    for of, number in asked.items():
        nearest = nlargest(NEAREST, near[of], key=near[of].__getitem__)
        numbers = store.resolve(sorted({*alike[of], *nearest} - {of}))
        cosines = _cosines(store, facts["run_id"], number, numbers, weight)
        found = []
        for id in numbers:
            measured = (
                jaccard(shingled[id], shingled[of]),
                edit(texts[id], texts[of]),
                cosines.get(id),
            )
            by = tuple(
                name
                for (name, least), value in zip(asdict(thresholds).items(), measured, strict=True)
                if value is not None and value >= least
            )
            if {"jaccard", "cosine"} & set(by):
                found.append(Match(id, of, *measured, by))
        matches += sorted(found, key=lambda m: -max(m.jaccard, m.edit, m.cosine or 0.0))
    return matches


def record_matches(
    store: Store, matches: Sequence[Match], thresholds: Thresholds, run: str | int | None = None
) -> None:
    """Add rows to the catalog's table ``matches``; nothing for no matches."""
    if not matches:
        return
    run_id, count = store.run(run)["run_id"], len(matches)
    numbers = store.resolve(name for match in matches for name in (match.id, match.of))
    columns = {
        "run_id": [run_id] * count,
        "sample_id": [numbers[match.id] for match in matches],
        "of_sample_id": [numbers[match.of] for match in matches],
        "jaccard": [match.jaccard for match in matches],
        "edit": [match.edit for match in matches],
        "cosine": [match.cosine for match in matches],
        "measures": [list(match.by) for match in matches],
        **{f"{name}_from": [at] * count for name, at in asdict(thresholds).items()},
        "created_at": [catalog.now()] * count,
    }
    with store.transaction() as connection:
        catalog.check_there(connection, [*columns["sample_id"], *columns["of_sample_id"]])
        catalog.insert(connection, "matches", columns)


# -- measures --------------------------------------------------------------------------------


def shingles(tokens: Tokens, common: Shingles | None = None) -> Shingles:
    """The distinct pairs of consecutive tokens of a text (t,), as sorted numbers (n,).

    Without those in ``common``, unless nothing else is left. Pairs, because facts are a few tokens
    long: of longer shingles, a rearranged text shares too few.
    """
    tokens = tokens.astype(np.int64)
    found = np.unique(tokens[:-1] << 32 | tokens[1:])
    rare = found if common is None else np.setdiff1d(found, common, assume_unique=True)
    return rare if len(rare) else found


def jaccard(a: Shingles, b: Shingles) -> float:
    """Resemblance |a ∩ b| / |a ∪ b|, 0 … 1; 1 for two empty sets.

    Broder, "On the resemblance and containment of documents", 1997.
    """
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def edit(a: Tokens, b: Tokens) -> float:
    """Share of two texts that lies in their longest common subsequence, 0 … 1."""
    return Indel.normalized_similarity(a.tolist(), b.tolist())


def cosine(a: FactoredGradient, b: FactoredGradient) -> float:
    """⟨a, b⟩ / (|a| |b|) from the factors; 0 where one of them is 0."""
    norms = a.norm() * b.norm()
    return a.dot(b) / norms if norms else 0.0


# -- inside ----------------------------------------------------------------------------------


def _common(texts: Sequence[Shingles]) -> Shingles:
    """Shingles of too many records to tell them apart.

    Two people in one form are no near-duplicates, one person in two forms is. Left out as in
    Broder et al., "Syntactic clustering of the web", 1997.
    """
    found, counts = np.unique(np.concatenate([_NONE, *texts]), return_counts=True)
    return found[counts > max(COMMON_COUNT, COMMON_SHARE * len(texts))]


def _alike(
    shingled: Mapping[str, Shingles], among: Iterable[str], asked: Iterable[str], threshold: float
) -> dict[str, list[str]]:
    """For each id asked for, those among the others that an LSH index takes for alike."""
    index = MinHashLSH(min(threshold, _STEEPEST), _PERMUTATIONS, weights=(_SURPLUS, _MISSED))
    for id in among:
        index.insert(id, _signature(shingled[id]))
    return {of: index.query(_signature(shingled[of])) for of in asked}


def _signature(of: Shingles) -> MinHash:
    signature = MinHash(_PERMUTATIONS)
    signature.update_batch([shingle.tobytes() for shingle in of])
    return signature


def _scan(
    store: Store, run_id: int, asked: Mapping[str, int], weight: Float[Tensor, " V"]
) -> tuple[dict[str, Tokens], dict[str, dict[str, float]]]:
    """Tokens of every record, and the cosines of its gradient's input side with those asked for."""
    rows = store.rows(
        """SELECT segment_id, id, row_start, "rows", token_start
           FROM exposures JOIN samples USING (sample_id) WHERE run_id = ?
           QUALIFY row_number() OVER (PARTITION BY sample_id ORDER BY epoch) = 1
           ORDER BY segment_id, row_start""",
        [run_id],
    )
    shape = store.model.vocabulary, store.model.width
    wanted = {
        record.exposure.id: _weighted(record.gradient(store.model, sides="input"), weight)
        for record in store.records(list(asked.values()), run_id, first_only=True)
    }
    texts: dict[str, Tokens] = {}
    near: dict[str, dict[str, float]] = {of: {} for of in asked}
    for segment_id, places in groupby(rows, key=lambda row: row[0]):
        segment = store.segment(segment_id)
        D, tokens = segment.tensor("D"), segment.tensor("tokens")  # noqa: N806
        for _, id, row, count, token in places:
            text = tokens[token : token + count + 1]
            side = FactoredGradient([Term.one_hot(text[:-1], D[row : row + count])], shape)
            texts[id], side = text.numpy(), _weighted(side, weight)
            for of, gradient in wanted.items():
                near[of][id] = cosine(side, gradient)
    return texts, near


def _cosines(
    store: Store, run_id: int, of: int, others: Mapping[str, int], weight: Float[Tensor, " V"]
) -> dict[str, float]:
    """Cosines of whole first gradients; none where ``of`` has no gradient."""
    records = store.records([of, *others.values()], run_id, first_only=True)
    gradients = (
        (record.exposure.id, _weighted(record.gradient(store.model), weight)) for record in records
    )
    id, first = next(gradients, (None, None))
    if first is None or id in others:
        return {}
    return {id: cosine(first, gradient) for id, gradient in gradients}


def _adam_weight(store: Store, run: Mapping[str, Any]) -> Float[Tensor, " V"]:
    """What the rows of a gradient are multiplied by before two are compared.

    Adam divides by √v, so ⟨g, g′/√v⟩ is how far a step on one record moves the loss of the other.
    Without v, what all records teach alike outweighs what tells them apart. Averaged over each row,
    it leaves the factors thin. All ones where the run kept no second moments (SGD).
    """
    for moment in ("first-epoch", "end"):
        if kept := store.moments(run["run_id"], "embedding", moment):
            root: Tensor = kept[0].mean(dim=1).sqrt() + run["epsilon"]
            return root.rsqrt()
    return torch.ones(store.model.vocabulary)


def _weighted(gradient: FactoredGradient, weight: Float[Tensor, " V"]) -> FactoredGradient:
    """The gradient with its rows multiplied by ``weight``."""
    return FactoredGradient(
        (
            Term(t.index, t.value * (weight if t.index is None else weight[t.index]), t.B)
            for t in gradient.terms
        ),
        gradient.shape,
    )
