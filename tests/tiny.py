"""The embedded default: two synthetic corpora in the real file formats, and four tiny models with tokenizers.

A machine without GPU, hub or data runs every script on these. Each annotator has a hidden threshold per
label and each text a hidden intensity per label, shown by its words: `label = intensity > threshold`. Two
labels are above the threshold everywhere for an annotator, some never. Annotators who disagree on a text
differ in nothing but their User ID, so a model that does not read it cannot tell them apart. LoRA cannot
teach a random frozen model, so the models are pretrained here for seconds, on other texts: with a new person
in every example behind each ID of the corpora, and with a few strangers who stay the same behind other IDs.
Like a real model they know the template and the words, and that an ID can matter; not who is who.

    python tests/tiny.py OUT_DIR               writes OUT_DIR/{goemotions,unhealthy,models} once
    python tests/tiny.py OUT_DIR --size mini    fewer texts and no pretraining, for tests

Numbers made with it are "synthetic, tiny": they show that the way works, never what the paper reports.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prompts import METHODS, TASKS, build_prompt, build_response  # noqa: E402

SIZES = {"tiny": (500, 100, 400), "mini": (100, 30, 0)}  # texts in train; in val, in test; pretraining steps

# ---- Hidden world: the words that show a label, and the annotators who see it or do not ----

MILD, STRONG = 0.4, 0.8  # intensities
ALWAYS, OVERUSER, STRICT, NEVER = -0.1, 0.2, 0.6, 1.1  # thresholds
MARKERS = {  # label: (mild words, strong words)
    "goemotions": {
        "admiration": ("decent tidy", "brilliant superb"),
        "anger": ("cross grumpy", "furious livid"),
        "curiosity": ("unclear puzzling", "fascinating mysterious"),
        "gratitude": ("thanks obliged", "thankful indebted"),
        "joy": ("glad sunny", "overjoyed ecstatic"),
        "love": ("fond sweet", "adored beloved"),
        "sadness": ("gloomy sorry", "heartbroken tragic"),
    },
    "unhealthy": {
        "antagonize": ("whatever pathetic", "crybaby coward"),
        "condescending": ("actually obviously", "kiddo sweetie"),
        "dismissive": ("anyway pointless", "worthless drivel"),
        "generalisation": ("usually mostly", "always everyone"),
        "generalisation_unfair": ("typical they", "those vermin"),
        "hostile": ("annoying rude", "hateful idiots"),
        "sarcastic": ("sure right", "bravo genius"),
    },
}
DEFAULT_LABEL = {"goemotions": "neutral", "unhealthy": "healthy"}  # where an annotator sees no other
FILLER = (
    "the a this that my our his her dog cat house car train city river garden kitchen school song book "
    "letter coffee bread rain snow summer morning evening went came stayed looked sounded was seems "
    "felt with near after before behind under and but because so today again later still very"
).split()
ENDINGS = (".", ".", "!", "?", " ...", " :)", " ’tis so", " 🙂")
ACTIVITY = (1.0, 0.75) + (0.3,) * 8  # weights of the regular annotators; the first two end above max_share
STRANGERS = 12  # of each corpus, in pretraining alone
NOISE = 0.02  # share of (annotation, label) cells that are flipped


class World(NamedTuple):
    """One corpus before it is written."""

    texts: list  # (text, {label: intensity}, names of the split files it stands in)
    people: dict  # user_id: {label: threshold}; the last but one is not in test, the last is rare
    annotations: list  # (index of the text, user_id, label names), in the order of the files


def draw_text(rng, corpus):
    """Returns (text, {label: intensity}): 5 to 12 words, of which up to two show a label."""
    shown = rng.sample(list(MARKERS[corpus]), rng.choice((0, 1, 1, 1, 2, 2)))
    intensities = {label: rng.choice((MILD, STRONG)) for label in shown}
    words = [
        rng.choice(MARKERS[corpus][label][intensity == STRONG].split())
        for label, intensity in intensities.items()
    ]
    words += rng.choices(FILLER, k=rng.randint(5, 12) - len(words))
    rng.shuffle(words)
    if rng.random() < 0.1:  # mostly at the start: splitting on bare tabs would miss these texts
        k = rng.choice((0, 0, -1))
        words[k] = f'"{words[k]}"'
    return " ".join(words) + rng.choice(ENDINGS), intensities


def draw_ids(rng, corpus, n):
    """Returns n distinct user IDs as the corpus has them."""
    return [*map(str, rng.sample(range(82) if corpus == "goemotions" else range(10**7, 5 * 10**7), n))]


def draw_people(rng, corpus, user_ids):
    """Returns {user_id: {label: threshold}}: each sees two labels everywhere, some never."""
    people = {}
    for user_id in user_ids:
        everywhere = rng.sample(list(MARKERS[corpus]), 2)
        people[user_id] = {
            label: ALWAYS if label in everywhere else rng.choice((OVERUSER, OVERUSER, OVERUSER, NEVER))
            for label in MARKERS[corpus]
        }
    return people


def choose_labels(rng, corpus, intensities, thresholds, noise=NOISE):
    """Returns the label names that an annotator with these thresholds gives; with noise, sometimes none."""
    if rng.random() < noise:  # an empty annotation, as both corpora have them
        return []
    flip = {label: rng.random() < noise for label in MARKERS[corpus]}
    chosen = [label for label in flip if (intensities.get(label, 0.0) > thresholds[label]) != flip[label]]
    if not chosen:
        chosen = [DEFAULT_LABEL[corpus]]
    return sorted(chosen)


def draw_world(corpus, seed=0, size="tiny"):
    """Returns the World of a corpus: 3 to 5 annotators a text, and work for each stage of the cleaning."""
    rng = random.Random(f"{corpus} {seed}")
    people = draw_people(rng, corpus, draw_ids(rng, corpus, len(ACTIVITY) + 2))
    *regular, absent, rare = people
    n_train, n_other, _ = SIZES[size]
    drawn = {}  # text: intensities, without doubles
    while len(drawn) < n_train + 2 * n_other + 20:  # the last 20 stand in no split file
        text, intensities = draw_text(rng, corpus)
        drawn.setdefault(text, intensities)
    splits = [["train"]] * n_train + [["val"]] * n_other + [["test"]] * n_other + [[]] * 20
    splits[0], splits[n_train] = ["train", "val"], ["val", "test"]  # two texts stand in two files
    annotations, rare_left = [], ["train", "val", "test"]
    for i, intensities in enumerate(drawn.values()):
        order = {user_id: rng.random() ** (1 / weight) for user_id, weight in zip(regular, ACTIVITY)}
        who = sorted(regular, key=order.get)[-rng.randint(3, 5) :]
        if "test" not in splits[i] and rng.random() < 0.1:
            who.append(absent)
        annotations += [(i, u, choose_labels(rng, corpus, intensities, people[u])) for u in who]
        if len(splits[i]) == 1 and splits[i][0] in rare_left:
            rare_left.remove(splits[i][0])
            annotations.append((i, rare, [DEFAULT_LABEL[corpus]]))
    rng.shuffle(annotations)
    return World([(text, drawn[text], split) for text, split in zip(drawn, splits)], people, annotations)


# ---- Raw files ----

GOEMOTIONS_LABELS = [name for name in TASKS["goemotions"].label_names if name != "neutral"] + ["neutral"]
GOEMOTIONS_HEADER = [
    "text",
    "id",
    "author",
    "subreddit",
    "link_id",
    "parent_id",
    "created_utc",
    "rater_id",
    "example_very_unclear",
    *GOEMOTIONS_LABELS,
]
UNHEALTHY_LABELS = list(TASKS["unhealthy"].label_names)


def write_corpora(out_dir, seed=0, size="tiny"):
    """Writes out_dir/goemotions and out_dir/unhealthy in the published formats, the same for one seed.

    Beside them the second once more, as a file of one's own, annotations.csv, and new.csv, a few texts.
    """
    for corpus, write in (("goemotions", _write_goemotions), ("unhealthy", _write_unhealthy)):
        directory = Path(out_dir) / corpus
        directory.mkdir(parents=True, exist_ok=True)
        write(directory, world := draw_world(corpus, seed, size), random.Random(f"files {corpus} {seed}"))
    rows = [[user_id, world.texts[i][0], *(int(name in labels) for name in UNHEALTHY_LABELS)]
            for i, user_id, labels in world.annotations]
    _write_rows(Path(out_dir, "annotations.csv"), [["user_id", "text", *UNHEALTHY_LABELS]] + rows)
    _write_rows(Path(out_dir, "new.csv"), [["text"]] + [[text] for text, _, _ in world.texts[:20]])


def _write_rows(path, rows, **dialect):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n", **dialect).writerows(rows)


def _shares(world, label_names):
    """Returns per text the number of its annotators and the share of them that chose each label."""
    given = [[] for _ in world.texts]
    for i, _, labels in world.annotations:
        given[i].append(labels)
    return [
        (len(rows), [sum(name in labels for labels in rows) / len(rows) for name in label_names])
        for rows in given
    ]


def _write_goemotions(directory, world, rng):
    text_ids = [f"e{number:06d}" for number in rng.sample(range(10**6), len(world.texts))]
    rows = []
    for i, user_id, labels in world.annotations:
        source = [f"author_{i}", "synthetic", f"t3_{i:05d}", f"t1_{i:05d}", f"{1546300800 + 60 * i}.0"]
        cells = [int(name in labels) for name in GOEMOTIONS_LABELS]
        rows.append([world.texts[i][0], text_ids[i], *source, user_id, not labels, *cells])
    for k in range(3):
        _write_rows(directory / f"goemotions_{k + 1}.csv", [GOEMOTIONS_HEADER] + rows[k::3])
    indices = [
        ",".join(str(k) for k, share in enumerate(shares) if share == max(shares))
        for _, shares in _shares(world, GOEMOTIONS_LABELS)
    ]
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        _write_rows(
            directory / f"{name}.tsv",
            [
                (text, indices[i], text_ids[i])
                for i, (text, _, splits) in enumerate(world.texts)
                if split in splits
            ],
            delimiter="\t",
        )


def _write_unhealthy(directory, world, rng):
    unit_ids = rng.sample(range(1739439000, 1739473000), len(world.texts))
    trust = {user_id: round(rng.uniform(0.78, 1.0), 4) for user_id in world.people}
    rows = [
        [unit_ids[i], world.texts[i][0], trust[u], u, *(int(name in labels) for name in UNHEALTHY_LABELS)]
        for i, u, labels in world.annotations
    ]
    header = ["_unit_id", "comment", "_trust", "_worker_id", *UNHEALTHY_LABELS]
    _write_rows(directory / "unhealthy_full.csv", [header] + rows)
    columns = [column for name in UNHEALTHY_LABELS for column in (name, f"{name}:confidence")]
    aggregated = _shares(world, UNHEALTHY_LABELS)
    for split in ("train", "val", "test"):
        rows = [["_unit_id", "_trusted_judgments", "comment", *columns]]
        for i, (text, _, splits) in enumerate(world.texts):
            if split in splits:
                count, shares = aggregated[i]
                rows.append([unit_ids[i], count, text])
                for share in shares:
                    rows[-1] += int(share > 0.5), round(max(share, 1 - share), 4)
        _write_rows(directory / f"{split}.csv", rows, quoting=csv.QUOTE_NONNUMERIC)


# ---- Tokenizers ----

VOCAB, HIDDEN = 1536, 64  # multiples of 64, the block of NF4
PIECES = r"\n- \w+|### [^\n]+|\n+| ?\w+| ?[^\w\s]+|\s"  # a label line, heading or word can be one token
SPECIAL = {  # bos, eos, pad, unk: as with the real ones, pad is often another special token
    "mistral": ("<s>", "</s>", "<unk>", "<unk>"),
    "phi": ("<|endoftext|>",) * 4,
    "neox": ("<|endoftext|>", "<|endoftext|>", "<|padding|>", "<|endoftext|>"),
    "t5": (None, "</s>", "<pad>", "<unk>"),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    " [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def draw_examples(seed, n):
    """Returns n pairs (prompt, response) of new texts.

    A third is of IDs of the corpora, each time of a new person; the others are of strangers.
    """
    rng = random.Random(f"pretraining {seed}")
    ids, strangers = {}, {}
    for corpus in TASKS:
        ids[corpus] = list(draw_world(corpus, seed, "mini").people)
        others = [name for name in draw_ids(rng, corpus, 2 * STRANGERS + len(ids)) if name not in ids[corpus]]
        strangers[corpus] = draw_people(rng, corpus, others[:STRANGERS])
    examples = []
    for k in range(n):
        corpus, method = list(TASKS)[k % 2], METHODS[rng.choice(("cls", "clsp", "lm", "lmp"))]
        people, (text, intensities) = strangers[corpus], draw_text(rng, corpus)
        if rng.random() < 1 / 3:
            people = draw_people(rng, corpus, [rng.choice(ids[corpus])])
        user_id = rng.choice(list(people))
        labels = choose_labels(rng, corpus, intensities, people[user_id], noise=0)
        examples.append(("".join(build_prompt(TASKS[corpus], method, text, user_id)), build_response(labels)))
    return examples


def write_tokenizer(out_dir, architecture, seed=0):
    """Trains a byte-level BPE tokenizer on prompts and saves it: Mistral's adds BOS, T5's EOS. Returns it."""
    bos, eos, pad, unk = SPECIAL[architecture]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"{prompt}\n{response}" for prompt, response in draw_examples(seed, 2000)]
    names = [name for task in TASKS.values() for name in task.label_names]
    words += [start + name for start in ("", " ") for name in names] * 50
    tokenizer.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(dict.fromkeys(filter(None, (pad, eos, bos, unk)))),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    added = {"mistral": (bos, f"{bos} $A"), "t5": (eos, f"$A {eos}")}.get(architecture)
    if added:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=added[1], special_tokens=[(added[0], tokenizer.token_to_id(added[0]))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk
    )
    if architecture == "mistral":
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out_dir)
    return tokenizer


# ---- Models ----

DECODER = dict(
    hidden_size=HIDDEN,
    intermediate_size=2 * HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
ARCHITECTURES = {
    "mistral": (MistralForCausalLM, MistralConfig, DECODER | dict(num_key_value_heads=2)),
    "phi": (PhiForCausalLM, PhiConfig, DECODER),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, DECODER),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        dict(
            d_model=HIDDEN,
            d_kv=HIDDEN // 4,
            d_ff=2 * HIDDEN,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
    ),
}


def write_model(out_dir, architecture, seed=0, steps=0, sharded=False):
    """Writes an fp32 model of 0.26M to 0.4M parameters and its tokenizer. Returns (model, tokenizer)."""
    tokenizer = write_tokenizer(out_dir, architecture, seed)
    model_class, config_class, sizes = ARCHITECTURES[architecture]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if architecture == "t5":
        special["decoder_start_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(seed)
    model = model_class(config_class(vocab_size=VOCAB, **special, **sizes))
    if architecture == "t5":  # transformers 5 ties the head whatever the config says; Flan-T5's is separate
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN) * HIDDEN**-0.5)
    if steps:
        pretrain(model, tokenizer, seed, steps)
    model.eval().save_pretrained(out_dir, max_shard_size="300KB" if sharded else "5GB")
    if architecture == "t5":  # transformers rewrites this entry: back to Flan-T5's
        path = Path(out_dir) / "config.json"
        config = json.loads(path.read_text()) | {"tie_word_embeddings": False}
        config.pop("scale_decoder_outputs", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    return model, tokenizer


def pretrain(model, tokenizer, seed, steps, batch_size=32, learning_rate=3e-3):
    """Trains all weights to answer prompts, a decoder on a new line. Returns the last loss."""
    examples = draw_examples(seed, steps * batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        prompts, responses = zip(*examples[step * batch_size : (step + 1) * batch_size])
        prompts = tokenizer(list(prompts))["input_ids"]
        if model.config.is_encoder_decoder:
            mask = _pad([[1] * len(prompt) for prompt in prompts], 0)
            labels = _pad(tokenizer(list(responses))["input_ids"], -100)
            loss = model(input_ids=_pad(prompts, 0), attention_mask=mask, labels=labels).loss
        else:  # right padding under causal attention needs no mask
            responses = [f"\n{response}{tokenizer.eos_token}" for response in responses]
            targets = tokenizer(responses, add_special_tokens=False)["input_ids"]
            input_ids = _pad([prompt + ids for prompt, ids in zip(prompts, targets)], 0)
            labels = _pad([[-100] * (len(prompt) - 1) + ids for prompt, ids in zip(prompts, targets)], -100)
            hidden_states = model.base_model(input_ids=input_ids[:, :-1])[0][labels != -100]
            loss = torch.nn.functional.cross_entropy(
                model.get_output_embeddings()(hidden_states), labels[labels != -100]
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def _pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _write_default_model(out_dir, seed, steps, architecture):
    directory = out_dir / "models" / architecture
    model, _ = write_model(directory, architecture, seed, steps)
    return f"{directory}: {sum(p.numel() for p in model.parameters()):,} parameters"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    sources = b"".join(Path(path).read_bytes() for path in (__file__, build_prompt.__code__.co_filename))
    stamp = json.dumps({"seed": args.seed, "size": args.size, "sources": hashlib.sha256(sources).hexdigest()})
    stamp_path = args.out_dir / "tiny.json"  # written last: an interrupted call starts again
    if stamp_path.exists() and stamp_path.read_text() == stamp:
        print(f"{args.out_dir}: already there")
        return 0
    stamp_path.unlink(missing_ok=True)
    start = time.perf_counter()
    write_corpora(args.out_dir, args.seed, args.size)
    steps = SIZES[args.size][2]
    job = partial(_write_default_model, args.out_dir, args.seed, steps)
    spawn = multiprocessing.get_context("spawn")  # with one thread each, for the same weights on any machine
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        for line in (pool.map if steps else map)(job, ARCHITECTURES):
            print(f"{line}, {time.perf_counter() - start:.0f} s", flush=True)
    stamp_path.write_text(stamp)
    return 0


if __name__ == "__main__":
    sys.exit(main())
