"""The numbers: F1-macro and its companions, thresholds, intervals, baselines, gain, Tables I-III.

Source: "Personalized Large Language Models" (arXiv 2402.09269), section VII, and the rows of the audit.
Arrays are numpy: N annotations, L labels; F1 is 0 to 1, and in percent in the tables.

    python metrics.py tables runs/paper      of the finished runs below a directory; tests/show.py draws them

A finished run is a directory with run.json, metrics_test.json and predictions_test.jsonl; that of a `cls`
run may hold baselines_test.json, {one of BASELINES: metrics and scores}. Does not predict or read a corpus.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

DATASETS = ("goemotions", "unhealthy")
PAPER = {  # model -> method -> F1-macro in percent on each of DATASETS: Tables I, II and III
    "phi-2": {"lm": (28.99, 34.97), "lmp": (32.87, 45.89), "cls": (30.03, 31.91), "clsp": (43.07, 48.26)},
    "stablelm": {"lm": (26.55, 29.61), "lmp": (31.72, 48.54), "cls": (27.42, 16.92), "clsp": (41.44, 44.68)},
    "mistral": {"lm": (28.36, 34.29), "lmp": (34.52, 51.65), "cls": (26.77, 23.10), "clsp": (43.94, 52.83),
                "q0s": (22.20, 18.90), "q1s": (17.91, 26.12), "q2s": (20.52, 23.21)},
    "flan-t5": {"cls": (32.64, 38.57), "clsp": (45.68, 59.42),
                "q0s": (17.97, 14.11), "q1s": (17.79, 12.81), "q2s": (17.87, 12.68)},
    "gpt-3.5-turbo": {"q0s": (23.33, 21.51), "q1s": (22.58, 23.11), "q2s": (22.33, 25.49)},
    "gpt-4": {"q0s": (26.74, 24.94), "q1s": (26.82, 27.29), "q2s": (26.64, 30.57)},
}
SHUT_DOWN = ("gpt-3.5-turbo", "gpt-4")  # by OpenAI, on 2026-10-23
TABLES = {  # table -> (the paper's rows, its columns)
    "I": (("phi-2", "stablelm", "mistral"), ("lm", "lmp", "cls", "clsp")),
    "II": (("flan-t5", "mistral", "gpt-3.5-turbo", "gpt-4"), ("q0s", "q1s", "q2s", "lmp")),
    "III": (("flan-t5", "mistral"), ("cls", "clsp")),
}
BASELINE_OF = {"lmp": "lm", "clsp": "cls", "q1s": "q0s", "q2s": "q0s"}  # its gain is over the other


def gain(personalised, baseline):
    """(personalised - baseline) / baseline x 100%, over a baseline above 0. Source: section VII."""
    return (personalised - baseline) / baseline * 100  # [metric.gain]


# ---- Measures, and the auditor's baselines ----


def sum_by_group(values, index, n_groups):
    """The sum of the rows of each group. Shapes: values (N, ...), index (N,) int -> (n_groups, ...) float."""
    sums = np.zeros((n_groups, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def count(gold, predicted, index=0, n_groups=1):
    """True positives, false positives, false negatives: gold, predicted (N, L), index (N,) -> (G, 3, L)."""
    outcomes = np.stack([gold & predicted, ~gold & predicted, gold & ~predicted], axis=1)
    return sum_by_group(outcomes, np.broadcast_to(index, len(gold)), n_groups)


def f1_from_counts(counts):
    """F1 = 2 TP / (2 TP + FP + FN). Shapes: counts (..., 3, L) -> (..., L)."""
    true, false, missed = (counts[..., k, :] for k in range(3))
    # A label absent on both sides counts 0, as with sklearn's zero_division=0: [choice.E4]
    return 2 * true / np.maximum(2 * true + false + missed, 1)


def f1_per_label(gold, predicted):
    """F1 of each label, (L,)."""
    return f1_from_counts(count(gold, predicted))[0]


def f1_macro(gold, predicted):
    """The mean of the labels' F1: the paper's measure."""
    return float(f1_per_label(gold, predicted).mean())  # [metric.F1]


def f1_micro(gold, predicted, index=0, n_groups=1):
    """F1 of all labels' decisions together, per group. A user meets few labels, so it is also theirs."""
    return f1_from_counts(count(gold, predicted, index, n_groups).sum(axis=2, keepdims=True))[:, 0]


