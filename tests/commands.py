"""Commands for tests of the command line, and what becomes of them."""

from __future__ import annotations

import shlex

import pytest

from training.config.params import Config, parse

DATA = "--train-data shards/{0..3}.tar --train-num-samples 1000"
FASTCLIP = f"{DATA} --data_size 2000 --fastclip"
REFERENCE = "--ref_model ViT-B-32 --ref_model_pretrained openai"


def config(line: str) -> Config:
    return parse(shlex.split(line))


def refusal(line: str, capsys) -> str:
    """The sentence with which ``line`` is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        config(line)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("error: ")
    return err.removeprefix("error: ").rstrip("\n")
