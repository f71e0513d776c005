"""Libraries that only some users need: imported when first used, with one error that names the extra."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from samestep.errors import SettingsError

EXTRA = "privacy"
"""The extra of the package that installs them."""


@cache
def extra_module(name: str, purpose: str) -> ModuleType:
    """Return module `name`.

    Args:
        name: dotted name of the module.
        purpose: what of ours needs it, as the start of a sentence.

    Raises:
        SettingsError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise SettingsError(
            f"{purpose} needs the package {package}, which cannot be imported here ({error}). Install it with "
            f"pip install 'samestep[{EXTRA}]'."
        ) from error
