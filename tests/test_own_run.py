"""From a run on an own file to a file of predictions: complete runs, peft, merged models, patience, context.

    python -m pytest -q tests/test_own_run.py
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import f1_score

import data
import infer
import lora
import metrics
import train
from prompts import METHODS, build_prompt, neutral_task

AGES = {"ann": "18-24", "bob": "35-39", "cat": "35-39", "dan": "60+"}
TEXTS = ["so {braces} ### \u2028 and more", 'a "quoted"\nline', "tab\there; semicolon, comma", "overjoyed"]


def write_own(path, texts, users=tuple(AGES), labels=True):
    """A file of every user's labels for every text, under column names of its own."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["comment", "worker", "age", "country", *["funny", "rude"] * labels])
        for k, text in enumerate(texts):
            writer.writerows([text, user, AGES.get(user, "18-24"), "NL", *[k % 2, int(user < "c")] * labels]
                             for user in users)
    return path


def command(tiny_dir, own, out, *more, method="clsp", model="mistral"):
    words = f"--method {method} --model {tiny_dir}/models/{model} --dataset {own} --out {out} --dtype fp32"
    words += " --columns text=comment user_id=worker --labels funny rude --quantize none --batch_size 16"
    return [*f"{words} --max_steps 6 --validations 3 --learning_rate 1e-2".split(), *map(str, more)]


@pytest.fixture(scope="module")
def runs(tiny_dir, tmp_path_factory):
    """{method: a finished run in another folder than that of training, its file gone}, with --context age."""
    place = tmp_path_factory.mktemp("own")
    own = write_own(place / "own.csv", [f"text {k} {word}" for k in range(12) for word in ("the dog", "joy")])
    for method in ("clsp", "lmp"):
        more = ["--context", "age"]
        assert train.main(command(tiny_dir, own, place / "a" / method, *more, method=method)) == 0
    shutil.copy(own, place / "kept.csv")
    own.unlink()
    return {method: (place / "a" / method).rename(place / method) for method in ("clsp", "lmp")}


def predict(run, tmp_path, given, *more, name="out.csv"):
    """The rows of the output."""
    out = tmp_path / name
    assert infer.main(["--run", str(run), "--input", str(given), "--output", str(out), *map(str, more)]) == 0
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    with open(out, newline="", encoding="utf-8") as file:
        return [{key: own if key in ("user_id", "text", "response") or own == "" else float(own)
                 for key, own in row.items()} for row in csv.DictReader(file)]


