"""Runs that differ in some options, and one table of them all."""
