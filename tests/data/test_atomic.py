import numpy as np
import pytest

from recbole_mm.data.atomic import AtomicFormat, read_atomic, read_header
from recbole_mm.errors import InputError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text, encoding="utf-8", name="toy.inter"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return to_file


def refuses(path, *parts, **options):
    """The file is refused in a message that names it and all ``parts``."""
    with pytest.raises(InputError) as error:
        read_atomic(path, **options)
    message = str(error.value)
    assert str(path) in message
    for part in parts:
        assert part in message, message


def test_reads_columns_by_type(write):
    path = write(
        "i:token\tx:float\twords:token_seq\tvector:float_seq\na\t1.5\tred  big\t0.5 -2e1\nb\t\t\t\n"
    )
    table = read_atomic(path)
    frame = table.frame
    assert [kind.value for kind in table.types.values()] == [
        "token",
        "float",
        "token_seq",
        "float_seq",
    ]
    assert list(frame) == list(table.types) == ["i", "x", "words", "vector"]
    assert frame["i"].tolist() == ["a", "b"]
    assert frame["x"][0] == 1.5
    assert np.isnan(frame["x"][1])
    assert frame["words"][0].tolist() == ["red", "big"]
    assert frame["words"][1].tolist() == []
    assert frame["vector"][0].tolist() == [0.5, -20.0]
    assert frame["vector"][1].dtype == np.float64


def test_reads_only_the_columns_asked_for(write):
    table = read_atomic(write(HEADER + "u\ti\t3\t7\n"), columns=["timestamp", "item_id"])
    assert table.frame.to_dict("list") == {"item_id": ["i"], "timestamp": [7.0]}


def test_unknown_column_is_refused_with_the_nearest(write):
    refuses(write(HEADER + "u\ti\t3\t7\n"), "'timestmp'", "'timestamp'", columns=["timestmp"])


