"""The annotations: download and verify, read, clean, split, few-shot choice, encode, batch.

Source: section VI-A of the paper for the cleaning; the order of its stages and their counts from the authors'
released code (README, audit rows D1-D6). Data: GoEmotions (Demszky et al. 2020), Unhealthy Conversations
(Price et al. 2020), or any long CSV: text_id,user_id,text,<one 0/1 column per label>, with an optional
`split` column (train, val, test).

    python data.py goemotions [--data_dir DIR]        downloads what is missing and prints the stages
    python data.py annotations.csv

The way of the data: files -> Annotations -> {"train", "val", "test"} -> Encoded token ids -> lists of rows.
Does not build a prompt's words (prompts.py) and does not put anything on a device (train.py, infer.py).
"""

import argparse
import codecs
import csv
import fcntl
import hashlib
import math
import os
import random
import sys
import time
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
from tqdm import tqdm

from prompts import METHODS, TASKS, build_prompt, build_response, neutral_task, parse_response

SPLITS = ("train", "val", "test")
STAGES = ("raw", "non-empty", "on the split's texts", "users in all splits", "after min_share",
          "after max_share", "users in all splits again")
csv.field_size_limit(2**31 - 1)  # a text may be long


class Corpus(NamedTuple):
    """Where a corpus lies and how its files name things."""

    columns: tuple[str, str, str]  # of text_id, user_id, text
    annotation_files: str  # a glob
    split_files: dict[str, str]  # split -> file that lists its texts
    files: dict[str, tuple[str, str]]  # file -> (address of its folder, git blob id)
    paper_stages: list  # of each stage (rows or (train, val, test) rows, users): audit rows D1-D5


GOOGLE = "https://storage.googleapis.com/gresearch/goemotions/data/full_dataset/"
RESEARCH = "https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/"
UNHEALTHY = "https://raw.githubusercontent.com/conversationai/unhealthy-conversations/main/"
CORPORA = {
    "goemotions": Corpus(
        columns=("id", "rater_id", "text"),
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
        columns=("_unit_id", "_worker_id", "comment"),
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

    def __len__(self):
        return len(self.text_index)

    def select(self, rows):
        """The annotations of `rows` (indices or a mask), in that order, over the same texts and users."""
        return Annotations(self.text_ids, self.texts, self.users, self.text_index[rows],
                           self.user_index[rows], self.labels[rows], self.label_names)

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


def fetch(url, part, timeout_s):
    """Writes url to the file `part`, or its rest behind what is there; returns whether it wrote the whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s, allow_redirects=False) as answer:
        if answer.status_code == 416 and have:  # nothing lies behind what is there
            return False
        if answer.status_code not in (200, 206):
            target = answer.headers.get("Location")
            words = f" with a redirect to {target}, and redirects are not followed" if target else ""
            raise requests.HTTPError(f"the server answered {answer.status_code}{words}", response=answer)
        resumed = answer.status_code == 206
        start, length = have if resumed else 0, answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        with part.open("ab" if resumed else "wb") as file, tqdm(
                desc=part.stem, initial=start, total=total, unit="B", unit_scale=True) as bar:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    return not resumed


def download(url, blob_id, path, attempts=5, timeout_s=30, wait_s=1.0):
    """Downloads url to path, going on where a broken download stopped, and verifies the git blob id.

    Raises: ValueError if the content is another one; FileNotFoundError if the address cannot be reached.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(1, attempts + 1):
        try:
            whole = fetch(url, part, timeout_s)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 500
            if attempt == attempts or status < 500 and status not in (408, 429):
                raise FileNotFoundError(f"{path} is missing and {url} cannot be downloaded ({error}); "
                                        "put the file there yourself") from error
            time.sleep(wait_s * 2 ** (attempt - 1))
            continue
        except OSError as error:  # a full disk
            raise OSError(f"cannot write {part}: {error}") from None
        found = git_blob_id(part)
        if found == blob_id:
            with part.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut may leave a hole under the final name
            part.replace(path)
            return
        part.unlink()  # what was resumed may have been the rest of something else: once more, from the start
        if whole or attempt == attempts:
            raise ValueError(f"{url} has blob id {found}, not {blob_id}: it is not the file of the paper; "
                             f"try again, or put your own file at {path}")


def find_files(corpus, data_dir):
    """Returns (annotation files, {split: file}, {file: {blob_id, official}}); downloads what is missing.

    Files that are there are used as they are. Beside own (unofficial) annotation files none is downloaded.
    """
    def is_official(path):
        return path.name in corpus.files and git_blob_id(path) == corpus.files[path.name][1]

    data_dir = Path(data_dir)
    own = not all(map(is_official, data_dir.glob(corpus.annotation_files)))
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
        path.name: {"blob_id": git_blob_id(path), "official": is_official(path)}
        for path in (*annotation_files, *split_files.values())}


# ---- Read ----


def read_rows(path, delimiter=","):
    """Yields (line number, cells) of each row of a CSV file, the header included, and no empty lines.

    Raises: ValueError with the line for bad UTF-8, a NUL, a broken quote, or another number of cells.
    """
    def lines():
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
                except UnicodeDecodeError:
                    text = "\0"
                if "\0" in text:
                    raise ValueError(f"{path}, line {number}: bad UTF-8 or a NUL; save it as UTF-8 text")
                yield text

    reader, start, width = csv.reader(lines(), delimiter=delimiter, strict=True), 1, 0
    try:
        for cells in reader:
            width = width or len(cells)
            if len(cells) not in (0, width):
                raise ValueError(f"{path}, line {start}: {len(cells)} columns, but the first row has {width}")
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: {error}") from None


LABEL_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}


