"""Where a sample has its image, captions and key, and what is said about one that has them elsewhere."""

from __future__ import annotations

import json

import pytest

from tests.support import streams
from tests.support.shards import sample, write_shards, write_tar
from training.config.data import Field, parse_fields
from training.data.bad_samples import Skips, usable
from training.data.lanes import Part
from training.data.samples import Unusable
from training.data.sources.fields import DEFAULT, Contents, SampleFields, sample_fields
from training.data.sources.shards import Shard
from training.data.sources.webdataset import ShardSource

IMAGES, TEXTS, KEYS = "jpg;jpeg;png;webp", "txt", "json:key"


def files(**members: object) -> Contents:
    """Members by extension, a dot written as __; what is not bytes becomes a json."""
    return Contents(
        {
            extension.replace("__", "."): value if isinstance(value, bytes) else json.dumps(value).encode()
            for extension, value in members.items()
        },
        {},
    )


def fault(look, *arguments: object) -> tuple[str, str]:
    """Reason and explanation of a part that is not found."""
    with pytest.raises(Unusable) as caught:
        look(*arguments)
    return str(caught.value), caught.value.why


def test_fields_are_extensions_or_paths_in_a_json():
    assert parse_fields("jpg;PNG; .webp", "image_key") == (Field("jpg"), Field("png"), Field("webp"))
    assert parse_fields("txt;json:Caption;meta.json:a.b", "text_key") == (
        Field("txt"),
        Field("json", "Caption"),
        Field("meta.json", "a.b"),
    )
    assert DEFAULT == sample_fields(IMAGES, TEXTS, KEYS) == sample_fields(IMAGES, TEXTS, "json")


def test_the_first_alternative_that_a_sample_has_is_taken():
    fields = sample_fields("png;jpg", "caption.txt;json:long;json:short", "a.json:id;b.json")
    found = files(jpg=b"j", json={"short": "s"}, b__json={"key": "007"})
    assert fields.image_in(found) == b"j"
    assert fields.texts_in(found, {}) == ("s",) and fields.key_in(found, {}) == 7
    found = files(
        jpg=b"j", png=b"p", caption__txt="ä".encode(), json={"short": "s"}, a__json={"id": 5}, b__json={}
    )
    assert fields.image_in(found) == b"p"
    assert fields.texts_in(found, {}) == ("ä",) and fields.key_in(found, {}) == 5


@pytest.mark.parametrize(
    ("path", "value", "captions"),
    [
        ("caption", {"caption": "one"}, ("one",)),
        ("captions", {"captions": ["one", "two"]}, ("one", "two")),
        ("captions.1", {"captions": ["one", "two"]}, ("two",)),
        ("a.b", {"a": {"b": ["one", None]}}, ("one",)),
        ("a.b", {"a.b": "one"}, ("one",)),
        ("sentences.raw", {"sentences": [{"raw": "one", "id": 1}, {"raw": "two"}]}, ("one", "two")),
        ("caption", {"caption": ""}, ("",)),
    ],
)
def test_captions_in_a_json(path, value, captions):
    assert sample_fields(IMAGES, f"json:{path}", KEYS).texts_in(files(json=value), {}) == captions


def test_a_caption_that_is_empty_here_is_looked_for_further_on():
    fields = sample_fields(IMAGES, "json:caption;json:alt;txt", KEYS)
    assert fields.texts_in(files(json={"caption": None, "alt": []}, txt=b"last"), {}) == ("last",)
    assert fault(fields.texts_in, files(json={"caption": None}), {}) == ("missing text", "json:caption is empty")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"json": {"caption": "a"}}, "its json has the field caption, which --text_key 'txt;json:caption' takes"),
        ({"json": {"meta": {"texts": ["a"]}}}, "which --text_key 'txt;json:meta.texts' takes"),
        ({"caption": b"a"}, "it has a .caption, which --text_key 'txt;caption' takes"),
        ({"en__txt": b"a", "json": {"text": "a"}}, "it has a .en.txt, which --text_key 'txt;en.txt' takes"),
        ({"jpg": b"", "cls": b"3"}, "it has .jpg, .cls"),
        ({"json": {"caption": None, "url": "x"}}, "it has .json (with caption, url)"),
    ],
)
def test_captions_that_are_elsewhere(members, why):
    reason, told = fault(DEFAULT.texts_in, files(**members), {})
    assert reason == "missing text" and told.endswith(why)


