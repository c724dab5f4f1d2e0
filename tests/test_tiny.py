"""The embedded default is what it says: real formats, models that load, disagreement by user alone."""

import csv
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from prompts import METHODS, TASKS, build_prompt, build_response

ARCHITECTURES = list(tiny.ARCHITECTURES)
GOEMOTIONS_HEADER = (  # copied from the published file
    "text,id,author,subreddit,link_id,parent_id,created_utc,rater_id,example_very_unclear,admiration,"
    "amusement,anger,annoyance,approval,caring,confusion,curiosity,desire,disappointment,disapproval,disgust,"
    "embarrassment,excitement,fear,gratitude,grief,joy,love,nervousness,optimism,pride,realization,relief,"
    "remorse,sadness,surprise,neutral").split(",")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(directory, seed=0)
    return directory


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture_dir(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tiny.write_model(directory, request.param)
    return request.param, directory


def read(path, **dialect):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file, strict=True, **dialect))


def load(architecture, directory):
    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(directory, local_files_only=True, output_loading_info=True)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(corpora, tmp_path):
    tiny.write_corpora(tmp_path / "again", seed=0)
    tiny.write_corpora(tmp_path / "other", seed=1)
    files = sorted(path.relative_to(corpora) for path in corpora.glob("*/*"))
    assert len(files) == 10
    for name in files:
        assert (corpora / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (corpora / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_goemotions_files_have_the_published_format(corpora):
    texts = set()
    for k in (1, 2, 3):
        header, *rows = read(corpora / "goemotions" / f"goemotions_{k}.csv")
        assert header == GOEMOTIONS_HEADER
        for row in rows:
            assert 0 <= int(row[7]) <= 81
            assert row[8] == str("1" not in row[9:]) and set(row[9:]) <= {"0", "1"}
            texts.add(row[0])
    published = []
    for name in ("train", "dev", "test"):
        rows = read(corpora / "goemotions" / f"{name}.tsv", delimiter="\t")
        assert all(len(row) == 3 and all(0 <= int(k) < 28 for k in row[1].split(",")) for row in rows)
        published += [row[0] for row in rows]
    assert set(published) < texts  # some texts are in no split file
    assert len(published) == len(set(published)) + 2  # two texts are in two of them


def test_splitting_the_tsv_on_bare_tabs_misses_the_texts_with_quotes(corpora):
    """The published files hold quotes; read without the csv module, hundreds of texts fail to match."""
    path = corpora / "goemotions" / "train.tsv"
    right = {row[0] for row in read(path, delimiter="\t")}
    naive = {line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()}
    assert 20 < len(right - naive) < len(right) / 4


def test_unhealthy_files_have_the_published_format(corpora):
    labels = list(TASKS["unhealthy"].label_names)
    header, *rows = read(corpora / "unhealthy" / "unhealthy_full.csv")
    assert header == ["_unit_id", "comment", "_trust", "_worker_id", *labels]
    assert all(len(row[3]) == 8 and set(row[4:]) <= {"0", "1"} for row in rows)
    columns = ["_unit_id", "_trusted_judgments", "comment"]
    columns += [column for name in labels for column in (name, f"{name}:confidence")]
    for split in ("train", "val", "test"):
        path = corpora / "unhealthy" / f"{split}.csv"
        start = '"_unit_id","_trusted_judgments","comment","antagonize","antagonize:confidence",'
        assert path.read_text(encoding="utf-8").startswith(start)
        header, *comments = read(path)
        assert header == columns
        assert all(float(row[k + 1]) >= 0.5 for row in comments for k in range(3, 19, 2))
        assert {row[2] for row in comments} < {row[1] for row in rows}


@pytest.mark.parametrize("corpus", TASKS)
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_every_stage_of_the_cleaning_has_something_to_do(corpus, seed):
    world = tiny.draw_world(corpus, seed)
    assert any(not labels for _, _, labels in world.annotations)
    count = {split: defaultdict(int) for split in ("train", "val", "test")}
    for i, user_id, labels in world.annotations:
        if labels and world.texts[i][2]:
            count[min(world.texts[i][2], key=("train", "test", "val").index)][user_id] += 1
    *regular, absent, rare = world.people
    assert absent not in count["test"] and count["train"][absent] and count["val"][absent]
    assert all(count[split][rare] == 1 for split in count)
    largest = max(count["train"].values())
    assert 1 < 0.01 * largest  # the rare user goes from train, and then from the other splits
    assert sum(n > 0.6 * largest for n in count["train"].values()) == 2
    assert all(count[split][user_id] > 1 for split in count for user_id in regular)
    assert 1800 < sum(count["train"].values()) < 2600


@pytest.mark.parametrize("corpus", TASKS)
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_only_the_user_explains_the_disagreement(corpus, seed):
    """Who knows the thresholds is right nearly always; the best that words alone allow is far behind.

    The best text-only answer is the majority of the users' noiseless labels: the fewest expected errors.
    """
    world = tiny.draw_world(corpus, seed)
    names = TASKS[corpus].label_names
    gold, knows_user, knows_text = [], [], []
    for i, user_id, labels in world.annotations:
        if labels and "test" in world.texts[i][2]:
            intensities = world.texts[i][1]
            expected = {other: tiny.choose_labels(random.Random(0), corpus, intensities, thresholds, noise=0)
                        for other, thresholds in world.people.items()}
            gold.append([name in labels for name in names])
            knows_user.append([name in expected[user_id] for name in names])
            votes = np.mean([[name in chosen for name in names] for chosen in expected.values()], axis=0)
            knows_text.append(votes > 0.5)
    assert f1_macro(gold, knows_user) > 0.8
    assert f1_macro(gold, knows_text) < f1_macro(gold, knows_user) - 0.2


def f1_macro(gold, predicted):
    """F1 = 2 TP / (positives + predicted positives), averaged over the labels that occur."""
    gold, predicted = np.array(gold), np.array(predicted)
    f1 = 2 * (gold & predicted).sum(axis=0) / np.maximum(1, gold.sum(axis=0) + predicted.sum(axis=0))
    return f1[gold.any(axis=0)].mean()


def test_models_load_offline_with_no_key_missing_and_the_same_weights(architecture_dir):
    architecture, directory = architecture_dir
    written, _ = tiny.write_model(directory, architecture)
    model, info = load(architecture, directory)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all((state[name] == value).all() for name, value in written.state_dict().items())
    assert 0.2e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert all(weight.numel() % 64 == 0 for weight in state.values() if weight.ndim == 2)  # NF4 blocks


def test_checkpoints_name_the_last_layer_as_the_real_ones_do(architecture_dir):
    architecture, directory = architecture_dir
    with safe_open(Path(directory) / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert ("embed_out.weight" if architecture == "neox" else "lm_head.weight") in names
        if architecture == "t5":  # separate from the embeddings, as in Flan-T5
            assert not (file.get_tensor("lm_head.weight") == file.get_tensor("shared.weight")).all()


def test_sharded_checkpoints_hold_several_files_and_the_same_weights(architecture_dir, tmp_path):
    architecture, directory = architecture_dir
    tiny.write_model(tmp_path, architecture, sharded=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    one, several = load(architecture, directory)[0].state_dict(), load(architecture, tmp_path)[0].state_dict()
    assert all((one[name] == several[name]).all() for name in one)


def test_tokenizers_give_back_what_they_got(architecture_dir):
    architecture, directory = architecture_dir
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    names = [name for task in TASKS.values() for name in task.label_names]
    for text in [*names, 'ünseen\t"{0}"\n\n### 漢字 🙂']:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    ids = tokenizer("joy")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == (architecture == "mistral")
    assert (ids[-1] == tokenizer.eos_token_id) == (architecture == "t5")
    assert tokenizer.pad_token_id is not None and len(tokenizer) <= tiny.VOCAB
    assert bool(tokenizer.chat_template) == (architecture == "mistral")


@pytest.mark.parametrize("corpus", TASKS)
def test_prompts_are_short_and_names_are_single_tokens(corpus, architecture_dir):
    _, directory = architecture_dir
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    world = tiny.draw_world(corpus)
    for word in [*(" " + name for name in TASKS[corpus].label_names), *world.people]:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    text = max((text for text, _, _ in world.texts), key=len)
    prompt = "".join(build_prompt(TASKS[corpus], METHODS["lmp"], text, list(world.people)[0]))
    response = build_response(TASKS[corpus].label_names[:3])
    assert len(tokenizer(f"{prompt}\n{response}")["input_ids"]) < 128


def test_in_pretraining_strangers_stay_the_same_and_nobody_of_the_corpora_does():
    """Whether a label is chosen where a strong word shows it: by a stranger always or never."""
    given = defaultdict(list)
    for prompt, response in tiny.draw_examples(0, 12000):
        corpus = "goemotions" if "### Emotions:" in prompt else "unhealthy"
        found = re.search(r"### User ID:\n(\d+)", prompt)
        words = set(re.findall(r"\w+", prompt.split("### Text:")[1].split("###")[0]))
        for label, (_, strong) in tiny.MARKERS[corpus].items() if found else ():
            if words & set(strong.split()):
                given[corpus, found[1], label].append(label in response.split(", "))
    people = {(corpus, user) for corpus in TASKS for user in tiny.draw_world(corpus).people}
    ids = {key[:2] for key in given}
    assert people <= ids and len(ids - people) == 2 * tiny.STRANGERS
    for key, chosen in given.items():
        if key[:2] not in people:
            assert np.mean(chosen) in (0, 1), key
        elif len(chosen) >= 40:
            assert 0 < np.mean(chosen) < 1, key


def test_pretraining_lowers_the_loss_and_is_repeatable(tmp_path):
    losses = []
    for name in ("a", "b"):
        model, tokenizer = tiny.write_model(tmp_path / name, "t5")
        losses.append([tiny.pretrain(model, tokenizer, 0, steps, batch_size=8) for steps in (1, 6)])
    assert losses[0][1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_finished_directory_is_not_written_again(tmp_path, capsys):
    assert tiny.main([str(tmp_path), "--size", "mini"]) == 0
    before = (tmp_path / "models" / "phi" / "model.safetensors").stat().st_mtime_ns
    assert tiny.main([str(tmp_path), "--size", "mini"]) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "models" / "phi" / "model.safetensors").stat().st_mtime_ns == before
