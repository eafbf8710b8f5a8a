"""What is lost when writers are killed with SIGKILL at random moments: nothing, it must be.

    python benchmarks/crash.py --quick       # 60 kills
    python benchmarks/crash.py --kills 400

Writers append synthetic records whose values follow from their ids and say which are durable. They
are killed at a random moment of their first 1.2 seconds: one writer, or two ranks of one run; once,
before the store is opened and checked, or four times in a row, so that the next writer recovers
from the last and is killed too. A store is used for 24 rounds.

acknowledged   records that a writer had said to be durable; `lost` of them are not there
found          records that are there; `wrong` of them differ in some bit from what was written
damaged        findings of damage by `gradstore verify` after opening
left           how far the killed had come, as the disk shows it

Progress goes to stderr, one line of JSON to stdout. Exit code 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from records import RUN, assert_equal, record, tail
from rich.console import Console
from victims import Victims, everything, left_behind

from gradstore import Store
from gradstore.upkeep.verify import verify

LONGEST = 1.2  # seconds that a writer lives
ROUNDS = 24  # on one store
REPEATED = 4  # kills in a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="60 kills")
    parser.add_argument("--kills", type=int, default=240, help="writers to kill")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kills = 60 if options.quick else options.kills
    until = time.monotonic() + 60 * (options.minutes or 1e9)
    chance, console, totals = random.Random(options.seed), Console(stderr=True), Counter[str]()
    left: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        root = Path(folder) / "store"
        with Victims(root) as victims:
            for number in count():
                if totals["kills"] >= kills or time.monotonic() > until:
                    break
                more = kills - totals["kills"]
                one_store(victims, root, number, more, chance, totals, left, until)
                console.print(dict(totals))
    said = {"benchmark": "crash", "seed": options.seed, **totals, "left": left}
    print(json.dumps(said | {name: totals[name] for name in ("lost", "wrong", "damaged")}))
    sys.exit(any(totals[name] for name in ("lost", "wrong", "damaged")))


def one_store(
    victims: Victims,
    root: Path,
    number: int,
    kills: int,
    chance: random.Random,
    totals: Counter[str],
    left: Counter[str],
    until: float,
) -> None:
    """Kill writers on a fresh store until it has had its rounds, or there are enough."""
    store = Store.create(root)
    store.begin_run(RUN)
    acknowledged, checked, killed = set[str](), set[str](), 0
    for turn in range(ROUNDS):
        ranks, repeated = 1 + turn % 2, (turn // 2) % 2
        for again in range(REPEATED if repeated else 1):
            writers = {str(rank): f"{number}-{turn}-{again}-r{rank}" for rank in range(ranks)}
            acknowledged |= victims.run(writers=writers, after=chance.uniform(0.01, LONGEST))
            killed += ranks
            totals.update({f"{ranks} rank{'s' * (ranks > 1)}": ranks, "kills": ranks})
            totals["repeated"] += ranks * repeated
            left.update(left_behind(store))
        with Store.open(root) as opened:
            found = everything(opened)
        totals["lost"] += len(acknowledged - found.keys() - checked)
        for id in found.keys() - checked:
            totals["wrong"] += not is_right(id, found)
        totals["lost"] += len(checked - found.keys())  # it was there before
        totals["damaged"] += sum(finding.damage for finding in verify(root))
        checked |= found.keys()
        if killed >= kills or time.monotonic() > until:
            break
    totals.update(acknowledged=len(acknowledged), found=len(checked), stores=1)
    store.refresh()
    shutil.rmtree(root)


TAIL = tail()


def is_right(id: str, found: dict) -> bool:  # type: ignore[type-arg]
    """Whether a record is, to the bit, what its id says."""
    try:
        assert_equal(found[id], record(id, tail=TAIL))
    except AssertionError:
        return False
    return True


if __name__ == "__main__":
    main()
