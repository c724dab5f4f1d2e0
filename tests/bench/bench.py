"""Speed and memory beside transformers, peft and the released way, in one run, in turns, on the same prompts.

    python tests/bench/bench.py [--model DIR] [--dataset D] [--data_dir DIR] [--rows NAME ...] [--rounds 3]
                                [--steps 4] [--dtype bf16] [--quantize none|nf4] [--results FILE]

A row of ROWS has two sides, which take turns: ours, peer, ours, peer, ... The ratio is taken within a round,
so steady other work on the machine cancels out; on an overloaded CPU use `--clock cpu`. What is measured of
a whole process has one of its own.
Fairness: both sides get the same token ids, batches, dtype, threads and LoRA (r 2, all linear layers but the
last, dropout 0.05). The peer does what transformers and peft do by default (SDPA; LoRA weights in fp32, under
autocast); its set-up is not timed, its logging, saving, progress bar and NaN filter are off. In the rows
`growth` both sides are ours: at k times the size, and at 1. Without --model a tiny one is used, whose figures
mean nothing. Needs Linux and a decoder-only model.
"""

import argparse
import copy
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from measure import add_results, in_process, matmul_peak, mib, record  # noqa: E402

import data  # noqa: E402
import infer  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402
from prompts import METHODS  # noqa: E402

PER_TEXT = 3.4  # annotations of a text in GoEmotions
EVAL_BATCH = 32  # of the peer
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PROCESS = infer.Processes(device=DEVICE)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# ---- What both sides are given ----


def annotate_more(annotations):
    """Annotations with PER_TEXT or more per text in the mean, by synthetic users who repeat real ones."""
    counts, synthetic = np.bincount(annotations.text_index), len(annotations.users)
    wanted = np.diff((PER_TEXT * np.arange(len(counts) + 1)).round()).astype(int)  # 3 or 4 of each text
    rows, users = [np.arange(len(annotations))], [annotations.user_index]
    for text in np.flatnonzero(counts):
        repeated = np.flatnonzero(annotations.text_index == text)
        repeated = np.resize(repeated, max(0, wanted[text] - len(repeated)))
        rows.append(repeated)
        users.append(synthetic + np.arange(len(repeated)))
    order = np.random.default_rng(0).permutation(sum(map(len, rows)))  # a file is not sorted by text
    more = annotations.select(np.concatenate(rows)[order])
    more.users, more.user_index = annotations.users + list("ABCD"), np.concatenate(users)[order]
    return more


