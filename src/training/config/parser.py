"""Reads the command line and ``--config_file`` into plain values, as ``flags`` declares them.

Each flag has two spellings, ``--batch-size`` and ``--batch_size``; abbreviations are not accepted.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training.config.flags import ALL, GROUPS, Flag
from training.config.given import Given, Refusal


def read(argv: Sequence[str]) -> Given:
    """The values of all flags from ``argv``, then ``--config_file``, then their defaults.

    Refusal: a flag that does not exist, a value of the wrong kind. ``--help`` prints the help and exits.
    """
    parser = build_parser()
    # A bare -- separates torchrun's own flags from ours; torchrun passes it on.
    words = [_published_spelling(word) for word in argv if word != "--"]
    try:
        line, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise Refusal(f"{error.argument_name}: {error.message}") from None
    if unknown:
        hint = "see --help" if unknown[0].startswith("-") else "see --help, and put file patterns in quotes"
        raise Refusal(f"{unknown[0]}: not a flag of this program{_suggest(unknown[0], hint)}")
    chosen = vars(line)
    if chosen.get("config_file"):
        chosen = {**read_file(chosen["config_file"]), **chosen}
    defaults = {key: flag.default for key, flag in ALL.items()}
    return Given({**defaults, **chosen}, frozenset(chosen))


def read_file(path: str) -> dict[str, Any]:
    """``{key: value}`` of a YAML or JSON file that maps flags, in either spelling without ``--``, to values."""
    where = f"--config_file {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{where}: the file cannot be read ({error})") from None
    content = _load(text, where) or {}
    if not isinstance(content, dict):
        raise Refusal(f"{where}: expected flags and values ('lr: 0.001'), found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key not in ALL or key == "config_file":
            raise Refusal(f"{where}: there is no flag {name!r} to set{_suggest(str(name), 'see --help')}")
        if key in values:
            raise Refusal(f"{where}: {name!r} is set twice, once in each spelling: remove one")
        try:
            values[key] = _from_file(ALL[key], value)
        except (TypeError, ValueError) as error:
            raise Refusal(f"{where}: {name}: {error}") from None
    return values


def check_values(given: Given) -> None:
    """Refusal: a value that its flag cannot have, or a flag that is not supported."""
    for key, flag in ALL.items():
        value = given.values[key]
        if flag.refused and value != flag.default:
            raise Refusal(f"{given.say(key)}: {flag.refused}")
        for number in value if isinstance(value, list) else [value]:
            if flag.within and number is not None and not _inside(number, flag.within):
                raise Refusal(f"{given.say(key)}: the value must lie in {flag.within}")
        if flag.words and value not in flag.words:
            raise Refusal(f"{given.say(key)}: unknown, choose one of {', '.join(flag.words)}")


def _inside(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(", "))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def build_parser() -> argparse.ArgumentParser:
    """The parser for all flags. Its namespace has no entry for a flag that is not given."""
    parser = _Parser(
        prog="training.main",
        usage="%(prog)s [flags]",
        description="Train a CLIP model, with or without a frozen reference model.",
        epilog="Every flag may be spelled with hyphens or with underscores.",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(message)


class _Pairs(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            setattr(namespace, self.dest, parse_pairs(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def parse_pairs(words: Sequence[str]) -> dict[str, Any]:
    """``["scale=(0.4,1.0)", "use_timm=True"]`` -> ``{"scale": (0.4, 1.0), "use_timm": True}``.

    A value that is not a Python literal stays a string. ValueError: a word without ``=``.
    """
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{word!r} is not of the form key=value, e.g. scale=(0.4,1.0)")
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = value
    return pairs


def parse_sizes(text: str) -> int | list[int]:
    """``"1000"`` -> 1000, ``"1000::500"`` -> [1000, 500]. ValueError otherwise."""
    sizes = [int(part) for part in text.split("::")]
    return sizes[0] if len(sizes) == 1 else sizes


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _sizes(text: str) -> int | list[int]:
    try:
        return parse_sizes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor integers joined with ::") from None


_CONVERT: dict[str, Callable[[str], Any]] = {"str": str, "int": _int, "float": _float, "sizes": _sizes}


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    help_text = flag.help.replace("%", "%%")
    if flag.kind == "switch":
        group.add_argument(flag.name, action="store_true", default=argparse.SUPPRESS, help=help_text)
        return
    if flag.default not in (None, "", {}):
        shown = flag.default if not isinstance(flag.default, list) else " ".join(map(str, flag.default))
        help_text += f" (default: {shown!r})" if shown == "\t" else f" (default: {shown})"
    metavar = (
        None if flag.choices else {"pairs": "KEY=VALUE", "sizes": "N[::N...]"}.get(flag.kind, flag.kind.upper())
    )
    action = {"action": _Pairs} if flag.kind == "pairs" else {"type": _CONVERT[flag.kind]}
    group.add_argument(
        flag.name, nargs=flag.nargs, choices=flag.choices, metavar=metavar, help=help_text, **action
    )


def _published_spelling(word: str) -> str:
    """``--batch_size=8`` -> ``--batch-size=8``; other words as they are."""
    name, equals, value = word.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    return ALL[key].name + equals + value if name.startswith("--") and key in ALL else word


def _suggest(name: str, otherwise: str) -> str:
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), list(ALL), n=1)
    return f"; did you mean {ALL[close[0]].name}?" if close else f"; {otherwise}"


def _load(text: str, where: str) -> Any:
    try:
        if where.endswith(".json"):
            return json.loads(text)
        import yaml  # here, so that runs without a file do not wait for it

        return yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{where}: not valid JSON ({error})") from None
    except Exception as error:
        raise Refusal(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def _from_file(flag: Flag, value: Any) -> Any:
    """``value`` checked against the flag's kind. TypeError, ValueError: what was expected instead."""
    if value is None and flag.default is None:
        return None
    if flag.kind == "pairs":
        if isinstance(value, dict):
            return {str(name): tuple(v) if isinstance(v, list) else v for name, v in value.items()}
        return parse_pairs([value] if isinstance(value, str) else value)
    if flag.kind == "sizes":
        sizes = parse_sizes(value) if isinstance(value, str) else value
        return [_scalar("int", size) for size in sizes] if isinstance(sizes, list) else _scalar("int", sizes)
    if flag.nargs:
        return [_scalar(flag.kind, item) for item in (value if isinstance(value, list) else [value])]
    value = _scalar(flag.kind, value)
    if flag.choices and value not in flag.choices:
        raise ValueError(f"{value!r} is not one of {', '.join(flag.choices)}")
    return value


def _scalar(kind: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "switch" and isinstance(value, bool):
        return value
    if kind == "int" and number and isinstance(value, int):
        return value
    if kind == "float":
        if number:
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-4, without a dot, as a string
            return float(value)
    if kind == "str":
        if isinstance(value, str):
            return value
        if number and isinstance(value, int):  # dist_port: 29500
            return str(value)
    expected = {"switch": "true or false", "int": "an integer", "float": "a number", "str": "a string"}[kind]
    raise TypeError(f"expected {expected}, found {value!r}")
