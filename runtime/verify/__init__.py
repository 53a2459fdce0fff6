"""The first steps of a pipeline beside a plain copy of the model: `compile(..., verify=2)`."""
