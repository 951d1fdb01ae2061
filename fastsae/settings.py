"""Frozen dataclasses as settings: checked by their annotations, to plain values and back, unknown names refused by name.

Annotations may be int, float, bool, str, Literal, tuple, a union of these, or another such dataclass.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal


def check(config: Any) -> None:
    """Every field has a value of its type; whole numbers become floats where a float is asked for."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _as(hint, value))
        except TypeError:
            raise ValueError(f"{name}={value!r}: pass {_describe(hint)}") from None


def _as(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if any(value is a or (type(value) is type(a) and value == a) for a in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, (tuple, list)):
            kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
            if len(kinds) == len(value):
                return tuple(_as(kind, v) for kind, v in zip(kinds, value, strict=True))
    elif arguments:  # a union
        for kind in arguments:
            try:
                return _as(kind, value)
            except TypeError:
                pass
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf"):
            return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (bool, str, type(None)) or dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
    raise TypeError


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        count = "a list" if arguments[1:] == (...,) else f"a list of {len(arguments)}"
        return f"{count}, each {_describe(arguments[0])}"
    if arguments:
        return " or ".join(_describe(a) for a in arguments)
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: pass a number >= {least}")


def above(config: Any, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > bound:
            raise ValueError(f"{name}={value}: pass a number > {bound}")


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain values of a config, as JSON and YAML write them."""
    return {
        f.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, f.name))
        else list(value) if isinstance(value, tuple) else value
        for f in dataclasses.fields(config)
    }  # fmt: skip


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same without groups: names differ between them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value) if isinstance(value, Mapping) else {name: value}
    return found


def from_dict(values: Mapping[str, Any], kind: type, where: str = "") -> Any:
    """The config that these nested plain values mean; unknown names and values of a wrong type are refused by name."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the config'} is {values!r}: pass names with values")
    kinds = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(unknown(f"{where}{name}", name, list(kinds)))
        if dataclasses.is_dataclass(kinds[name]):
            value = from_dict({} if value is None else value, kinds[name], f"{where}{name}.")  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and float in (kinds[name], *typing.get_args(kinds[name])):
            value = read_text(kinds[name], value)  # YAML takes 1e-3 for text
        arguments[name] = value
    return kind(**arguments)


def unknown(came: str, name: str, allowed: list[str]) -> str:
    """The message for a name that is not known."""
    close = difflib.get_close_matches(name, allowed, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"pass one of {sorted(allowed)}"
    return f"unknown setting {came!r}: {hint}"


def read_text(hint: Any, text: str) -> Any:
    """A flag's text as the value that the annotation asks for; text that it does not fit is returned as it is."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is not Literal else ()
    for kind in choices or (hint,):
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
    for kind in choices or (hint,):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
    return text
