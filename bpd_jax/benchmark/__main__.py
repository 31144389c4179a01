"""The command `python -m bpd_jax.benchmark`."""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from bpd_jax.benchmark.decode import measure, Options, print_report
from bpd_jax.benchmark.engines import describe_machine, pin_cores, TABLE_WIDTH
from bpd_jax.benchmark.rescoring import (
    measure_rescoring,
    print_rescoring_report,
    RescoringOptions,
)
from bpd_jax.benchmark.train import measure_training, print_training_report, TrainOptions
from bpd_jax.errors import InputError
from bpd_jax.folders import local_path
from bpd_jax.launch import Parser, run
from bpd_jax.model.config import ModelConfig
from bpd_jax.terminal import description_column, plain_console

HELP = {
    "beam_width": "prefixes of a beam, for orders above 2",
    "depth": "steps of a lattice",
    "nodes": "of the decoder call that the cost is put beside",
    "num_paths": "best paths to find",
    "top_k": "candidates of a step",
    "batch_size": "rows of a step",
    "batch_sizes": "rows or lattices together",
    "block_size": "h of the model with heads",
    "input_length": "tokens of a row's inputs",
    "output_length": "tokens of a row's outputs",
    "repeats": "timed runs of everything",
    "threads": "cores of every engine",
    "widths": "nodes of a call",
}
COMMANDS = {
    "decode": (Options, "greedy and blockwise decoding"),
    "rescoring": (RescoringOptions, "n-grams over lattices, beside OpenFST and a decoder call"),
    "train": (TrainOptions, "training steps, without and with parallel heads"),
}


def main(argv: Sequence[str]) -> None:
  """Measures; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.benchmark",
      description="Times decoding, re-scoring or training on a CPU, beside other engines.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for command, (options_class, text) in COMMANDS.items():
    sub = commands.add_parser(command, help=text)
    for field in dataclasses.fields(options_class):
      is_list = isinstance(field.default, tuple)
      shown = " ".join(map(str, field.default)) if is_list else field.default
      sub.add_argument(
          f"--{field.name.replace('_', '-')}", type=int, metavar="N", default=field.default,
          nargs="+" if is_list else None, help=f"{HELP[field.name]} (default {shown})",
      )
    sub.add_argument("--json", metavar="FILE", help="also write the raw figures here")
  args: dict[str, Any] = vars(parser.parse_args(argv))
  command, file = args.pop("command"), args.pop("json")
  options = COMMANDS[command][0](**{
      name: tuple(value) if isinstance(value, list) else value for name, value in args.items()
  })
  if file is not None:
    file = local_path(file, "json")
    if not file.resolve().parent.is_dir():
      raise InputError("json", str(file), "a file in a folder that exists")
  pin_cores(options.threads)
  config = ModelConfig()
  if command == "train":
    # As a CPU trains fastest.
    config = config.replace(scan_unroll=config.num_encoder_layers)
  machine = describe_machine(options.threads)
  console = plain_console()
  console.width = max(console.width, TABLE_WIDTH)
  console.print(
      f"{machine['processor']}, {options.threads} threads; {config.dtype}; "
      + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
  )
  columns = description_column(28), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
  with Progress(*columns, console=console, transient=True) as progress:
    if command == "decode":
      figures = {"batches": measure(config, options, progress, console.print)}
    elif command == "rescoring":
      figures = measure_rescoring(config, options, progress, console.print)
    else:
      figures = measure_training(config, options, progress, console.print)
  if command == "decode":
    for record in figures["batches"]:
      print_report(console, record, options)
  elif command == "rescoring":
    print_rescoring_report(console, figures, options)
  else:
    print_training_report(console, figures, options)
  if file is not None:
    figures = {
        "machine": machine, "model": config.to_dict(), "options": dataclasses.asdict(options),
        **figures,
    }
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  run(main)
