"""What a request came to: its verdict and why, for all samples and for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gradstore.unlearn.dose import Dose, Limits, Path, Point
from gradstore.unlearn.request import Score
from gradstore.unlearn.target import Target

# Of the way to the lower end of a range that undoing the steps tells: `applied` ends just there,
# `newton` of the embedding at .64 to 1.17 of it; below three quarters membership mostly tells.
ENOUGH = 0.75
RETAINED_RISE = 0.01  # nats per token: what forgetting one sample may cost the rest on average


def falls_short(before: float, after: float, low: float, source: str) -> bool:
    """Whether a loss ends below a target's range by more than the range is known to."""
    part = ENOUGH if source == "undo" else 1.0
    return after < before + part * (low - before)


def verdict_of(path: Path, target: Target | None) -> str:
    """``forgotten``, ``partly`` or ``refused``.

    A dose or loss that was asked for has to be reached within the limits, and the loss must not
    fall short of the range estimated for samples never trained on.
    """
    before, after = path.points[0].forget, path.chosen.forget
    if not path.chosen.dose:
        return "refused"
    if target is None or target.source == "asked":
        enough = True
    else:
        enough = not falls_short(before, after, target.low, target.source)
    return "forgotten" if path.reached and enough else "partly"


def judged(scores: Sequence[Score], target: Target | None, verdict: str) -> list[Score]:
    """Scores of which those to be forgotten have their own target, range and outcome.

    The outcome is the request's verdict where nothing was written or no range is known.
    """
    found, at = [], 0
    for score in scores:
        if score.role == "forget":
            score = replace(score, outcome=verdict)
            if target is not None and target.ranges:
                low, high = target.ranges[at]
                short = falls_short(score.before, score.after, low, target.source)
                own = "partly" if short else "forgotten"
                score = replace(
                    score,
                    target=target.each[at],
                    low=low,
                    high=high,
                    outcome=verdict if verdict == "refused" else own,
                )
            at += 1
        found.append(score)
    return found


def reason_of(
    verdict: str,
    path: Path,
    target: Target | None,
    limits: Limits,
    dose: Dose,
    scores: Sequence[Score],
) -> str:
    """The verdict in a sentence with its numbers; it names no samples."""
    start, chosen = path.points[0], path.chosen
    met = target is not None and start.forget >= target.loss
    if verdict == "refused" and dose.multiple is None and met:
        return f"the loss, {start.forget:.3f}, is at its target already: there is nothing to forget"
    if verdict == "refused":
        return (
            f"no dose keeps to the limits ({_in_words(limits)}): nothing was written; raise "
            "them (--max-holdout-increase, --max-neighbour-increase, --max-retained-increase), or "
            "forget fewer samples at once"
        )
    said = f"loss {start.forget:.3f} to {chosen.forget:.3f} nats per token"
    if target is not None:
        said += (
            f" (target {target.loss:.3f})"
            if target.source == "asked"
            else f" (never trained on, it would be about {target.loss:.2f}, {target.low:.2f} to "
            f"{target.high:.2f})"
        )
    mine = [score for score in scores if score.role == "forget"]
    said += _damage(start, chosen, RETAINED_RISE if len(mine) == 1 else limits.holdout)
    if not path.reached:
        said += f"; {path.ended or f'stopped at the limits: {_in_words(limits)}'}"
    if target is not None and target.source != "asked":
        if falls_short(start.forget, chosen.forget, target.low, target.source):
            said += "; below that range"
            if path.reached:
                said += ": raise --dose, or give --dose target"
        elif below := max(0.0, round(target.low - chosen.forget, 2)):
            said += f"; {below:.2f} below that range, within its margin"
        short = sum(score.outcome == "partly" for score in mine)
        if short and len(mine) > 1:
            said += f"; {short} of {len(mine)} samples below their own range"
    return said


def _damage(start: Point, chosen: Point, bound: float | None) -> str:
    """The rises of those losses that should stay; that of the retained is held against a bound."""
    said = ""
    for name, before, after in (
        ("retained", start.retained, chosen.retained),
        ("held-out", start.holdout, chosen.holdout),
    ):
        if before is None or after is None:
            continue
        said += f", {name} {after - before:+.4f}"
        if name == "retained" and bound is not None and after - before > bound:
            said += f" (it should be no more than {bound:+g})"
    return said


def _in_words(limits: Limits) -> str:
    said = []
    if limits.holdout is not None:
        said.append(f"held-out loss +{limits.holdout:g}")
    if limits.neighbours is not None:
        said.append(f"neighbours' loss +{limits.neighbours:g}")
    if limits.single is not None:
        said.append(f"no sample that stays more than +{limits.single:g}")
    return ", ".join(said) or "a loss that is a number"
