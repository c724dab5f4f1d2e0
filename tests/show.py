"""What `make reproduce` ends with: the tables on a screen, a figure per corpus, and people to look at.

    python tests/show.py RUNS_DIR              tables of 100 columns; also writes tables.md and figures
    python tests/show.py RUNS_DIR --people     texts on which two users differ: right and wrong about them

A number is rounded here: every digit stands in tables.md and tables.json. The texts are read from the data
set that a run names.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import infer  # noqa: E402
import metrics  # noqa: E402

# ---- Tables ----


def brief(cell, sign=""):
    """A cell for the screen: 17.6 ±0.5, a change as +12.3 [+5, +18], the paper's value behind them."""
    text, digits = cell.get("text", "-"), 1 if cell.get("unit") == "points" else 0
    if "value" in cell:
        text = f"{cell['value']:{sign}.1f}"
        low, high = cell.get("interval", (np.nan, np.nan))
        if low <= high:
            text += f" [{low:+.{digits}f}, {high:+.{digits}f}]" if sign else f" ±{(high - low) / 2:.1f}"
    return text + (f" (paper {cell['paper']:{sign}.1f})" if "paper" in cell else "")


def aligned(report, width=100):
    """The lines of the tables: columns that do not fit into the width stand below the others."""
    for title, rows in report.items():
        if not rows or not title.startswith(("Table", "The person")):
            continue
        columns = [name for name in next(iter(rows.values())) if any(rows[row][name] for row in rows)]
        lines = [["", *columns]]
        for name, row in rows.items():
            lines.append([name, *(brief(row[key], "+" if "[" in key else "") for key in columns)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        yield f"\n{title}"
        start = 1
        while start < len(widths):
            end = start + 1
            while end < len(widths) and widths[0] + sum(2 + own for own in widths[start : end + 1]) <= width:
                end += 1
            for name, *cells in lines:
                shown = zip(cells[start - 1 : end - 1], widths[start:end], strict=True)
                yield f"{name:<{widths[0]}}" + "".join(f"  {cell:>{own}}" for cell, own in shown)
            start = end


# ---- Figures ----

SETTINGS = {  # setting -> (shade, hatch) of its bar: they can be told apart in grey
    "q1s": ("1.0", ""), "q2s": ("0.85", "////"), "lmp": ("0.6", ""), "clsp": ("0.25", "")}
LINES = {"cls": ("0.55", "--"), "clsp": ("0.0", "-"), "lm": ("0.55", ":"), "lmp": ("0.0", "-.")}
PEOPLE = {"cls": ("o", "white"), "user_bias": ("^", "0.7"), "clsp": ("s", "0.0")}  # marker and its filling


def draw_gains(axis, gains):
    """Figures 2 and 3: a group of bars per model, a bar per setting; gains {model: {setting: cell}}."""
    shown = [name for name in SETTINGS if any(gains[model].get(name) for model in gains)]
    width = 0.8 / max(1, len(shown))
    for k, name in enumerate(shown):
        for x, model in enumerate(gains):
            cell, at = gains[model].get(name, {}), x + (k - (len(shown) - 1) / 2) * width
            shade, hatch = SETTINGS[name]
            base = metrics.BASELINE_OF[name]
            axis.bar(at, cell.get("value", 0), 0.9 * width, color=shade, hatch=hatch, edgecolor="black",
                     label=f"{name} over {base}" if not x else None)
            axis.plot([at] * 2, cell.get("interval", [np.nan] * 2), color="black", linewidth=1.5)
            axis.plot([at] * 2, cell.get("interval", [np.nan] * 2), color="white", linewidth=0.6)
            axis.plot(at, cell.get("paper", np.nan), "D", color="black", markerfacecolor="white")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(gains)), [model.replace(" (", "\n(") for model in gains])
    axis.set(title="Gain in F1-macro by the user", ylabel="%, with 95% interval; ◇ the paper's")
    if shown:
        axis.margins(y=0.25)  # for the legend
        axis.legend(ncols=len(shown), loc="upper center")


def draw_learning(axis, methods):
    """Training losses (means) as lines and validation losses as dots, one style per method."""
    for name, runs in methods.items():
        for n, run in enumerate(run for run in runs if name in LINES and run.log.exists()):
            shade, style = LINES[name]
            for key in ("loss", "val_loss"):
                try:
                    curve = [(float(row["step"]), float(row[key]))
                             for row in metrics.read_predictions(run.log) if key in row]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{run.log} is damaged ({error!r}): restore or remove it") from None
                parts = np.array_split(curve, min(len(curve), 30) or 1)
                points = np.reshape([np.mean(part, axis=0) for part in parts], (-1, 2)).T
                way = dict(linestyle=style) if key == "loss" else dict(linestyle="", marker="o", markersize=4)
                axis.plot(*points, color=shade, label=name if not n and key == "loss" else None, **way)
    axis.set(title="Learning: training (lines), validation (dots)", xlabel="optimizer step", ylabel="loss",
             yscale="log")
    if axis.lines:
        axis.legend(ncols=4)


