"""Which class a folder is: the one that its config names, wherever transformers has it and it writes text.

A multimodal model is opened as what it is, so that nothing of it is left behind; a language model's class is taken
where the config names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moekit.checkpoint.several import has_own_forward, run_as_part, writing_part
from moekit.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# Tables of transformers that say which class of a config writes text; the first that has it counts.
_TABLES = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING", "AutoModelForCausalLM"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "AutoModelForMultimodalLM"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "AutoModelForSeq2SeqLM"),
)


@dataclass(frozen=True)
class Architecture:
    """A class of models, and how transformers makes one.

    Attributes:
        kind: the class; None where it is code from the model's repository, which was not run yet.
        auto: the auto class that makes and loads it; None where the config names the class itself.
    """

    kind: type[PreTrainedModel] | None
    auto: Any = None

    def build(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make a model of a config; it has no values of its own."""
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        maker: Any = self.kind
        if self.auto is not None:
            made: PreTrainedModel = self.auto.from_config(config, trust_remote_code=self.kind is None, **given)
        else:
            made = maker._from_config(config, **given)
        return run_as_part(made)

    def load(self, folder: Path, **options: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Load a folder's weights; what transformers says of it stands beside the model."""
        loader: Any = self.auto or self.kind
        remote = {"trust_remote_code": self.kind is None} if self.auto is not None else {}
        model, told = loader.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **remote, **options
        )
        return run_as_part(model), told


def architecture_of(config: PreTrainedConfig, *, remote: bool = False, file: str | Path | None = None) -> Architecture:
    """The class that a model of this config is.

    Args:
        config: of transformers; `architectures` in it names a class.
        remote: code from the model's repository may run.
        file: for messages.

    Raises:
        UnsupportedModel: transformers has no class of this config that writes text, token after token; or nothing says
            which of its parts is the language model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if remote and (code := _remote_auto(config)) is not None:
        return Architecture(None, getattr(transformers, code))
    _check_language(config, file)
    kind = named_class(config)
    if kind is not None and kind.can_generate():
        return _whole(Architecture(kind), config, file)
    for table, auto in _TABLES:
        mapped: Any = getattr(modeling_auto, table, {}).get(type(config), None)
        if isinstance(mapped, tuple):  # several: the auto class takes the one that is named, else the first
            mapped = next((kind for kind in mapped if kind.__name__ in (config.architectures or ())), mapped[0])
        if isinstance(mapped, type):
            return _whole(Architecture(mapped, getattr(transformers, auto)), config, file)
    named = ", ".join(map(str, config.architectures or ())) or "no class"
    raise UnsupportedModel(
        f"transformers {transformers.__version__} has no model of type {config.model_type!r} that writes text "
        f"(the config names {named})",
        file=file,
        hint="moekit works on models that write text, token after token",
    )


def _whole(found: Architecture, config: PreTrainedConfig, file: str | Path | None) -> Architecture:
    """Refuse a class that only holds models, unless it is told which of them writes text."""
    if found.kind is None or has_own_forward(found.kind) or writing_part(config) is not None:
        return found
    parts = [key.removesuffix("_config") for key in config.sub_configs]
    raise UnsupportedModel(
        f"{found.kind.__name__} is several models ({', '.join(parts)}), has no forward pass of its own, and its config "
        "does not say which of them writes text",
        file=file,
        hint="load the part that writes text with its own class, save_pretrained it, and give that folder",
    )


def named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a config names, where transformers has it and makes it of such a config."""
    import transformers

    for name in config.architectures or ():
        kind: Any = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and getattr(kind, "config_class", None) is type(config):
            return cast("type[PreTrainedModel]", kind)
    return None


def class_name(model: PreTrainedModel) -> str:
    """The class of a live model as transformers knows it, whatever was laid over it."""
    import transformers

    kinds = (kind.__name__ for kind in type(model).__mro__ if getattr(transformers, kind.__name__, None) is kind)
    return next(kinds, type(model).__name__)


def _remote_auto(config: PreTrainedConfig) -> str | None:
    """The auto class for which a repository brings code, where transformers does not know the config."""
    code = getattr(config, "auto_map", None)
    if not isinstance(code, Mapping) or type(config).__module__.startswith("transformers."):
        return None
    return next((auto for _, auto in _TABLES if auto in code), None)


def _check_language(config: PreTrainedConfig, file: str | Path | None) -> None:
    """Refuse what has several language models, or one that reads something else than the text it writes on from."""
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise UnsupportedModel(
            f"nothing says which part of {config.model_type!r} is the language model: {str(error).splitlines()[0]}",
            file=file,
            hint="save the part that writes text as a folder of its own, with its own config",
        ) from error
    parts = config is not text and (config.is_encoder_decoder or text.is_encoder_decoder)
    if parts:
        raise UnsupportedModel(
            f"{config.model_type!r} is an encoder with a decoder, each with a config of its own, or one beside towers",
            file=file,
            hint="moekit works on decoder-only language models, alone or beside towers, and on encoders with a decoder "
            "that both read text by one config (Switch Transformers, NLLB-MoE)",
        )
