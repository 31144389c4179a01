"""What a gin file can name besides the entry functions, registered once.

Importing this module is what makes `ModelConfig.d_model = 64` mean something;
the library itself knows nothing of gin.
"""

import gin

from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import RowsTask
from bpd_jax.evaluation.run import Method
from bpd_jax.model.config import ModelConfig
from bpd_jax.partitioning import make_partitioning

for configurable in (JsonlTask, Method, ModelConfig, RowsTask):
  gin.external_configurable(configurable, module="bpd_jax")
gin.external_configurable(make_partitioning, module="bpd_jax", denylist=["devices"])
