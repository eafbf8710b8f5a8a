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
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradstore.errors import (
    GradstoreError,
    SettingsError,
    StoreDamaged,
    StoreError,
    StoreExists,
    StoreUnreachable,
)
from gradstore.store import format
from gradstore.store.files import (
    BLOCK_BYTES,
    QUARANTINE,
    make_folder,
    sha256_of,
    sync_tree,
    unlinked,
    write_durably,
    writing,
)
from gradstore.store.manifest import MANIFEST, read_manifest, segment_path, segment_paths

OWNER = "store"  # the object that says whose segments lie beside it
TEMPORARY = ".tmp-fetch-"  # files in a store that are being brought
_TOGETHER = 8  # files that travel at the same time


class Remote:
    """Where the segments of the store at ``root`` lie.

    All raise :class:`StoreUnreachable` where the file system there does not answer or refuses.
    """

    def __init__(self, root: Path, stated: format.StoreFormat) -> None:
        assert stated.elsewhere is not None
        self.root, self.url = root, stated.elsewhere.url
        self._stated, self._cache_bytes = stated, stated.elsewhere.cache_bytes
        self._files, self._base = _opened(self.url)

    # -- the place itself --------------------------------------------------------------------

    def claim(self) -> None:
        """Make the place this store's, before it holds anything. Raises :class:`StoreExists`."""
        if self._is_local and Path(self._base).resolve().is_relative_to(self.root.resolve()):
            raise SettingsError(f"{self.url} lies in the store itself; leave --segments out")
        with _reaching(self.url):
            with suppress(FileNotFoundError):
                if self._files.ls(self._base, detail=False):
                    raise StoreExists(f"{self.url} already holds something; choose another URL")
            if self._is_local:
                make_folder(Path(self._base))
            self._files.makedirs(self._base, exist_ok=True)
            self._files.pipe_file(f"{self._base}/{OWNER}", self._stated.store.encode())

    def _check_ours(self) -> None:
        """Nothing is written or removed where another store's segments may lie."""
        with _reaching(self.url):
            try:
                owner = self._files.cat_file(f"{self._base}/{OWNER}")
            except FileNotFoundError:
                owner = None
        if owner != self._stated.store.encode():
            raise StoreDamaged(
                f"{self.url}/{OWNER} does not say that the segments there are those of "
                f"{self.root}; restore it, or put the URL right in {self.root / format.NAME}"
            )

    @property
    def _is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._files, LocalFileSystem)

    def _at(self, name: str, file: str = "") -> str:
        """The object of a file of the segment that the catalog calls ``name``."""
        return "/".join([self._base, *name.split("/")[1:], *filter(None, [file])])

    # -- there -------------------------------------------------------------------------------

    def send(self, path: Path) -> None:
        """Copy a finished segment there, its manifest last, unless it is there already."""
        name = path.relative_to(self.root).as_posix()
        if not self.has(path):
            self._check_ours()
            with ThreadPoolExecutor(_TOGETHER) as pool:
                list(pool.map(lambda f: self.put(path, f), read_manifest(path)["files"]))
            if self._is_local:
                sync_tree(Path(self._at(name)))
            self.put(path, MANIFEST)
            if self._is_local:
                sync_tree(Path(self._at(name)))
        self.evict()

    def put(self, path: Path, file: str) -> None:
        """Copy one file of a segment there."""
        at = self._at(path.relative_to(self.root).as_posix(), file)
        with _reaching(f"{self.url}: {at}"):
            try:
                self._files.put_file(str(path / file), at)
            except FileNotFoundError:  # object stores have no folders, others want them first
                self._files.makedirs(at.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path / file), at)

    def has(self, path: Path) -> bool:
        """Whether a segment lies there whole: its manifest, which came last, is this one."""
        return self._text(path.relative_to(self.root).as_posix()) == (path / MANIFEST).read_bytes()

    def _text(self, name: str) -> bytes | None:
        with _reaching(f"{self.url}: {self._at(name)}"):
            try:
                return bytes(self._files.cat_file(self._at(name, MANIFEST)))
            except FileNotFoundError:
                return None

    def objects(self, name: str = "") -> dict[str, int]:
        """What lies there of a segment, or of all, by its name in a store, with its bytes."""
        below = self._at(name) if name else self._base
        with _reaching(f"{self.url}: {below}"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(below, detail=True)
            except FileNotFoundError:
                return {}
        names = {f"segments/{at[len(self._base) + 1 :]}": facts for at, facts in found.items()}
        return {file: int(facts["size"] or 0) for file, facts in sorted(names.items())}

    def remove(self, name: str) -> None:
        """Delete a segment there, whatever there is of it, and what workers here kept of it."""
        shutil.rmtree(_home(self.url) / name, ignore_errors=True)
        if self.objects(name):
            self._check_ours()
            with _reaching(f"{self.url}: {self._at(name)}"), suppress(FileNotFoundError):
                self._files.rm(self._at(name), recursive=True)
            if left := self.objects(name):
                raise StoreUnreachable(f"{self.url} did not delete {', '.join(left)}")

    def check(self, path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
        """What is wrong there with a segment: the file, what it is, whether that is damage."""
        name = path.relative_to(self.root).as_posix()
        there, said = self.objects(name), f"{name}/{MANIFEST}"
        if said in there and not self.has(path):
            yield said, "is not the manifest in the store", True
        for file, facts in manifest["files"].items():
            at = f"{name}/{file}"
            if at in there and self._digest(name, file, facts) != facts["sha256"]:
                yield at, f"is not what {said} says", True
        wanted = {said, *(f"{name}/{file}" for file in manifest["files"])}
        for file in sorted(wanted - there.keys()):
            yield file, "is gone", True
        for file in sorted(there.keys() - wanted):
            yield file, f"is not in {said}", False

    def unknown(self) -> Iterator[tuple[str, bool]]:
        """Segments that lie there and not here, not even set aside; and whether they are whole."""
        here = set(segment_paths(self.root)) | {
            self.root / "segments" / path.parent.name / path.name.partition(".")[0]
            for path in (self.root / QUARANTINE).glob("segments/r[0-9]*/[0-9]*")
        }
        there = self.objects()
        for name in sorted({"/".join(file.split("/")[:3]) for file in there}):
            if self.root / name not in here and name != f"segments/{OWNER}":
                yield name, f"{name}/{MANIFEST}" in there

    def mend(self, name: str, file: str, *, here: bool, dry_run: bool = False) -> str | None:
        """Make good what is damaged of a segment, ``here`` or there, by its other copy.

        Says what it did, or with ``dry_run`` would do; None where neither copy is sound.
        """
        path, text = segment_path(self.root, name), self._text(name)
        if not path.exists():
            if text is not None and not dry_run:
                self.adopt(name)
            return None if text is None else f"brought from {self.url}"
        sent, brought = f"sent to {self.url} again", f"brought from {self.url} again"
        if file == MANIFEST:
            if not here:
                self._put_again(path, file, dry_run)
                return sent
            if text in (None, (path / file).read_bytes()):
                return None
            if not dry_run:
                self._replace(path / file, [text])
            return brought
        if (facts := read_manifest(path)["files"].get(file)) is None:
            return None
        if (path / file).exists() and sha256_of(path / file) == facts["sha256"]:
            self._put_again(path, file, dry_run)
            return sent
        if self._digest(name, file, facts) != facts["sha256"]:
            return None
        if not dry_run:
            self._bring(name, file, facts, path / file)
        return brought

    def _put_again(self, path: Path, file: str, dry_run: bool) -> None:
        self._check_ours()
        if not dry_run:
            self.put(path, file)

    @contextmanager
    def copied(self, names: Sequence[str]) -> Iterator[Path]:
        """These of :meth:`objects`, as a folder that is gone afterwards."""
        with TemporaryDirectory(prefix="gradstore-") as folder:
            for name in names:
                if {"", ".", ".."} & set(name.split("/")):
                    raise StoreDamaged(f"{self.url} has an object {name!r:.80}: that is no name")
                target = Path(folder) / name
                make_folder(target.parent)
                segment, _, file = name.partition("/")
                write_durably(target, self._blocks(segment, file), sync=False)
            yield Path(folder)

    def _digest(self, name: str, file: str, facts: Mapping[str, Any]) -> str:
        digest = sha256()
        for block in self._blocks(name, file, facts["bytes"]):
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self, name: str, file: str, most: int | None = None) -> Iterator[bytes]:
        """An object's bytes; what is longer than ``most`` is not what was sent."""
        at, got = self._at(name, file), 0
        with _reaching(f"{self.url}: {at}"):
            try:
                opened = self._files.open(at, "rb")
            except FileNotFoundError as error:
                raise StoreDamaged(
                    f"{at} is gone from {self.url}; restore it there from a backup, or see "
                    f"`gradstore verify -s {self.root} --repair`"
                ) from error
            with opened:
                while block := opened.read(BLOCK_BYTES):
                    got += len(block)
                    yield block
                    if most is not None and got > most:
                        return

    # -- here --------------------------------------------------------------------------------

    def fetch(self, path: Path, array: str = "") -> bool:
        """Bring what is not here of a segment, or of one array; False if nothing was missing."""
        files = {
            file: facts
            for file, facts in read_manifest(path)["files"].items()
            if file.startswith(f"{array}/" if array else "") and not (path / file).exists()
        }
        name = path.relative_to(self.root).as_posix()
        for file, facts in files.items():
            self._bring(name, file, facts, path / file)
        if files:
            used(path)
            self.evict(keep=path)
        return bool(files)

    def _bring(self, name: str, file: str, facts: Mapping[str, Any], target: Path) -> None:
        """Put one file in its place, whole and as its digest says, or not at all."""
        found = self._replace(target, self._blocks(name, file, facts["bytes"]), facts["sha256"])
        if found != facts["sha256"]:
            raise StoreDamaged(
                f"{self._at(name, file)} at {self.url} is not what its manifest says; restore it "
                f"there from a backup, or see `gradstore verify -s {self.root} --repair`"
            )

    def _replace(self, target: Path, pieces: Iterable[bytes], wanted: str | None = None) -> str:
        """Write a file at once, or not at all if its digest is not the one wanted: its digest."""
        unlinked(target, self.root)
        temporary = self.root / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            _, digest = write_durably(temporary, pieces)
            if wanted in (None, digest):
                with writing(target):
                    os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return digest

    def adopt(self, name: str, digest: str | None = None) -> Path:
        """Make the folder of a segment that lies there, without its arrays; raises StoreDamaged.

        ``digest`` is that of its manifest, where it is known.
        """
        text, path = self._text(name), segment_path(self.root, name)
        if text is None or digest not in (None, sha256(text).hexdigest()):
            raise StoreDamaged(f"{self.url} does not have {name} as the catalog knows it")
        temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
        try:
            make_folder(temporary)
            write_durably(temporary / MANIFEST, [text])
            for file, facts in read_manifest(temporary)["files"].items():
                make_folder((temporary / file).parent)
                if not _is_shard(file):
                    self._bring(name, file, facts, temporary / file)
            sync_tree(temporary)
            with writing(path):
                try:
                    os.rename(temporary, path)
                except OSError:
                    if not (path / MANIFEST).exists():  # else another worker was faster
                        raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    def evict(self, keep: Path | None = None) -> None:
        """Remove arrays here until the rest fits, of segments used longest ago first.

        Only of those that lie there whole, and not of ``keep``, however large it is.
        """
        held = {path: list(_shards(path)) for path in segment_paths(self.root)}
        sizes = {path: sum(map(_size, shards)) for path, shards in held.items()}
        left = sum(sizes.values())
        for path in sorted(filter(sizes.get, held), key=_used_at):
            if left <= self._cache_bytes:
                break
            with suppress(FileNotFoundError):  # it is being erased
                if path != keep and self.has(path):
                    for shard in held[path]:
                        shard.unlink(missing_ok=True)
                    left -= sizes[path]


def of(root: Path) -> Remote | None:
    """Where the segments of the store at ``root`` lie, if not there."""
    stated = format.load(root)
    return None if stated.elsewhere is None else Remote(root, stated)


def send(root: Path, path: Path) -> None:
    """Send a segment where the store's segments lie; called before it is entered."""
    if (remote := of(root)) is not None:
        remote.send(path)


def discard(root: Path, path: Path) -> None:
    """Remove a segment whose place another took; recovery removes what a crash leaves of it here.

    There before here: as long as something lies there, a folder here tells of it.
    """
    if path.exists() and (remote := of(root)) is not None:
        remote.remove(path.relative_to(root).as_posix())
    shutil.rmtree(path, ignore_errors=True)


def fetched(path: Path, array: str) -> bool:
    """Whether an array of a segment was not here and now is; False in a store that has it all."""
    try:
        remote = of(path.parents[2])
    except (IndexError, StoreError):
        return False
    return remote is not None and remote.fetch(path, array)


def is_here(path: Path, array: str) -> bool:
    """Whether the bytes of a segment's array are here."""
    return any(True for _ in _shards(path, array))


def is_away(path: Path, file: str) -> bool:
    """Whether a file of a segment may be missing here, and is."""
    return _is_shard(file) and not os.path.lexists(path / file)


def used(path: Path) -> None:
    """Remember that a segment was used now: others make room before it does."""
    with suppress(OSError):
        os.utime(path / MANIFEST)


@dataclass(frozen=True)
class Distant:
    """A segment of a store whose segments lie elsewhere, as it is handed to another machine."""

    root: Path
    name: str
    digest: str
    stated: format.StoreFormat

    def here(self) -> Path:
        """Where this machine reads it: in the store if that is here, else in a cache of its own."""
        with suppress(OSError):
            if sha256_of(self.root / self.name / MANIFEST) == self.digest:
                return self.root / self.name
        assert self.stated.elsewhere is not None
        root = _home(self.stated.elsewhere.url)
        make_folder(root)
        if not (root / format.NAME).exists():
            self.stated.save(root)
        path = segment_path(root, self.name)
        with suppress(OSError):
            if sha256_of(path / MANIFEST) == self.digest:
                return path
        shutil.rmtree(path, ignore_errors=True)
        return Remote(root, self.stated).adopt(self.name, self.digest)


def anywhere(root: Path, names: Sequence[str]) -> Sequence[Path | Distant]:
    """Segments, by the catalog's names, for a function that may run on another machine."""
    stated, paths = format.load(root), [segment_path(root, name) for name in names]
    if stated.elsewhere is None:
        return paths
    return [
        Distant(root, name, sha256_of(path / MANIFEST), stated)
        for name, path in zip(names, paths, strict=True)
    ]


# -- inside ----------------------------------------------------------------------------------


def check_url(url: str) -> None:
    """Refuse what would be kept in ``gradstore.json`` and should not. Raises SettingsError."""
    from urllib.parse import urlsplit

    if "://" not in url or "::" in url or set("*?[]#") & set(url):
        raise SettingsError(
            f"{url!r} is no URL of a folder; expected s3://BUCKET/FOLDER, file:///FOLDER or what "
            "else fsspec opens"
        )
    if urlsplit(url).password is not None:
        raise SettingsError(
            "the URL has a password, which the store would keep; give it to the file system by "
            "its own means (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
        )


def _opened(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise StoreUnreachable(
            f"segments at {url} need fsspec: run `pip install 'gradstore[remote]'`"
        ) from None
    with _reaching(url):
        try:
            files, base = url_to_fs(url)
        except ImportError as error:
            name = getattr(error.__cause__, "name", None) or error.name
            raise StoreUnreachable(
                f"segments at {url} need another package ({error}): run `pip install {name}`"
            ) from error
        files.invalidate_cache()
        return files, base.rstrip("/")


@contextmanager
def _reaching(where: str) -> Iterator[None]:
    """Turn what a file system raises, each its own, into one clear error."""
    try:
        yield
    except (GradstoreError, FileNotFoundError):
        raise
    except Exception as error:
        raise StoreUnreachable(
            f"{where} cannot be reached ({type(error).__name__}: {error}). Nothing committed so "
            "far is lost; put network, URL or credentials right, then run the same command again."
        ) from error


def _is_shard(file: str) -> bool:
    return file.split("/")[1:2] == ["c"]


def _shards(path: Path, array: str = "*") -> Iterator[Path]:
    return (shard for shard in path.glob(f"{array}/c/**/0") if shard.is_file())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _used_at(path: Path) -> float:
    with suppress(OSError):
        return (path / MANIFEST).stat().st_mtime
    return 0.0


def _home(url: str) -> Path:
    """Where a machine that has not the store keeps segments of it: laid out as in the store."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradstore"
    return (
        Path(os.environ.get("GRADSTORE_CACHE") or default) / sha256(url.encode()).hexdigest()[:16]
    )
