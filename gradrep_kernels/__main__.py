"""python -m gradrep_kernels train | search | quantize | env"""

from gradrep_kernels.cli import entry

if __name__ == "__main__":
    entry("python -m gradrep_kernels")
