"""What is read from csv files: the same as by pandas where a file is sound, and no row that is not certain."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.sources.csv_file import CsvFormat, read_pairs

KEYS = ("filepath", "title")
HEADER = "filepath\ttitle\n"
ROWS = [(f"img/{i}.jpg", f"café {i}") for i in range(8)]


def lines(changes: dict[int, str] | None = None, rows=ROWS) -> str:
    """A file of one line per row; row i is in line i + 2. ``changes``: other text for rows."""
    written = ["\t".join(row) for row in rows]
    for i, line in (changes or {}).items():
        written[i] = line
    return HEADER + "\n".join(written) + "\n"


@pytest.fixture
def read(tmp_path):
    """Write ``data`` to a file and read it: pairs, or the refusal without the file's name."""

    def read(data: str | bytes, separator="\t", quoting="auto", encoding="utf-8", keys=KEYS, name="x.csv"):
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        try:
            columns = read_pairs(str(path), keys, CsvFormat(separator, quoting, encoding), "--train-data x.csv")
            return list(zip(*columns, strict=True))
        except ValueError as error:
            assert "\n" not in str(error)
            return str(error).removeprefix("--train-data x.csv")

    return read


SOUND = {
    "plain": lines(),
    "without an end of the last line": lines().rstrip("\n"),
    "Windows": lines().replace("\n", "\r\n"),
    "Windows, written as text": lines().replace("\n", "\r\r\n"),
    "old Macintosh": lines().replace("\n", "\r"),
    "blank lines": "\n" + lines().replace("\n", "\n\n   \n") + "\r\n",
    "quoted": '"filepath"\t"title"\n' + "".join(f'"{a}"\t"{b}"\n' for a, b in ROWS),
    "spaces in the header": lines().replace("filepath", " filepath ", 1).replace("title", " title", 1),
    "more columns": "n\ttitle\tx\tfilepath\t\n" + "".join(f"{i}\t{b}\t\t{a}\t\n" for i, (a, b) in enumerate(ROWS)),
    "byte-order mark": b"\xef\xbb\xbf" + lines().encode(),
    "byte-order mark before a quote sign": b'\xef\xbb\xbf"filepath"' + lines().encode().removeprefix(b"filepath"),
    "utf-16": lines().encode("utf-16"),
    "utf-16, big-endian": b"\xfe\xff" + lines().encode("utf-16-be"),
    "utf-16, Windows": lines().replace("\n", "\r\n").encode("utf-16"),
    "utf-32": lines().encode("utf-32"),
    "gzip": gzip.compress(lines().encode()),
    "bz2": bz2.compress(lines().encode()),
    "xz": lzma.compress(lines().encode()),
    "gzip of utf-16": gzip.compress(lines().encode("utf-16")),
}


@pytest.mark.parametrize("data", SOUND.values(), ids=SOUND)
def test_sound_files(read, data):
    assert read(data) == ROWS


def test_zip(read):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("folder/x.csv", lines())
        archive.writestr("__MACOSX/folder/._x.csv", b"\0")
    assert read(packed.getvalue()) == ROWS
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("other.csv", lines())
    assert read(packed.getvalue()).startswith(": it is a zip archive with 2 files; unpack it")


def test_separators(read):
    for separator in (",", ";", "|", " ", "\x01", "¦"):
        rows = [(path, text.replace(" ", "_")) for path, text in ROWS]
        assert read(lines(rows=rows).replace("\t", separator), separator) == rows
    assert read(lines().replace("\t", "||"), "||") == ROWS
    assert read('filepath, title\nimg/0.jpg, "a, ""b"""\nimg/1.jpg, c,d\n', ", ") == [
        ("img/0.jpg", 'a, "b"'),
        ("img/1.jpg", "c,d"),
    ]


@pytest.mark.parametrize(
    "text", ["", "NA", "null", "NaN", "-", "1e5", " a ", "True", '5" tv', "it's", "a\rb", "\x85"]
)
def test_captions_are_kept_literally(read, text):
    assert read(lines({3: f"img/3.jpg\t{text}"}))[3] == ("img/3.jpg", text)


def test_what_quote_signs_enclose(read):
    text = 'a "big" dog, brown,\r\nruns; then,\nmore\tof it'
    row = '"a ""big"" dog, brown,\r\nruns; then,\nmore\tof it"'
    assert read(lines({3: f"img/3.jpg\t{row}"})) == [*ROWS[:3], ("img/3.jpg", text), *ROWS[4:]]
    assert read(f"title,filepath\n{row},img/3.jpg\n", ",") == [("img/3.jpg", text)]


