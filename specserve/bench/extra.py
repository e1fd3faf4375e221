"""What `pip install 'specserve[bench]'` brings, imported when it is needed: serving does without."""

from __future__ import annotations

import importlib
from types import ModuleType

from specserve.core.errors import SpecserveError


class MissingPackageError(SpecserveError):
    """A package of the extra `bench` is not installed."""

    code = "missing_package"


def needed(module: str, what_for: str) -> ModuleType:
    """The module, imported; raises MissingPackageError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there and broken
        message = f"{what_for} needs {package}, which is not installed: pip install 'specserve[bench]'."
        raise MissingPackageError(message) from error