def _cuts(gold, scores):
    """All cuts of one label's scores, from the top: (lowest score above, annotations above, of them gold)."""
    order = np.argsort(-scores, kind="stable")
    scores, true_positives = scores[order].astype(np.float64), np.cumsum(gold[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores stay on one side
    return scores[last], last + 1, true_positives[last]


def tune_thresholds(gold, scores):
    """The threshold of each label that maximises its F1, where predicted = scores >= threshold.

    It lies halfway between two scores; of equally good ones the highest is taken. A label that never occurs
    keeps 0.5. To be tuned on validation. Shapes: gold (N, L) bool, scores (N, L) -> (L,).
    """
    thresholds = np.full(gold.shape[1], 0.5)
    for label in np.flatnonzero(gold.any(axis=0)):
        cut, n_predicted, true_positives = _cuts(gold[:, label], scores[:, label])
        best = np.argmax(2 * true_positives / (n_predicted + true_positives[-1]))
        thresholds[label] = np.append(cut, 0.0)[best:best + 2].mean()
    return thresholds


def mean_average_precision(gold, scores):
    """The mean over labels that occur of sum_k (R_k - R_(k-1)) P_k, sklearn's average_precision_score."""
    precisions = []
    for label in np.flatnonzero(gold.any(axis=0)):
        _, n_predicted, true_positives = _cuts(gold[:, label], scores[:, label])
        recall_steps = np.diff(true_positives, prepend=0) / true_positives[-1]
        precisions.append(recall_steps @ (true_positives / n_predicted))
    return float(np.mean(precisions)) if precisions else 0.0


def log_loss(gold, scores, epsilon=1e-7):
    """Mean binary cross-entropy over annotations and labels, in nats, of scores clipped by epsilon."""
    scores = np.clip(scores.astype(np.float64), epsilon, 1 - epsilon)
    return float(-np.log(np.where(gold, scores, 1 - scores)).mean())


def count_opponents(gold, scores, index):
    """Of each annotation and label: how many of its group answered otherwise, how many of these have their
    score on the right side of its own, ties half. Shapes: gold, scores (N, L), index (N,) -> (N, 2, L).
    """
    counts = np.zeros((len(gold), 2, gold.shape[1]))
    for label in range(gold.shape[1]):
        order = np.lexsort((scores[:, label], index))
        chosen, own, groups = gold[order, label], scores[order, label], index[order]
        new = np.append(True, (np.diff(groups) != 0) | (np.diff(own) != 0))  # equal scores are one place
        groups, place = groups[new], np.cumsum(new) - 1
        here = np.add.reduceat([~chosen, chosen], np.flatnonzero(new), axis=1, dtype=int)
        upto = np.cumsum(here, axis=1)
        before = (upto - here)[:, np.searchsorted(groups, groups)]
        of_group = upto[:, np.searchsorted(groups, groups, "right") - 1] - before
        other = (1 - chosen, place)
        n, below = of_group[other], (upto - before - here / 2)[other]
        counts[order, :, label] = np.stack([n, np.where(chosen, below, n - below)], axis=1)
    return counts


def count_disagreements(gold, scores, text_index, user_index=None):
    """`count_opponents` among other users' annotations of the text; without user_index each is another's."""
    counts = count_opponents(gold, scores, text_index)
    if user_index is not None:
        _, own = np.unique([text_index, user_index], axis=1, return_inverse=True)
        counts -= count_opponents(gold, scores, own) if own.max() + 1 < len(gold) else 0
    return counts


def auc_from_counts(counts):
    """The share on the right side, of all labels, then of each; NaN of none: (..., 2, L) -> (..., 1 + L)."""
    counts = np.concatenate([counts.sum(axis=-1, keepdims=True), counts], axis=-1)
    with np.errstate(invalid="ignore"):
        return counts[..., 1, :] / counts[..., 0, :]


def disagreement_auc(gold, scores, text_index, user_index=None):
    """Of two users of a text who differ on a label, how often the one who chose it has the higher score.

    Without knowledge of the person it is 0.5, and no threshold can move it. NaN if no users differ.
    """
    counts = count_disagreements(gold, scores, text_index, user_index)
    return float(auc_from_counts(counts.sum(axis=0))[0])  # the person alone, where F1 has more: [choice.E7]


def resample(counts, resamples=1000, seed=0):
    """The counts of each bootstrap resample of the texts: annotations of one text are not independent.

    The draws depend on `seed` and n_texts only, so two calls over the same texts are paired: what is computed
    of both, as their `gain`, is resampled as one quantity. Shapes: (n_texts, K, L) -> (resamples, K, L).
    """
    counts, n_texts = counts.astype(np.float32), len(counts)  # sums are exact up to 2^24
    generator, samples = np.random.default_rng(seed), []
    for _ in range(resamples):
        times = np.bincount(generator.integers(n_texts, size=n_texts), minlength=n_texts)
        samples.append(np.einsum("t,tcl->cl", times.astype(np.float32), counts))
    return np.array(samples)


def interval(samples):
    """The middle 95% of the resamples that have the statistic."""
    return np.nanquantile(samples, (0.025, 0.975)).tolist()


def always_all(n_annotations, n_labels):
    """Scores of 1, every label for every annotation, (N, L)."""
    return np.ones((n_annotations, n_labels))


def user_frequencies(train_labels, train_user_index, test_user_index, n_users, smoothing=10.0):
    """Scores (N_test, L): how often each user chose each label, smoothed by as many annotations of all."""
    chosen = sum_by_group(train_labels, train_user_index, n_users) + smoothing * train_labels.mean(axis=0)
    return (chosen / (np.bincount(train_user_index, minlength=n_users)[:, None] + smoothing))[test_user_index]


def fit_user_bias(logits, labels, user_index, n_users, l2=1.0):
    """The bias b of each user and label that minimises sum BCE(sigmoid(logits + b), labels) + l2 / 2 b^2.

    Newton's method for all biases at once; l2 is above 0, and users without annotations get 0.
    Shapes: logits, labels (N, L), user_index (N,) -> (n_users, L).
    """
    bias = np.zeros((n_users, logits.shape[1]))
    for _ in range(500):  # about 8 are needed
        probabilities = 0.5 + 0.5 * np.tanh(0.5 * (logits + bias[user_index]))
        slope = sum_by_group(labels - probabilities, user_index, n_users) - l2 * bias
        curvature = sum_by_group(probabilities * (1 - probabilities), user_index, n_users) + l2
        step = np.clip(slope / curvature, -1, 1)  # within 1 the curvature changes e-fold at most: converges
        bias += step
        if np.abs(step).max() < 1e-8:
            break
    return bias


# ---- A predictions file, evaluated ----


def read_predictions(path):
    """The rows of a predictions_SPLIT.jsonl, in order. Raises: ValueError, FileNotFoundError."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def to_arrays(rows, label_names):
    """Rows as gold, predicted (N, L) bool, scores (N, L) or None, text_index, user_index (N,) into the sorted
    text_ids, user_ids. Raises: ValueError for no rows, an unknown label, or what is no probability.
    """
    if not rows:
        raise ValueError("there is no prediction")
    if unknown := {name for row in rows for name in (*row["gold"], *row["predicted"])} - set(label_names):
        raise ValueError(f"{sorted(unknown)} are not among the labels {list(label_names)}")
    gold, predicted = (np.array([[name in row[key] for name in label_names] for row in rows])
                       for key in ("gold", "predicted"))
    scores = np.array([row["scores"] for row in rows]) if "scores" in rows[0] else None
    if scores is not None and not (scores.shape == gold.shape and ((scores >= 0) & (scores <= 1)).all()):
        raise ValueError(f"scores are not {len(label_names)} probabilities")
    own, first = [str(row.get("text_hash", row["text_id"])) for row in rows], {}
    for text, row in zip(own, rows, strict=True):  # texts are in the order of their ids, as in older files
        first.setdefault(text, f"{row['text_id']} {text}")
    text_ids, text_index = np.unique([first[text] for text in own], return_inverse=True)
    user_ids, user_index = np.unique([str(row["user_id"]) for row in rows], return_inverse=True)
    return SimpleNamespace(gold=gold, predicted=predicted, scores=scores, text_ids=text_ids,
                           text_index=text_index, user_ids=user_ids, user_index=user_index)


def disagreements(data):
    """`count_disagreements` of to_arrays' result: generated labels are in the order of the decision."""
    scores = data.predicted * 1.0 if data.scores is None else data.scores
    return count_disagreements(data.gold, scores, data.text_index, data.user_index)


def describe_disagreement(data, label_names):
    """disagreement_auc of all, of labels and users, with intervals over texts; None where no one differs."""
    def number(value):
        return None if np.isnan(value) else float(value)

    counts = disagreements(data)
    auc, per_user = (auc_from_counts(own) for own in (
        counts.sum(axis=0), sum_by_group(counts, data.user_index, len(data.user_ids))))
    samples = auc_from_counts(resample(sum_by_group(counts, data.text_index, len(data.text_ids)))).T
    intervals = [None if np.isnan(own) else interval(drawn) for own, drawn in zip(auc, samples)]
    return {"disagreement_auc": number(auc[0]), "disagreement_auc_interval": intervals[0],
            "disagreement_auc_per_label": dict(zip(label_names, map(number, auc[1:]))),
            "disagreement_auc_per_label_interval": dict(zip(label_names, intervals[1:])),
            "disagreement_auc_per_user": dict(zip(data.user_ids.tolist(), map(number, per_user[:, 0]))),
            "n_disagreements": int(counts[:, 0].sum()) // 2}


def evaluate(rows, label_names, thresholds=None, unseen_users=()):
    """What metrics_SPLIT.json holds, from the rows of predictions_SPLIT.jsonl.

    Thresholds (L,) are tuned on validation. With unseen_users, the ids of those who are not in train, all of
    it stands again under "seen" and "unseen". An annotation without labels that is predicted so adds nothing
    to any F1, which is of the labels that are given or predicted; a user who has neither has none (0 in
    f1_per_user), and is left out of the users' mean and quantiles. An answered "none" is no empty answer.
    """
    data = to_arrays(rows, label_names)
    per_user = f1_micro(data.gold, data.predicted, data.user_index, len(data.user_ids))
    either = sum_by_group((data.gold | data.predicted).any(axis=1), data.user_index, len(per_user)) > 0
    told = per_user[either] if either.any() else np.zeros(1)
    result = {
        "labels": list(label_names), "n_annotations": len(rows),
        "n_texts": len(data.text_ids), "n_users": len(data.user_ids),
        "f1_macro": f1_macro(data.gold, data.predicted),
        "f1_micro": float(f1_micro(data.gold, data.predicted)[0]),
        "f1_per_label": dict(zip(label_names, f1_per_label(data.gold, data.predicted).tolist())),
        "f1_per_user": dict(zip(data.user_ids.tolist(), per_user.tolist())),
        "f1_user_mean": float(told.mean()),
        "f1_user_quantiles": {f"{q}%": float(np.percentile(told, q)) for q in (5, 25, 50, 75, 95)},
    }
    result |= describe_disagreement(data, label_names)
    if data.scores is not None:
        result["mean_average_precision"] = mean_average_precision(data.gold, data.scores)
        result["log_loss"] = log_loss(data.gold, data.scores)
        if thresholds is not None:
            tuned = data.scores >= np.asarray(thresholds)  # beside the paper's 0.5: [choice.E1]
            result |= {"f1_macro_tuned": f1_macro(data.gold, tuned), "thresholds": [*map(float, thresholds)]}
    elif all("response" in row for row in rows):
        lost = sum(len(row.get("not_understood", ())) for row in rows)
        none = sum(row.get("none", False) for row in rows)  # an answer, too
        result["share_not_understood"] = lost / max(1, lost + none + int(data.predicted.sum()))
        empty = sum(not (row["predicted"] or row.get("not_understood") or row.get("none")
                         or row.get("refused")) for row in rows)
        result["share_empty_answers"] = empty / len(rows)  # signs or a repeated prompt alone are empty, too
        for key in {"truncated", "refused"} & rows[0].keys():  # by a server; refused: all labels are missed
            result[f"share_{key}"] = sum(bool(row[key]) for row in rows) / len(rows)
    unseen = {str(user) for user in unseen_users or ()}
    for part in ("seen", "unseen") if unseen else ():
        if own := [row for row in rows if (str(row["user_id"]) in unseen) == (part == "unseen")]:
            result[part] = evaluate(own, label_names, thresholds)
    return result


# ---- Finished runs ----

HOW = {"out", "micro_batch_tokens", "max_cost", "price_in", "price_out", "concurrency", "timeout_s",
       "max_retries", "api_base", "cache_from"}  # change no result of the same model, but for rounding
NOT_RECIPE = HOW | {"seed", "adapter", "data_dir", "note", "dry_run", "follow"}


def run_record(directory):
    """The path of what a run says of itself: run.json, or config.json of older runs."""
    new, old = Path(directory, "run.json"), Path(directory, "config.json")
    return old if old.exists() and not new.exists() else new


def checksums(directory, split, result):
    """sha256 of the files that the figures of a split were made with, and of the figures themselves."""
    names = (run_record(directory).name, f"predictions_{split}.jsonl", f"baselines_{split}.json")
    contents = {name: Path(directory, name).read_bytes() for name in names if Path(directory, name).exists()}
    contents["figures"] = json.dumps(result).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def read_checked(directory, only=None):
    """The figures of metrics_test.json. Raises: ValueError if a file (`only`: that one) is not as written."""
    try:
        result = json.loads((directory / "metrics_test.json").read_bytes())
        written = dict(result.pop("sha256"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory}/metrics_test.json is damaged ({error!r}): restore it, or remove it "
                         "and evaluate again") from None
    found = checksums(directory, "test", result)
    names = {only} if only else found | written
    if other := sorted(name for name in names if found.get(name) != written.get(name)):
        raise ValueError(f"{directory}: {other} not as written: restore it, or use infer.py --run")
    return result


def load_run(directory):
    """A finished run and its baselines. Raises: ValueError, KeyError, TypeError."""
    metrics, config = read_checked(directory), json.loads(run_record(directory).read_bytes())
    rows, extra = read_predictions(directory / "predictions_test.jsonl"), directory / "baselines_test.json"
    data = to_arrays(rows, metrics["labels"])
    run = {"limit": None, "max_steps": None, "follow": {}} | config["arguments"] | {
        "seed": dict(config["arguments"].get("extra") or ()).get("seed", config["arguments"]["seed"]),
        "arguments": config["arguments"], "note": config.get("note"), "log": directory / "log.jsonl",
        "annotations": hash(str([(row["text_id"], row["user_id"], row["gold"]) for row in rows]))}
    systems = {run["method"]: metrics} | (json.loads(extra.read_bytes()) if extra.exists() else {})
    runs = [SimpleNamespace(**run | {"method": key, "metrics": own, "data": data})
            for key, own in systems.items()]
    for baseline in runs[1:]:
        scores = np.array(baseline.metrics.pop("scores"), float)
        if scores.shape != data.gold.shape:
            raise ValueError(f"{extra}: scores {scores.shape}, not {data.gold.shape}")
        baseline.data = SimpleNamespace(**vars(data) | {"scores": scores, "predicted": scores >= 0.5})
    return runs


def collect(runs_dir):
    """Finished runs: {data set: {model: {method: runs}}}. Raises: ValueError, FileNotFoundError.

    A run with another recipe than the first of its model and method is of a model "mistral (lora_r 8)".
    """
    found, recipes = {}, {}
    for path in sorted(Path(runs_dir).rglob("metrics_test.json")):
        try:
            runs = load_run(path.parent)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path.parent} is no finished run: {error!r}") from error
        for run in runs:
            model, dataset = run.model, run.dataset
            served = run.arguments.get("api_base") or model.startswith("gpt-")  # a row of its own
            model += " (served)" if served and model in PAPER and model not in SHUT_DOWN else ""
            if (run.note or run.limit or run.max_steps or not served and model not in PAPER
                    or dataset not in DATASETS):
                model = Path(model).name
                dataset = f"{Path(dataset).stem} ({run.note or 'not the setting of the paper'})"
            given = run.arguments | {f"follow {row}": own for row, own in dict(run.follow).items()}
            given["extra"] = [one for one in given.get("extra") or () if one[0] != "seed"] or None
            recipe = {key: str(given[key]) for key in sorted(given.keys() - NOT_RECIPE)
                      if given[key] is not None}
            usual = recipes.setdefault((dataset, model, run.method), recipe) | {"constrain": "False"}
            words = [f"{key} {value}" for key, value in recipe.items() if value != usual.get(key)]
            model += f" ({', '.join(words)})" if words else ""
            found.setdefault(dataset, {}).setdefault(model, {}).setdefault(run.method, []).append(run)
    if not found:
        raise FileNotFoundError(f"no finished run below {runs_dir}: metrics_test.json")
    return found


# ---- Tables: {title: {row: {column: cell}}}, where a cell holds what exists of it, and figures ----

BASELINES = ("user_bias", "user_frequencies", "always_all")
PARTS = ("", "seen", "unseen")  # all users, those of train, the others
AUDITED = ("clsp", "cls", *BASELINES)  # columns of the auditor's table
AUDIT = ("f1_macro", "f1_macro_tuned", "disagreement_auc", "mean_average_precision", "log_loss",
         "f1_user_mean")  # its rows
RESPONSES = ("share_not_understood", "share_empty_answers", "share_truncated", "share_refused",
             "seconds")  # rows of the table of generated text
UNITS = {"disagreement_auc": "points", "log_loss": "nats", "seconds": "s"}  # of the others: percent
CLAIMS = {"the User ID raises F1, thresholds tuned": "tuned [%]",
          "it is worth more than a habit of each user": "auc over bias [points]",
          "it helps with users held out of training": "unseen [%]"}
FOOTNOTE = """\
All times 100, but for seconds and log-loss: mean over seeds [95% interval over texts and seeds, paired for
gains]; gains in percent, of disagreement_auc in points: of two users who differ on a text's label, how often
the one who chose it has the higher score. A value "differs" if the paper's is not in its interval. A gain in
log-loss below 0 is an improvement. Between runs on different annotations there is no gain.
"""


def resampled(data, own, name):
    """The resamples of a measure, in percent, for the users of the metrics `own`; None of other measures."""
    chosen = np.isin(data.user_ids, [*own["f1_per_user"]])[data.user_index]
    per_row = ("gold", "predicted", "scores", "text_index", "user_index")
    part = SimpleNamespace(**vars(data) | {key: vars(data)[key][chosen] for key in per_row
                                           if vars(data)[key] is not None})
    if name == "disagreement_auc":
        counts = sum_by_group(disagreements(part), part.text_index, len(data.text_ids))
        return 100 * auc_from_counts(resample(counts))[:, 0]
    if name in ("f1_macro", "f1_macro_tuned"):
        predicted = part.predicted if name == "f1_macro" else part.scores >= np.array(own["thresholds"])
        counts = count(part.gold, predicted, part.text_index, len(data.text_ids))
        return 100 * f1_from_counts(resample(counts)).mean(axis=1)
    return None


def measure(runs, part="", name="f1_macro"):
    """The cell of a measure for all users or a part: mean over runs, and resamples where there are some.

    A resample draws texts and, where there are several, seeds, the same ones for every method.
    """
    parts = [run.metrics.get(part, {}) if part else run.metrics for run in runs]
    if not runs or any(own.get(name) is None for own in parts):
        return {}
    per_seed = [(1 if UNITS.get(name) in ("s", "nats") else 100) * own[name] for own in parts]
    samples = [resampled(run.data, own, name) for run, own in zip(runs, parts)]
    cell = {"value": float(np.mean(per_seed)), "per_seed": per_seed, "seeds": [run.seed for run in runs],
            "n": [own["n_annotations"] for own in parts if "n_annotations" in own],
            "on": {run.annotations for run in runs}}
    if name in UNITS:
        cell["unit"] = UNITS[name]
    if samples[0] is not None:
        drawn = np.random.default_rng(0).integers(len(runs), size=np.shape(samples))  # seeds: [choice.T11]
        cell["samples"] = np.take_along_axis(np.array(samples), drawn, axis=0).mean(axis=0)
    return cell


def compare(cell, base):
    """The cell of a gain: paired, so there is none between runs on different annotations."""
    change, points = {}, cell.get("unit") == "points"
    for key in ("value", "samples", "paper"):  # by the paper's scores, not its "up to 165%": [choice.E6]
        if key in cell and np.all(base.get(key, 0)) and (key == "paper" or cell["on"] == base["on"]):
            change[key] = cell[key] - base[key] if points else gain(cell[key], base[key])
    return change | ({"unit": "points"} if change and points else {})


def add_gains(rows, pairs):
    """The rows that are not empty, with the gain of each (personalised, baseline) pair, n and seeds."""
    rows = {name: row for name, row in rows.items() if any(row.values())}
    for row in rows.values():
        ran = [cell for cell in row.values() if "n" in cell]
        row |= {f"{own} over {base} [%]": compare(row[own], row[base]) for own, base in pairs}
        for key in ("n", "seeds"):
            row[key] = {"text": ", ".join(dict.fromkeys(str(own) for cell in ran for own in cell[key]))}
        for cell in row.values():
            cell.pop("on", None)
            if "samples" in cell:
                cell["interval"] = interval(cell.pop("samples"))
    return rows


def worth(models, model):
    """One row that answers what the person is worth to a model; users held out are those of its variant."""
    def cells(methods, part, key):
        return [measure(methods.get(name, ()), part, key) for name in ("clsp", "cls", "user_bias")]

    methods = models[model]
    held_out = [own for name, own in models.items() if name.startswith(f"{model} (unseen_users")]
    half, tuned, auc = (cells(methods, "", key) for key in ("f1_macro", "f1_macro_tuned", "disagreement_auc"))
    unseen = cells([methods, *held_out][-1], "unseen", "f1_macro_tuned")
    return {"at 0.5 [%]": compare(*half[:2]), "tuned [%]": compare(*tuned[:2]),
            "over bias [%]": compare(*tuned[::2]), "unseen [%]": compare(*unseen[:2]), "auc cls": auc[1],
            "auc bias": auc[2], "auc clsp": auc[0], "auc over bias [points]": compare(*auc[::2])}


def sentences(report):
    """Three sentences on what each row of the tables of `worth` supports, by its intervals."""
    for title, model, row in ((title, *item) for title, rows in report.items() for item in rows.items()):
        for claim, column in CLAIMS.items() if title.startswith("The person") else ():
            low, high = row[column].get("interval", (np.nan, np.nan))
            verdict = ("supported" if low > 0 else "contradicted" if high < 0 else
                       "cannot be told" if low <= 0 else "not measured")
            yield f"- {title[12:]}, {model}: {claim}: {verdict}: {column} {format_cell(row[column], '+')}"


def format_cell(cell, sign=""):
    """A cell as text: value [interval] (range of the seeds; the paper's value)."""
    digits = 4 if cell.get("unit") == "nats" else 2
    text = cell.get("text", "not run" if "paper" in cell and not sign else "-")
    text = f"{cell['value']:{sign}.{digits}f}" if "value" in cell else text
    text += " [{:{s}.2f}, {:{s}.2f}]".format(*cell["interval"], s=sign) if "interval" in cell else ""
    text += " points" if sign and cell.get("unit") == "points" else ""
    seeds = cell.get("per_seed", ())
    text += f" (seeds {min(seeds):.{digits}f}..{max(seeds):.{digits}f})" if len(seeds) > 1 else ""
    if "paper" in cell:
        low, high = cell.get("interval", (cell["paper"], cell["paper"]))
        text += f" (paper {cell['paper']:{sign}.2f}{'' if low <= cell['paper'] <= high else ', differs'})"
    return text


def markdown(report):
    """The lines of a report's tables: {title: {row: {column: cell}}}."""
    for title, rows in report.items():
        for row in [*rows.values()][:1]:
            yield from (f"\n## {title}\n", f"| | {' | '.join(row)} |", "| --- " * (1 + len(row)) + "|")
        for name, row in rows.items():
            cells = [format_cell(cell, "+" if "[" in column else "") for column, cell in row.items()]
            ended = ", shut down 2026-10-23" if name in SHUT_DOWN else ""
            yield f"| {name}{ended} | {' | '.join(cells)} |"


def tables(runs_dir):
    """Tables I-III and the auditor's as Markdown, also written into runs_dir as tables.md and tables.json."""
    report = {}
    for dataset, models in collect(runs_dir).items():
        paper = PAPER if dataset in DATASETS else {}
        for number, (shown, methods) in TABLES.items():
            rows = {f"{model}, {part} users" if part else model: {
                        method: measure(models.get(model, {}).get(method, ()), part) for method in methods}
                    for model in dict.fromkeys([*filter(paper.get, shown), *models]) for part in PARTS}
            for model, method in ((model, method) for model in rows for method in methods):
                if method in paper.get(model, {}):
                    rows[model][method]["paper"] = paper[model][method][DATASETS.index(dataset)]
            pairs = [pair for pair in BASELINE_OF.items() if {*pair} <= {*methods}]
            report[f"Table {number}. {dataset}"] = add_gains(rows, pairs)
        for model, methods in models.items():
            generated = {name: runs for name, runs in methods.items() if name not in AUDITED}
            rows = {key: {name: measure(runs, "", key) for name, runs in generated.items()}
                    for key in RESPONSES}
            report[f"Responses. {dataset}, {model}"] = add_gains(rows, [])
            # what is left of the gain of `clsp`?
            names = [name for name in AUDITED if name in methods]
            rows = {f"{part} {key}".strip(): {name: measure(methods[name], part, key) for name in names}
                    for part in PARTS for key in AUDIT}
            pairs = [("clsp", name) for name in names[1:] if "clsp" in names]
            report[f"Auditor's table. {dataset}, {model}"] = add_gains(rows, pairs)
        rows = {model: worth(models, model) for model in models if {"cls", "clsp"} <= models[model].keys()}
        report[f"The person. {dataset}"] = add_gains(rows, [])
    text = "\n".join([*markdown(report), "", *sentences(report), FOOTNOTE])
    for name, content in (("tables.md", text), ("tables.json", json.dumps(report, indent=1))):
        temporary = Path(runs_dir, f"{name}.tmp")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(Path(runs_dir, name))
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables and figures of finished runs.", allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("command", choices=["tables"], help="print Tables I-III and the auditor's")
    parser.add_argument("runs_dir", help="finished runs at any depth; gets tables.md and tables.json")
    args = parser.parse_args(argv)
    try:
        print(tables(args.runs_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
