"""data.py: generated files only; expected values by hand, by plain dictionaries or by other programs."""

import collections
import csv
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import multiprocessing
import random
import re
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import requests
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import infer
from prompts import METHODS, TASKS, build_prompt, build_response, neutral_task

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("text_id", "user_id", "text")
BY_NAME = dict(zip(data.ROLES, data.ROLES))


def write_csv(path, rows, header=("text_id", "user_id", "text", "joy", "love")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def arguments(dataset, *flags):
    """What data.py's command line makes of a data set and flags."""
    return data.parse_args([str(dataset), *map(str, flags)])


def annotations_in(*paths):
    """The Annotations of files, by their own column names; text_id is needed, as in the two corpora."""
    return data.read_annotations(paths, BY_NAME, None, None, (), COLUMNS)[0]


def own_annotations(path, *flags):
    """The Annotations of a file of one's own, and the report's words on it."""
    _, annotations, _, report = data.read(arguments(path, *flags))
    return annotations, report


def annotations_of(rows, label_names=("joy", "love")):
    """Annotations of (text_id, user_id, text, labels as a tuple of 0 and 1)."""
    pairs = list(dict.fromkeys((row[0], row[2]) for row in rows))
    users = list(dict.fromkeys(row[1] for row in rows))
    return data.Annotations(
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        users,
        np.array([pairs.index((row[0], row[2])) for row in rows]),
        np.array([users.index(row[1]) for row in rows]),
        np.array([row[3] for row in rows], bool),
        label_names,
    )


def rows_of(annotations):
    """The inverse of annotations_of."""
    return [
        (
            annotations.text_ids[item],
            annotations.users[user],
            annotations.texts[item],
            tuple(map(int, labels)),
        )
        for item, user, labels in zip(
            annotations.text_index, annotations.user_index, annotations.labels, strict=True
        )
    ]


# ---- Reading ----


def test_texts_ids_and_labels_come_out_as_they_were_written(tmp_path):
    rows = [
        ("t1", "4", "plain", 1, 0),
        ("t1", "ł 5", "plain", 0, 1),
        ("t2", "4", 'quo"ted, with\nlines\r\nand ### Response: {x} \t', 1, 1),
        ("t1", "4", "other spelling", 0, 0),
        ("t3", " 4", "🙂 ‮right to left", 0, 1),
    ]
    read = annotations_in(write_csv(tmp_path / "a.csv", rows))
    assert [(*row[:3], *row[3]) for row in rows_of(read)] == rows
    assert read.label_names == ("joy", "love") and read.users == ["4", "ł 5", " 4"] and len(read.texts) == 4
    assert read.label_set(2) == ["joy", "love"] and len(read) == 5
    assert list(read.fields())[1] == ("plain", "ł 5")
    assert rows_of(read.select([2, 0])) == [rows_of(read)[2], rows_of(read)[0]]


def test_labels_are_sorted_and_several_files_are_one_set(tmp_path):
    header = ("text", "zest", "user_id", "joy", "text_id")
    one = write_csv(tmp_path / "1.csv", [("a", 1, "u", 0, "1")], header)
    two = write_csv(
        tmp_path / "2.csv", [("1", "u", "a", 0, 1)], ("text_id", "user_id", "text", "joy", "zest")
    )
    read = annotations_in(one, two)
    assert read.label_names == ("joy", "zest")
    assert rows_of(read) == [("1", "u", "a", (0, 1))] * 2


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbftext_id,user_id,text,joy\n1,u,a,1\n2,u,b,0\n",
        b"text_id,user_id,text,joy\r\n1,u,a,1\r\n2,u,b,0\r\n",
        b"text_id, user_id ,text,  joy\n1,u,a,1\n2,u,b,0",
        b"text_id,user_id,text,joy\n\n1,u,a,1\n\n2,u,b,0\n\n\n",
        b'"text_id","user_id","text","joy"\n"1","u","a","1.0"\n2,u,b,False\n',
    ],
)
def test_bom_windows_line_ends_spaces_in_the_header_and_empty_lines_change_nothing(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    read = annotations_in(tmp_path / "a.csv")
    assert read.label_names == ("joy",)
    assert rows_of(read) == [("1", "u", "a", (1,)), ("2", "u", "b", (0,))]


HEADER = b"text_id,user_id,text,joy\n"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no column ['user_id', 'text'] in the header []"),
        (HEADER, "no annotation below the header"),
        (b"text_id,text,joy\n1,a,1\n", "no column ['user_id']"),
        (b"text_id,user_id,text,joy,joy\n", "['joy'] twice"),
        (b"text_id,user_id,text\n1,u,a\n", "no label column"),
        (b"text_id,user_id,text,split\n1,u,a,train\n", "no label column"),
        (HEADER + b"1,u,a,1\n2,u,b,2\n", "line 3: joy is '2', not 0 or 1"),
        (HEADER + b'1,u,"a\nb\nc",1\n2,u,b,\n', "line 5: joy is '', not 0 or 1"),
        (HEADER + b'1,u," \t\n",1\n', "which is empty"),
        (HEADER + b"1,,a,1\n", "line 2: user_id is '', which is empty"),
        (HEADER + b" ,u,a,1\n", "line 2: text_id is ' ', which is empty"),
        (HEADER + b"1,u,a,1\n1,u,a\n", "line 3: 3 columns, but the first row has 4"),
        (HEADER + b"1,u,a,1,0\n", "line 2: 5 columns, but the first row has 4"),
        (HEADER + b"1,u,a,1\n1,u,\xff,1\n", "line 3: bad UTF-8"),
        (HEADER + b'1,u,"\n\n\xc3\x28",1\n', "line 4: bad UTF-8"),
        (HEADER + b"1,u,a\0b,1\n", "line 2: bad UTF-8 or a NUL"),
        ("text_id,user_id,text,joy\n".encode("utf-16"), "line 1: bad UTF-8"),
        (HEADER + b'1,u,a,1\n2,u,"b,1\n3,u,c,1\n', "line 3: unexpected end of data"),
        (HEADER + b'1,u,"a"b,1\n', "line 2: ',' expected after '\"'"),
        (b"text_id,user_id,text,joy,split\n1,u,a,1,fold 1\n", "line 2: split is 'fold 1', not one of"),
        (b"text_id,user_id,text,no joy,no_joy\n1,u,a,1,1\n", "cannot be read back"),
        (b"text_id,user_id,text,joy,Joy\n1,u,a,1,1\n", "cannot be read back"),
        (b'text_id,user_id,text,"joy, love"\n1,u,a,1\n', "['joy, love'] cannot be read back"),
        (b"text_id,user_id,text,\n1,u,a,1\n", "no label column"),
        (b"text_id,user_id,text,???\n1,u,a,1\n", "['???'] cannot be read back"),
        (b"text_id,user_id,text,## a\n1,u,a,1\n", "['## a'] cannot be read back"),
    ],
)
def test_a_broken_file_is_one_line_that_names_the_place_and_status_2(tmp_path, capsys, content, words):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert data.main([str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {path}") and printed.err.count("\n") == 1 and not printed.out
    assert words in printed.err


def test_names_with_and_or_slash_and_dots_are_labels(tmp_path):
    header = (*COLUMNS, "and", "black and white", "yes/no", "R&B", "level 1.5", "no. 7", "a-b_c d")
    read = annotations_in(write_csv(tmp_path / "a.csv", [("1", "u", "x", *[1] * 7)], header))
    assert read.label_names == tuple(sorted(header[3:]))


def test_a_megabyte_in_one_field_is_a_text(tmp_path):
    text = 'a "b", {c}\n' * 100_000
    read = annotations_in(write_csv(tmp_path / "a.csv", [("1", "u", text, 1, 0)]))
    assert read.texts == [text]


CELL = st.text(st.sampled_from('ab01",\n\r\t \0é\ufeff'), max_size=6)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.lists(CELL, max_size=5), max_size=4), broken=st.binary(max_size=3))
def test_any_bytes_are_read_or_refused_with_the_file_and_line(tmp_path_factory, rows, broken):
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(HEADER + "\n".join(",".join(row) for row in rows).encode() + broken)
    try:
        read = annotations_in(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}")
    else:
        assert len(read) and read.labels.shape == (len(read), 1)


