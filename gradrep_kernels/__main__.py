"""python -m gradrep_kernels train | search | env"""

import sys

from gradrep_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
