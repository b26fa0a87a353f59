"""Which model types of the installed transformers are Mixture-of-Experts language models.

Nothing is listed by name: transformers' own tables say which types have a class that models language, and a type is a
MoE if its config, or one nested in it, has a field for the number of experts. Whether the model then holds experts is
told by building it (`moekit.family.tiny.holds_experts`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moekit._names import hint_for
from moekit.checkpoint.names import EXPERT_COUNT_KEYS
from moekit.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# transformers' tables of classes that model language: those of a type itself first, then those of its wrappers.
_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Family:
    """A model type that counts experts.

    Attributes:
        name: model type, as configs say it.
        config: class of its config.
        architecture: name of its model's class in transformers.
        experts_in: path of nested configs to the one that counts experts; empty where the config itself does.
    """

    name: str
    config: type[PreTrainedConfig]
    architecture: str
    experts_in: tuple[str, ...]

    def model_class(self) -> type[PreTrainedModel]:
        """The class that a checkpoint of this family names.

        Raises:
            BadConfig: transformers' table names a class that it does not have.
        """
        import transformers

        found: Any = getattr(transformers, self.architecture, None)
        if found is None:
            raise BadConfig(f"transformers has no class {self.architecture}, which its own table names")
        kind: type[PreTrainedModel] = found
        return kind


def declared(config: type[PreTrainedConfig]) -> dict[str, dataclasses.Field[Any]]:
    """Fields that a config's class declares, by name; those that every config has are left out."""
    from transformers import PreTrainedConfig

    if not dataclasses.is_dataclass(config):
        return {}
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field for field in dataclasses.fields(config) if field.init and field.name not in common}


@dataclass(frozen=True)
class Nested:
    """A config within another.

    Attributes:
        kind: its class.
        preset: values that the outer config gives it where nobody else does.
    """

    kind: type[PreTrainedConfig]
    preset: Mapping[str, Any]


def nested(config: type[PreTrainedConfig]) -> dict[str, Nested]:
    """Configs within a config, by field; where any class will do, the one that the config makes by itself."""
    from transformers import AutoConfig, PreTrainedConfig

    found: dict[str, Nested] = {}
    made: Mapping[str, Any] | None = None
    stated: Mapping[str, Any] = getattr(config, "sub_configs_defaults", {})
    for name, kind in getattr(config, "sub_configs", {}).items():
        if kind is AutoConfig:
            made = vars(defaults_of(config)) if made is None else made
            kind = type(made.get(name))
        if isinstance(kind, type) and issubclass(kind, PreTrainedConfig):
            found[name] = Nested(kind, dict(getattr(stated.get(name), "init_kwargs", {})))
    return found


def defaults_of(config: type[PreTrainedConfig]) -> object:
    """A config as its class makes it by itself; an empty object where it cannot."""
    try:
        with quiet():
            return config()
    except Exception:  # a config can fail in as many ways as there are families
        return object.__new__(type("Nothing", (), {}))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning of defaults that are not ours."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def path_to_experts(
    config: type[PreTrainedConfig], above: tuple[type[PreTrainedConfig], ...] = ()
) -> tuple[str, ...] | None:
    """Path of nested configs to the first that has a field for the number of experts; None without."""
    if not set(EXPERT_COUNT_KEYS).isdisjoint(declared(config)):
        return ()
    for name, inner in nested(config).items():
        kind = inner.kind
        # Only language: a vision tower with experts makes no MoE language model.
        if kind in above or any(word in name for word in ("vision", "audio")):
            continue
        below = path_to_experts(kind, (*above, config))
        if below is not None:
            return (name, *below)
    return None


def _tables() -> list[Mapping[str, Any]]:
    from transformers.models.auto import modeling_auto

    found = [getattr(modeling_auto, name, {}) for name in _TABLES]
    return [dict(table) for table in found]


def _family(name: str, tables: list[Mapping[str, Any]]) -> Family | None:
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[name]
    except Exception:  # a config whose module needs what is not installed
        return None
    path = path_to_experts(config)
    if path is None:
        return None
    # The causal class of a wrapper's type takes the nested config: checkpoints of the wrapper name the whole.
    order = tables if not path else [*tables[1:], tables[0]]
    architecture = next((table[name] for table in order if name in table), None)
    if isinstance(architecture, tuple | list):
        architecture = architecture[0]
    return None if architecture is None else Family(name, config, architecture, path)


def names() -> list[str]:
    """All model types for which transformers has a class that models language."""
    return sorted({name for table in _tables() for name in table})


def family(name: str) -> Family:
    """The family of a model type; "nllb_moe" and "nllb-moe" mean the same.

    Raises:
        BadConfig: transformers has no such type, or it counts no experts.
    """
    known = names()
    written = {entry.replace("-", "_"): entry for entry in known}
    exact = written.get(name.replace("-", "_"))
    if exact is None:
        raise BadConfig(
            f"the installed transformers has no language model of type {name!r}",
            hint=hint_for(name, known, otherwise="`moekit families` lists those with experts; a newer one may have it"),
        )
    found = _family(exact, _tables())
    if found is None:
        raise BadConfig(
            f"the config of {exact!r} has no number of experts ({', '.join(EXPERT_COUNT_KEYS)})",
            hint="`moekit convert` makes experts of a dense Llama-type model",
        )
    return found


def discover() -> list[Family]:
    """All families of the installed transformers whose config counts experts, by name."""
    tables = _tables()
    found = [_family(name, tables) for name in names()]
    return [entry for entry in found if entry is not None]
