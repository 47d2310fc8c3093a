"""Optional packages: imported where they are used, with one error that says what to install."""

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """An optional package that a call needs is not installed."""


def require(module: str, package: str, purpose: str) -> Any:
    """Imports a module of an optional package.

    Args:
        module: what to import, for example ``"sklearn.datasets"``.
        package: the name to install it by, for example ``"scikit-learn"``.
        purpose: what needs it, the subject of the error message.

    Raises:
        MissingPackageError: the package is not installed; the message names the pip command. A package that is installed but
            fails to import keeps its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        message = f"{purpose} needs {package}, which is not installed; install it with: pip install {package}"
        raise MissingPackageError(message, name=error.name) from error
