"""The decode command: what it prints is what the generator did, and bad input is one line."""

import io
import json
import os
from pathlib import Path
import re
import subprocess
import sys
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from rich.console import Console

from bpd_jax.addons.addon import make_addon
from bpd_jax.addons.folder import save_addon, save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.decode import describe_call, main, read_prompts
from bpd_jax.errors import InputError
from bpd_jax.generation import Call, load
from bpd_jax.launch import run
from bpd_jax.model.config import ModelConfig
from bpd_jax.model.model import init_params
from bpd_jax.partitioning import single_device
from bpd_jax.vocabulary import ByteVocabulary

ROOT = Path(__file__).resolve().parent.parent
BYTES = ByteVocabulary()
CONFIG = ModelConfig(
    vocab_size=384, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1,
)
HEADS = Heads(4, 16)
PROMPTS = ["one prompt", "ü — [/bold] :smile:"]
# What the model can write. Two letters and a line break, so that heads of noise
# are often right.
LETTERS = [*BYTES.encode("a"), *BYTES.encode("b"), *BYTES.encode("\n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  vocabulary = folder / "tokenizer_config.json"
  vocabulary.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  params = jax.device_get(init_params(CONFIG, single_device(), jax.random.key(3)))
  rng = np.random.default_rng(0)
  own = jax.device_get(HEADS.begin(CONFIG, single_device(), jax.random.key(4)))
  own["w2"] = rng.standard_normal(own["w2"].shape, np.float32)
  kernel = np.zeros_like(params["logits_kernel"])
  # No letter's column is another's, and some is positive: nothing else is ever written.
  kernel[:, LETTERS] = rng.standard_normal([CONFIG.d_model, len(LETTERS)])
  kernel[:, LETTERS[-1]] = -kernel[:, LETTERS[0]] - kernel[:, LETTERS[1]]
  params["logits_kernel"] = kernel
  save_model_with(folder / "model", CONFIG, params, vocabulary, HEADS, own)
  return str(folder / "model")


@pytest.fixture(scope="module")
def expected(folder):
  return load(folder).generate(PROMPTS, "blockwise", max_length=12, batch_size=2)


def shown_by(capsys, folder, *options):
  """What the command prints, with every head in each call where no method is named."""
  method = () if "--method" in options else ("--method", "blockwise")
  main(["--checkpoint", folder, "--max-length", "12", *method, *options])
  return capsys.readouterr().out


def test_call_on_a_line():
  accepted, other = BYTES.encode("a b"), BYTES.encode("x\n")
  call = Call([*accepted, *other], [*accepted, 1], accepted=[*range(len(accepted))])
  text = describe_call(7, call, BYTES)
  assert text.plain == "    7  3/5  +a +▁ +b =</s> -x -\\n"
  styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
  assert styles == {
      "+a": "green", "+▁": "green", "+b": "green", "=</s>": "bold", "-x": "red", "-\\n": "red"
  }
  assert describe_call(1, Call([], accepted[:1]), BYTES).plain == "    1  0/0  =a"
  # An accepted EOS ends the row: the call has no token of the base model's own.
  last = Call([1, 9], [1], accepted=[0])
  assert describe_call(2, last, BYTES).plain == "    2  1/2  +</s> -\\x06"


def test_prompts_and_outputs_and_counts(folder, expected, capsys):
  out = shown_by(capsys, folder, *PROMPTS)
  tokens, calls = [len(row) for row in expected.tokens], expected.calls
  assert sum(calls) < sum(tokens) == 24
  counts = lambda n, m: f"{n} tokens, {m} decoder calls, block efficiency {n / m:.2f}\n"
  assert out == "".join([
      "# 1: one prompt\n", f"{expected.texts[0]}\n", "# ", counts(tokens[0], calls[0]),
      "# 2: ü — [/bold] :smile:\n", f"{expected.texts[1]}\n", "# ", counts(tokens[1], calls[1]),
      "# all 2: ", counts(sum(tokens), sum(calls)),
  ])


def test_greedy_writes_the_same_in_more_calls(folder, expected, capsys):
  out = shown_by(capsys, folder, "--method", "greedy", PROMPTS[0])
  assert out == (
      f"# 1: one prompt\n{expected.texts[0]}\n"
      "# 12 tokens, 12 decoder calls, block efficiency 1.00\n"
  )


def test_an_addon_drafts_in_place_of_the_models_heads(folder, expected, capsys, tmp_path):
  model = load(folder)
  heads, own = Heads(3, 8), Heads(3, 8).begin(CONFIG, single_device(), jax.random.key(5))
  save_addon(tmp_path / "addon", heads, own, model)
  found = model.generate(
      PROMPTS, make_addon(heads, own, model).drafting, max_length=12, batch_size=2
  )
  assert found.calls != expected.calls
  out = shown_by(capsys, folder, "--addon", str(tmp_path / "addon"), *PROMPTS)
  assert all(f"\n{text}\n# 12 tokens, {calls} decoder calls" in out
             for text, calls in zip(expected.texts, found.calls, strict=True))
  # The model's own heads are an add-on of its folder.
  narrow = shown_by(
      capsys, folder, "--addon", f"{folder}/addons/heads", "--block-size", "2", *PROMPTS
  )
  assert narrow == shown_by(capsys, folder, "--block-size", "2", *PROMPTS)


def test_block_sizes_are_chosen_by_costs_that_a_file_can_hold(folder, expected, capsys, tmp_path):
  file = str(tmp_path / "costs.json")
  out = shown_by(capsys, folder, "--method", "auto", "--save-costs", file, *PROMPTS)
  assert all(f"\n{text}\n# 12 tokens, " in out for text in expected.texts)
  fields = json.loads(Path(file).read_text())
  assert fields["widths"] == [1, 2, 4] and fields["of"]["batch_size"] == 2
  # With calls that cost alike every call after a row's first drafts all it can; with dear
  # ones hardly any does.
  for seconds in ([1, 1, 1], [1, 9, 9]):
    Path(file).write_text(json.dumps(fields | {"seconds": seconds}))
    out = shown_by(capsys, folder, "--method", "auto", "--costs", file, *PROMPTS)
    found = [int(n) for n in re.findall(r"^# \d+ tokens, (\d+) decoder calls", out, re.MULTILINE)]
    assert len(found) == 2
    assert (found == expected.calls) == (seconds[1] == 1) and sum(found) >= sum(expected.calls)
  with pytest.raises(InputError, match="costs batch_size = 2: allowed is 1, as it is here"):
    main(["--checkpoint", folder, "--costs", file, PROMPTS[0]])
  # Two widths alone, of heads that draft one token.
  out = shown_by(
      capsys, folder, "--method", "auto", "--block-size", "2", "--save-costs", file, *PROMPTS
  )
  assert json.loads(Path(file).read_text())["widths"] == [1, 2]


@pytest.mark.parametrize("option", ["--show-drafts", "--show_drafts"])
def test_drafts_read_back_are_the_traces(folder, expected, capsys, option):
  out = shown_by(capsys, folder, option, *PROMPTS)
  assert "\x1b" not in out
  assert "+ accepted" in out and "- rejected" in out
  rows = re.findall(r"^# \d: .*?^# \d+ tokens", out, re.MULTILINE | re.DOTALL)
  ids = {"a": LETTERS[0], "b": LETTERS[1], "\\n": LETTERS[2]}
  kinds = set()
  for row, trace in zip(rows, expected.traces, strict=True):
    lines = re.findall(r"^ +(\d+)  (\d+)/(\d+)  (.*)$", row, re.MULTILINE)
    assert [int(line[0]) for line in lines] == list(range(1, len(trace) + 1))
    for (_, accepted, drafted, pieces), call in zip(lines, trace, strict=True):
      tokens = [(piece[0], ids[piece[1:]]) for piece in pieces.split(" ")]
      of = lambda signs, tokens=tokens: [token for sign, token in tokens if sign in signs]
      assert of("+=") == call.emitted and of("+-") == call.draft
      assert (len(of("+")), len(of("+-"))) == (int(accepted), int(drafted))
      kinds |= {sign for sign, _ in tokens}
  # Otherwise nothing was told apart.
  assert kinds == {"+", "-", "="}


def test_colours_on_a_terminal():
  console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
  console.print(describe_call(1, Call(LETTERS, LETTERS[:2], accepted=[0, 1]), BYTES))
  out = console.file.getvalue()
  assert "\x1b[32m+a\x1b[0m" in out and "\x1b[31m-\\n\x1b[0m" in out


def test_prompts_come_from_a_file_or_standard_input(tmp_path, monkeypatch):
  lines = tmp_path / "prompts.txt"
  lines.write_text("one\n\n  two ü\nthree", encoding="utf-8")
  prompts = lambda file, field: [*read_prompts([], file, field).values()]
  assert read_prompts([], str(lines), None) == {
      f"{lines}:1": "one", f"{lines}:3": "  two ü", f"{lines}:4": "three"
  }
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("four\nfünf\n".encode())))
  assert read_prompts([], None, None) == {
      "standard input:1": "four", "standard input:2": "fünf"
  }
  objects = tmp_path / "prompts.jsonl"
  objects.write_text(json.dumps({"q": "two\nlines"}) + "\n\n" + json.dumps({"q": "x"}) + "\n")
  assert prompts(str(objects), "q") == ["two\nlines", "x"]
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"q": "y"}')))
  assert prompts(None, "q") == ["y"]
  assert read_prompts(["a", "b"], None, None) == {"prompts[0]": "a", "prompts[1]": "b"}