def test_quotes_are_plain_characters(write):
    titles = ['"Open', "It's", 'a "b" c', '""', '"shut"', "'", 'end"'] * 5
    path = write("i:token\tt:token_seq\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(titles)))
    assert read_atomic(path, as_text=["t"]).frame["t"].tolist() == titles


def test_words_for_nothing_are_tokens(write):
    names = ["NA", "null", "nan", "None", "N/A", "NaN", "-inf", "True", "007", "1.0", "#"]
    path = write("i:token\n" + "\n".join(names))
    assert read_atomic(path).frame["i"].tolist() == names


def test_an_empty_token_is_missing(write):
    frame = read_atomic(write("i:token\tj:token\na\t\n\tb\n")).frame
    assert frame.isna().to_numpy().tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_mark_do_not_matter(write, end, mark, last):
    lines = ["i:token\tx:float\tt:token_seq", "a\t1\tb c", "d\t2\té"]
    text = mark + end.join(lines) + (end if last else "")
    for encoding in ("utf-8", "utf-8-sig"):
        frame = read_atomic(write(text), AtomicFormat(encoding=encoding), as_text=["t"]).frame
        assert frame.to_dict("list") == {"i": ["a", "d"], "x": [1.0, 2.0], "t": ["b c", "é"]}


def test_carriage_return_inside_a_line_is_a_character(write):
    frame = read_atomic(write("i:token\tt:token\na\tb\rc\r\nd\t\re\nf\tg")).frame
    assert frame["t"].tolist() == ["b\rc", "\re", "g"]


@pytest.mark.parametrize("header", ["i:token", "i:token\tt:token"])
def test_blank_lines_are_no_rows(write, header):
    row = "\t".join(["a"] * len(header.split()))
    spaces = "\t".join([" "] * len(header.split()))
    text = f"{header}\n\n{row}\n\n{spaces}\n{row}\n\n"
    assert read_atomic(write(text)).frame["i"].tolist() == ["a", " ", "a"]
    assert read_atomic(write(text.replace("\n", "\r\n"))).frame["i"].tolist() == ["a", " ", "a"]


@pytest.mark.parametrize("encoding", ["utf-16", "gbk", "latin-1"])
def test_reads_other_encodings(write, encoding):
    path = write("i:token\tt:token\r\na\t·\r\n", encoding)
    assert read_atomic(path, AtomicFormat(encoding=encoding)).frame["t"].tolist() == ["·"]


def test_undecodable_bytes_are_refused_with_their_line(write):
    path = write(b"i:token\tt:token\na\tb\nc\t\xe9t\xe9\n")
    refuses(path, "line 3, byte 3", "set encoding")


def test_unknown_encoding_is_refused(write):
    with pytest.raises(InputError, match="utf-9"):
        read_atomic(write("i:token\na\n"), AtomicFormat(encoding="utf-9"))


@pytest.mark.parametrize("encoding", ["zlib", "rot13", "base64", "u\0"])
def test_codecs_that_are_not_of_text_are_unknown(write, encoding):
    with pytest.raises(InputError, match="unknown encoding"):
        read_atomic(write("i:token\na\n"), AtomicFormat(encoding=encoding))


@pytest.mark.parametrize(("encoding", "text"), [("punycode", b"i:\n"), ("utf-7", b"i\n+2AA-\n")])
def test_odd_encodings_fail_by_name(write, encoding, text):
    refuses(write(text), f"not {encoding}", atomic=AtomicFormat(encoding=encoding))


def test_nul_byte_is_refused_with_its_line(write):
    refuses(write(b"i:token\na\nb\0c\n"), "line 3", "NUL")


def test_separator_may_be_any_ascii_character(write):
    path = write("i:token,w:token_seq\na,b|c\n")
    table = read_atomic(path, AtomicFormat(",", "|"))
    assert table.frame["w"][0].tolist() == ["b", "c"]


@pytest.mark.parametrize("separator", ["", "\t\t", "é", "\n"])
def test_other_separators_are_refused(write, separator):
    with pytest.raises(InputError, match="field_separator"):
        read_header(write("i:token\na\n"), AtomicFormat(separator))


# numbers


def test_integer_times_are_exact(write):
    times = [881250949, 2**53 + 1, 0, -5, 1699999999123456789]
    path = write("timestamp:float\n" + "\n".join(map(str, times)))
    frame = read_atomic(path, time_field="timestamp").frame
    assert frame["timestamp"].dtype == np.int64
    assert frame["timestamp"].tolist() == times


def test_decimal_times_are_exact(write):
    texts = ["1234567890.1234567", "0.30000000000000004", "8.812509490000001e8", "1e3", "3"]
    path = write("timestamp:float\n" + "\n".join(texts))
    frame = read_atomic(path, time_field="timestamp").frame
    assert frame["timestamp"].tolist() == [float(text) for text in texts]


def test_integers_beyond_64_bits_are_floats(write):
    path = write(f"timestamp:float\n{2**63}\n-1\n")
    assert read_atomic(path, time_field="timestamp").frame["timestamp"].tolist() == [2.0**63, -1.0]


def test_other_floats_are_float64(write):
    frame = read_atomic(write("x:float\n1\n2\n")).frame
    assert frame["x"].dtype == np.float64


BAD = ["nan", "NA", "inf", "-Infinity", "abc", "1_000", "12:30", "True", "1e999", "0x10"]


@pytest.mark.parametrize("cell", BAD)
def test_bad_number_is_refused_with_its_line(write, cell):
    path = write(HEADER + "u\ti\t\t7\n\nu\tj\t2.5\t7\n" + f"u\tk\t{cell}\t7\n")
    refuses(path, "line 5", "rating", repr(cell), "leave the cell empty")


@pytest.mark.parametrize("cell", ["True", "False"])
def test_a_column_of_truth_values_is_refused(write, cell):
    refuses(write(f"x:float\n{cell}\n{cell}\n"), "line 2", cell)


@pytest.mark.parametrize("cell", ["", *BAD])
def test_bad_time_is_refused_with_its_line(write, cell):
    path = write(HEADER + f"u\ti\t3\t7\nu\tj\t3\t{cell}\n")
    refuses(
        path,
        "line 3",
        "timestamp",
        repr(cell) if cell else "empty",
        "on_bad_time: drop",
        time_field="timestamp",
    )


@pytest.mark.parametrize("cell", ["", *BAD])
@pytest.mark.parametrize("good", ["9007199254740993", "0.1"])
def test_bad_time_is_dropped_and_counted_on_demand(write, cell, good):
    path = write(HEADER + f"u\ti\t3\t{cell}\nu\tj\t\t{good}\nu\tk\t3\t{cell}\n")
    table = read_atomic(path, time_field="timestamp", on_bad_time="drop")
    assert table.dropped == 2
    assert table.frame["item_id"].tolist() == ["j"]
    assert table.frame.index.tolist() == [0]
    assert repr(table.frame["timestamp"].tolist()) == f"[{good}]"


def test_dropping_every_row_is_refused(write):
    path = write(HEADER + "u\ti\t3\t\n")
    refuses(path, "TIME_FIELD", time_field="timestamp", on_bad_time="drop")


def test_unknown_policy_for_bad_times_is_refused(write):
    with pytest.raises(InputError, match="'mean'"):
        read_atomic(write(HEADER + "u\ti\t3\t1\n"), on_bad_time="mean")


@pytest.mark.parametrize("cell", ["1 x 2", "1 nan", "1e999"])
def test_bad_entry_of_a_vector_is_refused_with_its_place(write, cell):
    refuses(write(f"i:token\tv:float_seq\na\t1\nb\t{cell}\n"), "line 3", "v", "entry")


# shape


def test_missing_file_is_refused_with_what_is_there(tmp_path, write):
    write("i:token\na\n", name="toy.item")
    refuses(tmp_path / "toy.inter", "no such file", "toy.item")
    refuses(tmp_path / "none" / "toy.inter", "data_path")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "empty"),
        ("\n", "empty"),
        ("\n" + HEADER, "empty"),
        (HEADER, "no row"),
        (HEADER.strip(), "no row"),
        (HEADER + "\n\n", "no row"),
        ("i:token\n\n", "no row"),
    ],
)
def test_file_without_rows_is_refused(write, text, found):
    refuses(write(text), found)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("user_id\titem_id:token", "'user_id'"),
        ("user_id:token:x\titem_id:token", "'user_id:token:x'"),
        ("user_id:token,item_id:token", "'user_id:token,item_id:token'"),
        (":token\titem_id:token", "':token'"),
        ("user_id:tokne\titem_id:token", "'tokne'"),
        ("user_id:token\tuser_id:token", "twice"),
        ("user_id:token\t", "''"),
    ],
)
def test_bad_header_is_refused_and_quoted(write, header, found):
    refuses(write(header + "\na\tb\n"), "line 1", found, repr(header))


