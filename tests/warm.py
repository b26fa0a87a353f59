"""What processes of tests are forked with: see `tests.processes`. Nothing here may start a thread or open a file."""

import torch.distributed  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

import tests.families  # noqa: F401
