"""metrics.py: expected values come from scikit-learn, formulas, brute force or hand arithmetic."""

import itertools
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.metrics import log_loss as sklearn_log_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics

LABELS = ["anger", "joy", "love"]


def some_predictions(n=400, n_labels=5, seed=0):
    """Gold, predicted and scores (N, L) with many equal scores, and no label that never occurs."""
    generator = np.random.default_rng(seed)
    scores = generator.random((n, n_labels)).round(2)
    gold = generator.random((n, n_labels)) < scores**2
    return gold, scores >= 0.5, scores


# ---- F1 ----


def test_f1_equals_sklearn_with_labels_absent_on_one_side_and_on_both():
    """[metric.F1], [choice.E4]: torchmetrics differs on labels absent on both sides (torchmetrics#2198)."""
    gold, predicted, _ = some_predictions()
    gold[:, 0] = predicted[:, 0] = False
    gold[:, 1] = False
    predicted[:, 2] = False
    per_label = f1_score(gold, predicted, average=None, zero_division=0)
    assert metrics.f1_per_label(gold, predicted) == pytest.approx(per_label)
    assert metrics.f1_macro(gold, predicted) == pytest.approx(per_label.mean())
    assert metrics.f1_micro(gold, predicted)[0] == pytest.approx(f1_score(gold, predicted, average="micro"))
    assert metrics.f1_macro(gold, gold & False) == 0.0


def test_f1_by_hand():
    gold = np.array([[1, 1], [1, 0], [0, 0]], bool)
    predicted = np.array([[1, 0], [0, 0], [1, 0]], bool)  # first label TP 1, FP 1, FN 1; second label FN 1
    assert metrics.f1_per_label(gold, predicted).tolist() == [0.5, 0.0]
    assert metrics.f1_macro(gold, predicted) == 0.25
    assert metrics.f1_micro(gold, predicted)[0] == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))


def test_f1_of_a_user_equals_sklearns_micro_f1_over_the_users_annotations():
    gold, predicted, _ = some_predictions()
    user_index = np.random.default_rng(1).integers(7, size=len(gold))
    ours = metrics.f1_micro(gold, predicted, user_index, 8)
    for user in range(7):
        own = user_index == user
        assert ours[user] == pytest.approx(f1_score(gold[own], predicted[own], average="micro"))
    assert ours[7] == 0.0  # a user without annotations


# ---- Scores ----


def test_thresholds_reach_the_best_f1_of_every_possible_cut():
    """[choice.E1]: one threshold per label, tuned where the paper has 0.5; against trying every cut."""
    gold, _, scores = some_predictions(n=60, n_labels=12)
    gold[:, 4] = False
    thresholds = metrics.tune_thresholds(gold, scores)
    assert thresholds[4] == 0.5
    for label in set(range(12)) - {4}:
        brute = max(f1_score(gold[:, label], scores[:, label] >= cut) for cut in scores[:, label])
        assert f1_score(gold[:, label], scores[:, label] >= thresholds[label]) == pytest.approx(brute)
    names, thresholds[0] = [f"l{k}" for k in range(12)], scores[7, 0]  # and evaluate uses them, with equality
    rows = [row(n, 0, [names[k] for k in np.flatnonzero(own)], [], scores[n].tolist())
            for n, own in enumerate(gold)]
    expected = f1_score(gold, scores >= thresholds, average="macro", zero_division=0)
    assert metrics.evaluate(rows, names, thresholds)["f1_macro_tuned"] == pytest.approx(expected)


def test_of_equally_good_thresholds_the_highest_is_taken_halfway_between_scores():
    gold = np.array([[1], [0], [0], [1]], bool)
    scores = np.array([[0.9], [0.7], [0.5], [0.3]])  # F1 from the top: 2/3, 1/2, 2/5, 2/3
    assert metrics.tune_thresholds(gold, scores) == pytest.approx([0.8])
    assert (metrics.tune_thresholds(gold, scores) == metrics.tune_thresholds(gold[::-1], scores[::-1])).all()


@pytest.mark.parametrize("scores", [[0.0, 0.0], [1.0, 1.0], [0.3 + 1e-7, 0.3]])
def test_thresholds_separate_extreme_and_neighbouring_scores(scores):
    gold, scores = np.array([[True], [False]]), np.array(scores, np.float32)[:, None]
    f1 = f1_score(gold[:, 0], (scores >= metrics.tune_thresholds(gold, scores))[:, 0])
    assert f1 == pytest.approx(1.0 if scores[0] > scores[1] else 2 / 3)


def test_mean_average_precision_equals_sklearn_over_the_labels_that_occur():
    gold, _, scores = some_predictions()
    gold[:, 2] = False
    expected = average_precision_score(np.delete(gold, 2, axis=1), np.delete(scores, 2, axis=1))
    assert metrics.mean_average_precision(gold, scores) == pytest.approx(expected)


