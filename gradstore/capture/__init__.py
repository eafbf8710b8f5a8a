"""Training to records: hooks that see each sample's gradient fall out of the backward pass."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Importing any module in here makes ``gradstore.capture`` this package: call through it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from gradstore.capture.loop import capture

        return capture(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
