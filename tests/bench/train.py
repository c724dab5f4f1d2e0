"""Training speed beside transformers Trainer + peft, in one run, in turns, on the same prompts.

    python tests/bench/train.py [--model DIR] [--dataset CSV] [--steps 6] [--rounds 3] [--dtype bf16]

Both train CLS-P with LoRA (r 2) on all linear layers but the last, without checkpointing, in one dtype, on
the same batches. Prints annotations per second of each round and the ratio of the medians. Without
--model it uses a tiny model, whose figures say nothing about speed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

import data  # noqa: E402
import infer  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402


def ours(args, encoded, n_labels):
    """A function that trains `steps` steps and returns their seconds."""
    network, parameters, _ = train.build(args, n_labels, "cpu" if not torch.cuda.is_available() else "cuda")
    device = next(network.parameters()).device
    objective = train.Objective(network, "cls", 10**6, infer.Processes(device=device))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    buffer, scale, prefix = (
        train.flat_gradients(parameters),
        train.LossScale(False),
        data.shared_prefix(encoded),
    )

    def steps(batches):
        began = time.perf_counter()
        for rows in batches:
            train.train_step(objective, optimizer, buffer, scale, encoded, rows, prefix)
        return time.perf_counter() - began

    return steps


def theirs(args, encoded, n_labels, batch_size):
    """The same of transformers Trainer + peft."""
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        num_labels=n_labels,
        dtype=lora.DTYPES[args.dtype],
        problem_type="multi_label_classification",
    )
    model.config.pad_token_id = 0
    model = get_peft_model(
        model,
        LoraConfig(
            r=args.lora_r,
            lora_alpha=32,
            lora_dropout=0.05,
            task_type="SEQ_CLS",
            target_modules="all-linear",
            exclude_modules=["score"],
        ),
    )

    def collate(rows):
        prompts = [encoded.prompt(encoded.prompt_index[row]) for row in rows]
        return {
            "input_ids": torch.from_numpy(data.pad(prompts, 0)),
            "attention_mask": torch.from_numpy(data.pad([np.ones(len(p), np.int64) for p in prompts], 0)),
            "labels": torch.from_numpy(encoded.labels[rows]),
        }

    def steps(batches):
        with tempfile.TemporaryDirectory() as out:
            settings = TrainingArguments(
                out,
                per_device_train_batch_size=batch_size,
                num_train_epochs=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
                bf16=args.dtype == "bf16",
                use_cpu=not torch.cuda.is_available(),
                learning_rate=1e-4,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
            )
            rows = [int(row) for batch in batches for row in batch]
            trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)
            return trainer.train().metrics["train_runtime"]  # without its set-up

    return steps


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="bf16", choices=lora.DTYPES)
    bench = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        tiny.write_corpora(work, 0, "mini")
        model = bench.model or f"{work}/mistral"
        if not bench.model:
            tiny.write_model(model, "mistral")
        args = train.parse_args(
            [
                "--method",
                "clsp",
                "--model",
                model,
                "--dtype",
                bench.dtype,
                "--quantize",
                "none",
                "--dataset",
                bench.dataset or "goemotions",
                "--data_dir",
                f"{work}/goemotions",
            ]
        )
        task, splits, _ = infer.load_splits(args)
        encoded = infer.encode_split(args, lora.load_tokenizer(model), task, splits, "train")
        runs = {
            "ours": ours(args, encoded, len(task.label_names)),
            "Trainer + peft": theirs(args, encoded, len(task.label_names), bench.batch_size),
        }
        batches = data.training_steps(encoded, bench.batch_size, 0, 0)[: bench.steps]
        n, speed = sum(map(len, batches)), {name: [] for name in runs}
        for steps in runs.values():
            steps(batches[:1])  # warm up
        for _ in range(bench.rounds):
            for name, steps in runs.items():
                speed[name].append(n / steps(batches))
    for name, found in speed.items():
        print(f"{name:<16}" + " ".join(f"{one:8.2f}" for one in found) + "   annotations/s")
    ours_median, theirs_median = (statistics.median(found) for found in speed.values())
    print(f"ratio of medians {ours_median / theirs_median:.2f}")


if __name__ == "__main__":
    main()
