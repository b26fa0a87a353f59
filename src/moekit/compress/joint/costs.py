"""What recipes cost, layer by layer: a table that is measured once and solved for any budget.

The table is plain data. It says of which model and which token ids it holds, so that it is reused only where it holds.

Legend: t tokens, h channels, N tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moekit._validation import parse_file
from moekit.compress.joint.recipe import LayerRecipe
from moekit.errors import BadConfig

Price = Literal["fisher", "change"]
MOST_BYTES = 256 << 20


class CostRow(BaseModel):
    """One recipe in one layer, all others as they are.

    y is the block's output on the unchanged model's inputs, D what the recipe changes of it, g the gradient of the loss
    at y, s what the residual stream holds behind the layer.

    Attributes:
        layer: decoder layer.
        recipe: what is done to it.
        bytes: of the layer's experts and router in the folder that is written.
        weights: of its experts, those that rounding would touch.
        rho: sum |D|^2 / sum |y|^2.
        change: sum |D|^2 / sum |s|^2, rho weighted by the ratio of the norms: comparable across layers, as rho is not.
        fisher: F = 1/(2 N) sum_t (sum_h g D)^2, nats a token; None where no gradient was taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    recipe: LayerRecipe
    bytes: int = Field(ge=0)
    weights: int = Field(ge=0)
    rho: float = Field(ge=0)
    change: float = Field(ge=0)
    fisher: float | None = Field(default=None, ge=0)


class CostTable(BaseModel):
    """Costs of recipes, and what they were measured on.

    Attributes:
        format: version of this file.
        model: for people.
        fingerprint: of the model.
        methods: way -> name and knobs of the method that carries it out.
        group: weights that share a scale where rounded.
        seed: of sampled targets and of random methods.
        tokens: N.
        ids_sha256: of the token ids, their masks and domains.
        rows: of all layers and recipes that were measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: Literal[1] = 1
    model: str = ""
    fingerprint: str
    methods: dict[str, Any] = Field(default_factory=dict)
    group: int = 0
    seed: int = 0
    tokens: int = 0
    ids_sha256: str
    rows: tuple[CostRow, ...] = ()

    @property
    def by_recipe(self) -> dict[tuple[int, LayerRecipe], CostRow]:
        """(layer, recipe) -> row."""
        return {(row.layer, row.recipe): row for row in self.rows}

    @property
    def price(self) -> Price:
        """What plans are priced by: Fisher errors where every row has one, else changes of the residual stream."""
        return "fisher" if self.rows and all(row.fisher is not None for row in self.rows) else "change"

    def in_nats(self) -> CostTable:
        """The rows that have Fisher errors."""
        return self.model_copy(update={"rows": tuple(row for row in self.rows if row.fisher is not None)})

    def in_changes(self) -> CostTable:
        """All rows without their Fisher errors."""
        return self.model_copy(update={"rows": tuple(r.model_copy(update={"fisher": None}) for r in self.rows)})

    def cost(self, row: CostRow) -> float:
        """What a row costs, in the unit of `price`."""
        if self.price == "change":
            return row.change
        assert row.fisher is not None
        return row.fisher

    def alike(self, other: CostTable) -> bool:
        """Whether rows of both may stand beside each other."""
        told = {"fingerprint", "methods", "group", "seed", "ids_sha256"}
        return self.model_dump(include=told) == other.model_dump(include=told)

    def with_rows(self, rows: Iterable[CostRow]) -> CostTable:
        """The table with further rows, which replace those of the same layer and recipe; ordered by layer."""
        merged = self.by_recipe | {(row.layer, row.recipe): row for row in rows}
        ordered = sorted(merged.values(), key=lambda row: (row.layer, -row.bytes, str(row.recipe)))
        return self.model_copy(update={"rows": tuple(ordered)})

    def missing(self, wanted: Mapping[int, Iterable[LayerRecipe]], *, fisher: bool) -> dict[int, list[LayerRecipe]]:
        """Layer -> recipes that are not in the table yet.

        Args:
            wanted: layer -> recipes.
            fisher: whether rows without Fisher errors count as missing.
        """
        known = {key for key, row in self.by_recipe.items() if row.fisher is not None or not fisher}
        found = {layer: [r for r in recipes if (layer, r) not in known] for layer, recipes in wanted.items()}
        return {layer: recipes for layer, recipes in found.items() if recipes}


def read_table(path: Path) -> CostTable:
    """A stored table.

    Raises:
        BadData: missing, damaged, or something else.
    """
    return parse_file(
        CostTable,
        path,
        what="cost table of `moekit fit`",
        missing="`moekit fit --costs FILE` writes one",
        hint="remove it, or give another name",
        limit=MOST_BYTES,
    )


def known_rows(path: Path, like: CostTable) -> CostTable:
    """A table with the rows of a file that hold for it, too.

    Raises:
        BadConfig: the file's rows were measured on another model, text or method.
        BadData: it is no such table.
    """
    if not path.exists():
        return like
    stored = read_table(path)
    if not stored.alike(like):
        raise BadConfig(
            "these costs were measured on another model or text, or with other methods",
            file=path,
            hint="give another file with --costs; this one is not touched",
        )
    return like.with_rows(stored.rows)