def test_quotes_in_tsv_files_are_quotes(tmp_path):
    """Split on bare tabs, hundreds of GoEmotions' texts do not match the raw files."""
    (tmp_path / "train.tsv").write_text('"She said ""no"""\t1\teab\n\nplain\t2\teac\n')
    assert data.read_split_texts(tmp_path / "train.tsv", "text") == {'She said "no"', "plain"}
    (tmp_path / "train.csv").write_text('"_unit_id","comment"\n1,"a, ""b"""\n2,c\n')
    assert data.read_split_texts(tmp_path / "train.csv", "comment") == {'a, "b"', "c"}
    for content in ("", "id,text\n1,a\n"):
        (tmp_path / "train.csv").write_text(content)
        with pytest.raises(ValueError, match=r"no column \['comment'\]"):
            data.read_split_texts(tmp_path / "train.csv", "comment")


# ---- A file of one's own ----


def long_rows(n_texts=30, n_users=3):
    """Annotations of each text by each user: (text_id, user_id, text, 0 or 1 for joy, for love)."""
    return [(f"t{k}", f"u{u}", f"text {k}", k % 2, u % 2) for k in range(n_texts) for u in range(n_users)]


def refused(capsys, path, *flags):
    """The one line on stderr with which data.py refuses a file."""
    assert data.main([str(path), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ") and not printed.out
    return printed.err


@pytest.mark.parametrize("flags", [[], ["--clean", "none"]])
def test_every_annotation_stays_where_it_was_and_unlabelled_ones_too(tmp_path, flags):
    """With one 0/1 column, 87% of a file were dropped, and F1 was 1.0000 for having learned nothing."""
    rows = [(k, f"u{k % 97}", f"text {k % 670}", int(k % 8 == 0)) for k in range(6700)]
    path = write_csv(tmp_path / "a.csv", rows, (*COLUMNS, "toxic"))
    task, splits, report = data.load(arguments(path, *flags))
    left = [(row[0], row[1], row[2], row[3][0]) for part in splits.values() for row in rows_of(part)]
    assert sorted(left) == sorted((str(row[0]), *row[1:]) for row in rows)
    assert task.none and task.label_names == ("toxic",)
    assert [stage["rows"] for stage in report["stages"]] == [[6700], [5360, 670, 670]]


def test_the_papers_cleaning_of_an_own_file_is_that_of_clean(tmp_path):
    rows = [(k, f"u{k % 5 * (k % 3)}", f"text {k}", int(k % 4 > 0), int(k % 5 > 2)) for k in range(900)]
    path = write_csv(tmp_path / "a.csv", rows)
    annotations = annotations_of([(str(row[0]), *row[1:3], row[3:]) for row in rows])
    for shares in ({}, {"min_share": 0.2, "max_share": 0.9}):
        flags = [word for name, share in shares.items() for word in (f"--{name}", share)]
        task, splits, report = data.load(arguments(path, "--clean", "paper", *flags))
        expected, stages = data.clean(annotations, data.assign_splits(annotations), **shares)
        assert report["stages"] == stages and not task.none
        assert {name: rows_of(part) for name, part in splits.items()} == {
            name: rows_of(part) for name, part in expected.items()}


@pytest.mark.parametrize("flag", ["--min_share", "--max_share"])
def test_a_share_without_the_papers_cleaning_is_refused(tmp_path, capsys, flag):
    path = write_csv(tmp_path / "a.csv", long_rows())
    assert f"{flag} belongs to --clean paper" in refused(capsys, path, flag, "0.5")


WRITTEN = "text_id,user_id,text,joy,love\nt1,u1,\"a, b\",1,0\nt2,u1,c;d,0,1\nt3,u2,e\tf,0,0\n"
READ = [("t1", "u1", "a, b", (1, 0)), ("t2", "u1", "c;d", (0, 1)), ("t3", "u2", "e\tf", (0, 0))]


def delimited(delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(csv.reader(io.StringIO(WRITTEN)))
    return file.getvalue().encode()


@pytest.mark.parametrize("content", [
    WRITTEN.encode(), *map(delimited, ";\t|"), b"\xef\xbb\xbf" + delimited(";"),
    gzip.compress(WRITTEN.encode(), mtime=0), gzip.compress(delimited("\t"), mtime=0),
    WRITTEN.replace("\n", "\r\n").encode(),
    WRITTEN.replace("\n", "\r\r\n").encode(),  # written on Windows without newline=""
    *(WRITTEN.replace(",1,0\n", f",{yes},{no}\n").replace(",0,1\n", f",{no},{yes}\n").encode()
      for yes, no in (
        ("TRUE", "FALSE"), ("true", "false"), ("True", "False"), (" 1", "0 "), ("1.0", "0.0"), ("T", "F"),
        ("yes", "No"), (" tRUE ", "\tfalse"))),
    "".join(f"{k},{line}\n" for k, line in zip(("", 0, 1, 2), WRITTEN.splitlines())).encode(),
    "".join(f"{k},{line}\n" for k, line in zip(("Unnamed: 0", 0, 1, 2), WRITTEN.splitlines())).encode(),
])
def test_a_file_is_read_however_its_program_wrote_it(tmp_path, content):
    (tmp_path / "a.tsv").write_bytes(content)  # the name says nothing
    annotations, report = own_annotations(tmp_path / "a.tsv")
    assert rows_of(annotations) == READ and annotations.label_names == ("joy", "love")
    index = content.split(b",")[0] in (b"", b"Unnamed: 0")
    assert report["unused"] == (["(unnamed)" if content[:1] == b"," else "Unnamed: 0"] if index else [])


def test_a_carriage_return_that_ends_no_line_is_a_part_of_its_cell(tmp_path):
    """pandas writes it without quotes, and Python's csv then refuses the file."""
    text = "a\rb\r\rc"
    (tmp_path / "a.csv").write_bytes(f'user_id,text,joy\nu1,{text},1\n"u\r2","{text}",0\n'.encode())
    annotations, _ = own_annotations(tmp_path / "a.csv")
    assert annotations.texts == [text] and annotations.users == ["u1", "u\r2"]


@pytest.mark.parametrize("content, words", [
    (b'user_id,text,joy\nu1,"she said \\"no\\"",1\n',
     'line 2: \',\' expected after \'"\'; a quote within a cell is written "", not \\"'),
    (b'user_id,text,joy\nu1,"ends with \\"",1\nu1,b,1\n', 'written "", not'),
    (b'user_id,text,joy\nu1,"a \\", b",1\n', 'written "", not'),
    (b"user_id,text,joy\ru1,a,1\r", r"its lines end in \r alone"),
    (gzip.compress(WRITTEN.encode(), mtime=0)[:-12], "end-of-stream"),
    (b"text\na\n", "no column ['user_id'] in the header ['text']"),
    (b"comment,worker,joy\na,u,1\n", "--columns user_id=worker"),
])
def test_what_cannot_be_read_is_one_line_with_the_cause_and_the_mend(tmp_path, capsys, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    assert words in refused(capsys, tmp_path / "a.csv")


def test_columns_are_found_by_the_names_that_are_given_and_the_rest_is_named(tmp_path):
    rows = [(f"{k}", f"c{k}", f"w{k % 2}", data.SPLITS[k % 3], k, "35-39", k % 2) for k in range(6)]
    path = write_csv(
        tmp_path / "a.csv", rows, ("item", "comment", "worker", "part", "text", "age", "rude")
    )
    mapping = ("--columns", "text=comment", "user_id=worker", "text_id=item", "split=part")
    mapping += ("--labels", "rude")
    _, splits, report = data.load(arguments(path, *mapping))
    assert rows_of(splits["val"]) == [("1", "w1", "c1", (1,)), ("4", "w0", "c4", (0,))]
    assert report["columns"] == {"text_id": "item", "user_id": "worker", "text": "comment", "split": "part"}
    assert report["unused"] == ["text", "age"] and report["labels"] == ["rude"]
    assert "not used: text, age" in data.format_report(report)
    assert "1 labels: rude" in data.format_report(report)


@pytest.mark.parametrize("flags, words", [
    (["--columns", "text=a", "text=b"], "each of text_id, user_id, text, split at most once"),
    (["--columns", "text"], "give ROLE=NAME"),
    (["--columns", "text="], "give ROLE=NAME"),
    (["--columns", "rater=user_id"], "give ROLE=NAME"),
    (["--columns", "text=comment"], "no column ['comment']"),
    (["--columns", "split=part"], "no column ['part']"),
    (["--columns", "text_id=item"], "no column ['item']"),
    (["--columns", "text=user_id"], "have ['user_id'] twice"),
    (["--labels", "anger"], "no column ['anger']"),
    (["--labels", "joy", "joy"], "have ['joy'] twice"),
    (["--labels", "joy", "text"], "have ['text'] twice"),
    (["--labels", "joy", "--context", "joy"], "have ['joy'] twice"),
    (["--labels", "joy", "age"], "not 0 or 1; fill it in, or name the columns of labels by --labels"),
    ([], "age is '35-39', not 0 or 1; fill it in, or name the columns of labels by --labels"),
    (["--context", "nothing"], "no column ['nothing']"),
    (["--labels", "joy", "--context", "mood"], "line 3: user 'u0' has ('1',) here and ('0',) before"),
])
def test_a_flag_that_does_not_fit_the_file_is_one_line(tmp_path, capsys, flags, words):
    rows = [(f"t{k}", f"u{k % 2 * k}", f"text {k}", k % 2, 0, 1, "35-39", k // 2 % 2)
            for k in (0, 2, 3, 4, 5)]
    header = (*COLUMNS, "love", "joy", "not nice", "age", "mood")
    path = write_csv(tmp_path / "a.csv", rows, header)
    assert words in refused(capsys, path, *flags)


def test_flags_of_an_own_file_are_refused_for_the_two_corpora(capsys):
    for flag in ("--columns", "--labels", "--context"):
        assert f"{flag} is for a file of your own" in refused(capsys, "goemotions", flag, "text=a")


@pytest.mark.parametrize("cells, labels", [
    (["joy, anger", "anger", "", "joy,joy"], [["anger", "joy"], ["anger"], [], ["joy"]]),
    (["joy;anger", "joy | anger", " ", "anger"], [["anger", "joy"], ["anger", "joy"], [], ["anger"]]),
    (["['joy', 'anger']", '["anger"]', "[]", "{'joy'}"], [["anger", "joy"], ["anger"], [], ["joy"]]),
    (["4", "1", "5", "1"], [["4"], ["1"], ["5"], ["1"]]),
    (["4.0", "1.0", "", "0.0"], [["4"], ["1"], [], ["0"]]),
    (["not hate", "hate (mild)", "don't know", "hate (mild)"],
     [["not hate"], ["hate (mild)"], ["don't know"], ["hate (mild)"]]),
    (["1", "0", "1", "0"], [["mood"], [], ["mood"], []]),
    (["TRUE", "FALSE", "true", " 0"], [["mood"], [], ["mood"], []]),
])
def test_one_column_of_label_names_makes_its_values_the_labels(tmp_path, cells, labels):
    rows = [(f"u{k}", f"text {k}", cell, k) for k, cell in enumerate(cells)]
    path = write_csv(tmp_path / "a.csv", rows, ("user_id", "text", "mood", "other"))
    annotations, report = own_annotations(path, "--labels", "mood")
    assert [annotations.label_set(row) for row in range(4)] == labels and report["unused"] == ["other"]
    assert annotations.label_names == tuple(sorted({name for own in labels for name in own}))


@pytest.mark.parametrize("cells, words", [
    (["joy", "none"], "no label can be 'none', the word for an annotation without labels"),
    (["None", "joy"], "no label can be 'None'"),
    (["", " "], "line 2: mood is '', not 0 or 1; fill it in"),
    (["1", ""], "line 3: mood is '', not 0 or 1; fill it in"),
    (["joy", "???"], "cannot be read back"),
    ([f"name {k}" for k in range(1001)], "1,001 labels, such as 'name 0'"),
])
def test_cells_that_make_no_labels_are_refused_with_the_reason(tmp_path, capsys, cells, words):
    path = write_csv(tmp_path / "a.csv", [("u", f"text {k}", cell) for k, cell in enumerate(cells)],
                     ("user_id", "text", "mood"))
    assert words in refused(capsys, path, "--labels", "mood")


def test_a_label_column_called_none_is_refused_with_the_reason(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", long_rows(), (*COLUMNS, "joy", "NONE"))
    assert "no label can be 'NONE', the word for an annotation without labels" in refused(capsys, path)


@pytest.mark.parametrize("one, other", [
    ("12", "12.0"), ("7", " 7"), ("7", "007"), ("Ann", "ann "), ("\uff17", "7"), ("12.0", "12.00")])
def test_ids_that_may_be_one_person_are_told_with_an_example(tmp_path, one, other):
    rows = [(f"text {k}", user, k % 2) for k in range(9) for user in (one, other, "13", "1.5")]
    _, splits, report = data.load(arguments(write_csv(tmp_path / "a.csv", rows, ("text", "user_id", "joy"))))
    told, = report["warnings"]
    assert f"users {one!r} and {other!r} differ in spaces, case, zeros or .0 only" in told
    assert "(1 such" in told
    assert splits["train"].users == [one, other, "13", "1.5"]


def test_labels_with_one_value_only_have_nothing_to_learn(tmp_path):
    rows = [(f"text {k}", f"u{k % 3}", 1, 0, k % 2) for k in range(40)]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "user_id", "always", "never", "now"))
    assert data.load(arguments(path))[2]["warnings"] == [
        "nothing to learn, as all of train has 0: never", "nothing to learn, as all of train has 1: always"]


def test_a_text_without_an_id_has_its_hash_for_one(tmp_path):
    rows = [("u1", "a", 1), ("u2", "a", 0), ("u1", "b", 0)]
    path = write_csv(tmp_path / "a.csv", rows, ("user_id", "text", "joy"))
    annotations, _ = own_annotations(path)
    assert annotations.text_ids == [hashlib.sha256(text.encode()).hexdigest()[:16] for text in "ab"]


@pytest.mark.parametrize("n, sizes", [(3, [1, 1, 1]), (4, [2, 1, 1]), (9, [7, 1, 1]), (10, [8, 1, 1]),
                                      (11, [9, 1, 1]), (20, [16, 2, 2])])
def test_few_texts_leave_no_split_empty(tmp_path, n, sizes):
    path = write_csv(tmp_path / "a.csv", long_rows(n))
    report = data.load(arguments(path))[2]
    assert report["stages"][-1]["texts"] == sizes and sum(report["counts"].values()) == 3 * n


def test_two_texts_or_a_split_column_that_lacks_one_are_refused_with_the_mend(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", long_rows(2))
    assert "2 different texts cannot be split" in refused(capsys, path)
    rows = [row + (name,) for row, name in zip(long_rows(3), ["train", "test"] * 5)]
    path = write_csv(tmp_path / "a.csv", rows, (*COLUMNS, "joy", "love", "split"))
    assert "the split column has no val: give it some rows" in refused(capsys, path)


def test_users_of_val_and_test_who_are_not_in_train_are_kept_and_named(tmp_path):
    """A published split that parts the users left 2 of 3,392 test rows, or none."""
    rows = [(f"t{k}", f"u{k % 10}", f"text {k}", k % 2, 1, ["train"] * 7 + ["val", "test", "test"])
            for k in range(100)]
    rows = [(*row[:5], row[5][k % 10]) for k, row in enumerate(rows)]
    path = write_csv(tmp_path / "a.csv", rows, (*COLUMNS, "joy", "love", "split"))
    _, splits, report = data.load(arguments(path))
    assert [len(part) for part in splits.values()] == [70, 10, 20]
    assert report["unseen_users"] == ["u7", "u8", "u9"]
    assert "3 users of val or test are not in train" in data.format_report(report)
    args = arguments(path)
    args.unseen_users, args.limit = 0.3, None
    _, splits, report = infer.load_splits(args)
    assert len(report["unseen_users"]) == 5 and report["counts"] == {"train": 50, "val": 10, "test": 20}
    assert not data.unseen_users(splits).count("u0") or "u0" in report["unseen_users"]


def test_context_is_what_a_users_rows_agree_on(tmp_path):
    rows = [(f"text {k}", f"u{k % 3}", k % 2, f" {30 + k % 3}", "f") for k in range(9)]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "user_id", "joy", "age", "gender"))
    _, splits, report = data.load(arguments(path, "--context", "age", "gender"))
    assert splits["val"].profiles == {"u0": ("30", "f"), "u1": ("31", "f"), "u2": ("32", "f")}
    assert report["labels"] == ["joy"] and report["unused"] == []
    assert data.load(arguments(path, "--labels", "joy"))[1]["val"].profiles == {}


def test_an_input_may_be_without_labels_and_users(tmp_path):
    path = write_csv(tmp_path / "a.csv", [(k, f"text {k % 7}") for k in range(25)], ("row", "text"))
    read, table = data.read_annotations([path], BY_NAME, None, ("joy", "love"), (), ("text",))
    assert table.label_places == [] and "user_id" not in table.places
    assert (len(read), len(read.texts), read.users) == (25, 7, [None])
    assert read.labels.tolist() == [[False, False]] * 25


@pytest.mark.parametrize("header, cells, labels", [
    (("user_id", "text", "love", "joy"), (1, 0), (0, 1)),
    (("user_id", "text", "mood", "x"), ("love", 1), (0, 1)),
    (("user_id", "text", "joy", "x"), (1, 0), ())])
def test_the_labels_of_an_input_are_read_if_they_are_those_of_the_run(tmp_path, header, cells, labels):
    path = write_csv(tmp_path / "a.csv", [("u", "a", *cells)], header)
    read, table = data.read_annotations([path], BY_NAME, ["mood"], ("joy", "love"))
    assert read.labels.tolist() == [[bool(own) for own in labels or (0, 0)]]
    assert bool(table.label_places) == bool(labels)
    if header[2] == "mood":
        path = write_csv(tmp_path / "a.csv", [("u", "a", "fear", 1)], header)
        with pytest.raises(ValueError, match=r"line 2: mood is 'fear', not of \['joy', 'love'\]"):
            data.read_annotations([path], BY_NAME, ["mood"], ("joy", "love"))


def test_the_command_shows_how_much_was_annotated_and_how_often_people_differ(tmp_path, capsys):
    """Against counting by hand: three users on 20 texts, one of them twice on one text."""
    rows = [(f"text {k}", f"u{u}", int(k < 5), int(k % 4 == u), data.SPLITS[k % 3])
            for k in range(20) for u in range(3) if k < 15 or u == 0]
    rows += [("text 19", "u0", 1, 1, "test")]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "user_id", "joy", "love", "split"))
    assert data.main([str(path)]) == 0
    printed = capsys.readouterr().out
    n, shared = len(rows), 15
    joy, love = (sum(row[k] for row in rows) / n for k in (2, 3))
    differ = sum(len({row[3] for row in rows if row[0] == f"text {k}"}) > 1 for k in range(15)) / shared
    assert re.search(r"^per user +15 +15 +21$", printed, re.MULTILINE)
    assert re.search(r"^per text +1 +3 +3$", printed, re.MULTILINE)
    assert re.search(rf"^joy +{joy:.1%} +0.0%$", printed, re.MULTILINE)
    assert re.search(rf"^love +{love:.1%} +{differ:.1%}$", printed, re.MULTILINE)
    assert "of the 15 texts with two or more annotators" in printed and "or more" in printed
    assert max(map(len, printed.split("### User ID")[0].splitlines()[:-4])) <= 100


# ---- Split and clean ----


def slow_clean(rows, min_share, max_share):
    """AUDIT rows D1, D2, D5 with plain dictionaries; rows (split or None, user, text, labels).

    Returns (rows of each stage and split, {split: {user: surviving rows}}, rows of those users uncut).
    """

    def per_split(rows):
        return [sum(row[0] == split for row in rows) for split in data.SPLITS]

    def counts(rows):
        found = {split: collections.Counter() for split in data.SPLITS}
        for split, user, *_ in rows:
            found[split][user] += 1
        return found

    def in_all(rows):
        found = counts(rows)
        return [row for row in rows if all(found[split][row[1]] for split in data.SPLITS)]

    stages = [[len(rows)]]
    rows = [row for row in rows if any(row[3])]
    stages.append([len(rows)])
    rows = [row for row in rows if row[0]]
    stages.append(per_split(rows))
    rows = in_all(rows)
    stages.append(per_split(rows))
    found = counts(rows)
    most = {split: max(found[split].values(), default=0) for split in data.SPLITS}
    rows = [row for row in rows if not found[row[0]][row[1]] < min_share * most[row[0]]]
    stages.append(per_split(rows))
    left, before_cut = counts(rows), rows
    for split in data.SPLITS:
        for user, n in left[split].items():
            if n > max_share * most[split]:
                left[split][user] = n - int(n - max_share * most[split])
    stages.append([sum(left[split].values()) for split in data.SPLITS])
    users = {user for user in left["train"] if all(left[split][user] for split in data.SPLITS)}
    left = {split: {user: n for user, n in left[split].items() if user in users} for split in data.SPLITS}
    stages.append([sum(left[split].values()) for split in data.SPLITS])
    return stages, left, [row for row in before_cut if row[1] in users]


def random_corpus(chance):
    """(rows for annotations_of, the split of each text): few texts and users, duplicates, empty rows."""
    texts = [f"text {k}" for k in range(chance.randint(3, 30))]
    split_of = {text: chance.choice((*data.SPLITS, *data.SPLITS, None)) for text in texts}
    users = [f"u{k}" for k in range(chance.randint(1, 6))]
    weights = [chance.random() ** 3 + 0.01 for _ in users]
    rows = []
    for _ in range(chance.randint(1, 300)):
        text = chance.choice(texts)
        rows.append(
            (
                f"id {text} {chance.random() < 0.1}",
                chance.choices(users, weights)[0],
                text,
                (int(chance.random() < 0.5), int(chance.random() < 0.5)),
            )
        )
    return rows, split_of


@pytest.mark.parametrize("block", range(5))
def test_cleaning_equals_a_slow_one_by_the_words_of_the_audit(block):
    """[choice.D1], [choice.D2], [choice.D3], [choice.D5]: each stage's counts; what survives, but for chance.

    Exact duplicates are annotations like others (D3): only the ones that are cut go.
    """
    done = 0
    for seed in range(100 * block, 100 * block + 100):
        chance = random.Random(seed)
        rows, split_of = random_corpus(chance)
        min_share, max_share = chance.choice([(0.01, 0.6), (0.05, 0.6), (0.2, 0.3), (0.0, 1.0), (0.5, 0.4)])
        annotations = annotations_of(rows)
        split_texts = {split: {text for text in split_of if split_of[text] == split} for split in data.SPLITS}
        split = data.assign_splits(annotations, split_texts)
        stages, left, before_cut = slow_clean([(split_of[r[2]], *r[1:]) for r in rows], min_share, max_share)
        if not sum(stages[-1]):
            with pytest.raises(ValueError, match="no user"):
                data.clean(annotations, split, True, min_share, max_share, seed)
            continue
        splits, report = data.clean(annotations, split, True, min_share, max_share, seed)
        assert [stage["rows"] for stage in report] == stages
        assert [stage["stage"] for stage in report] == list(data.STAGES)
        available = collections.Counter(before_cut)
        for name, part in splits.items():
            survivors = collections.Counter((name, *row[1:]) for row in rows_of(part))
            assert survivors <= available
            assert collections.Counter(row[1] for row in rows_of(part)) == left[name]
            kept = [row for row in before_cut if row[0] == name]
            uncut = {
                user
                for user, n in collections.Counter(row[1] for row in kept).items()
                if n == left[name][user]
            }
            for user in uncut:
                assert sorted(r[1:] for r in survivors.elements() if r[1] == user) == sorted(
                    r[1:] for r in kept if r[1] == user
                )
        last = report[-1]
        assert last["users"] == len(left["train"])
        assert last["texts"] == [len({row[2] for row in rows_of(part)}) for part in splits.values()]
        done += 1
    assert done > 20


def busy_corpus():
    """Ten users with 100, 90, ... 10 annotations in each split."""
    return [
        (f"{split} {k}", f"u{n}", f"{split} {k}", (1, 0))
        for n in range(1, 11)
        for split in data.SPLITS
        for k in range(10 * n)
    ]


def test_the_cut_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    rows = busy_corpus()
    texts = {split: {row[2] for row in rows if row[0].startswith(split)} for split in data.SPLITS}

    def cut(rows, seed):
        annotations = annotations_of(rows)
        return {
            name: sorted(rows_of(part))
            for name, part in data.clean(annotations, data.assign_splits(annotations, texts), seed=seed)[
                0
            ].items()
        }

    shuffled = rows * 1
    random.Random(1).shuffle(shuffled)
    assert cut(rows, 1) == cut(shuffled, 1) != cut(rows, 2)
    counts = collections.Counter(row[1] for row in cut(rows, 1)["train"])
    assert [counts[f"u{n}"] for n in range(1, 11)] == [10, 20, 30, 40, 50, 60, 60, 60, 60, 60]


@pytest.mark.parametrize("min_share, users", [(0.01, 3), (0.05, 2), (0.5, 1)])
def test_min_share_is_a_share_of_the_most_active_user_in_each_split(min_share, users):
    """[choice.D1]: 0.05 is the paper's text, 0.01 its counts."""
    rows = [
        (f"{split}{k}", user, f"{split}{k}", (1, 0))
        for split in data.SPLITS
        for user, n in (("most", 200), ("some", 50), ("few", 4))
        for k in range(n)
    ]
    annotations = annotations_of(rows)
    texts = {split: {row[2] for row in rows if row[2].startswith(split)} for split in data.SPLITS}
    splits, _ = data.clean(annotations, data.assign_splits(annotations, texts), True, min_share, 1.0)
    assert len({row[1] for row in rows_of(splits["test"])}) == users


def test_a_text_of_several_split_files_goes_to_train_else_test_else_val():
    """[choice.D4]"""
    subsets = [set(c) for n in range(4) for c in itertools.combinations(data.SPLITS, n)]
    rows = [(str(k), "u", str(k), (1, 0)) for k in range(len(subsets))]
    split_texts = {split: {str(k) for k, own in enumerate(subsets) if split in own} for split in data.SPLITS}
    found = data.assign_splits(annotations_of(rows), split_texts)
    for own, split in zip(subsets, found, strict=True):
        expected = "train" if "train" in own else "test" if "test" in own else "val" if own else None
        assert (data.SPLITS[split] if split >= 0 else None) == expected


def test_without_a_split_80_10_10_of_the_texts_in_no_two_splits_whatever_the_order_of_rows():
    rows = [(f"id{k}", f"u{k % 7}", f"text {k // 3}", (1, 0)) for k in range(3000)]
    shuffled = rows * 1
    random.Random(0).shuffle(shuffled)
    of_text = []
    for some in (rows, shuffled):
        split = data.assign_splits(annotations_of(some), seed=3)
        of_text.append({})
        for row, s in zip(some, split.tolist(), strict=True):
            assert of_text[-1].setdefault(row[2], s) == s
    assert of_text[0] == of_text[1]
    assert [list(of_text[0].values()).count(s) for s in range(3)] == [800, 100, 100]
    other = data.assign_splits(annotations_of(rows), seed=4)
    assert other.tolist() != data.assign_splits(annotations_of(rows), seed=3).tolist()


def test_a_split_column_is_followed_row_by_row_and_the_overlap_is_told(tmp_path):
    names = ["train", " VAL", "test", "Training", "dev", "Test ", "validation", "valid", "train"]
    rows = [(k, f"u{k % 2}", f"t{k % 5}", k % 2, 0, name) for k, name in enumerate(names)]
    path = write_csv(tmp_path / "a.csv", rows, (*COLUMNS, "joy", "love", "split"))
    _, splits, report = data.load(arguments(path))
    texts = {name: [row[2] for row in rows_of(part)] for name, part in splits.items()}
    assert texts == {"train": ["t0", "t3", "t3"], "val": ["t1", "t4", "t1", "t2"], "test": ["t2", "t0"]}
    told = [own for own in report["warnings"] if "more than one split" in own]
    assert told == ["2 of 5 texts stand in more than one split: the test figure then says how well known "
                    "texts are relabelled, not new ones"]


def test_no_user_left_is_an_error_that_says_what_a_user_needs(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [(k, f"u{k}", f"t{k}", 1, 0) for k in range(50)])
    assert data.main([str(path), "--clean", "paper"]) == 2
    assert "no user is left of 50 after cleaning" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--min_share", "-0.5"],
        ["--max_share", "-1"],
        ["--max_share", "nan"],
        ["--min", "0"],
        ["--min_share", "x"],
    ],
)
def test_a_share_below_0_and_an_abbreviated_flag_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        data.main(["goemotions", *flags])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_held_out_users_are_in_test_only_and_the_others_untouched():
    rows = [(f"{s}{k}", f"u{k % 10}", f"{s}{k}", (1, 0)) for s in "abc" for k in range(100)]
    splits = {
        name: annotations_of(rows).select(np.arange(100) + 100 * s) for s, name in enumerate(data.SPLITS)
    }
    kept, unseen = data.hold_out_users(splits, 0.3, seed=5)
    assert len(unseen) == 3 and rows_of(kept["test"]) == rows_of(splits["test"])
    for name in ("train", "val"):
        assert rows_of(kept[name]) == [row for row in rows_of(splits[name]) if row[1] not in unseen]
    assert (
        data.hold_out_users(splits, 0.3, seed=6)[1] != unseen
        or data.hold_out_users(splits, 0.3, 7)[1] != unseen
    )
    same, none = data.hold_out_users(splits, 0.0)
    assert none == [] and len(same["train"]) == 100
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="unseen_users"):
            data.hold_out_users(splits, share)


