"""Makes a model folder from a folder of transformers' T5.

  python -m bpd_jax.import_checkpoint --from flan-t5-small --to models/flan-small
"""

from collections.abc import Sequence

from bpd_jax.checkpoints import describe, save_model
from bpd_jax.folders import check_new
from bpd_jax.interchange.huggingface import import_model
from bpd_jax.launch import Parser, run
from bpd_jax.vocabulary import check_added_tokens, open_vocabulary, vocabulary_path


def main(argv: Sequence[str]) -> None:
  """Imports; see `--help`."""
  parser = Parser(
      prog="python -m bpd_jax.import_checkpoint", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
      "--from", dest="source", required=True, metavar="DIR",
      help="folder with config.json and safetensors",
  )
  parser.add_argument(
      "--to", dest="target", required=True, metavar="DIR",
      help="model folder to make; nothing may be there yet",
  )
  parser.add_argument(
      "--block-size", type=int, default=1, metavar="H",
      help="tokens predicted at once; H - 1 parallel heads are added (default 1)",
  )
  parser.add_argument(
      "--head-d-ff", type=int, metavar="N",
      help="width inside each parallel head (default: the model's d_ff)",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the fresh heads (default 0)")
  args = parser.parse_args(argv)
  check_new(args.target)
  config, params = import_model(
      args.source, block_size=args.block_size, head_d_ff=args.head_d_ff, seed=args.seed
  )
  words = vocabulary_path(args.source)
  if words is not None:
    check_added_tokens(args.source, open_vocabulary(words, config.vocab_size))
  save_model(args.target, config, params, words)
  print(describe(config, params))
  if words is None:
    print("vocabulary  none found: the model takes token ids alone")
  print(f"written to  {args.target}")


if __name__ == "__main__":
  run(main)
