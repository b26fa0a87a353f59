from .registry import Family as Family, discover as discover, family as family
from .texts import texts as texts, tokenizer as tokenizer
from .tiny import build as build, holds_experts as holds_experts, tiny_config as tiny_config, write as write