def test_text_that_is_no_caption():
    fields = sample_fields(IMAGES, "txt;json:text", KEYS)
    assert fault(fields.texts_in, files(txt=b"\xff"), {}) == ("text is not utf-8", "")
    assert fault(fields.texts_in, files(json={"text": "\ud800"}), {}) == ("text is not utf-8", "")
    assert fault(fields.texts_in, files(json=b"{"), {}) == ("json is not valid", "")
    assert fault(fields.texts_in, files(json={"text": 3}), {}) == ("text is not a string", "json:text is 3")
    reason, why = fault(fields.texts_in, files(json={"text": {"url": "x", "raw": "y"}}), {})
    assert reason == "text is not a string"
    assert why == "json:text is an object with url, raw: name one of them, as in --text_key json:text.raw"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"bmp": b"", "txt": b"a"}, f"it has a .bmp, which --image_key '{IMAGES};bmp' takes"),
        (
            {"input__jpg": b"", "output__txt": b"a"},
            f"it has a .input.jpg, which --image_key '{IMAGES};input.jpg' takes, and a .output.txt, which "
            "--text_key 'txt;output.txt' takes",
        ),
        ({"txt": b"a", "json": {}}, "it has .txt, .json"),
        ({"mp4": b""}, "it has .mp4"),
    ],
)
def test_images_that_are_elsewhere(members, why):
    assert fault(DEFAULT.image_in, files(**members)) == ("missing image", why)


@pytest.mark.parametrize(
    ("flag", "members", "reason", "why"),
    [
        (KEYS, {"json": {"key": "ab", "id": 3}}, "key is not an integer", "number id, which --json_key json:id"),
        (
            KEYS,
            {"json": {"key": "ab"}},
            "key is not an integer",
            "json:key is 'ab'; --sample_index position needs",
        ),
        (KEYS, {"json": {"key": True}}, "key is not an integer", "json:key is True; --sample_index position"),
        (KEYS, {"json": {"meta": {"uid": "12"}}}, "json without key", "meta.uid, which --json_key json:meta.uid"),
        (KEYS, {"meta__json": {"key": 3}}, "missing json", "its meta.json has the number key, which --json_key"),
        ("rank", {"json": {"rank": 3, "id": 4}}, "missing json", "the number rank, which --json_key json:rank"),
        (KEYS, {"jpg": b""}, "missing json", "--sample_index position needs no key"),
    ],
)
def test_keys_that_are_elsewhere(flag, members, reason, why):
    found, told = fault(sample_fields(IMAGES, TEXTS, flag).key_in, files(**members), {})
    assert found == reason and why in told


def test_a_link_that_leads_nowhere_is_told():
    lost = Contents({"jpg": b"", "json": b"{}"}, {"txt": "a symbolic link to x"})
    assert fault(DEFAULT.texts_in, lost, {}) == ("missing text", "its .txt is a symbolic link to x")


def rows_and_texts(pattern: str, fields: SampleFields) -> list[tuple[int, str, tuple[str, ...]]]:
    source = ShardSource([Shard(pattern, 0, 100)], 0, fields=fields)
    return [(raw.row, raw.text, raw.more) for raw in usable(source.in_order(Part(0, 1)), Skips())]


def test_a_shard_whose_parts_have_other_names(tmp_path):
    members = [
        {"__key__": str(i), "in.jpg": b"x", "json": {"meta": {"id": i}, "captions": [f"a{i}", f"b{i}"]}}
        for i in range(3)
    ]
    path = str(write_tar(tmp_path / "0.tar", members))
    fields = sample_fields("in.jpg", "json:captions", "json:meta.id")
    assert rows_and_texts(path, fields) == [(i, f"a{i}", (f"b{i}",)) for i in range(3)]


def drawn(pattern: str, epochs: int = 1, **options) -> dict[tuple[int, int], str]:
    """(epoch, row) -> the caption that training uses."""
    seed = ("--seed", options.pop("seed", 0))
    train = streams.train(streams.config(pattern, "--text_key", "json:captions", *seed, samples=8, **options))
    return {
        (epoch, row): streams.text_of(text)
        for epoch in range(epochs)
        for batch in train.epoch(epoch)
        for row, text in zip(batch.index.tolist(), batch.text)
    }


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_sample(tmp_path):
    members = [sample(i, (8, 8)) for i in range(8)]
    for i, one in enumerate(members):
        one["json"] = {"key": i, "captions": [f"{i} {name}" for name in "abc"[: 1 + i % 3]]}
    pattern = write_shards(tmp_path, members, 4)
    found = drawn(pattern, epochs=30)
    uses = {i: [found[epoch, i] for epoch in range(30)] for i in range(8)}
    for i, one in enumerate(members):
        assert set(uses[i]) == set(one["json"]["captions"])  # (2/3)^30 for one of three to be missed
    assert uses[2] != [text.replace("5", "2") for text in uses[5]]  # each sample draws for itself
    assert drawn(pattern, workers=2, batch=2).items() <= found.items()
    assert drawn(pattern, epochs=30, seed=1) != found
