"""Which samples that stay hold a direction: those that share rare tokens, and some others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.evaluate.audience import Audience
from gradstore.store.store import Store


@dataclass(frozen=True)
class Held:
    """Samples that stay, by their numbers, in two strata.

    ``relatives`` were chosen, ``others`` drawn from all the rest; ``share`` is the relatives' part
    of the predictions of all that stay, by which a mean over them is made of the strata's means.
    """

    relatives: Sequence[int] = ()
    others: Sequence[int] = ()
    share: float = 0.0

    @property
    def everyone(self) -> list[int]:
        """Both strata."""
        return [*self.relatives, *self.others]

    @property
    def strata(self) -> list[tuple[float, Sequence[int]]]:
        """Those that are not empty, each with its part of the whole."""
        parts = ((self.share, self.relatives), (1 - self.share, self.others))
        return [(part, numbers) for part, numbers in parts if numbers]


NOBODY = Held()


def hold(
    audience: Audience,
    store: Store,
    run: Mapping[str, Any],
    sample_ids: Sequence[int],
    count: int,
    seed: int,
) -> Held:
    """As many as ``count`` samples that stay, half of them the nearest relatives of some samples.

    What a token's row is held by are the few samples that contain it: a random draw of the others
    misses them, and the row is moved as if nobody minded. Nobody who is measured is chosen, as far
    as there are others.
    """
    free = audience.others(store, dict(run))
    kin = kinship(store, run, sample_ids, free)
    nearest = kin.argsort(descending=True, stable=True)[: count // 2].tolist()
    relatives = sorted(free[at] for at in nearest if kin[at] > 0)
    drawn = audience.strangers(store, dict(run), count, seed)
    others = [number for number in drawn if number not in relatives][: count - len(relatives)]
    if not others:
        return Held(relatives, others, 1.0)
    staying = audience.staying(store, dict(run))
    sizes = dict(
        store.rows(
            """SELECT sample_id, any_value("rows") FROM exposures WHERE run_id = ?
               GROUP BY sample_id""",
            [run["run_id"]],
        )
    )
    share = sum(sizes[one] for one in relatives) / sum(sizes[one] for one in staying)
    return Held(relatives, others, share)


def kinship(
    store: Store, run: Mapping[str, Any], sample_ids: Sequence[int], others: Sequence[int]
) -> Float[Tensor, " n"]:
    """What each of n ``others`` shares with some samples: Σ over common tokens of 1 / how many of
    the others contain it. Reads the token ids of the whole run."""
    wanted = torch.zeros(store.model.vocabulary, dtype=torch.bool)
    wanted[torch.cat(list(store.tokens(list(sample_ids), run["run_id"]).values())).long()] = True
    place = {number: at for at, number in enumerate(others)}
    segments = store.rows(
        """SELECT segment_id, list([token_start, token_start + "rows" + 1, sample_id])
           FROM (FROM exposures WHERE run_id = ?
                 QUALIFY row_number() OVER (PARTITION BY sample_id ORDER BY epoch) = 1)
           GROUP BY segment_id""",
        [run["run_id"]],
    )
    pairs = [torch.empty(0, 2, dtype=torch.long)]
    for segment, ranges in segments:
        tokens = store.segment(segment).tensor("tokens").long()
        owner = torch.full_like(tokens, -1)
        for start, stop, number in ranges:
            owner[start:stop] = place.get(number, -1)
        common = wanted[tokens] & (owner >= 0)
        pairs.append(torch.stack([owner[common], tokens[common]], dim=1).unique(dim=0))
    owners, shared = torch.cat(pairs).T
    frequency = shared.bincount(minlength=store.model.vocabulary)
    return torch.zeros(len(others)).index_add_(0, owners, 1 / frequency[shared].float())
