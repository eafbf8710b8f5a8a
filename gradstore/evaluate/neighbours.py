"""Who a step is about to hit, of those that stay: the overlap of stored gradients with it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.evaluate.audience import Audience
from gradstore.influence.lens import Lens
from gradstore.influence.rows import Place
from gradstore.influence.scan import score_segment
from gradstore.store.manifest import segment_path
from gradstore.store.record import Sides
from gradstore.store.store import Store

NEIGHBOURS_MEASURED, NEIGHBOURS_AMONG = 16, 1024


def with_neighbours(
    audience: Audience,
    store: Store,
    run: dict[str, Any],
    update: Float[Tensor, "V d"],
    seed: int,
    held: Collection[int] = (),
) -> Audience:
    """An audience and those that an update of the embedding will hit most, as ``neighbour``.

    They are looked for among ``NEIGHBOURS_AMONG`` samples that stay and are not measured yet; not
    those ``held`` that the update was made to spare.
    """
    others = [number for number in audience.others(store, run) if number not in held]
    return _with_hit(audience, store, run, update, others, seed)


def with_exposed(audience: Audience, store: Store, run: dict[str, Any], seed: int) -> Audience:
    """An audience and those of all that stay that lie nearest to the forgotten, as ``neighbour``.

    Nearest: their loss per token rises most, to first order, in a step along the sum of the last
    stored gradients of the forgotten. That asks for no checkpoint, so evaluations of several have
    the same neighbours. They are looked for among ``NEIGHBOURS_AMONG`` samples that ``seed`` draws;
    one of them may be among the retained as well. None if the forgotten have no stored gradients.
    """
    forgotten = [audience.numbers[audience.members[at][0]] for at in audience.of("forget")]
    last = {record.exposure.id: record for record in store.records(forgotten, run["run_id"])}
    if not last:
        return audience
    update = torch.zeros(store.model.vocabulary, store.model.width)
    for record in last.values():
        record.gradient(store.model).add_to(update)
    return _with_hit(audience, store, run, update, audience.staying(store, run), seed)


def _with_hit(
    audience: Audience,
    store: Store,
    run: dict[str, Any],
    update: Float[Tensor, "V d"],
    others: Sequence[int],
    seed: int,
) -> Audience:
    hit = most_exposed(store, run, update, _drawn(others, seed), NEIGHBOURS_MEASURED)
    tokens = store.tokens(hit, run["run_id"])
    rows = store.rows("SELECT sample_id, id FROM samples WHERE list_contains(?, sample_id)", [hit])
    names = dict(rows)
    return audience.joined(
        [(names[number], "neighbour") for number in hit],
        {names[number]: number for number in hit},
        [tokens[number] for number in hit],
    )


def nearest_first(
    audience: Audience,
    store: Store,
    run: dict[str, Any],
    update: Float[Tensor, "V d"],
    count: int,
    seed: int,
) -> list[int]:
    """Samples that stay to hold a direction by: those that ``update`` would hit most, then others.

    They are looked for as :func:`with_neighbours` does; where there are not enough that nobody
    measures, :meth:`Audience.strangers` are added.
    """
    drawn = _drawn(audience.others(store, run), seed)
    hit = most_exposed(store, run, update, drawn, count)
    more = [n for n in audience.strangers(store, run, count, seed) if n not in hit]
    return hit + more[: count - len(hit)]


def _drawn(others: Sequence[int], seed: int) -> list[int]:
    return random.Random(seed).sample(others, min(NEIGHBOURS_AMONG, len(others)))


def most_exposed(
    store: Store,
    run: Mapping[str, Any],
    update: Float[Tensor, "V d"],
    sample_ids: Sequence[int],
    count: int,
) -> list[int]:
    """Of some samples the ``count`` whose loss per token the update raises most, the worst first.

    To first order, by ⟨g, u⟩ with the last stored gradient g of each. One scan of their records.
    """
    rows = store.rows(
        """SELECT path, sample_id, scored_tokens, row_start, e."rows", token_start, tail_row
           FROM exposures e JOIN segments USING (segment_id)
           WHERE e.run_id = ? AND list_contains(?, sample_id)
           QUALIFY row_number() OVER (PARTITION BY sample_id ORDER BY epoch DESC) = 1
           ORDER BY path, row_start""",
        [run["run_id"], list(sample_ids)],
    )
    rises: list[tuple[float, int]] = []
    lens = Lens.dense(update)
    # an untied head's factors are another weight's
    sides: Sides | None = None if store.model.tied else "input"
    for path, of_segment in groupby(rows, key=lambda row: row[0]):
        found = list(of_segment)
        places = [Place(*row[3:]) for row in found]
        where = segment_path(store.root, path)
        overlaps = score_segment(where, places, [lens], sides)[:, 0].tolist()
        rises += [(o / row[2], row[1]) for o, row in zip(overlaps, found, strict=True)]
    return [number for _, number in sorted(rises, reverse=True)[:count]]
