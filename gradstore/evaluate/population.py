"""Many models against many: does forgetting give what training without the record gives?

One model and one reference differ by their seeds as well. Several of each, trained with other
seeds, tell that from what forgetting left. All here is of margins, (models, records) each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BINS = 20
FARTHEST = 100.0  # margins beyond count as this
_LEAST = 1e-5  # share of an empty bin, so that a divergence stays finite
_LEAST_DEVIATION = 1e-6  # of models that all say the same

Array = NDArray[np.float64]


@torch.no_grad()
def margins(model: nn.Module, samples: Sequence[Tensor]) -> Array:
    """Mean over each sample's predictions of logit(true) - logsumexp(other logits); (n,).

    That is log p / (1 - p) of the token that comes.
    ``samples`` are 1-D token ids, at least two each. Each token's margin is clipped to ±100 nats,
    as KLOM clips them; of a text there is one margin for every token, and their mean is taken. The
    model is evaluated without dropout, and left in the mode it was in.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    for tokens in samples:
        tokens = tokens.long().to(device)
        logits, true = model(input_ids=tokens[None]).logits[0, :-1].double(), tokens[1:, None]
        others = logits.scatter(-1, true, -torch.inf).logsumexp(-1)
        each = logits.gather(-1, true).squeeze(-1) - others
        found.append(float(each.clamp(-FARTHEST, FARTHEST).mean()))
    model.train(was_training)
    return np.array(found)


def klom(ours: Array, references: Array) -> Array:
    """KLOM of each record: KL(ours ‖ references) of margins' histograms over models; (n,), nats.

    20 bins of equal width span both; an empty bin of the references counts as a share of 1e-5, and
    all shares are then divided by their sum (Georgiev et al. 2024, arXiv 2410.23232; the bins are
    EasyDUB's). EasyDUB leaves the greatest margin out of its histogram, and has NaN where that
    leaves none; here the last bin is closed. 0: alike; at most about 11.5. With few models even
    two draws of the same are far apart: compare with :func:`halves`.
    """
    ours, references = (np.clip(m, -FARTHEST, FARTHEST) for m in (ours, references))
    return np.array([_kl(p, q) for p, q in zip(ours.T, references.T, strict=True)])


def _kl(p: Array, q: Array) -> float:
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    ours, theirs = (np.histogram(m, edges)[0] / len(m) for m in (p, q))
    some = ours > 0
    theirs = np.where(some, np.maximum(theirs, _LEAST), theirs)
    theirs = theirs / theirs.sum()
    return float((ours[some] * np.log(ours[some] / theirs[some])).sum())


def halves(references: Array) -> Array:
    """KLOM of one half of the references against the other: what chance alone gives, and more.

    More, as halves are fewer. ``references`` are at least four.
    """
    return klom(references[::2], references[1::2])


def log_likelihood(x: Array, models: Array) -> Array:
    """Log density of x (n,) under each record's Gaussian, fitted to the models' margins (m, n).

    By maximum likelihood, so the variance is the mean square, and a deviation of at least 1e-6.
    """
    mean, deviation = models.mean(0), np.maximum(models.std(0), _LEAST_DEVIATION)
    density: Array = -np.square((x - mean) / deviation) / 2 - np.log(deviation)
    return density - math.log(2 * math.pi) / 2


def membership(x: Array, inside: Array, outside: Array) -> Array:
    """Chance of each record that a model with margins x (n,) was trained with it; LiRA.

    p_in / (p_in + p_out) by Gaussians over models trained with it and without (Carlini et al. 2022,
    arXiv 2112.03570; both as likely before). At least two models each.
    """
    ratio = log_likelihood(x, inside) - log_likelihood(x, outside)
    chance: Array = np.exp(-np.logaddexp(0.0, -ratio))
    return chance


def u_lira(ours: Array, references: Array) -> Array:
    """How often an attacker tells a model that forgot the record from one that never saw it; (n,).

    U-LiRA (Hayes et al. 2024, arXiv 2403.01218): LiRA whose models inside are those that were
    trained with the record and then made to forget it. Every pair of a model and a reference is
    left out in turn and told by the others. 0.5: forgetting cannot be told from retraining. At
    least three models each; as many of both, or the side with more is favoured.
    """
    rates = []
    for at, one in enumerate(ours):
        for place, other in enumerate(references):
            rest = np.delete(ours, at, 0), np.delete(references, place, 0)
            rates.append(_above_half(membership(one, *rest)))
            rates.append(1 - _above_half(membership(other, *rest)))
    found: Array = np.mean(rates, axis=0)
    return found


def _above_half(chances: Array) -> Array:
    return np.where(chances == 0.5, 0.5, chances > 0.5).astype(np.float64)


FEWEST = {"klom": (2, "model"), "lira": (2, "original"), "u_lira": (3, "model")}
ENOUGH = 20  # models, of which a histogram of as many bins has one for each


def compared(
    of: Mapping[str, Array], forgotten: Sequence[int]
) -> tuple[dict[str, dict[str, Array]], list[str]]:
    """What can be told of margins by name (original, model, reference), and in words what cannot.

    Figures are by name and metric, (n,): ``klom`` of every record, the reference's :func:`halves`;
    ``lira`` (:func:`membership` of the models, their mean) and ``u_lira`` of the ``forgotten``, NaN
    elsewhere.
    """
    counts = {name: len(of.get(name, ())) for name in ("original", "model", "reference")}
    found: dict[str, dict[str, Array]] = {name: {} for name in of}
    can = {
        metric: min(counts[name], counts["reference"]) >= fewest
        for metric, (fewest, name) in FEWEST.items()
    }
    said = [
        f"{metric} needs at least {fewest} checkpoints of --{name} and of --reference, trained "
        f"with other seeds; given are {counts[name]} and {counts['reference']}."
        for metric, (fewest, name) in FEWEST.items()
        if not can[metric]
    ]
    for name in ("original", "model"):
        if can["klom"] and counts[name] >= FEWEST["klom"][0]:
            found[name]["klom"] = klom(of[name], of["reference"])
        if can["u_lira"] and counts[name] >= FEWEST["u_lira"][0]:
            found[name]["u_lira"] = _only(u_lira(of[name], of["reference"]), forgotten)
    if can["lira"]:
        each = [membership(x, of["original"], of["reference"]) for x in of["model"]]
        found["model"]["lira"] = _only(np.mean(each, 0), forgotten)
    if can["klom"] and counts["reference"] >= 4:
        found["reference"]["klom"] = halves(of["reference"])
    if can["klom"] and min(counts["model"], counts["reference"]) < ENOUGH:
        said.append(
            "klom of so few models is far from 0 even where nothing differs: with four references "
            "or more their column has one half against the other."
        )
    return found, said


def _only(values: Array, at: Sequence[int]) -> Array:
    kept = np.full(len(values), math.nan)
    kept[list(at)] = values[list(at)]
    return kept
