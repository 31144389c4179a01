"""Makes a folder that transformers' T5 reads from a model folder.

  python -m bpd_jax.export --from models/flan-small --to flan-t5-small
"""

from collections.abc import Sequence

from bpd_jax.checkpoints import describe, load_model
from bpd_jax.folders import check_new
from bpd_jax.interchange.huggingface import export_model
from bpd_jax.launch import Parser, run
from bpd_jax.partitioning import single_device
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
  config, params = load_model(args.source, single_device())
  export_model(args.target, config, params, vocabulary_path(args.source))
  print(describe(config, params))
  print(f"written to  {args.target}")


if __name__ == "__main__":
  run(main)