def test_a_limit_takes_whole_texts_and_a_larger_limit_takes_more():
    rows = [(f"{k // 4}", f"u{k % 4}", f"t{k // 4}", (1, 0)) for k in range(400)]
    annotations = annotations_of(rows)
    small, large = (rows_of(data.limit(annotations, n, seed=1)) for n in (42, 80))
    assert len(small) == 42 and len(large) == 80 and {*small} < {*large}
    assert sorted(small, key=rows.index) == small
    assert sorted(collections.Counter(row[2] for row in small).values()) == [2] + [4] * 10
    assert data.limit(annotations, None) is annotations and data.limit(annotations, 400) is annotations


def test_the_stages_of_a_generated_corpus_stand_beside_the_papers(tmp_path, capsys):
    tiny.write_corpora(tmp_path, size="mini")
    for corpus, rows, users in (
        ("goemotions", "146,574 / 18,160 / 18,233", 72),
        ("unhealthy", "168,503 / 20,352 / 21,289", 427),
    ):
        assert data.main([corpus, "--data_dir", str(tmp_path / corpus)]) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^users in all splits again .*{rows} +{users}$", printed, re.MULTILINE)
        assert printed.count("is not the official file") == 4 + 2 * (corpus == "goemotions")
        assert "### User ID:\n" in printed