def read_annotations(paths, columns, label_names=None):
    """Returns the Annotations of one or more CSV files with a header.

    Shapes: columns, the names of text_id, user_id and text; without label_names, each further column but
    `split` is a label. Raises: ValueError with file and line for all that is not such a file.
    """
    texts, users = {}, {}  # (text_id, text) or user_id: position; GoEmotions has ids with two spellings
    text_index, user_index, split_index, labels = array("i"), array("i"), array("b"), bytearray()
    for path in paths:
        rows = read_rows(path)
        header = [name.strip() for name in next(rows, (0, []))[1]]
        label_names = label_names or tuple(sorted(set(header) - {*columns, "split"}))
        check_header(path, header, columns, label_names)
        id_place, user_place, text_place = map(header.index, columns)
        label_places = list(map(header.index, label_names))
        split_place = header.index("split") if "split" in header else None
        for line, cells in rows:
            text_id, user_id, text = own = cells[id_place], cells[user_place], cells[text_place]
            if not (text_id.strip() and user_id.strip() and text.strip()):
                empty = [name for name, cell in zip(columns, own, strict=True) if not cell.strip()]
                raise ValueError(f"{path}, line {line}: empty {empty[0]}; fill it in or remove the row")
            text_index.append(texts.setdefault((text_id, text), len(texts)))
            user_index.append(users.setdefault(user_id, len(users)))
            try:
                labels.extend([LABEL_VALUES[cells[k]] for k in label_places])
            except KeyError as error:
                name = header[next(k for k in label_places if cells[k] not in LABEL_VALUES)]
                raise ValueError(f"{path}, line {line}: {name} is {error.args[0]!r}, not 0 or 1") from None
            if split_place is not None:
                name = cells[split_place]
                if name not in SPLITS:
                    raise ValueError(f"{path}, line {line}: split is {name!r}, not one of {SPLITS}")
                split_index.append(SPLITS.index(name))
    if not text_index:
        raise ValueError(f"{path}: no annotation below the header")
    return Annotations(
        [text_id for text_id, _ in texts], [text for _, text in texts], list(users),
        np.frombuffer(text_index, np.int32), np.frombuffer(user_index, np.int32),
        np.frombuffer(labels, bool).reshape(len(text_index), len(label_names)), tuple(label_names),
        np.frombuffer(split_index, np.int8) if split_index else None)


