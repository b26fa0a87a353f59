"""A tiny vision MoE with its processor, and conversations about real pictures: those that scikit-learn carries."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
import transformers

from tests.families import EXPERTS, TOP_K, VOCAB, WIDTH, randomize

# Photographs of the package: a temple and a flower.
PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
PATCHES, TOKENS_A_PICTURE = 49, 16
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}"
)


def processor() -> Any:
    """Aria's processor with a tokenizer of one token a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    letters = sorted(set(string.printable) - set("\x0b\x0c\r"))
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return transformers.AriaProcessor(
        image_processor=transformers.AriaImageProcessorPil(max_image_size=980),
        tokenizer=tokenizer,
        size_conversion={980: TOKENS_A_PICTURE},
        chat_template=TEMPLATE,
    )


def vision_model(seed: int = 0) -> Any:
    """A tiny random Aria: a picture is seven by seven patches, and sixteen tokens."""
    config = transformers.AriaConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": WIDTH,
            "moe_num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "moe_num_shared_experts": 1,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        },
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "patch_size": 140,
            "image_size": 980,
        },
        image_token_index=4,
        projector_patch_to_query_dict={PATCHES: TOKENS_A_PICTURE},
    )
    config.dtype = torch.float32
    model = transformers.AriaForConditionalGeneration(config)
    randomize(model, seed)
    return model.eval()


def write_vision_model(folder: Path, seed: int = 0) -> Path:
    """The model with its processor, as transformers writes them."""
    vision_model(seed).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def conversation(picture: Path | str, question: str, answer: str) -> dict[str, Any]:
    """A record about one picture."""
    shown = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]}


def write_conversations(file: Path, count: int = 6) -> Path:
    """Conversations about crops of the photographs, one a line."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = ("china", "flower")[number % 2]
        with Image.open(PHOTOS / f"{name}.jpg") as photo:
            left = 40 * number
            photo.crop((left, 60, left + 160, 60 + 40 * (number % 3 + 1))).save(file.parent / f"{name}-{number}.png")
        answer = ("a temple by the water", "a dahlia in bloom")[number % 2]
        lines.append(json.dumps(conversation(f"{name}-{number}.png", f"what is in picture {number}?", answer)))
    file.write_text("\n".join(lines) + "\n")
    return file
