"""The compute actions of a schedule, from the shape of a pipeline: one file per kind."""
