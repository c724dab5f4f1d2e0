"""Time and memory of data.py on files of GoEmotions' size, beside the released way in pandas.

    python tests/bench/data.py [--tokenizer DIR] [--long_rows 10000000] [--results FILE]

The files are generated: 211,225 raw rows in three files in the exact format, 57,732 texts, 82 raters. The
pandas way does what the released pipeline does: apply per row for empty annotations, isin per split, users in
all three, min_share, and the cut of each too active user by a sample and an outer merge on all columns.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from measure import add_results, record  # noqa: E402

SPLIT_SIZES = {"train": 43227, "dev": 5378, "test": 5389}
N_ROWS, N_TEXTS, N_RATERS = 211_225, 57_732, 82


def write_goemotions(directory):
    """Random words as texts, raters of uneven activity, one or two of 28 labels."""
    from tiny import FILLER, GOEMOTIONS_HEADER, GOEMOTIONS_LABELS

    chance = random.Random(0)
    texts = [" ".join(chance.choices(FILLER, k=chance.randint(3, 22))) + f' "{k}"' for k in range(N_TEXTS)]
    raters = chance.choices(range(N_RATERS), [chance.random() ** 2 + 0.01 for _ in range(N_RATERS)], k=N_ROWS)
    order = list(range(N_ROWS))
    chance.shuffle(order)
    rows = []
    for k, rater in zip(order, raters, strict=True):
        item = k % N_TEXTS
        labels = [0] * len(GOEMOTIONS_LABELS)
        for label in chance.sample(range(len(labels)), chance.choice((1, 1, 1, 2))):
            labels[label] = int(chance.random() > 0.016)
        source = [f"e{item:06d}", f"author_{item}", "synthetic", f"t3_{item:05d}", f"t1_{item:05d}"]
        rows.append([texts[item], *source, "1546300800.0", rater, not any(labels), *labels])
    for k in range(3):
        with open(directory / f"goemotions_{k + 1}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([GOEMOTIONS_HEADER, *rows[k::3]])
    start = 0
    for name, size in SPLIT_SIZES.items():
        with open(directory / f"{name}.tsv", "w", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(
                [text, "1", f"e{k:06d}"] for k, text in enumerate(texts[start: start + size], start))
        start += size


def write_long(path, n_rows):
    """A long CSV: five annotations of each text by 1,000 users, three labels."""
    chance = random.Random(0)
    with open(path, "w") as file:
        file.write("text_id,user_id,text,funny,kind,rude\n")
        for k in range(n_rows):
            user = int(1000 * chance.random() ** 2)
            file.write(f'{k // 5},u{user},"text number {k // 5}, of some words",1,{k % 2},{k % 3 % 2}\n')


def released_way(directory):
    """Returns the rows of train, val and test of the released pipeline's steps, in pandas."""
    import pandas as pd

    raw = pd.concat([pd.read_csv(path) for path in sorted(directory.glob("goemotions_*.csv"))])
    labels = list(raw.columns[9:])
    raw = raw[raw.apply(lambda row: any(row[name] == 1 for name in labels), axis=1)]
    parts = {}
    for name in SPLIT_SIZES:
        texts = pd.read_csv(directory / f"{name}.tsv", sep="\t", header=None)[0]
        parts[name] = raw[raw["text"].isin(texts)]

    def users_in_all():
        users = set.intersection(*(set(part["rater_id"]) for part in parts.values()))
        return {name: part[part["rater_id"].isin(users)] for name, part in parts.items()}

    parts = users_in_all()
    for name, part in parts.items():
        counts = part["rater_id"].value_counts()
        part = part[part["rater_id"].isin(counts[counts >= 0.01 * counts.max()].index)]
        for user, n in counts[counts > 0.6 * counts.max()].items():
            dropped = part[part["rater_id"] == user].sample(int(n - 0.6 * counts.max()))
            merged = part.merge(dropped, how="outer", indicator=True)
            part = merged[merged["_merge"] == "left_only"].drop(columns="_merge")
        parts[name] = part
    return [len(part) for part in users_in_all().values()]


def load(dataset, directory=None):
    import data

    return data.load(data.parse_args([str(dataset), *(("--data_dir", str(directory)) if directory else ())]))


def our_way(dataset, directory=None):
    return [len(part) for part in load(dataset, directory)[1].values()]


def load_and_batch(dataset):
    """Returns the optimizer steps of an epoch of a long CSV, as if each text were a prompt of 150 tokens."""
    import numpy as np

    import data

    train = load(dataset)[1]["train"]
    offsets = 150 * np.arange(len(train.texts) + 1)
    encoded = data.Encoded(np.ones(offsets[-1], np.int32), offsets, train.text_index, train.labels, [])
    steps = data.training_steps(encoded, 128, seed=0, epoch=0, merge_duplicates=True)
    batches = [data.micro_batches(encoded.lengths, train.text_index[rows], 4096) for rows in steps[:100]]
    return f"{len(train):,} rows in {len(steps):,} steps, {sum(map(len, batches))} batches in 100 of them"


def encode_clsp(directory, tokenizer_dir):
    """Returns the number of CLS-P prompts of the cleaned corpus and their mean length."""
    from transformers import AutoTokenizer

    import data
    from prompts import METHODS

    task, splits, _ = load("goemotions", directory)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    started = time.perf_counter()
    encoded = data.encode(tokenizer, task, METHODS["clsp"], splits["train"], 512)
    seconds = time.perf_counter() - started
    return f"{len(encoded.hashes):,} of {encoded.lengths.mean():.0f} tokens in {seconds:.1f} s"


def measure(*call):
    """Runs one function here in a process of its own: (seconds, peak memory in MB, what it returned)."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--call", *map(str, call)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *_, peak, result = run.stdout.splitlines()
    return time.perf_counter() - started, float(peak), result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", help="a model's directory, to time the encoding too")
    parser.add_argument("--long_rows", type=int, default=0, help="rows of a long CSV (default: %(default)s)")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    add_results(parser)
    args = parser.parse_args()
    if args.call:
        name, *arguments = args.call
        result = globals()[name](*(Path(a) if Path(a).is_dir() else a for a in arguments))
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in status if line.startswith("VmHWM"))  # ru_maxrss counts the parent's too
        print(f"{int(peak.split()[1]) / 1024:.0f}\n{result}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_goemotions(directory)
        calls = {"data.py": ("our_way", "goemotions", directory), "pandas": ("released_way", directory)}
        if args.tokenizer:
            calls["data.py, encode clsp"] = ("encode_clsp", directory, args.tokenizer)
        if args.long_rows:
            write_long(directory / "long.csv", args.long_rows)
            calls[f"data.py, {args.long_rows:,} rows"] = ("load_and_batch", directory / "long.csv")
        print(f"{'':<28}{'seconds':>9}{'peak MB':>9}   rows left, or prompts")
        found = {}
        for name, call in calls.items():
            found[name] = measure(*call)
            print("{:<28}{:>9.1f}{:>9.0f}   {}".format(name, *found[name]), flush=True)
        print(f"pandas / data.py: {found['pandas'][0] / found['data.py'][0]:.1f}")
    pandas = found.pop("pandas")
    for name, own in found.items():
        other = pandas if name == "data.py" else ()  # the peer does that row only
        record(args, name, "s", own[:1], other[:1], "<= 0.1" if other else "", str(own[2]))
        record(args, name, "MB at the peak", own[1:2], other[1:2])


if __name__ == "__main__":
    main()
