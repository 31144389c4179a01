"""Pages and README: commands that their programs take, files and links that exist."""

from pathlib import Path
import re
import shlex

import pytest

from bpd_jax import evaluate, plan, train  # noqa: F401  plan's names for gin.
from bpd_jax.launch import read_gin

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "experiments").glob("*/README.md"))]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Those whose required arguments are checked here as well.
ENTRIES = {"evaluate": evaluate.evaluate, "plan": None, "train": train.train}


def gin_commands():
  """(page, arguments) of every command that is configured by gin."""
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    lines = [line for block in blocks for line in block.split("\n")]
    lines += re.findall(r"`(python -m [^`]*)`", text)
    for line in lines:
      found = re.search(r"python -m bpd_jax\.(train|evaluate|plan) (.*)", line)
      # But for files of the reader's, and what stands for many.
      if found and "--gin_file" in line and not re.search(r"(copying|turning)\.gin|…|\$", line):
        yield page.name, found[1], shlex.split(found[2], comments=True)


COMMANDS = list(gin_commands())


def test_there_are_commands():
  assert len(COMMANDS) > 15 and len({page for page, *_ in COMMANDS}) > 7


@pytest.mark.parametrize("page, program, argv", COMMANDS)
def test_gin_commands_can_be_read(page, program, argv, monkeypatch):
  monkeypatch.chdir(ROOT)
  read_gin([word for word in argv if word != "--help"], program, "", ENTRIES[program])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
    if not target.startswith("http"):
      assert (page.parent / target).exists(), target
