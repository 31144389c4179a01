"""Random T5 models of transformers, whose every parameter matters.

transformers starts norms at 1 and relative biases almost at 0, which hides
mistakes in both, so `make_t5` draws all parameters anew.
"""

import functools
import os

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# generate() of transformers 5.23 sizes its cache by the encoder's layers, so these models have
# more layers in the encoder than in the decoder.
KINDS = ("t5", "t5_1_1", "mt5")


def make_t5(kind, seed, *, dtype=torch.float32, eos_scale=1.0, **sizes):
  """A random model in evaluation mode.

  Args:
    kind: "t5" (ReLU, tied), "t5_1_1" or "mt5" (gated GELU, untied).
    seed: of the parameters.
    dtype: of the parameters, which are drawn in float32.
    eos_scale: multiplies the output's row of EOS (id 1). With 2, about half of
      greedy's rows end within 16 tokens; with 1, few do.
    **sizes: fields of transformers' T5Config in place of tiny ones.

  Returns:
    A T5ForConditionalGeneration, or MT5ForConditionalGeneration for "mt5".
  """
  fields = {
      "vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 2, "num_layers": 3,
      "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 20, "decoder_start_token_id": 0, "dropout_rate": 0.0,
  }
  if kind != "t5":
    fields |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
  fields |= sizes
  if kind == "mt5":
    config = transformers.MT5Config(**fields)
    model = transformers.MT5ForConditionalGeneration(config)
  else:
    config = transformers.T5Config(**fields)
    model = transformers.T5ForConditionalGeneration(config)
  if fields.get("tie_word_embeddings") is False:
    # transformers 5 makes every T5 tied; loading unties it where the values differ.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if "norm" in name:
        parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
      elif "relative_attention_bias" in name:
        parameter.copy_(2.0 * noise)
      elif name == "shared.weight":
        # A tied output, scaled by d_model ** -0.5, then has logits of about 1.
        parameter.copy_(noise)
      else:
        # Attention scores get a spread of about 1 from d_kv products.
        parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    # Without signs in the last norm a tied output repeats its input token for ever.
    model.decoder.final_layer_norm.weight[::2] *= -1
    model.lm_head.weight[1] *= eos_scale
  model = model.to(dtype).eval()
  if dtype == torch.float64:
    for module in model.modules():
      if type(module).__name__.endswith("LayerNorm"):
        module.forward = functools.partial(_norm, module)
  return model


def _norm(module, x):
  """transformers' RMS norm takes the mean square in float32 even of float64."""
  mean_square = x.pow(2).mean(-1, keepdim=True)
  return module.weight * (x * torch.rsqrt(mean_square + module.variance_epsilon))


def save(model, folder, **options):
  """Writes the model as transformers does; options are `save_pretrained`'s."""
  model.save_pretrained(os.fspath(folder), **options)
