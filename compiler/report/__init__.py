"""What a person sees of a plan: tables, charts, comparisons, hints."""
