"""The jobs behind the commands: options, data, recipes, training, resuming, report."""
