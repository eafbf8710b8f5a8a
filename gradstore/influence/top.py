"""Which stored records shaped an output: every captured gradient scored against a query's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.errors import InfluenceError, SettingsError
from gradstore.influence.exposed import Exposed, check_found, exposures
from gradstore.influence.layers import layers_segment
from gradstore.influence.lens import Lens, Precision, lenses, precision_for
from gradstore.influence.nominate import Search, nominated, open_search
from gradstore.influence.norms import norms_segment
from gradstore.influence.query import Query, Replaced
from gradstore.influence.rows import MEMORY
from gradstore.influence.scale import root_of_second_moment
from gradstore.influence.scan import contributions, score_segment
from gradstore.store.distant import anywhere
from gradstore.store.record import Sides
from gradstore.store.segment import Source
from gradstore.store.store import Store

Method = Literal["dot", "cosine", "self"] | Replaced
Executor = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Settings:
    """How records are scored.

    ``dot``     Σ over the stored epochs of w · ⟨g, q⟩: TracInCP (Pruthi et al. 2020,
                arXiv 2002.08484, §3.3) with w = learning rate × share of the batch × clipping, so
                that w · g is the step that plain gradient descent took on the record. In nats of
                the query's summed loss, to first order; positive: the record's steps lowered it.
                A stored query has the gradient of the same epoch, one at a checkpoint that of the
                checkpoint in all.
    ``cosine``  the mean over the epochs of ⟨g, q⟩ / (|g| |q|).
    ``self``    Σ w · ⟨g, g⟩, what a record's steps took off its own loss (ibid., §4.1); no query.
    ``hvp``, ``newton``, ``activation``
                Σ w · ⟨g, x⟩, x the query bent by curvature, or its activations
                (:mod:`gradstore.influence.solved`, :mod:`gradstore.influence.activation`). To be
                compared with each other; they are no nats.

    ``adam`` divides each entry of the query by √v̂ + ε, v̂ being Adam's second moment at the end of
    the run, so that what is summed is the effect of the step that Adam took. ``epochs`` is
    ``first``, ``all``, ``every:N`` or a list; ``sides="input"`` leaves a tied head out.

    ``precision`` of products with thin queries (:mod:`gradstore.influence.lens`): None is bfloat16
    where records are stored so and the device multiplies it, else float32. :class:`Scores` say
    which it was.

    ``device`` is where products with queries are made, and queries take room, if no executor takes
    them elsewhere; norms and sketches are the processor's.

    ``coarse`` scores in two stages: sketches nominate so many records for each query, only those
    are scored, and exactly. A record that they miss is missing from the answer.
    """

    method: Method = "dot"
    adam: bool = False
    epochs: str = "all"
    sides: Sides | None = None
    coarse: int | None = None
    precision: Precision | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Scores:
    """Records' scores, the highest first; ``query`` is None for ``self``, which has ``norms`` too:
    of each record the mean ‖g‖ of its gradients.
    """

    run: dict[str, Any]
    settings: Settings
    query: Query | None
    sample_ids: list[int]
    values: list[float]
    norms: list[float] | None = None

    def without(self, sample_ids: Collection[int]) -> Scores:
        """The scores of the others."""
        kept = [n for n, sample in enumerate(self.sample_ids) if sample not in sample_ids]
        return replace(
            self,
            sample_ids=[self.sample_ids[n] for n in kept],
            values=[self.values[n] for n in kept],
            norms=None if self.norms is None else [self.norms[n] for n in kept],
        )


def influences(
    store: Store,
    queries: Sequence[Query],
    settings: Settings | None = None,
    *,
    run: str | int | None = None,
    memory: int = MEMORY,
    executor: Executor = map,
    search: Search | None = None,
) -> list[Scores]:
    """Score every record that a run stored against each query; for ``self`` there is none.

    A ``search`` that is open already saves opening the run's sketches for ``settings.coarse``.
    ``executor`` maps a pure, picklable function over the segments, as the built-in ``map`` does.
    Reading holds ``memory`` bytes at most. Raises :class:`InfluenceError` for what the store cannot
    answer and :class:`IdError` for an unknown run.
    """
    settings, facts = settings or Settings(), store.run(run)
    if executor is not map and settings.device != "cpu":
        raise SettingsError(
            f"segments that an executor reads are multiplied there, by processors, not on "
            f"{settings.device}: leave --device out, or --executor"
        )
    precision = settings.precision or precision_for(store.format.dtype, settings.device)
    settings = replace(settings, precision=precision)
    _check(store, facts, queries, settings)
    if settings.coarse is not None:
        return _in_two_stages(store, facts, queries, settings, memory, executor, search)
    exposed = exposures(store, facts, settings.epochs, queries)
    return _scored(store, facts, queries, settings, exposed, memory, executor)


def tokens_of(
    store: Store, scores: Scores, sample_ids: Sequence[int], *, memory: int = MEMORY
) -> dict[int, Float[Tensor, "t 2"]]:
    """What each position of some records adds to their scores; float64, summed over the epochs.

    The first column is of the token read there, the second of the prediction made there (0 where
    the output side is not used). Raises :class:`SettingsError` for ``cosine`` and ``self``.
    """
    settings, query = scores.settings, scores.query
    if query is None or settings.method == "cosine":
        raise SettingsError("scores by cosine and self are no sums over tokens: give --method dot")
    if query.beside:
        raise SettingsError("tokens have parts in the embedding's score alone: leave --layers out")
    divisor, sides = _divisor(store, scores.run, settings), _sides(store, settings)
    found: dict[int, Tensor] = {}
    exposed = exposures(store, scores.run, settings.epochs, [query], sample_ids)
    everywhere = None in query.gradients
    in_order = sorted(exposed, key=lambda each: each.epoch)
    for epoch, of_epoch in groupby(in_order, lambda each: 0 if everywhere else each.epoch):
        [lens] = lenses(
            [_gradient(query, epoch)], divisor, _precision(settings), sides
        )  # it may take as long as a scan
        lens = lens.to(settings.device)
        for each in of_epoch:
            segment = store.segment(each.segment)
            parts = each.weight * contributions(segment, each.place, lens, sides, memory)
            found[each.sample_id] = found.get(each.sample_id, 0) + parts
    return found


# -- inside ----------------------------------------------------------------------------------


def _check(
    store: Store, run: Mapping[str, Any], queries: Sequence[Query], settings: Settings
) -> None:
    method, replaced = settings.method, settings.method in get_args(Replaced)
    if settings.adam and method != "dot":
        raise SettingsError(
            f"--adam weighs the products of --method dot, not those of {method}; leave it out"
        )
    if replaced and settings.sides is not None:
        raise SettingsError(
            f"--method {method} is of the whole embedding: leave --side {settings.sides} out"
        )
    if method == "activation" and not (store.model.tied and run["sides"] == "both"):
        kept = "stored the input side alone" if store.model.tied else "has an untied head"
        raise InfluenceError(
            f"activations meet the head's side of a tied embedding's gradients, and {run['name']} "
            f"{kept}; give another --method"
        )
    for query in queries:
        if query.beside and method != "hvp":
            raise SettingsError(f"--layers belong to --method hvp, not to {method}")
        if query.replaced != (method if replaced else None):
            raise InfluenceError(
                f"{query.name} was made for --method {query.replaced or 'dot'}, not for {method}; "
                "gradstore.influence.query.Query says what makes one"
            )


def _in_two_stages(
    store: Store,
    run: dict[str, Any],
    queries: Sequence[Query],
    settings: Settings,
    memory: int,
    executor: Executor,
    search: Search | None,
) -> list[Scores]:
    """Exact scores of the records that sketches nominate for each query."""
    if settings.adam or settings.method not in ("dot", "cosine") or settings.sides is not None:
        raise SettingsError(
            "sketches are of whole gradients as they are: they nominate for --method dot and "
            "cosine, without --adam and with both sides; leave --coarse out"
        )
    cosine, count = settings.method == "cosine", settings.coarse or 0
    search = search or open_search(store, run)
    chosen = nominated(search, queries, count, epochs=settings.epochs, cosine=cosine)
    found = []
    for query, among in zip(queries, chosen, strict=True):
        exposed = search.exposed(among, settings.epochs, query)
        check_found(exposed, run, settings.epochs)
        found += _scored(store, run, [query], settings, exposed, memory, executor)
    return found


def _scored(
    store: Store,
    run: dict[str, Any],
    queries: Sequence[Query],
    settings: Settings,
    exposed: Sequence[Exposed],
    memory: int,
    executor: Executor,
) -> list[Scores]:
    """Exact scores of the records that were exposed so."""
    if settings.method == "self":
        norms = _norms(store, exposed, settings, memory, executor)
        ranked = _ranked(run, settings, None, exposed, norms.square())
        of = _ranked(run, settings, None, exposed, norms, mean=True)
        known = dict(zip(of.sample_ids, of.values, strict=True))
        return [replace(ranked, norms=[known[sample] for sample in ranked.sample_ids])]
    products = _products(store, run, exposed, queries, settings, memory, executor)
    for number, query in enumerate(queries):
        if query.beside:
            beside = {name: of.to(settings.device) for name, of in query.beside.items()}
            over = partial(layers_segment, layers=query.layers, query=beside)
            products[:, number] += _by_segment(store, exposed, over, executor)
    if settings.method == "cosine":
        norms = _norms(store, exposed, settings, memory, executor)
        products /= norms[:, None].clamp(min=1e-30)
        for epoch in {e.epoch for e in exposed}:
            rows = torch.tensor([e.epoch == epoch for e in exposed])
            lengths = [max(_gradient(query, epoch).norm(), 1e-30) for query in queries]
            products[rows] /= torch.tensor(lengths, dtype=torch.float64)
    return [
        _ranked(
            run, settings, query, exposed, products[:, number], mean=settings.method == "cosine"
        )
        for number, query in enumerate(queries)
    ]


def _products(
    store: Store,
    run: Mapping[str, Any],
    exposed: Sequence[Exposed],
    queries: Sequence[Query],
    settings: Settings,
    memory: int,
    executor: Executor,
) -> Float[Tensor, "exposed queries"]:
    """⟨g, q⟩ of each stored gradient with each query's of the same epoch; float64."""
    products = torch.empty(len(exposed), len(queries), dtype=torch.float64)
    divisor, sides = _divisor(store, run, settings), _sides(store, settings)
    numbers = sorted(range(len(exposed)), key=lambda n: exposed[n].epoch)
    everywhere = all(None in query.gradients for query in queries)
    for epoch, of_epoch in groupby(numbers, lambda n: 0 if everywhere else exposed[n].epoch):
        rows, column = list(of_epoch), 0
        through_all = lenses(
            [_gradient(q, epoch) for q in queries], divisor, _precision(settings), sides
        )
        for through in _affordable(through_all, memory):
            there = [lens.to(settings.device) for lens in through]
            score = partial(score_segment, through=there, sides=sides, memory=memory)
            found = _by_segment(store, [exposed[n] for n in rows], score, executor)
            products[rows, column : column + found.shape[1]] = found
            column += found.shape[1]
    return products