def test_log_loss_equals_sklearn_and_stays_finite_for_certain_mistakes():
    gold, _, scores = some_predictions()
    scores = scores.clip(0.01, 0.99)
    expected = np.mean([sklearn_log_loss(gold[:, label], scores[:, label]) for label in range(5)])
    assert metrics.log_loss(gold, scores) == pytest.approx(expected)
    assert metrics.log_loss(np.array([[True]]), np.array([[0.0]])) == pytest.approx(-np.log(1e-7))


# ---- Intervals ----


def interval(samples):
    return np.quantile(samples, (0.025, 0.975))


def resample_f1(counts, **arguments):
    return metrics.f1_from_counts(metrics.resample(counts, **arguments)).mean(axis=1)


def test_resampled_f1_equals_a_plain_loop_that_repeats_the_annotations_of_drawn_texts():
    gold, predicted, _ = some_predictions(n=120)
    text_index = np.random.default_rng(3).integers(40, size=120)
    ours = resample_f1(metrics.count(gold, predicted, text_index, 40), resamples=7, seed=5)
    generator, expected = np.random.default_rng(5), []
    for _ in range(7):
        texts = generator.integers(40, size=40)
        rows = np.concatenate([np.flatnonzero(text_index == text) for text in texts])
        expected.append(f1_score(gold[rows], predicted[rows], average="macro", zero_division=0))
    assert ours == pytest.approx(expected, abs=1e-6)


def test_the_interval_is_as_wide_as_the_spread_over_fresh_texts():
    """Annotations of a text are copies here, so an interval over annotations would be half as wide."""
    generator, fresh = np.random.default_rng(0), []
    for _ in range(200):
        gold = (generator.random((150, 2)) < 0.5).repeat(4, axis=0)
        predicted = gold ^ (generator.random((150, 2)) < 0.3).repeat(4, axis=0)
        fresh.append(metrics.f1_macro(gold, predicted))
    counts = metrics.count(gold, predicted, np.arange(600) // 4, 150)
    low, high = interval(resample_f1(counts))
    assert low < metrics.f1_macro(gold, predicted) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(fresh), rel=0.25)


def test_a_paired_gain_is_narrower_than_an_unpaired_one():
    generator = np.random.default_rng(0)
    gold = generator.random((600, 4)) < 0.3
    baseline = gold ^ (generator.random((600, 4)) < 0.3)
    better = np.where(generator.random((600, 4)) < 0.1, gold, baseline)
    counts = [metrics.count(gold, way, np.arange(600), 600) for way in (better, baseline)]
    paired = interval(metrics.gain(*map(resample_f1, counts)))
    unpaired = interval(metrics.gain(resample_f1(counts[0]), resample_f1(counts[1], seed=1)))
    assert paired[1] - paired[0] < 0.6 * (unpaired[1] - unpaired[0])


# ---- The person alone ----


def pairs_by_brute_force(gold, scores, text_index, user_index):
    """{label: [1, 1/2 or 0 for each pair of users of a text who differ]}."""
    found = {label: [] for label in range(gold.shape[1])}
    for i, j in itertools.permutations(range(len(gold)), 2):
        if text_index[i] == text_index[j] and user_index[i] != user_index[j]:
            for label in np.flatnonzero(gold[i] & ~gold[j]):
                above = scores[i, label] - scores[j, label]
                found[label].append(1.0 if above > 0 else 0.5 if above == 0 else 0.0)
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_disagreement_auc_equals_every_pair_compared(n, n_texts, n_users, seed):
    """[choice.E7]; with ties, users who annotate a text twice, texts of one user, labels nobody chose."""
    generator = np.random.default_rng(seed)
    gold, scores = generator.random((n, 4)) < (0, 0.2, 0.5, 1), generator.random((n, 4)).round(1)
    texts, users = generator.integers(n_texts, size=n), generator.integers(n_users, size=n)
    found = pairs_by_brute_force(gold, scores, texts, users)
    expected = [sum(found.values(), []), *found.values()]
    counts = metrics.count_disagreements(gold, scores, texts, users)  # a pair counts twice
    assert (counts[:, 0].sum(axis=0) / 2).tolist() == [*map(len, found.values())]
    assert metrics.auc_from_counts(counts.sum(axis=0)) == pytest.approx(
        [np.mean(own) if own else np.nan for own in expected], nan_ok=True)
    assert metrics.disagreement_auc(gold, scores, texts, users) == pytest.approx(
        np.mean(expected[0]) if expected[0] else np.nan, nan_ok=True)


