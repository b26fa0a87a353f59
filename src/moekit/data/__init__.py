"""Text, batches and questions: local files, hub ids, and packages that carry text or a model."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Batch": "batches",
        "Document": "text",
        "Question": "questions",
        "SourceInfo": "sources",
        "TokenBatches": "batches",
        "TokenizedDocument": "batches",
        "available": "sources",
        "fetch": "sources",
        "load_questions": "questions",
        "load_text": "text",
        "pack": "batches",
        "tokenize": "batches",
        "train_tokenizer": "tokenizer",
    },
)
