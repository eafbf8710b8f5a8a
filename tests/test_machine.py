"""Whatever happens to a store, in whatever order: it holds what a dictionary would.

``GRADSTORE_EXAMPLES=300 pytest tests/test_machine.py`` looks longer, and each time elsewhere.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from erased import contents, row_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mortal import MOMENTS, Killed, Mortal
from records import RUN, assert_equal, generator, record, tail

from gradstore import Store
from gradstore.errors import DataError, IdError, StoreBusy
from gradstore.store import audit, catalog
from gradstore.store.erasures import Refused, allow
from gradstore.store.format import ModelIdentity
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.compact import compact
from gradstore.upkeep.erase import erase
from gradstore.upkeep.repair import repair
from gradstore.upkeep.verify import verify

EXAMPLES = int(os.environ.get("GRADSTORE_EXAMPLES", "0"))
IDS = tuple(f"record-{number}" for number in range(7))
WIDTH, VOCABULARY = 8, 1000
MODEL = ModelIdentity("gpt2", VOCABULARY, WIDTH, WIDTH, None, True)

Key = tuple[int, str, int]  # run, id, epoch
some = st.lists(st.sampled_from(IDS), min_size=1, max_size=4)  # one may come twice
ranks = st.integers(0, 1)
epochs = st.integers(1, 2)
exact = st.sampled_from([None, "raw", "packed"])


def tokens_of(id: str) -> torch.Tensor:
    """The same in every epoch and run."""
    seed = generator("tokens", id)
    count = int(torch.randint(4, 8, (1,), generator=seed))
    return torch.randint(VOCABULARY, (count,), generator=seed)


class Machine(RuleBasedStateMachine):
    """A store, and what is known of it.

    ``offered`` are the records that came, by key: several if it was met again. ``kept`` are those
    that a reader has seen, which stay; of each key ``acknowledged`` one must be there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="gradstore-"))
        self.root = self.folder / "store-0"
        self.kept: dict[Key, Record] = {}
        self.offered: defaultdict[Key, list[Record]] = defaultdict(list)
        self.refused: set[str] = set()
        self.absent: set[str] = set()  # erased and not come again
        self.gone: list[Record] = []
        self.writers: dict[int, SegmentWriter] = {}
        self.pending: dict[int, list[Key]] = {0: [], 1: []}
        self.acknowledged: set[Key] = set()
        self.serial = 0
        self.fates = 0

    @initialize(profile=st.sampled_from(["packed", "raw"]), ids=some, rank=ranks)
    def create(self, profile: str, ids: Sequence[str], rank: int) -> None:
        self.store = Store.create(self.root, profile=profile)
        self.store.bind(MODEL, "this")
        self.run = self.store.begin_run(RUN)
        self.put(IDS, 1, 0)
        self.close()
        self.put(ids, 2, rank)

    # -- what happens ----------------------------------------------------------------------------

    @rule()
    def begin(self) -> None:
        self.close()
        self.run = self.store.begin_run(RUN)

    @rule(ids=some, epoch=epochs, rank=ranks)
    def append(self, ids: Sequence[str], epoch: int, rank: int) -> None:
        self.put(ids, epoch, rank)

    @rule(rank=ranks)
    def flush(self, rank: int) -> None:
        if rank in self.writers:
            self.writers[rank].flush()
            self.acknowledge(rank)
            if rank == 0:  # which enters what others wrote
                self.look()

    @rule()
    def open(self) -> None:
        """Another process opens the store; it sees all that is durable."""
        self.store = Store.open(self.root)
        self.look()

    @rule(steps=st.integers(0, 99))
    def publish(self, steps: int) -> None:
        self.store.update_run(self.run["run_id"], steps=steps)
        assert self.store.run(self.run["run_id"])["steps"] == steps

    @rule(ids=some)
    def erase(self, ids: Sequence[str]) -> None:
        going = self.there(ids)
        if going and self.writers:
            with pytest.raises(StoreBusy):
                erase(self.store, going)
        self.close()
        self.store = Store.open(self.root)
        self.look()
        if going := self.there(ids):
            done = erase(self.store, going)
            assert done.search is not None
            assert done.search.hits == []
            self.forget(going)
        self.look()
        self.search()

    @rule(ids=some)
    def allow(self, ids: Sequence[str]) -> None:
        asked = {id: tokens_of(id) for id in ids}
        assert set(allow(self.store, asked)) == set(ids) & self.refused
        self.refused -= set(ids)

    @rule(
        moment=st.sampled_from(MOMENTS),
        number=st.integers(1, 12),
        ids=some,
        epoch=epochs,
        doing=st.sampled_from(["append", "both", "erase", "open", "publish", "compact"]),
        profile=exact,
    )
    def crash(
        self, moment: str, number: int, ids: Sequence[str], epoch: int, doing: str,
        profile: str | None,
    ) -> None:  # fmt: skip
        """All processes die at once, at some moment of what one does; another opens the store."""
        if doing in ("erase", "compact"):
            self.close()
            self.store = Store.open(self.root)
            self.look()
        self.fates += 1
        heir = self.folder / f"store-{self.fates}"
        fate = Mortal(self.root, heir, moment, number)
        batch: set[Key] = set()
        going = self.there(ids)
        try:
            with fate.living():
                if doing in ("append", "both"):
                    for rank in (0,) if doing == "append" else (1, 0):
                        batch = self.put(ids, epoch, rank)
                        self.writers[rank].flush()
                        self.acknowledge(rank)
                elif doing == "erase" and going:
                    erase(self.store, going)
                    self.forget(going)
                elif doing == "compact":
                    compact(self.store, profile=profile)
                elif doing == "open":
                    self.store = Store.open(self.root)
                else:
                    self.store.update_run(self.run["run_id"], steps=7)
        except Killed:
            pass
        self.abandon()
        if not fate.dead:
            shutil.copytree(self.root, heir)
        shutil.rmtree(self.root)
        self.root = heir
        self.store = Store.open(self.root)
        seen = {key for key in self.seen() if key[1] in going}
        wanted = {key for key in self.kept if key[1] in going}
        if doing == "erase" and going and not seen:
            self.forget(going)
        elif doing == "erase":
            assert seen == wanted, "it was erased by halves"
        if new := batch - self.acknowledged:
            assert new & self.seen().keys() in (set(), new), "half a segment is visible"
        self.look()
        self.search()

    @rule(how=st.sampled_from(["gone", "cut", "all"]), mended=st.booleans())
    def lose_the_catalog(self, how: str, mended: bool) -> None:
        self.close()
        self.store = Store.open(self.root)
        self.look()
        self.store.refresh()
        file = self.root / catalog.NAME
        if how == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            mended = True
        else:
            file.unlink()
        if how == "all":
            for path in (self.root / "published").iterdir():
                path.unlink()
            self.refused = set()  # nothing else tells of them
        if mended:
            repair(self.root)
        shutil.rmtree(self.root / "quarantine", ignore_errors=True)
        self.store = Store.open(self.root)
        if how == "all":
            self.run = self.store.begin_run(RUN)
            self.kept = {}  # of an epoch met twice another may be the first now
        self.look()
        self.search()

    @rule(profile=exact)
    def compact(self, profile: str | None) -> None:
        self.close()
        self.store = Store.open(self.root)
        compact(self.store, profile=profile)
        self.look()
        self.search()

    @rule()
    def check(self) -> None:
        self.store = Store.open(self.root)
        self.look()
        assert [finding for finding in verify(self.root) if finding.damage] == []
        assert audit.check(self.store.table(audit.SELECT)) == []

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def ids_are_refused(self) -> None:
        if hasattr(self, "store"):
            asked = {id: tokens_of(id) for id in IDS}
            assert Refused.of(self.store).among(asked).keys() == self.refused

    def look(self) -> None:
        """All that was acknowledged is there, to the bit, and nothing that was not offered."""
        seen = self.seen()
        for key, one in seen.items():
            if key in self.kept:
                assert_equal(one, self.kept[key])
            else:
                assert_one_of(one, self.offered[key])
        assert self.kept.keys() | self.acknowledged <= seen.keys()
        self.kept, self.acknowledged = seen, {*seen}
        ids = {id for _, id, _ in seen}
        assert {id for (id,) in self.store.rows("SELECT id FROM samples")} == ids
        facts = self.store.stats()
        assert (facts["gradients"], facts["samples"]) == (len(seen), len(ids))
        for id in IDS:
            if id in ids:
                assert list(self.store.resolve([id])) == [id]
            else:
                with pytest.raises(IdError):
                    self.store.resolve([id])

    def search(self) -> None:
        """Nothing that was erased is anywhere."""
        if not self.gone:
            return
        patterns = [row_of(one.D) for one in self.gone]
        patterns += [id.encode() for id in self.absent]
        patterns += [tokens_of(id).to(torch.uint16).numpy().tobytes() for id in self.absent]
        for place, data in contents(self.root).items():
            assert not any(pattern in data for pattern in patterns), place

    # -- inside ----------------------------------------------------------------------------------

    def there(self, ids: Sequence[str]) -> list[str]:
        held = {id for _, id, _ in self.kept}
        return [id for id in dict.fromkeys(ids) if id in held]

    def put(self, ids: Sequence[str], epoch: int, rank: int) -> set[Key]:
        """Hand records over as an ingest does: what was erased is refused. Returns their keys."""
        refuse = Refused.of(self.store)
        for id in self.refused.intersection(ids):
            with pytest.raises(DataError, match=f"{id!r} was erased"):
                refuse.check({id: tokens_of(id)})
        ids = [id for id in ids if id not in self.refused]
        if rank not in self.writers:
            self.writers[rank] = SegmentWriter(self.store, self.run, rank)
        shared, batch = tail(f"{self.serial}", VOCABULARY), []
        for id in ids:
            self.serial += 1
            tokens = tokens_of(id)
            rows = len(tokens) - 1
            made = record(
                f"{self.serial}",
                epoch=epoch,
                rows=rows,
                width=WIDTH,
                vocabulary=VOCABULARY,
                tail=shared,
            )
            one = replace(made, exposure=replace(made.exposure, id=id), tokens=tokens)
            batch.append(one)
            key = self.run["run_id"], id, epoch
            self.offered[key].append(one)
            self.pending[rank].append(key)
        self.absent -= set(ids)
        self.writers[rank].put(batch)
        return set(self.pending[rank])

    def acknowledge(self, rank: int) -> None:
        self.acknowledged |= set(self.pending[rank])
        self.pending[rank].clear()

    def close(self) -> None:
        for rank, writer in self.writers.items():
            writer.close()
            self.acknowledge(rank)
        self.writers.clear()

    def abandon(self) -> None:
        for rank, writer in self.writers.items():
            writer.abandon()
            self.pending[rank].clear()
        self.writers.clear()
        self.store.refresh()

    def seen(self) -> dict[Key, Record]:
        """All records that readers see now."""
        self.store.refresh()
        numbers = [number for (number,) in self.store.rows("SELECT sample_id FROM samples")]
        found: dict[Key, Record] = {}
        for (run,) in self.store.rows("SELECT run_id FROM runs ORDER BY run_id"):
            for one in self.store.records(numbers, run):
                key = run, one.exposure.id, one.exposure.epoch
                assert key not in found
                found[key] = one
        return found

    def forget(self, ids: Sequence[str]) -> None:
        for key in [key for key in self.offered if key[1] in ids]:
            self.gone += self.offered.pop(key)
            self.kept.pop(key, None)
        self.acknowledged &= self.offered.keys()
        self.refused |= set(ids)
        self.absent |= set(ids)

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.close()
                self.check()
                self.search()
        finally:
            self.abandon()
            shutil.rmtree(self.folder)


def assert_one_of(one: Record, offered: Sequence[Record]) -> None:
    """It is the one of these that it looks like, to the bit."""
    [same] = [other for other in offered if row_of(other.D) == row_of(one.D)]
    assert_equal(one, same)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=EXAMPLES or 4,
    stateful_step_count=40 if EXAMPLES else 14,
    derandomize=not EXAMPLES,
    phases=[Phase.generate],  # making a failure smaller takes minutes
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