def one_line(capsys, *arguments):
    assert infer.main([*map(str, arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


# ---- A run that is moved ----


def prompts_of(run, texts, user):
    record = infer.read_record(run)
    method = METHODS["clsp"]._replace(context=("age",))
    own = (AGES[user],)
    return ["".join(build_prompt(record["task"], method, text, user, context=own)) for text in texts]


def test_a_moved_run_without_its_file_predicts_the_same_through_peft_and_merged(runs, tmp_path, monkeypatch):
    """The probabilities of infer.py, peft, transformers with peft, and the merged model; tolerance 1e-5."""
    import peft

    monkeypatch.chdir(tmp_path)
    given = write_own(tmp_path / "new.csv", TEXTS, ("ann", "dan"), labels=False)
    rows = predict(runs["clsp"], tmp_path, given)
    assert [(row["text"], row["user_id"]) for row in rows] == [(t, u) for t in TEXTS for u in ("ann", "dan")]
    assert lora.main(["merge", str(runs["clsp"]), "merged"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged", padding_side="right")
    auto, run = transformers.AutoModelForSequenceClassification, runs["clsp"]
    for network in (peft.AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=2),
                    auto.from_pretrained(run, num_labels=2), auto.from_pretrained("merged")):
        network.eval().config.pad_token_id = tokenizer.pad_token_id
        for user in ("ann", "dan"):
            inputs = tokenizer(prompts_of(run, TEXTS, user), padding=True, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                logits = network(**inputs).logits
            own = [[row[f"{name}_probability"] for name in ("funny", "rude")]
                   for row in rows if row["user_id"] == user]
            assert np.abs(torch.sigmoid(logits).numpy() - own).max() < 1e-5
    assert network.config.id2label == {0: "funny", 1: "rude"}
    assert network.config.problem_type == "multi_label_classification"
    adapter = json.loads((runs["clsp"] / "adapter_config.json").read_text())
    assert "revision" in adapter and adapter["base_model_name_or_path"].startswith("/")


def test_a_moved_run_is_shown_a_text_and_says_where_its_data_should_be(runs, tmp_path, capsys):
    assert infer.main(["--run", str(runs["lmp"]), "--text", "hello", "--users", "ann"]) == 0
    assert "give --dataset with where it lies now" in one_line(capsys, "--run", runs["clsp"])
    moved = tmp_path / "renamed.csv"
    shutil.copy(runs["clsp"].parent / "kept.csv", moved)
    run = shutil.copytree(runs["clsp"], tmp_path / "run")
    assert infer.main(["--run", str(run), "--dataset", str(moved)]) == 0
    with open(moved, "a", newline="") as file:
        file.write("one more,ann,18-24,NL,0,0\r\n")
    assert "the data files are not those" in one_line(capsys, "--run", run, "--dataset", moved)
    assert infer.main(["--run", str(run), "--dataset", str(moved), "--text", "hello", "--users", "ann"]) == 0


def test_the_base_may_lie_elsewhere_if_its_weights_are_the_same(runs, tiny_dir, tmp_path, capsys):
    base = shutil.copytree(tiny_dir / "models" / "mistral", tmp_path / "base")
    arguments = ["--run", runs["clsp"], "--text", "hello", "--users", "ann", "--model"]
    assert infer.main([*map(str, arguments), str(base)]) == 0
    assert "the weights of" in one_line(capsys, *arguments, tiny_dir / "models" / "phi")
    assert lora.main(["merge", str(runs["clsp"]), str(tmp_path / "x"), f"{tiny_dir}/models/phi"]) == 2
    assert "are not those that" in capsys.readouterr().err and not (tmp_path / "x").exists()


def as_older(run, tmp_path):
    """The run as an older version wrote it: config.json without task, users, places and thresholds."""
    old = shutil.copytree(run, tmp_path / "old")
    record = json.loads((old / "run.json").read_text())
    for key in ("task", "users", "places", "thresholds"):
        record.pop(key)
    for key in ("columns", "labels", "context", "no_user_id", "clean"):
        record["arguments"].pop(key)
    record["arguments"] |= {"min_share": 0.01, "max_share": 0.6}
    (old / "run.json").unlink()
    (old / "config.json").write_text(json.dumps(record))
    result = json.loads((old / "metrics_test.json").read_text())
    result.pop("sha256")
    sums = metrics.checksums(old, "test", result)
    (old / "metrics_test.json").write_text(json.dumps(result | {"sha256": sums}))
    return old


def test_an_older_run_is_read_by_the_tables_and_predicts(tiny_dir, runs, tmp_path, capsys):
    own = runs["clsp"].parent / "kept.csv"
    assert train.main(command(tiny_dir, own, tmp_path / "new")) == 0
    old = as_older(tmp_path / "new", tmp_path)
    shutil.rmtree(tmp_path / "new")
    assert metrics.main(["tables", str(tmp_path)]) == 0
    capsys.readouterr()
    assert infer.main(["--run", str(old), "--text", "hello", "--users", "ann", "eve"]) == 0
    assert "only a guess: users eve\n" in capsys.readouterr().out
    assert lora.main(["merge", str(old), str(tmp_path / "merged")]) == 0


# ---- A file in, a file out ----


@pytest.mark.parametrize("method", ["clsp", "lmp"])
def test_all_users_are_summed_up_in_a_row_for_each_text(runs, tmp_path, method):
    given = write_own(tmp_path / "new.csv", TEXTS, ("ann",), labels=False)
    rows = predict(runs[method], tmp_path, given, "--users", "all")
    assert [row["user_id"] for row in rows] == [*AGES, "all"] * len(TEXTS)
    kind = "funny_probability" if method == "clsp" else "funny"
    for start in range(0, len(rows), 5):
        *each, together = rows[start: start + 5]
        assert together["funny"] == pytest.approx(np.mean([row["funny"] for row in each]), abs=1e-5)
        assert together[kind] == pytest.approx(np.mean([row[kind] for row in each]), abs=1e-5)
        assert together["funny_spread"] == pytest.approx(np.std([row[kind] for row in each]), abs=1e-5)
    thresholds = infer.read_record(runs["clsp"])["thresholds"]
    for row in rows if method == "clsp" else ():
        assert row["user_id"] == "all" or row["rude"] == (row["rude_probability"] >= thresholds[1])
    lines = predict(runs[method], tmp_path, given, "--users", "all", name="out.jsonl")
    assert [row["text"] for row in lines] == [text for text in TEXTS for _ in range(5)]
    assert all(row["funny"] == line["funny"] for row, line in zip(rows, lines, strict=True))


def test_labels_in_the_input_give_metrics_and_the_papers_threshold_is_a_flag(runs, tmp_path, capsys):
    given = write_own(tmp_path / "new.csv", TEXTS, ("bob", "cat", "eve"))
    rows = predict(runs["clsp"], tmp_path, given, "--threshold", "0.5")
    said = capsys.readouterr().out
    gold = np.array([[k % 2, user < "c"] for k in range(4) for user in ("bob", "cat", "eve")])
    found = np.array([[row["funny"], row["rude"]] for row in rows])
    scores = np.array([[row["funny_probability"], row["rude_probability"]] for row in rows])
    assert (found == (scores >= 0.5)).all()
    expected = f1_score(gold, found, average="macro", zero_division=0)
    assert f"f1_macro {expected:.4f}" in said and "12 annotations of 4 texts by 3 users" in said
    assert "unseen in training, so only a guess: users eve\n" in said
    table = [line.split() for line in said[said.index("12 annotations"):].splitlines()[1:]]
    assert table[0] == ["users", "all", "seen", "unseen"] and {len(row) for row in table[1:]} == {4}
    by_seen = [f1_score(gold[own], found[own], average="macro", zero_division=0)
               for own in (np.arange(12) % 3 < 2, np.arange(12) % 3 == 2)]
    assert table[1][2:] == [f"{value:.4f}" for value in by_seen]


def test_a_user_whose_id_is_all_is_not_taken_for_all_users(runs, tmp_path, capsys):
    run = shutil.copytree(runs["clsp"], tmp_path / "run")
    (run / "metrics_test.json").unlink()
    infer.amend_record(run, users={"all": ["18-24"], "ann": ["18-24"]})
    assert "a user of train has this ID" in one_line(capsys, "--run", run, "--text", "x", "--users", "all")
    assert infer.main(["--run", str(run), "--text", "x", "--users", "all", "ann"]) == 0


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(runs, tmp_path, monkeypatch):
    given = write_own(tmp_path / "new.csv", [f"text {k}" for k in range(6)], ("ann", "bob"), labels=False)
    predict(runs["clsp"], tmp_path, given, name="whole.csv")
    monkeypatch.setattr(infer, "PART", 4)
    calls, predict_rows = [], infer.predict_rows

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict_rows(*arguments)

    monkeypatch.setattr(infer, "predict_rows", dies)
    arguments = ["--run", str(runs["clsp"]), "--input", str(given), "--output", str(tmp_path / "out.csv")]
    assert infer.main(arguments) == 130 and not (tmp_path / "out.csv").exists()
    part = tmp_path / "out.csv.parts" / "000001.json"
    part.write_bytes(part.read_bytes().replace(b"ann", b"ANN", 1))  # damaged: predicted again
    assert infer.main(arguments) == 0 and len(calls) == 5
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "out.csv.parts").exists()


def test_mistakes_with_files_are_one_line_and_replace_nothing(runs, tmp_path, capsys):
    given = write_own(tmp_path / "new.csv", TEXTS, ("ann",), labels=False)
    out = tmp_path / "out.csv"
    out.write_text("mine")
    base = ["--run", runs["clsp"], "--input", given, "--output"]
    assert "exists: give another name, or --force" in one_line(capsys, *base, out)
    assert out.read_text() == "mine"
    assert infer.main([*map(str, base), str(out), "--force"]) == 0 and out.read_text() != "mine"
    (tmp_path / "empty.csv").write_text("comment,worker,age\n")
    (tmp_path / "textless.csv").write_text("body,worker,age\nx,ann,18-24\n")
    (tmp_path / "nobody.csv").write_text("comment\nx\n")
    (tmp_path / "ageless.csv").write_text("comment,worker\nx,eve\n")
    (tmp_path / "half.csv").write_text("comment,worker,age,rude\nx,ann,18-24,1\n")
    predict(runs["clsp"], tmp_path, tmp_path / "half.csv", name="half.out.csv")
    assert "half.csv has no column funny, so its rude are not read" in capsys.readouterr().out
    for name, words in (("empty", "no text below the header"), ("textless", "no column ['text']"),
                        ("nobody", "who labels the texts?"), ("ageless", "user eve did not train"),
                        ("missing", "missing.csv")):
        error = one_line(capsys, *base[:2], "--input", tmp_path / f"{name}.csv", "--output", tmp_path / "x")
        assert words in error and not (tmp_path / "x").exists(), error
    assert "once" in one_line(capsys, *base, tmp_path / "x", "--columns", "text=comment", "text=age")


# ---- Around training ----


def test_the_f1_of_a_validation_is_logged_at_half_and_at_tuned_thresholds(runs):
    """The figures of the best validation are those of the kept adapter's predictions."""
    log = [json.loads(line) for line in (runs["clsp"] / "log.jsonl").read_text().splitlines()]
    best_step = infer.read_record(runs["clsp"])["best_step"]
    (logged,) = [line for line in log if "val_loss" in line and line["step"] == best_step]
    rows = metrics.read_predictions(runs["clsp"] / "predictions_val.jsonl")
    gold = np.array([[name in row["gold"] for name in ("funny", "rude")] for row in rows])
    scores = np.array([row["scores"] for row in rows])
    assert logged["val_f1_macro"] == pytest.approx(
        f1_score(gold, scores >= 0.5, average="macro", zero_division=0), abs=1e-6)
    best = [max(f1_score(gold[:, k], scores[:, k] >= cut, zero_division=0) for cut in scores[:, k])
            for k in (0, 1)]
    assert logged["val_f1_macro_tuned"] == pytest.approx(np.mean(best), abs=1e-6)
    own = json.loads((runs["clsp"] / "metrics_val.json").read_text())["disagreement_auc"]
    assert logged["val_disagreement_auc"] == (own and pytest.approx(own, abs=0.01))  # rounded scores


def test_training_ends_after_validations_without_a_lower_loss_and_is_resumed_to_the_same_end(
        tiny_dir, runs, tmp_path, capsys, monkeypatch):
    losses = iter([0.5, 0.7, 0.6, 0.4])
    monkeypatch.setattr(train.Objective, "validate", lambda *_: {"val_loss": next(losses)})
    arguments = command(tiny_dir, runs["clsp"].parent / "kept.csv", tmp_path / "out", "--patience", 2)
    arguments[arguments.index("--validations") + 1] = "6"
    with monkeypatch.context() as patch:
        patch.setattr(infer, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(arguments) == 130
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("training ends at step 3 of 6: no better validation loss in 2 validations") == 2
    record = infer.read_record(tmp_path / "out")
    assert (record["steps"], record["best_step"]) == (3, 1) and next(losses) == 0.4


def test_a_run_goes_on_from_the_weights_of_another_with_new_users(tiny_dir, runs, tmp_path, capsys):
    own = write_own(tmp_path / "more.csv", [f"new {k}" for k in range(20)], ("ann", "eve"))
    from_there = ["--context", "age", "--init_adapter", runs["clsp"]]
    assert train.main(command(tiny_dir, own, tmp_path / "out", *from_there, "--learning_rate", "1e-30")) == 0
    before, after = (dict(lora.stored_tensors(path / "adapter_model.safetensors"))
                     for path in (runs["clsp"], tmp_path / "out"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in {*before, *after})
    record = infer.read_record(tmp_path / "out")
    assert record["init_adapter"]["run"] == str(runs["clsp"]) and len(record["init_adapter"]["sha256"]) == 64
    assert set(record["users"]) == {*AGES, "eve"}
    for change, words in ((["--lora_r", 3], "lora_r 2 there, 3 here"), (["--labels", "rude"], "labels"),
                          (["--target_modules", "q_proj"], "target_modules"),
                          (["--model", tiny_dir / "models" / "phi"], "base")):
        assert train.main(command(tiny_dir, own, tmp_path / "x", *from_there, *change)) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "does not fit" in errors[0] and words in errors[0]


@pytest.mark.parametrize("model, method, follow", [
    ("t5", "clsp", []), ("t5", "lmp", []), ("neox", "clsp", []), ("phi", "lmp", []),
    ("neox", "lmp", ["--follow", "T4=released"])])
def test_a_merged_run_gives_the_logits_of_the_run_in_transformers(
        tiny_dir, runs, tmp_path, capsys, model, method, follow):
    """From NF4, too: the merged weights are the dequantized ones. Tolerance 1e-5 of fp32."""
    run, out = tmp_path / "run", tmp_path / "merged"
    arguments = command(tiny_dir, runs["clsp"].parent / "kept.csv", run, "--quantize", "nf4", *follow,
                        "--max_steps", 2, method=method, model=model)
    assert train.main(arguments) == 0 and lora.main(["merge", str(run), str(out)]) == 0
    assert lora.main(["merge", str(run), str(out)]) == 2 and "exists" in capsys.readouterr().err
    ours = infer.load_trained(infer.load_run(run, {}), 2, "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, padding_side="right")
    task = neutral_task(["funny", "rude"])
    prompts = ["".join(build_prompt(task, METHODS[method], text, "ann")) for text in TEXTS]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    with torch.no_grad():
        if method == "clsp":
            theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
            found, expected = theirs(ids, batch["attention_mask"]).logits, ours(ids, lengths)
        else:
            auto = transformers.AutoModelForSeq2SeqLM if model == "t5" else transformers.AutoModelForCausalLM
            more = {"decoder_input_ids": ids[:, :4]} if model == "t5" else {}
            theirs = auto.from_pretrained(out).eval()
            found, expected = (network(input_ids=ids, attention_mask=batch["attention_mask"], **more).logits
                               for network in (theirs, ours))
            rows = torch.arange(len(ids))
            found, expected = (one[rows, -1 if more else lengths - 1] for one in (found, expected))
    assert (found - expected).abs().max() < 1e-5 and theirs.config.label2id == {"funny": 0, "rude": 1}


# ---- More of the person than the ID ----


def test_context_is_a_line_for_each_column_in_the_user_id_section():
    task, method = neutral_task(["a", "b"]), METHODS["clsp"]._replace(context=("age", "gender"))
    prompt = "".join(build_prompt(task, method, "hi", "7", context=("35-39", "f")))
    assert "for the specified user" in prompt
    assert "\n\n### User ID:\n7\nage: 35-39\ngender: f\n\n### Text:\nhi\n\n" in prompt
    prompt = "".join(build_prompt(task, method._replace(user_id=False), "hi", "7", context=("35-39", "f")))
    assert "for the specified user" in prompt
    assert "\n\n### User ID:\nage: 35-39\ngender: f\n\n### Text:" in prompt


def test_without_ids_users_of_one_profile_share_a_prompt(tiny_dir, runs, tmp_path):
    more = ["--context", "age", "--no_user_id"]
    args = train.parse_args(command(tiny_dir, runs["clsp"].parent / "kept.csv", tmp_path, *more))
    infer.complete(args)
    task, splits, _ = infer.load_splits(args)
    encoded = infer.encode_split(args, lora.load_tokenizer(args.model), task, splits, "test")
    assert len(encoded.lengths) * 4 == len(encoded.prompt_index) * 3  # of four users two are of one age
    assert splits["train"].profiles["bob"] == ("35-39",)


@pytest.mark.parametrize("method, more, words", [
    ("cls", ["--context", "age"], "are for clsp and lmp, not for cls"),
    ("lm", ["--context", "age", "--no_user_id"], "are for clsp and lmp, not for lm"),
    ("clsp", ["--no_user_id"], "leaves nothing of the user"),
    ("clsp", ["--context", "height"], "height"), ("clsp", ["--context", "funny"], "funny")])
def test_context_that_makes_no_sense_is_one_line(tiny_dir, runs, tmp_path, capsys, method, more, words):
    own = runs["clsp"].parent / "kept.csv"
    assert train.main(command(tiny_dir, own, tmp_path / "out", *more, method=method)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and words in errors[0]


def test_the_users_of_a_run_bring_their_context_and_others_theirs_by_the_file(runs, tmp_path, monkeypatch):
    asked, encode = [], data.encode

    def encode_and_note(tokenizer, task, method, part, *more):
        asked.append(dict(part.profiles))
        return encode(tokenizer, task, method, part, *more)

    monkeypatch.setattr(data, "encode", encode_and_note)
    given = write_own(tmp_path / "new.csv", TEXTS[:1], ("eve",), labels=False)
    predict(runs["clsp"], tmp_path, given)
    expected = {user: (age,) for user, age in AGES.items()}
    assert asked == [expected | {"eve": ("18-24",)}]