def _affordable(through: Iterable[Lens], memory: int) -> Iterable[list[Lens]]:
    """Lenses that together take no more than half of the memory, unless one alone does."""
    together: list[Lens] = []
    for lens in through:
        if together and sum(each.nbytes for each in together) + lens.nbytes > memory // 2:
            yield together
            together = []
        together.append(lens)
    yield together


def _norms(
    store: Store, exposed: Sequence[Exposed], settings: Settings, memory: int, executor: Executor
) -> Float[Tensor, " exposed"]:
    norms = partial(norms_segment, sides=_sides(store, settings), memory=memory)
    return _by_segment(store, exposed, norms, executor)


def _by_segment(
    store: Store, exposed: Sequence[Exposed], function: Callable[..., Tensor], executor: Executor
) -> Tensor:
    """A function of a segment and places in it, mapped over segments; results in order."""
    order = sorted(range(len(exposed)), key=lambda n: exposed[n].segment)
    groups = [list(of) for _, of in groupby(order, lambda n: exposed[n].segment)]
    numbers = [exposed[group[0]].segment for group in groups]
    sources: Iterable[Source] = map(store.segment, numbers)  # one after another: few stay open
    if executor is not map:  # elsewhere, or at once
        names = dict(store.rows("SELECT segment_id, path FROM segments"))
        sources = anywhere(store, [names[number] for number in numbers])
    places = [[exposed[n].place for n in group] for group in groups]
    found = torch.cat(list(executor(function, sources, places)))
    return found[torch.tensor(order).argsort()]


