"""One wrong line per tag of the method map: does the test that the map names notice it?

    python tests/mutants.py [TAG ...]      prints killed or SURVIVED for each; exit status 1 if one survives

A mutant is applied in a temporary copy of the repository, where the mapped test runs alone, in a fork of this
process, which has the libraries already. It is killed by a failure of that test only: code that cannot be
imported, or a test that is not found, counts as broken.
"""

import argparse
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import method_map

sys.path.append(str(Path(__file__).parent / "bench"))
from measure import append  # noqa: E402

LIBRARIES = ["pytest", "torch", "peft", "bitsandbytes", "sklearn.metrics", "hypothesis", "requests", *(
    f"transformers.models.{name}" for name in (
        "auto.modeling_auto", "mistral.modeling_mistral", "phi.modeling_phi", "gpt_neox.modeling_gpt_neox",
        "t5.modeling_t5", "llama.modeling_llama"))]

MUTANTS = [  # (tag, old text, new text): the old text stands once in the tag's script
    ("method.Q", '"q0s": Method("query", False, 0)', '"q0s": Method("cls", False, 0)'),
    ("method.Q-NS", '"q1s": Method("query", False, 1)', '"q1s": Method("query", False, 2)'),
    ("method.CLS", '"cls": Method("cls", False, 0)', '"cls": Method("lm", False, 0)'),
    ("method.CLS-P", '"clsp": Method("cls", True, 0)', '"clsp": Method("cls", False, 0)'),
    ("method.LM", '"lm": Method("lm", False, 0)', '"lm": Method("cls", False, 0)'),
    ("method.LM-P", '"lmp": Method("lm", True, 0)', '"lmp": Method("lm", False, 0)'),
    ("choice.P2", '"q1s": Method("query", False, 1)', '"q1s": Method("query", True, 1)'),
    ("choice.D6", '"antagonize condescending', '"antagonistic condescending'),
    ("choice.P3", '"emotion"),  # the appendix', '"label"),  # the appendix'),
    ("choice.P4", 'join(f"- {name}" for name in task.label_names)', 'join(task.label_names)'),
    ("choice.P5", '"\\n".join(["### User ID:"', '" ".join(["### User ID:"'),
    ("choice.P6", 'before = request + "\\n\\n"', 'before = request + " \\n\\n"'),
    ("metric.F1", "f1_per_label(gold, predicted).mean()", "f1_per_label(gold, predicted).max()"),
    ("metric.gain", "/ baseline * 100", "/ personalised * 100"),
    ("choice.E4", "np.maximum(2 * true + false + missed, 1)", "(2 * true + false + missed)"),
    ("choice.E1", "data.scores >= np.asarray(thresholds)", "data.scores >= 0.5"),
    ("choice.E6", "gain(cell[key], base[key])", "gain(base[key], cell[key])"),
    ("choice.E7", "upto - before - here / 2", "upto - before - here"),
    ("choice.T11", "integers(len(runs), size", "integers(1, size"),
    ("choice.D1", "(n >= min_share", "(n > min_share"),
    ("choice.D2", "np.argwhere(n > max_share * most)", "np.argwhere(n > most)"),
    ("choice.D3", "rows[: int(n[u, s] - max_share", "rows[: 1 + int(n[u, s] - max_share"),
    ("choice.D4", '("val", "test", "train"):', '("test", "val", "train"):'),
    ("choice.D5", "stage(again, (n > 0).all(axis=1)[user])  # the cuts", "stage(again, keep)  # the cuts"),
    ("choice.T2", 'tokenizer.eos_token if train_eos else ""', '""'),
    ("choice.P1", '"train" if follows(args)["P1"] == "paper" else "test"', '"test"'),
    ("choice.E5", '"temperature": 0,', '"temperature": 1,'),
    ("choice.P7", '"--chat_template", action="store_true"', '"--chat_template", action="store_false"'),
    ("choice.T9", "Mistral-7B-Instruct-v0.2", "Mistral-7B-v0.1"),
    ("nf4.5", 'compress_statistics=True, quant_type="nf4"', 'compress_statistics=False, quant_type="nf4"'),
    ("nf4.6", "quant_state=self.state, bias=self.bias)", "quant_state=self.state, bias=None)"),
    ("lora.3", "alpha=self.scaling)", "alpha=1)"),
    ("choice.T3", "set(target_modules or present)", 'set(target_modules or present) - {"wo", "q_proj"}'),
    ("cls.head", "states[rows, lengths - 1 - prefix]", "states[rows, -1]"),
    ("cls.t5", '("dense", torch.tanh)', '("dense", torch.relu)'),
    ("choice.T5", "if t5 and dtype == torch.float16", "if t5 and dtype == torch.bfloat16"),
    ("choice.T10", "for p in model.parameters() if not p.requires_grad)", "for p in model.parameters())"),
    ("loss.cls", "encoded.lengths[prompts], targets,", "encoded.lengths[prompts], np.ceil(targets),"),
    ("choice.T1", "1 if all_positions else len(ids)", "1"),
    ("loss.lm", 'tokens, reduction="none") * weights)', 'tokens, reduction="none"))'),
    ("step.schedule", "peak * 0.5 * (1 + math.cos", "peak * 0.5 * (1 - math.cos"),
    ("step.unscale", "buffer[:-2].div_(scale.value)", "buffer[:-2].div_(1)"),
    ("step.clip", "min(1.0, max_grad_norm", "max(1.0, max_grad_norm"),
    ("choice.T7", 'if val_loss < state["best_val_loss"]', 'if val_loss <= float("inf")'),
    ("choice.T4", '"] == "released"  # [choice.T4]', '"] == "paper"  # [choice.T4]'),
    ("choice.T6", 'above_zero, default=1e-4', 'above_zero, default=1e-3'),
]


