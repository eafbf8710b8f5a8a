"""Objects at a URL, by fsspec: whatever file system is there, its errors are one of ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from gradstore.errors import GradstoreError, SettingsError, StoreDamaged, StoreUnreachable
from gradstore.store.files import BLOCK_BYTES, make_folder, sync_tree

_OURS = (  # of a program or a machine, not of what lies at a URL
    AssertionError, AttributeError, LookupError, MemoryError, NameError, TypeError,
)  # fmt: skip


class Objects:
    """The objects below a URL, by their names relative to it.

    All raise :class:`StoreUnreachable` where the file system does not answer or refuses, and
    :class:`SettingsError` for a URL that is none.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs
            from fsspec.implementations.local import LocalFileSystem
        except ImportError:
            raise StoreUnreachable(
                f"segments at {url} need fsspec: run `pip install 'gradstore[remote]'`"
            ) from None
        with _reaching(url):
            try:
                self._files, base = url_to_fs(url)
            except ImportError as error:
                name = getattr(error.__cause__, "name", None) or error.name
                raise StoreUnreachable(
                    f"segments at {url} need another package ({error}): run `pip install {name}`"
                ) from error
            self._files.invalidate_cache()
        self._base: str = base.rstrip("/")
        self.folder = Path(self._base) if isinstance(self._files, LocalFileSystem) else None

    def make(self) -> bool:
        """Make the folder, private where that means something; whether nothing was in it."""
        with _reaching(self.url), suppress(FileNotFoundError):
            if self._files.ls(self._base, detail=False):
                return False
        if self.folder is not None:
            make_folder(self.folder)
        return True

    def sizes(self, below: str = "") -> dict[str, int]:
        """The bytes of every object, or of those in one folder, by name in order."""
        with _reaching(self.url):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._at(below), detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._base) + 1
        return {at[start:]: int(facts["size"] or 0) for at, facts in sorted(found.items())}

    def read(self, name: str) -> bytes | None:
        """A small object whole; None if there is none."""
        with _reaching(f"{self.url}/{name}"):
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def blocks(self, name: str, most: int | None = None) -> Iterator[bytes]:
        """An object's bytes, a megabyte at a time; of a longer one little more than ``most``.

        Raises :class:`StoreDamaged` if there is none.
        """
        got = 0
        with _reaching(f"{self.url}/{name}"):
            try:
                opened = self._files.open(self._at(name), "rb")
            except FileNotFoundError as error:
                raise StoreDamaged(
                    f"{self.url}/{name} is gone; restore it there from a backup, or see "
                    "`gradstore verify --repair`"
                ) from error
            with opened:
                while (most is None or got <= most) and (block := opened.read(BLOCK_BYTES)):
                    got += len(block)
                    yield block

    def write(self, name: str, text: bytes) -> None:
        """Make a small object."""
        with _reaching(f"{self.url}/{name}"):
            try:
                self._files.pipe_file(self._at(name), text)
            except FileNotFoundError:
                self._make_folder_of(name)
                self._files.pipe_file(self._at(name), text)

    def put(self, file: Path, name: str) -> None:
        """Make an object of a file. Raises :class:`StoreDamaged` if there is none."""
        if not file.is_file():
            raise StoreDamaged(
                f"{file} is gone before it was sent to {self.url}; restore it, or set its segment "
                "aside with `gradstore verify --repair`"
            )
        with _reaching(f"{self.url}/{name}"):
            try:
                self._files.put_file(str(file), self._at(name))
            except FileNotFoundError:
                self._make_folder_of(name)
                self._files.put_file(str(file), self._at(name))

    def sync(self, below: str) -> None:
        """Wait until the files of a folder are on the disk, where they are files at all."""
        if self.folder is not None:
            with _reaching(f"{self.url}/{below}"):
                sync_tree(self.folder / below)

    def remove(self, below: str) -> None:
        """Delete all objects of a folder."""
        with _reaching(f"{self.url}/{below}"), suppress(FileNotFoundError):
            if self.folder is not None:
                shutil.rmtree(self.folder / below)  # with folders that have no object left
            elif self.sizes(below):
                self._files.rm(self._at(below), recursive=True)
        if left := self.sizes(below):
            raise StoreUnreachable(f"{self.url} did not delete {', '.join(left)}")

    def _at(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def _make_folder_of(self, name: str) -> None:
        """Object stores have no folders; others want them first."""
        self._files.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)


def check_url(url: str) -> None:
    """Refuse what names no folder, or a secret to keep. Raises :class:`SettingsError`."""
    if "://" not in url or "::" in url or set("*?[]#") & set(url):
        raise SettingsError(
            f"{url!r} is no URL of a folder; expected s3://BUCKET/FOLDER, file:///FOLDER or what "
            "else fsspec opens"
        )
    if urlsplit(url).scheme in ("file", "local") and not urlsplit(url).path.strip("/"):
        raise SettingsError(f"{url!r} names no folder from the root on; expected file:///FOLDER")
    if urlsplit(url).password is not None:
        raise SettingsError(
            "the URL has a password, which the store would keep; give it to the file system by "
            "its own means (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
        )


@contextmanager
def _reaching(where: str) -> Iterator[None]:
    """Turn what a file system raises, each its own, into one clear error.

    OSError, ValueError, botocore's, aiohttp's, gcsfs's: they have no class in common but Exception.
    None is swallowed: the cause goes along, and what is of :data:`_OURS` stays what it is.
    """
    try:
        yield
    except (GradstoreError, *_OURS):
        raise
    except Exception as error:
        raise StoreUnreachable(
            f"{where} cannot be reached ({type(error).__name__}: {error}). Nothing committed so "
            "far is lost; put network, URL or credentials right, then run the same command again."
        ) from error
