"""What a forget request asks for, and what of it contradicts itself."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from gradstore.errors import SettingsError
from gradstore.unlearn.dose import Dose

MAX_HOLDOUT_INCREASE = 0.1  # nats per token
BASELINES = ("graddiff", "npo")  # steps of an optimizer, to compare with
UNSCALED = ("raw", "fresh", "random", *BASELINES)  # directions whose length means nothing
EMBEDDING = ("embedding",)  # what moves unless more was captured or asked for
ALL = ("all",)
INSIDE = ("all", "!position")  # what is undone of positions goes too far
STEPS, LEARNING_RATE = 60, 1e-4  # of a baseline: as in benchmarks/forgetting.py


@dataclass(frozen=True)
class ForgetSettings:
    """How to forget; the names are those of ``gradstore forget``'s options.

    ``direction`` None is ``applied`` for one sample of a run that captured the embedding alone, and
    ``newton`` for several or where inner layers were captured too. ``dose`` None is
    the direction's own: 1 for ``newton`` and ``applied``, or half for the latter with ``weights``
    that don't reckon the washing-out, and less where the loss would lie past the range estimated
    for a record never trained on; ``target`` for the others.
    ``epochs`` are the stored ones that count (None: all, for ``raw`` the first).
    ``layers`` names the captured layers whose weights move (None: all but positions for ``newton``
    where inner ones were captured, the whole model for a baseline, else the embedding): see
    :func:`gradstore.unlearn.exposures.layers_of`.
    ``from_checkpoints`` are folders that the training saved: epochs that were not captured are
    recomputed there. ``with_duplicates`` adds the near-duplicates that
    :mod:`gradstore.unlearn.match` finds, ``again`` keeps samples in the request that earlier ones
    made the checkpoint forget, whose steps are then undone twice. ``iterate`` reaches the target in
    so many rounds (:mod:`gradstore.unlearn.rounds`). ``steps`` (None: ``STEPS``),
    ``learning_rate`` (None: ``LEARNING_RATE``) and ``retained``, a file of records to keep (None:
    the store's), are a baseline's (:mod:`gradstore.unlearn.descent`).
    """

    direction: str | None = None
    dose: str | None = None
    weights: str | None = None
    max_holdout_increase: float | None = MAX_HOLDOUT_INCREASE
    max_retained_increase: float | None = None
    max_neighbour_increase: float | None = None
    run: str | None = None
    seed: int = 0
    with_duplicates: bool = False
    again: bool = False
    from_checkpoints: tuple[Path, ...] = ()
    iterate: int | None = None
    epochs: str | None = None
    layers: tuple[str, ...] | None = None
    steps: int | None = None
    learning_rate: float | None = None
    retained: Path | None = None

    def dose_asked(self) -> Dose | None:
        """The dose, if one was given; raises :class:`SettingsError` for what has no meaning."""
        dose = Dose.parse(self.dose) if self.dose else None
        if self.direction in UNSCALED and dose is not None and dose.multiple is not None:
            raise SettingsError(
                f"--direction {self.direction} has no natural scale, so a number means nothing: "
                "give --dose target or --dose target:NATS"
            )
        if self.weights and self.direction not in (None, "applied", "orthogonal"):
            raise SettingsError(
                f"--weights belongs to --direction applied or orthogonal, not {self.direction}"
            )
        if self.from_checkpoints and self.direction in UNSCALED:
            raise SettingsError(
                f"--from-checkpoints belongs to directions with steps to undo, not {self.direction}"
            )
        self._check_rounds()
        self._check_baseline()
        return dose

    def _check_rounds(self) -> None:
        if self.iterate is None:
            return
        if self.direction not in ("raw", "fresh"):
            raise SettingsError(
                "--iterate takes the next stored epoch's gradients in every round (--direction "
                "raw) or new ones (--direction fresh); "
                f"{self.direction or 'the default'} has no rounds"
            )
        if self.layers or self.epochs:
            raise SettingsError(
                "--iterate moves the embedding, by all epochs: no --layers or --epochs"
            )

    def _check_baseline(self) -> None:
        if self.direction in BASELINES:
            if self.epochs is not None:
                raise SettingsError(
                    f"--epochs belongs to directions of stored gradients, not {self.direction}"
                )
            if self.layers not in (None, ALL, EMBEDDING):
                raise SettingsError(
                    f"--direction {self.direction} moves the whole model (--layers all) or "
                    f"--layers embedding, not {', '.join(self.layers)}"
                )
            return
        for option in ("steps", "learning_rate", "retained"):
            if getattr(self, option) is not None:
                raise SettingsError(
                    f"--{option.replace('_', '-')} belongs to --direction {' or '.join(BASELINES)},"
                    f" not {self.direction or 'the default'}"
                )

    def kind(self, samples: Collection[str], inner: bool) -> str:
        """The direction; ``inner`` says whether the run captured more than the embedding."""
        moving = inner if self.layers is None else self.layers != EMBEDDING
        alone = len(samples) == 1 and not moving
        return self.direction or ("applied" if alone or self.weights else "newton")

    def completed(self, kind: str, inner: bool) -> ForgetSettings:
        """With the defaults that a direction has."""
        whole = INSIDE if kind == "newton" and inner else EMBEDDING
        settings = replace(self, layers=self.layers or (ALL if kind in BASELINES else whole))
        if kind not in BASELINES:
            return settings
        steps, rate = self.steps or STEPS, self.learning_rate or LEARNING_RATE
        return replace(settings, steps=steps, learning_rate=rate)

    @property
    def plain(self) -> bool:
        """Whether all stored epochs count, as they are, for the embedding alone."""
        return (self.weights, self.epochs, self.layers or EMBEDDING) == (None, None, EMBEDDING)