def prepare(options, method, split="train", n=512, many=False):
    """(args of train.py, prompts of n annotations, label names, note); with `many`, PER_TEXT of each text."""
    args, note = train.parse_args(["--method", "clsp"]), ""
    vars(args).update({name: value for name, value in vars(options).items() if name in vars(args)})
    args.method, args.limit = method, [-(-n // 3) if many else n]
    task, splits, _ = infer.load_splits(args)
    if many:
        before, splits[split] = splits[split], data.limit(annotate_more(splits[split]), n)
        real, all_of_them = (len(part) / len(np.unique(part.text_index)) for part in (before, splits[split]))
        note = f"{all_of_them:.2f} annotations per text, {real:.2f} of them in the data, the rest synthetic"
    encoded = infer.encode_split(args, lora.load_tokenizer(args.model), task, splits, split)
    return SimpleNamespace(args=args, encoded=encoded, names=task.label_names, note=note,
                           family=METHODS[method].family, clock=options.clock)


def batches_of(given, options):
    return data.training_steps(given.encoded, options.batch_size, 0, 0)[: options.steps]


def collate(given, rows, left=False, responses=True):
    """The inputs of transformers' models for these annotations, padded to the longest."""
    encoded, targets = given.encoded, {}
    inputs = [encoded.prompt(encoded.prompt_index[row]) for row in rows]
    if given.family == "cls":
        targets = {"labels": torch.from_numpy(encoded.labels[rows])}
    elif responses:
        starts = [len(ids) for ids in inputs]
        inputs = [np.append(ids, encoded.response(encoded.response_index[row]))
                  for ids, row in zip(inputs, rows, strict=True)]
        labels = data.pad(inputs, -100)
        for row, start in zip(labels, starts, strict=True):
            row[:start] = -100
        targets = {"labels": torch.from_numpy(labels)}
    mask = data.pad([np.ones(len(ids), np.int64) for ids in inputs], 0, left)
    return targets | {"input_ids": torch.from_numpy(data.pad(inputs, 0, left)),
                      "attention_mask": torch.from_numpy(mask)}


# ---- The two sides of training: (model, a function that trains on batches and returns its seconds) ----


def ours(given, prefix=None, all_positions=False):
    args, encoded = given.args, given.encoded
    model, _ = infer.build(args, len(given.names), DEVICE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective = train.Objective(model, given.family, args.micro_batch_tokens, PROCESS, all_positions)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    learner = train.Learner(objective, optimizer, args.dtype == "fp16")
    prefix = data.shared_prefix(encoded) if prefix is None else prefix

    def steps(batches):
        began = CLOCKS[given.clock]()
        for rows in batches:
            train.train_step(learner, encoded, rows, prefix)
        return CLOCKS[given.clock]() - began

    return model, steps


def from_pretrained(given, auto, **further):
    """The model of transformers, quantized as ours is."""
    dtype = lora.DTYPES[given.args.dtype]
    if given.args.quantize == "nf4":
        further["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    return auto.from_pretrained(given.args.model, dtype=dtype, device_map=str(DEVICE), **further)


def peft_model(given):
    """The model of transformers with peft's LoRA."""
    from peft import LoraConfig, get_peft_model

    args, cls = given.args, given.family == "cls"
    if cls:
        model = from_pretrained(given, transformers.AutoModelForSequenceClassification, pad_token_id=0,
                                num_labels=len(given.names), problem_type="multi_label_classification")
    else:
        model = from_pretrained(given, transformers.AutoModelForCausalLM)
    return get_peft_model(model, LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        task_type="SEQ_CLS" if cls else "CAUSAL_LM", target_modules="all-linear",
        exclude_modules="score" if cls else None))


class Stopwatch(transformers.TrainerCallback):
    """Times the training of a Trainer, without its set-up."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_begin(self, *_, **__):
        self.began = self.clock()

    def on_train_end(self, *_, **__):
        if ON_GPU:
            torch.cuda.synchronize()
        self.seconds = self.clock() - self.began


def peer(given, checkpointing=False):
    args, model = given.args, peft_model(given)

    def steps(batches):
        watch = Stopwatch(CLOCKS[given.clock])
        with tempfile.TemporaryDirectory() as out:
            trainer = transformers.Trainer(
                model, callbacks=[watch], data_collator=partial(collate, given),
                train_dataset=np.concatenate(batches).tolist(),
                args=transformers.TrainingArguments(
                    out, per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
                    num_train_epochs=1, bf16=args.dtype == "bf16", fp16=args.dtype == "fp16",
                    gradient_checkpointing=checkpointing, use_cpu=not ON_GPU, remove_unused_columns=False,
                    train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no",
                    report_to=[], disable_tqdm=True, logging_nan_inf_filter=False))
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        vars(model).pop("forward", None)  # accelerate wraps it anew for every Trainer
        return watch.seconds

    return model, steps


def train_row(options, method, checkpointing=False):
    given = prepare(options, method)
    encoded, batches = given.encoded, batches_of(given, options)
    n, tokens = sum(map(len, batches)), encoded.lengths[encoded.prompt_index[np.concatenate(batches)]].sum()
    (model, own), (_, other) = ours(given), peer(given, checkpointing)
    weights = sum(module.base.in_features * module.base.out_features for module in model.modules()
                  if isinstance(module, lora.LoRALinear))
    peak = matmul_peak(lora.DTYPES[options.dtype], DEVICE, CLOCKS[options.clock])

    def figures(steps):
        seconds = steps(batches)
        return {"annotations/s": n / seconds, "tokens/s": tokens / seconds,
                "% of the peak": 100 * 4 * weights * tokens / seconds / peak}

    own(batches[:1]), other(batches[:1])  # warm up
    return (partial(figures, own), partial(figures, other),
            f"{tokens / n:.0f} tokens a prompt; a product of matrices reaches {peak / 1e12:.2f} TFLOP/s, and "
            f"each token costs 4 FLOP for each of {weights / 1e6:.0f}M weights")


def merge_row(options):
    options = copy.copy(options)
    options.batch_size *= 4  # nearer to the recipe's 128: texts that the end of a step cuts cost a pass more
    n = 32 * 32 * options.batch_size  # 32 windows of sorting by length: within one, duplicates merge unasked
    given = prepare(options, "cls", n=n, many=True)
    _, steps = ours(given)
    merged, apart = (data.training_steps(given.encoded, options.batch_size, 0, 0, merge)[: options.steps]
                     for merge in (True, False))
    steps(merged[:1])

    def figures(batches):
        return {"annotations/s": sum(map(len, batches)) / steps(batches)}

    return (partial(figures, merged), partial(figures, apart),
            f"batch {options.batch_size}; the peer is ours without --merge_duplicates; {given.note}")


# ---- Memory and start, in processes of their own ----


def memory_of(side, given, batches, *further):
    _, steps = side(given, *further)
    before, _ = mib(reset=True)
    seconds, (_, peak) = steps(batches), mib()
    return {"MiB at the peak": peak, "MiB above the loaded model": peak - before, "s": seconds}


def memory_row(options):
    given = prepare(options, "clsp")
    sides = (partial(in_process, memory_of, side, given, batches_of(given, options)[:2])
             for side in (ours, peer))
    return *sides, "two steps"


def logits_row(options):
    given = prepare(options, "lm")
    sides = (partial(in_process, memory_of, ours, given, batches_of(given, options)[:2], 0, all_positions)
             for all_positions in (False, True))
    return *sides, "two steps, no shared prefix; the peer is ours with --follow T1=paper: all tokens"


def load_of(side, given):
    before, _ = mib(reset=True, host=True)
    began = CLOCKS[given.clock]()
    if side is ours:
        model = lora.load_base(given.args.model, "cls", given.args.quantize, lora.DTYPES[given.args.dtype],
                               DEVICE)
    else:
        model = from_pretrained(given, transformers.AutoModel)
    seconds, (after, peak) = CLOCKS[given.clock]() - began, mib(host=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return {"s": seconds, "MiB more at the peak": peak - before, "MiB more in the end": after - before}


def first_step_of(side, given, batches, began):
    side(given)[1](batches)
    return {"s to the first step": time.monotonic() - began if given.clock == "wall" else time.process_time()}


def load_row(options, quantize):
    given = prepare(options, "clsp")
    given.args.quantize, batches = quantize, batches_of(given, options)[:1]

    def figures(side):
        return in_process(load_of, side, given) | in_process(first_step_of, side, given, batches,
                                                             time.monotonic())
    return (partial(figures, ours), partial(figures, peer), "resident memory of the host, mapped files too; "
            "the first step counts from the start of a process that is given its prompts, with its imports")


# ---- Evaluation ----


def rate(function, given):
    """The side that `function` is."""
    began = CLOCKS[given.clock]()
    function()
    return {"annotations/s": len(given.encoded.prompt_index) / (CLOCKS[given.clock]() - began)}


def file_order(given, **how):
    """Inputs of one pass per annotation."""
    n = len(given.encoded.prompt_index)
    for k in range(0, n, EVAL_BATCH):
        inputs = collate(given, np.arange(k, min(n, k + EVAL_BATCH)), **how)
        yield {name: one.to(DEVICE) for name, one in inputs.items()}


def scores_row(options, method, many=False):
    given = prepare(options, method, "test", options.eval_rows, many)
    (model, _), theirs, n = ours(given), peft_model(given).eval(), len(given.encoded.prompt_index)
    dtype = lora.DTYPES[options.dtype]

    @torch.inference_mode()
    def other():
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):  # as Trainer.predict does
            for inputs in file_order(given):
                theirs(**inputs).logits.sigmoid().cpu()

    own = partial(infer.predict_scores, model, given.encoded, given.args.micro_batch_tokens, PROCESS)
    return (partial(rate, own, given), partial(rate, other, given),
            f"{n} annotations, {len(given.encoded.hashes)} prompts; {given.note}")


def taught_lmp(options, directory):
    """A model that was taught for some steps to end its answers, its adapter saved into the directory."""
    given = prepare(options, "lmp", n=options.lmp_steps * options.batch_size)
    given.args.learning_rate = 2e-3
    model, steps = ours(given)
    steps(data.training_steps(given.encoded, options.batch_size, 0, 0))
    layers = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, lora.LoRALinear)}
    lora.save_adapter(model, directory, options.model, given.args.lora_r, given.args.lora_alpha,
                      given.args.lora_dropout, layers, "lm")
    return model


def text_row(options, method, many=False, to_the_limit=False):
    given = prepare(options, method, "test", options.eval_rows, many)
    tokenizer, n, answers = lora.load_tokenizer(options.model), len(given.encoded.prompt_index), {}
    limit = infer.longest_response(tokenizer, given.names)
    theirs = from_pretrained(given, transformers.AutoModelForCausalLM).eval()
    if method == "lmp":
        from peft import PeftModel
        with tempfile.TemporaryDirectory() as directory:
            model = taught_lmp(options, directory)
            theirs = PeftModel.from_pretrained(theirs, directory).eval()
    else:
        model = lora.load_base(options.model, "query", options.quantize, lora.DTYPES[options.dtype], DEVICE)

    def own():
        texts, answers["steps"] = infer.generate(model, tokenizer, given.encoded, given.names,
                                                 given.args.micro_batch_tokens, PROCESS)
        answers["ours"] = [texts[m] for m in given.encoded.prompt_index]

    @torch.inference_mode()
    def other():
        answers["peer"] = []
        for inputs in file_order(given, left=True, responses=False):
            written = theirs.generate(**inputs, do_sample=False, max_new_tokens=limit, pad_token_id=0,
                                      min_new_tokens=limit if to_the_limit else None)
            answers["peer"] += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1]:],
                                                      skip_special_tokens=True)

    def note():
        same = sum(a.split() == b.split() for a, b in zip(answers["ours"], answers["peer"], strict=True))
        return (f"{n} annotations, {len(given.encoded.hashes)} prompts; {answers['steps']} decoding steps, "
                f"the peer at most {limit * -(-n // EVAL_BATCH)}; {same} answers equal; {given.note}")

    return partial(rate, own, given), partial(rate, other, given), note


# ---- Growth ----


def data_cost(model, clock, n, n_users):
    """Of data.load and encode of a generated long CSV: five annotations of each text, three labels."""
    tokenizer, chance = lora.load_tokenizer(model), np.random.default_rng(0)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write("text_id,user_id,text,funny,kind,rude\n")
        for text in range(n // 5):
            words = " ".join(f"w{k}" for k in chance.integers(0, 999, 20))
            users = chance.integers(0, n_users, 5)
            file.writelines(f"{text},u{user},{words},1,{user % 2},0\n" for user in users)
        file.flush()
        before, _ = mib(reset=True, host=True)
        began = CLOCKS[clock]()
        task, splits, _ = data.load(data.parse_args([file.name]))
        kept = [data.encode(tokenizer, task, METHODS["clsp"], part, 512) for part in splits.values()]
    assert sum(len(one.prompt_index) for one in kept) > 0.9 * n, "too few rows for so many users"
    return {"s": CLOCKS[clock]() - began, "MiB": mib(host=True)[1] - before}


def data_row(options, times=1, times_users=1):
    at = partial(partial, in_process, data_cost, options.model, options.clock)
    return (at(times * options.growth_rows, 10 * times_users), at(options.growth_rows, 10),
            f"1 x is {options.growth_rows} annotations of 10 users: data.load and encode")


def length_row(options):
    short = prepare(options, "clsp")
    long, encoded = copy.copy(short), short.encoded
    ids, offsets = data.flatten([np.tile(encoded.prompt(m), 2) for m in range(len(encoded.lengths))])
    long.encoded = dataclasses.replace(encoded, ids=ids, offsets=offsets)

    def cost(given):
        found = in_process(memory_of, ours, given, batches_of(short, options)[:2], 0)
        return {"s": found["s"], "MiB": found["MiB above the loaded model"]}

    return partial(cost, long), partial(cost, short), "two steps, no shared prefix: it would not grow"


def draw_growth(lines, path):
    """Cost over size, both as multiples; the dashed line is proportional growth."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.8), dpi=150)
    axes.plot([1, 16], [1, 16], "k--", linewidth=1, label="proportional")
    curves = {}
    for name, unit, ratio in lines:
        times, _, what = name.removeprefix("growth ").partition("x ")
        curves.setdefault(what, {}).setdefault(unit, {1: 1.0})[int(times)] = ratio
    for k, (what, units) in enumerate(curves.items()):
        for unit, points in units.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), "os^"[k] + ("-" if unit == "s" else ":"),
                      color=f"C{k}", label=f"{what}: {'time' if unit == 's' else 'memory'}")
    axes.set(xscale="log", yscale="log", xlabel="size, as a multiple", ylabel="cost, as a multiple")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_ticks([1, 2, 4, 8, 16], list("1248") + ["16"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


# ---- The table ----


class Row(NamedTuple):
    name: str
    sides: Callable  # options -> (ours, peer, note); the first two return {unit: figure}
    units: tuple  # those that are shown
    target: str  # of ours / peer, in the first unit; in the rows `growth` in both
    gpu_target: str


SPEED, GROWTH = ("annotations/s",), ("s", "MiB")
MEMORY = ("MiB at the peak", "MiB above the loaded model")
LOAD = ("s", "MiB more at the peak", "MiB more in the end", "s to the first step")


def row(name, units, sides, target="", gpu_target=None, **how):
    """A row whose target is the same on CPU and GPU, if not told otherwise."""
    return Row(name, partial(sides, **how), units, target, target if gpu_target is None else gpu_target)


ROWS = {each.name: each for each in (
    row("train clsp", SPEED + ("tokens/s", "% of the peak"), train_row, ">= 2", ">= 1.5", method="clsp"),
    row("train clsp, peer checkpointing", SPEED, train_row, ">= 3", ">= 2.2", method="clsp",
        checkpointing=True),
    *(row(f"train {method}", SPEED, train_row, method=method) for method in ("cls", "lm", "lmp")),
    row("train cls, merged", SPEED, merge_row, ">= 2.5"),
    row("memory clsp", MEMORY, memory_row, "<= 0.7", "<= 0.8"),
    row("memory lm, logits of the response alone", MEMORY, logits_row),
    row("evaluate clsp", SPEED, scores_row, method="clsp"),
    row("evaluate cls", SPEED, scores_row, ">= 3", method="cls", many=True),
    row("evaluate q0s", SPEED, text_row, ">= 3", method="q0s", many=True),
    row("evaluate lmp", SPEED, text_row, ">= 5", method="lmp", to_the_limit=True),
    row("evaluate lmp, peer ends too", SPEED, text_row, method="lmp"),
    row("evaluate q2s", SPEED, text_row, method="q2s"),
    *(row(f"load {quantize}", LOAD, load_row, quantize=quantize) for quantize in ("none", "nf4")),
    *(row(f"growth {k}x annotations", GROWTH, data_row, f"<= {k}", times=k) for k in (4, 16)),
    row("growth 10x users", GROWTH, data_row, "<= 10", times_users=10),
    row("growth 2x tokens of a step", GROWTH, length_row, "<= 2"),
)}


def run_row(options, row):
    """Runs, prints and records a row; returns (its note, [(name, unit, median ratio)])."""
    def shown(figures):
        return "{:.4g} ({:.4g}..{:.4g})".format(statistics.median(figures), min(figures), max(figures))

    own, other, note = row.sides(options)
    rounds, lines = [(own(), other()) for _ in range(options.rounds)], []
    note = (note() if callable(note) else note) + options.note
    for k, unit in enumerate(row.units):
        target = (row.gpu_target if ON_GPU else row.target) if not k or row.units == GROWTH else ""
        mine, theirs = ([figures[side][unit] for figures in rounds] for side in (0, 1))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        print(f"| {row.name}, {unit} | {shown(mine)} | {shown(theirs)} | {shown(ratios)} | {target} |",
              flush=True)
        record(options, row.name, unit, mine, theirs, target, note)
        lines.append((row.name, unit, statistics.median(ratios)))
    if row.gpu_target != row.target and not ON_GPU:
        print(f"| {row.name}, on a GPU | not run: no GPU | | | {row.gpu_target} |", flush=True)
        record(options, row.name, row.units[0], target=row.gpu_target, note="not run: no GPU")
    return note, lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, shows = parser.add_argument, "(default: %(default)s)"
    add("--model", help="a directory or hub id (default: a tiny one, whose figures mean nothing)")
    add("--dataset", help="as train.py's (default: a synthetic one)")
    add("--rows", nargs="+", choices=ROWS, metavar="NAME", help=f"of {list(ROWS)} (default: all)")
    add("--rounds", type=infer.positive, default=3, help=shows)
    add("--steps", type=infer.positive, default=4, help=f"optimizer steps of a side in a round {shows}")
    add("--batch_size", type=infer.positive, default=8, help=f"annotations per step {shows}")
    add("--eval_rows", type=infer.positive, default=2000 if ON_GPU else 64, help=f"annotations {shows}")
    add("--lmp_steps", type=infer.positive, default=24, help=f"that teach lmp to end its answers {shows}")
    add("--growth_rows", type=infer.positive, default=10000, help=f"annotations of 1 x {shows}")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds of the process, which other "
        f"work on the machine hardly changes; with OMP_NUM_THREADS=1 {shows}")
    add("--dtype", choices=lora.DTYPES, default="bf16", help=shows)
    add("--quantize", choices=("none", "nf4"), default="none", help=shows)
    data.add_arguments(parser)
    add_results(parser)
    options, notes, growth = parser.parse_args(argv), {}, []
    options.note = "" if options.model else "; a tiny model: the figures mean nothing"
    with tempfile.TemporaryDirectory() as work:
        import tiny

        if not options.dataset:
            tiny.write_corpora(work, 0, "mini")
            options.dataset, options.data_dir = "goemotions", f"{work}/goemotions"
        if not options.model:
            options.model = f"{work}/mistral"
            tiny.write_model(options.model, "mistral")
        print("| row | ours (median, min..max) | peer | ratio (spread) | target |\n|---|---|---|---|---|")
        for name in options.rows or ROWS:
            notes[name], lines = run_row(options, ROWS[name])
            growth += lines if name.startswith("growth") else []
            gc.collect()
            torch.cuda.empty_cache()
    print("\n" + "\n".join(f"{name}: {note}" for name, note in notes.items()))
    if growth and options.results:
        draw_growth(growth, options.results.with_name("growth.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
