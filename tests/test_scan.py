"""Products of stored factors with queries are those of dense matrices."""

import pickle
import re
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import KEPT, RUN, VOCABULARY, WIDTH, record, tail
from torch import Tensor

from gradstore import FactoredGradient
from gradstore.errors import InfluenceError
from gradstore.factored import Term
from gradstore.influence.lens import lenses, precision_for
from gradstore.influence.norms import norms_segment
from gradstore.influence.rows import MEMORY, Place
from gradstore.influence.scan import contributions, score_segment
from gradstore.store import ModelIdentity
from gradstore.store.record import Record
from gradstore.store.segment import pack, write_segment

pytest_plugins = ["tiny"]
MODEL = ModelIdentity("GPT2LMHeadModel", VOCABULARY, WIDTH, WIDTH, 64, True)
SHAPE = (VOCABULARY, WIDTH)
ASKED = "Ada is a baker, born in 1966"


def segment(folder: Path, met: list[Record], profile: str = "raw") -> tuple[Path, list[Place]]:
    """Records written as one segment, and where each lies in it."""
    arrays, tables = pack(met)
    path = write_segment(
        folder, run=RUN | {"run_id": 1}, kind="gradients", profile=profile, arrays=arrays,
        tables=tables,
    )  # fmt: skip
    columns = (tables["exposures"][name] for name in Place._fields)
    return path, [Place(*row) for row in zip(*columns, strict=True)]


