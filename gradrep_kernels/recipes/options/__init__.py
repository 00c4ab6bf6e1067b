"""The options of a job: their declarations, the papers' presets, the command line, and how they are resolved."""
