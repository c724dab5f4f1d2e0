"""The tags of the code, such as [lora.3] or [choice.T2]: where each stands, and which tests name it.

    python tests/method_map.py      prints the rows of the method map in results/README.md
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("prompts.py", "metrics.py", "data.py", "lora.py", "infer.py", "train.py")
TAG = re.compile(r"\[([a-z]+[0-9]*\.[A-Za-z0-9-]+)\]")


def definitions(tree):
    """(first line, last line, dotted name) of every function and class, the innermost last."""
    found = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".lstrip(".")
                found.append((child.lineno, child.end_lineno, name))
            visit(child, name)

    visit(tree, "")
    return found


def tags_in_code():
    """{tag: list of "script: function"} from the comments of the scripts."""
    places = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        spans = definitions(ast.parse(text))
        for number, line in enumerate(text.splitlines(), start=1):
            for tag in TAG.findall(line.partition("#")[2]):
                inside = [name for first, last, name in spans if first <= number <= last]
                places.setdefault(tag, []).append(f"{script}: {inside[-1] if inside else 'module'}")
    return places


def tags_in_tests():
    """{tag: list of test names} from the docstrings of the tests."""
    places = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for tag in TAG.findall(ast.get_docstring(node) or ""):
                    places.setdefault(tag, []).append(node.name)
    return places


SECTIONS = {  # tag -> where the paper, or who else, says it; a choice is a row of the audit
    "cls.head": "IV-B", "cls.t5": "IV-B", "lora.3": "VI-C; LoRA eq. 3", "loss.cls": "IV-B", "loss.lm": "IV-C",
    "method.CLS": "IV-B", "method.CLS-P": "V-B", "method.LM": "IV-C", "method.LM-P": "V-C",
    "method.Q": "IV-A", "method.Q-NS": "V-A", "metric.F1": "VI", "metric.gain": "VII",
    "nf4.5": "VI-C; QLoRA eq. 5", "nf4.6": "VI-C; QLoRA eq. 6", "step.unscale": "VI-C, fp16",
    "step.clip": "not in the paper", "step.schedule": "not in the paper",
}


def rows():
    """The lines of the method map in results/README.md."""
    code, tests = tags_in_code(), tags_in_tests()
    yield from ("| tag | paper | where | test |", "|---|---|---|---|")
    for tag in sorted(code, key=lambda tag: (tag.startswith("choice"), tag)):
        section = SECTIONS.get(tag) or f"audit row {tag.partition('.')[2]}"
        yield f"| `{tag}` | {section} | `{code[tag][0]}` | `{(tests.get(tag) or ['?'])[0]}` |"


if __name__ == "__main__":
    print("\n".join(rows()))