@pytest.mark.parametrize(
    ("row", "n"), [("u\ti\t3", 3), ("u\ti\t3\t7\t9", 5), ("u", 1), ("   ", 1), ("u i 3 7", 1)]
)
@pytest.mark.parametrize("columns", [None, ["user_id"]])
def test_short_or_long_row_is_refused_with_its_line(write, row, n, columns):
    good = "u\ti\t3\t7\n"
    path = write(HEADER + good + "\n" + good * 2 + row + "\n" + good)
    refuses(path, "line 6", f"{n} fields", "4", repr(row), columns=columns)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_of_a_one_column_file_has_one_field(write, end):
    refuses(write(f"i:token{end}a{end}b\tc{end}d{end}"), "line 3", "2 fields", repr("b\tc"))
    assert read_atomic(write(f"i:token{end}a b{end}c{end}")).frame["i"].tolist() == ["a b", "c"]


def test_rows_whose_lengths_make_up_for_each_other_are_refused(write):
    refuses(write("a:token\tb:token\nx\ny\tz\tw\n"), "line 2")


def test_line_numbers_hold_beyond_the_first_block(write, monkeypatch):
    monkeypatch.setattr("recbole_mm.data.atomic._BLOCK", 64)
    rows = [f"u{i}\ti{i}\t3\t{i}\n" for i in range(100)]
    assert len(read_atomic(write(HEADER + "".join(rows))).frame) == 100
    refuses(write(HEADER + "".join(rows[:70]) + "u\n" + "".join(rows[70:])), "line 72")
    refuses(write(HEADER + "".join(rows[:70]) + "u\ti\t3\tx\n" + "".join(rows[70:])), "line 72")
    refuses(write(HEADER + "".join(rows[:70]) + "\0\n" + "".join(rows[70:])), "line 72")


def test_whole_cells_stay_text(write):
    path = write('i:token\tt:token_seq\tx:float\na\tThe "Big" 1_000 NA\t2.50\nb\t\t\n')
    frame = read_atomic(path, columns=["i"], as_text=["t", "x"]).frame
    assert frame["t"].tolist() == ['The "Big" 1_000 NA', ""]
    assert frame["x"].tolist() == ["2.50", ""]


def test_header_gives_types_in_order(write):
    header = read_header(write("\ufeff" + HEADER))
    assert [kind.value for kind in header.values()] == ["token", "token", "float", "float"]
    assert list(header) == ["user_id", "item_id", "rating", "timestamp"]
