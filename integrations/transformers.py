"""`PipelineTrainer`, a `transformers.Trainer` whose model is a pipeline."""

from ..runtime.integrations.trainer import PipelineTrainer as PipelineTrainer
