"""The tables of both READMEs, built from results/*.jsonl and the code: no number without its command.

    python tests/ledger.py add RUNS_DIR --command "make reproduce ..."    appends the numbers of finished runs
    python tests/ledger.py readme                                         writes the blocks of both anew

A later number of the same title, row and column takes the place of an earlier one. What the paper reports and
the ledger does not have stands there as "not run".
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import method_map  # noqa: E402
import tour  # noqa: E402

import lora  # noqa: E402
import metrics  # noqa: E402

RESULTS = ROOT / "results"
SUBJECTS = {
    "prompts.py": "the words, and who answers: labels, templates, one prompt, one response, servers",
    "metrics.py": "the numbers: F1 and its companions, thresholds, intervals, gains, tables, figures",
    "data.py": "the annotations: download, read, clean, split, examples, encode, batch",
    "lora.py": "all that is added to a base model: NF4 loading, LoRA, heads, adapters on disk",
    "infer.py": "a prediction: adapters, queries of a model or a server, one text seen by several users",
    "train.py": "learning: data parallelism, mixed precision, the loop, checkpoints, evaluation",
}
PERSON = {  # column of the tables "The person" -> what it says, in the README's words
    "at 0.5 [%]": "`clsp` over `cls`, F1 at 0.5, %",
    "tuned [%]": "`clsp` over `cls`, F1 tuned, %",
    "over bias [%]": "`clsp` over a bias per user on `cls`, F1 tuned, %",
    "unseen [%]": "`clsp` over `cls` for users held out, F1 tuned, %",
    "auc cls": "`disagreement_auc` of `cls`",
    "auc bias": "of the bias per user",
    "auc clsp": "of `clsp`",
    "auc over bias [points]": "of `clsp`, over the bias",
}


def read(name):
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(line):
    return line["title"], line["row"], line["column"]


def add(runs_dir, command):
    """Puts each cell of the tables of a directory of runs into results/ledger.jsonl."""
    metrics.tables(runs_dir)
    report = json.loads(Path(runs_dir, "tables.json").read_text())
    configs = [json.loads(metrics.run_record(path.parent).read_text())
               for path in Path(runs_dir).rglob("metrics_test.json")]
    source = {"command": command} | {
        name: ", ".join(sorted({str(config[name]) for config in configs})) for name in ("commit", "device")}
    new = [{"title": title, "row": row, "column": column, "n": cells["n"]["text"],
            "seeds": cells["seeds"]["text"]} | {key: own for key, own in cell.items() if own != []} | source
           for title, rows in report.items() for row, cells in rows.items() for column, cell in cells.items()
           if {"value", "paper"} & cell.keys()]
    kept = [line for line in read("ledger.jsonl") if key(line) not in set(map(key, new))]
    text = "".join(json.dumps(line) + "\n" for line in kept + new)
    lora.write_atomically(RESULTS / "ledger.jsonl", lambda path: path.write_text(text))


def not_run():
    """Lines for all that the paper's tables report: a number of the ledger takes their place."""
    for number, (models, methods) in metrics.TABLES.items():
        for model, method in ((model, method) for model in models for method in methods):
            for dataset, value in zip(metrics.DATASETS, metrics.PAPER[model].get(method, ()), strict=False):
                yield {"title": f"Table {number}. {dataset}", "row": model, "column": method, "paper": value,
                       "command": 'make reproduce PROFILE=paper SEEDS="1 2 3"'}


def ledger_block(wanted=lambda title: "synthetic" not in title):
    """A paragraph per command, commit and device, and the tables of its numbers."""
    sources, lines = {}, read("ledger.jsonl")
    done = set(map(key, lines))
    lines += [line for line in not_run() if key(line) not in done]
    for line in (line for line in lines if wanted(line["title"])):
        made = f"commit {line['commit']}; {line['device']}" if "commit" in line else "not run"
        report = sources.setdefault(f"\n`{line['command']}`; {made}:", {})
        report.setdefault(line["title"], {}).setdefault(line["row"], {})[line["column"]] = line
    for source, report in sources.items():
        for rows in report.values():
            columns = dict.fromkeys(column for row in rows.values() for column in row)
            for name, row in rows.items():
                rows[name] = {column: row.get(column, {}) for column in columns}
        yield source
        yield from (line.replace("## ", "#### ", 1) for line in metrics.markdown(report))


