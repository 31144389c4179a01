"""What a gin file can name besides the entry functions, registered once.

Importing this module is what makes `ModelConfig.d_model = 64` mean something;
the library itself knows nothing of gin.
"""

import gin

from bpd_jax.addons.heads import Heads
from bpd_jax.data.datasets import CachedTask
from bpd_jax.data.grammar import GrammarTask
from bpd_jax.data.jsonl import JsonlTask
from bpd_jax.data.rows import RowsTask
from bpd_jax.evaluation.drafting import Draft, Reference
from bpd_jax.evaluation.policing import GoodputSource
from bpd_jax.evaluation.run import Method
from bpd_jax.evaluation.scoring import (
    CacheSource,
    NeuralSource,
    NgramSource,
    NoRepeatSource,
    OracleSource,
)
from bpd_jax.evaluation.tuning import Tuned, Tuning
from bpd_jax.evaluation.validation import Validation
from bpd_jax.model.config import ModelConfig
from bpd_jax.partitioning import make_partitioning
from bpd_jax.training.loop import Schedule
from bpd_jax.training.loss import Loss
from bpd_jax.training.optimizer import Optimizer

for configurable in (
 CachedTask, CacheSource, Draft, GoodputSource, GrammarTask, Heads, JsonlTask, Loss, Method,
    ModelConfig, NeuralSource, NgramSource, NoRepeatSource, Optimizer, OracleSource, Reference,
    RowsTask, Schedule, Tuned, Tuning, Validation,
):
  gin.external_configurable(configurable, module="bpd_jax")
gin.external_configurable(make_partitioning, module="bpd_jax", denylist=["devices"])