def check_header(path, header, columns, label_names):
    """Raises ValueError if a column is there twice, or missing, or has a name that no label can have."""
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: the header has {doubled} twice; rename or remove one")
    if missing := [name for name in (*columns, *label_names) if name not in header]:
        raise ValueError(f"{path}: no column {missing} in the header {header}; see README for the format")
    if not label_names:
        raise ValueError(f"{path}: no label column beside {header}; give each label a column of 0 and 1")
    together = parse_response(build_response(label_names), label_names)[0]
    if odd := [name for name in label_names
               if name not in together or parse_response(name, label_names)[0] != [name]]:
        raise ValueError(f"{path}: label names {odd} cannot be read back from a comma-separated response: "
                         "each needs letters, no separators, and to differ in more than case, - and _")


def read_split_texts(path, text_column):
    """The set of texts of a split file; the tsv files have no header, and the text first.

    They have quotes as in any CSV: split on bare tabs, hundreds of texts would be lost.
    """
    if path.suffix == ".tsv":
        return {cells[0] for _, cells in read_rows(path, "\t")}
    rows = read_rows(path)
    _, header = next(rows, (0, []))
    if text_column not in header:
        raise ValueError(f"{path}: no column {text_column} in the header {header}")
    return {cells[header.index(text_column)] for _, cells in rows}


# ---- Split and clean (section VI-A; the order of audit row D5) ----


def hash_order(seed, *keys):
    """A number that depends on the seed and the keys alone: the order of every random choice of data."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, (seed, *keys))).encode()).digest()[:8], "big")


def assign_splits(annotations, split_texts=None, seed=42):
    """Returns the split of each annotation, (N,) index into SPLITS or -1: whole texts, by exact text.

    By split_texts {split: texts}, else by the file's split column, else 80/10/10 by a hash of the text.
    """
    texts, of_text = annotations.texts, {}
    if split_texts is None and annotations.split_index is None:
        distinct = sorted(set(texts), key=lambda text: (hash_order(seed, "split", text), text))
        train, val = math.ceil(0.8 * len(distinct)), math.ceil(0.9 * len(distinct))
        split_texts = {"train": distinct[:train], "val": distinct[train:val], "test": distinct[val:]}
    elif split_texts is None:
        index = [np.unique(annotations.text_index[annotations.split_index == s]) for s in range(3)]
        split_texts = {name: [texts[k] for k in index[s]] for s, name in enumerate(SPLITS)}
    for name in ("val", "test", "train"):  # a text of several splits goes to the last of these: [choice.D4]
        of_text.update(dict.fromkeys(split_texts[name], SPLITS.index(name)))
    return np.array([of_text.get(text, -1) for text in texts], np.int8)[annotations.text_index]


def clean(annotations, split, min_share=0.01, max_share=0.6, seed=42):
    """Returns ({split name: Annotations}, stages): what is left, and the counts after every stage.

    Shapes: split (N,) from assign_splits; stages, a list of {"stage", "rows" (per split), "texts", "users"}.
    Raises: ValueError if no user is left.
    """
    user, n_users = annotations.user_index, len(annotations.users)
    numbers = {}
    text = np.array([numbers.setdefault(t, len(numbers)) for t in annotations.texts])[annotations.text_index]
    cell = 3 * user.astype(np.int64) + split  # a user in a split
    keep, stages = np.ones(len(annotations), bool), []

    def counts():
        """(U, 3) annotations of each user in each split."""
        return np.bincount(cell[keep], minlength=3 * n_users).reshape(n_users, 3)

    def record():
        parts = [keep & (split == s) for s in range(3)] if len(stages) > 1 else [keep]
        stages.append({"stage": STAGES[len(stages)], "rows": [int(part.sum()) for part in parts],
                       "texts": [int(np.count_nonzero(np.bincount(text[part]))) for part in parts],
                       "users": int(np.count_nonzero(np.bincount(user[keep])))})

    record()
    keep &= annotations.labels.any(axis=1)
    record()
    keep &= split >= 0
    record()
    keep &= (counts() > 0).all(axis=1)[user]
    record()
    few = counts() < min_share * counts().max(axis=0)  # [choice.D1]
    keep &= ~few[user, split]
    record()
    n = counts()
    most, ends = n.max(axis=0), np.cumsum(n).reshape(n.shape)
    by_cell = np.flatnonzero(keep)[np.argsort(cell[keep], kind="stable")]
    for u, s in np.argwhere(n > max_share * most):  # [choice.D2]
        rows = by_cell[ends[u, s] - n[u, s]: ends[u, s]].tolist()
        order = sorted(rows, key=lambda row: cut_order(annotations, row, seed))
        keep[order[: int(n[u, s] - max_share * most[s])]] = False  # duplicates of the rest stay: [choice.D3]
    record()
    keep &= (counts() > 0).all(axis=1)[user]  # a second time, as the cuts can empty a split: [choice.D5]
    record()
    if not keep.any():
        raise ValueError(f"no user is left of {n_users} after cleaning: a user needs annotations in train, "
                         f"val and test, in each {min_share} of the most active user's; lower --min_share or "
                         "give more data")
    return {name: annotations.select(keep & (split == s)) for s, name in enumerate(SPLITS)}, stages


def cut_order(annotations, row, seed):
    """Sorts one user's annotations by chance, whatever their order in the file."""
    item, user_id = annotations.text_index[row], annotations.users[annotations.user_index[row]]
    chance = hash_order(seed, "cut", user_id, annotations.text_ids[item])
    return chance, annotations.texts[item], annotations.labels[row].tobytes()


