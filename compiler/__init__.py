"""A model and a batch in; stage programs, a schedule and a plan out; `api` is the one call."""
