from .batches import (
    Batch as Batch,
    TokenBatches as TokenBatches,
    TokenizedDocument as TokenizedDocument,
    pack as pack,
    tokenize as tokenize,
)
from .questions import Question as Question, load_questions as load_questions
from .sources import (
    SourceInfo as SourceInfo,
    available as available,
    fetch as fetch,
)
from .text import Document as Document, load_split as load_split, load_text as load_text
from .tokenizer import train_tokenizer as train_tokenizer