def test_an_unknown_data_set_is_named(capsys):
    assert data.main(["goemotion"]) == 2
    assert "no data set 'goemotion': use one of ['goemotions', 'unhealthy']" in capsys.readouterr().err


# ---- Download ----

CONTENT = random.Random(0).randbytes(300_000)


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `ways` is what the next requests get, later ones all of it or their Range."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ways, self.ranges = [], []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        asked, way = self.headers.get("Range"), self.server.ways.pop(0) if self.server.ways else "serve"
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and way != "ignore range" else 0
        if isinstance(way, int):
            self.send_response(way)
            self.send_header("Location", "http://elsewhere.invalid/file")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if way == "slow":
            time.sleep(1)
        if asked and start >= len(CONTENT):
            self.send_error(416)
            return
        content = bytes(len(CONTENT)) if way == "other" else CONTENT
        self.send_response(206 if start else 200)
        if way != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : 2 << 16 if way == "cut" else None])
        self.close_connection = True


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


def fetch_from(server, path, expected=None, **options):
    data.download(server.url, expected or blob_id(CONTENT), path, wait_s=0.01, **options)


@pytest.mark.parametrize(
    "ways, ranges",
    [
        ([], [None]),
        (["no length"], [None]),
        (["cut"], [None, "bytes=131072-"]),
        (["cut", "ignore range"], [None, "bytes=131072-"]),
        ([503, 429, 408], [None] * 4),
        (["slow"], [None] * 2),
        (["cut", 500, "no length"], [None, "bytes=131072-", "bytes=131072-"]),
    ],
)
def test_a_download_ends_whole_whatever_happens_on_the_way(server, tmp_path, ways, ranges):
    server.ways = ways
    fetch_from(server, tmp_path / "file", timeout_s=0.3)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "part, n_requests",
    [
        (CONTENT[:1000], 1),
        (CONTENT, 1),
        (CONTENT + b"more", 2),
        (b"x" * 1000, 2),
        (b"", 1),
        (b"x" * 300_000, 2),
    ],
)
def test_any_part_that_an_earlier_run_left_is_used_or_replaced(server, tmp_path, part, n_requests):
    (tmp_path / "file.part").write_bytes(part)
    fetch_from(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.ranges) == n_requests
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize(
    "way, words",
    [
        (404, "the server answered 404"),
        (403, "the server answered 403"),
        (302, "redirect to http://elsewhere.invalid/file, and redirects are not followed"),
    ],
)
def test_a_refusal_or_a_redirect_stops_at_once_and_says_so(server, tmp_path, way, words):
    server.ways = [way]
    with pytest.raises(FileNotFoundError, match=words):
        fetch_from(server, tmp_path / "file")
    assert server.ranges == [None] and not list(tmp_path.iterdir())


