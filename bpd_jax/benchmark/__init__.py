"""How fast this machine decodes and trains, beside other engines; see docs/benchmark.md."""
