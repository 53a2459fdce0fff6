"""Who is told of a training: `Callback`, to write one, and those that are ready."""

from .runtime.monitor.callbacks import Callback as Callback
from .runtime.monitor.callbacks import Logger as Logger
from .runtime.monitor.console import Console as Console
from .runtime.monitor.curve import Curve as Curve
from .runtime.monitor.files import CSV as CSV
from .runtime.monitor.files import JSONL as JSONL
from .runtime.monitor.trackers import MLflow as MLflow
from .runtime.monitor.trackers import Neptune as Neptune
from .runtime.monitor.trackers import TensorBoard as TensorBoard
from .runtime.monitor.trackers import WandB as WandB