def test_disagreement_auc_by_hand():
    """Text 1: anger .3 against .1 and joy .9 against .8 are right; text 2: joy .4 against .1 and love .7
    against .2; text 3: anger is a tie, love .6 against .2 is right."""
    rows = scored_rows()
    rows[4]["scores"][0] = rows[5]["scores"][0] = 0.1
    result = metrics.evaluate(rows, LABELS)
    assert result["n_disagreements"] == 6
    assert result["disagreement_auc"] == pytest.approx(5.5 / 6)
    assert result["disagreement_auc_per_label"] == {"anger": 0.75, "joy": 1.0, "love": 1.0}
    low, high = result["disagreement_auc_interval"]
    assert 0.75 <= low < 5.5 / 6 < high <= 1.0
    assert result["disagreement_auc_per_user"] == pytest.approx({"4": 5.5 / 6, "37": 5.5 / 6})


def test_a_model_without_the_person_has_exactly_a_half_and_generated_labels_are_ordered_by_the_decision():
    rows = scored_rows()
    for one, other in zip(rows[::2], rows[1::2]):
        other["scores"] = one["scores"]
    result = metrics.evaluate(rows, LABELS)
    assert result["disagreement_auc"] == 0.5 and result["disagreement_auc_interval"] == [0.5, 0.5]
    generated = [{key: value for key, value in row.items() if key != "scores"} for row in scored_rows()]
    # decided: joy and joy (tie, tie), love and nothing (tie, right), nothing and love (tie, right)
    assert metrics.evaluate(generated, LABELS)["disagreement_auc"] == pytest.approx((4 * 0.5 + 2) / 6)


def test_without_two_users_who_differ_there_is_no_disagreement_auc():
    rows = scored_rows()
    for k, own in enumerate(rows):
        own["text_id"] = f"t{k}"
    result = metrics.evaluate(rows, LABELS)
    assert result["disagreement_auc"] is None and result["n_disagreements"] == 0
    assert result["disagreement_auc_per_label"] == dict.fromkeys(LABELS)
    twice = [dict(own, text_id="t", user_id=7) for own in rows]
    assert metrics.evaluate(twice, LABELS)["disagreement_auc"] is None


def test_resampled_disagreement_auc_is_that_of_the_drawn_texts_and_paired_with_f1():
    gold, _, scores = some_predictions(n=120)
    generator = np.random.default_rng(3)
    texts, users = generator.integers(40, size=120), generator.integers(6, size=120)
    counts = metrics.sum_by_group(metrics.count_disagreements(gold, scores, texts, users), texts, 40)
    ours = metrics.auc_from_counts(metrics.resample(counts, resamples=3, seed=5))[:, 0]
    generator, expected = np.random.default_rng(5), []
    for _ in range(3):
        drawn = [np.flatnonzero(texts == text) for text in generator.integers(40, size=40)]
        again = np.repeat(np.arange(40), [len(own) for own in drawn])  # a text drawn twice is two texts
        rows = np.concatenate(drawn)
        expected.append(metrics.disagreement_auc(gold[rows], scores[rows], again, users[rows]))
    assert ours == pytest.approx(expected, abs=1e-6)


def test_disagreement_auc_of_many_annotations_takes_seconds():
    """200,000 annotations with 28 labels, a thousand of each text: 10^8 pairs. Processor time, bound 20 s."""
    generator = np.random.default_rng(0)
    gold, scores = generator.random((200_000, 28)) < 0.1, generator.random((200_000, 28), np.float32)
    texts, users = generator.integers(200, size=200_000), generator.integers(5000, size=200_000)
    started = time.process_time()
    assert metrics.disagreement_auc(gold, scores, texts, users) == pytest.approx(0.5, abs=0.01)
    assert time.process_time() - started < 20


# ---- The paper ----


def paper_gains():
    return {(dataset, model, own): metrics.gain(scores[own][column], scores[base][column])
            for column, dataset in enumerate(metrics.DATASETS) for model, scores in metrics.PAPER.items()
            for own, base in metrics.BASELINE_OF.items() if {own, base} <= scores.keys()}


def test_table_iii_gains_recompute_from_its_own_scores():
    """[metric.gain], section VII; the values are Table III's last column."""
    printed = {("goemotions", "flan-t5"): 39.95, ("goemotions", "mistral"): 64.14,
               ("unhealthy", "flan-t5"): 54.06, ("unhealthy", "mistral"): 128.70}
    for place, value in printed.items():
        assert paper_gains()[(*place, "clsp")] == pytest.approx(value, abs=0.005)


def test_the_papers_up_to_165_percent_is_stablelm_with_a_head_on_unhealthy_conversations():
    """[choice.E6]: the largest gain of Tables I to III is +164.07%, from 16.92 to 44.68."""
    gains = paper_gains()
    largest = max(gains, key=gains.get)
    assert largest == ("unhealthy", "stablelm", "clsp")
    assert gains[largest] == pytest.approx(164.07, abs=0.005)
    cells = [{"paper": score} for score in (44.68, 16.92)]
    assert metrics.compare(*cells)["paper"] == pytest.approx(164.07, abs=0.005)