def hold_out_users(splits, share, seed=42):
    """Returns (splits, user IDs): a share of the users is taken out of train and val, and stays in test."""
    if not 0 <= share < 1:
        raise ValueError(f"--unseen_users is {share}; give a share of the users from 0 to below 1")
    users = splits["train"].users
    present = sorted((users[k] for k in np.unique(splits["train"].user_index)),
                     key=lambda user_id: hash_order(seed, "unseen", user_id))
    n = round(share * len(present))
    if share and not n:
        raise ValueError(f"--unseen_users {share} of {len(present)} users is nobody; raise it")
    unseen = set(present[:n])
    seen = np.array([user_id not in unseen for user_id in users])
    splits = splits | {name: splits[name].select(seen[splits[name].user_index]) for name in ("train", "val")}
    return splits, sorted(unseen)


def limit(annotations, n, seed=42):
    """At most n annotations: text by text in the order of a hash, then in the file's order again."""
    if n is None or len(annotations) <= n:
        return annotations
    key = np.array([hash_order(seed, "limit", text) for text in annotations.texts], np.uint64)
    return annotations.select(np.sort(np.argsort(key[annotations.text_index], kind="stable")[:n]))


def load(dataset, data_dir=None, min_share=0.01, max_share=0.6, seed=42):
    """Returns (task, {split: Annotations}, report) of `goemotions`, `unhealthy` or the path of a long CSV."""
    started, split_texts = time.perf_counter(), None
    if dataset in CORPORA:
        corpus, task = CORPORA[dataset], TASKS[dataset]
        annotation_files, split_files, files = find_files(corpus, data_dir or Path("data", dataset))
        annotations = read_annotations(annotation_files, corpus.columns, task.label_names)
        split_texts = {name: read_split_texts(path, corpus.columns[2]) for name, path in split_files.items()}
    elif Path(dataset).is_file():
        annotations = read_annotations([dataset], ("text_id", "user_id", "text"))
        task = neutral_task(annotations.label_names)
        files = {Path(dataset).name: {"blob_id": git_blob_id(Path(dataset)), "official": None}}
    else:
        raise FileNotFoundError(f"no data set {dataset!r}: use one of {sorted(CORPORA)} or the path of a CSV")
    split = assign_splits(annotations, split_texts, seed)
    splits, stages = clean(annotations, split, min_share, max_share, seed)
    seconds = time.perf_counter() - started
    return task, splits, {"dataset": str(dataset), "files": files, "stages": stages, "seconds": seconds}


