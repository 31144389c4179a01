"""Tests run on the CPU, where a TPU's compiler may be installed without a TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
