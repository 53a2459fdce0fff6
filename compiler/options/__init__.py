"""What users ask for, declared once and checked before anything is started."""
