"""What other frameworks need to be told. Each file imports the one that it is named for, and only when asked for."""