def format_report(report):
    """The stages of the cleaning as lines of text, beside the paper's counts."""
    corpus = CORPORA.get(report["dataset"])

    def cells(numbers):
        return " / ".join(f"{n:,}" for n in numbers)

    lines = [f"{'stage':<27}{'annotations':>26}{'texts':>24}{'users':>7}"
             + (f"{'paper: annotations':>30}{'users':>7}" if corpus else "")]
    for k, stage in enumerate(report["stages"]):
        line = f"{stage['stage']:<27}{cells(stage['rows']):>26}{cells(stage['texts']):>24}"
        line += f"{stage['users']:>7,}"
        if corpus:
            rows, users = corpus.paper_stages[k]
            line += f"{cells(rows):>30}{users or '':>7}"
        lines.append(line)
    lines += [f"note: {name} is not the official file (blob id {check['blob_id']}): the counts cannot be the "
              "paper's" for name, check in report["files"].items() if check["official"] is False]
    lines += [f"note: {name} is not there and was left out"
              for name in sorted(set(corpus.files if corpus else ()) - set(report["files"]))]
    return "\n".join([*lines, f"{report['seconds']:.1f} s"])


# ---- Few-shot examples ----


def example_pool(annotations):
    """{user_id: list of (text, label names)}, each text of a user once: where choose_examples looks."""
    pool = {}
    for row, (text, user_id) in enumerate(annotations.fields()):
        own = pool.setdefault(user_id, {})
        if text not in own:
            own[text] = tuple(annotations.label_set(row))
    return {user_id: list(own.items()) for user_id, own in pool.items()}


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


def prompt_inputs(method, annotations, pool=None, seed=42):
    """Returns (the M distinct (text, user_id, examples) of the annotations, prompt_index (N,), too few).

    They are what build_prompt is given; too few: the number of annotations with fewer than K examples.
    """
    inputs, prompt_index, too_few = {}, np.empty(len(annotations), np.int32), 0
    for row, (text, user_id) in enumerate(annotations.fields()):
        examples = choose_examples(pool, text, user_id, method.shots, seed) if method.shots else ()
        too_few += len(examples) < method.shots
        one = text, user_id if method.user_id else None, examples
        prompt_index[row] = inputs.setdefault(one, len(inputs))
    return list(inputs), prompt_index, too_few


