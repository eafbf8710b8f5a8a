"""Segments elsewhere: on any file system that fsspec opens by a URL, with a cache of them here.

A finished segment never changes, so it is sent once, its manifest last, before the transaction that
makes it visible. Its folder stays here with its manifest and the descriptions of its arrays, which
are small; the arrays themselves come and go. A segment is removed there before its folder goes
here. So nothing of a store lies there that no folder tells of, and a crash leaves no more to do
than it does to a local store.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradstore.errors import SettingsError, StoreDamaged, StoreError, StoreExists
from gradstore.store import format
from gradstore.store.files import (
    QUARANTINE,
    SHARDS,
    SKETCHES,
    Facts,
    blocks,
    digest_in,
    is_told,
    make_folder,
    replace_durably,
    sync_folder,
    sync_tree,
    unlinked,
    write_durably,
    writing,
)
from gradstore.store.manifest import (
    MANIFEST,
    files_of,
    is_name,
    segment_path,
    segment_paths,
)
from gradstore.store.objects import Objects

OWNER = "store"  # the object that says whose segments lie beside it
TEMPORARY = ".tmp-fetch-"  # files in a store that are being brought
_TOGETHER = 8  # files that travel at the same time


class Remote:
    """Where the segments of the store at ``root`` lie, and what of them is here.

    A segment's ``name`` is that of the catalog: ``segments/r0/000001`` is the folder ``r0/000001``
    below the URL. All raise :class:`StoreUnreachable` where the file system there does not answer
    or refuses.
    """

    def __init__(self, root: Path, stated: format.StoreFormat) -> None:
        assert stated.elsewhere is not None
        self.root, self._stated = root, stated
        self.url, self._cache_bytes = stated.elsewhere.url, stated.elsewhere.cache_bytes
        self._objects = Objects(self.url)

    def claim(self) -> None:
        """Make the place this store's, before it holds anything. Raises :class:`StoreExists`."""
        folder = self._objects.folder
        if folder is not None:
            here, there = self.root.resolve(), folder.resolve()
            if here.is_relative_to(there) or there.is_relative_to(here):
                raise SettingsError(
                    f"{self.url} and {self.root} lie in each other; keep them apart"
                )
        if not self._objects.make():
            raise StoreExists(f"{self.url} already holds something; choose another URL")
        self._objects.write(OWNER, self._stated.store.encode())

    def check_ours(self) -> None:
        """Nothing is written or removed where another store's segments may lie.

        Raises :class:`StoreDamaged`.
        """
        if self._objects.read(OWNER) != self._stated.store.encode():
            raise StoreDamaged(
                f"{self.url}/{OWNER} does not say that the segments there are those of "
                f"{self.root}: it has to hold {self._stated.store} and nothing else"
            )

    # -- there -------------------------------------------------------------------------------

    def send(self, path: Path) -> None:
        """Copy a finished segment there, its manifest last, unless it is there already."""
        files, here = files_of(path), (path / MANIFEST).read_bytes()
        there = self._objects.read(_folder(self._name(path), MANIFEST))
        if there != here:
            self.check_ours()
            if there is not None and not here.startswith(there):
                raise StoreDamaged(
                    f"{self.url} has another {self._name(path)} already: was {self.root} put back "
                    "from a backup? What was written since would be lost; create another store"
                )
            with ThreadPoolExecutor(_TOGETHER) as pool:
                list(pool.map(lambda file: self._put(path, file), files))
            self._objects.sync(_folder(self._name(path)))
            self._put(path, MANIFEST)
            self._objects.sync(_folder(self._name(path)))
        self.evict()

    def _put(self, path: Path, file: str) -> None:
        self._objects.put(path / file, _folder(self._name(path), file))

    def has(self, path: Path) -> bool:
        """Whether a segment lies there whole: its manifest, which came last, is this one."""
        with suppress(FileNotFoundError):
            here = (path / MANIFEST).read_bytes()
            return self._objects.read(_folder(self._name(path), MANIFEST)) == here
        return False

    def remove(self, name: str) -> None:
        """Delete a segment there, whatever there is of it, and what workers here kept of it."""
        segment_path(self.root, name)  # refuses what would be more than a segment
        shutil.rmtree(home(self.url) / name, ignore_errors=True)
        self.check_ours()
        self._objects.remove(_folder(name))

    def names(self) -> list[str]:
        """All that lies there, by the names of files in a store."""
        return [f"segments/{name}" for name in self._objects.sizes()]

    @contextmanager
    def copied(self, names: Sequence[str]) -> Iterator[Path]:
        """These of :meth:`names`, as a folder that is gone afterwards."""
        with TemporaryDirectory(prefix="gradstore-") as folder:
            for name in names:
                if {"", ".", ".."} & set(name.split("/")):
                    raise StoreDamaged(f"{self.url} has an object {name!r:.80}: that is no name")
                target = Path(folder) / name
                make_folder(target.parent)
                write_durably(target, self._objects.blocks(_folder(name)), sync=False)
            yield Path(folder)

    def unknown(self) -> Iterator[tuple[str, bool]]:
        """Segments that lie there and not here, not even set aside; and whether they are whole."""
        here = set(segment_paths(self.root)) | {
            self.root / "segments" / path.parent.name / path.name.partition(".")[0]
            for path in (self.root / QUARANTINE).glob("segments/r[0-9]*/[0-9]*")
        }
        there = set(self.names()) - {f"segments/{OWNER}"}
        for name in sorted({"/".join(file.split("/")[:3]) for file in there}):
            if self.root / name not in here:
                yield name, is_name(name) and f"{name}/{MANIFEST}" in there

    def check(self, path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
        """What is wrong there with a segment: the file, what it is, whether that is damage."""
        name = self._name(path)
        there = {f"segments/{file}" for file in self._objects.sizes(_folder(name))}
        said = f"{name}/{MANIFEST}"
        wanted = {said, *(f"{name}/{file}" for file in manifest["files"])}
        if said in there and not self.has(path):
            yield said, "is not the manifest in the store", True
        for file, facts in manifest["files"].items():
            with suppress(StoreDamaged):  # it went meanwhile
                if f"{name}/{file}" in there and not self._is_told(name, file, facts):
                    yield f"{name}/{file}", f"is not what {said} says", True
        for file in sorted(wanted - there):
            yield file, "is gone", True
        for file in sorted(there - wanted):
            yield file, f"is not in {said}", False

    def mend(self, name: str, file: str, *, here: bool, dry_run: bool = False) -> str | None:
        """Make good what is damaged of a segment, ``here`` or there, by its other copy.

        Says what it did, or with ``dry_run`` would do; None where neither copy is sound.
        """
        path = segment_path(self.root, name)
        sent, brought = f"sent to {self.url} again", f"brought from {self.url} again"
        text = self._objects.read(_folder(name, MANIFEST))
        if not path.exists():
            if text is not None and not dry_run:
                self.adopt(name)
            return None if text is None else brought
        if file == MANIFEST and here:
            if text is None or self.has(path):
                return None
            if not dry_run:
                self._replace(path / file, [text])
            return brought
        facts = files_of(path).get(file)
        if file == MANIFEST or (facts and _is_sound(path / file, facts)):
            if not dry_run:
                self._put(path, file)
                self._objects.sync(_folder(name))
            return sent
        if facts is None or not self._is_told(name, file, facts):
            return None
        if not dry_run:
            self._bring(name, file, facts, path / file)
        return brought

    # -- here --------------------------------------------------------------------------------

    def fetch(self, path: Path, array: str = "") -> bool:
        """Bring what is not here of a segment, or of one array; False if nothing was missing."""
        files = {
            file: facts
            for file, facts in files_of(path).items()
            if file.startswith(f"{array}/" if array else "") and not (path / file).exists()
        }
        for file, facts in files.items():
            self._bring(self._name(path), file, facts, path / file)
        if files:
            used(path)
            self.evict(keep=path)
        return bool(files)

    def adopt(self, name: str, digest: str | None = None) -> Path:
        """Make the folder of a segment that lies there, without its arrays.

        ``digest`` is that of its manifest, where it is known. Raises :class:`StoreDamaged`.
        """
        path, text = segment_path(self.root, name), self._objects.read(_folder(name, MANIFEST))
        if text is None or digest not in (None, sha256(text).hexdigest()):
            raise StoreDamaged(f"{self.url} does not have {name} as the catalog knows it")
        temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
        try:
            make_folder(temporary)
            write_durably(temporary / MANIFEST, [text])
            for file, facts in files_of(temporary).items():
                make_folder((temporary / file).parent)
                if not _is_shard(file):
                    self._bring(name, file, facts, temporary / file)
            sync_tree(temporary)
            replace_durably(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    def evict(self, keep: Path | None = None) -> None:
        """Remove arrays here until the rest fits, of segments used longest ago first.

        Only of those that lie there whole, and not of ``keep``, however large it is. A worker's
        copy of one that is no more there goes altogether.
        """
        held = {path: list(_shards(path)) for path in segment_paths(self.root)}
        sizes = {path: sum(map(_size, shards)) for path, shards in held.items()}
        left = sum(sizes.values())
        for path in sorted(filter(sizes.get, held), key=_used_at):
            if left <= self._cache_bytes:
                break
            if path == keep:
                continue
            with suppress(FileNotFoundError, StoreDamaged):  # it goes, or is damaged here
                if self._is_left_over(path):
                    shutil.rmtree(path)
                elif self._is_whole(path):
                    for shard in held[path]:
                        shard.unlink(missing_ok=True)
                else:
                    continue
                left -= sizes[path]

    def _is_left_over(self, path: Path) -> bool:
        if self.root != home(self.url):  # a store's own folder: what is not there yet is to be sent
            return False
        return self._objects.read(_folder(self._name(path), MANIFEST)) is None

    def _is_whole(self, path: Path) -> bool:
        there = self._objects.sizes(_folder(self._name(path)))
        files = files_of(path).items()
        as_long = (there.get(_folder(self._name(path), f)) == facts["bytes"] for f, facts in files)
        return self.has(path) and all(as_long)

    # -- inside ------------------------------------------------------------------------------

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _is_told(self, name: str, file: str, facts: Facts) -> bool:
        return is_told(self._objects.blocks(_folder(name, file), facts["bytes"]), facts)

    def _bring(self, name: str, file: str, facts: Facts, target: Path) -> None:
        """Put one file in its place, whole and as its digest says, or not at all."""
        pieces = self._objects.blocks(_folder(name, file), facts["bytes"])
        if not self._replace(target, pieces, facts):
            raise StoreDamaged(
                f"{self.url}/{_folder(name, file)} is not what its manifest says; restore it there "
                f"from a backup, or see `gradstore verify -s {self.root} --repair`"
            )

    def _replace(self, target: Path, pieces: Iterable[bytes], facts: Facts | None = None) -> bool:
        """Write a file at once, or not at all if it is not what ``facts`` say: whether it is."""
        unlinked(target, self.root)
        name, wanted = ("sha256", None) if facts is None else digest_in(facts)
        temporary = self.root / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            _, digest = write_durably(temporary, pieces, digest=name)
            if wanted in (None, digest):
                with writing(target):
                    os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return wanted in (None, digest)


def of(root: Path) -> Remote | None:
    """Where the segments of the store at ``root`` lie, if not there."""
    stated = format.load(root)
    return None if stated.elsewhere is None else Remote(root, stated)


def send(root: Path, path: Path) -> None:
    """Send a segment where the store's segments lie, if not here; before it is entered."""
    if (remote := of(root)) is not None:
        remote.send(path)


def discard(root: Path, path: Path) -> None:
    """Remove a segment whose place another took, and its sketches; recovery does so after a crash.

    There before here: as long as something lies there, a folder here tells of it.
    """
    sketched = unlinked(root / SKETCHES / path.relative_to(root / "segments"), root)
    if path.exists() and (remote := of(root)) is not None:
        remote.remove(path.relative_to(root).as_posix())
    for folder in (sketched, sketched.with_name(f".tmp-{sketched.name}"), path):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (sketched.parent, path.parent):
        if folder.exists():
            sync_folder(folder)


def fetched(path: Path, array: str) -> bool:
    """Whether an array of a segment was not here and now is; False in a store that has it all."""
    try:
        stated = format.load(path.parents[2])
    except (IndexError, StoreError):
        return False
    return stated.elsewhere is not None and Remote(path.parents[2], stated).fetch(path, array)


def used(path: Path) -> None:
    """Remember that a segment was used now: others make room before it does."""
    with suppress(OSError):
        os.utime(path / MANIFEST)


def is_here(path: Path, array: str) -> bool:
    """Whether the bytes of a segment's array are here."""
    return any((path / array / shard).is_file() for shard in SHARDS)


def is_away(path: Path, file: str) -> bool:
    """Whether a file of a segment may be missing here, and is."""
    return _is_shard(file) and not os.path.lexists(path / file)


def home(url: str) -> Path:
    """Where a machine that has not the store keeps segments of it: laid out as in the store."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradstore"
    name = sha256(url.encode()).hexdigest()[:16]
    return Path(os.environ.get("GRADSTORE_CACHE") or default) / name


def _folder(name: str, file: str = "") -> str:
    """The name below the URL of a segment's folder, or of a file in it."""
    return "/".join([*name.split("/")[1:], *filter(None, [file])])


def _is_shard(file: str) -> bool:
    return file.partition("/")[2] in SHARDS


def _shards(path: Path) -> Iterator[Path]:
    return (file for shard in SHARDS for file in path.glob(f"*/{shard}") if file.is_file())


def _is_sound(path: Path, facts: Facts) -> bool:
    return path.is_file() and is_told(blocks(path), facts)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _used_at(path: Path) -> float:
    with suppress(OSError):
        return (path / MANIFEST).stat().st_mtime
    return 0.0