def draw_people(axis, methods, key, title):
    """A measure of each user, by rising values with `clsp`, the mean over seeds of each of PEOPLE."""
    of = {name: [run.metrics.get(key, {}) for run in methods[name]] for name in PEOPLE if name in methods}
    known = [{user for user in own if own[user] is not None} for runs in of.values() for own in runs]
    users = set.intersection(*known) if {"cls", "clsp"} <= of.keys() else set()
    values = {name: {user: 100 * np.mean([own[user] for own in runs]) for user in users}
              for name, runs in of.items()}
    order = sorted(users, key=lambda user: values["clsp"][user])
    for name, (marker, filling) in ((name, PEOPLE[name]) for name in of if users):
        axis.plot([values[name][user] for user in order], marker, color="black", markerfacecolor=filling,
                  markersize=5, label={"user_bias": "cls + bias"}.get(name, name))
    better = sum(values["clsp"][user] > values["cls"][user] for user in users)
    axis.set(title=title, xlabel=f"users; clsp is better than cls for {better} of {len(users)}")
    if users:
        axis.legend()


def figures(runs_dir):
    """The PNGs drawn after the tables, 800 pixels wide, one per data set. Raises: ValueError."""
    from matplotlib.figure import Figure

    report, paths = json.loads(Path(runs_dir, "tables.json").read_bytes()), []
    for dataset, models in metrics.collect(runs_dir).items():
        gains = {}
        for number in metrics.TABLES:
            for model, row in report.get(f"Table {number}. {dataset}", {}).items():
                cells = {column.split()[0]: cell for column, cell in row.items() if "[%]" in column and cell}
                gains.setdefault(model, {}).update(cells)
        gains = {model: own for model, own in gains.items() if own}
        model = max(models, key=lambda name: len(models[name]))
        figure = Figure(figsize=(8, 9), layout="constrained")
        panels = figure.subplot_mosaic([["gains"] * 2, ["learning"] * 2, ["f1", "auc"]])
        figure.suptitle(f"{dataset}\n(lower panels: {model})")
        draw_gains(panels["gains"], gains)
        draw_learning(panels["learning"], models[model])
        draw_people(panels["f1"], models[model], "f1_per_user", "F1 of each user, %")
        draw_people(panels["auc"], models[model], "disagreement_auc_per_user", "Disagreement of each user, %")
        paths.append(Path(runs_dir, re.sub(r"\W+", "_", f"figures {dataset}").strip("_") + ".png"))
        figure.savefig(paths[-1], dpi=100)
    return paths


# ---- People ----


def surest_pairs(data, n=3):
    """(right, wrong): the n disagreements each, of different texts, on which the scores are surest.

    One is (score of who chose the label - score of who did not, row of the one, row of the other).
    """
    by_text, found = {}, []
    for row, text in enumerate(data.text_index):
        by_text.setdefault(text, []).append(row)
    for own in by_text.values():
        for one in own:
            for other in own:
                for label in np.flatnonzero(data.gold[one] & ~data.gold[other]):
                    if data.user_index[one] != data.user_index[other]:
                        margin = data.scores[one, label] - data.scores[other, label]
                        found.append((float(margin), one, other))
    sides = []
    for side in (sorted((own for own in found if own[0] > 0), reverse=True),
                 sorted(own for own in found if own[0] < 0)):
        first = {}
        for own in side:
            first.setdefault(data.text_index[own[1]], own)
        sides.append([*first.values()][:n])
    return sides


def people(run):
    """The lines of a run's surest disagreements: text, and labels and probabilities of both users."""
    task, splits, _ = infer.load_splits(argparse.Namespace(**run.arguments))
    part = splits["test"]
    for title, pairs in zip(("right about the person", "wrong"), surest_pairs(run.data), strict=True):
        yield f"\n{Path(run.dataset).stem}, {run.method}: where it was {title}"
        for _, *rows in pairs:
            yield f"\n> {' / '.join(part.texts[part.text_index[rows[0]]].split(chr(10)))}\n"
            gold = np.flatnonzero(run.data.gold[rows].any(axis=0))
            for row in rows:
                chosen = ", ".join(task.label_names[k] for k in np.flatnonzero(run.data.gold[row])) or "none"
                scores = ", ".join(f"{task.label_names[k]} {run.data.scores[row, k]:.2f}" for k in gold)
                yield f"- user {run.data.user_ids[run.data.user_index[row]]} chose {chosen}; clsp: {scores}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs_dir")
    parser.add_argument("--people", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.people:
            for models in metrics.collect(args.runs_dir).values():
                for methods in models.values():
                    for run in methods.get("clsp", ())[:1]:
                        print(*people(run), sep="\n")
            return 0
        metrics.tables(args.runs_dir)
        report = json.loads(Path(args.runs_dir, "tables.json").read_bytes())
        print(*aligned(report), "", *metrics.sentences(report), sep="\n")
        print(f"\nEvery digit, n, seeds and the auditor's tables: {args.runs_dir}/tables.md")
        print(*figures(args.runs_dir), sep="\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
