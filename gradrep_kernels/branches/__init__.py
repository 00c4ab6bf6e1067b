"""Blocks of linear branches that are one convolution, and the models that hold them.

A kind of block is one file (`csla`, `normed`) on top of `algebra` (sums of kernels), `sites` (which convolutions),
`convert` (into a model and back) and `scales` (names and files of branch scales).
"""
