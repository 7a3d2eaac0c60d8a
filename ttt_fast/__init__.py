"""Fast, small and exact test-time training of language models.

from ttt_fast import TTTTrainer, TTTConfig
ttt = TTTTrainer(model, TTTConfig(lr=1e-3, steps=20, scope="ffn"))
with ttt.adapt(input_ids) as adapted:
    output_ids = adapted.generate(max_new_tokens=64)
"""

__version__ = "0.1.0"

from ttt_fast.adaptation import Adaptation
from ttt_fast.batch import Batch
from ttt_fast.config import TTTConfig
from ttt_fast.objective import negative_log_likelihood
from ttt_fast.optim import FusedAdamW, FusedSGD, check_trainer
from ttt_fast.scope import select_parameters
from ttt_fast.selection import RowSlice, Selection
from ttt_fast.session import DivergedError, Session, StepReport
from ttt_fast.snapshot import Snapshot
from ttt_fast.trainer import TTTTrainer

__all__ = [
    "Adaptation",
    "Batch",
    "DivergedError",
    "FusedAdamW",
    "FusedSGD",
    "RowSlice",
    "Selection",
    "Session",
    "Snapshot",
    "StepReport",
    "TTTConfig",
    "TTTTrainer",
    "check_trainer",
    "negative_log_likelihood",
    "select_parameters",
]
