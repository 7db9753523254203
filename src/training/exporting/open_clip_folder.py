"""The folder that ``open_clip.create_model_and_transforms('local-dir:DIR')`` opens, and the weights alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save_file

from training.exporting.model_card import model_card
from training.exporting.subject import Subject
from training.exporting.tokenizer_files import write_tokenizer

_log = logging.getLogger(__name__)


def write_folder(subject: Subject, folder: Path) -> None:
    """Weights, ``open_clip_config.json`` with the preprocess config, tokenizer files and a model card.

    CannotExport: the tokenizer has no files.
    """
    write_tokenizer(subject.built.tokenizer, folder)
    text_model = subject.config["text_cfg"].get("hf_model_name", "")
    if text_model and Path(text_model).exists():
        _log.warning(
            "%s says text_cfg.hf_model_name %s, a folder of this machine; before others open the export, write "
            "the name there that this text model has on the Hugging Face hub",
            *(HF_CONFIG_NAME, text_model),
        )
    config = {"model_cfg": subject.config, "preprocess_cfg": subject.preprocess}
    (folder / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(subject.weights(), folder / HF_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / "README.md").write_text(model_card(subject), encoding="utf-8")


def write_weights(subject: Subject, folder: Path) -> None:
    """The weights alone, under open_clip's names; the file's header describes the model."""
    description = json.dumps(subject.built.description.held() | {"model_cfg": subject.config})
    save_file(
        subject.weights(), folder / "model.safetensors", metadata={"format": "pt", "architecture": description}
    )
