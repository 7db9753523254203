"""Commands for tests of the command line, and what becomes of them."""

from __future__ import annotations

import shlex

from training.config.params import Config, parse
from training.main import main

DATA = "--train-data shards/{0..3}.tar --train-num-samples 1000"
FASTCLIP = f"{DATA} --data_size 2000 --fastclip"
REFERENCE = "--ref_model ViT-B-32 --ref_model_pretrained openai"


def config(line: str) -> Config:
    return parse(shlex.split(line))


def refusal(line: str, capsys) -> str:
    """The sentence with which ``line`` is refused, the only thing that the program says."""
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("error: ")
    return err.removeprefix("error: ").rstrip("\n")