# As people paste them: none of these ends a line.
INSIDE = ["one\u2028still one", "two\x0cstill two", "three\x85still three", "a\x0b\x1c\u2029b"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_only_a_line_feed_ends_a_prompt(folder, tmp_path, monkeypatch, capsys, ending):
  data = "".join(text + ending for text in INSIDE).encode()
  path = tmp_path / "prompts.txt"
  path.write_bytes(data)
  objects = tmp_path / "prompts.jsonl"
  objects.write_text(
      "".join(json.dumps({"q": text}, ensure_ascii=False) + ending for text in INSIDE),
      encoding="utf-8", newline="",
  )
  assert [*read_prompts([], str(path), None).values()] == INSIDE
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
  assert [*read_prompts([], None, None).values()] == INSIDE
  assert [*read_prompts([], str(objects), "q").values()] == INSIDE
  if ending == "\n":
    assert "# all 4: " in shown_by(capsys, folder, "--file", str(path))


@pytest.mark.parametrize("content, prompts, field, message", [
    (None, [], None, r"file = .*absent.*: allowed is a UTF-8 text file \(No such file"),
    (b"\n \n", [], None, r"file = .*: allowed is at least one prompt"),
    (b"a\nb\xffc\n", [], None, r"^\S*prompts\.txt:2 = b'\\xff': allowed is text in UTF-8"),
    (b'{"q": "a"}\n{"q": "\xff"}', [], "q", r"^\S*prompts\.txt:2 = b'\\xff': allowed is text in"),
    (b'\n{"q": "a \\ud83d b"}', [], "q",
     r"^\S*prompts\.txt:2 q = 'a \\ud83d b': allowed is text in UTF-8, where '\\ud83d' is no"),
    (b"{}", [], "q", r"prompts\.txt:1 q = None: allowed is a text"),
    (b"\n", [], "q", r"file = .*: allowed is at least one row"),
    (b"x", ["y"], None, r"file = .*: allowed is no option beside prompts on the command line"),
])
def test_bad_files(tmp_path, content, prompts, field, message):
  path = tmp_path / ("absent" if content is None else "prompts.txt")
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    read_prompts(prompts, str(path), field)


def test_jsonl_without_a_field_is_not_decoded_as_text(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"inputs": "x"}\n')
  with pytest.raises(InputError, match=r"field = None: allowed is the field of .*rows\.jsonl"):
    read_prompts([], str(path), None)
  with pytest.raises(InputError, match="field = 'q': allowed is no option beside prompts"):
    read_prompts(["x"], None, "q")


def test_a_prompt_of_a_file_is_named_by_its_line(folder, tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("fine\n\n" + "x" * 2048 + "\n")
  with pytest.raises(InputError, match=r"^\S*prompts\.txt:3 length = 2049: allowed is 1 … 2048"):
    main(["--checkpoint", folder, "--file", str(path)])
  with pytest.raises(InputError, match=r"^prompts\[1\] = 'caf\\ud83d': allowed is text in UTF-8"):
    load(folder).generate(["fine", "caf\ud83d"], "blockwise")


@pytest.mark.parametrize("options, message", [
    (["  "], "prompts[0] = '  ': allowed is a text that isn't empty"),
    (["fine", "x" * 2048], "prompts[1] length = 2049: allowed is 1 … 2048"),
    (["fine", "caf\ud83d"], "argument 4 = 'caf\\ud83d': allowed is text in UTF-8"),
    (["x", "--block-size", "5"], "block_size = 5: allowed is 1 … 4, the heads"),
    (["x", "--block-size", "2", "--method", "greedy"], "block-size = 2: allowed is no option of"),
    (["x", "--addon", "a", "--method", "greedy"], "addon = 'a': allowed is no option of --method"),
    (["x", "--costs", "absent"], "costs = 'absent': allowed is a file of CallCosts.save"),
    (["x", "--block-size", "0", "--method", "greedy"], "block-size = 0: allowed is no option of"),
    (["x", "--block-size", "1", "--save-costs", "a"], "save-costs = 'a': allowed is no option w"),
    (["x", "--save-costs", "absent/a.json"], "save-costs = 'absent/a.json': allowed is a path"),
    (["x", "--costs", "a", "--method", "blockwise"], "costs = 'a': allowed is no option of"),
    (["x", "--measure-costs", "--method", "greedy"], "measure-costs = True: allowed is no option"),
    (["x", "--measure-costs", "--costs", "a"], "measure-costs = True: allowed is no option beside"),
    (["x", "--addon", "absent"], "addon = 'absent': allowed is one that can be read"),
    (["x", "--max-length", "0"], "max_length = 0: allowed is a positive integer"),
    (["x", "--batch-size", "0"], "batch_size = 0: allowed is a positive multiple of 1"),
    (["x", "--dtype", "float12"], "ModelConfig.dtype = 'float12': allowed is bfloat16"),
    (["x", "--checkpoint", "absent"], "model folder = 'absent': allowed is a folder that exists"),
])
def test_bad_input_is_one_line_and_status_2(folder, options, message, capsys):
  with pytest.raises(SystemExit) as ended:
    run(main, ["--checkpoint", folder, *options])
  assert ended.value.code == 2
  out, err = capsys.readouterr()
  assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"error: {message}")


def test_command_in_a_pipe(folder, expected):
  done = subprocess.run(
      [sys.executable, "-m", "bpd_jax.decode", "--checkpoint", folder, "--max-length", "12"],
      cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, input="\n".join(PROMPTS),
      capture_output=True, text=True, check=True,
  )
  assert done.stderr == ""
  assert f"# 1: one prompt\n{expected.texts[0]}\n# 12 tokens" in done.stdout


def test_a_picture_has_every_call_and_asks_no_network(folder, expected, capsys, tmp_path):
  path = tmp_path / "calls.svg"
  shown_by(capsys, folder, "--svg", str(path), *PROMPTS)
  text = path.read_text(encoding="utf-8")
  root = ElementTree.fromstring(text)
  lines = [
      "".join(part.itertext()).replace("\xa0", " ") for part in root.findall(".//{*}text")
  ]
  joined = "".join(lines)
  for row, calls in enumerate(expected.calls):
    tokens = len(expected.tokens[row])
    assert f"{tokens} tokens, {calls} decoder calls" in joined
  drafted = re.findall(r" \d+/(\d+)  ", joined)
  assert len(drafted) == sum(expected.calls) and drafted.count("0") >= len(PROMPTS)
  assert "@font-face" not in text and "url(http" not in text
  with pytest.raises(InputError, match="svg"):
    main(["--checkpoint", folder, "--max-length", "4", "--svg", str(tmp_path / "no/x.svg"), "a"])
