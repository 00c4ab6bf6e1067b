"""What `import gradrep_kernels` must not load."""

from __future__ import annotations

import subprocess
import sys


def test_torch_dynamo_is_not_imported():
    """torch._dynamo takes 3 s, and only torch.compile needs it. torch itself does not load it either."""
    code = "import sys, gradrep_kernels; print('torch._dynamo' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
