"""Makes a folder that transformers' T5 reads from a model folder.

  python -m bpd_jax.export --from models/flan-small --to flan-t5-small
"""

from collections.abc import Sequence

from bpd_jax.checkpoints import describe
from bpd_jax.folders import check_new
from bpd_jax.generation import load
from bpd_jax.interchange.huggingface import export_model
from bpd_jax.launch import Parser, run
from bpd_jax.vocabulary import vocabulary_path


def main(argv: Sequence[str]) -> None:
  """Exports; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.export", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
      "--from", dest="source", required=True, metavar="DIR", help="model folder"
  )
  parser.add_argument(
      "--to", dest="target", required=True, metavar="DIR",
      help="folder to make; nothing may be there yet",
  )
  args = parser.parse_args(argv)
  check_new(args.target)
  model = load(args.source)
  heads, own = model.own_heads
  export_model(
      args.target, model.config, model.params, vocabulary_path(args.source), heads=own
  )
  print(describe({"base": model.params, "own": own}, heads.describe(model.config)))
  print(f"written to  {args.target}")


if __name__ == "__main__":
  run(main)
