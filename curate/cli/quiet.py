"""What other libraries print: on the command line only errors, since their warnings are about calls that are ours and not the user's.

What matters of them is checked and said by curate itself: tensors that a model lacks, rows beyond its positions, a tokenizer that does not fit.
CURATE_DEBUG=1 shows all of it, of child processes too.
"""

from __future__ import annotations

import os
import warnings

LIBRARIES = (
    "accelerate|datasets|dill|fsspec|httpx|huggingface_hub|jinja2|multiprocess|multiprocessing|numpy|openai|peft|pyarrow|safetensors|sklearn|"
    "tokenizers|torch|transformers|trl|vllm"
)
# the user's own settings win
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "true",  # nothing here forks without starting another program
}


def hush() -> None:
    """Before any of these libraries is imported: they read their settings then."""
    if os.environ.get("CURATE_DEBUG", "") not in ("", "0"):
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=rf"({LIBRARIES})(\.|$)")
