import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # the project is flat files, not an installed package
# One thread: the tensors are small, and two threads fight with whatever else the machine does.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))

# Whoever deletes a folder of extras keeps the other tests: files that import from it are left out.
GONE = [name for name in ("after", "variants", "study", "course") if not (ROOT / name).exists()]
collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py")
                  if any(re.search(rf"^(from|import) {name}\b", path.read_text(), re.M) for name in GONE)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Named:
    """What the model needs of a losses.Target."""

    def __init__(self, dim):
        self.dim = dim

    def decoder(self, model):
        return model.build_decoder(model.config.aux_depth, self.dim)
