# SPDX-License-Identifier: MIT
"""What users pass in: arguments and arrays, taken or refused with `[op] rule: expected …, got …`.

A wrong kind of thing is a TypeError, a wrong value a ValueError, and both come before anything is changed.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

EXACT = 2**53  # whole numbers up to here are themselves in float64

# ------------------------------------------------------------ arguments


def short(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(op: str, name: str, value: object, least: int = 1, most: int = 2**63 - 1) -> int:
    """`value` as an int in [least, most]; TypeError if it is none, ValueError if it lies outside."""
    kind = {0: "a non-negative int", 1: "a positive int"}.get(least, "an int")
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        message = (
            f"[{op}] {name} must be {kind}: expected an int, got {short(value)} ({type(value).__name__})"
        )
        raise TypeError(message) from None
    if not least <= number <= most:
        expected = f"≥ {least}" if number < least else f"≤ {most}"
        raise ValueError(f"[{op}] {name} must be {kind}: expected {expected}, got {number}")
    return number


def real(
    op: str,
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> float:
    """`value` as a finite float with least ≤ value ≤ most and above < value < below."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"[{op}] {name} must be a number: expected a float, got {short(value)} ({type(value).__name__})"
        )
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond all floats
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most and above < number < below):
        limits = (("≥", least), (">", above), ("≤", most), ("<", below))
        expected = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit))
        raise ValueError(
            f"[{op}] {name} must be a finite number: expected {expected or 'one'}, got {short(value)}"
        )
    return number


def flag(op: str, name: str, value: object) -> bool:
    """`value` as a bool; numbers are refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"[{op}] {name} must be a bool: expected True or False, got {short(value)}")
    return bool(value)


def one_of(op: str, name: str, value: object, known: Any) -> str:
    """`value` as one of the strings in `known`."""
    if not isinstance(value, str):
        raise TypeError(
            f"[{op}] {name} must be a string: expected one of {listed(known)}, got {short(value)}"
        )
    if value not in known:
        raise ValueError(
            f"[{op}] {name} must be a known name: expected one of {listed(known)}, got {value!r}"
        )
    return value


def listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def undefined(subclass: object, method: str) -> str:
    """What to say of a method that a class of the user's own lacks."""
    return f"[{type(subclass).__name__}] {method} must be defined: expected a method, got none"


class Description:
    """Base of what is described by its constructor's arguments: read-only attributes and a repr that runs."""

    def _set(self, **fields: object) -> None:
        vars(self).update(fields)

    def __setattr__(self, name: str, value: object) -> None:
        kind = type(self).__name__
        raise AttributeError(
            f"[{kind}] {name} is read-only: expected no assignment, got one; make a new {kind}"
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        from inspect import signature

        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def __repr__(self) -> str:
        from inspect import signature

        parts = []
        for name, parameter in signature(type(self)).parameters.items():
            value = getattr(self, name)
            if parameter.default is parameter.empty:
                parts.append(repr(value))
            elif value != parameter.default:
                parts.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


# ------------------------------------------------------------ arrays


def real_array(op: str, name: str, value: object) -> Array:
    """`value` as an array of booleans, integers or floats; nothing else passes, nothing is copied in vain."""
    if type(value) is not np.ndarray:
        value = _plain(op, name, value)
    if value.dtype.kind not in "fiub":
        raise TypeError(
            f"[{op}] {name} must hold real numbers: expected floats, integers or booleans, "
            f"got dtype {value.dtype}; {_CONVERSIONS.get(value.dtype.kind, 'convert it first')}"
        )
    return value


_CONVERSIONS = {
    "O": "a mixture, text or missing values: convert it to numbers first",
    **dict.fromkeys("US", "encode text as numbers first: np.unique(values, return_inverse=True)[1]"),
    "c": "use .real and .imag as separate columns",
    "M": "subtract a date and divide by a time unit first",
    "m": "divide by a time unit first",
}


_OF_TENSORS = {"requires grad": ".detach()", "BFloat16": ".float()"}  # what they say, and what helps


def _plain(op: str, name: str, value: Any) -> Array:
    """np.asarray without its three surprises: masks, sparse matrices, nullable columns."""
    if isinstance(value, np.ndarray) and np.any(getattr(value, "mask", False)):
        raise ValueError(
            f"[{op}] {name} must hold no masked values: expected none, got some; use .filled(...)"
        )
    if hasattr(value, "toarray") and not isinstance(value, np.ndarray):
        raise TypeError(f"[{op}] {name} must be dense: expected an array, got a sparse one; use .toarray()")
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and hasattr(value, "to_numpy") and _numeric_columns(value):
            array = np.asarray(value.to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        kind, text = TypeError if isinstance(error, TypeError) else ValueError, str(error)
        expected = "rows of equal length" if "inhomogeneous" in text else "what NumPy can convert"
        hint = next((f"; use {call}" for part, call in _OF_TENSORS.items() if part in text), "")
        raise kind(
            f"[{op}] {name} must be an array: expected {expected}, got {type(value).__name__} ({text}){hint}"
        ) from error
    return array


def _numeric_columns(frame: Any) -> bool:
    """Whether a pandas object holds numbers only: its nullable dtypes are objects to NumPy, yet numeric."""
    dtypes = frame.dtypes if hasattr(frame, "columns") else [frame.dtype]
    return all(getattr(dtype, "kind", "O") in "fiub" for dtype in dtypes)


def converted(op: str, name: str, array: Array, dtype: str) -> Array:
    """A C-contiguous, aligned array of the dtype; a number too large for it is refused, never made inf."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and array.dtype == dtype:
        return array
    try:
        with np.errstate(over="raise"):
            return np.require(array, dtype, ["C", "A"])
    except FloatingPointError:
        limit = np.finfo(dtype).max
        raise ValueError(
            f"[{op}] {name} must fit in {dtype}: expected numbers up to {limit:.3g}, got larger ones; "
            "scale it, or use dtype='float64'"
        ) from None


def all_finite(array: Array) -> bool:
    """Whether no element of a contiguous float array is NaN or infinite.

    x·x is finite only if all x are, and needs no temporary array; where it overflows, we look properly.
    (np.dot would warn of the overflow, np.vdot does not.)
    """
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


def refuse_rows(op: str, name: str, expected: str, y: Array, bad: Array, hint: str = "") -> None:
    """ValueError for the first row of `y` with an element where `bad` is true."""
    if bad.any():
        row = int(np.argmax(bad.reshape(len(y), -1).any(axis=1)))
        value = y.reshape(len(y), -1)[row][bad.reshape(len(y), -1)[row]][0]
        raise ValueError(
            f"[{op}] {name} must be in range: expected {expected}, got {value} in row {row}{hint}"
        )
