"""Imported last by the process that gangs are forked from: what it has imported is no garbage of
theirs, and none of them looks through it."""

from support.process import settle

settle()
