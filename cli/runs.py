"""``gradstore runs``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit

_COLUMNS = ["kind", "name", "date", "status", "what", "loss_before", "loss_after", "checkpoint"]


@click.command()
@store_option
@output_options
def runs(store_path: Path, output: str) -> None:
    """List training runs and forget requests, oldest first, with their losses.

    \b
    Example:
      gradstore runs -s store
    """
    from gradstore.store import Store

    rows = Store.open(store_path).table(
        """SELECT 'training' AS kind, r.name, r.started_at AS date, r.status,
                  count(e.epoch) || ' gradients, epochs ' || r.epochs_captured AS what,
                  avg(e.loss) FILTER (WHERE e.epoch = 1) AS loss_before,
                  avg(e.loss) FILTER (WHERE e.epoch = last) AS loss_after, r.checkpoint
           FROM runs r LEFT JOIN exposures e USING (run_id)
           LEFT JOIN (SELECT run_id, max(epoch) AS last FROM exposures GROUP BY run_id)
               USING (run_id)
           GROUP BY r.run_id, r.name, r.started_at, r.status, r.epochs_captured, r.checkpoint
           UNION ALL
           SELECT 'forget', 'request-' || q.request_id, q.created_at, q.verdict,
                  any_value(c.samples) || ' samples, ' || q.direction, any_value(c.before),
                  any_value(c.after), q.model_out
           FROM requests q
           JOIN collateral c ON c.request_id = q.request_id AND c.role = 'forget'
           GROUP BY q.request_id, q.created_at, q.verdict, q.direction, q.model_out
           ORDER BY date"""
    )
    emit(rows, output, _COLUMNS)
