"""Drop-in: code written for a host library runs unchanged, faster.

    fastsae.patch("sae_lens")            # the library's own classes become fast, modules that already exist too
    fastsae.unpatch("sae_lens")
    fast = fastsae.accelerate(module)    # one module, in place; hosts.restore(module) undoes it

A host is a module of this package that says what replaces what, and nothing about how (see `Host`). `patch` puts the
replacements on the library's own classes rather than subclasses into its registries: class names, isinstance, pickles and
`from sae_lens import TopKSAE` lines that ran earlier stay as they are. `accelerate` gives one module a subclass that
carries the same methods. Both leave parameters, buffers, hooks and configuration untouched.
"""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from torch import nn

HOSTS = ("sae_lens", "dictionary_learning", "sparsify")
"""Names that `patch` takes: those of the libraries' packages."""

Methods = dict[str, Any]
M = TypeVar("M", bound=nn.Module)


class Host(Protocol):
    """What fastsae/hosts/<library> defines. Its functions import the library; importing the module does not."""

    CLASSES: tuple[str, ...]
    """Names of the classes that have fast methods."""

    def methods(self) -> dict[type[nn.Module], Methods]:
        """Each of these classes with its fast methods by name. Called once, before anything is replaced: what a fast method
        falls back to is the `Class.method` that it finds here."""
        ...

    def others(self) -> Iterable[tuple[object, str, Any]]:
        """(class or module, attribute, replacement) of what else `patch` changes: trainers, functions."""
        ...


@cache
def _host(name: str) -> tuple[dict[type[nn.Module], Methods], list[tuple[object, str, Any]]]:
    if name not in HOSTS:
        raise ValueError(f"host={name!r}: pass one of {', '.join(HOSTS)}")
    try:
        import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): install it with pip install 'fastsae[hosts]'") from error
    host = cast(Host, import_module(f"{__name__}.{name}"))
    return host.methods(), list(host.others())


def fast_classes(host: str) -> Iterable[type[nn.Module]]:
    """The classes of `host` that have fast methods."""
    return _host(host)[0].keys()


# ── patch ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_ABSENT = object()
_stock: dict[str, list[tuple[object, str, object]]] = {}
"""Of each patched host, what stood where something else stands now."""


def patch(host: str) -> None:
    """Make `host` fast from here on, modules that already exist included. Twice is as good as once."""
    methods, others = _host(host)
    if host in _stock:
        return
    _stock[host] = []
    of_classes = [(owner, name, new) for owner, by_name in methods.items() for name, new in by_name.items()]
    for owner, name, new in (*of_classes, *others):
        _stock[host].append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, new)


def unpatch(host: str) -> None:
    """Put everything back as it was."""
    _host(host)
    for owner, name, old in reversed(_stock.pop(host, [])):
        if old is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


# ── accelerate ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def accelerate(module: M) -> M:
    """Make this one module fast, in place: same object, same parameters. `restore` undoes it."""
    cls = type(module)
    library = cls.__module__.partition(".")[0]
    if stock_class(cls) is cls:
        if library not in HOSTS or cls not in _host(library)[0]:
            raise TypeError(_unknown(cls))
        module.__class__ = _fast_class(cls)
    return module


def restore(module: M) -> M:
    """Undo `accelerate`."""
    module.__class__ = stock_class(type(module))
    return module


def stock_class(cls: type) -> type:
    """The host's own class, where `cls` is what `accelerate` put in its place; else `cls`."""
    return vars(cls).get("_fastsae_stock", cls)


@cache
def _fast_class(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass under the same name, with the fast methods."""
    methods = _host(stock.__module__.partition(".")[0])[0][stock]

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _empty, (stock,), self.__getstate__()

    body = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_fastsae_stock": stock,
        "__reduce_ex__": reduce,
    }
    metaclass: Any = type(stock)
    return metaclass(stock.__name__, (stock,), {**body, **methods})


def _empty(stock: type[nn.Module]) -> nn.Module:
    """What a copy or a pickle of an accelerated module starts from."""
    cls = _fast_class(stock)
    return cls.__new__(cls)


def _unknown(cls: type) -> str:
    known = (f"{name}: {', '.join(cast(Host, import_module(f'{__name__}.{name}')).CLASSES)}" for name in HOSTS)
    return f"{cls.__module__}.{cls.__qualname__} has no fast version: pass a module of {'; '.join(known)}"
