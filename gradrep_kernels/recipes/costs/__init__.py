"""What ways of training cost: counted, timed and measured for each row of a run."""

from gradrep_kernels.recipes.costs.counts import deployed, form_costs, forward_macs, parameters
from gradrep_kernels.recipes.costs.page import cost_columns

__all__ = ["cost_columns", "deployed", "form_costs", "forward_macs", "parameters"]
