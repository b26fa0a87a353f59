"""Every method's record: name, paper, kind, needs, changes, limits.

A method is one class under one decorator::

    @register(name="c2r", kind="routing", paper="arXiv:2504.01337", needs=("coactivation",))
    class C2R(ChoosePart): ...

The record feeds `moekit methods`, `--help`, the docs page, the model card and the test matrix. Packages outside
moekit register through the entry-point group ``moekit.methods``: each entry point names a module whose import
runs the decorator. An import that fails is reported by name, never swallowed.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from moekit._names import hint_for
from moekit._validation import faults
from moekit.catalogue.kind import kind_of, kinds
from moekit.catalogue.taxonomy import DECLARED, Axis, Trait
from moekit.errors import BadConfig

ENTRY_POINT_GROUP = "moekit.methods"

# Folders that hold statistics of their own, but no methods.
_FURTHER_PACKAGES = ("moekit.diagnose.super_experts",)

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class MethodRecord:
    """What the catalogue knows of one method.

    Attributes:
        name: how the user calls it, unique within its kind.
        kind: family of methods: "routing", "convert", "place", "prune", ... An open set.
        paper: arXiv id or URL; "" for what has no paper.
        needs: statistics the trace must carry (see `moekit.trace`).
        changes: what it changes: "routing", "weights", "placement" or "runtime".
        stock: whether its result loads in stock transformers without moekit.
        limits: what it cannot do, one sentence each.
        declared: traits that its class does not imply; see `traits`.
        own_axis: place in the survey's taxonomy where it is not that of its kind; see `axis`.
        cls: the registered class.
        origin: the distribution it came from.
    """

    name: str
    kind: str
    paper: str
    needs: tuple[str, ...]
    changes: str
    stock: bool
    limits: tuple[str, ...]
    cls: type
    origin: str
    declared: frozenset[Trait] = frozenset()
    own_axis: Axis | None = None

    @property
    def traits(self) -> frozenset[Trait]:
        """What it promises, each held by a law (`moekit.catalogue.taxonomy.TRAITS` says in words what).

        - variable_k: tokens may get different numbers of experts.
        - learnable: it learns tensors of its own (its class overrides `parameters` or `shared`).
        - stateful: it hands something from layer to layer within a forward pass.
        - attention: it looks at what the layer's attention looked at.
        - sequence: a token's experts depend on earlier tokens.
        - rewrites: it changes weights of experts that stay (`rewrites` of its class).
        - narrows: the result has fewer expert weights (its class is a `PruneMethod`).
        - grows: the result has more expert weights.
        - stochastic: the result depends on the seed, and on nothing else that is random.
        - stock: stock transformers computes the result without moekit.
        """
        implied = cast("Callable[[], frozenset[Trait]] | None", getattr(self.cls, "implied_traits", None))
        found = self.declared | (implied() if implied is not None else frozenset())
        return found | {"stock"} if self.stock else found

    @property
    def axis(self) -> Axis:
        """Place in the survey's taxonomy; by default that of its kind."""
        return self.own_axis or kind_of(self.kind).axis

    @property
    def doc(self) -> str:
        """The class docstring, cleaned."""
        return inspect.getdoc(self.cls) or ""

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return self.doc.split("\n\n")[0].replace("\n", " ").strip()


_records: dict[tuple[str, str], MethodRecord] = {}
_loaded = False


def register(
    *,
    name: str,
    kind: str,
    paper: str = "",
    needs: tuple[str, ...] = (),
    changes: str,
    stock: bool = True,
    limits: tuple[str, ...] = (),
    traits: tuple[Trait, ...] = (),
    axis: Axis | None = None,
) -> Callable[[C], C]:
    """Enter a class into the catalogue.

    Arguments are those of `MethodRecord`; `traits` are those that the class does not imply, `axis` is given where it is
    not that of the kind.

    Raises:
        BadConfig: another class already has this name and kind, or a trait that cannot be declared.
    """
    if unknown := sorted(set(traits) - set(DECLARED)):
        raise BadConfig(
            f"the {kind} method {name!r} cannot declare the trait {unknown[0]!r}",
            hint=f"{', '.join(DECLARED)} can be declared; others follow from the class",
        )

    def enter(cls: C) -> C:
        known = _records.get((kind, name))
        # Re-running a module (reload, pytest's import modes) defines the same class again: same place, no clash.
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise BadConfig(
                f"two {kind} methods are called {name!r}: {known.cls.__module__} and {cls.__module__}",
                hint="rename one of them, or uninstall one of the packages",
            )
        _records[kind, name] = MethodRecord(
            name=name,
            kind=kind,
            paper=paper,
            needs=needs,
            changes=changes,
            stock=stock,
            limits=limits,
            cls=cls,
            origin=cls.__module__.split(".")[0],
            declared=frozenset(traits),
            own_axis=axis,
        )
        return cls

    return enter


def _load_entry_point(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        raise BadConfig(
            f"the method {point.name!r} of the package {point.dist.name if point.dist else '?'} "
            f"does not import: {type(error).__name__}: {error}",
            hint=f"fix or uninstall it: it is registered as {point.value!r} in the group {ENTRY_POINT_GROUP!r}",
        ) from error


def load_all() -> None:
    """Import every module that may hold a method, here and in other packages, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    try:
        for name in (*(kind.package for kind in kinds()), *_FURTHER_PACKAGES):
            package = importlib.import_module(name)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{name}.{module.name}")
        for point in entry_points(group=ENTRY_POINT_GROUP):
            _load_entry_point(point)
    except BaseException:
        _loaded = False
        raise


def methods(kind: str | None = None) -> Iterator[MethodRecord]:
    """All records, by kind and name."""
    load_all()
    for key in sorted(_records):
        if kind is None or key[0] == kind:
            yield _records[key]


def get(kind: str, name: str) -> MethodRecord:
    """Look one method up.

    Raises:
        BadConfig: no such method; the message names near matches.
    """
    load_all()
    record = _records.get((kind, name))
    if record is not None:
        return record
    names = [n for k, n in sorted(_records) if k == kind]
    raise BadConfig(f"no {kind} method is called {name!r}", hint=hint_for(name, names))


def make(kind: str, name: str, knobs: Mapping[str, Any]) -> Any:
    """A method, made from its name and knobs.

    Args:
        kind: its family.
        name: in the catalogue.
        knobs: fields of its class.

    Raises:
        BadConfig: no such method, or a knob that is unknown or out of bounds: names each with what was given.
    """
    cls: Any = get(kind, name).cls
    try:
        return cls(**knobs)
    except ValidationError as error:
        hint = f"its options: {', '.join(cls.model_fields) or 'none'}"
        raise BadConfig(f"{kind} {name}: {faults(error)}", hint=hint) from error


def of(cls: type) -> MethodRecord:
    """The record of a registered class.

    Raises:
        BadConfig: the class is not registered.
    """
    for record in _records.values():
        if record.cls is cls:
            return record
    raise BadConfig(f"{cls.__name__} is not in the catalogue", hint="decorate it with @register(kind=..., name=...)")