def test_another_content_is_refused_and_nothing_is_left(server, tmp_path):
    server.ways = ["other"]
    with pytest.raises(
        ValueError, match=f"has blob id {blob_id(bytes(len(CONTENT)))}, not {blob_id(CONTENT)}"
    ):
        fetch_from(server, tmp_path / "file")
    assert not list(tmp_path.iterdir()) and len(server.ranges) == 1


def test_a_server_that_always_cuts_or_is_not_there_is_named_and_leaves_no_file(server, tmp_path):
    server.ways = [503] * 9
    with pytest.raises(FileNotFoundError, match="answered 503.*put the file there yourself"):
        fetch_from(server, tmp_path / "file")
    assert len(server.ranges) == 5 and not (tmp_path / "file").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        data.download(url, blob_id(CONTENT), tmp_path / "file", attempts=2, wait_s=0.01)
    assert not (tmp_path / "file").exists()


def test_compressed_answers_are_not_asked_for(server, tmp_path, monkeypatch):
    """A Range of a gzip answer counts compressed bytes: what is written and what is asked for do not meet."""
    asked, get = [], requests.get
    monkeypatch.setattr(requests, "get", lambda url, **options: asked.append(options) or get(url, **options))
    fetch_from(server, tmp_path / "file")
    assert asked[0]["headers"]["Accept-Encoding"] == "identity" and asked[0]["allow_redirects"] is False


