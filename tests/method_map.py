"""The tags of the code, such as [lora.3] or [choice.T2]: where each stands, and which tests name it.

    python tests/method_map.py      prints the rows of the README's method map
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


if __name__ == "__main__":
    tests = tags_in_tests()
    for tag, where in sorted(tags_in_code().items()):
        print(f"| {tag} | {', '.join(where)} | {(tests.get(tag) or ['?'])[0]} |")