def met(count: int = 12) -> list[Record]:
    """Records of several lengths whose micro-batches have tails of their own, rounded nowhere."""
    tails = [tail(f"tail-{n}") for n in range(3)]
    return [
        record(f"s-{n}", rows=1 + 5 * n, dtype=torch.float32, tail=tails[n // 4])
        for n in range(count)
    ]


def query(rank: int, seed: int = 0) -> FactoredGradient:
    draw = torch.Generator().manual_seed(seed)
    half = rank // 2
    return FactoredGradient(
        [
            Term.one_hot(
                torch.randint(VOCABULARY, (half,), generator=draw),
                torch.randn(half, WIDTH, generator=draw),
            ),
            Term(
                None,
                torch.randn(rank - half, VOCABULARY, generator=draw),
                torch.randn(rank - half, WIDTH, generator=draw),
            ),
        ],
        SHAPE,
    )


def close(found: Tensor, expected: list[float], tolerance: float = 1e-4) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("profile", ["raw", "packed"])
@pytest.mark.parametrize("rank", [2, 6, 40])
def test_a_scan_gives_the_factored_dot_of_every_record(
    tmp_path: Path, rank: int, profile: str
) -> None:
    records, asked = met(), query(rank)
    path, places = segment(tmp_path, records, profile)
    [lens] = lenses([asked])
    assert (lens.right is None) == (2 * rank > WIDTH)
    found = score_segment(path, places, [lens])
    assert close(found[:, 0], [r.gradient(MODEL).dot(asked) for r in records])
    for through in ([lens], list(lenses([asked], sides="input"))):
        side = score_segment(path, places, through, "input")
        assert close(side[:, 0], [r.gradient(MODEL, sides="input").dot(asked) for r in records])


def test_products_of_bfloat16_are_as_good_as_what_is_stored(tmp_path: Path) -> None:
    tails = [tail(f"tail-{n}") for n in range(3)]
    records = [record(f"s-{n}", rows=40, tail=tails[n // 16]) for n in range(48)]
    path, places = segment(tmp_path, records)
    dense = [r.gradient(MODEL).dense().double() for r in records]
    norms = torch.stack([g.norm() for g in dense])
    for seed in range(8):
        asked = query(6, seed)
        exact = torch.stack([(g * asked.dense().double()).sum() for g in dense])
        [lens] = lenses([asked], None, "bfloat16")
        assert lens.right is not None
        assert lens.right.dtype is torch.bfloat16
        found = score_segment(path, places, [lens])[:, 0]
        error = (found - exact).abs() / (norms * asked.norm())
        assert 1e-7 < error.max() < 1e-3
        apart = exact[:, None] - exact > 2e-3 * norms.max() * asked.norm()
        assert (found[:, None] > found)[apart].all()
        single = score_segment(path, places, list(lenses([asked], None, "float32")))[:, 0]
        assert ((single - exact).abs() / (norms * asked.norm())).max() < 1e-6


def test_precision_follows_what_is_stored_and_what_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert (precision_for("bfloat16"), precision_for("float32")) == ("bfloat16", "float32")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_f": True})
    assert precision_for("bfloat16") == precision_for("bfloat16", "meta") == "float32"
    for able, precision in (((8, 0), "bfloat16"), ((7, 5), "float32")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, able=able: able)
        assert precision_for("bfloat16", "cuda") == precision
        assert precision_for("float32", "cuda:1") == "float32"


@pytest.mark.parametrize("rank", [6, 40])
def test_a_scan_multiplies_where_the_query_lies(tmp_path: Path, rank: int) -> None:
    path, places = segment(tmp_path, met())
    [lens] = lenses([query(rank)])
    # this device holds no numbers, and takes none of another's as its own: all went there and is
    # missed only when scores are fetched
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        score_segment(path, places, [lens.to("meta")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [6, 40])
def test_a_scan_on_a_gpu_is_the_scan_on_the_processor(tmp_path: Path, rank: int) -> None:
    path, places = segment(tmp_path, met())
    [lens] = lenses([query(rank)])
    found = score_segment(path, places, [lens.to("cuda")])
    assert close(found[:, 0], score_segment(path, places, [lens])[:, 0].tolist())


def test_a_scan_in_little_memory_and_in_any_order_is_the_same(tmp_path: Path) -> None:
    path, places = segment(tmp_path, met())
    through = list(lenses([query(6)]))
    whole = score_segment(path, places, through)
    tails, row = 8 * 32 * VOCABULARY, 12 * WIDTH + 12 * 6 + 24 + 20 * (KEPT + 1) + 64
    little = through[0].nbytes + tails + 17 * row  # records have up to 56 rows: they are cut
    assert torch.allclose(score_segment(path, places, through, memory=little), whole)
    some = [7, 2, 11, 3]
    for memory in (little, MEMORY):
        found = score_segment(path, [places[n] for n in some], through, memory=memory)
        assert torch.allclose(found, whole[torch.tensor(some)])
    assert score_segment(path, [], through).shape == (0, 1)
    with pytest.raises(InfluenceError, match=r"allow \d+ MB \(--memory\)"):
        score_segment(path, places, through, memory=through[0].nbytes)


@pytest.mark.parametrize("count", [1, 40])
def test_what_a_scan_works_with_stays_within_its_memory(tmp_path: Path, count: int) -> None:
    few = [tail(f"tail-{n}") for n in range(2)]
    path, places = segment(
        tmp_path, [record(f"s-{n}", rows=2000, tail=few[n // 2]) for n in range(4)]
    )
    through = list(lenses([query(6, seed) for seed in range(count)]))
    spare = 1 << 19  # room for fewer rows than a scan reads at once where it may
    memory = sum(lens.nbytes for lens in through) + spare
    with torch.profiler.profile(profile_memory=True) as profiled:
        score_segment(path, places, through, memory=memory)
    events = profiled.profiler.kineto_results.events()
    most = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert spare // 4 < most <= spare


def test_many_queries_at_once_are_as_many_scans(tmp_path: Path) -> None:
    path, places = segment(tmp_path, met())
    asked = [query(rank, seed) for seed, rank in enumerate([2, 6, 40, 4, 2] + [8] * 40)]
    through = list(lenses(asked))
    assert [len(lens.ranks) for lens in through] == [
        2,
        1,
        33,
        9,
    ]  # 4 + 2 + 31 · 8 columns fit into 256
    found = score_segment(path, places, through)
    alone = [score_segment(path, places, list(lenses([one])))[:, 0] for one in asked]
    assert torch.allclose(found, torch.stack(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_a_scan_is_a_pure_function_that_can_be_sent_away(tmp_path: Path) -> None:
    path, places = segment(tmp_path, met())
    task = partial(score_segment, through=list(lenses([query(6)])))
    sent = pickle.loads(pickle.dumps(task))
    assert torch.equal(sent(path, places), task(path, places))


def test_a_records_tokens_add_up_to_its_score(tmp_path: Path) -> None:
    records, asked = met(), query(6)
    path, places = segment(tmp_path, records)
    [lens] = lenses([asked])
    parts = contributions(path, places[9], lens)
    assert parts.shape == (46, 2)
    assert close(parts.sum()[None], [records[9].gradient(MODEL).dot(asked)])
    read = records[9].gradient(MODEL, sides="input").dot(asked)
    assert close(parts[:, 0].sum()[None], [read])
    last = Term.one_hot(records[9].tokens[45:46], records[9].D[45:])
    assert close(parts[45:, 0], [FactoredGradient([last], SHAPE).dot(asked)])


def test_a_divisor_divides_every_entry_of_the_query(tmp_path: Path) -> None:
    records, asked = met(), query(4)
    path, places = segment(tmp_path, records)
    divisor = torch.rand(SHAPE) + 0.5
    found = score_segment(path, places, list(lenses([asked], divisor)))
    divided = asked.dense() / divisor
    assert close(found[:, 0], [float((r.gradient(MODEL).dense() * divided).sum()) for r in records])


def test_norms_are_those_of_the_dense_gradients(tmp_path: Path) -> None:
    records = met()
    path, places = segment(tmp_path, records)
    exact = [float(r.gradient(MODEL).dense().double().norm()) for r in records]
    assert close(norms_segment(path, places), exact, 1e-6)
    side = [float(r.gradient(MODEL, sides="input").dense().double().norm()) for r in records]
    assert close(norms_segment(path, places, "input"), side, 1e-6)


def test_norms_stay_within_their_memory(tmp_path: Path) -> None:
    path, places = segment(tmp_path, [record("s-1", rows=2000, tail=tail("one"))])
    with pytest.raises(InfluenceError, match=r"`gradstore top --memory \d+MB`") as refused:
        norms_segment(path, places, memory=0)
    [allowed] = map(int, re.findall(r"--memory (\d+)MB", str(refused.value)))
    with torch.profiler.profile(profile_memory=True) as profiled:
        norms_segment(path, places, memory=allowed << 20)
    events = profiled.profiler.kineto_results.events()
    most = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert (allowed << 20) // 3 < most <= allowed << 20


@given(st.integers(1, 9), st.integers(1, 9), st.floats(-4, 4))
def test_lenses_are_linear_in_the_query(rank: int, other: int, factor: float) -> None:
    a, b = query(rank, 1), query(other, 2)
    [lens] = lenses([a + b * factor])
    left = torch.cat(lens.tables, dim=1)
    held = left if lens.right is None else left @ lens.right
    assert torch.allclose(held, a.dense() + factor * b.dense(), atol=1e-4)


def test_positions_that_read_one_token_share_a_column() -> None:
    ids = torch.tensor([3, 7, 3, 3])
    asked = FactoredGradient([Term.one_hot(ids, torch.randn(4, WIDTH))], SHAPE)
    [lens] = lenses([asked])
    assert lens.right is not None
    assert lens.ranks == (2,)
    assert torch.allclose(lens.tables[0] @ lens.right, asked.dense(), atol=1e-6)
