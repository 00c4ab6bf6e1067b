"""Images and labels of every kind of data, and the batches of an epoch."""

from gradrep_kernels.recipes.data.load import Data, DataSource, load_data
from gradrep_kernels.recipes.data.loader import Loader

__all__ = ["Data", "DataSource", "Loader", "load_data"]
