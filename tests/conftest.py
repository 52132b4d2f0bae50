import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # the project is flat files, not an installed package
torch.set_num_threads(1)                # small tensors; two threads fight with whatever else the machine does


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
