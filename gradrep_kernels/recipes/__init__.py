"""The jobs behind the commands: data, schedules, the training loop, resuming, report and pictures."""