def mapped():
    """{tag: (script, test)} of the method map."""
    row = re.compile(r"^\| `([a-z0-9]+\.[\w-]+)` \|.*\| `([\w.]+): [\w.]+` \| `(\w+)` \|$", re.MULTILINE)
    readme = (method_map.ROOT / "results" / "README.md").read_text()
    return {tag: (script, test) for tag, script, test in row.findall(readme)}


def outcome(copy, test):
    """killed, SURVIVED or broken, by the test alone."""
    (file,) = [path for path in (copy / "tests").glob("test_*.py") if f"def {test}(" in path.read_text()]
    if not (child := os.fork()):
        os.chdir(copy)
        sys.path[:] = [place for place in sys.path if Path(place) != method_map.ROOT / "tests"]
        del sys.modules["method_map"]
        for number in (1, 2):
            os.dup2(os.open(copy / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={copy.parent}/pytest"]
        os._exit(importlib.import_module("pytest").main([*options, str(file), "-k", test]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "SURVIVED", 1: "killed"}.get(code, f"broken: {(copy / 'output').read_text()[-1000:]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("tags", nargs="*", help="(default: all)")
    parser.add_argument("--results", type=Path, help="a file that gets a JSON line")
    args, places, found = parser.parse_args(argv), mapped(), []
    if places.keys() != (own := {tag for tag, _, _ in MUTANTS}):
        raise ValueError(f"tags without a mutant or the other way round: {sorted(places.keys() ^ own)}")
    for name in LIBRARIES:
        importlib.import_module(name)
    print("| tag | old | new | test | outcome | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        copy, left_out = Path(directory, "copy"), shutil.ignore_patterns(".*", "runs", "data", "__pycache__")
        shutil.copytree(method_map.ROOT, copy, ignore=left_out)
        for tag, old, new in MUTANTS:
            script, test = places[tag]
            text, started = (method_map.ROOT / script).read_text(), time.perf_counter()
            if args.tags and tag not in args.tags:
                continue
            if text.count(old) != 1:
                raise ValueError(f"{tag}: {old!r} stands {text.count(old)} times in {script}")
            (copy / script).write_text(text.replace(old, new))
            shutil.rmtree(copy / "__pycache__", ignore_errors=True)  # its times are too coarse for a mutant
            found.append(outcome(copy, test))
            (copy / script).write_text(text)
            seconds = time.perf_counter() - started
            print(f"| `{tag}` | `{old}` | `{new}` | `{test}` | {found[-1]} | {seconds:.0f} |", flush=True)
    lost = len(found) - found.count("killed")
    print(f"{len(found) - lost} of {len(found)} killed")
    if args.results and not args.tags:
        append(args.results, {"what": "a tagged line negated or dropped, unseen by its test", "lost": lost,
                              "injected": len(found), "command": "python tests/mutants.py"})
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
