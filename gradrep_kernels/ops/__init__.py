"""All that is computed, and by whom: three rooms with the same file names, one file per op."""