# characters that matter to csv, and some that matter to other ways of splitting text
TEXT = st.text(st.sampled_from('ab"",,\t\n\r ;|é\x85\u2028🙂'), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5), st.sampled_from("\t,;"), st.sampled_from(["minimal", "auto"]))
def test_what_pandas_writes(tmp_path_factory, texts, separator, quoting):
    """Images may be called like rows, so that nothing looks like one."""
    path = tmp_path_factory.mktemp("pandas") / "x.csv"
    images = [f"{i}.jpg" for i in range(len(texts))]
    table = pd.DataFrame({"title": texts, "n": 1, "filepath": images})
    table.to_csv(path, sep=separator, index=False)
    columns = read_pairs(str(path), KEYS, CsvFormat(separator, quoting), "x")
    assert [list(column) for column in columns] == [images, texts]


PIECES = st.lists(st.sampled_from(["dog", " ", '"', '" ', '""', '5" tv', "é", "S"]), max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(PIECES, min_size=2, max_size=6),
    st.sampled_from("\t,;"),
    st.permutations(["filepath", "n", "title"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_a_row_per_line_or_none(tmp_path_factory, texts, separator, columns, end):
    """Whatever quote signs and separators are in captions that were written as they are."""
    path = tmp_path_factory.mktemp("lines") / "x.csv"
    rows = [
        {"filepath": f"{i}.jpg", "n": "1", "title": text.replace("S", separator)} for i, text in enumerate(texts)
    ]
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    path.write_bytes((end.join(map(separator.join, lines)) + end).encode())
    try:
        images, _ = read_pairs(str(path), KEYS, CsvFormat(separator), "x")
    except ValueError as error:
        assert "x, line " in str(error)
    else:
        assert list(images) == [row["filepath"] for row in rows]


# ------------------------------------------------------------------------------------------------ refused

ROW_3 = "img/3.jpg\tcafé 3"
REFUSED = {
    "a separator in a caption": (lines({3: f"{ROW_3}\tx"}), ", line 5: 3 fields, but the header has 2; put text"),
    "several": (lines({3: f"{ROW_3}\tx", 5: "x"}), "another --csv-separator (the first of 2 such lines)"),
    "a field is missing": (lines({3: "img/3.jpg"}), ", line 5: 1 field, but the header has 2; complete the row"),
    "behind a blank line": (lines({2: "", 3: "img/3.jpg"}), ", line 5: 1 field"),
    "with Windows' ends of lines": (lines({3: "img/3.jpg"}).replace("\n", "\r\n"), ", line 5: 1 field"),
    "with old Macintosh's": (lines({3: "img/3.jpg"}).replace("\n", "\r"), ", line 5: 1 field"),
    "behind a caption of 3 lines": (lines({1: 'a.jpg\t"b\nc\nd"', 3: "img/3.jpg"}), ", line 7: 1 field"),
    "separators at the ends": (
        HEADER + "a\tb\t\n",
        "line 2: 3 fields, but the header has 2; remove the separator",
    ),
    "mixed ends of lines": (lines({3: f"{ROW_3}\r{ROW_3}"}), ", line 5: 3 fields, but the header has 2; carriage"),
    "mixed ends in the header": (lines().replace("\n", "\r", 1), ", line 1: carriage returns (\\r) are in it"),
    "never closed": (lines({3: 'img/3.jpg\t"café'}), ", line 5: the quote sign that opens a field here is never"),
    "never closed, in the header": ('"' + lines(), ", line 1: the quote sign that opens a field here is never"),
    "text behind it": (
        lines({3: 'img/3.jpg\t"big" tv'}),
        ", line 5: the quote sign that opens a field here is cl",
    ),
    "closed in a later line": (
        lines({3: 'img/3.jpg\t"café', 6: 'img/6.jpg\t"a dog"'}),
        ", line 5: the quote sign that opens a field here is closed in line 8 before the field ends; write",
    ),
    "a backslash": (
        lines({3: 'img/3.jpg\t"a \\"big\\" tv"'}),
        'inside of a field twice (\\" is not understood), or',
    ),
    "rows taken in": (
        lines({3: 'img/3.jpg\t"café', 6: 'img/6.jpg\ttv 6"'}),
        ", line 5: the quote sign that opens a field here takes in line 6, which looks like a row of its own; "
        "give --csv_quoting minimal if it belongs to the field, --csv_quoting none if quote signs are text",
    ),
    "rows taken in whose captions have separators": (
        lines({3: 'img/3.jpg\t"café', 4: 'img/4.jpg\tcafé\t4"'}),
        ", line 5: the quote sign that opens a field here takes in line 6, which looks like a row of its own",
    ),
    "one row taken in": (
        lines({3: 'img/3.jpg\t"café', 4: 'img/4.JPEG\ttv"'}),
        ", line 5: the quote sign that opens",
    ),
    "a note for Excel": (f"sep=,\n{HEADER}", ", line 1: it is a note for Excel, not the header; remove that line"),
    "a pointer of Git LFS": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ": it is a pointer of Git LFS, not the file; run git lfs pull",
    ),
    "a web page": ("\n<!DOCTYPE html>\n<html>", ": it is a web page, not the file; download it again"),
    "zeros alone": (b"\0" * 4096, ", line 1: it contains zero bytes"),
    "white space alone": (" \n\n  \t \n", ": it is empty; check how it was written"),
    "a picture": (
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        ": it is a picture, not text; export it as csv, or check the path",
    ),
    "a tar archive": (b"x.csv" + b"\0" * 252 + b"ustar\0", ": it is a tar archive, not text; give --dataset-type"),
    "bytes of no text": (
        b"\x81\x01\xff\n",
        ", line 1: byte 0x81 is not utf-8; if it is text, name its encoding with",
    ),
    "JSON": ('[\n{"filepath": "a", "title": "b"}]', ": it looks like JSON, not like csv; write it as csv"),
    "lines of JSON": ('{"filepath": "a", "title": "b"}\n' * 2, ": it looks like JSON"),
    "a zero byte": (lines({3: f"{ROW_3}\0"}), ", line 5: it contains zero bytes, which may stand where rows were"),
    "latin-1": (
        lines().encode("latin-1"),
        ", line 2: byte 0xe9 is not utf-8; name the file's encoding with --csv_encoding (with cp1252 the line is "
        "'img/0.jpg\\tcafé 0')",
    ),
    "one byte": (lines().encode() + b"img/8.jpg\t\xff\n", ", line 10: byte 0xff is not utf-8"),
    "one byte, far away": (HEADER.encode() + b"a.jpg\tb\n" * 99_999 + b"\xff", ", line 100001: byte 0xff is not"),
    "half a character": (lines().encode() + "é".encode()[:1], ", line 10: byte 0xc3 is not utf-8"),
    "half of utf-16": (
        lines().encode("utf-16") + b"x",
        ", line 10: byte 0x78 is not utf-16; correct --csv_encoding",
    ),
    "utf-16 without a mark": (
        lines().encode("utf-16-le"),
        ": its bytes look like utf-16-le, not like utf-8; give",
    ),
    "utf-32 without a mark": (lines().encode("utf-32-be"), "give --csv_encoding utf-32-be"),
    "half of a gzip": (gzip.compress(lines().encode())[:-20], ": it cannot be read to its end ("),
    "parquet": (b"PAR1...", ": it is a parquet file, not text; export it as csv"),
    "empty": ("", ": it is empty"),
    "a byte-order mark alone": (b"\xef\xbb\xbf", ": it is empty"),
    "blank lines alone": ("\n\r\n\n", ": it is empty"),
    "no rows": (HEADER, ": it has no rows below its header"),
    "blank rows": (HEADER + "\n\n", ": it has no rows below its header"),
    "two columns of one name": (
        "title\tfilepath\ttitle\na\tb\tc\n",
        ", line 1: columns 1 and 3 are both called 'tit",
    ),
    "another separator": (
        lines().replace("\t", ","),
        ": it has no column 'filepath' (--csv-img-key); with --csv-separator '\\t' it has 'filepath,title', with "
        "',' it has both: give --csv-separator ','",
    ),
    "another separator, quoted": (
        '"title";"filepath"\n"a, b";c\n',
        "with ';' it has both: give --csv-separator ';'",
    ),
    "another separator and other names": (
        "image|text\na|b\n",
        "with '|' it has 'image', 'text': give --csv-separator",
    ),
    "other names": (
        "image\ttext\na\tb\n",
        "it has 'image', 'text': give the names with --csv-img-key and --csv-cap",
    ),
    "no header": (
        lines().removeprefix(HEADER),
        "'img/0.jpg', 'café 0', which looks like a row: the first line has",
    ),
    "a field of 20 million characters": (
        HEADER + 'a\t"' + "b" * 20_000_000,
        ", line 2: a field that begins here has",
    ),
}


@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_with_its_line(read, data, says):
    found = read(data)
    assert isinstance(found, str) and says in found


def test_rows_taken_in_where_captions_come_first(read):
    rows = 'title,filepath\na dog,img/1.jpg\n"cat 5,img/2.jpg\ntv 5",img/3.jpg\n'
    assert ", line 3: the quote sign that opens a field here takes in line 4" in read(rows, ",")
    assert read(rows, ",", "minimal")[1] == ("img/3.jpg", "cat 5,img/2.jpg\ntv 5")
    assert read(rows, ",", "none") == [("img/1.jpg", "a dog"), ("img/2.jpg", '"cat 5'), ("img/3.jpg", 'tv 5"')]


@pytest.mark.parametrize(
    ("a", "b"), [("0001", "0002"), ("dir/a", "dir/b"), ("a.PNG", "b.jpg"), ("u/a.bin", "u/b.bin")]
)
def test_rows_taken_in_whatever_images_are_called(read, a, b):
    assert "takes in line 3" in read(f'{HEADER}{a}\t"c\n{b}\td"\n')
    assert read(f'{HEADER}{a}\t"c\nand so on,\td"\n') == [(a, "c\nand so on,\td")]


def test_the_line_of_a_quote_sign_behind_another_caption_of_several_lines(read):
    assert ", line 3: the quote" in read('id\tfilepath\ta\ttitle\n1\ta.jpg\t"x\ny"\t"z\nw" v\n')
    assert read('a\tfilepath\ttitle\n"x\ny"\ta.jpg\t"z\nw"\n') == [("a.jpg", "z\nw")]
    taken = 'a\tfilepath\ttitle\n"x\ny"\ta.jpg\t"z\nu\tb.jpg\tw"\n'
    assert ", line 3: the quote sign that opens a field here takes in line 4" in read(taken)


def test_quote_signs_as_text(read):
    for text in ('"café', '"big" tv', 'tv 5"', '"'):
        data = lines({3: f"img/3.jpg\t{text}"})
        assert read(data, quoting="none")[3] == ("img/3.jpg", text)
        assert isinstance(read(data), str) or text == 'tv 5"'
    found = read('filepath,title\na,"b, c"\n', ",", "none")
    assert (
        ", line 2: 3 fields" in found and "with --csv_quoting auto, text between quote signs may contain" in found
    )
    found = read('filepath,title\na, "b, c"\n', ",")
    assert ", line 2: 3 fields" in found and "remove the spaces before the quote sign" in found


def test_encodings(read):
    for encoding in ("latin-1", "cp1252", "utf-16", "utf-16-be", "utf-8-sig", "gb18030"):
        assert read(lines().encode(encoding), encoding=encoding) == ROWS
    assert read(b"\xef\xbb\xbf" + lines().encode(), encoding="latin-1") == ROWS  # the mark is certain
    assert ", line 2: byte 0xc3 is not ascii; correct --csv_encoding" in read(lines(), encoding="ascii")
    found = read(lines().encode("utf-16-be"), encoding="utf-16")
    assert found.startswith(": it is not utf-16 (UTF-16 stream does not start with BOM); correct --csv_encoding")


def test_utf8_under_the_name_of_another_encoding(read):
    """As one of several files, whose characters would otherwise become others."""
    for encoding in ("latin-1", "cp1252", "koi8-r"):
        assert read(lines(), encoding=encoding).startswith(
            f": it is utf-8, of which --csv_encoding {encoding} would make"
        )
    assert read(lines().replace("é", "e"), encoding="latin-1")[0] == ("img/0.jpg", "cafe 0")
    assert read(lines().encode() + "img/8.jpg\té".encode("latin-1"), encoding="latin-1")[0] == (
        "img/0.jpg",
        "cafÃ© 0",
    )


def test_files_that_are_none(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    form = CsvFormat()
    with pytest.raises(ValueError, match=r"said: it is a folder, not a file; give the path of a file"):
        read_pairs(str(tmp_path / "folder.csv"), KEYS, form, "said")
    (tmp_path / "folder.csv" / "part-0.csv").write_text("")
    with pytest.raises(ValueError, match=r"give the files in it, as '.*/folder\.csv/\*\.csv'"):
        read_pairs(str(tmp_path / "folder.csv"), KEYS, form, "said")
    with pytest.raises(ValueError, match=r"said: there is no such file on this machine"):
        read_pairs(str(tmp_path / "nowhere.csv"), KEYS, form, "said")
    with pytest.raises(ValueError, match=r"said: it cannot be opened \(.*nosuch.*\); check the address"):
        read_pairs("nosuch://host/x.csv", KEYS, form, "said")


def test_urls(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "x.csv").write_text(lines())
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(lines().encode()))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("x.csv", "x.csv.gz"):
            assert list(zip(*read_pairs(f"{address}/{name}", KEYS, CsvFormat(), "said"))) == ROWS
        with pytest.raises(
            ValueError, match=r"said: it cannot be opened \(HTTP Error 404: .*\); check the address"
        ):
            read_pairs(f"{address}/nowhere.csv", KEYS, CsvFormat(), "said")
        server.shutdown()
    with pytest.raises(ValueError, match=r"said: it cannot be opened \(.*refused.*\); check the address"):
        read_pairs(f"{address}/x.csv", KEYS, CsvFormat(), "said")
