"""The annotations: download and verify, read, clean, split, few-shot choice, encode, batch.

Source: section VI-A of the paper for the cleaning; the order of its stages and their counts from the authors'
released code (README, audit rows D1-D6). Data: GoEmotions (Demszky et al. 2020), Unhealthy Conversations
(Price et al. 2020), or any long CSV, used as it is: a row per annotation with user_id, text, labels (columns
of 0 and 1, or one of names), and, if they are there, text_id and split (train, val, test).

    python data.py goemotions [--data_dir DIR]        downloads what is missing and prints the stages
    python data.py annotations.csv [--columns text=comment user_id=worker] [--labels toxic]

The way of the data: files -> Annotations -> {"train", "val", "test"} -> Encoded token ids -> lists of rows.
Does not build a prompt's words (prompts.py) and does not put anything on a device (train.py, infer.py).
"""

import argparse
import bisect
import codecs
import csv
import fcntl
import gzip
import hashlib
import itertools
import math
import os
import random
import re
import signal
import sys
import textwrap
import time
import unicodedata
import zlib
from array import array
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
from tqdm import tqdm

import prompts
from prompts import METHODS, TASKS, build_prompt, build_response, neutral_task, parse_response

SPLITS = ("train", "val", "test")
STAGES = ("raw", "non-empty", "on the split's texts", "users in all splits", "after min_share",
          "after max_share", "users in all splits again")
csv.field_size_limit(2**31 - 1)  # a text may be long
codecs.register_error("as NUL", lambda error: ("\0", error.end))  # type: ignore[attr-defined]


class Corpus(NamedTuple):
    """Where a corpus lies and how its files name things."""

    columns: dict[str, str]  # role -> column
    annotation_files: str  # a glob
    split_files: dict[str, str]  # split -> file that lists its texts
    files: dict[str, tuple[str, str]]  # file -> (address of its folder, git blob id)
    paper_stages: list  # of each stage (rows or (train, val, test) rows, users): audit rows D1-D5


GOOGLE = "https://storage.googleapis.com/gresearch/goemotions/data/full_dataset/"
RESEARCH = "https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/"
UNHEALTHY = "https://raw.githubusercontent.com/conversationai/unhealthy-conversations/main/"
CORPORA = {
    "goemotions": Corpus(
        columns={"text_id": "id", "user_id": "rater_id", "text": "text"},
        annotation_files="goemotions_*.csv",
        split_files={"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"},
        files={
            "goemotions_1.csv": (GOOGLE, "9d2a090e3ff0a626c2ca6e572f07b0c4614bee71"),
            "goemotions_2.csv": (GOOGLE, "4aa09a16a323b49bacefbf785faaca5b7e8f5d3d"),
            "goemotions_3.csv": (GOOGLE, "3c42521b338a07407806b0d2659e674ac762d76d"),
            "train.tsv": (RESEARCH, "aa00d732d3b9e969d9fcbaafc2c5b094555746c0"),
            "dev.tsv": (RESEARCH, "38c793645ca3a2e946d625c9722ca5386b0a6c7f"),
            "test.tsv": (RESEARCH, "7635db4a49befb91e5bc0dbedde095bb2d8593ae"),
        },
        paper_stages=[((211225,), 82), ((207814,), None), ((153797, 19049, 19123), None),
                      ((153796, 19049, 19123), 81), ((153390, 19017, 19063), None),
                      ((146659, 18199, 18244), None), ((146574, 18160, 18233), 72)],
    ),
    "unhealthy": Corpus(
        columns={"text_id": "_unit_id", "user_id": "_worker_id", "text": "comment"},
        annotation_files="unhealthy_full.csv",
        split_files={"train": "train.csv", "val": "val.csv", "test": "test.csv"},
        files={
            "unhealthy_full.csv": (UNHEALTHY, "983a803d4a4d87d84c35199a6257ff559b0159c5"),
            "train.csv": (UNHEALTHY + "corpus/", "72a213324bd31a2003cfaaab2ed19f0208f3e78c"),
            "val.csv": (UNHEALTHY + "corpus/", "36b88fc1c36e18a35d1bc52d7d62db09f270e791"),
            "test.csv": (UNHEALTHY + "corpus/", "dc3bd62d191471714e1d89f7ecc6e42445020386"),
        },
        paper_stages=[((227975,), 588), ((215265,), None), ((172550, 20893, 21822), None),
                      ((171873, 20847, 21765), 510), ((171058, 20770, 21679), None),
                      ((169139, 20460, 21388), None), ((168503, 20352, 21289), 427)],
    ),
}


@dataclass
class Annotations:
    """N annotations: which labels a user gave to a text.

    Shapes: texts and text_ids, one entry per distinct pair of them; users, one per distinct user; text_index
    and user_index (N,) point into them; labels bool (N, L); split_index (N,) of the `split` column, or None.
    """

    text_ids: list
    texts: list
    users: list
    text_index: np.ndarray
    user_index: np.ndarray
    labels: np.ndarray
    label_names: tuple
    split_index: np.ndarray | None = None
    profiles: dict = field(default_factory=dict)  # user: values of the columns of --context

    def __len__(self):
        return len(self.text_index)

    def select(self, rows):
        """The annotations of `rows` (indices or a mask), in that order, over the same texts and users."""
        return replace(self, text_index=self.text_index[rows], user_index=self.user_index[rows],
                       labels=self.labels[rows], split_index=None)

    @cached_property
    def text_number(self):
        """(N,) the number of the text itself, whatever its text_ids."""
        numbers = {}
        return np.array([numbers.setdefault(text, len(numbers)) for text in self.texts],
                        np.int32)[self.text_index]

    def label_set(self, row):
        return [self.label_names[k] for k in np.flatnonzero(self.labels[row])]

    def fields(self):
        """Yields (text, user_id) of each annotation."""
        for item, user in zip(self.text_index.tolist(), self.user_index.tolist(), strict=True):
            yield self.texts[item], self.users[user]


