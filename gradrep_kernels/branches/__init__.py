"""Blocks of linear branches that are one convolution."""