def prompt_hash(prompt):
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def flatten(rows):
    """Returns (flat int32 ids, offsets) of lists or arrays of token ids."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.concatenate([np.empty(0, np.int32), *(np.asarray(row, np.int32) for row in rows)]), offsets


def tokenize(tokenizer, strings, special=True):
    """Returns an int32 array of token ids for each string, by one call for all."""
    batch = tokenizer(strings, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return [np.array(ids, np.int32) for ids in batch]


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
    starts = [start for start, _ in tokenizer(text, add_special_tokens=False,
                                              return_offsets_mapping=True)["offset_mapping"]]
    keep = min(-over, len(starts) - 1)  # tokens of the text, but for those that merge with the template's
    while keep > 0 and excess(text[: starts[keep]]) > 0:
        keep -= 1
    while keep + 1 < len(starts) and excess(text[: starts[keep + 1]]) <= 0:
        keep += 1
    return text[: starts[keep]]


def encode(tokenizer, task, method, annotations, max_length, pool=None, seed=42, train_eos=True,
           chat_template=False):
    """Returns the Encoded annotations: each distinct prompt is tokenized once.

    A prompt longer than max_length tokens loses the end of its text, never of its template.
    Raises: ValueError if the template alone is longer, or for what is no Unicode text (a lone surrogate).
    """
    inputs, prompt_index, too_few = prompt_inputs(method, annotations, pool, seed)
    special = not chat_template  # a chat template brings its own special tokens
    opening, closing = chat_frame(tokenizer) if chat_template else ("", "")
    chunks, hashes, n_shortened = [], [], 0
    for start in range(0, len(inputs), 1024):  # bounds the memory of strings and of lists of integers
        parts = [build_prompt(task, method, *one) for one in inputs[start: start + 1024]]
        parts = [(opening + before, text, after + closing) for before, text, after in parts]
        prompts = ["".join(part) for part in parts]
        hashes += map(prompt_hash, prompts)
        rows = tokenize(tokenizer, prompts, special)
        for m in [m for m, row in enumerate(rows) if len(row) > max_length]:
            before, text, after = parts[m]
            prompt = before + shorten(tokenizer, before, text, after, max_length, special) + after
            hashes[start + m], rows[m] = prompt_hash(prompt), tokenize(tokenizer, [prompt], special)[0]
            n_shortened += 1
        chunks.append(flatten(rows))
    lengths = np.concatenate([np.diff(offsets) for _, offsets in chunks])
    encoded = Encoded(np.concatenate([ids for ids, _ in chunks]), np.concatenate([[0], np.cumsum(lengths)]),
                      prompt_index, annotations.labels.astype(np.float32), hashes, n_shortened, too_few)
    if method.family == "lm":
        distinct, encoded.response_index = np.unique(annotations.labels, axis=0, return_inverse=True)
        names = np.array(annotations.label_names)
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end token, which lm and lmp need; use another model")
        end = tokenizer.eos_token if train_eos else ""  # [choice.T2]
        responses = ["\n" + build_response(names[row].tolist()) + end for row in distinct]
        rows = tokenize(tokenizer, responses, special=False)
        encoded.response_ids, encoded.response_offsets = flatten(rows)
    return encoded


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
    generator = np.random.default_rng([seed, epoch])
    n, lengths = len(encoded.prompt_index), encoded.lengths
    if merge_duplicates:
        order = np.argsort(generator.permutation(len(lengths))[encoded.prompt_index], kind="stable")
    else:
        order = generator.permutation(n)
    steps = []
    for start in range(0, n, window * batch_size):
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

    low, high = 0, min(tokens_per_batch, prefix + len(own) * max(own, default=0))
    fewest = len(ends(high))
    while low < high:  # for the smallest budget that takes no more batches
        middle = (low + high) // 2
        low, high = (low, middle) if len(ends(middle)) == fewest else (middle + 1, high)
    return np.split(rows, ends(high)[:-1]) if len(rows) else []


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
    parser.add_argument("--data_dir", help="where a corpus lies or is downloaded to (default: data/DATASET)")
    parser.add_argument("--min_share", type=share, default=0.01, help="a user with fewer annotations in a "
                        "split than this share of the most active one's is dropped; the paper's text says "
                        "0.05, its counts are those of 0.01 (default: %(default)s)")
    parser.add_argument("--max_share", type=share, default=0.6, help="a user with more than this share is "
                        "cut down to it; 1.0: no cut (default: %(default)s)")
    parser.add_argument("--split_seed", type=int, default=42, help="of the cut, of a split by text and of "
                        "the choice of examples (default: %(default)s)")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data and print the stages.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("dataset", help="goemotions, unhealthy, or the path of a long CSV")
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        task, splits, report = load(args.dataset, args.data_dir, args.min_share, args.max_share,
                                    args.split_seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, user_id = next(splits["train"].fields())
    print(f"{format_report(report)}\n\n{len(task.label_names)} labels. The first CLS-P prompt:\n\n"
          f"{''.join(build_prompt(task, METHODS['clsp'], text, user_id))}\n\n"
          f"and its labels: {build_response(splits['train'].label_set(0))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