# ---- Download and verify ----


def git_blob_id(path):
    """sha1 of `blob SIZE\\0` + content, in hex: the id under which git stores a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url, part, have, timeout_s):
    """Writes url to the file `part`, or its rest behind the `have` bytes that are there."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s, allow_redirects=False) as answer:
        if answer.status_code == 416 and have:  # nothing lies behind what is there
            return
        if answer.status_code not in (200, 206):
            target = answer.headers.get("Location")
            words = f" with a redirect to {target}, and redirects are not followed" if target else ""
            raise requests.HTTPError(f"the server answered {answer.status_code}{words}", response=answer)
        resumed = answer.status_code == 206
        total = have * resumed + int(answer.headers.get("Content-Length", 0)) or None
        with part.open("ab" if resumed else "wb") as file, tqdm(
                desc=part.stem, initial=have * resumed, total=total, unit="B", unit_scale=True) as bar:
            for chunk in answer.iter_content(1 << 16):
                bar.update(file.write(chunk))


def download(url, blob_id, path, attempts=5, timeout_s=30, wait_s=1.0):
    """Downloads url to path, going on where a broken download stopped, and verifies the git blob id.

    Raises: ValueError if the content is another one; FileNotFoundError if the address cannot be reached.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(1, attempts + 1):
        have = part.stat().st_size if part.exists() else 0
        try:
            fetch(url, part, have, timeout_s)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 500
            if attempt == attempts or status < 500 and status not in (408, 429):
                raise FileNotFoundError(f"{path} is missing and {url} cannot be downloaded ({error}); "
                                        "put the file there yourself") from error
            time.sleep(wait_s * 2 ** (attempt - 1))
            continue
        except OSError as error:  # a full disk
            raise OSError(f"cannot write {part}: {error}") from None
        if (found := git_blob_id(part)) == blob_id:
            with part.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut may leave a hole under the final name
            part.replace(path)
            return
        part.unlink()  # what was resumed may have been the rest of something else: once more, from the start
        if not have or attempt == attempts:
            raise ValueError(f"{url} has blob id {found}, not {blob_id}: it is not the file of the paper; "
                             f"try again, or put your own file at {path}")


def find_files(corpus, data_dir):
    """Returns (annotation files, {split: file}, {file: {blob_id, official}}); downloads what is missing.

    Files that are there are used as they are. Beside own (unofficial) annotation files none is downloaded.
    """
    def check(path):
        blob_id = git_blob_id(path)
        return {"blob_id": blob_id, "official": corpus.files.get(path.name, ("", ""))[1] == blob_id}

    data_dir = Path(data_dir)
    own = not all(check(path)["official"] for path in data_dir.glob(corpus.annotation_files))
    wanted = corpus.split_files.values() if own else corpus.files
    if missing := [name for name in wanted if not (data_dir / name).exists()]:
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a run wait here for the first one
            for name in missing:
                if not (data_dir / name).exists():
                    address, blob_id = corpus.files[name]
                    download(address + name, blob_id, data_dir / name)
    annotation_files = sorted(data_dir.glob(corpus.annotation_files))
    split_files = {split: data_dir / name for split, name in corpus.split_files.items()}
    return annotation_files, split_files, {
        path.name: check(path) for path in (*annotation_files, *split_files.values())}


# ---- Read ----

ROLES = ("text_id", "user_id", "text", "split")
UNNAMED = re.compile(r"(Unnamed: [\d.]+)?$")  # the name of a column that pandas wrote its index into
MOST_LABELS = 1000
BARE = "\udc0d"  # stands for a \r that ends no line, which csv refuses; no UTF-8 text has it


class Cells(dict):
    """What a cell stands for, whatever its case and the spaces around it; None for any other cell."""

    def __missing__(self, cell):
        return self.get(cell.strip().lower())


MARKS = Cells(dict.fromkeys("0 0.0 false f no n".split(), 0) | dict.fromkeys("1 1.0 true t yes y".split(), 1))
SPLIT_NAMES = Cells(train=0, training=0, val=1, valid=1, validation=1, dev=1, test=2)


def read_rows(path, delimiter=None, wanted=()):
    """Yields (line number, cells) of each row of a CSV file, gzipped or not, the header included.

    Without a delimiter it is the one of , ; tab | that finds most of the columns `wanted`, then most cells.
    Raises: ValueError with the line for bad UTF-8, a NUL, a broken quote, or another number of cells.
    """
    start, width, bare, escaped = 1, 0, False, False

    def lines(file):
        nonlocal bare, escaped
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise ValueError(f"{path}, line {number}: bad UTF-8 or a NUL; save it as UTF-8 text")
            if "\r" in line and "\r" in (body := line.rstrip("\r\n")):
                bare, line = True, body.replace("\r", BARE) + line[len(body):]
                if number == 1:
                    raise csv.Error(r"its lines end in \r alone; save it with \n or \r\n")
            escaped = escaped or '\\"' in line
            yield line

    def columns_found(delimiter):
        cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), ())]
        return len({*cells} & {*wanted}), len(cells)

    with open(path, "rb") as file:
        opened = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="as NUL", newline="\n") as file:
            source = lines(file)
            first = next(source, "")
            delimiter = delimiter or max(",;\t|", key=columns_found)
            reader = csv.reader(itertools.chain([first], source), delimiter=delimiter, strict=True)
            for cells in reader:
                width = width or len(cells)
                if len(cells) not in (0, width):
                    raise csv.Error(f"{len(cells)} columns, but the first row has {width}")
                if cells:
                    yield start, [cell.replace(BARE, "\r") for cell in cells] if bare else cells
                start = reader.line_num + 1
    except (csv.Error, EOFError, zlib.error) as error:
        mend = r'; a quote within a cell is written "", not \"' if escaped else ""
        raise ValueError(f"{path}, line {start}: {error}{mend}") from None


class Table:
    """An open CSV file: where its roles, labels and context stand, and its rows.

    columns {role: name}, those not in `needed` if they are there; labels, the names of the label columns, by
    default all others, or of one column that holds label names. With label_names, a finished run's, the file
    may be without labels. Raises: ValueError for what is missing or makes no sense.
    """

    def __init__(self, path, columns, labels=None, label_names=None, context=(), needed=("user_id", "text")):
        self.path, self.rows = path, read_rows(path, None, {*columns.values(), *context, *(labels or ())})
        header = self.header = [name.strip() for name in next(self.rows, (0, []))[1]]
        columns = {role: name for role, name in columns.items() if role in needed or name in header}
        used, of_names = [*columns.values(), *context], labels if len(labels or ()) == 1 else []
        if label_names is None:
            labels = sorted(labels or (
                name for name in header if name not in used and not UNNAMED.match(name)))
        elif {*label_names} <= {*header}:
            labels, of_names = label_names, []
        else:
            labels = of_names = [name for name in of_names if name in header]
        check_header(path, header, [*used, *labels])
        self.label_names, self.holds_names = label_names or tuple(labels), bool(of_names)
        if label_names is None and of_names:
            rows, place = read_rows(path, None, header), header.index(*of_names)
            cells = {cells[place] for _, cells in itertools.islice(rows, 1, None)}
            self.holds_names = any(MARKS[cell] is None for cell in cells if cell.strip())
            if self.holds_names:
                self.label_names = tuple(sorted(set().union(*map(split_names, cells))))
        if label_names is None:
            check_labels(path, self.label_names)
        self.places = {role: header.index(name) for role, name in columns.items()}
        self.label_places, self.context = [*map(header.index, labels)], [*map(header.index, context)]

    def annotations(self, profiles):
        """Yields (text_id or None, text, user_id or None, labels, split or None) of each row.

        Fills in profiles. Raises: ValueError with file and line for all that is not such a row.
        """
        def wrong(k, words):
            return ValueError(f"{self.path}, line {line}: {self.header[k]} is {cells[k]!r}, {words}")

        id_place, user_place, text_place, split_place = map(self.places.get, ROLES)
        filled = [k for k in (id_place, user_place, text_place) if k is not None]
        unlabelled, split, line = [0] * len(self.label_names), None, None
        for line, cells in self.rows:
            if not all(map(str.strip, [cells[k] for k in filled])):
                empty = next(k for k in filled if not cells[k].strip())
                raise wrong(empty, "which is empty; fill it in or remove the row")
            if self.holds_names:
                labels = marks_of_names(cells[self.label_places[0]], self.label_names)
            else:
                labels = [MARKS[cells[k]] for k in self.label_places] or unlabelled
            if None in labels:
                bad = next(k for k in self.label_places if self.holds_names or MARKS[cells[k]] is None)
                raise wrong(bad, f"not of {list(self.label_names)}" if self.holds_names else
                            "not 0 or 1; fill it in, or name the columns of labels by --labels")
            if split_place is not None and (split := SPLIT_NAMES[cells[split_place]]) is None:
                raise wrong(split_place, f"not one of {[*SPLIT_NAMES]}; or rename the column, and texts are "
                            "split 80/10/10")
            user_id = cells[user_place] if user_place is not None else None
            own = tuple(cells[k].strip() for k in self.context)
            if self.context and (before := profiles.setdefault(user_id, own)) != own:
                raise ValueError(f"{self.path}, line {line}: user {user_id!r} has {own} here and {before} "
                                 "before; --context takes columns that are the same in all rows of a user")
            yield cells[id_place] if id_place is not None else None, cells[text_place], user_id, labels, split
        if line is None:
            kind = "annotation" if self.label_places else "text"
            raise ValueError(f"{self.path}: no {kind} below the header")


def check_header(path, header, columns):
    """Raises ValueError if a column is there twice, or missing."""
    for names, where in ((header, "the header has"), (columns, "--columns, --labels and --context have")):
        if doubled := sorted({name for name in names if names.count(name) > 1 and not UNNAMED.match(name)}):
            raise ValueError(f"{path}: {where} {doubled} twice; rename or remove one")
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"{path}: no column {missing} in the header {header} (separated by comma, "
                         "semicolon, tab or |); --columns user_id=worker says which it is, --labels and "
                         "--context name columns that are there")


def check_labels(path, label_names):
    """Raises ValueError if there is none, or one that cannot be a label."""
    if not label_names:
        raise ValueError(f"{path}: no label column; give each label a column of 0 and 1")
    if reserved := [name for name in label_names if prompts.label_key(name) == prompts.NONE]:
        raise ValueError(f"{path}: no label can be {reserved[0]!r}, the word for an annotation without "
                         "labels; rename it, or leave its cells empty")
    if len(label_names) > MOST_LABELS:
        raise ValueError(f"{path}: {len(label_names):,} labels, such as {label_names[0][:60]!r}; give "
                         "--labels the columns of 0 and 1, or one column of label names")
    together = parse_response(build_response(label_names), label_names)[0]
    if odd := [name for name in label_names
               if name not in together or parse_response(name, label_names)[0] != [name]]:
        raise ValueError(f"{path}: label names {odd} cannot be read back from a comma-separated response: "
                         "each needs letters, no separators, and to differ in more than case, - and _")


def split_names(cell):
    """The names in a cell such as `joy, anger`, `['joy', 'anger']`, `4`, or `4.0` as pandas writes a 4."""
    cell = cell.strip()
    cell = cell[1:-1] if cell[:1] + cell[-1:] in ("[]", "{}", "()") else cell
    names = {name.strip(" \t'\"") for name in re.split("[,;|]", cell)}
    return {re.sub(r"^(-?\d+)\.0$", r"\1", name) for name in names if name}


@lru_cache(10_000)
def marks_of_names(cell, label_names):
    """L times 0 or 1 of a cell that holds label names; None for any other name."""
    names = split_names(cell)
    return [name in names for name in label_names] if names <= {*label_names} else [None]


def read_annotations(paths, columns, *table_arguments):
    """Returns (the Annotations of CSV files with the same columns, the last one's Table).

    A text without a text_id has its hash for one.
    """
    texts, users, profiles = {}, {}, {}  # (text_id, text): position; GoEmotions has ids with two spellings
    text_index, user_index, split_index, marks = array("i"), array("i"), array("b"), bytearray()
    for path in paths:
        table = Table(path, columns, *table_arguments)
        for text_id, text, user_id, own, split in table.annotations(profiles):
            text_index.append(texts.setdefault((text_id, text), len(texts)))
            user_index.append(users.setdefault(user_id, len(users)))
            marks.extend(own)
            if split is not None:
                split_index.append(split)
    return Annotations(
        [prompt_hash(text) if text_id is None else text_id for text_id, text in texts],
        [text for _, text in texts], list(users), np.frombuffer(text_index, np.int32),
        np.frombuffer(user_index, np.int32), np.frombuffer(marks, bool).reshape(len(text_index), -1),
        table.label_names, np.frombuffer(split_index, np.int8) if split_index else None, profiles), table


def read_split_texts(path, text_column):
    """The set of texts of a split file; the tsv files have no header, and the text first.

    They have quotes as in any CSV: split on bare tabs, hundreds of texts would be lost.
    """
    bare = path.suffix == ".tsv"
    rows = read_rows(path, "\t" if bare else ",")
    header = [text_column] if bare else next(rows, (0, []))[1]
    check_header(path, header, [text_column])
    return {cells[header.index(text_column)] for _, cells in rows}


# ---- Split and clean (section VI-A; the order of audit row D5) ----


def hash_order(seed, *keys):
    """A number that depends on the seed and the keys alone: the order of every random choice of data."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, (seed, *keys))).encode()).digest()[:8], "big")


def assign_splits(annotations, split_texts=None, seed=42):
    """Returns the split of each annotation, (N,) index into SPLITS or -1.

    By the file's split column, row by row, else by split_texts {split: texts}, else 80/10/10 by a hash of
    the text. Raises: ValueError if a split has nothing.
    """
    texts, of_text, own = annotations.texts, {}, annotations.split_index
    if own is not None:
        if missing := [name for s, name in enumerate(SPLITS) if s not in own]:
            raise ValueError(f"the split column has no {' and no '.join(missing)}: give it some rows (val "
                             "tunes thresholds), or rename the column, and texts are split 80/10/10")
        return own
    if split_texts is None:
        distinct = sorted(set(texts), key=lambda text: (hash_order(seed, "split", text), text))
        if (n := len(distinct)) < 3:
            raise ValueError(f"{n} different texts cannot be split into train, val and test: give more texts")
        train, val = min(math.ceil(0.8 * n), n - 2), min(math.ceil(0.9 * n), n - 1)
        split_texts = {"train": distinct[:train], "val": distinct[train:val], "test": distinct[val:]}
    for name in ("val", "test", "train"):  # a text of several splits goes to the last of these: [choice.D4]
        of_text.update(dict.fromkeys(split_texts[name], SPLITS.index(name)))
    return np.array([of_text.get(text, -1) for text in texts], np.int8)[annotations.text_index]


def clean(annotations, split, paper=True, min_share=0.01, max_share=0.6, seed=42):
    """Returns ({split name: Annotations}, [{"stage", "rows" (per split), "texts", "users"}]).

    Without `paper` all that is in a split stays. Shapes: split (N,) from assign_splits. Raises: ValueError if
    no user is left.
    """
    user, text, n_users = annotations.user_index, annotations.text_number, len(annotations.users)
    cell = 3 * user.astype(np.int64) + split  # a user in a split
    keep, stages = np.ones(len(annotations), bool), []

    def by_chance(row):
        """The place of an annotation in a cut, whatever the order of the file."""
        item, user_id = annotations.text_index[row], annotations.users[user[row]]
        return (hash_order(seed, "cut", user_id, annotations.text_ids[item]), annotations.texts[item],
                annotations.labels[row].tobytes())

    def stage(name, more):
        """Keeps what is in `more`, too; returns (U, 3), what is left of each user in each split."""
        nonlocal keep
        keep = keep & more
        parts = [keep & (split == s) for s in range(3)] if name in STAGES[2:] else [keep]
        stages.append({"stage": name, "rows": [int(part.sum()) for part in parts],
                       "texts": [int(np.count_nonzero(np.bincount(text[part]))) for part in parts],
                       "users": int(np.count_nonzero(np.bincount(user[keep])))})
        return np.bincount(cell[keep & (split >= 0)], minlength=3 * n_users).reshape(n_users, 3)

    raw, non_empty, placed, common, enough, cut, again = STAGES
    stage(raw, keep)
    if paper:
        stage(non_empty, annotations.labels.any(axis=1))
    n = stage(placed, split >= 0)
    if paper:
        n = stage(common, (n > 0).all(axis=1)[user])
        n = stage(enough, (n >= min_share * n.max(axis=0))[user, split])  # [choice.D1]
        most, ends, fits = n.max(axis=0), np.cumsum(n).reshape(n.shape), np.ones(len(keep), bool)
        by_cell = np.flatnonzero(keep)[np.argsort(cell[keep], kind="stable")]
        for u, s in np.argwhere(n > max_share * most):  # [choice.D2]
            rows = sorted(by_cell[ends[u, s] - n[u, s]: ends[u, s]].tolist(), key=by_chance)
            fits[rows[: int(n[u, s] - max_share * most[s])]] = False  # no duplicates of them: [choice.D3]
        n = stage(cut, fits)
        stage(again, (n > 0).all(axis=1)[user])  # the cuts can empty a split: [choice.D5]
    if not keep.any():
        raise ValueError(f"no user is left of {n_users} after cleaning: a user needs annotations in train, "
                         f"val and test, in each {min_share} of the most active user's; lower --min_share or "
                         "give more data")
    return {name: annotations.select(keep & (split == s)) for s, name in enumerate(SPLITS)}, stages


def present_users(annotations):
    return {annotations.users[k] for k in np.unique(annotations.user_index)}


def unseen_users(splits):
    """The users of val and test that are not in train, sorted."""
    train, *others = map(present_users, splits.values())
    return sorted(set().union(*others) - train)


def hold_out_users(splits, share, seed=42):
    """Returns (splits, user IDs): a share of the users is taken out of train and val, and stays in test."""
    present = sorted(present_users(splits["train"]), key=lambda user_id: hash_order(seed, "unseen", user_id))
    n = round(share * len(present)) if 0 <= share < 1 else 0
    if share and not n:
        raise ValueError(f"--unseen_users {share} of {len(present)} users is nobody, or more than all: give "
                         "another share, from 0 to below 1")
    unseen = {*present[:n]}
    seen = np.array([user_id not in unseen for user_id in splits["train"].users])
    splits = splits | {name: splits[name].select(seen[splits[name].user_index]) for name in ("train", "val")}
    return splits, sorted(unseen)


def limit(annotations, n, seed=42):
    """At most n annotations: text by text in the order of a hash, then in the file's order again."""
    if n is None or len(annotations) <= n:
        return annotations
    key = np.array([hash_order(seed, "limit", text) for text in annotations.texts], np.uint64)
    return annotations.select(np.sort(np.argsort(key[annotations.text_index], kind="stable")[:n]))


# ---- From a data set to its splits and a report ----


def own_columns(given):
    """{role: column} of --columns. Raises: ValueError."""
    columns = dict(one.partition("=")[::2] for one in given or ())
    if len(columns) < len(given or ()) or not columns.keys() <= {*ROLES} or "" in columns.values():
        raise ValueError(f"--columns {' '.join(given)}: give ROLE=NAME, each of {', '.join(ROLES)} at most "
                         "once")
    return columns


def read(args):
    """Returns (task, Annotations, {split: texts} or None, what the report says of the files)."""
    if corpus := CORPORA.get(args.dataset):
        if given := [name for name in ("columns", "labels", "context") if vars(args)[name]]:
            raise ValueError(f"--{given[0]} is for a file of your own, not for {args.dataset}: leave it out")
        task = TASKS[args.dataset]
        paths, split_files, files = find_files(corpus, args.data_dir or Path("data", args.dataset))
        annotations, _ = read_annotations(paths, corpus.columns, task.label_names, None, (), corpus.columns)
        texts = {name: read_split_texts(path, corpus.columns["text"]) for name, path in split_files.items()}
        return task, annotations, texts, {"files": files, "columns": corpus.columns, "unused": []}
    if not (path := Path(args.dataset)).is_file():
        raise FileNotFoundError(f"no data set {args.dataset!r}: use one of {sorted(CORPORA)} or the path of "
                                "a CSV")
    given = own_columns(args.columns)
    annotations, table = read_annotations([args.dataset], dict(zip(ROLES, ROLES)) | given, args.labels, None,
                                          args.context or (), ("user_id", "text", *given))
    used = {*table.places.values(), *table.label_places, *table.context}
    return neutral_task(annotations.label_names), annotations, None, {
        "files": {path.name: {"blob_id": git_blob_id(path), "official": None}},
        "columns": {role: table.header[k] for role, k in table.places.items()},
        "unused": [name or "(unnamed)" for k, name in enumerate(table.header) if k not in used]}


def load(args):
    """Returns (task, {split: Annotations}, report) of `goemotions`, `unhealthy` or the path of a long CSV."""
    started = time.perf_counter()
    paper = (args.clean or ("paper" if args.dataset in CORPORA else "none")) == "paper"
    shares = {key: vars(args)[key] for key in ("min_share", "max_share") if vars(args)[key] is not None}
    if shares and not paper:
        raise ValueError(f"--{[*shares][0]} belongs to --clean paper: give both, or leave it out")
    task, annotations, split_texts, report = read(args)
    split = assign_splits(annotations, split_texts, args.split_seed)
    splits, stages = clean(annotations, split, paper, seed=args.split_seed, **shares)
    task = task._replace(none=not all(part.labels.any(axis=1).all() for part in splits.values()))
    return task, splits, report | {
        "dataset": str(args.dataset), "labels": list(task.label_names), "stages": stages,
        "warnings": list(find_warnings(annotations, splits["train"])), "unseen_users": unseen_users(splits),
        "counts": {name: len(part) for name, part in splits.items()},
        "seconds": time.perf_counter() - started}


def find_warnings(annotations, train):
    """What a user should know of a file that is sound."""
    alike = {}
    for user in annotations.users:
        plain = unicodedata.normalize("NFKC", user).strip().casefold()
        alike.setdefault(re.sub(r"^0+(?=\d)|(?<=\d)\.0+$", "", plain), []).append(user)
    if alike := [users for users in alike.values() if len(users) > 1]:
        yield (f"users {' and '.join(map(repr, alike[0]))} differ in spaces, case, zeros or .0 only: if they "
               f"are one person, make them equal ({len(alike)} such cases)")
    if annotations.split_index is not None:
        in_split = np.unique(3 * annotations.text_number.astype(np.int64) + annotations.split_index)
        n_splits = np.bincount(in_split // 3)
        if n := np.count_nonzero(n_splits > 1):
            yield (f"{n:,} of {len(n_splits):,} texts stand in more than one split: the test figure then "
                   "says how well known texts are relabelled, not new ones")
    for value in (0, 1):
        if same := [name for name, own in zip(train.label_names, train.labels.T) if (own == value).all()]:
            yield f"nothing to learn, as all of train has {value}: {', '.join(same)}"


def format_report(report):
    """The stages, beside the paper's counts, the labels, what is not used and the warnings, as text."""
    corpus, widths, lines = CORPORA.get(report["dataset"]), (26, 24, 7, 30, 7), []
    paper = dict(zip(STAGES, corpus.paper_stages)) if corpus else {}
    rows = [("stage", "annotations", "texts", "users", "paper: annotations", "users")]
    for stage in report["stages"]:
        theirs, users = paper.get(stage["stage"], ((), None))
        numbers = (stage["rows"], stage["texts"], [stage["users"]], theirs, [users] if users else ())
        rows.append((stage["stage"], *(" / ".join(f"{n:,}" for n in own) for own in numbers)))
    for name, *cells in rows:
        shown = zip(cells if paper else cells[:3], widths)
        lines.append(f"{name:<27}" + "".join(f"{cell:>{width}}" for cell, width in shown))
    notes = [f"{len(report['labels'])} labels: {', '.join(report['labels'])}"]
    notes += [f"note: {name} is not the official file (blob id {check['blob_id']}): the counts cannot be the "
              "paper's" for name, check in report["files"].items() if check["official"] is False]
    notes += [f"note: {name} is not there and was left out"
              for name in (corpus.files if corpus else ()) if name not in report["files"]]
    if report["unused"]:
        notes.append(f"note: not used: {', '.join(report['unused'])}")
    if report["unseen_users"]:
        notes.append(f"note: {len(report['unseen_users'])} users of val or test are not in train: unseen")
    notes += [f"warning: {own}" for own in report["warnings"]]
    lines += [line for note in notes for line in textwrap.wrap(note, 100, subsequent_indent="  ")]
    return "\n".join([*lines, f"{report['seconds']:.1f} s"])


def describe(splits):
    """Lines that say how much was annotated, how often each label is given, and how often people differ."""
    parts, names = [*splits.values()], splits["train"].label_names
    text, user, labels = (np.concatenate([getattr(part, name) for part in parts])
                          for name in ("text_number", "user_index", "labels"))
    n, of_user = np.bincount(text), np.bincount(user)
    pairs = np.unique(text.astype(np.int64) * len(of_user) + user)
    shared = np.bincount(pairs // len(of_user), minlength=len(n)) > 1
    yield f"{'annotations':<24}{'least':>9}{'median':>9}{'most':>9}"
    for name, counts in (("per user", of_user[of_user > 0]), ("per text", n[n > 0])):
        yield f"{name:<24}{counts.min():>9,}{np.median(counts):>9,.10g}{counts.max():>9,}"
    width = min(70, max(22, *map(len, names))) + 2
    yield f"\n{'label':<{width}}{'share':>9}{'differ':>9}"
    for name, own in zip(names, labels.T, strict=True):
        chosen = np.bincount(text, weights=own, minlength=len(n))[shared]
        differ = np.count_nonzero((chosen > 0) & (chosen < n[shared])) / max(1, len(chosen))
        yield f"{name:<{width}}{own.mean():>9.1%}{differ:>9.1%}"
    yield f"differ: on that share of the {np.count_nonzero(shared):,} texts with two or more annotators"


# ---- Few-shot examples ----


def example_pool(annotations):
    """{user_id: list of (text, label names)}, each text of a user once: where choose_examples looks."""
    pool = {}
    for row, (text, user_id) in enumerate(annotations.fields()):
        pool.setdefault(user_id, {}).setdefault(text, row)
    return {user_id: [(text, tuple(annotations.label_set(row))) for text, row in own.items()]
            for user_id, own in pool.items()}


def choose_examples(pool, text, user_id, shots, seed=42):
    """Returns up to K pairs (text, label names) of the user's annotations in `pool`, never of the same text.

    pool: an example_pool, by default of train [choice.P1]. Source: section V-A, T' != T.
    The choice depends on (seed, text, user_id) and the user's own annotations alone.
    """
    own, chance = pool.get(user_id, ()), random.Random(hash_order(seed, "examples", text, user_id))
    drawn = chance.sample(own, min(shots + 1, len(own)))  # one more than needed: it may be the text itself
    return tuple(example for example in drawn if example[0] != text)[:shots]


# ---- Encode ----


@dataclass
class Encoded:
    """Token ids of the M distinct prompts of N annotations, and what the annotations ask of them.

    Shapes: ids flat int32; offsets (M + 1,): prompt m is ids[offsets[m]:offsets[m + 1]]; lengths (M,);
    prompt_index (N,); labels float32 (N, L); hashes, M of them. For language modelling the same of the
    distinct responses.
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt_index: np.ndarray
    labels: np.ndarray
    hashes: list
    n_shortened: int = 0  # prompts
    n_too_few: int = 0  # annotations whose user has fewer than K examples
    none: bool = False  # an annotation may have no label
    annotations: Annotations | None = None
    response_ids: np.ndarray | None = None
    response_offsets: np.ndarray | None = None
    response_index: np.ndarray | None = None

    @cached_property
    def lengths(self):
        return np.diff(self.offsets)

    def prompt(self, m):
        return self.ids[self.offsets[m]: self.offsets[m + 1]]

    def response(self, k):
        return self.response_ids[self.response_offsets[k]: self.response_offsets[k + 1]]


def prompt_inputs(method, annotations, choose=None):
    """Returns (the M distinct (text, user_id, examples, context), prompt_index (N,), too few).

    They are what build_prompt is given; choose(text, user_id) gives the examples; too few: the number of
    annotations with fewer than K of them.
    """
    inputs, prompt_index, too_few = {}, np.empty(len(annotations), np.int32), 0
    for row, (text, user_id) in enumerate(annotations.fields()):
        examples = choose(text, user_id) if method.shots else ()
        too_few += len(examples) < method.shots
        one = text, user_id if method.user_id else None, examples, annotations.profiles.get(user_id, ())
        prompt_index[row] = inputs.setdefault(one, len(inputs))
    return list(inputs), prompt_index, too_few


def prompt_hash(prompt):
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def flatten(rows):
    """Returns (flat int32 ids, offsets) of lists or arrays of token ids."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.concatenate([np.empty(0, np.int32), *(np.asarray(row, np.int32) for row in rows)]), offsets


def chat_frame(tokenizer):
    """What the model's chat template writes before and after a user's message."""
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template; leave --chat_template out")
    message = [{"role": "user", "content": "<<prompt>>"}]
    framed = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return framed.split("<<prompt>>")


def shorten(tokenizer, before, text, after, max_length, special=True):
    """The longest beginning of text, in whole tokens, with which the prompt has at most max_length tokens.

    Raises: ValueError if the template alone is longer.
    """
    def excess(text):
        return len(tokenizer(before + text + after, add_special_tokens=special)["input_ids"]) - max_length

    if (over := excess("")) > 0:
        raise ValueError(f"--max_length {max_length} is less than the {max_length + over} tokens of a prompt "
                         "without its text; raise it")
    starts = [start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"]] if tokenizer.is_fast else range(len(text) + 1)  # ByT5's has no offsets
    keep = min(-over, len(starts) - 1)  # tokens of the text, but for those that merge with the template's
    while keep > 0 and excess(text[: starts[keep]]) > 0:
        keep -= 1
    while keep + 1 < len(starts) and excess(text[: starts[keep + 1]]) <= 0:
        keep += 1
    return text[: starts[keep]]


def encode(tokenizer, task, method, annotations, max_length, choose=None, chat_template=False):
    """Returns the Encoded annotations: each distinct prompt is tokenized once.

    A prompt longer than max_length tokens loses the end of its text, never of its template.
    Raises: ValueError if the template alone is longer, or for what is no Unicode text (a lone surrogate).
    """
    def tokenize(prompts):
        batch = tokenizer(prompts, add_special_tokens=not chat_template, return_attention_mask=False)
        return [np.array(ids, np.int32) for ids in batch["input_ids"]]

    inputs, prompt_index, too_few = prompt_inputs(method, annotations, choose)
    opening, closing = chat_frame(tokenizer) if chat_template else ("", "")  # with its own special tokens
    rows, hashes, n_shortened = [], [], 0
    for start in range(0, len(inputs), 1024):  # bounds the memory of strings and of lists of integers
        parts = [build_prompt(task, method, *one) for one in inputs[start: start + 1024]]
        prompts = [opening + "".join(part) + closing for part in parts]
        hashes += map(prompt_hash, prompts)
        rows += tokenize(prompts)
        for m in [m for m in range(start, len(rows)) if len(rows[m]) > max_length]:
            before, text, after = parts[m - start]
            before, after = opening + before, after + closing
            prompt = before + shorten(tokenizer, before, text, after, max_length, not chat_template) + after
            hashes[m], rows[m], n_shortened = prompt_hash(prompt), tokenize([prompt])[0], n_shortened + 1
    return Encoded(*flatten(rows), prompt_index, annotations.labels.astype(np.float32), hashes, n_shortened,
                   too_few, task.none, annotations)


def add_responses(encoded, tokenizer, train_eos=True):
    """Adds the token ids of the distinct responses: what language modelling is trained on."""
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end token, which lm and lmp need; use another model")
    distinct, encoded.response_index = np.unique(encoded.annotations.labels, axis=0, return_inverse=True)
    names = np.array(encoded.annotations.label_names)
    end = tokenizer.eos_token if train_eos else ""  # [choice.T2]
    responses = ["\n" + build_response(names[row].tolist()) + end for row in distinct]
    rows = tokenizer(responses, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    encoded.response_ids, encoded.response_offsets = flatten(rows)


# ---- Batches ----


def shared_prefix(encoded):
    """P, the number of tokens with which every prompt begins; at least one token of each is behind it."""
    first, prefix = encoded.prompt(0), 0
    shortest, starts = encoded.lengths.min(), encoded.offsets[:-1]
    while prefix < shortest - 1 and (encoded.ids[starts + prefix] == first[prefix]).all():
        prefix += 1
    return prefix


def training_steps(encoded, batch_size, seed, epoch, merge_duplicates=False, window=32):
    """The annotations of each optimizer step of an epoch: index arrays of batch_size, the last one shorter.

    A random order, sorted by length inside windows of `window` steps, so that a step has prompts of like
    length. With merge_duplicates the annotations of one prompt are neighbours. The order depends on (seed,
    epoch) alone: not on the number of processes, which each take their part of every step.
    """
    generator, lengths = np.random.default_rng([seed, epoch]), encoded.lengths
    if merge_duplicates:
        order = np.argsort(generator.permutation(len(lengths))[encoded.prompt_index], kind="stable")
    else:
        order = generator.permutation(len(encoded.prompt_index))
    steps = []
    for start in range(0, len(order), window * batch_size):
        rows = order[start: start + window * batch_size]
        prompts = encoded.prompt_index[rows]
        rows = rows[np.lexsort((prompts, lengths[prompts]))]
        steps += [rows[k: k + batch_size] for k in range(0, len(rows), batch_size)]
    last = [steps.pop()] if len(steps[-1]) < batch_size else []
    return [steps[k] for k in generator.permutation(len(steps))] + last


def micro_batches(lengths, rows, tokens_per_batch, prefix=0):
    """Splits `rows` (indices into lengths) into batches of like length, as few as fit and then as even.

    At most tokens_per_batch tokens are computed for one: its padded rows, and once the `prefix` that they
    share. A row longer than that is a batch of its own.
    """
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    own = (lengths[rows] - prefix).tolist()

    def ends(budget):
        found, start = [], 0
        for k in range(1, len(own) + 1):
            if k == len(own) or prefix + (k + 1 - start) * own[k] > budget:
                found.append(start := k)
        return found

    high = min(tokens_per_batch, prefix + len(own) * max(own, default=0))
    fewest = len(ends(high))  # the smallest budget that takes no more batches makes them even
    even = bisect.bisect_left(range(high), True, key=lambda budget: len(ends(budget)) == fewest)
    return np.split(rows, ends(even)[:-1]) if len(rows) else []


def pad(sequences, value, left=False):
    """Returns int64 (B, T) of the sequences, filled up with value on the right, or on the left."""
    out = np.full((len(sequences), max(map(len, sequences))), value, np.int64)
    for row, sequence in zip(out, sequences, strict=True):
        row[len(row) - len(sequence) if left else 0:][: len(sequence)] = sequence
    return out


# ---- Command line ----


def share(text):
    """argparse type of a share, 0 or more."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a share of 0 or more")
    return value


def add_arguments(parser):
    """The flags of the data, the same for every script."""
    add = parser.add_argument
    add("--data_dir", help="where a corpus lies or is downloaded to (default: data/DATASET)")
    add("--columns", nargs="+", metavar="ROLE=NAME", help="of an own file, which column is the "
        f"{', '.join(ROLES)} (default: the one of that name; text_id and split may be missing)")
    add("--labels", nargs="+", metavar="COLUMN", help="of an own file, the columns of 0 and 1 to predict, or "
        "one whose cells hold label names (default: all other columns)")
    add("--context", nargs="+", metavar="COLUMN", help="of an own file, columns that describe the user")
    add("--clean", choices=["paper", "none"], help="paper: unlabelled annotations and rare users are "
        "dropped, frequent users cut down (default: paper for the two corpora, none for an own file)")
    add("--min_share", type=share, help="with --clean paper, a user with less than this share of the most "
        "active one's annotations in a split is dropped; the paper's text says 0.05, its counts are those of "
        "0.01 (default: 0.01)")
    add("--max_share", type=share, help="with --clean paper, a user with more than this share is cut down to "
        "it; 1.0: no cut (default: 0.6)")
    add("--split_seed", type=int, default=42, help="of the cut, of a split by text and of the choice of "
        "examples (default: %(default)s)")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data and print the stages.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("dataset", help="goemotions, unhealthy, or the path of a long CSV")
    add_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        task, splits, report = load(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (text, user_id), train = next(splits["train"].fields()), splits["train"]
    method = METHODS["clsp"]._replace(context=tuple(args.context or ()))
    prompt = build_prompt(task, method, text, user_id, context=train.profiles.get(user_id, ()))
    print(format_report(report), "", *describe(splits), "", sep="\n")
    print(f"The first CLS-P prompt:\n\n{''.join(prompt)}\n\n"
          f"and its labels: {build_response(train.label_set(0))}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly in front of `| head`
    sys.exit(main())
