"""Every error that gradstore raises on purpose.

GradstoreError
├── StoreError           the store on disk
│   ├── StoreMissing       there is no store at that path
│   ├── StoreExists        there is one already
│   ├── StoreBusy          another process is writing it
│   ├── StoreTooNew        written by a newer gradstore
│   ├── StoreDamaged       a file is not what its digest or manifest says
│   │   └── KeyShredded      the record was erased: nobody can read this copy of it
│   ├── StoreUnwritable    the disk is full or refuses the write
│   └── StoreUnreachable   the file system that holds its segments does not answer, or refuses
├── EncryptionError      the master key is missing, or another store's
├── DataError            the training data as given
├── ModelError           the model, tokenizer or checkpoint as given
├── CaptureError         training does not yield the gradients that were asked for
├── IdError              ids that name no sample, or several
├── QueryError           SQL that DuckDB refuses
├── InfluenceError       an influence query that cannot be answered
├── ForgetError          a forget request that cannot be carried out
├── SettingsError        settings that contradict each other, whatever the store holds
├── EvaluateError        an evaluation that cannot be carried out
└── ReportError          a page that cannot be made

The library raises; only the command line prints and exits.
"""


class GradstoreError(Exception):
    """Root of all errors raised on purpose; ``str(error)`` is a sentence with the next step."""


class StoreError(GradstoreError):
    """Something about the store on disk."""


class StoreMissing(StoreError, FileNotFoundError):
    """There is no store at the path given."""


class StoreExists(StoreError, FileExistsError):
    """A store, or something else, is already at the path given."""


class StoreBusy(StoreError, BlockingIOError):
    """Another process holds the lock that this operation needs."""


class StoreTooNew(StoreError):
    """The store was written by a newer gradstore than this one."""


class StoreDamaged(StoreError):
    """A file of the store is missing, short, or not what its digest says."""


class KeyShredded(StoreDamaged):
    """The key of what was to be read was shredded: this is a copy from before an erasure."""


class StoreUnwritable(StoreError, OSError):
    """The file system refused a write (disk full, read-only, input/output error)."""


class StoreUnreachable(StoreError, OSError):
    """The file system elsewhere that holds the segments does not answer, or refuses."""


class EncryptionError(GradstoreError):
    """The master key of an encrypted store is not given, is no key, or is another store's."""


class DataError(GradstoreError, ValueError):
    """The training data cannot be used as given."""


class ModelError(GradstoreError, ValueError):
    """The model, tokenizer or checkpoint cannot be used as given."""


class CaptureError(GradstoreError, RuntimeError):
    """Training does not yield the gradients that were asked for."""


class IdError(GradstoreError, LookupError):
    """An id names no sample of the store, or an abbreviation names several."""


class QueryError(GradstoreError, ValueError):
    """DuckDB refused the SQL."""


class InfluenceError(GradstoreError, ValueError):
    """The influence query cannot be answered as given."""


class ForgetError(GradstoreError, ValueError):
    """The forget request cannot be carried out as given."""


class SettingsError(GradstoreError, ValueError):
    """Settings contradict each other, whatever the store holds; on the command line it is usage."""


class EvaluateError(GradstoreError, ValueError):
    """The evaluation cannot be carried out as given."""


class ReportError(GradstoreError, RuntimeError):
    """A page cannot be made here: its libraries are not installed."""
