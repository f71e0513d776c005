"""What all sites must have set alike, as plain values: sent, compared, and made into objects again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from samestep import codecs
from samestep.agree import outer
from samestep.codecs import Codec
from samestep.errors import MismatchError, SettingsError

_KINDS = {
    **{kind.__name__: kind for kind in (outer.Average, outer.Momentum, outer.Nesterov, outer.Adaptive)},
    **{name: getattr(codecs, name) for name in codecs.__all__ if name not in ("Codec", "Key", "State")},
}
"""What may be named from outside; nothing else is ever made."""


def to_values(thing: Any) -> Any:
    """Return plain values for an outer optimizer or a codec; numbers and text stay what they are.

    Raises:
        SettingsError: it is of a kind that the meeting place does not know.
    """
    if not is_dataclass(thing):
        return list(thing) if isinstance(thing, tuple) else thing
    kind = type(thing).__name__
    if _KINDS.get(kind) is not type(thing):
        raise SettingsError(
            f"You set {thing!r} for samestep.Sites, where the meeting place must know it too. Use one of "
            f"{', '.join(sorted(_KINDS))}."
        )
    return {"kind": kind, **{field.name: to_values(getattr(thing, field.name)) for field in fields(thing)}}


def from_values(values: Any) -> Any:
    """Return what `to_values` was given.

    Raises:
        ValueError: they are not from there.
    """
    if isinstance(values, list):
        return tuple(map(from_values, values))
    if not isinstance(values, dict):
        return values
    kind = _KINDS.get(values.get("kind", ""))
    if kind is None:
        raise ValueError(f"Nothing is called {values.get('kind')!r} here.")
    try:
        return kind(**{name: from_values(value) for name, value in values.items() if name != "kind"})
    except (TypeError, SettingsError) as error:
        raise ValueError(str(error)) from error


def check_alike(mine: Any, theirs: Any, site: str) -> None:
    """Compare what a site brings with what the others have agreed on.

    Raises:
        MismatchError: they differ; names the first three differences.
    """
    found = list(_differences(mine, theirs))
    if found:
        shown = "\n".join(f"  {where}: {a} here, {b} at the meeting place" for where, a, b in found[:3])
        raise MismatchError(
            f"Site {site!r} differs from the sites that are there already:\n{shown}\nUse the same model and settings "
            f"on all sites, or another meeting place."
        )


def _differences(mine: Any, theirs: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in dict.fromkeys([*mine, *theirs]):
            yield from _differences(mine.get(name), theirs.get(name), f"{where}.{name}" if where else name)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs) > 0 and mine != theirs:
        first = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        yield f"{where}[{first}]", mine[first], theirs[first]
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) != len(theirs):
        yield where, f"{len(mine)} of them", f"{len(theirs)}"
    elif mine != theirs:
        yield where, mine, theirs


def codec_of(values: Any) -> Codec:
    """Return the codec that `to_values` was given.

    Raises:
        ValueError: they are not those of a codec.
    """
    codec = from_values(values)
    if not isinstance(codec, Codec):
        raise ValueError("A codec is needed.")
    return codec
