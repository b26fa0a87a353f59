"""A tiny model with random weights of any family, made by rules over the names of its config's fields."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.names import EXPERT_COUNT_KEYS
from moekit.errors import UnsupportedModel
from moekit.family.exceptions import exceptions_of
from moekit.family.registry import Family, Nested, declared, defaults_of, nested, quiet
from moekit.family.rules import (
    EXPERTS,
    FIRST_SPARE_TOKEN,
    OTHER,
    TEXT,
    VOCABULARY,
    Role,
    chosen_layers,
    is_layer_list,
    rotary_sections,
    rule_for,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "depth")


def tiny_config(family: Family) -> PreTrainedConfig:
    """The family's config, shrunk.

    Raises:
        UnsupportedModel: no config can be made by the rules; says which check of the family refuses it.
    """
    try:
        with quiet():
            made = _shrunk(Nested(family.config, {}), TEXT, {})
    except Exception as error:  # a config can fail in as many ways as there are families
        raise UnsupportedModel(
            f"no tiny config of {family.name!r} can be made: {_first_line(error)}",
            hint="its fields need an entry in moekit/family/exceptions.py",
        ) from error
    made.architectures = [family.architecture]
    return made


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__


def _shrunk(outer: Nested, role: Role, ids: dict[str, int], within: str = "") -> PreTrainedConfig:
    config = outer.kind
    given = {field: _own_default(entry) for field, entry in declared(config).items()} | dict(outer.preset)
    inner = nested(config)
    values: dict[str, Any] = dict(outer.preset)
    for field, value in given.items():
        if field in inner:
            values[field] = _shrunk(inner[field], _role_of(field, role), ids, field)
            continue
        rule = rule_for(field)
        if rule is not None:
            values[field] = rule(value, role, given)
        elif field in _SPECIAL:
            values[field] = _SPECIAL[field]
    values |= _layer_lists(given, values, config)
    values |= _tokens(given, ids)
    values |= _rotary(config, values) if "rope_parameters" in given else {}
    values |= exceptions_of(config.model_type, within)
    # What is left out stands as the class has it, or is derived from what is given.
    return config(**values)


def _role_of(field: str, role: Role) -> Role:
    beside = any(word in field for word in ("vision", "audio", "sam_", "encoder_config", "code2wav"))
    return OTHER if beside or not role.text else role


def _own_default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _layer_lists(given: Mapping[str, Any], values: Mapping[str, Any], config: type[PreTrainedConfig]) -> dict[str, Any]:
    """Lists with an entry for each layer that the class itself states, cut; those that it derives are derived again."""
    depth = next((name for name in _DEPTH if name in given), None)
    if depth is None:
        return {}
    layers, count = given[depth], values[depth]
    lists = {name: value for name, value in given.items() if is_layer_list(value, layers)}
    kept = chosen_layers(lists, layers, count) if lists else []
    # A rule may have made the entries small already.
    return {name: [values.get(name, value)[index] for index in kept] for name, value in lists.items()}


def _rotary(config: type[PreTrainedConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings whose sections were made for wider heads."""
    stated = vars(defaults_of(config)).get("rope_parameters")
    if not isinstance(stated, Mapping) or "mrope_section" not in stated:
        return {}
    return {"rope_parameters": {**stated, "mrope_section": rotary_sections(values, stated)}}


def _tokens(given: Mapping[str, Any], ids: dict[str, int]) -> dict[str, int]:
    """Ids of special tokens, beyond the tokenizer's: each name has one of its own, in every nested config the same."""
    found: dict[str, int] = {}
    for name, value in given.items():
        special = name.endswith(("_token_id", "_token_index", "_bos_id", "_eos_id", "_pad_id")) and name not in _SPECIAL
        if special and isinstance(value, int):
            spare = VOCABULARY - FIRST_SPARE_TOKEN
            found[name] = ids.setdefault(name, FIRST_SPARE_TOKEN + len(ids) % spare)
    return found


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in fp32 on the CPU, in eval mode, of the class that checkpoints of the family name.

    Args:
        family: which.
        seed: of the weights; equal seeds give equal models.

    Raises:
        UnsupportedModel: it cannot be built by the rules, or holds no experts.
    """
    import torch

    config = tiny_config(family)
    config.dtype = torch.float32
    kind: Any = family.model_class()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    except Exception as error:  # a model can fail in as many ways as there are families
        raise UnsupportedModel(
            f"no tiny {family.architecture} can be built: {_first_line(error)}",
            hint="its fields need an entry in moekit/family/exceptions.py",
        ) from error
    randomize(model, seed)
    _settle(model, model)
    return model.eval()


def write(family: Family, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model with a tokenizer of its own, as transformers does.

    Args:
        family: which.
        folder: where to.
        seed: of the weights.

    Returns:
        The folder.

    Raises:
        UnsupportedModel: see `build`.
    """
    from moekit.checkpoint.model import quiet_transformers
    from moekit.family.texts import tokenizer

    model = build(family, seed)
    with quiet(), quiet_transformers():
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def holds_experts(family: Family) -> bool:
    """Whether the family's model holds experts: with twice as many it grows by more than routers do.

    Both are built on the meta device, where tensors have no memory.

    Raises:
        UnsupportedModel: no tiny config can be made, or nothing built of it.
    """
    small, large = (_meta_parameters(family, count) for count in (EXPERTS, 2 * EXPERTS))
    # A router grows by a row of the hidden size an expert, and a bias; an expert is at least a row in and a column out.
    return large - small >= EXPERTS * 2 * TEXT.hidden


def _meta_parameters(family: Family, count: int) -> int:
    import torch

    config = tiny_config(family)
    inner: Any = config
    for name in family.experts_in:
        inner = getattr(inner, name)
    for key in EXPERT_COUNT_KEYS:
        if key in declared(type(inner)):
            setattr(inner, key, count)
    kind: Any = family.model_class()
    with quiet(), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = kind._from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight: matrices keep activations of order one, norms lie near one, biases are small but never zero.

    Fresh models have zero routers and zero selection biases, where every routing looks alike.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    persistent = set(model.state_dict())
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    with torch.no_grad():
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name.rpartition(".")[0].rpartition(".")[2] and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.dim() >= 2 and tensor.shape[-1] > 1 and not name.endswith("bias"):
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            else:
                tensor.copy_(0.1 * noise)


def _settle(module: torch.nn.Module, owner: PreTrainedModel) -> None:
    """Let a class set again what it also sets when a checkpoint is loaded, whatever that holds: all else stays."""
    import torch
    from transformers import PreTrainedModel

    for child in module.children():
        _settle(child, child if isinstance(child, PreTrainedModel) else owner)
    tensors: list[Any] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for tensor in tensors:
        tensor._is_hf_initialized = True
    with torch.no_grad():
        owner._init_weights(module)
