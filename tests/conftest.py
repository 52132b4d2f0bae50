import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # the project is flat files, not an installed package
# One thread: the tensors are small, and two threads fight with whatever else the machine does.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