def test_every_row_of_the_papers_tables_has_its_values():
    """Only Table II's LM-P has dashes: Flan-T5 and the two GPT models."""
    missing = {(table, model, method) for table, (models, methods) in metrics.TABLES.items()
               for model in models for method in methods if method not in metrics.PAPER[model]}
    assert missing == {("II", model, "lmp") for model in ("flan-t5", "gpt-3.5-turbo", "gpt-4")}
    assert sum(map(len, metrics.PAPER.values())) == 26


# ---- Baselines ----


def test_always_all_predicts_every_label_and_user_frequencies_are_smoothed_towards_everyones():
    train = np.array([[1, 0], [1, 0], [0, 1], [0, 0]], bool)  # user 0 has the first two; everyone's: 1/2, 1/4
    scores = metrics.user_frequencies(train, np.array([0, 0, 1, 1]), np.array([2, 0]), 3, smoothing=2.0)
    assert scores == pytest.approx(np.array([[0.5, 0.25], [(2 + 1) / 4, 0.5 / 4]]))
    assert metrics.always_all(2, 3).tolist() == [[True] * 3] * 2


def test_user_bias_equals_sklearns_regularised_intercept_where_the_logits_are_zero():
    """A constant feature of 1 and C = 1 / l2 is the same problem."""
    generator = np.random.default_rng(0)
    labels, user_index = generator.random((90, 2)) < [0.2, 0.7], np.arange(90) % 3
    ours = metrics.fit_user_bias(np.zeros((90, 2)), labels, user_index, n_users=3, l2=0.5)
    for user in range(3):
        for label in range(2):
            y = labels[user_index == user, label]
            model = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-10).fit(np.ones((len(y), 1)), y)
            assert ours[user, label] == pytest.approx(model.coef_[0, 0], abs=1e-5)


