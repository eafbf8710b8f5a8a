"""What the store costs beside plain files: appending, scanning, one record by its id, the catalog.

    python benchmarks/store.py --quick   # two minutes
    python benchmarks/store.py

Segments of about 64 MB of synthetic records shaped as GPT-2 small's (d = 768, 32 to 1,024 tokens
log-uniform, the 32 largest entries of R), D with row norms over three decades; one thread, warm.
Whatever is compared is measured by turns in one process, and a figure is the median, with
quartiles, of the turns' ratios: raw file ÷ ours where a target is a least, ours ÷ raw file where
it is a most. CPU time unless it says wall.

append     write_segment against write() of the same bytes in one file; unsynced both leave out
           fsync, durable has both: one for the plain file, one for each file and folder of ours
digest     the same without a digest, and what else there is in place of XXH3
scan       D in blocks of rows, into memory; and the influence scan of all arrays in the loop
sealed     an encrypted store ÷ one that is not: appending, the same scans, one record
record     all arrays of one record at its known place, against one pread for each array
id         from the id to the record: look-up, place and arrays, in a catalog of a million rows
peers      D alone, unsynced: our arrays, zarr-python's, safetensors, and HDF5 (h5py) and Lance
           (pylance) where they are installed

Progress and tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported

import numpy as np
import torch
import zarr
from blake3 import blake3
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_128
from zarr.codecs import BloscCodec, BytesCodec

from gradstore import Store
from gradstore.factored import FactoredGradient, Term
from gradstore.influence.lens import lenses
from gradstore.influence.rows import Place
from gradstore.influence.scan import score_segment
from gradstore.store import catalog, files, format
from gradstore.store.arrays import CHUNK_ROWS, ZarrArray, write_array
from gradstore.store.format import PROFILES
from gradstore.store.manifest import read_manifest
from gradstore.store.record import Exposure, OutputSide, Record
from gradstore.store.segment import SegmentReader, pack, write_segment
from gradstore.store.writer import SEGMENT_BYTES

V, WIDTH, SHORTEST, LONGEST, KEPT, BATCH = 50_257, 768, 32, 1024, 32, 8
BLOCK = 1024  # rows read at once in a scan, as the influence scan does
RUN = {"run_id": 1, "name": "run", "status": "finished", "started_at": catalog.now(),
       "epochs_captured": "first", "sides": "both", "top_k": KEPT}  # fmt: skip
SCAN_LEAST = {"raw": 0.9, "packed": 0.28}
INFLUENCE_LEAST = {"raw": 0.9, "packed": 0.8}
Way = Callable[[], object]
Row = dict[str, Any]
Seconds = tuple[float, float]  # of CPU, by the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    turns, rows = (7, []) if options.quick else (25, [])
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="store-", dir=".") as name:
        folder, records = Path(name), list(drawn_records())
        arrays, tables = pack(records)
        for profile in PROFILES:
            console.print(f"{profile}: appending, scanning, single records")
            rows += appending(folder, profile, arrays, tables, turns)
            path = segment(folder / profile, profile, arrays, tables)
            rows += reading(path, folder / "plain", profile, arrays, tables, turns)
            if profile in SCAN_LEAST:
                rows += sealing(folder, path, profile, arrays, tables, turns)
        console.print("digests and peers")
        rows += digests(folder, arrays["D"], turns)
        rows += peers(folder, arrays["D"], tables, turns)
        console.print("a catalog of a million rows")
        rows += by_id(folder, records, 20 * turns) + sizes(folder, arrays, tables)
    console.print(table_of(rows))
    print(json.dumps({"benchmark": "store", "turns": turns, "results": rows}))


# -- writing -----------------------------------------------------------------------------------


def appending(
    folder: Path, profile: str, arrays: Mapping[str, Tensor], tables: Any, turns: int
) -> list[Row]:
    plain, target = folder / "appended", folder / "segments"
    pieces = [bits(tensor) for tensor in arrays.values()]

    def clear() -> None:
        plain.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)

    def ours() -> None:
        segment(target, profile, arrays, tables)

    def unsynced() -> None:
        with patch("gradstore.store.segment.sync_tree"):
            ours()

    def undigested() -> None:
        with patch.dict(files.DIGESTS, {files.HERE: Undigested}):
            ours()

    ways = {
        "raw, unsynced": lambda: write_plain(plain, pieces, sync=False),
        "unsynced": unsynced,
        "raw": lambda: write_plain(plain, pieces),
        "ours": ours,
        "undigested": undigested,
    }
    seconds, raw = by_turns(ways, turns, clear), profile == "raw"
    return [
        ratio(f"append, {profile}, unsynced", seconds, "raw, unsynced", "unsynced",
              least=0.9 if raw else None),
        ratio(f"append, {profile}, durable", seconds, "raw", "ours"),
        ratio(f"append, {profile}, durable, wall", seconds, "raw", "ours", wall=True,
              least=0.65 if raw else None),
        ratio(f"append, {profile}, durable, no digest", seconds, "raw", "undigested"),
    ]  # fmt: skip


def sealing(
    folder: Path, path: Path, profile: str, arrays: Mapping[str, Tensor], tables: Any, turns: int
) -> list[Row]:
    """The same segment in clear, and sealed: what of its throughput is left."""
    key = os.urandom(32)
    os.environ["GRADSTORE_KEY"] = key.hex()
    root = folder / f"{profile}, encrypted"
    format.create(root, profile, "bfloat16", master=key)
    sealed = segment(root / "segments" / "r0", profile, arrays, tables)
    places, query, rows = places_of(tables), list(lenses([thin_query()])), len(arrays["D"])
    blocks = [(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]
    some = {where: cycle(places) for where in (path, sealed)}
    readers = {where: SegmentReader(where) for where in (path, sealed)}

    def append(to: Path) -> None:
        shutil.rmtree(segment(to, profile, arrays, tables))

    def record(where: Path) -> None:
        readers[where].record(exposure("s"), next(some[where])._asdict())

    ways: dict[str, Callable[[Path], object]] = {
        "append": lambda where: append(where.parent),
        "scan": lambda where: [readers[where].tensor("D", *block) for block in blocks],
        "influence scan": lambda where: score_segment(where, places, query),
        "record": record,
    }
    found = []
    for name, way in ways.items():
        seconds = by_turns({"clear": partial(way, path), "sealed": partial(way, sealed)}, turns)
        least = 0.7 if "record" not in name else None
        for wall in (False, True):
            said = f"sealed ÷ clear, {name}, {profile}{', wall' * wall}"
            found.append(ratio(said, seconds, "clear", "sealed", wall=wall, least=least))
    return found


def digests(folder: Path, D: Tensor, turns: int) -> list[Row]:
    """Raw write without fsync ÷ the digest of the same bytes: above 1 it is the cheaper."""
    plain, held = folder / "digested", bits(D).view(np.uint8)
    names = ["sha256", "sha512", "sha3_256", "blake2b", "blake2s"]
    makers: dict[str, Callable[..., Any]] = {"xxh3_128": xxh3_128, "blake3": blake3}
    makers |= {name: getattr(hashlib, name) for name in names}
    ways: dict[str, Way] = {"raw": lambda: write_plain(plain, [held], sync=False)}
    for name, maker in makers.items():
        ways[name] = lambda maker=maker: maker(held).hexdigest()  # type: ignore[misc]
    seconds = by_turns(ways, turns, lambda: plain.unlink(missing_ok=True))
    return [ratio(f"write ÷ {name}", seconds, "raw", name) for name in makers]


class Undigested:
    """In place of a digest, to see what the digest costs."""

    def update(self, piece: object) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """Nothing."""
        return ""


# -- reading -----------------------------------------------------------------------------------


def reading(
    path: Path, plain: Path, profile: str, arrays: Mapping[str, Tensor], tables: Any, turns: int
) -> list[Row]:
    plain.mkdir(exist_ok=True)
    for name, tensor in arrays.items():
        bits(tensor).tofile(plain / name)
    reader, rows = SegmentReader(path), len(arrays["D"])
    blocks = [(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]
    query = list(lenses([thin_query()]))
    places = places_of(tables)

    def scan_plain() -> None:
        with open(plain / "D", "rb", buffering=0) as file:
            for start, stop in blocks:
                file.readinto(np.empty((stop - start, WIDTH), np.uint16).data.cast("B"))

    def scan_ours() -> None:
        for block in blocks:
            reader.tensor("D", *block)

    def influence_plain() -> None:
        with patch.object(SegmentReader, "tensor", PlainFiles(plain, arrays).tensor):
            score_segment(path, places, query)

    seconds = by_turns(
        {
            "raw": scan_plain,
            "ours": scan_ours,
            "raw, influence": influence_plain,
            "ours, influence": lambda: score_segment(path, places, query),
        },
        turns,
    )
    found = [
        ratio(f"scan, {profile}", seconds, "raw", "ours", least=SCAN_LEAST.get(profile)),
        ratio(f"influence scan, {profile}", seconds, "raw, influence", "ours, influence",
              least=INFLUENCE_LEAST.get(profile)),
    ]  # fmt: skip
    return found + one_record(reader, plain, profile, arrays, tables, turns)


def one_record(
    reader: SegmentReader, plain: Path, profile: str, arrays: Mapping[str, Tensor], tables: Any,
    turns: int,
) -> list[Row]:  # fmt: skip
    """All arrays of a record whose place is known; every array of the segment has been opened."""
    columns = tables["exposures"]
    places = [
        {name: columns[name][n] for name in Place._fields} for n in range(len(columns["rows"]))
    ]
    exposures = [exposure(str(n)) for n in range(len(places))]
    files = PlainFiles(plain, arrays)
    taken: dict[str, list[Seconds]] = {"raw": [], "ours": [], "D, raw": [], "D, ours": []}
    order = torch.randperm(len(places)).tolist()
    for turn, n in enumerate((order * turns)[: 20 * turns + 20]):
        ways: dict[str, Way] = {
            "raw": lambda n=n: files.record(places[n]),  # type: ignore[misc]
            "ours": lambda n=n: reader.record(exposures[n], places[n]),  # type: ignore[misc]
            "D, raw": lambda n=n: files.read("D", *ends(places[n])),  # type: ignore[misc]
            "D, ours": lambda n=n: reader.tensor("D", *ends(places[n])),  # type: ignore[misc]
        }
        for name, way in ways.items():
            seconds = timed(way)
            if turn >= 20:
                taken[name].append(seconds)
    return [
        ratio(f"record ÷ preads, {profile}", taken, "ours", "raw",
              most=1.5 if profile == "raw" else None),
        ratio(f"its D ÷ pread, {profile}", taken, "D, ours", "D, raw",
              most=1.5 if profile == "raw" else None),
        value(f"record, {profile}, ms", [1e3 * cpu for cpu, _ in taken["ours"]],
              most=0.3 if profile == "packed" else None),
        value(f"its D, {profile}, ms", [1e3 * cpu for cpu, _ in taken["D, ours"]],
              most=0.3 if profile == "packed" else None),
    ]  # fmt: skip


class PlainFiles:
    """The arrays as plain files, read by pread alone: what ours is held against."""

    def __init__(self, folder: Path, arrays: Mapping[str, Tensor]) -> None:
        self._files = {name: os.open(folder / name, os.O_RDONLY) for name in arrays}
        self._like = {name: tensor[:0] for name, tensor in arrays.items()}
        self._widths = {n: t[:1].numel() * t.element_size() for n, t in arrays.items()}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of rows of an array."""
        width = self._widths[name]
        return os.pread(self._files[name], (stop - start) * width, start * width)

    def record(self, place: Mapping[str, Any]) -> list[bytes]:
        """The bytes of a record."""
        start, stop, row = *ends(place), place["tail_row"]
        names = ("scored", "D", "H", "R_index", "R_value")
        return [
            *(self.read(name, start, stop) for name in names),
            self.read("tokens", place["token_start"], place["token_start"] + place["rows"] + 1),
            self.read("tail", row, row + 1),
        ]

    @property
    def tensor(self) -> Callable[..., Tensor]:
        """As ``SegmentReader.tensor``, which it stands in for; it always copies."""

        def read(
            _: object, name: str, start: int = 0, stop: int | None = None, *, copy: bool = True
        ) -> Tensor:
            assert stop is not None
            like = self._like[name]
            data = np.empty((stop - start, *like.shape[1:]), bits(like).dtype)
            if data.size:
                os.preadv(self._files[name], [data.data.cast("B")], start * self._widths[name])
            if like.dtype is torch.bfloat16:
                return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(data.astype(np.int32) if data.dtype == np.uint16 else data)

        return read