def newest(lines, *names):
    """The last line of each kind, in the order of their first ones."""
    return {tuple(line[name] for name in names): line for line in lines}.values()


def bench_block():
    """A row per measure: medians, and the least and the greatest ratio of a round."""
    def show(figures):
        return f"{statistics.median(figures):.4g}" if figures else "not run"

    yield from ("| row | ours | peer | ratio | target | note |", "|---|---|---|---|---|---|")
    noted, lines = set(), newest(read("bench.jsonl"), "row", "unit", "target")
    for line in lines:
        ratios = line["ratios"]
        ratio = f"{line['ratio']:.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "-"
        peer = "-" if line["ours"] and not line["peer"] else show(line["peer"])
        yield (f"| {line['row']}, {line['unit']} | {show(line['ours'])} | {peer} | {ratio} | "
               f"{line['target']} | {'' if line['note'] in noted else line['note'].strip('; ')} |")
        noted.add(line["note"])
    for name in ("device", "commit"):
        yield f"\n{name.capitalize()}: {', '.join(dict.fromkeys(line[name] for line in lines))}."


def reliability_block():
    """A row per kind of fault: how many were injected, what was lost, and further figures."""
    yield from ("| what | injected | lost | figures | command; commit |", "|---|---|---|---|---|")
    for line in newest(read("reliability.jsonl"), "what"):
        injected = "-" if line["injected"] is None else f"{line['injected']:,}"
        yield (f"| {line['what']} | {injected} | {line['lost']} | {line.get('note', '')} | "
               f"`{line['command']}`; {line.get('commit', '')} |")


def files_block():
    yield from ("| file | lines | its one subject |", "|---|---|---|")
    for name, subject in SUBJECTS.items():
        yield f"| `{name}` | {len((ROOT / name).read_text().splitlines())} | {subject} |"


def tiny_block():
    source, _, *table = ledger_block("Table I. unhealthy (synthetic, tiny)".__eq__)
    return [source.strip(), "", *table]


def person_block():
    """What a person is worth on real corpora: a row per measure, a column per corpus and model."""
    found = {}
    for line in read("ledger.jsonl"):
        kind, _, corpus = line["title"].partition(". ")
        if kind == "The person" and "synthetic" not in corpus and "(" not in line["row"]:  # no variants
            found.setdefault(f"{line['row']} on {corpus}", {})[line["column"]] = line
    lines = [next(iter(own.values())) for own in found.values()]
    yield from (f"| | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|")
    sizes = (f"{line['n']}; {line['seeds']}" for line in lines)
    yield f"| test annotations; seeds | {' | '.join(sizes)} |"
    for column, words in PERSON.items():
        cells = (metrics.format_cell(own.get(column, {}), "+" * ("[" in column)) for own in found.values())
        yield f"| {words} | {' | '.join(cells)} |"
    made = (f"`{line['command']}`; commit {line['commit']}; {line['device']}" for line in lines)
    yield "\n" + ". ".join(dict.fromkeys(made))


PAGES = {  # file -> the blocks that it has
    "README.md": {"files": files_block, "person": person_block, "tiny": tiny_block, "tour": tour.stop_list},
    "results/README.md": {"map": method_map.rows, "ledger": ledger_block, "bench": bench_block,
                          "reliability": reliability_block},
}


def filled(page):
    """(a page's text, the same with every block as it should be)."""
    before = text = (ROOT / page).read_text()
    for name, lines in PAGES[page].items():
        block = f"<!-- begin {name} -->\n" + "\n".join(lines()) + f"\n<!-- end {name} -->"
        pattern = f"<!-- begin {name} -->.*?<!-- end {name} -->"
        assert re.search(pattern, text, re.DOTALL), f"{page} has no block {name}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return before, text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("runs_dir")
    adding.add_argument("--command", required=True, help="what made the runs, without paths of one machine")
    commands.add_parser("readme")
    args = parser.parse_args(argv)
    if args.what == "add":
        add(args.runs_dir, args.command)
    else:
        for page in PAGES:
            (ROOT / page).write_text(filled(page)[1])


if __name__ == "__main__":
    sys.exit(main())