@pytest.mark.parametrize("l2", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_user_bias_minimises_the_regularised_log_loss(scale, l2):
    """At the minimum l2 b = sum (label - probability), also where the logits are wrong and far out."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(-scale, scale, (200, 3)), generator.random((200, 3)) < 0.5
    labels[:, 2] = True
    user_index = generator.choice([0, 1, 3], size=200)
    bias = metrics.fit_user_bias(logits, labels, user_index, n_users=4, l2=l2)
    assert (bias[2] == 0).all()
    residual = np.zeros((4, 3))
    np.add.at(residual, user_index, labels - 1 / (1 + np.exp(-(logits + bias[user_index]))))
    assert residual == pytest.approx(l2 * bias, abs=1e-4)


# ---- Evaluation of a predictions file ----


def row(text_id, user_id, gold, predicted, scores):
    return {"text_id": text_id, "user_id": user_id, "prompt": "", "gold": gold, "predicted": predicted,
            "scores": scores}


def scored_rows():
    """Six annotations of three texts by two users, with scores."""
    return [
        row("t1", 4, ["joy"], ["joy"], [0.1, 0.9, 0.4]),
        row("t1", 37, ["anger"], ["joy"], [0.3, 0.8, 0.1]),
        row("t2", 4, ["joy", "love"], ["love"], [0.2, 0.4, 0.7]),
        row("t2", 37, [], [], [0.1, 0.1, 0.2]),
        row("t3", 4, ["anger"], [], [0.4, 0.1, 0.2]),
        row("t3", 37, ["love"], ["love"], [0.1, 0.2, 0.6]),
    ]


def test_evaluate_by_hand():
    result = metrics.evaluate(scored_rows(), LABELS, thresholds=None, unseen_users=None)
    assert result["f1_per_label"] == pytest.approx({"anger": 0.0, "joy": 0.5, "love": 1.0})
    assert result["f1_macro"] == pytest.approx(0.5)
    assert (result["n_annotations"], result["n_texts"], result["n_users"]) == (6, 3, 2)
    assert result["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 3))
    assert result["f1_per_user"] == pytest.approx({"4": 2 * 2 / (4 + 0 + 2), "37": 2 * 1 / (2 + 1 + 1)})
    assert result["f1_user_mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["f1_user_quantiles"]["50%"] == result["f1_user_mean"]
    assert "f1_macro_tuned" not in result and "share_empty_answers" not in result
    tuned = metrics.evaluate(scored_rows(), LABELS, thresholds=np.array([0.25, 0.5, 0.5]))
    assert tuned["f1_macro"] == result["f1_macro"] and tuned["thresholds"] == [0.25, 0.5, 0.5]
    assert tuned["f1_macro_tuned"] == pytest.approx((1.0 + 0.5 + 1.0) / 3)  # anger: 0.3 and 0.4 are found
    json.dumps(tuned, allow_nan=False)


def test_evaluate_reports_users_held_out_of_training_apart():
    rows = scored_rows()
    result = metrics.evaluate(rows, LABELS, thresholds=[0.25, 0.5, 0.5], unseen_users={"37"})
    for part, user in (("seen", 4), ("unseen", 37)):
        own = [row for row in rows if row["user_id"] == user]
        assert result[part] == metrics.evaluate(own, LABELS, [0.25, 0.5, 0.5])
    assert "unseen" not in metrics.evaluate(rows, LABELS, unseen_users=["99"])


def test_evaluate_counts_what_responses_do_not_answer():
    responses = [(["joy"], "joy, fury", ["fury"]), ([], " \n", []), ([], "a, b", ["a", "b"])]
    rows = [{"text_id": 1, "user_id": 1, "gold": ["joy"], "predicted": predicted, "response": response,
             "not_understood": words} for predicted, response, words in responses]
    result = metrics.evaluate(rows, LABELS)
    assert result["share_not_understood"] == pytest.approx(3 / 4)
    assert result["share_empty_answers"] == pytest.approx(1 / 3)
    assert "log_loss" not in result


@pytest.mark.parametrize("n_labels", [1, 3])
def test_annotations_without_a_label_count_as_scikit_learn_counts_them(n_labels):
    """87% of a hate-speech file has no label: dropped, F1 was 1.0000 for a model that had learned nothing."""
    names, generator = LABELS[:n_labels], np.random.default_rng(0)
    gold = generator.random((400, n_labels)) < 0.13 / n_labels
    for predicted in (gold, gold & False, gold | True, generator.random(gold.shape) < 0.3):
        chosen = [[[names[k] for k in np.flatnonzero(own)] for own in side] for side in (gold, predicted)]
        rows = [row(f"t{n // 4}", n % 4, own, guess, predicted[n].astype(float).tolist())
                for n, (own, guess) in enumerate(zip(*chosen, strict=True))]
        result = metrics.evaluate(rows, names, thresholds=[0.5] * n_labels)
        for average in ("macro", "micro"):
            expected = (f1_score(gold, predicted, average=average, zero_division=0) if n_labels > 1
                        else f1_score(gold[:, 0], predicted[:, 0], zero_division=0))  # of the label itself
            assert result[f"f1_{average}"] == pytest.approx(expected)
        assert result["f1_macro_tuned"] == result["f1_macro"]
        assert result["n_annotations"] == 400 and result["n_texts"] == 100


def test_a_user_without_a_label_on_either_side_has_no_f1_and_is_no_part_of_the_mean():
    rows = [row("t1", "a", ["joy"], ["joy"], [0, 1, 0]), row("t1", "b", [], [], [0, 0, 0]),
            row("t2", "c", [], ["joy"], [0, 1, 0]), row("t2", "d", ["love"], [], [0, 0, 0])]
    result = metrics.evaluate(rows, LABELS)
    assert result["f1_per_user"] == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}
    assert result["f1_user_mean"] == pytest.approx(1 / 3) and result["n_users"] == 4
    assert metrics.evaluate(rows[1:2], LABELS)["f1_user_mean"] == 0.0


def test_an_answered_none_is_understood_and_not_empty():
    rows = [{"text_id": k, "user_id": 1, "gold": [], "predicted": predicted, "response": response,
             "not_understood": lost, "none": none}
            for k, (predicted, response, lost, none) in enumerate([
                ([], "none", [], True), ([], "", [], False), (["joy"], "joy", [], False),
                ([], "hm", ["hm"], False)])]
    result = metrics.evaluate(rows, LABELS)
    assert result["share_empty_answers"] == 1 / 4 and result["share_not_understood"] == 1 / 3


def test_texts_are_grouped_by_the_text_where_the_text_id_numbers_the_rows():
    """360 rows of 30 texts had the interval of 360 texts."""
    generator, rows = np.random.default_rng(0), []
    for n in range(360):
        gold = ["joy"] if n % 30 < 15 else []
        rows.append(row(n, n % 12, gold, gold if generator.random() < 0.7 else ["love"], [0.1, 0.2, 0.3]))
    of_text = [own | {"text_hash": f"{n % 30:016x}"} for n, own in enumerate(rows)]
    assert metrics.evaluate(of_text, LABELS)["n_texts"] == 30
    assert metrics.evaluate(rows, LABELS)["n_texts"] == 360
    index = metrics.to_arrays(of_text, LABELS).text_index
    assert len({*zip(index.tolist(), [n % 30 for n in range(360)])}) == 30
    with_ids = [own | {"text_id": f"id {n % 30}"} for n, own in enumerate(rows)]  # files old and new
    new = [own | {"text_hash": f"{n * 7 % 30:016x}"} for n, own in enumerate(with_ids)]
    assert (metrics.to_arrays(with_ids, LABELS).text_index == metrics.to_arrays(new, LABELS).text_index).all()


def test_tables_show_users_who_are_not_in_train_apart(tmp_path):
    for method in ("lm", "lmp", "q0s"):
        result = write_run(tmp_path / method, method, "mistral", flip=0.3)  # user 2 is unseen
        for number in ("I", "II"):
            rows = metrics.tables(tmp_path) and table(tmp_path, f"Table {number}. goemotions")
            for part in ("seen", "unseen"):
                if method in rows["mistral"]:
                    assert rows[f"mistral, {part} users"][method]["value"] == 100 * result[part]["f1_macro"]
    assert result["unseen"]["n_users"] == 1 and result["seen"]["n_users"] == 2


@pytest.mark.parametrize("key, value, message", [
    ("gold", ["envy"], "envy"), ("predicted", ["Joy"], "Joy"), ("gold", "joy", "labels"),
    ("scores", [0.1, 0.2], "shape"), ("scores", [0.1, 0.2, 1.5], "scores"),
    ("scores", [0.1, 0.2, float("nan")], "scores"),
])
def test_a_row_that_does_not_fit_the_labels_is_refused(key, value, message):
    rows = scored_rows()
    rows[2][key] = value
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(rows, LABELS)


# ---- Tables of finished runs ----


def write_run(path, method, model, flip, dataset="goemotions", seed=42, note=None, n_texts=60, baselines=None,
              **more):
    """A finished run on 3 annotations per text, wrong with probability `flip`; returns its metrics."""
    path.mkdir(parents=True)
    gold = np.random.default_rng(0).random((3 * n_texts, 3)) < 0.4
    mistakes = np.random.default_rng(seed).random(gold.shape) < flip
    scores = np.where(gold ^ mistakes, 0.8, 0.3)
    names = [[LABELS[k] for k in np.flatnonzero(line)] for line in [*gold, *(scores >= 0.5)]]
    rows = [row(n // 3, n % 3, names[n], names[len(gold) + n], scores[n].tolist()) for n in range(len(gold))]
    result = metrics.evaluate(rows, LABELS, thresholds=[0.5] * 3, unseen_users=[2])
    arguments = {"method": method, "model": model, "dataset": dataset, "seed": seed, "out": str(path), **more}
    (path / "run.json").write_text(json.dumps({"arguments": arguments, "versions": {}, "note": note}))
    (path / "predictions_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = [{"step": k, "loss": 1 / k} for k in range(1, 30)] + [{"step": 29, "val_loss": 0.2}]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (path / "baselines_test.json").write_text(json.dumps(baselines or {}))
    seal(path, result)
    return result


def seal(path, result):
    """Writes the metrics of a run, with the checksums of its files as they are."""
    sums = metrics.checksums(path, "test", result)
    (path / "metrics_test.json").write_text(json.dumps(result | {"sha256": sums}))


def table(runs_dir, title):
    """The rows of one table of tables.json."""
    return json.loads((runs_dir / "tables.json").read_text())[title]


def test_a_cell_stands_beside_the_papers_and_a_missing_one_says_not_run(tmp_path):
    cls = write_run(tmp_path / "mistral" / "cls", "cls", "mistral", flip=0.3)
    clsp = write_run(tmp_path / "mistral" / "clsp", "clsp", "mistral", flip=0.1)
    text = metrics.tables(tmp_path)
    assert text == (tmp_path / "tables.md").read_text()
    row = table(tmp_path, "Table III. goemotions")["mistral"]
    assert row["cls"]["value"] == pytest.approx(100 * cls["f1_macro"]) and row["cls"]["paper"] == 26.77
    assert row["cls"]["interval"][0] < row["cls"]["value"] < row["cls"]["interval"][1]
    change = row["clsp over cls [%]"]
    assert change["value"] == pytest.approx(100 * (clsp["f1_macro"] / cls["f1_macro"] - 1))
    assert 0 < change["interval"][0] < change["value"] < change["interval"][1]
    assert change["paper"] == pytest.approx(64.14, abs=0.005)
    assert (row["n"]["text"], row["seeds"]["text"]) == ("180", "42")
    assert "| phi-2 | not run (paper 28.99) | not run (paper 32.87) |" in text
    assert "| - (paper +13.38) |" in text and "| gpt-4, shut down 2026-10-23 | not run (paper 26.74)" in text


def test_synthetic_runs_never_stand_beside_the_papers_values(tmp_path):
    write_run(tmp_path / "tiny", "cls", "/tiny/mistral", flip=0.3, note="synthetic, tiny")
    assert "(paper" not in metrics.tables(tmp_path)
    write_run(tmp_path / "real", "cls", "mistral", flip=0.2)
    metrics.tables(tmp_path)
    assert "paper" not in table(tmp_path, "Table III. goemotions (synthetic, tiny)")["mistral"]["cls"]
    assert table(tmp_path, "Table III. goemotions")["mistral"]["cls"]["paper"] == 26.77


@pytest.mark.parametrize("difference", [
    {"model": "/models/mistral"}, {"limit": [100]}, {"max_steps": 5}, {"dataset": "/data/goemotions.csv"}])
def test_other_models_data_and_shortened_runs_do_not_stand_beside_the_papers_values(tmp_path, difference):
    write_run(tmp_path / "run", flip=0.2, **{"method": "cls", "model": "mistral"} | difference)
    text = metrics.tables(tmp_path)
    assert "Table III. goemotions (not the setting of the paper)" in text and "| mistral |" in text
    assert "(paper" not in text


def test_seeds_of_one_setting_are_averaged_and_their_range_is_shown(tmp_path):
    """[choice.T11]; a resample draws texts and seeds, so the interval holds both. Tolerance 1 point of F1."""
    runs = [write_run(tmp_path / str(n), "cls", "mistral", 0.3, seed=n)["f1_macro"] for n in (1, 2, 3)]
    text = metrics.tables(tmp_path)
    row = table(tmp_path, "Table III. goemotions")["mistral"]
    assert row["cls"]["value"] == pytest.approx(100 * np.mean(runs))
    samples, chance = [], np.random.default_rng(7)
    for n in (1, 2, 3):
        own = metrics.to_arrays(metrics.read_predictions(tmp_path / f"{n}/predictions_test.jsonl"), LABELS)
        of_texts = metrics.count(own.gold, own.predicted, own.text_index, len(own.text_ids))
        samples.append(100 * resample_f1(of_texts, seed=8))
    drawn = [np.mean([samples[chance.integers(3)][k] for _ in range(3)]) for k in range(1000)]
    assert row["cls"]["interval"] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=1)
    assert row["cls"]["interval"][0] < row["cls"]["value"] < row["cls"]["interval"][1]
    assert (row["seeds"]["text"], row["n"]["text"]) == ("1, 2, 3", "180")
    assert f"seeds {100 * min(runs):.2f}..{100 * max(runs):.2f}" in text


def test_gains_are_paired_over_texts_and_seeds(tmp_path):
    """Two methods with the same predictions in every seed: no resample of the gain differs from 0."""
    for seed, method in ((1, "cls"), (2, "cls"), (1, "clsp"), (2, "clsp")):
        write_run(tmp_path / f"{method}{seed}", method, "mistral", 0.1 + 0.1 * seed, seed=seed)
    metrics.tables(tmp_path)
    assert table(tmp_path, "Table III. goemotions")["mistral"]["clsp over cls [%]"]["interval"] == [0, 0]


def test_a_value_differs_if_the_papers_is_not_in_its_interval(tmp_path):
    write_run(tmp_path / "cls", "cls", "mistral", 0.2)
    assert "(paper 26.77, differs)" in metrics.tables(tmp_path)
    cell = {"value": 27.0, "interval": [26.0, 28.0], "paper": 26.77}
    assert metrics.format_cell(cell) == "27.00 [26.00, 28.00] (paper 26.77)"


def test_generated_text_has_a_table_of_what_was_not_understood_and_of_seconds(tmp_path):
    write_run(tmp_path / "lm", "lm", "mistral", 0.3)
    result = json.loads((tmp_path / "lm" / "metrics_test.json").read_text())
    result.pop("sha256")
    result |= {"share_not_understood": 0.25, "share_empty_answers": 0.0, "seconds": 61.0}
    seal(tmp_path / "lm", result)
    metrics.tables(tmp_path)
    rows = table(tmp_path, "Responses. goemotions, mistral")
    assert {name: row["lm"]["value"] for name, row in rows.items()} == {
        "share_not_understood": 25, "share_empty_answers": 0, "seconds": 61}


def test_another_recipe_is_another_row_and_not_another_seed(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"lmp{seed}", "lmp", "mistral", 0.3, seed=seed, quantize="nf4")
    write_run(tmp_path / "other", "lmp", "mistral", 0.3, seed=3, quantize="none")
    write_run(tmp_path / "constrained", "lm", "mistral", 0.3, seed=4, constrain=True)
    for n, source in enumerate(("paper", "released")):
        write_run(tmp_path / f"q{n}", "q0s", "mistral", 0.3, follow={"E2": source, "T1": "paper"})
    metrics.tables(tmp_path)
    rows = table(tmp_path, "Table I. goemotions")
    assert rows["mistral"]["lmp"]["seeds"] == [1, 2] and rows["mistral"]["lmp"]["paper"] == 34.52
    assert rows["mistral (quantize none)"]["lmp"]["seeds"] == [3]
    assert rows["mistral (constrain True)"]["lm"]["seeds"] == [4]
    assert "paper" not in rows["mistral (constrain True)"]["lm"]
    assert "mistral (follow E2 released)" in table(tmp_path, "Table II. goemotions")


def test_runs_on_other_annotations_have_no_gain(tmp_path):
    write_run(tmp_path / "cls", "cls", "mistral", 0.3, n_texts=60)
    write_run(tmp_path / "clsp", "clsp", "mistral", 0.1, n_texts=50)
    metrics.tables(tmp_path)
    change = table(tmp_path, "Table III. goemotions")["mistral"]["clsp over cls [%]"]
    assert change.keys() == {"paper"}


def test_the_auditors_table_compares_with_baselines_and_for_unseen_users(tmp_path):
    """A baseline that predicts what `cls` does is compared with as `cls` is, interval included."""
    same = write_run(tmp_path / "same", "cls", "smol", 0.3, "x/convabuse.csv")
    rows = metrics.read_predictions(tmp_path / "same" / "predictions_test.jsonl")
    baselines = {"user_bias": same | {"scores": [row["scores"] for row in rows]}}
    shutil.rmtree(tmp_path / "same")
    cls = write_run(tmp_path / "cls", "cls", "smol", 0.3, "x/convabuse.csv", baselines=baselines)
    clsp = write_run(tmp_path / "clsp", "clsp", "smol", 0.1, "x/convabuse.csv")
    metrics.tables(tmp_path)
    rows = table(tmp_path, "Auditor's table. convabuse (not the setting of the paper), smol")
    left = rows["unseen f1_macro_tuned"]["clsp over cls [%]"]
    expected = clsp["unseen"]["f1_macro_tuned"] / cls["unseen"]["f1_macro_tuned"] - 1
    assert left["value"] == pytest.approx(100 * expected)
    assert left["interval"][0] < left["value"] < left["interval"][1]
    assert all(row["clsp over user_bias [%]"] == row["clsp over cls [%]"] for row in rows.values())
    assert "always_all" not in rows["f1_macro"]
    auc, loss = rows["disagreement_auc"], rows["log_loss"]["clsp"]  # a difference in points; nats as they are
    points = 100 * (clsp["disagreement_auc"] - cls["disagreement_auc"])
    assert auc["clsp over cls [%]"]["value"] == pytest.approx(points)
    assert metrics.format_cell(auc["clsp over cls [%]"], "+").endswith(" points")
    assert loss["value"] == clsp["log_loss"] and metrics.format_cell(loss) == f"{clsp['log_loss']:.4f}"


def test_what_the_person_is_worth_stands_in_one_row_with_three_sentences(tmp_path):
    """Intervals wholly above 0 support a claim, wholly below contradict it, others tell nothing."""
    rows = {}
    for method, flip in (("cls", 0.3), ("clsp", 0.1)):
        rows[method] = write_run(tmp_path / method, method, "smol", flip, "x/convabuse.csv")
    write_run(tmp_path / "held/cls", "cls", "smol", 0.1, "x/convabuse.csv", unseen_users=0.1)
    write_run(tmp_path / "held/clsp", "clsp", "smol", 0.3, "x/convabuse.csv", unseen_users=0.1)
    text = metrics.tables(tmp_path)
    person = table(tmp_path, "The person. convabuse (not the setting of the paper)")["smol"]
    for column, key in (("at 0.5 [%]", "f1_macro"), ("tuned [%]", "f1_macro_tuned")):
        expected = metrics.gain(rows["clsp"][key], rows["cls"][key])
        assert person[column]["value"] == pytest.approx(expected)
    assert person["auc clsp"]["value"] == pytest.approx(100 * rows["clsp"]["disagreement_auc"])
    assert person["unseen [%]"]["value"] < 0 < person["tuned [%]"]["value"]  # of the run with users held out
    lines = [line for line in text.splitlines() if ", smol: " in line]
    assert ["supported" in lines[0], "not measured" in lines[1], "contradicted" in lines[2]] == [True] * 3
    person["tuned [%]"]["interval"] = [-1, 1]
    assert "cannot be told" in next(metrics.sentences({"The person. x": {"smol": person}}))


# ---- The command line ----


def one_line_of_error(capsys, *arguments):
    assert metrics.main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_missing_directory_and_one_without_runs_are_one_line_and_exit_2(tmp_path, capsys):
    assert "nowhere" in one_line_of_error(capsys, "tables", tmp_path / "nowhere")
    assert "no finished run" in one_line_of_error(capsys, "tables", tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("run.json", "{", "run.json"), ("predictions_test.jsonl", "", "predictions_test.jsonl"),
    ("baselines_test.json", "nope", "baselines_test.json"), ("metrics_test.json", "[]", "TypeError"),
    ("metrics_test.json", "{}", "KeyError"), ("metrics_test.json", '{"sha256": {}}', "figures"),
])
def test_a_malformed_file_of_a_run_is_one_line_and_exit_2(tmp_path, capsys, name, content, message):
    write_run(tmp_path / "run", "cls", "mistral", 0.3)
    (tmp_path / "run" / name).write_text(content)
    error = one_line_of_error(capsys, "tables", tmp_path)
    assert message in error and str(tmp_path / "run") in error
    assert not (tmp_path / "tables.md").exists()


@pytest.mark.parametrize("arguments", [["tables"], ["table", "runs"], ["tables", "runs", "--figures"], []])
def test_unknown_or_abbreviated_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        metrics.main(arguments)
    assert stop.value.code == 2
