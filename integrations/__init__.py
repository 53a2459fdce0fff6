"""Pipelines inside of other libraries' training loops; each needs its library.

A folder, as `pipecompile.integrations.transformers` has to be a module of its own: importing it
imports transformers. The code is in runtime/integrations.
"""
