"""python -m gradrep_kernels train | search | quantize | costs | env"""

from gradrep_kernels.cli import entry

if __name__ == "__main__":
    entry("python -m gradrep_kernels")
