"""From one pass over a micro-batch to the records of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.capture.measure import HeadFacts
from gradstore.capture.taps import Pass
from gradstore.errors import CaptureError
from gradstore.factored import FactoredGradient, Term
from gradstore.store.record import Exposure, Factors, LinearLayer, OutputSide, Record


@dataclass(frozen=True)
class Moment:
    """What all samples of a pass have in common."""

    epoch: int
    step: int
    learning_rate: float
    world: int
    tied: bool
    dtype: torch.dtype
    position_offset: int | None  # see gradstore.capture.taps.position_of
    layers: Sequence[LinearLayer] = ()


def records_of(
    one: Pass,
    facts: HeadFacts,
    gradient: Float[Tensor, "b s d"],
    moment: Moment,
    wanted: Callable[[str], bool],
) -> Iterator[Record]:
    """One record for each wanted sample that the loss counted: own-loss scale, on the host."""
    assert one.tokens is not None
    assert one.hidden is not None
    own = torch.where(facts.share > 0, 1 / facts.share, 0.0)
    D = (gradient.float() * own[:, None, None]).cpu()  # noqa: N806
    tokens, real, scored = one.tokens.int().cpu(), facts.real.cpu(), facts.scored.cpu()
    shares, losses = facts.share.cpu(), facts.loss.cpu()
    starts = None if one.positions is None else one.positions.expand_as(one.tokens).cpu()
    hidden = one.hidden.cpu() if facts.output is not None or facts.exact is not None else None
    sides = _OutputSides(facts, moment.dtype, tokens.shape[1])
    layers = _layers(one, own, moment)
    for i, sample in enumerate(one.ids):
        places = real[i].nonzero()[:, 0]
        if not scored[i].any() or not wanted(sample):
            continue
        begin, end = int(places[0]), int(places[-1])
        if end + 1 - begin != len(places):
            raise CaptureError(f"sample {sample!r} has padding between its tokens; pad at an end")
        row = slice(begin, end)
        if bool(D[i, end].any()):
            raise CaptureError(
                f"the loss of sample {sample!r} reads its last position; gradstore captures "
                "next-token losses, where nothing follows the last token"
            )
        position = moment.position_offset
        if position is not None:
            counted = position if position >= 0 else begin
            position = counted if starts is None else int(starts[i, begin]) + max(position, 0)
        output = None if hidden is None else sides.of(i, row, hidden[i, row])
        exposure = Exposure(
            id=sample,
            epoch=moment.epoch,
            step=moment.step,
            learning_rate=moment.learning_rate,
            batch_share=float(shares[i]) / moment.world,
            grad_scale=1.0,
            loss=float(losses[i]),
            scored_tokens=int(scored[i].sum()),
            d_norm=float(D[i, row].norm()),
            h_norm=None if output is None else float(output.squares().sum().sqrt()),
            mass_kept=None if output is None else _mass_kept(output),
            relative_error=None,
            position_start=position,
        )
        stored = D[i, row].to(moment.dtype)
        factors = {f.layer.layer: Factors(f.layer, f.A[i, row], f.B[i, row]) for f in layers}
        record = Record(
            exposure, tokens[i, begin : end + 1], scored[i, row], stored, output, factors
        )
        if i == 0 and facts.exact is not None and hidden is not None:
            exact = facts.exact.cpu()[row]
            error = relative_error(record, D[i, row], hidden[i, row].float(), exact, moment.tied)
            record = replace(record, exposure=replace(exposure, relative_error=error))
        yield record


def _layers(one: Pass, own: Float[Tensor, " b"], moment: Moment) -> list[Factors]:
    """Factors (B, S, _) of a pass's samples: own-loss scale, on the host, as they are stored."""
    found = []
    for layer in moment.layers:
        A, B = one.layers.pop(layer.layer)  # noqa: N806
        B = B.float() * own[:, None, None]  # noqa: N806
        found.append(Factors(layer, A.to(moment.dtype).cpu(), B.to(moment.dtype).cpu()))
    return found


def relative_error(
    record: Record,
    D: Float[Tensor, "t d"],  # noqa: N803
    hidden: Float[Tensor, "t d"],
    R: Float[Tensor, "t V"],  # noqa: N803
    tied: bool,
) -> float:
    """‖stored − exact‖ / ‖exact‖ of the gradient of all that D, H and R stand for, from factors.

    Where the head is tied to the embedding, this is the gradient of that one weight, also when
    only the input side is stored; otherwise the error is over both weights together.
    """
    vocabulary, places = R.shape[1], record.tokens[:-1]
    kept, exact_head = torch.zeros_like(R), Term(None, R, hidden)
    wrong_head: list[Term] = [exact_head]
    if (side := record.output) is not None:
        kept += side.tail_mass.float()[:, None] * side.tail.float()
        kept.scatter_add_(1, side.index.long(), side.value.float())
        kept.scatter_add_(1, record.tokens[1:, None].long(), side.label.float()[:, None])
        rounding = hidden - side.H.float()
        wrong_head = [Term(None, R - kept, hidden), Term(None, kept, rounding)]
    wrong_input, exact_input = Term.one_hot(places, D - record.D.float()), Term.one_hot(places, D)
    if tied:
        shape = (vocabulary, D.shape[1])
        wrong = FactoredGradient([wrong_input, *wrong_head], shape).norm()
        whole = FactoredGradient([exact_input, exact_head], shape).norm()
        return wrong / whole if whole else 0.0
    squares = [0.0, 0.0]
    pairs = [([wrong_input], [exact_input])]
    if side is not None:
        pairs.append((wrong_head, [exact_head]))
    for pair in pairs:
        for which, terms in enumerate(pair):
            shape = (vocabulary, terms[0].B.shape[1])
            squares[which] += FactoredGradient(terms, shape).norm() ** 2
    return float((squares[0] / squares[1]) ** 0.5) if squares[1] else 0.0


class _OutputSides:
    """Cuts one sample's output side out of a micro-batch's."""

    def __init__(self, facts: HeadFacts, dtype: torch.dtype, length: int) -> None:
        self._output, self._dtype, self._length = facts.output, dtype, length
        if (output := facts.output) is not None:
            # R's entries lie within (-1, 1): half precision keeps 11 bits of them, bfloat16 8
            small = torch.float16 if dtype is torch.bfloat16 else dtype
            self._index = output.index.int().cpu()
            self._value = output.value.to(small).cpu()
            self._label = output.label.to(small).cpu()
            self._mass = output.tail_mass.to(small).cpu()
            self._tail = output.tail.to(dtype).cpu()

    def of(self, sample: int, row: slice, hidden: Tensor) -> OutputSide | None:
        if self._output is None:
            return None
        start = sample * self._length
        at = slice(start + row.start, start + row.stop)
        return OutputSide(
            H=hidden.to(self._dtype),
            index=self._index[at],
            value=self._value[at],
            label=self._label[at],
            tail_mass=self._mass[at],
            tail=self._tail,
        )


def _mass_kept(side: OutputSide) -> float:
    whole = -side.label.float().sum()
    return float(side.value.float().sum() / whole) if whole > 0 else 1.0