def test_a_blob_id_is_the_one_of_git(tmp_path):
    for content in (b"", b"hello\n", CONTENT):
        (tmp_path / "file").write_bytes(content)
        assert data.git_blob_id(tmp_path / "file") == blob_id(content)
        git = subprocess.run(
            ["git", "hash-object", "--no-filters", tmp_path / "file"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert git.stdout.strip() == blob_id(content)


def corpus_of(server):
    return data.Corpus(
        {"text_id": "id", "user_id": "rater_id", "text": "text"},
        "part_*.csv",
        {"train": "train.tsv"},
        {name: (server.url, blob_id(CONTENT)) for name in ("part_1.csv", "part_2.csv", "train.tsv")},
        [],
    )


def test_missing_files_are_downloaded_and_an_interrupted_download_goes_on(server, tmp_path):
    """After a kill behind the first of three files, the rest must not be taken for a user's own choice."""
    (tmp_path / "part_1.csv").write_bytes(CONTENT)
    files, splits, checks = data.find_files(corpus_of(server), tmp_path)
    assert [path.name for path in files] == ["part_1.csv", "part_2.csv"] and splits[
        "train"
    ].read_bytes() == CONTENT
    assert len(server.ranges) == 2
    assert checks == {
        name: {"blob_id": blob_id(CONTENT), "official": True}
        for name in ("part_1.csv", "part_2.csv", "train.tsv")
    }


def test_own_files_are_used_as_they_are_and_said_to_be_unofficial(server, tmp_path):
    (tmp_path / "part_7.csv").write_text("mine")
    files, _, checks = data.find_files(corpus_of(server), tmp_path)
    assert [path.name for path in files] == ["part_7.csv"] and len(server.ranges) == 1
    assert checks["part_7.csv"] == {"blob_id": blob_id(b"mine"), "official": False}


def test_the_processes_of_a_run_download_each_file_once(server, tmp_path):
    """Under torchrun all ranks start at once: two writers of one .part would spoil it."""
    processes = [
        multiprocessing.get_context("fork").Process(
            target=data.find_files, args=(corpus_of(server), tmp_path)
        )
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and len(server.ranges) == 3


# ---- Few-shot examples ----


def test_examples_are_the_users_own_of_train_never_of_the_same_text_and_stable():
    """[choice.P1]: the released code draws from test, unseeded, and a text can be its own example."""
    chance = random.Random(0)
    rows = [(f"{k}", f"u{k % 3}", f"t{chance.randrange(40)}", (k % 2, 1)) for k in range(200)]
    splits = {"train": annotations_of(rows), "test": annotations_of([("9", "u9", "t9", (1, 0))])}
    for follow, split in ([], "train"), ([("P1", "released")], "test"):
        args = types.SimpleNamespace(follow=follow, method="q2s", context=None, no_user_id=0, split_seed=7)
        choose = infer.example_chooser(args, splits)
        assert choose.args == (data.example_pool(splits[split]),)
        assert choose.keywords == {"shots": 2, "seed": 7}
    pool = data.example_pool(annotations_of(rows))
    asked = [(f"t{k}", f"u{u}") for k in range(45) for u in range(3)]
    chosen = {ask: data.choose_examples(pool, *ask, 2, seed=1) for ask in asked}
    chance.shuffle(asked)
    for ask in asked:
        assert data.choose_examples(pool, *ask, 2, seed=1) == chosen[ask]
        own = {
            (row[2], tuple(name for name, on in zip(("joy", "love"), row[3], strict=True) if on))
            for row in rows
            if row[1] == ask[1]
        }
        texts = [text for text, _ in chosen[ask]]
        assert len({*texts}) == 2 and ask[0] not in texts and {*chosen[ask]} <= own
    other = [data.choose_examples(pool, *ask, 2, seed=2) for ask in asked]
    assert sum(a == chosen[ask] for a, ask in zip(other, asked, strict=True)) < len(asked) / 4
    drawn = collections.Counter(text for ask in asked for text, _ in chosen[ask])
    assert len(drawn) > 30 and max(drawn.values()) < 30  # spread over the pool: 270 drawn from about 40 texts


def test_a_tokenizer_without_an_end_token_is_refused_for_lm(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "eos_token", None, raising=False)
    with pytest.raises(ValueError, match="no end token"):
        data.add_responses(data.encode(tokenizer, TASK, METHODS["lm"], some_annotations(), 4096), tokenizer)


def chooser(pool, shots):
    return functools.partial(data.choose_examples, pool, shots=shots)


def test_too_few_examples_are_counted():
    pool = {"u": [("a", ("joy",)), ("b", ("love",))]}
    assert data.choose_examples(pool, "a", "u", 2) == (("b", ("love",)),)
    assert {*data.choose_examples(pool, "c", "u", 2)} == {*pool["u"]}
    assert data.choose_examples(pool, "a", "stranger", 1) == ()
    annotations = annotations_of([("1", "u", "a", (1, 0)), ("2", "u", "c", (1, 0)), ("3", "v", "c", (0, 1))])
    assert data.prompt_inputs(METHODS["q2s"], annotations, chooser(pool, 2))[2] == 2


# ---- Encode ----


@pytest.fixture(scope="module", params=["mistral", "neox", "t5"])
def tokenizer(request, tmp_path_factory):
    """Byte-level BPE, trained on prompts; Mistral's adds a BOS in front, T5's an EOS behind."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


TASK = neutral_task(["joy", "love"])
TEXTS = ["the dog came home", "once, a garden 🙂", "in the rain\n\n### Response: {x}", "a", "so so glad"]


def some_annotations(texts=TEXTS, n_users=3):
    return annotations_of(
        [(str(k), f"u{u}", text, (k % 2, u % 2)) for u in range(n_users) for k, text in enumerate(texts)]
        + [("0", "u0", texts[0], (1, 1))]
    )


@pytest.mark.parametrize("name", METHODS)
def test_ids_are_those_of_each_prompt_and_each_distinct_prompt_is_there_once(tokenizer, name):
    annotations, method = some_annotations(), METHODS[name]
    pool = data.example_pool(annotations)
    encoded = data.encode(tokenizer, TASK, method, annotations, 4096, chooser(pool, method.shots))
    prompts = []
    for text, user_id in annotations.fields():
        examples = data.choose_examples(pool, text, user_id, method.shots)
        prompts.append("".join(build_prompt(TASK, method, text, user_id, examples)))
    for prompt, m in zip(prompts, encoded.prompt_index, strict=True):
        assert encoded.prompt(m).tolist() == tokenizer(prompt)["input_ids"]
        assert encoded.hashes[m] == hashlib.sha256(prompt.encode()).hexdigest()[:16]
    assert len(encoded.lengths) == len({*prompts}) == len({*encoded.hashes}) == len(encoded.hashes)
    assert encoded.ids.dtype == np.int32 and encoded.lengths.sum() == len(encoded.ids)
    assert (encoded.labels == annotations.labels).all() and encoded.labels.dtype == np.float32
    assert encoded.n_too_few == encoded.n_shortened == 0
    assert encoded.response_ids is None


@pytest.mark.parametrize("train_eos", [True, False])
def test_responses_are_sorted_labels_behind_a_line_end_and_an_eos(tokenizer, train_eos):
    """[choice.T2]: without the EOS the model is never taught to stop."""
    annotations = some_annotations()
    encoded = data.encode(tokenizer, TASK, METHODS["lm"], annotations, 4096)
    data.add_responses(encoded, tokenizer, train_eos)
    for row, k in enumerate(encoded.response_index):
        expected = tokenizer("\n" + build_response(annotations.label_set(row)), add_special_tokens=False)[
            "input_ids"
        ]
        assert encoded.response(k).tolist() == expected + [tokenizer.eos_token_id] * train_eos
    assert len(encoded.response_offsets) == 1 + len({*map(tuple, annotations.labels.tolist())})


def test_only_the_text_is_shortened_and_no_more_than_needed(tokenizer):
    chance = random.Random(0)
    words = ["garden", "🙂🙃", "日本語", "so", "\n\n", "  ", "###", "xyzzy", "é", "the house, the dog"]
    texts = [" ".join(chance.choices(words, k=chance.randint(0, 120))) + f"end {k}" for k in range(60)]
    annotations, method = (
        annotations_of([(str(k), "u", text, (1, 0)) for k, text in enumerate(texts)]),
        METHODS["clsp"],
    )
    prompts = ["".join(build_prompt(TASK, method, text, "u")) for text in texts]
    template = len(tokenizer("".join(build_prompt(TASK, method, "", "u")))["input_ids"])
    for max_length in (template, template + 1, template + 40):
        encoded = data.encode(tokenizer, TASK, method, annotations, max_length)
        long = [len(tokenizer(prompt)["input_ids"]) > max_length for prompt in prompts]
        assert encoded.n_shortened == sum(long) > 10 and encoded.lengths.max() <= max_length
        for text, is_long, m in zip(texts, long, encoded.prompt_index, strict=True):
            before, _, after = build_prompt(TASK, method, text, "u")
            if not is_long:
                assert encoded.prompt(m).tolist() == tokenizer(before + text + after)["input_ids"]
                continue
            kept = data.shorten(tokenizer, before, text, after, max_length)
            assert text.startswith(kept) and len(kept) < len(text)
            assert encoded.prompt(m).tolist() == tokenizer(before + kept + after)["input_ids"]
            assert encoded.hashes[m] == hashlib.sha256((before + kept + after).encode()).hexdigest()[:16]
            ends = [
                end
                for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
                    "offset_mapping"
                ]
                if end > len(kept)
            ]
            assert (
                len(tokenizer(before + text[: ends[0]] + after)["input_ids"]) > max_length
            )  # one token more
    with pytest.raises(ValueError, match=f"--max_length {template - 1} is less than the {template} tokens"):
        data.encode(tokenizer, TASK, method, annotations, template - 1)


def test_a_lone_surrogate_as_of_bad_bytes_in_argv_is_a_value_error(tokenizer):
    """The tokenizer itself raises a TypeError about Union[TextInputSequence, ...], with a traceback."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        data.encode(tokenizer, TASK, METHODS["cls"], some_annotations(["a \udcff b"]), 4096)


def test_a_text_of_a_megabyte_is_shortened_in_seconds(tokenizer):
    annotations = annotations_of([("1", "u", "the dog came home " * 55_000, (1, 0))])
    started = time.perf_counter()
    encoded = data.encode(tokenizer, TASK, METHODS["clsp"], annotations, 300)
    assert 295 <= encoded.lengths[0] <= 300 and time.perf_counter() - started < 120


def test_a_chat_template_frames_the_prompt_and_brings_its_own_special_tokens(tokenizer):
    annotations = some_annotations()
    if not tokenizer.chat_template:
        with pytest.raises(ValueError, match="no chat template"):
            data.encode(tokenizer, TASK, METHODS["q0s"], annotations, 4096, chat_template=True)
        return
    encoded = data.encode(tokenizer, TASK, METHODS["q0s"], annotations, 4096, chat_template=True)
    for (text, _), m in zip(annotations.fields(), encoded.prompt_index, strict=True):
        message = [{"role": "user", "content": "".join(build_prompt(TASK, METHODS["q0s"], text))}]
        expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert encoded.prompt(m).tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert encoded.prompt(m).tolist().count(tokenizer.bos_token_id) == 1


def test_shared_prefix_is_the_longest_common_one_that_leaves_a_token_of_each():
    chance = random.Random(0)
    for _ in range(200):
        common = [chance.randrange(3) for _ in range(chance.randrange(6))]
        rows = [
            common + [chance.randrange(3) for _ in range(chance.randrange(4))]
            for _ in range(chance.randint(1, 5))
        ]
        rows = [row or [0] for row in rows]
        ids, offsets = data.flatten(rows)
        brute = max(n for n in range(min(map(len, rows))) if len({tuple(row[:n]) for row in rows}) == 1)
        assert data.shared_prefix(data.Encoded(ids, offsets, None, None, [])) == brute


# ---- Batches ----


def encoded_of(n_prompts, n, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 60, n_prompts)
    index = np.concatenate([np.arange(n_prompts), generator.integers(n_prompts, size=n - n_prompts)])
    return data.Encoded(
        np.zeros(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]), index, None, []
    )


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("n_prompts, n, batch_size", [(400, 1003, 16), (3, 10, 64), (50, 64, 8), (1, 1, 1)])
def test_an_epoch_has_each_annotation_once_in_steps_of_batch_size(n_prompts, n, batch_size, merge):
    encoded = encoded_of(n_prompts, n)
    steps = data.training_steps(encoded, batch_size, 1, 0, merge, window=4)
    assert sorted(np.concatenate(steps)) == list(range(n))
    assert [len(step) for step in steps] == [batch_size] * (n // batch_size) + [n % batch_size] * (
        n % batch_size > 0
    )
    again = data.training_steps(encoded, batch_size, 1, 0, merge, window=4)
    assert all((a == b).all() for a, b in zip(steps, again, strict=True))
    if n > 100:
        for other in (
            data.training_steps(encoded, batch_size, 1, 1, merge, window=4),
            data.training_steps(encoded, batch_size, 2, 0, merge, window=4),
        ):
            assert not all((a == b).all() for a, b in zip(steps, other, strict=True))


def test_steps_have_prompts_of_like_length():
    encoded = encoded_of(4000, 8000)
    spread = [
        np.ptp(encoded.lengths[encoded.prompt_index[step]]) for step in data.training_steps(encoded, 32, 0, 0)
    ]
    assert np.mean(spread) < 5  # 54 of 32 random ones


def test_merged_annotations_of_a_prompt_are_parted_by_the_edge_of_a_step_only():
    encoded = encoded_of(3000, 12000)
    steps = data.training_steps(encoded, 64, 0, 0, merge_duplicates=True)
    computed = sum(len({*encoded.prompt_index[step]}) for step in steps)
    assert 3000 <= computed <= 3000 + len(steps)
    plain = data.training_steps(encoded, 64, 0, 0)
    assert sum(len({*encoded.prompt_index[step]}) for step in plain) > 1.5 * computed


@pytest.mark.parametrize("budget", [1, 60, 500, 10**6])
def test_micro_batches_hold_each_row_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    rows = np.random.default_rng(1).permutation(500)[:300]
    batches = data.micro_batches(lengths, rows, budget)
    assert sorted(np.concatenate(batches)) == sorted(rows)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
    greedy, size = 1, 0  # batches that are filled one after the other are as few as can be
    for length in np.sort(lengths[rows]):
        greedy, size = (greedy + 1, 1) if size and (size + 1) * length > budget else (greedy, size + 1)
    assert len(batches) == greedy
    assert data.micro_batches(lengths, rows[:0], budget) == []


def test_micro_batches_are_even_and_count_the_shared_prefix_once():
    """32 prompts of 185 tokens: 16 + 16 and not 22 + 10; 50 shared tokens leave room for more rows."""
    lengths, rows = np.full(128, 185), np.arange(32)
    assert [len(batch) for batch in data.micro_batches(lengths, rows, 4096)] == [16, 16]
    assert [len(batch) for batch in data.micro_batches(lengths, rows, 50 + 29 * 135, 50)] == [16, 16]
    assert [len(batch) for batch in data.micro_batches(lengths, rows, 50 + 32 * 135, 50)] == [32]
    assert [len(batch) for batch in data.micro_batches(lengths, rows, 50 + 32 * 135 - 1, 50)] == [16, 16]
    mixed = np.concatenate([np.full(30, 20), np.full(10, 60)])
    costs = [len(batch) * mixed[batch].max() for batch in data.micro_batches(mixed, np.arange(40), 800)]
    assert len(costs) == 2 and max(costs) == 600 == sum(costs) / 2


def test_padding_is_on_the_right_or_on_the_left():
    rows = [[1, 2, 3], np.array([4], np.int32), []]
    assert data.pad(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert data.pad(rows, 9, left=True).tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]


# ---- Command line and tags ----


def test_the_command_prints_the_stages_of_a_long_csv(tmp_path):
    rows = [(k, f"u {u}", f"text {k}", 1, int(u == k % 3)) for k in range(40) for u in range(3)]
    path = write_csv(tmp_path / "mine.csv", rows)
    run = subprocess.run([sys.executable, ROOT / "data.py", path], capture_output=True, text=True, check=True)
    assert re.search(r"^raw +120 +40 +3$", run.stdout, re.MULTILINE)
    assert re.search(r"^on the split's texts +96 / 12 / 12 +32 / 4 / 4 +3$", run.stdout, re.MULTILINE)
    assert "2 labels: joy, love\n" in run.stdout and "- joy\n- love\n" in run.stdout


def test_every_tag_stands_once_in_the_code_and_is_named_in_a_test():
    tags = re.findall(r"\[[a-z]+\.[A-Z]\w*\]", (ROOT / "data.py").read_text())
    assert sorted(tags) == [f"[choice.{row}]" for row in ("D1", "D2", "D3", "D4", "D5", "P1", "T2")]
    assert {*tags} <= {*re.findall(r"\[choice\.\w+\]", Path(__file__).read_text())}
    assert set(TASKS) == set(data.CORPORA)


def test_the_report_shows_the_prompt_with_the_context_of_its_user(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("user_id,text,age,rude\n" + "".join(f"u,text {k},35-39,{k % 2}\n" for k in range(10)))
    assert data.main([str(path), "--labels", "rude", "--context", "age"]) == 0
    assert "### User ID:\nu\nage: 35-39\n\n" in capsys.readouterr().out


def test_the_report_ends_quietly_when_its_reader_does(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("user_id,text,rude\n" + "".join(f"u,{k},{k % 2}\n" for k in range(10)))
    script = str(Path(data.__file__))
    done = subprocess.run(f"{sys.executable} {script} {path} | head -c 1", shell=True, capture_output=True)
    assert done.stdout == b"s" and done.stderr == b""
