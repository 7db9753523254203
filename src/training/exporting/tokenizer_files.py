"""The files of a tokenizer, as transformers reads them.

open_clip's own tokenizer needs none: its vocabulary is part of that package, which uses it wherever the config in
a folder names no other. transformers' ``CLIPTokenizer`` is the same tokenizer with its vocabulary in files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from training.exporting.subject import CannotExport

_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of ``tokenizer``, one of open_clip's, into ``folder``. CannotExport: it has none."""
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(folder)
    elif is_clip_tokenizer(tokenizer):
        _write_clip(tokenizer, folder)
    elif not isinstance(tokenizer, SimpleTokenizer):
        raise CannotExport(
            f"its tokenizer, {type(tokenizer).__name__}, is chosen by the model's name alone and cannot be kept "
            "in a folder: name its repository as text_cfg.hf_tokenizer_name in the model config"
        )


def is_clip_tokenizer(tokenizer: Any) -> bool:
    """Whether ``tokenizer`` is open_clip's own with its usual settings, which OpenAI's models have."""
    usual = isinstance(tokenizer, SimpleTokenizer) and len(tokenizer.all_special_ids) == 2
    return usual and tokenizer.reduction_fn is None and tokenizer.clean_fn.__name__ == "_clean_lower"


def _write_clip(tokenizer: SimpleTokenizer, folder: Path) -> None:
    names = {"<start_of_text>": _START, "<end_of_text>": _END}
    vocabulary = {names.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "do_lower_case": True,
            "model_max_length": tokenizer.context_length,
        },
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=None) + "\n", encoding="utf-8")
