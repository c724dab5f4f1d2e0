"""The README: its blocks are what the code and the results say, and its commands run as they are written."""

import os
import re
import subprocess
import sys

import ledger

README = (ledger.ROOT / "README.md").read_text()
RUNNABLE = re.findall(r"<!-- runnable -->\n```bash\n(.*?)```", README, re.DOTALL)


def test_every_block_is_what_the_code_and_the_results_say():
    """`python tests/ledger.py readme` writes them anew."""
    for page in ledger.PAGES:
        before, after = ledger.filled(page)
        assert before == after, page


def test_every_link_within_the_pages_leads_somewhere():
    for page in ledger.PAGES:
        folder = (ledger.ROOT / page).parent
        for target in re.findall(r"\]\((?!http)([^)]+)\)", (ledger.ROOT / page).read_text()):
            path, _, anchor = target.partition("#")
            linked = (folder / path) if path else ledger.ROOT / page
            assert linked.exists(), (page, target)
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
            assert not anchor or anchor in anchors, (page, target)


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 220


def test_every_number_of_the_ledger_has_its_command_commit_and_device():
    for line in ledger.read("ledger.jsonl"):
        assert line["command"] and line["commit"] and line["device"] and line["seeds"] and line["n"], line
        assert "/work" not in line["command"] and "/tmp" not in line["command"]


def test_the_readme_names_every_make_target_and_profile():
    makefile = (ledger.ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for profile in re.findall(r"PROFILE=(\w+)", README):
        assert re.search(rf"^CELLS_{profile} :?=", makefile, re.MULTILINE), profile


def test_the_commands_that_are_marked_runnable_run_as_written(tiny_dir, tmp_path):
    """In their order, where `make reproduce` has run; `make` itself is only asked for its plan."""
    for name in (*ledger.SUBJECTS, "Makefile", "tests", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).symlink_to(ledger.ROOT / name)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "inputs").symlink_to(tiny_dir)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    assert len(RUNNABLE) == 3
    for line in "".join(RUNNABLE).splitlines():
        command = re.sub(r"^make ", "make -n ", line.partition(" #")[0])
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr[-2000:])
