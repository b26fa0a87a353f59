"""The catalogue: kinds of methods, and the methods of each kind. No torch until a method is asked for."""

from moekit.catalogue.kind import KIND_ENTRY_POINTS, Kind, kind_of, kinds
from moekit.catalogue.method import (
    ENTRY_POINT_GROUP,
    MethodRecord,
    get,
    load_all,
    make,
    methods,
    of,
    register,
)
from moekit.catalogue.taxonomy import AXES, TRAITS, Axis, Trait

__all__ = [
    "AXES",
    "ENTRY_POINT_GROUP",
    "KIND_ENTRY_POINTS",
    "TRAITS",
    "Axis",
    "Kind",
    "MethodRecord",
    "Trait",
    "get",
    "kind_of",
    "kinds",
    "load_all",
    "make",
    "methods",
    "of",
    "register",
]