def _sides(store: Store, settings: Settings) -> Sides | None:
    """An untied head's factors are another weight's."""
    return settings.sides if store.model.tied else "input"


def _gradient(query: Query, epoch: int) -> Any:
    gradient = query.at(epoch)
    assert gradient is not None  # epochs without one are not scored
    return gradient


def _precision(settings: Settings) -> Precision:
    assert settings.precision is not None  # influences() has chosen one
    return settings.precision


def _divisor(
    store: Store, run: Mapping[str, Any], settings: Settings
) -> Float[Tensor, "V d"] | None:
    """√v̂ + ε at the end of the run, if it is asked for."""
    if not settings.adam:
        return None
    known = root_of_second_moment(store, run)
    if known is None:
        raise InfluenceError(
            f"{run['name']} kept no second moments at its end (optimizer {run['optimizer']}); "
            "leave --adam out"
        )
    return known[0] + known[1]


def _ranked(
    run: dict[str, Any],
    settings: Settings,
    query: Query | None,
    exposed: Sequence[Exposed],
    products: Float[Tensor, " exposed"],
    *,
    mean: bool = False,
) -> Scores:
    """Each record's sum over its exposures, weighted, or their ``mean``, the highest first."""
    totals: dict[int, float] = {}
    counts: dict[int, int] = {}
    for each, product in zip(exposed, products.tolist(), strict=True):
        weight = 1.0 if mean else each.weight
        totals[each.sample_id] = totals.get(each.sample_id, 0.0) + weight * product
        counts[each.sample_id] = counts.get(each.sample_id, 0) + 1
    if mean:
        totals = {sample: total / counts[sample] for sample, total in totals.items()}
    order = sorted(totals, key=lambda sample: (-totals[sample], sample))
    return Scores(run, settings, query, order, [totals[sample] for sample in order])
