"""What a run has come to: measured stage by stage, and written into tables, plots, a chapter and a model card."""