# -- the catalog -------------------------------------------------------------------------------


def by_id(folder: Path, records: Sequence[Record], looks: int) -> list[Row]:
    """Ids of ten characters in a catalog of 10⁶ rows; the samples looked up have records."""
    store, kept, every = Store.create(folder / "million"), len(records), 1_000_000
    path = segment(store.root / "segments" / "r0", "packed", *pack(records))
    manifest, name = read_manifest(path), path.relative_to(store.root).as_posix()
    few = manifest["tables"]["exposures"]
    with catalog.transaction(store.root) as connection:
        empty = (store.root / catalog.NAME).stat().st_size
        for part in range(20):  # the records lie in the middle of the numbers
            count = every // 20
            columns = {k: (v * (count // kept + 1))[:count] for k, v in few.items()}
            columns["id"] = [f"doc-{n:06d}" for n in range(part * count, (part + 1) * count)]
            columns["step"] = [(part * count + n) // 8 for n in range(count)]
            for measured in ("loss", "d_norm", "h_norm", "mass_kept"):  # no two of them are alike
                columns[measured] = torch.rand(count).tolist()
            tables = {"exposures": columns}
            place = name if part == 10 else f"{name}-{part}"
            catalog.commit_segment(connection, place, manifest | {"tables": tables})
    grown = (store.root / catalog.NAME).stat().st_size - empty
    wanted = [f"doc-{every // 2 + n:06d}" for n in torch.randint(kept, (looks + 20,)).tolist()]
    taken: dict[str, list[Seconds]] = {"find": [], "all": []}
    for id in wanted:
        taken["find"].append(timed(lambda id=id: store.resolve([id])))  # type: ignore[misc]
        taken["all"].append(
            timed(lambda id=id: list(store.records([*store.resolve([id]).values()], 1)))  # type: ignore[misc]
        )
    milliseconds = {name: [1e3 * wall for _, wall in of[20:]] for name, of in taken.items()}
    return [
        value("id look-up, 10⁶ rows, ms of wall", milliseconds["find"], most=2),
        value("record by id, 10⁶ rows, packed, ms of wall", milliseconds["all"]),
        value("catalog, bytes a sample row", [grown / every], most=50),
    ]


def sizes(folder: Path, arrays: Mapping[str, Tensor], tables: Any) -> list[Row]:
    """Bytes in memory ÷ bytes of the segment's files."""
    held = sum(tensor.nbytes for tensor in arrays.values())
    found = []
    for profile in PROFILES:
        path = segment(folder / "sizes", profile, arrays, tables)
        stored = read_manifest(path)["segment"]["bytes"]
        found.append(value(f"times smaller, {profile}", [held / stored]))
    return found


# -- peers -------------------------------------------------------------------------------------


def peers(folder: Path, D: Tensor, tables: Any, turns: int) -> list[Row]:
    """Writing D, scanning it and reading one record of it, with this library and others."""
    found, data = [], bits(D)
    columns = tables["exposures"]
    places = [ends({k: columns[k][n] for k in columns}) for n in range(len(columns["rows"]))]
    plain = folder / "peer.raw"
    blocks = [(start, min(start + BLOCK, len(data))) for start in range(0, len(data), BLOCK)]
    write_plain(plain, [data])
    file = os.open(plain, os.O_RDONLY)

    def pread(start: int, stop: int) -> bytes:
        return os.pread(file, 2 * WIDTH * (stop - start), 2 * WIDTH * start)

    for name, write, open_ in writers(folder, data):
        write()
        read = open_()
        assert np.array_equal(read(3, 9), data[3:9])
        some = cycle(places)
        seconds = by_turns(
            {
                "write raw": lambda: write_plain(plain, [data], sync=False),
                "write": write,
                "scan raw": lambda: [pread(*block) for block in blocks],
                "scan": lambda read=read: [read(*block) for block in blocks],  # type: ignore[misc]
                "one": lambda read=read, some=some: read(*next(some)),  # type: ignore[misc]
                "one raw": lambda some=some: pread(*next(some)),  # type: ignore[misc]
            },
            turns,
        )
        found += [
            ratio(f"{name}: write", seconds, "write raw", "write"),
            ratio(f"{name}: scan", seconds, "scan raw", "scan"),
            ratio(f"{name}: one record ÷ pread", seconds, "one", "one raw"),
        ]
    os.close(file)
    return found


Reads = Callable[[int, int], np.ndarray]


def writers(folder: Path, data: np.ndarray) -> Iterator[tuple[str, Way, Callable[[], Reads]]]:
    chunks, rows = (CHUNK_ROWS, WIDTH), -(-len(data) // CHUNK_ROWS) * CHUNK_ROWS
    packed = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)

    def by_zarr(path: Path, codec: BloscCodec | None) -> tuple[Way, Callable[[], Reads]]:
        def write() -> None:
            array = zarr.create_array(
                path, shape=data.shape, dtype=data.dtype, chunks=chunks, shards=(rows, WIDTH),
                serializer=BytesCodec(), compressors=codec, overwrite=True,
            )  # fmt: skip
            array[:] = data

        def opened() -> Reads:
            array = zarr.open_array(path, mode="r")
            return lambda start, stop: np.asarray(array[start:stop])

        return write, opened

    def by_ours(profile: str) -> tuple[Way, Callable[[], Reads]]:
        path = folder / f"{profile}.ours"

        def write() -> None:
            shutil.rmtree(path, ignore_errors=True)  # the one that is being read stays open
            write_array(path, data, profile)

        return write, lambda: ZarrArray(path).rows

    yield "gradstore, raw", *by_ours("raw")
    yield "gradstore, packed", *by_ours("packed")
    yield "zarr-python, raw", *by_zarr(folder / "raw.zarr", None)
    yield "zarr-python, packed", *by_zarr(folder / "packed.zarr", packed)

    tensors = folder / "peer.safetensors"

    def from_tensors() -> Reads:
        held = safe_open(tensors, "numpy").get_slice("D")  # type: ignore[no-untyped-call]
        return lambda start, stop: np.asarray(held[start:stop])

    whole = {"D": torch.from_numpy(data)}
    yield "safetensors", lambda: save_file(whole, tensors), from_tensors

    if find_spec("h5py"):
        h5py = import_module("h5py")
        name = folder / "peer.h5"

        def write() -> None:
            name.unlink(missing_ok=True)  # the one that is being read stays open
            with h5py.File(name, "w") as file:
                file.create_dataset("D", data=data, chunks=chunks)

        def opened() -> Reads:
            held = h5py.File(name)["D"]
            return lambda start, stop: np.asarray(held[start:stop])

        yield "HDF5", write, opened

    if find_spec("lance"):
        lance, pyarrow = import_module("lance"), import_module("pyarrow")
        rows = pyarrow.FixedSizeListArray.from_arrays(data.ravel(), WIDTH)
        table, place = pyarrow.table({"D": rows}), str(folder / "peer.lance")

        def write_lance() -> None:
            lance.write_dataset(table, place, mode="overwrite")

        def from_lance() -> Reads:
            held = lance.dataset(place)
            return lambda start, stop: np.asarray(
                held.to_table(offset=start, limit=stop - start)["D"].combine_chunks().values
            ).reshape(-1, WIDTH)

        yield "Lance", write_lance, from_lance


# -- data --------------------------------------------------------------------------------------


def drawn_records() -> Iterator[Record]:
    """Records of one segment of the size that the writer makes."""
    likely, held, number = 1 / torch.arange(1, V + 1), 0, 0
    tail = torch.empty(0)
    while held < SEGMENT_BYTES:
        if number % BATCH == 0:
            tail = (likely * torch.rand(V)).bfloat16()
        t = int(SHORTEST * (LONGEST / SHORTEST) ** float(torch.rand(1))) - 1
        entry = torch.rand(t, KEPT).half()
        output = OutputSide(
            H=(17 * torch.randn(t, WIDTH) / WIDTH**0.5).bfloat16(),
            index=drawn_ids(likely, t, KEPT),
            value=entry,
            label=-entry[:, 0],
            tail_mass=entry[:, 1],
            tail=tail,
        )
        norms = (1.5 * torch.randn(t, 1) - 2.5).exp()
        D = (norms * torch.randn(t, WIDTH) / WIDTH**0.5).bfloat16()
        scored = torch.ones(t, dtype=torch.bool)
        made = Record(exposure(f"s-{number}"), drawn_ids(likely, t + 1)[:, 0], scored, D, output)
        held, number = held + made.nbytes, number + 1
        yield made


def drawn_ids(likely: Tensor, rows: int, columns: int = 1) -> Tensor:
    return likely.multinomial(rows * columns, replacement=True).view(rows, columns)


def exposure(id: str) -> Exposure:
    return Exposure(id, 1, 1, 1e-3, 0.1, 1.0, 5.0, 100, 1.0, 1.0, 1.0, None, 0)


def thin_query() -> FactoredGradient:
    """The gradient of a completion of 8 tokens after 16."""
    ids = drawn_ids(1 / torch.arange(1, V + 1), 24)[:, 0]
    read = Term.one_hot(ids, torch.randn(24, WIDTH))
    made = Term(None, torch.randn(8, V), torch.randn(8, WIDTH))
    return FactoredGradient([read, made], (V, WIDTH))


def segment(folder: Path, profile: str, arrays: Mapping[str, Tensor], tables: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_segment(
        folder, run=RUN, kind="gradients", profile=profile, arrays=arrays, tables=tables
    )


def places_of(tables: Any) -> list[Place]:
    columns = (tables["exposures"][name] for name in Place._fields)
    return [Place(*row) for row in zip(*columns, strict=True)]


def ends(place: Mapping[str, Any]) -> tuple[int, int]:
    return place["row_start"], place["row_start"] + place["rows"]


def bits(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes as NumPy has them."""
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def write_plain(path: Path, pieces: Iterable[np.ndarray], *, sync: bool = True) -> None:
    with open(path, "wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece.data.cast("B"))
        if sync:
            os.fsync(file.fileno())


# -- figures -----------------------------------------------------------------------------------


def timed(way: Way) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    way()
    return time.process_time() - cpu, time.perf_counter() - wall


def by_turns(
    ways: Mapping[str, Way], turns: int, clear: Way = lambda: None
) -> dict[str, list[Seconds]]:
    """Seconds of each way in each turn; the first turn warms up."""
    taken: dict[str, list[Seconds]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            clear()
            seconds = timed(way)
            if turn:
                taken[name].append(seconds)
    clear()
    return taken


def ratio(
    name: str, seconds: Mapping[str, Sequence[Seconds]], above: str, below: str, *,
    wall: bool = False, least: float | None = None, most: float | None = None,
) -> Row:  # fmt: skip
    pairs = zip(seconds[above], seconds[below], strict=True)
    return value(name, [a[wall] / b[wall] for a, b in pairs], least, most)


def value(
    name: str, values: Sequence[float], least: float | None = None, most: float | None = None
) -> Row:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "name": name, "value": median(values), "quartiles": [low, high],
        "at_least": least, "at_most": most,
    }  # fmt: skip


def table_of(rows: Iterable[Row]) -> Table:
    table = Table("", "median", "quartiles", "target", "", title="the store beside plain files")
    for row in rows:
        bounds = [("≥", row["at_least"]), ("≤", row["at_most"])]
        target = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        kept = (row["at_least"] or 0) <= row["value"] <= (row["at_most"] or float("inf"))
        spread = "{:.3g} to {:.3g}".format(*row["quartiles"])
        table.add_row(
            row["name"],
            f"{row['value']:.3g}",
            spread,
            target,
            target and ("" if kept else "MISSES"),
        )
    return table


if __name__ == "__main__":
    main()
