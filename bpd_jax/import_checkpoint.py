"""Makes a model folder from a folder of transformers' T5.

  python -m bpd_jax.import_checkpoint --from flan-t5-small --to models/flan-small
"""

from collections.abc import Sequence

import jax

from bpd_jax.addons.folder import save_model_with
from bpd_jax.addons.heads import Heads
from bpd_jax.checkpoints import describe
from bpd_jax.errors import InputError
from bpd_jax.folders import check_new
from bpd_jax.interchange.huggingface import import_model
from bpd_jax.launch import Parser, run
from bpd_jax.partitioning import single_device
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
      "--block-size", type=int, metavar="H",
      help="tokens predicted at once; H - 1 fresh parallel heads are added (default: the "
      "folder's heads, or none)",
  )
  parser.add_argument(
      "--head-d-ff", type=int, metavar="N",
      help="width inside each parallel head (default: the model's d_ff)",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the fresh heads (default 0)")
  args = parser.parse_args(argv)
  check_new(args.target)
  heads = Heads(1 if args.block_size is None else args.block_size, args.head_d_ff)
  config, params, own = import_model(args.source)
  if own:
    found = Heads(own["w1"].shape[0] + 1, own["w1"].shape[2])
    if args.block_size not in (None, found.block_size):
      raise InputError("block-size", args.block_size, f"{found.block_size}, the folder's heads")
    if args.head_d_ff not in (None, found.d_ff):
      raise InputError("head-d-ff", args.head_d_ff, f"{found.d_ff}, of the folder's heads")
    heads = found
  else:
    own = heads.begin(config, single_device(), jax.random.key(args.seed))
  words = vocabulary_path(args.source)
  if words is not None:
    check_added_tokens(args.source, open_vocabulary(words, config.vocab_size))
  save_model_with(args.target, config, params, words, heads, own)
  print(describe({"base": params, "own": own}, heads.describe(config)))
  if words is None:
    print("vocabulary  none found: the model takes token ids alone")
  print(f"written to  {args.target}")


if __name__ == "__main__":
  run(main)
